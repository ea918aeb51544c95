//! Fetching what was not asked for yet: a recorded start, a list of chunks in the order of their likely use, or whole blobs.
//!
//! A prefetch is a task that keeps a few fetches under way, each of about one request's size, at a priority below that of the
//! guests' reads; the budget sees to it that it yields to them. It ends with its list, with its handle, or when the source
//! fails again and again.
//!
//! Whole blobs come beside the reads of a guest, as many requests at a time as the link carries ([`width`]), and wait while there is a
//! reason: while the container is idle, since most of what it never touched it never will; and while the source is *strained*
//! ([`Origin::strained`]) or its link too slow for both, since others need it.
//!
//! [`Origin::strained`]: super::origin::Origin::strained
//! [`width`]: super::width

mod batch;
mod leisure;
mod run;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use tokio::task::{AbortHandle, JoinSet};

use super::{Blob, Store};
use run::{fetch, run};

/// What to prefetch of a blob.
pub struct Wish {
    /// The blob.
    pub blob: Arc<Blob>,
    /// What of it.
    pub wanted: Wanted,
}

/// See [`Wish`].
pub enum Wanted {
    /// Chunks that a start is known to read, in the order of their use: in as few requests as can be.
    Replay(Vec<u32>),
    /// Chunks in the order of their likely use.
    Listed(Vec<u32>),
    /// All chunks in blob order, when nothing else is to do.
    Whole,
}

/// How to prefetch.
#[derive(Clone, Debug)]
pub struct PrefetchOptions {
    /// Fetches under way at a time.
    pub parallel: usize,
    /// Compressed bytes of each, unless it is part of a replay.
    pub size: u32,
    /// Compressed bytes per second, 0 for no limit.
    pub bandwidth: u64,
    /// When whole blobs are not worth fetching; `None`: they always are.
    pub idle: Option<Idle>,
}

/// When a container is idle: nothing was asked of its image for a while.
#[derive(Clone)]
pub struct Idle {
    /// Requests so far. Asked a few times a second at most.
    pub requests: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// The while.
    pub after: Duration,
}

impl std::fmt::Debug for Idle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Idle(after {:?})", self.after)
    }
}

/// Why a prefetch waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paused {
    /// The container is idle.
    Idle,
    /// The source fails, asks to be left alone, or answers reads slower than it did.
    Strained,
}

impl Default for PrefetchOptions {
    fn default() -> Self {
        Self {
            parallel: 4,
            size: 1 << 20,
            bandwidth: 0,
            idle: None,
        }
    }
}

/// How far a prefetch is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefetchProgress {
    /// Chunks that are resident by its doing.
    pub chunks: u64,
    /// Their compressed bytes.
    pub bytes: u64,
    /// Fetches made.
    pub fetches: u64,
    /// Fetches that failed.
    pub failures: u64,
    /// Time that its fetches took, summed up.
    pub busy: Duration,
    /// When it began.
    pub began: Option<SystemTime>,
    /// When it ended, if it has.
    pub ended: Option<SystemTime>,
    /// Why it does nothing at present, if it does nothing.
    pub paused: Option<Paused>,
}

/// A prefetch under way. Dropping it stops it.
pub struct Prefetch {
    state: Arc<State>,
    task: AbortHandle,
}

#[derive(Default)]
struct State {
    chunks: AtomicU64,
    bytes: AtomicU64,
    fetches: AtomicU64,
    failures: AtomicU64,
    busy_micros: AtomicU64,
    /// Milliseconds since the epoch, 0 for not yet.
    began: AtomicU64,
    ended: AtomicU64,
    /// 0, [`IDLE`] or [`STRAINED`].
    paused: AtomicU8,
}

const IDLE: u8 = 1;
const STRAINED: u8 = 2;

impl Store {
    /// Prefetches `wishes`, in order. What a replay asks for first is on its way when this returns, so that whoever reads it from now on
    /// joins.
    pub fn prefetch(&self, wishes: Vec<Wish>, options: PrefetchOptions) -> Prefetch {
        let state = Arc::new(State::default());
        state.began.store(now(), Relaxed);
        let mut list = List {
            wishes: wishes.into_iter().map(Arc::new).collect(),
            next: 0,
        };
        let runtime = self.engine.runtime();
        let _entered = runtime.enter();
        let mut running = JoinSet::new();
        while options.bandwidth == 0
            && running.len() < options.parallel.max(1)
            && let Some(wish) = list
                .first()
                .filter(|wish| matches!(wish.wanted, Wanted::Replay(_)))
        {
            let batch = wish.batch(list.next, options.size.max(1));
            list.next = batch.next;
            if batch.chunks.is_empty() {
                list.forward();
            } else {
                running.spawn(fetch(wish, batch, Arc::clone(&state), Blob::run_plan));
            }
        }
        let task = runtime
            .spawn(run(list, options, running, Arc::clone(&state)))
            .abort_handle();
        Prefetch { state, task }
    }
}

/// What is still to be fetched.
struct List {
    wishes: VecDeque<Arc<Wish>>,
    /// Where the next batch of the first wish begins: in its list, or in the blob.
    next: usize,
}

impl List {
    fn first(&self) -> Option<Arc<Wish>> {
        self.wishes.front().map(Arc::clone)
    }

    fn forward(&mut self) {
        self.wishes.pop_front();
        self.next = 0;
    }
}

impl Prefetch {
    /// How far it is.
    pub fn progress(&self) -> PrefetchProgress {
        let time = |millis: &AtomicU64| match millis.load(Relaxed) {
            0 => None,
            millis => SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(millis)),
        };
        let state = &self.state;
        PrefetchProgress {
            chunks: state.chunks.load(Relaxed),
            bytes: state.bytes.load(Relaxed),
            fetches: state.fetches.load(Relaxed),
            failures: state.failures.load(Relaxed),
            busy: Duration::from_micros(state.busy_micros.load(Relaxed)),
            began: time(&state.began),
            ended: time(&state.ended),
            paused: match state.paused.load(Relaxed) {
                IDLE => Some(Paused::Idle),
                STRAINED => Some(Paused::Strained),
                _ => None,
            },
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis() as u64
}
