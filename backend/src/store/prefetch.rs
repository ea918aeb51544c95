//! Fetching what was not asked for yet: a recorded start, a list of chunks in the order of their likely use, or whole blobs.
//!
//! A prefetch is a task that keeps a few fetches under way, each of about one request's size, at a priority below that of the
//! guests' reads; the budget sees to it that it yields to them. It ends with its list, with its handle, or when the source
//! fails again and again.
//!
//! What is fetched for no better reason than that nothing else is to do (whole blobs) waits while there is one: while the container is
//! idle, since most of what it never touched it never will; and while the source is *strained* ([`Origin::strained`]), since
//! others need the link.
//!
//! [`Origin::strained`]: super::origin::Origin::strained

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};

use super::fetch::{MAX_REQUEST, Plan};
use super::waiter::Waiter;
use super::{Blob, FetchError, Held, Priority, Store};

/// A fetch of a prefetch is given up after so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause after a failed fetch, times the failures in a row.
const PAUSE: Duration = Duration::from_secs(1);
/// Failures in a row after which the prefetch ends.
const MAX_FAILURES: u32 = 5;
/// A replay is asked for in so many parts, each of the chunks that are used next, so that the first ones are there before the last: but no
/// part is smaller than this.
const REPLAY_PARTS: u64 = 6;
const REPLAY_LEAST: u64 = 256 << 10;
/// How often a prefetch that is paused looks whether it may go on.
const LOOK: Duration = Duration::from_millis(100);

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

/// Chunks to be fetched together.
struct Batch {
    chunks: Vec<u32>,
    bytes: u64,
    /// Where the next one begins: in the list, or in the blob.
    next: usize,
}

async fn run(mut list: List, options: PrefetchOptions, mut running: Fetches, state: Arc<State>) {
    let mut pace = Pace {
        bandwidth: options.bandwidth,
        free_at: Instant::now(),
    };
    let mut watch = options.idle.map(Watch::new);
    let mut failures = 0;
    'all: while let Some(wish) = list.first() {
        while running.len() >= options.parallel.max(1) {
            failures = settle(running.join_next().await.and_then(Result::ok), failures);
            if failures >= MAX_FAILURES {
                tracing::info!(blob = %wish.blob.description().id, "prefetch gives up");
                break 'all;
            }
            if failures > 0 {
                tokio::time::sleep(PAUSE * failures).await;
            }
        }
        if matches!(wish.wanted, Wanted::Whole) {
            leisure(&wish.blob, watch.as_mut(), &state).await;
        }
        // Decode threads describe chunks; this one only waits.
        let Some(batch) = next_batch(&wish, list.next, options.size.max(1)).await else {
            break;
        };
        list.next = batch.next;
        if batch.chunks.is_empty() {
            list.forward();
            continue;
        }
        pace.wait(batch.bytes).await;
        running.spawn(fetch(wish, batch, Arc::clone(&state), |blob, plan| {
            blob.plan(plan)
        }));
    }
    while running.join_next().await.is_some() {}
    state.ended.store(now(), Relaxed);
}

/// Waits until there is nothing better to do than to fetch whole blobs.
async fn leisure(blob: &Blob, mut watch: Option<&mut Watch>, state: &State) {
    loop {
        let paused = if blob.shared.origin.strained() {
            STRAINED
        } else if watch.as_mut().is_some_and(|watch| watch.is_idle()) {
            IDLE
        } else {
            0
        };
        if state.paused.swap(paused, Relaxed) != paused && paused != 0 {
            let reason = if paused == IDLE {
                "the container is idle"
            } else {
                "the source is strained"
            };
            tracing::debug!(blob = %blob.description().id, reason, "prefetch pauses");
        }
        if paused == 0 {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Since when a container has asked for nothing.
struct Watch {
    idle: Idle,
    requests: u64,
    since: Instant,
}

impl Watch {
    fn new(idle: Idle) -> Self {
        let requests = (idle.requests)();
        Self {
            idle,
            requests,
            since: Instant::now(),
        }
    }

    fn is_idle(&mut self) -> bool {
        let requests = (self.idle.requests)();
        if requests != self.requests {
            self.requests = requests;
            self.since = Instant::now();
        }
        self.since.elapsed() >= self.idle.after
    }
}

/// Failures in a row after one more outcome.
fn settle(outcome: Option<Result<(), FetchError>>, failures: u32) -> u32 {
    match outcome {
        Some(Err(error)) => {
            tracing::debug!(%error, "prefetch");
            failures + 1
        }
        Some(Ok(())) => 0,
        None => failures,
    }
}

async fn next_batch(wish: &Arc<Wish>, from: usize, size: u32) -> Option<Batch> {
    let (tell, told) = oneshot::channel();
    let planned = Arc::clone(wish);
    let job = move |_: &mut crate::codec::Decoder| {
        let _ = tell.send(planned.batch(from, size));
    };
    wish.blob.engine().pool.push(wish.priority(), Box::new(job));
    told.await.ok()
}

/// Fetches under way.
type Fetches = JoinSet<Result<(), FetchError>>;

/// Fetches a batch. It is planned by `plan` before this returns; what it returns waits for the outcome.
fn fetch(
    wish: Arc<Wish>,
    batch: Batch,
    state: Arc<State>,
    plan: impl FnOnce(Arc<Blob>, Plan),
) -> impl Future<Output = Result<(), FetchError>> {
    let begin = Instant::now();
    let count = batch.chunks.len();
    let (tell, told) = oneshot::channel();
    let blob = &wish.blob;
    let id = blob.description().id.clone();
    let done = Box::new(move |outcome: Result<Held, FetchError>| {
        let _ = tell.send(outcome.and_then(|held| match held.chunks.len() {
            0 => Ok(()),
            // Of no use to anybody later.
            count => Err(FetchError::new(
                &id,
                format!("{count} chunks could not be cached"),
            )),
        }));
    });
    let waiter = Waiter::new(&blob.description().id, count, None, done);
    waiter.limit(blob.engine().runtime().handle(), begin + PATIENCE);
    let planned = Plan {
        chunks: batch.chunks,
        priority: wish.priority(),
        extend: false,
        waiter,
    };
    plan(Arc::clone(blob), planned);
    async move {
        let outcome = told
            .await
            .unwrap_or_else(|_| Err(FetchError::new(&wish.blob.description().id, "not answered")));
        state.fetches.fetch_add(1, Relaxed);
        state
            .busy_micros
            .fetch_add(begin.elapsed().as_micros() as u64, Relaxed);
        if outcome.is_ok() {
            state.chunks.fetch_add(count as u64, Relaxed);
            state.bytes.fetch_add(batch.bytes, Relaxed);
        } else {
            state.failures.fetch_add(1, Relaxed);
        }
        outcome
    }
}

impl Wish {
    fn priority(&self) -> Priority {
        match self.wanted {
            Wanted::Replay(_) | Wanted::Listed(_) => Priority::Hinted,
            Wanted::Whole => Priority::Background,
        }
    }

    /// Compressed bytes of a chunk. One that can not be described yet is counted as an average one.
    fn stored_size(&self, index: u32) -> u64 {
        let description = self.blob.description();
        let average = description.compressed_size / u64::from(description.chunk_count.max(1));
        self.blob
            .describe(index)
            .map_or(average, |chunk| chunk.compressed_size.into())
            .max(1)
    }

    /// The absent chunks from position `from` on, one or more, up to `size` compressed bytes of them; empty at the end.
    fn batch(&self, from: usize, size: u32) -> Batch {
        let size = match &self.wanted {
            Wanted::Replay(list) => {
                let all: u64 = list.iter().map(|index| self.stored_size(*index)).sum();
                (all / REPLAY_PARTS).clamp(REPLAY_LEAST, MAX_REQUEST)
            }
            Wanted::Listed(_) | Wanted::Whole => size.into(),
        };
        let description = self.blob.description();
        let mut batch = Batch {
            chunks: Vec::new(),
            bytes: 0,
            next: from,
        };
        loop {
            let index = match &self.wanted {
                Wanted::Replay(list) | Wanted::Listed(list) => list.get(batch.next).copied(),
                Wanted::Whole => u32::try_from(batch.next)
                    .ok()
                    .filter(|index| *index < description.chunk_count),
            };
            let Some(index) = index else { break };
            if self.blob.is_resident(index) || index >= description.chunk_count {
                batch.next += 1;
                continue;
            }
            let bytes = self.stored_size(index);
            if !batch.chunks.is_empty() && batch.bytes + bytes > size {
                break;
            }
            batch.next += 1;
            batch.bytes += bytes;
            batch.chunks.push(index);
        }
        batch
    }
}

/// Spreads bytes over time.
struct Pace {
    bandwidth: u64,
    free_at: Instant,
}

impl Pace {
    async fn wait(&mut self, bytes: u64) {
        if self.bandwidth == 0 {
            return;
        }
        let start = self.free_at.max(Instant::now());
        self.free_at = start + Duration::from_secs_f64(bytes as f64 / self.bandwidth as f64);
        tokio::time::sleep_until(start.into()).await;
    }
}
