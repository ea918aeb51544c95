//! What people want to know of a blob while it is served. Found out when somebody asks; nothing is kept up for it.

use super::Blob;
use crate::metrics::CacheMetrics;

impl Blob {
    /// Host or path of the source that it comes from.
    pub fn source_host(&self) -> &str {
        self.shared.origin.source.host()
    }

    /// The cache directory as it is now; `None` if it cannot be written. Blobs of one directory give the same.
    pub fn cache_metrics(&self) -> Option<CacheMetrics> {
        let (_, directory) = self.shared.files.writable()?;
        Some(directory.metrics())
    }

    /// Bytes that the cache directory may take, 0 for no limit.
    pub fn cache_quota(&self) -> u64 {
        self.shared.files.quota()
    }

    /// Chunks on their way at this moment, for all mounts that share the cache files.
    pub fn in_flight(&self) -> usize {
        self.shared.flights.lock().len()
    }

    /// Why one of `chunks` is not there yet, if an attempt to fetch it has failed.
    pub fn last_error(&self, chunks: &[u32]) -> Option<String> {
        let flights = self.shared.flights.lock();
        flights
            .iter()
            .filter(|((chunk, _), _)| chunks.contains(chunk))
            .flat_map(|(_, flight)| &flight.waiters)
            .find_map(|(waiter, _)| waiter.last_error())
    }
}
