//! What the twins share: a daemon, and a front-end that speaks as Cloud Hypervisor does.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::memory::Place;
use rafsd_frontend::ops;
use rafsd_frontend::random::Random;
use rafsd_frontend::{Guest, Options, Order, Ticket};

pub const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");

/// As the program does it, with little memory, so that all of it can be compared.
pub fn options() -> Options {
    let place = |address, size| Place { address, size };
    Options {
        order: Order::CloudHypervisor,
        queue_size: 256,
        regions: vec![
            place(0, 4 << 20),
            place(4 << 20, 4 << 20),
            place(1 << 32, 4 << 20),
        ],
        ..Options::default()
    }
}

/// A daemon with a directory of the host at the top of its tag.
pub fn daemon() -> (Daemon, PathBuf) {
    let builder = Builder::new(RAFSD).unwrap();
    let shared = builder.directory().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let daemon = builder.start().unwrap();
    daemon.mount_passthrough("/", &shared).unwrap();
    (daemon, shared)
}

/// Boots as soon as the end of the connection before has been seen; the program retries for a minute.
pub fn boot(daemon: &Daemon) -> Guest {
    until(|| Guest::boot(&daemon.socket, options()))
}

pub fn until<T, E: std::fmt::Display>(mut attempt: impl FnMut() -> Result<T, E>) -> T {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(30), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A file that is read and written all the time, with a copy to compare.
pub struct Work {
    pub node: u64,
    pub fh: u64,
    model: Vec<u8>,
    random: Random,
}

impl Work {
    pub fn new(guest: &Guest, name: &str) -> Self {
        let (entry, fh) = guest.create(ops::ROOT, name, 0o644, libc::O_RDWR as u32).unwrap();
        Work {
            node: entry.nodeid,
            fh,
            model: vec![0; 400_000],
            random: Random::new(11),
        }
    }

    /// Writes in flight; they do not overlap, for they are done in any order.
    pub fn start(&mut self, guest: &Guest) -> Vec<Ticket> {
        let requests: Vec<_> = (0..20)
            .map(|number| {
                let at = number * 20_000 + self.random.below(5000);
                let data = self.random.bytes(15_000);
                self.model[at..at + data.len()].copy_from_slice(&data);
                ops::write(self.node, self.fh, at as u64, &data)
            })
            .collect();
        guest.submit_all(1, &requests).unwrap()
    }

    pub fn finish(&self, guest: &Guest, tickets: Vec<Ticket>) {
        for ticket in tickets {
            assert_eq!(guest.wait(ticket).unwrap().errno, 0);
        }
        let end = self
            .model
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |at| at + 1);
        let mut found = Vec::new();
        while found.len() < end {
            found.extend(
                guest
                    .read(self.node, self.fh, found.len() as u64, 100_000)
                    .unwrap(),
            );
        }
        assert!(
            found[..end] == self.model[..end],
            "what was written is not what is read"
        );
    }
}

/// Nothing is left in flight, and nothing was lost.
pub fn assert_idle(guest: &Guest) {
    for queue in 0..guest.queues() {
        guest.wait_idle(queue).unwrap();
    }
    let counts = guest.counts();
    assert_eq!(counts.added, counts.used);
}
