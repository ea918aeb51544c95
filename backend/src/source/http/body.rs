//! Bodies: exactly the bytes that were asked for, at a pace that is none of a stalled one.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::failure::{describe, host_of, kind_of, protocol, stalled};
use super::head::boundary_of;
use super::{Answer, Transport};
use crate::error::{SourceError, SourceErrorKind};
use crate::source::Sink;
use crate::source::parts::Parts;

/// Slowest body that is not taken for a stalled one, in bytes per second.
const SLOWEST: u64 = 4 << 10;

impl Transport {
    /// Reads a small body.
    pub(crate) async fn text(&self, mut response: Answer, limit: usize) -> Result<Vec<u8>, SourceError> {
        let host = host_of(response.url());
        let mut body = Vec::new();
        let mut pace = Pace::new(self.timeout);
        while let Some(piece) = self.piece(&mut response, &host).await? {
            body.extend_from_slice(&piece);
            pace.check(piece.len(), &host)?;
            if body.len() > limit {
                return Err(protocol(&host, format!("answer of more than {limit} bytes")));
            }
        }
        Ok(body)
    }

    /// Reads the body of a checked answer: exactly the bytes of `ranges`.
    pub(crate) async fn body(
        &self,
        mut answer: Answer,
        ranges: &[Range<u64>],
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        let outcome = match ranges {
            [range] => self.pieces(&mut answer, range, sink).await,
            ranges => self.parts(&mut answer, ranges, sink).await,
        };
        if let Some(route) = &answer.route {
            match &outcome {
                Ok(()) => route.succeeded(answer.asked.into()),
                Err(error) => route.failed(error),
            }
        }
        outcome
    }

    async fn pieces(
        &self,
        response: &mut Answer,
        range: &Range<u64>,
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        let host = host_of(response.url());
        let mut left = range.end - range.start;
        let mut pace = Pace::new(self.timeout);
        while let Some(mut piece) = self.piece(response, &host).await? {
            let excess = (piece.len() as u64).saturating_sub(left);
            piece.truncate(left.min(piece.len() as u64) as usize);
            left -= piece.len() as u64;
            let size = piece.len();
            if !piece.is_empty() {
                sink(piece);
            }
            if excess > 0 {
                return Err(protocol(&host, "the body goes on after the range".to_owned()));
            }
            if left > 0 {
                pace.check(size, &host)?;
            }
        }
        if left > 0 {
            return Err(protocol(&host, format!("the body ends {left} bytes early")));
        }
        Ok(())
    }

    async fn parts(
        &self,
        response: &mut Answer,
        ranges: &[Range<u64>],
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        let host = host_of(response.url());
        let boundary = boundary_of(response).unwrap_or_default();
        let mut parts = Parts::new(&boundary, ranges);
        let mut pace = Pace::new(self.timeout);
        while let Some(piece) = self.piece(response, &host).await? {
            if parts.complete() {
                // The end of the last line, without which the connection is of no further use.
                continue;
            }
            let size = piece.len();
            parts
                .push(piece, sink)
                .map_err(|reason| self.no_lists(&host, &reason))?;
            pace.check(size, &host)?;
        }
        if parts.complete() {
            Ok(())
        } else {
            Err(protocol(&host, "the body ends early".to_owned()))
        }
    }

    /// The next bytes of a body; `None` at its end.
    pub(in crate::source) async fn piece(
        &self,
        answer: &mut Answer,
        host: &str,
    ) -> Result<Option<Bytes>, SourceError> {
        match timeout(self.timeout, answer.response.chunk()).await {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => Err(SourceError::new(kind_of(&error), host, describe(&error))),
            Err(_) => Err(stalled(host, self.timeout, "the body goes silent")),
        }
    }
}

/// Watches that a body does not trickle.
pub(in crate::source) struct Pace {
    patience: Duration,
    since: Instant,
    bytes: u64,
}

impl Pace {
    pub(in crate::source) fn new(patience: Duration) -> Self {
        Self {
            patience,
            since: Instant::now(),
            bytes: 0,
        }
    }

    /// So many bytes have come.
    pub(in crate::source) fn check(&mut self, size: usize, host: &str) -> Result<(), SourceError> {
        self.bytes += size as u64;
        let spent = self.since.elapsed();
        if spent <= self.patience {
            return Ok(());
        }
        if self.bytes < SLOWEST * self.patience.as_secs().max(1) {
            let detail = format!("{} bytes in {:.1} s", self.bytes, spent.as_secs_f64());
            return Err(SourceError::new(SourceErrorKind::Stalled, host, detail));
        }
        *self = Self::new(self.patience);
        Ok(())
    }
}
