//! Fetching what was not asked for yet: a list of chunks in the order of their likely use, or whole blobs.
//!
//! A prefetch is a task that keeps a few fetches under way, each of about one request's size, at a priority below that of the
//! guests' reads; the budget sees to it that it yields to them. It ends with its list, with its handle, or when the source
//! fails again and again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinSet};

use super::fetch::Plan;
use super::waiter::Waiter;
use super::{Blob, FetchError, Held, Priority, Store};

/// A fetch of a prefetch is given up after so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause after a failed fetch, times the failures in a row.
const PAUSE: Duration = Duration::from_secs(1);
/// Failures in a row after which the prefetch ends.
const MAX_FAILURES: u32 = 5;

/// What to prefetch of a blob.
pub struct Wish {
    /// The blob.
    pub blob: Arc<Blob>,
    /// Chunks in the order of their likely use; `None` for all of them in blob order, when nothing else is to do.
    pub chunks: Option<Vec<u32>>,
}

/// How to prefetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefetchOptions {
    /// Fetches under way at a time.
    pub parallel: usize,
    /// Compressed bytes of each.
    pub size: u32,
    /// Compressed bytes per second, 0 for no limit.
    pub bandwidth: u64,
}

impl Default for PrefetchOptions {
    fn default() -> Self {
        Self {
            parallel: 4,
            size: 1 << 20,
            bandwidth: 0,
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
}

impl Store {
    /// Prefetches `wishes`, in order.
    pub fn prefetch(&self, wishes: Vec<Wish>, options: PrefetchOptions) -> Prefetch {
        let state = Arc::new(State::default());
        state.began.store(now(), Relaxed);
        let task = self
            .engine
            .runtime()
            .spawn(run(wishes, options, Arc::clone(&state)))
            .abort_handle();
        Prefetch { state, task }
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

async fn run(wishes: Vec<Wish>, options: PrefetchOptions, state: Arc<State>) {
    let mut pace = Pace {
        bandwidth: options.bandwidth,
        free_at: Instant::now(),
    };
    let mut running = JoinSet::new();
    let mut failures = 0;
    'all: for wish in wishes {
        let wish = Arc::new(wish);
        let mut next = 0;
        loop {
            // Decode threads describe chunks; this one only waits.
            let Some(batch) = next_batch(&wish, next, options.size.max(1)).await else {
                break 'all;
            };
            if batch.chunks.is_empty() {
                break;
            }
            next = batch.next;
            pace.wait(batch.bytes).await;
            running.spawn(fetch(Arc::clone(&wish), batch, Arc::clone(&state)));
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
        }
    }
    while running.join_next().await.is_some() {}
    state.ended.store(now(), Relaxed);
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

async fn fetch(wish: Arc<Wish>, batch: Batch, state: Arc<State>) -> Result<(), FetchError> {
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
    blob.plan(Plan {
        chunks: batch.chunks,
        priority: wish.priority(),
        extend: false,
        waiter,
    });
    let outcome = told
        .await
        .unwrap_or_else(|_| Err(FetchError::new(&blob.description().id, "not answered")));
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

impl Wish {
    fn priority(&self) -> Priority {
        if self.chunks.is_some() {
            Priority::Hinted
        } else {
            Priority::Background
        }
    }

    /// The absent chunks from position `from` on, about `size` compressed bytes of them; empty at the end.
    fn batch(&self, from: usize, size: u32) -> Batch {
        let description = self.blob.description();
        let average = description.compressed_size / u64::from(description.chunk_count.max(1));
        let mut batch = Batch {
            chunks: Vec::new(),
            bytes: 0,
            next: from,
        };
        while batch.bytes < size.into() {
            let index = match &self.chunks {
                Some(list) => list.get(batch.next).copied(),
                None => u32::try_from(batch.next)
                    .ok()
                    .filter(|index| *index < description.chunk_count),
            };
            let Some(index) = index else { break };
            batch.next += 1;
            if self.blob.is_resident(index) || index >= description.chunk_count {
                continue;
            }
            // A chunk that can not be described yet is counted as an average one.
            batch.bytes += self
                .blob
                .describe(index)
                .map_or(average, |chunk| chunk.compressed_size.into())
                .max(1);
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
