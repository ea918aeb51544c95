//! The task of a prefetch: batch after batch, a few at a time.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::batch::Batch;
use super::leisure::{Watch, leisure};
use super::{List, PrefetchOptions, State, Wanted, Wish, now};
use crate::codec::Decoder;
use crate::error::FetchError;
use crate::store::fetch::{Plan, planning};
use crate::store::waiter::Waiter;
use crate::store::{Blob, Held};

/// A fetch of a prefetch is given up after so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause after a failed fetch, times the failures in a row.
const PAUSE: Duration = Duration::from_secs(1);
/// Failures in a row after which the prefetch ends.
const MAX_FAILURES: u32 = 5;

pub(super) async fn run(mut list: List, options: PrefetchOptions, mut running: Fetches, state: Arc<State>) {
    let mut pace = Pace {
        bandwidth: options.bandwidth,
        free_at: Instant::now(),
    };
    let mut watch = options.idle.map(Watch::new);
    let mut failures = 0;
    'all: while let Some(wish) = list.first() {
        while running.len() >= wish.room(options.parallel) {
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
    let job = move |_: &mut Decoder| {
        let _ = tell.send(planned.batch(from, size));
    };
    wish.blob
        .engine()
        .pool
        .push(planning(wish.priority()), Box::new(job));
    told.await.ok()
}

/// Fetches under way.
pub(super) type Fetches = JoinSet<Result<(), FetchError>>;

/// Fetches a batch. It is planned by `plan` before this returns; what it returns waits for the outcome.
pub(super) fn fetch(
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
