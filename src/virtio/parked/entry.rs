//! One request that waits, and what is known about its wait.

use std::sync::Arc;
use std::time::Instant;

use rafs::fs::HeldChunks;

use crate::fuse::errno::Errno;
use crate::metrics::MountMetrics;
use crate::mounts::{CancelLock, Mount};
use crate::virtio::request::Parked;

/// What a request that waited is answered with.
pub enum Answer {
    /// A body.
    Body(Vec<u8>),
    /// An error number.
    Errno(Errno),
    /// Read again: what was absent has arrived.
    Read(HeldChunks),
}

/// A read of an image.
#[derive(Clone, Copy, Debug)]
pub struct ImageRead {
    /// Local id.
    pub inode: u64,
    /// Where to start, in bytes.
    pub offset: u64,
    /// Bytes wanted.
    pub size: u32,
}

/// A request in the table.
pub(super) struct Entry {
    pub parked: Box<Parked>,
    pub wait: Wait,
}

/// What is known about a wait.
pub(super) struct Wait {
    pub since: Instant,
    /// Where its file is mounted; empty for the pseudo tree.
    pub place: String,
    /// Where its latency is counted.
    pub meter: Option<Arc<MountMetrics>>,
    /// None for jobs of a worker, which keep what they need themselves, and once the answer is known.
    pub mount: Option<Arc<Mount>>,
    pub read: Option<ImageRead>,
    /// Of a lock that is waited for.
    pub lock: Option<LockWait>,
    /// How often the data of a read has been fetched again.
    pub attempts: u32,
    /// None for locks, and for jobs of a worker, which are as long as they are.
    pub deadline: Option<Instant>,
    /// Known, but the ring does not run.
    pub ready: Option<Answer>,
}

impl Wait {
    /// A wait that begins now, of a request for a file of `mount`.
    pub fn on(mount: Option<&Mount>) -> Self {
        Wait {
            since: Instant::now(),
            place: mount.map(|mount| mount.path.clone()).unwrap_or_default(),
            meter: mount.map(|mount| Arc::clone(&mount.metrics)),
            mount: None,
            read: None,
            lock: None,
            attempts: 0,
            deadline: None,
            ready: None,
        }
    }

    /// Whether an INTERRUPT ends it.
    pub fn can_give_up(&self) -> bool {
        self.ready.is_none() && (self.read.is_some() || self.lock.is_some())
    }
}

/// How a wait for a lock is ended.
#[derive(Default)]
pub(super) struct LockWait {
    /// None until the keeper of the locks has said how.
    pub cancel: Option<CancelLock>,
    /// What it ends with if the lock was not taken; the keeper's error if nobody else ended it.
    pub end: Option<LockEnd>,
}

#[derive(Clone, Copy)]
pub(super) enum LockEnd {
    Fail(Errno),
    /// There is nobody to tell.
    Abandon,
}
