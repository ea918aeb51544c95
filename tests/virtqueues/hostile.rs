//! What a guest may try. After each attempt every head has come back, the queue goes on, the daemon lives, and
//! nothing outside the mounts was touched.

mod chains;
mod messages;
mod random;
mod socket;
mod time;

use std::path::PathBuf;

use crate::support::{containers, message, passthrough_with};
use rafsd_frontend::abi::opcode;
use rafsd_frontend::daemon::Daemon;
use rafsd_frontend::memory::{PAGE, Place};
use rafsd_frontend::vring::Descriptor;
use rafsd_frontend::{Guest, Options};

/// The border at which the first two regions touch.
const BORDER: u64 = 8 << 20;
/// A hole in guest memory.
const HOLE: u64 = 1 << 30;

fn options() -> Options {
    Options {
        queue_size: 128,
        regions: vec![
            Place {
                address: 0,
                size: BORDER,
            },
            Place {
                address: BORDER,
                size: 8 << 20,
            },
            Place {
                address: 4 << 30,
                size: 8 << 20,
            },
        ],
        ..Options::default()
    }
}

struct Victim {
    daemon: Daemon,
    guest: Guest,
    shared: PathBuf,
    top: u64,
}

impl Victim {
    fn new() -> Self {
        let (daemon, guest, shared) = passthrough_with(options());
        std::fs::write(shared.join("file"), "contents").unwrap();
        std::fs::create_dir(shared.join("dir")).unwrap();
        let top = containers(&guest);
        Self {
            daemon,
            guest,
            shared,
            top,
        }
    }

    /// All heads are back, and the device still serves.
    fn check(&mut self, what: &str) {
        for queue in 0..self.guest.queues() {
            self.guest
                .wait_idle(queue)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        assert!(self.daemon.is_alive(), "{what}: the daemon died");
        let counts = self.guest.counts();
        assert_eq!(counts.added, counts.used, "{what}");
        self.guest
            .getattr(self.top)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let listed = std::fs::read_dir(self.shared.parent().unwrap()).unwrap().count();
        assert_eq!(
            listed, 4,
            "{what}: something was made outside of the shared directory"
        );
    }

    /// Memory with a GETATTR in it and room behind it: (request, its length, room for the answer).
    fn request(&self) -> (u64, u32, u64) {
        let bytes = message(opcode::GETATTR, self.top, &[0; 16]);
        let address = self.guest.memory.allocate(3 * PAGE as usize, PAGE).unwrap();
        self.guest.memory.write(address, &bytes);
        (address, bytes.len() as u32, address + PAGE)
    }

    fn chain(&self, descriptors: &[Descriptor]) {
        self.guest.submit_descriptors(1, descriptors).unwrap();
    }
}

fn with(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}
