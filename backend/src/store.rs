//! The seam between metadata and bytes: look up, fetch, release.
//!
//! A lookup is one atomic load and never waits. A fetch returns at once and calls back, once, from a
//! thread of the store, when every chunk asked for is resident, or with the reason why one is not.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use crate::chunk::BlobDescription;
pub use crate::config::{CacheConfig, SourceConfig, StoreOptions};

/// Who asks. Lower values go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A guest waits for it.
    Demand,
    /// Somebody said that it will soon be wanted.
    Hinted,
    /// The rest of the blob, when nothing else is to do.
    Background,
}

/// Why chunks could not be made resident.
#[derive(Clone, Debug, thiserror::Error)]
#[error("blob {blob_id}: {reason}")]
pub struct FetchError {
    /// The blob.
    pub blob_id: String,
    /// What failed, with the source's host, attempts and time spent; no secrets.
    pub reason: String,
    /// The deadline passed (the guest may retry with success later).
    pub timed_out: bool,
}

/// Chunks that could not be cached (disk full, read-only cache) and are held in memory instead:
/// verified bytes by chunk index.
#[derive(Clone, Default, Debug)]
pub struct Held {
    /// (chunk index, its uncompressed bytes).
    pub chunks: Vec<(u32, Arc<[u8]>)>,
}

/// Called once with the outcome of a fetch.
pub type Completion = Box<dyn FnOnce(Result<Held, FetchError>) + Send>;

/// The chunk store of a process: cache directories, network runtime, budgets.
pub struct Store {}

impl Store {
    /// Starts the threads of a store.
    pub fn new(_options: StoreOptions) -> io::Result<Self> {
        todo!()
    }

    /// Opens a blob: its cache file and residency map, no network. Mounts that name the same blob id, source and
    /// cache directory share one.
    pub fn open_blob(
        &self,
        _description: BlobDescription,
        _source: &SourceConfig,
        _cache: &CacheConfig,
    ) -> Result<Arc<Blob>, FetchError> {
        todo!()
    }
}

/// One blob, opened: a cache file with its residency map, and a source to fill it from.
/// Shared by all mounts that use the same blob from the same cache directory and source.
pub struct Blob {}

impl Blob {
    /// What the blob was opened with.
    pub fn description(&self) -> &BlobDescription {
        todo!()
    }

    /// Whether chunk `index` is resident, that is complete and verified in the cache file.
    pub fn is_resident(&self, _index: u32) -> bool {
        todo!()
    }

    /// Counts evictions. Read it before `is_resident` and after the data were read: if it changed,
    /// look up again, for the data may have been freed in between.
    pub fn generation(&self) -> u64 {
        todo!()
    }

    /// The cache file: the uncompressed view of the blob, holes where chunks are absent.
    pub fn file(&self) -> BorrowedFd<'_> {
        todo!()
    }

    /// Makes `chunks` resident. Returns at once; `done` is called exactly once, from another thread,
    /// by `deadline` at the latest. Dropping interest costs other waiters nothing.
    pub fn fetch(
        self: &Arc<Self>,
        _chunks: &[u32],
        _priority: Priority,
        _deadline: Instant,
        _done: Completion,
    ) {
        todo!()
    }
}
