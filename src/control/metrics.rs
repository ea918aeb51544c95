//! Counters of sources and caches in the shapes of the API.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use kata::control::metrics::{BackendMetrics, CacheMetrics, InFlight};

use super::table::MountedImage;
use crate::virtio::Waiting;

/// A request that waits. `now` is the same moment on both clocks.
pub(super) fn in_flight(waiting: &Waiting, now: (Instant, SystemTime)) -> InFlight {
    let came = now.1.checked_sub(now.0.saturating_duration_since(waiting.since));
    InFlight {
        inode: waiting.nodeid,
        opcode: waiting.opcode,
        unique: waiting.unique,
        timestamp_secs: since_epoch(came).as_secs(),
    }
}

/// The source of an image. Mounts that use the same source share its counters.
pub(super) fn source(image: &MountedImage) -> BackendMetrics {
    let backend_type = image
        .config
        .backend
        .as_ref()
        .map_or("", |backend| backend.type_name());
    let instance = image.instance.upgrade();
    let counted = instance
        .as_ref()
        .and_then(|instance| Some(instance.blobs().first()?.source_metrics()));
    let counted = counted.unwrap_or_default();
    BackendMetrics {
        backend_type: backend_type.to_owned(),
        read_count: counted.requests,
        read_errors: counted.errors,
        read_amount_total: counted.bytes,
        read_cumulative_latency_millis_total: millis(counted.latency),
        read_cumulative_latency_millis_dist: counted.latency_by_size.map(millis),
        read_count_block_size_dist: counted.by_size,
        read_latency_sizes_dist: counted.by_size_and_latency,
    }
}

/// The cache files of an image.
pub(super) fn cache(image: &MountedImage) -> CacheMetrics {
    let Some(instance) = image.instance.upgrade() else {
        return CacheMetrics::default();
    };
    let counters = image.counters.metrics("");
    let cache = image.config.cache.as_ref();
    let workers = cache
        .filter(|cache| cache.prefetch.enable)
        .map_or(0, |cache| cache.prefetch.threads);
    let prefetch = image.prefetching.progress();
    let (began, ended) = prefetch.map_or((None, None), |prefetch| (prefetch.began, prefetch.ended));
    let prefetch = prefetch.unwrap_or_default();
    let reads = counters.block_count_read.iter().sum();
    let absent = image.counters.absent();
    CacheMetrics {
        underlying_files: instance
            .blobs()
            .iter()
            .map(|blob| format!("{}.blob.data", blob.description().id))
            .collect(),
        store_path: cache
            .and_then(|cache| cache.file_cache())
            .map(|cache| cache.work_dir.clone())
            .unwrap_or_default(),
        partial_hits: absent.min(reads),
        whole_hits: reads.saturating_sub(absent),
        total: reads,
        entries_count: instance
            .blobs()
            .iter()
            .map(|blob| u64::from(blob.resident()))
            .sum(),
        prefetch_data_amount: prefetch.bytes,
        prefetch_requests_count: prefetch.fetches,
        prefetch_workers: workers,
        prefetch_unmerged_chunks: 0,
        prefetch_cumulative_time_millis: millis(prefetch.busy),
        prefetch_begin_time_secs: since_epoch(began).as_secs(),
        prefetch_begin_time_millis: since_epoch(began).subsec_millis().into(),
        prefetch_end_time_secs: since_epoch(ended).as_secs(),
        prefetch_end_time_millis: since_epoch(ended).subsec_millis().into(),
        buffered_backend_size: 0,
        data_all_ready: instance
            .blobs()
            .iter()
            .all(|blob| blob.resident() == blob.description().chunk_count),
    }
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn since_epoch(time: Option<SystemTime>) -> std::time::Duration {
    time.and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .unwrap_or_default()
}
