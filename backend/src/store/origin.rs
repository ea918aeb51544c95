//! A source as a store uses it: with its lane in the budget, its counters, and how it does lately.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use super::budget::LaneId;
use super::strain::Strain;
use super::width::Width;
use super::{Completion, Priority};
use crate::error::{SourceError, SourceErrorKind};
use crate::metrics::{SourceCounters, SourceMetrics};
use crate::source::retry::LONGEST_ASKED;
use crate::source::{Sink, Source};

/// See the module.
pub(crate) struct Origin {
    pub(super) lane: LaneId,
    pub(super) source: Arc<dyn Source>,
    counters: SourceCounters,
    /// The source asked to be left alone until then.
    hold: Mutex<Option<Instant>>,
    strain: Mutex<Strain>,
    width: Mutex<Width>,
    /// Fetches that somebody waits for.
    waiting: AtomicUsize,
    /// Requests for what nobody waits for.
    background: AtomicUsize,
}

/// Counts as one of the requests for what nobody waits for until it is dropped.
struct Unhurried<'a>(&'a AtomicUsize);

impl<'a> Unhurried<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }

    /// All that are under way.
    fn together(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Unhurried<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Origin {
    pub(super) fn new(lane: LaneId, source: Arc<dyn Source>) -> Arc<Self> {
        Arc::new(Self {
            lane,
            source,
            counters: SourceCounters::default(),
            hold: Mutex::new(None),
            strain: Mutex::default(),
            width: Mutex::default(),
            waiting: AtomicUsize::new(0),
            background: AtomicUsize::new(0),
        })
    }

    /// Reads ranges of blob `id`, and counts them as one request.
    pub(super) async fn read(
        &self,
        id: &str,
        ranges: &[Range<u64>],
        priority: Priority,
        retry: bool,
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        let size = ranges
            .iter()
            .map(|range| range.end.saturating_sub(range.start))
            .sum();
        let hold = self.hold.lock().filter(|until| *until > Instant::now());
        if let Some(until) = hold {
            tokio::time::sleep_until(until.into()).await;
        }
        let begin = Instant::now();
        let unhurried = (priority == Priority::Background).then(|| Unhurried::begin(&self.background));
        self.counters.begin(retry);
        let mut answered = None;
        let mut counted = |bytes: Bytes| {
            if answered.is_none() {
                let now = *answered.insert(Instant::now());
                if priority == Priority::Demand {
                    self.strain.lock().answered(now - begin, now);
                }
            }
            self.counters.received(bytes.len());
            sink(bytes);
        };
        let outcome = match ranges {
            [range] => self.source.read(id, range.clone(), &mut counted).await,
            ranges => self.source.read_ranges(id, ranges, &mut counted).await,
        };
        self.counters.end(size, begin.elapsed(), outcome.is_err());
        self.strain.lock().ended(outcome.is_err(), Instant::now());
        if let (Some(unhurried), Some(answered), Ok(())) = (unhurried, answered, &outcome) {
            let took = answered.elapsed();
            self.width.lock().carried(size, took, unhurried.together());
        }
        if let Err(error) = &outcome
            && error.kind == SourceErrorKind::Throttled
            && let Some(pause) = error.retry_after
        {
            *self.hold.lock() = Some(Instant::now() + pause.min(LONGEST_ASKED));
        }
        outcome
    }

    /// `done`, which ends a wait that is counted from now on, if this is one.
    pub(super) fn counted(self: &Arc<Self>, priority: Priority, done: Completion) -> Completion {
        if priority != Priority::Demand {
            return done;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let origin = Arc::clone(self);
        Box::new(move |outcome| {
            origin.waiting.fetch_sub(1, Ordering::Relaxed);
            done(outcome);
        })
    }

    /// Requests for what nobody waits for that may be under way now; none if reads need the link.
    pub(super) fn width(&self) -> usize {
        let width = self.width.lock();
        if width.is_narrow() && self.waiting() > 0 {
            return 0;
        }
        width.get()
    }

    /// Fetches that somebody waits for now.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// How long it usually takes until an answer begins; nothing if that is not known.
    pub(super) fn usual_answer(&self) -> Duration {
        self.strain.lock().usual()
    }

    /// Whether what nobody waits for should leave the source alone: it fails, asked for a pause, has a way that is left out, or
    /// answers reads slower than it used to.
    pub(super) fn strained(&self) -> bool {
        let now = Instant::now();
        self.hold.lock().is_some_and(|until| until > now)
            || self.strain.lock().is_strained(now)
            || self.source.is_detoured()
    }

    pub(super) fn metrics(&self) -> SourceMetrics {
        self.counters.snapshot(self.source.token_requests())
    }
}
