//! A device over file systems without files, and a guest whose requests are made up.
//!
//! Both are in this process, connected as a machine monitor connects them: socket, guest memory, queues with threads. An
//! input is done when everything that it made available has come back, however bad it was.

use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rafsd::mounts::{Instance, MountOptions, Mounts};
use rafsd::virtio::{Device, DeviceOptions};
use rafsd_frontend::memory::{GuestMemory, Place};
use rafsd_frontend::ops::Init;
use rafsd_frontend::vring::{Descriptor, Used};
use rafsd_frontend::{Guest, Options};

use crate::null::{NullHost, NullImage};

/// Where the rings are: the lowest memory there is. Nothing made up may be written there, or it would be the rings that
/// are made up.
const RINGS: u64 = 1 << 41;
const RINGS_SIZE: u64 = 1 << 20;
/// Memory for requests and answers: two regions that touch, so that there is a border to cross.
pub(crate) const DATA: u64 = 3 << 41;
/// Bytes of each of the two.
pub(crate) const REGION: u64 = 1 << 20;
/// Whatever waits must have come back after this time.
const PATIENCE: Duration = Duration::from_secs(15);

/// The device, its guest, and what the guest knows.
pub(crate) struct Machine {
    device: Device,
    pub(crate) guest: Guest,
    /// Nodes of every kind, and some that are none.
    pub(crate) nodes: Vec<u64>,
    _directory: tempfile::TempDir,
}

impl Machine {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mounts = Arc::new(Mounts::new());
        let host = || Instance::Passthrough(Arc::new(NullHost));
        let read_only = MountOptions {
            read_only: true,
            ..MountOptions::default()
        };
        for (path, instance, options) in [
            ("/deep/host", host(), MountOptions::default()),
            ("/second", host(), MountOptions::default()),
            ("/frozen", host(), read_only),
            (
                "/image",
                Instance::Rafs(Arc::new(NullImage)),
                MountOptions::default(),
            ),
        ] {
            mounts.mount(path, instance, options).unwrap();
        }
        let options = DeviceOptions {
            request_queues: 1,
            locks: true,
            security_labels: true,
            killpriv: true,
            posix_acl: true,
            ..DeviceOptions::default()
        };
        let device = Device::start(UnixListener::bind(&socket).unwrap(), mounts, options).unwrap();
        let place = |address, size| Place { address, size };
        let guest = Guest::boot(
            &socket,
            Options {
                regions: vec![
                    place(RINGS, RINGS_SIZE),
                    place(DATA, REGION),
                    place(DATA + REGION, REGION),
                ],
                ..Options::default()
            },
        )
        .unwrap();
        let mut nodes = vec![1];
        for path in ["/deep", "/deep/host", "/second", "/frozen", "/image"] {
            let node = guest.resolve(path).unwrap().nodeid;
            // Neighbours: directories, files, and those in a mood.
            nodes.extend([node, node + 1, node + 12, node + 16, node + 30]);
        }
        nodes.extend([0, 99, 77 << 40, u64::MAX]);
        Machine {
            device,
            guest,
            nodes,
            _directory: directory,
        }
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.guest.memory
    }

    /// A descriptor that a hostile guest may have, except that the device must not be told to write over the rings.
    pub(crate) fn tamed(&self, descriptor: Descriptor) -> Descriptor {
        let end = descriptor.address.saturating_add(u64::from(descriptor.len));
        if descriptor.address < RINGS + RINGS_SIZE && end > RINGS {
            let address = DATA + descriptor.address % REGION;
            return Descriptor {
                address,
                ..descriptor
            };
        }
        descriptor
    }

    /// Waits until all has come back, and takes it. What waits for locks is told that the session is over.
    pub(crate) fn settle(&self) -> Vec<(usize, Used)> {
        let start = Instant::now();
        self.guest.init(&Init::default()).unwrap();
        let mut asked = Instant::now();
        loop {
            let mut pending = 0;
            for queue in 0..self.guest.queues() {
                let mut lane = self.guest.lane(queue);
                lane.drain().unwrap();
                pending += lane.queue.pending();
            }
            if pending == 0 {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "{pending} requests do not come back");
            if asked.elapsed() > Duration::from_millis(5) {
                // A lock may have been asked for after the last one.
                self.guest.init(&Init::default()).unwrap();
                asked = Instant::now();
            } else {
                std::thread::yield_now();
            }
        }
        assert_eq!(self.device.parked(), 0);
        assert_eq!(self.device.metrics().bugs, 0, "a request was dropped");
        let take = |queue| {
            let raw = std::mem::take(&mut self.guest.lane(queue).raw);
            raw.into_iter().map(move |used| (queue, used))
        };
        (0..self.guest.queues()).flat_map(take).collect()
    }
}

/// The machine of this process, for one input at a time.
pub(crate) fn machine() -> MutexGuard<'static, Machine> {
    static MACHINE: OnceLock<Mutex<Machine>> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| Mutex::new(Machine::start()));
    // A test that failed has said so.
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}
