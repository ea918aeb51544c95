//! What people want to know of a blob while it is served. Found out when somebody asks; nothing is kept up for it.

use super::Blob;

impl Blob {
    /// Host or path of the source that it comes from.
    pub fn source_host(&self) -> &str {
        self.shared.origin.source.host()
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
