//! The seam between metadata and bytes: look up, fetch, release.
//!
//! A lookup is one atomic load and never waits. A fetch returns at once and calls back, once, from a
//! thread of the store, when every chunk asked for is resident, or with the reason why one is not.
//!
//! A [`Blob`] is one image's view of a blob: its description, and the chunks that were verified against it. Behind
//! it, views of the same blob from the same source and cache directory share the cache files and the flights of chunks, so that a chunk is fetched
//! once, while each image still trusts its own digests only.
//!
//! Parts: `index` (the blob's own list of chunks), `fetch` (from absent chunks to resident ones), `flight` and
//! `waiter` (what is on its way, and for whom), `share` (one fetch per chunk among processes), `request` (reads a range), `plan` (which
//! ranges to ask for), `ahead` (how much around them), `gather` (one request for several readers), `budget` (who may ask now), `strain` (whether it should) and `width` (how often at a time), `pool` (the decode threads), `status` (what people ask).

mod ahead;
mod budget;
mod fetch;
mod flight;
mod gather;
mod index;
mod origin;
mod plan;
mod pool;
mod prefetch;
mod request;
mod share;
mod status;
mod strain;
mod waiter;
mod width;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::runtime::{Builder, Runtime};

use crate::cache::{CacheFiles, Directory, Residency};
use crate::chunk::BlobDescription;
pub use crate::config::{CacheConfig, SourceConfig, StoreOptions};
use crate::config::{Secret, StoreThread};
pub use crate::error::FetchError;
use crate::error::SourceError;
use crate::metrics::{BlobMetrics, SourceMetrics};
use crate::source::Source;
use crate::source::clients::{Clients, Peer};
use crate::source::dir::Dir;
use crate::source::disk::Disk;
use crate::source::http::Transport;
use crate::source::http_proxy::HttpProxy;
use crate::source::oss::Oss;
use crate::source::registry::Registry;
use crate::source::remote::Remote;
use crate::source::s3::S3;
use budget::Budget;
use fetch::Plan;
use flight::Shared;
use gather::Gather;
use index::IndexState;
use origin::Origin;
use pool::Pool;
pub use prefetch::{Idle, Paused, Prefetch, PrefetchOptions, PrefetchProgress, Wanted, Wish};
pub use waiter::Lease;
use waiter::Waiter;

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

/// What a fetch gives beside residency.
#[derive(Clone, Default, Debug)]
pub struct Held {
    /// Chunks that could not be cached (disk full, quota used up, read-only cache): their index and their verified,
    /// uncompressed bytes.
    pub chunks: Vec<(u32, Arc<[u8]>)>,
    /// Keeps the chunks that became resident from being evicted before they were read, for a few seconds at most.
    pub lease: Option<Arc<Lease>>,
}

/// Called once with the outcome of a fetch.
pub type Completion = Box<dyn FnOnce(Result<Held, FetchError>) + Send>;

/// The chunk store of a process: cache directories, network runtime, budgets. Its threads live until the store and
/// the last blob opened from it are dropped.
pub struct Store {
    engine: Arc<Engine>,
}

/// What blobs need of their store.
pub(crate) struct Engine {
    runtime: Option<Runtime>,
    pool: Pool,
    budget: Arc<Budget>,
    sources: Mutex<HashMap<SourceConfig, Weak<Origin>>>,
    shared: Mutex<HashMap<SharedKey, Weak<Shared>>>,
    lanes: AtomicU64,
    directories: Mutex<HashMap<PathBuf, Weak<Directory>>>,
    clients: Arc<Clients>,
}

/// Blob id, cache directory, lane of the source.
type SharedKey = (String, PathBuf, u64);

impl Store {
    /// Starts the threads of a store.
    pub fn new(options: StoreOptions) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(options.net_threads.max(1))
            .thread_name("net")
            .on_thread_start({
                let start = options.thread_start.clone();
                move || (start.0)(StoreThread::Net)
            })
            .enable_all()
            .build()?;
        let engine = Engine {
            runtime: Some(runtime),
            pool: Pool::new(options.decode_threads, &options.thread_start)?,
            budget: Budget::new(options.memory, options.requests_per_source),
            sources: Mutex::default(),
            shared: Mutex::default(),
            lanes: AtomicU64::new(0),
            directories: Mutex::default(),
            clients: Arc::default(),
        };
        Ok(Self {
            engine: Arc::new(engine),
        })
    }

    /// Opens a blob: its cache files, no network. A cache directory that can not be written is no error: the blob is
    /// served uncached then.
    pub fn open_blob(
        &self,
        description: BlobDescription,
        source: &SourceConfig,
        cache: &CacheConfig,
    ) -> Result<Arc<Blob>, FetchError> {
        let origin = self
            .engine
            .source(source)
            .map_err(|error| FetchError::new(&description.id, error))?;
        self.open(description, origin, cache)
    }

    /// Opens a blob of a source that the caller made. It shares nothing with other blobs but the store's limits.
    pub fn open_blob_from(
        &self,
        description: BlobDescription,
        source: Arc<dyn Source>,
        cache: &CacheConfig,
    ) -> Result<Arc<Blob>, FetchError> {
        self.open(description, Origin::new(self.engine.new_lane(), source), cache)
    }

    /// Replaces the credentials of a source that blobs were opened with; they keep using it.
    pub fn replace_auth(&self, source: &SourceConfig, auth: Secret) -> Result<(), SourceError> {
        self.engine.source(source)?.source.replace_auth(auth)
    }

    /// Replaces the forward proxy of a source that blobs were opened with; none if `url` is empty.
    pub fn replace_proxy(&self, source: &SourceConfig, url: Secret) -> Result<(), SourceError> {
        self.engine.source(source)?.source.replace_proxy(url)
    }

    fn open(
        &self,
        description: BlobDescription,
        origin: Arc<Origin>,
        cache: &CacheConfig,
    ) -> Result<Arc<Blob>, FetchError> {
        let id = description.id.clone();
        // The id comes from an image and names files.
        if id.is_empty() || id.len() > 200 || id.starts_with('.') || id.contains(['/', '\0']) {
            return Err(FetchError::new(&id, "the id can not name a file"));
        }
        let key = (id.clone(), cache.dir.clone(), origin.lane);
        let mut all = self.engine.shared.lock();
        all.retain(|_, shared| shared.strong_count() > 0);
        let shared = match all
            .get(&key)
            .and_then(Weak::upgrade)
            .filter(|shared| shared.fits(&description, cache))
        {
            Some(shared) => shared,
            None => {
                let files = CacheFiles::open(cache, self.engine.directory(&cache.dir), &description)
                    .map_err(|error| FetchError::new(&id, format!("{error}: {}", error.source)))?;
                let shared = Arc::new(Shared::new(Arc::clone(&self.engine), files, origin, &description));
                all.insert(key, Arc::downgrade(&shared));
                shared
            }
        };
        drop(all);
        let blob = Arc::new(Blob {
            residency: Residency::new(shared.files.ledger().cloned()),
            index: Mutex::new(IndexState::Unknown),
            amplify: cache.amplify,
            gather: Gather::default(),
            description,
            shared,
        });
        blob.recall();
        Ok(blob)
    }
}

impl Engine {
    fn runtime(&self) -> &Runtime {
        // Taken by `drop` alone.
        #[allow(clippy::expect_used)]
        self.runtime
            .as_ref()
            .expect("the runtime lives as long as the engine")
    }

    fn new_lane(&self) -> u64 {
        self.lanes.fetch_add(1, Ordering::Relaxed)
    }

    /// The cache directory at `path`; one for all blobs in it. Fails if it can not be written.
    fn directory(&self, path: &Path) -> io::Result<Arc<Directory>> {
        let mut directories = self.directories.lock();
        directories.retain(|_, directory| directory.strong_count() > 0);
        if let Some(directory) = directories.get(path).and_then(Weak::upgrade) {
            return Ok(directory);
        }
        let directory = Arc::new(Directory::open(path)?);
        directories.insert(path.to_owned(), Arc::downgrade(&directory));
        Ok(directory)
    }

    /// The source that `config` describes; one for all blobs that name it.
    fn source(&self, config: &SourceConfig) -> Result<Arc<Origin>, SourceError> {
        let mut sources = self.sources.lock();
        sources.retain(|_, origin| origin.strong_count() > 0);
        if let Some(origin) = sources.get(config).and_then(Weak::upgrade) {
            return Ok(origin);
        }
        let source: Arc<dyn Source> = match config {
            SourceConfig::Dir(config) => Arc::new(Dir::new(config.clone())?),
            SourceConfig::Registry(config) => {
                let transport = Transport::to(&self.clients, &config.http, &Peer::Direct, &config.host)?;
                Arc::new(Remote(Registry::new(config.clone(), Arc::new(transport))?))
            }
            SourceConfig::S3(config) => Arc::new(Remote(S3::new(config, &self.clients)?)),
            SourceConfig::Oss(config) => Arc::new(Remote(Oss::new(config, &self.clients)?)),
            SourceConfig::HttpProxy(config) => Arc::new(Remote(HttpProxy::new(config, &self.clients)?)),
            SourceConfig::LocalDisk(config) => Arc::new(Disk::new(config)?),
        };
        let origin = Origin::new(self.new_lane(), source);
        sources.insert(config.clone(), Arc::downgrade(&origin));
        Ok(origin)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // May happen on a thread of the runtime itself, which must not wait for its own end.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A number that is hard to guess and good enough to spread retries.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0u8)
}

/// One image's view of a blob: a cache file, the chunks in it that are this image's, and a source for the others.
pub struct Blob {
    description: BlobDescription,
    residency: Residency,
    index: Mutex<IndexState>,
    amplify: u32,
    gather: Gather,
    shared: Arc<Shared>,
}

impl Blob {
    /// What the blob was opened with.
    pub fn description(&self) -> &BlobDescription {
        &self.description
    }

    /// Whether chunk `index` is resident, that is complete and verified in the cache file.
    pub fn is_resident(&self, index: u32) -> bool {
        self.residency.version(index) != 0
    }

    /// The version under which chunk `index` is resident; 0 if it is not. It is another one after the chunk was evicted and
    /// fetched again.
    pub fn version(&self, index: u32) -> u32 {
        self.residency.version(index)
    }

    /// Number of resident chunks.
    pub fn resident(&self) -> u32 {
        self.residency.count()
    }

    /// Counts chunks of the blob that were evicted or replaced, by whatever process. Read it before `version` and after the data were
    /// read: if it changed, compare the versions, for the data may have been freed in between.
    pub fn generation(&self) -> u64 {
        self.residency.withdrawn()
    }

    /// The cache file: the uncompressed view of the blob, holes where chunks are absent.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.shared.files.data()
    }

    /// What was counted of the chunks of this blob, for all mounts that share its cache files.
    pub fn metrics(&self) -> BlobMetrics {
        self.shared.counters.snapshot()
    }

    /// What was counted of the source, for all blobs that come from it.
    pub fn source_metrics(&self) -> SourceMetrics {
        self.shared.origin.metrics()
    }

    /// Makes `chunks` resident. Returns at once; `done` is called exactly once, from another thread,
    /// by `deadline` at the latest. Dropping interest costs other waiters nothing.
    pub fn fetch(self: &Arc<Self>, chunks: &[u32], priority: Priority, deadline: Instant, done: Completion) {
        let ledger = self.shared.files.ledger();
        let done = self.shared.origin.counted(priority, done);
        let waiter = Waiter::new(&self.description.id, chunks.len(), ledger, done);
        waiter.limit(self.shared.engine.runtime().handle(), deadline);
        self.plan(Plan {
            chunks: chunks.to_vec(),
            priority,
            extend: true,
            waiter,
        });
    }
}
