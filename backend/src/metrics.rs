//! What is counted. Counters live beside what they count; these are the values at one moment.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Classes of request sizes: below 1, 4, 16, 64, 128, 512 KiB, 1 MiB, and above.
pub const SIZE_CLASSES: usize = 8;
/// Classes of latencies: up to 1, 20, 50, 100, 500, 1000, 2000 ms, and above.
pub const LATENCY_CLASSES: usize = 8;

/// Requests of all blobs to one source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceMetrics {
    /// Range requests made, retries included; a token or a redirect is not counted.
    pub requests: u64,
    /// Those of them that failed.
    pub errors: u64,
    /// Those of them that repeated a failed one.
    pub retries: u64,
    /// Those of them under way now.
    pub in_flight: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Time that requests took, summed up.
    pub latency: Duration,
    /// The same by the size of the request.
    pub latency_by_size: [Duration; SIZE_CLASSES],
    /// Requests by latency.
    pub by_latency: [u64; LATENCY_CLASSES],
    /// Requests by size.
    pub by_size: [u64; SIZE_CLASSES],
    /// Requests by size and, within that, by latency.
    pub by_size_and_latency: [[u64; LATENCY_CLASSES]; SIZE_CLASSES],
    /// Tokens asked for.
    pub token_requests: u64,
    /// Requests that failed since the last one that went well; 0: the source is healthy, as far as is known.
    pub failures_in_a_row: u64,
}

/// Chunks of one blob, for all mounts that share its cache files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlobMetrics {
    /// Chunks fetched, verified and written to the cache.
    pub fetched: u64,
    /// Their uncompressed bytes.
    pub fetched_bytes: u64,
    /// Chunks found in the cache directory, by stamp or by hash.
    pub recalled: u64,
    /// Chunks fetched and held in memory because they could not be written.
    pub held: u64,
    /// Times that a fetched chunk did not match its digest or did not decode.
    pub damaged: u64,
    /// Fetches that asked for a chunk already under way.
    pub joined: u64,
}

/// A cache directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheMetrics {
    /// Bytes that the files in it take on the disk, for all processes that share it; reserved ones count.
    pub used: u64,
    /// Chunks that this process evicted from it, whoever had put them there.
    pub evicted_chunks: u64,
    /// Bytes of the disk that this gave.
    pub evicted_bytes: u64,
}

#[derive(Debug, Default)]
pub(crate) struct SourceCounters {
    retries: AtomicU64,
    started: AtomicU64,
    ended: AtomicU64,
    errors: AtomicU64,
    failures_in_a_row: AtomicU64,
    bytes: AtomicU64,
    /// By size.
    micros: [AtomicU64; SIZE_CLASSES],
    classes: [[AtomicU64; LATENCY_CLASSES]; SIZE_CLASSES],
}

impl SourceCounters {
    pub(crate) fn begin(&self, retry: bool) {
        self.started.fetch_add(1, Relaxed);
        self.retries.fetch_add(retry.into(), Relaxed);
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// `size` is what was asked for.
    pub(crate) fn end(&self, size: u64, took: Duration, failed: bool) {
        self.ended.fetch_add(1, Relaxed);
        self.errors.fetch_add(failed.into(), Relaxed);
        if failed {
            self.failures_in_a_row.fetch_add(1, Relaxed);
        } else {
            self.failures_in_a_row.store(0, Relaxed);
        }
        if let Some(micros) = self.micros.get(size_class(size)) {
            micros.fetch_add(took.as_micros() as u64, Relaxed);
        }
        let latencies = self.classes.get(size_class(size));
        if let Some(counter) = latencies.and_then(|latencies| latencies.get(latency_class(took))) {
            counter.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn snapshot(&self, token_requests: u64) -> SourceMetrics {
        let classes = self
            .classes
            .each_ref()
            .map(|row| row.each_ref().map(|counter| counter.load(Relaxed)));
        let mut by_latency = [0; LATENCY_CLASSES];
        for row in &classes {
            by_latency
                .iter_mut()
                .zip(row)
                .for_each(|(sum, count)| *sum += count);
        }
        let latency_by_size = self
            .micros
            .each_ref()
            .map(|micros| Duration::from_micros(micros.load(Relaxed)));
        let (started, ended) = (self.started.load(Relaxed), self.ended.load(Relaxed));
        SourceMetrics {
            requests: started,
            errors: self.errors.load(Relaxed),
            retries: self.retries.load(Relaxed),
            in_flight: started.saturating_sub(ended),
            bytes: self.bytes.load(Relaxed),
            latency: latency_by_size.iter().sum(),
            latency_by_size,
            by_latency,
            by_size: classes.map(|row| row.iter().sum()),
            by_size_and_latency: classes,
            token_requests,
            failures_in_a_row: self.failures_in_a_row.load(Relaxed),
        }
    }
}

fn size_class(bytes: u64) -> usize {
    [1, 4, 16, 64, 128, 512, 1024]
        .iter()
        .take_while(|limit| bytes >= **limit << 10)
        .count()
}

fn latency_class(took: Duration) -> usize {
    [1, 20, 50, 100, 500, 1000, 2000]
        .iter()
        .take_while(|limit| took.as_millis() > **limit)
        .count()
}

#[derive(Debug, Default)]
pub(crate) struct BlobCounters {
    pub(crate) fetched: AtomicU64,
    pub(crate) fetched_bytes: AtomicU64,
    pub(crate) recalled: AtomicU64,
    pub(crate) held: AtomicU64,
    pub(crate) damaged: AtomicU64,
    pub(crate) joined: AtomicU64,
}

impl BlobCounters {
    pub(crate) fn snapshot(&self) -> BlobMetrics {
        BlobMetrics {
            fetched: self.fetched.load(Relaxed),
            fetched_bytes: self.fetched_bytes.load(Relaxed),
            recalled: self.recalled.load(Relaxed),
            held: self.held.load(Relaxed),
            damaged: self.damaged.load(Relaxed),
            joined: self.joined.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_begin_where_they_say() {
        let sizes = [
            0,
            1023,
            1024,
            4096,
            65_535,
            65_536,
            131_072,
            524_288,
            1 << 20,
            u64::MAX,
        ];
        assert_eq!(sizes.map(size_class), [0, 0, 1, 2, 3, 4, 5, 6, 7, 7]);
        let times = [0, 1, 2, 20, 21, 100, 101, 2000, 2001].map(Duration::from_millis);
        assert_eq!(times.map(latency_class), [0, 0, 1, 1, 2, 3, 4, 6, 7]);
    }

    #[test]
    fn requests_are_counted_by_class() {
        let counters = SourceCounters::default();
        counters.begin(false);
        counters.begin(true);
        counters.received(5000);
        counters.end(5000, Duration::from_millis(30), false);
        let seen = counters.snapshot(3);
        assert_eq!(
            (seen.requests, seen.in_flight, seen.retries, seen.bytes),
            (2, 1, 1, 5000)
        );
        assert_eq!(
            (
                seen.by_size[2],
                seen.by_latency[2],
                seen.by_size_and_latency[2][2]
            ),
            (1, 1, 1)
        );
        assert_eq!((seen.errors, seen.token_requests), (0, 3));
        for _ in 0..2 {
            counters.end(1, Duration::ZERO, true);
        }
        assert_eq!(counters.snapshot(0).failures_in_a_row, 2);
        counters.end(1, Duration::ZERO, false);
        let seen = counters.snapshot(0);
        assert_eq!((seen.failures_in_a_row, seen.errors), (0, 2));
    }
}
