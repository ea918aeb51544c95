//! Counters of the device: plain numbers, one set per group of threads, added up when somebody asks.
//!
//! Rooms: this file (the device as a whole), `mount` (one mount), `running` (what a thread does now), `shard` (which set
//! a thread counts in).

mod mount;
mod running;
mod shard;

use std::sync::atomic::{AtomicU64, Ordering};

use crate::fuse::abi::Opcode;
pub use mount::{Latencies, MountMetrics, MountSnapshot, Work};
pub(crate) use running::{Executing, Running};
pub(crate) use shard::{SHARDS, Shard};

/// Error numbers are counted one by one up to this one; all higher ones together.
const ERRNOS: usize = 134;

#[repr(align(128))]
struct Counters {
    requests: [AtomicU64; Opcode::COUNT],
    errors: [AtomicU64; ERRNOS],
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    popped: AtomicU64,
    used: AtomicU64,
    signals: AtomicU64,
    wakeups: AtomicU64,
    parked: AtomicU64,
    deferred: AtomicU64,
    expired: AtomicU64,
    malformed: AtomicU64,
    bugs: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            requests: [const { AtomicU64::new(0) }; Opcode::COUNT],
            errors: [const { AtomicU64::new(0) }; ERRNOS],
            bytes_read: AtomicU64::default(),
            bytes_written: AtomicU64::default(),
            popped: AtomicU64::default(),
            used: AtomicU64::default(),
            signals: AtomicU64::default(),
            wakeups: AtomicU64::default(),
            parked: AtomicU64::default(),
            deferred: AtomicU64::default(),
            expired: AtomicU64::default(),
            malformed: AtomicU64::default(),
            bugs: AtomicU64::default(),
        }
    }
}

/// The counters of one device.
pub struct Metrics {
    shards: Box<[Counters]>,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics {
            shards: (0..SHARDS).map(|_| Counters::default()).collect(),
        }
    }
}

/// The counters at one moment. All count since the device was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Requests by operation, in the protocol's order; operations that never came are left out.
    pub requests: Vec<(&'static str, u64)>,
    /// Error replies by error number.
    pub errors: Vec<(i32, u64)>,
    /// Bytes of data sent to the guest by READ.
    pub bytes_read: u64,
    /// Bytes of data taken from the guest by WRITE.
    pub bytes_written: u64,
    /// Descriptor chains taken from available rings.
    pub popped: u64,
    /// Descriptor chains returned to used rings.
    pub used: u64,
    /// Times that a driver was told of used descriptors.
    pub signals: u64,
    /// Times that a queue thread was woken.
    pub wakeups: u64,
    /// Reads that had to wait for absent data.
    pub parked: u64,
    /// Requests handed to a worker.
    pub deferred: u64,
    /// Requests answered because their deadline passed.
    pub expired: u64,
    /// Chains and messages that no driver sends.
    pub malformed: u64,
    /// Requests that were dropped without an answer and got EIO. Always 0 in a correct program.
    pub bugs: u64,
}

impl Metrics {
    fn add(&self, counter: impl Fn(&Counters) -> Option<&AtomicU64>, by: u64) {
        let mine = Shard::mine();
        if let Some(counter) = self.shards.get(mine.index()).and_then(counter) {
            mine.add(counter, by);
        }
    }

    /// A request with this opcode was decoded.
    pub fn request(&self, opcode: Opcode) {
        self.add(|shard| shard.requests.get(opcode.index()), 1);
    }

    /// An error was answered.
    pub fn error(&self, errno: i32) {
        let index = usize::try_from(errno).unwrap_or(0).min(ERRNOS - 1);
        self.add(|shard| shard.errors.get(index), 1);
    }

    /// So many bytes went to the guest.
    pub fn read(&self, bytes: u64) {
        self.add(|shard| Some(&shard.bytes_read), bytes);
    }

    /// So many bytes came from the guest.
    pub fn written(&self, bytes: u64) {
        self.add(|shard| Some(&shard.bytes_written), bytes);
    }

    /// A chain was taken from an available ring.
    pub fn popped(&self) {
        self.add(|shard| Some(&shard.popped), 1);
    }

    /// A chain was returned to a used ring.
    pub fn used(&self) {
        self.add(|shard| Some(&shard.used), 1);
    }

    /// A driver was told.
    pub fn signal(&self) {
        self.add(|shard| Some(&shard.signals), 1);
    }

    /// A queue thread was woken.
    pub fn wakeup(&self) {
        self.add(|shard| Some(&shard.wakeups), 1);
    }

    /// A read was parked.
    pub fn parked(&self) {
        self.add(|shard| Some(&shard.parked), 1);
    }

    /// A request was handed to a worker.
    pub fn deferred(&self) {
        self.add(|shard| Some(&shard.deferred), 1);
    }

    /// A deadline passed.
    pub fn expired(&self) {
        self.add(|shard| Some(&shard.expired), 1);
    }

    /// Something came that no driver sends.
    pub fn malformed(&self) {
        self.add(|shard| Some(&shard.malformed), 1);
    }

    /// A request was dropped without an answer.
    pub fn bug(&self) {
        self.add(|shard| Some(&shard.bugs), 1);
    }

    /// All counters, added up.
    pub fn snapshot(&self) -> Snapshot {
        let sum = |counter: &dyn Fn(&Counters) -> Option<&AtomicU64>| -> u64 {
            self.shards
                .iter()
                .filter_map(counter)
                .map(|counter| counter.load(Ordering::Relaxed))
                .sum()
        };
        let nonzero = |count: u64| (count > 0).then_some(count);
        let request = |opcode: Opcode| {
            let count = sum(&|shard: &Counters| shard.requests.get(opcode.index()));
            Some((opcode.name(), nonzero(count)?))
        };
        let error = |errno: usize| {
            let count = sum(&|shard: &Counters| shard.errors.get(errno));
            Some((i32::try_from(errno).ok()?, nonzero(count)?))
        };
        Snapshot {
            requests: Opcode::all().filter_map(request).collect(),
            errors: (0..ERRNOS).filter_map(error).collect(),
            bytes_read: sum(&|shard| Some(&shard.bytes_read)),
            bytes_written: sum(&|shard| Some(&shard.bytes_written)),
            popped: sum(&|shard| Some(&shard.popped)),
            used: sum(&|shard| Some(&shard.used)),
            signals: sum(&|shard| Some(&shard.signals)),
            wakeups: sum(&|shard| Some(&shard.wakeups)),
            parked: sum(&|shard| Some(&shard.parked)),
            deferred: sum(&|shard| Some(&shard.deferred)),
            expired: sum(&|shard| Some(&shard.expired)),
            malformed: sum(&|shard| Some(&shard.malformed)),
            bugs: sum(&|shard| Some(&shard.bugs)),
        }
    }
}
