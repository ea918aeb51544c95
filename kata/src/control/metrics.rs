//! Counters in the shapes that clients parse: every member is always there.

use schemars::JsonSchema;
use serde::Serialize;

/// File operations in the order of the arrays `fop_*`.
pub const FILE_OPERATIONS: [&str; 15] = [
    "getattr",
    "readlink",
    "open",
    "release",
    "read",
    "statfs",
    "getxattr",
    "listxattr",
    "opendir",
    "lookup",
    "readdir",
    "readdirplus",
    "access",
    "forget",
    "batchforget",
];

/// Counters of a mount, `GET /api/v1/metrics`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct FsMetrics {
    /// Per-file counters are on.
    pub files_account_enabled: bool,
    /// First accesses are recorded.
    pub access_pattern_enabled: bool,
    /// Last read files are recorded.
    pub record_latest_read_files_enabled: bool,
    /// Latencies are measured.
    pub measure_latency: bool,
    /// Mountpoint.
    pub id: String,
    /// Open files.
    pub nr_opens: u64,
    /// Bytes read.
    pub data_read: u64,
    /// Reads by size: below 1 KiB, 4 KiB, 16 KiB, 64 KiB, 128 KiB, 512 KiB, 1 MiB, and above.
    pub block_count_read: [u64; 8],
    /// Operations, in the order of [`FILE_OPERATIONS`].
    pub fop_hits: [u64; 15],
    /// Operations that failed.
    pub fop_errors: [u64; 15],
    /// Time spent in them, microseconds.
    pub fop_cumulative_latency_total: [u64; 15],
    /// Reads by latency: up to 200 us, 1 ms, 20 ms, 50 ms, 500 ms, 1 s, 2 s, and above.
    pub read_latency_dist: [u64; 8],
}

/// Counters of a file, `GET /api/v1/metrics/files`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct FileMetrics {
    /// Operations.
    pub total_fops: u64,
    /// Bytes read.
    pub data_read: u64,
    /// Reads by size, as in [`FsMetrics`].
    pub block_count_read: [u64; 8],
    /// Operations by kind.
    pub fop_hits: [u64; 15],
    /// Operations that failed.
    pub fop_errors: [u64; 15],
}

/// First access to a file, `GET /api/v1/metrics/pattern`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct AccessRecord {
    /// Inode number.
    pub ino: u64,
    /// Reads so far.
    pub nr_read: u64,
    /// First read, Unix time, seconds.
    pub first_access_time_secs: u64,
    /// Its fraction.
    pub first_access_time_nanos: u32,
}

/// Counters of a source, `GET /api/v1/metrics/backend`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BackendMetrics {
    /// `registry`, `localfs`, ...
    pub backend_type: String,
    /// Requests.
    pub read_count: u64,
    /// Requests that failed.
    pub read_errors: u64,
    /// Bytes received.
    pub read_amount_total: u64,
    /// Time spent, milliseconds.
    pub read_cumulative_latency_millis_total: u64,
    /// Time spent by size of the request.
    pub read_cumulative_latency_millis_dist: [u64; 8],
    /// Requests by size.
    pub read_count_block_size_dist: [u64; 8],
    /// Requests by latency and size.
    pub read_latency_sizes_dist: [[u64; 8]; 8],
}

/// Counters of a cache, `GET /api/v1/metrics/blobcache`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct CacheMetrics {
    /// Cache files.
    pub underlying_files: Vec<String>,
    /// Their directory.
    pub store_path: String,
    /// Reads that found a part.
    pub partial_hits: u64,
    /// Reads that found everything.
    pub whole_hits: u64,
    /// Reads.
    pub total: u64,
    /// Resident chunks.
    pub entries_count: u64,
    /// Bytes prefetched.
    pub prefetch_data_amount: u64,
    /// Prefetch requests.
    pub prefetch_requests_count: u64,
    /// Prefetches at a time.
    pub prefetch_workers: u64,
    /// Prefetched chunks that had no neighbour to merge with.
    pub prefetch_unmerged_chunks: u64,
    /// Time spent, milliseconds.
    pub prefetch_cumulative_time_millis: u64,
    /// When it began, Unix time, seconds.
    pub prefetch_begin_time_secs: u64,
    /// Its fraction, milliseconds.
    pub prefetch_begin_time_millis: u64,
    /// When it ended, Unix time, seconds.
    pub prefetch_end_time_secs: u64,
    /// Its fraction, milliseconds.
    pub prefetch_end_time_millis: u64,
    /// Bytes held in memory.
    pub buffered_backend_size: u64,
    /// Everything is resident.
    pub data_all_ready: bool,
}

/// A request that is not answered yet, `GET /api/v1/metrics/inflight`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct InFlight {
    /// Its inode.
    pub inode: u64,
    /// FUSE opcode.
    pub opcode: u32,
    /// FUSE unique.
    pub unique: u64,
    /// When it came, Unix time, seconds.
    pub timestamp_secs: u64,
}
