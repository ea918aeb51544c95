//! A source as a store uses it: with its lane in the budget, and its counters.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;

use super::budget::LaneId;
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
}

impl Origin {
    pub(super) fn new(lane: LaneId, source: Arc<dyn Source>) -> Arc<Self> {
        Arc::new(Self {
            lane,
            source,
            counters: SourceCounters::default(),
            hold: Mutex::new(None),
        })
    }

    /// Reads ranges of blob `id`, and counts them as one request.
    pub(super) async fn read(
        &self,
        id: &str,
        ranges: &[Range<u64>],
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
        self.counters.begin(retry);
        let mut counted = |bytes: Bytes| {
            self.counters.received(bytes.len());
            sink(bytes);
        };
        let outcome = match ranges {
            [range] => self.source.read(id, range.clone(), &mut counted).await,
            ranges => self.source.read_ranges(id, ranges, &mut counted).await,
        };
        self.counters.end(size, begin.elapsed(), outcome.is_err());
        if let Err(error) = &outcome
            && error.kind == SourceErrorKind::Throttled
            && let Some(pause) = error.retry_after
        {
            *self.hold.lock() = Some(Instant::now() + pause.min(LONGEST_ASKED));
        }
        outcome
    }

    pub(super) fn metrics(&self) -> SourceMetrics {
        self.counters.snapshot(self.source.token_requests())
    }
}
