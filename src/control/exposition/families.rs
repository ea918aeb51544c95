//! Every family of metrics.

/// A family of metrics: name (counters get `_total` added), help, type.
pub(super) type Family = (&'static str, &'static str, Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

pub(super) const INFO: Family = ("rafsd_build_info", "What runs; always 1", Kind::Gauge);
pub(super) const UPTIME: Family = ("rafsd_uptime_seconds", "Time since the start", Kind::Gauge);
pub(super) const DRAINING: Family = ("rafsd_draining", "1 while new mounts are refused", Kind::Gauge);
pub(super) const MOUNTS: Family = ("rafsd_mounts", "Mounts by kind", Kind::Gauge);
pub(super) const REQUESTS: Family = (
    "rafsd_requests",
    "Requests answered, by mount and operation",
    Kind::Counter,
);
pub(super) const DURATION: Family = (
    "rafsd_request_duration_seconds",
    "Time until a request was answered, waits included, by mount and kind of work",
    Kind::Histogram,
);
pub(super) const RECEIVED: Family = (
    "rafsd_received_requests",
    "Requests received, by operation",
    Kind::Counter,
);
pub(super) const ERRORS: Family = (
    "rafsd_error_replies",
    "Error replies, by error number",
    Kind::Counter,
);
pub(super) const BYTES_READ: Family = (
    "rafsd_read_bytes",
    "Bytes sent to the guest by READ",
    Kind::Counter,
);
pub(super) const BYTES_WRITTEN: Family = (
    "rafsd_written_bytes",
    "Bytes taken from the guest by WRITE",
    Kind::Counter,
);
pub(super) const PARKED: Family = (
    "rafsd_parked_requests",
    "Requests that had to wait for data or a lock",
    Kind::Counter,
);
pub(super) const DEFERRED: Family = (
    "rafsd_deferred_requests",
    "Requests handed to a worker",
    Kind::Counter,
);
pub(super) const EXPIRED: Family = (
    "rafsd_expired_requests",
    "Requests answered because their deadline passed",
    Kind::Counter,
);
pub(super) const MALFORMED: Family = (
    "rafsd_malformed_requests",
    "Chains and messages that no driver sends",
    Kind::Counter,
);
pub(super) const BUGS: Family = (
    "rafsd_bugs",
    "Requests dropped without an answer; 0 in a correct program",
    Kind::Counter,
);
pub(super) const WAITING: Family = (
    "rafsd_waiting_requests",
    "Requests that wait now, by what they wait for",
    Kind::Gauge,
);
pub(super) const OLDEST: Family = (
    "rafsd_oldest_waiting_seconds",
    "Age of the oldest request that waits",
    Kind::Gauge,
);
pub(super) const CHUNKS: Family = ("rafsd_image_chunks", "Chunks of an image, by mount", Kind::Gauge);
pub(super) const RESIDENT: Family = (
    "rafsd_image_resident_chunks",
    "Chunks of an image that are local, by mount",
    Kind::Gauge,
);
pub(super) const IN_FLIGHT: Family = (
    "rafsd_image_in_flight_chunks",
    "Chunks of an image on their way, by mount",
    Kind::Gauge,
);
pub(super) const PREFETCHED: Family = (
    "rafsd_prefetched_bytes",
    "Compressed bytes prefetched, by mount",
    Kind::Counter,
);
pub(super) const CACHE_USED: Family = (
    "rafsd_cache_used_bytes",
    "Bytes of the disk that a cache directory takes, by directory, for all daemons that share it",
    Kind::Gauge,
);
pub(super) const CACHE_QUOTA: Family = (
    "rafsd_cache_quota_bytes",
    "Bytes that a cache directory may take, by directory; 0: no limit",
    Kind::Gauge,
);
pub(super) const EVICTED: Family = (
    "rafsd_evicted_chunks",
    "Chunks that this daemon evicted, by cache directory",
    Kind::Counter,
);
pub(super) const EVICTED_BYTES: Family = (
    "rafsd_evicted_bytes",
    "Bytes of the disk that this gave, by cache directory",
    Kind::Counter,
);
pub(super) const FETCHED: Family = (
    "rafsd_fetched_chunks",
    "Chunks fetched and cached, by source",
    Kind::Counter,
);
pub(super) const FETCHED_BYTES: Family = (
    "rafsd_fetched_bytes",
    "Their uncompressed bytes, by source",
    Kind::Counter,
);
pub(super) const VERIFIED: Family = (
    "rafsd_verified_chunks",
    "Chunks whose digest matched: fetched, found in the cache, or held in memory, by source",
    Kind::Counter,
);
pub(super) const CORRUPT: Family = (
    "rafsd_corrupt_chunks",
    "Fetched chunks that were damaged, by source",
    Kind::Counter,
);
pub(super) const HELD: Family = (
    "rafsd_held_chunks",
    "Chunks that could not be cached, by source",
    Kind::Counter,
);
pub(super) const JOINED: Family = (
    "rafsd_joined_fetches",
    "Fetches that joined one under way, by source",
    Kind::Counter,
);
pub(super) const SOURCE_REQUESTS: Family = (
    "rafsd_source_requests",
    "Range requests made, by source",
    Kind::Counter,
);
pub(super) const SOURCE_ERRORS: Family = (
    "rafsd_source_errors",
    "Range requests that failed, by source",
    Kind::Counter,
);
pub(super) const SOURCE_RETRIES: Family = (
    "rafsd_source_retries",
    "Range requests that repeated a failed one, by source",
    Kind::Counter,
);
pub(super) const SOURCE_BYTES: Family = ("rafsd_source_bytes", "Bytes received, by source", Kind::Counter);
pub(super) const SOURCE_DURATION: Family = (
    "rafsd_source_duration_seconds",
    "Time of range requests, by source",
    Kind::Histogram,
);
pub(super) const SOURCE_IN_FLIGHT: Family = (
    "rafsd_source_in_flight_requests",
    "Range requests under way, by source",
    Kind::Gauge,
);
pub(super) const SOURCE_TOKENS: Family = (
    "rafsd_source_token_refreshes",
    "Tokens asked for, by source",
    Kind::Counter,
);
pub(super) const SOURCE_FAILURES: Family = (
    "rafsd_source_failures_in_a_row",
    "Range requests that failed since the last one that went well, by source; 0: healthy",
    Kind::Gauge,
);

/// Everything, in the order in which it is written.
#[cfg(test)]
pub(super) const FAMILIES: [Family; 39] = [
    INFO,
    UPTIME,
    DRAINING,
    MOUNTS,
    REQUESTS,
    DURATION,
    RECEIVED,
    ERRORS,
    BYTES_READ,
    BYTES_WRITTEN,
    PARKED,
    DEFERRED,
    EXPIRED,
    MALFORMED,
    BUGS,
    WAITING,
    OLDEST,
    CHUNKS,
    RESIDENT,
    IN_FLIGHT,
    PREFETCHED,
    CACHE_USED,
    CACHE_QUOTA,
    EVICTED,
    EVICTED_BYTES,
    FETCHED,
    FETCHED_BYTES,
    VERIFIED,
    CORRUPT,
    HELD,
    JOINED,
    SOURCE_REQUESTS,
    SOURCE_ERRORS,
    SOURCE_RETRIES,
    SOURCE_BYTES,
    SOURCE_DURATION,
    SOURCE_IN_FLIGHT,
    SOURCE_TOKENS,
    SOURCE_FAILURES,
];

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::registry::Registry;

    use crate::control::exposition::gather::Scrape;

    /// What is written for an empty daemon: every family with its description.
    fn empty() -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Scrape::default()));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn every_family_is_written_in_order() {
        let text = empty();
        let written: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next())
            .collect();
        assert_eq!(written, FAMILIES.map(|(name, ..)| name));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn the_documentation_lists_every_metric() {
        let text = include_str!("../../../docs/metrics.md");
        let documented: Vec<(&str, &str)> = text
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `rafsd_")?.split('|').map(str::trim);
                Some((cells.next()?.trim_end_matches('`'), cells.next()?))
            })
            .collect();
        let families = FAMILIES.map(|(name, _, kind)| {
            let name = name.strip_prefix("rafsd_").unwrap();
            match kind {
                Kind::Counter => (format!("{name}_total"), "counter"),
                Kind::Gauge => (name.to_owned(), "gauge"),
                Kind::Histogram => (name.to_owned(), "histogram"),
            }
        });
        let families: Vec<(&str, &str)> = families
            .iter()
            .map(|(name, kind)| (name.as_str(), *kind))
            .collect();
        assert_eq!(documented, families);
    }
}
