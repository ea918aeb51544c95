//! What operators ask of the daemon, and the values of our own API (`/api/rafsd/v1`), beside those of the incumbent.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ControlError, State, Version};

/// The daemon at one moment.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Overview {
    /// What runs.
    pub version: Version,
    /// Process id.
    pub pid: u32,
    /// Time since the start, milliseconds.
    pub uptime_ms: u64,
    /// Present state.
    pub state: State,
    /// New mounts are refused.
    pub draining: bool,
    /// `trace debug info warn error off`.
    pub log_level: String,
    /// Mounts.
    pub mounts: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// What the device has counted since the start.
    pub device: DeviceCounters,
}

/// Counters of the device.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct DeviceCounters {
    /// Requests by operation.
    pub requests: BTreeMap<String, u64>,
    /// Error replies by error number.
    pub errors: BTreeMap<i32, u64>,
    /// Bytes sent to the guest by READ.
    pub bytes_read: u64,
    /// Bytes taken from the guest by WRITE.
    pub bytes_written: u64,
    /// Reads that had to wait for absent data.
    pub parked: u64,
    /// Requests answered because their deadline passed.
    pub expired: u64,
    /// Chains and messages that no driver sends.
    pub malformed: u64,
    /// Requests that were dropped without an answer. Always 0 in a correct program.
    pub bugs: u64,
}

/// A mount, in full.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MountStatus {
    /// Path inside the tag.
    pub mountpoint: String,
    /// `image` or `directory`.
    pub kind: String,
    /// Bootstrap of the image, or the directory of the host.
    pub source: String,
    /// `2026-11-21T21:46:42.629744Z`.
    pub since: String,
    /// `serving`, or `changing` while a request remounts or unmounts it.
    pub state: String,
    /// Changes are refused.
    pub read_only: bool,
    /// What guests may keep of it.
    pub cache: CachePolicy,
    /// Requests for it that wait.
    pub waiting: usize,
    /// Requests answered so far.
    pub requests: u64,
    /// What it may take of the host's disk, if that is limited.
    pub quota: Option<QuotaStatus>,
    /// Only of images.
    pub image: Option<ImageStatus>,
}

/// What a directory takes of the host's disk.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct QuotaStatus {
    /// Bytes, as `du` counts them.
    pub bytes: LimitStatus,
    /// Files, directories and all else that has an inode.
    pub inodes: LimitStatus,
}

/// Something that may be limited.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct LimitStatus {
    /// What it takes.
    pub used: u64,
    /// The most that it may take; null: no limit.
    pub limit: Option<u64>,
}

/// How long a guest may keep what it has learned of a mount.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct CachePolicy {
    /// `always`, `auto`, `metadata` or `never`.
    pub policy: String,
    /// Names and attributes, milliseconds; null: for ever.
    pub metadata_ms: Option<u64>,
    /// Data may be kept after a file was closed.
    pub data: bool,
}

/// What is particular to an image.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ImageStatus {
    /// `id` of its configuration.
    pub id: String,
    /// `registry`, `localfs`, ...
    pub source_type: String,
    /// Host or path that its blobs come from.
    pub source_host: String,
    /// Requests to the source that failed since the last one that went well; 0: it is healthy, as far as is known.
    pub source_failures: u64,
    /// Directory of the cache.
    pub cache_dir: String,
    /// Its blobs.
    pub blobs: Vec<BlobStatus>,
    /// Prefetch, if it was asked for and has begun.
    pub prefetch: Option<PrefetchStatus>,
}

/// A blob of an image.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct BlobStatus {
    /// Its id.
    pub id: String,
    /// Bytes, uncompressed.
    pub size: u64,
    /// Chunks.
    pub chunks: u32,
    /// Those of them that are local and verified.
    pub resident: u32,
    /// Those of them that are on their way.
    pub in_flight: usize,
    /// Chunks fetched so far, for all mounts that share the cache.
    pub fetched: u64,
    /// Fetched chunks that were damaged.
    pub damaged: u64,
}

/// How far a prefetch is.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct PrefetchStatus {
    /// Chunks made resident by it.
    pub chunks: u64,
    /// Compressed bytes fetched by it.
    pub bytes: u64,
    /// Fetches that failed.
    pub failures: u64,
    /// It has ended.
    pub ended: bool,
    /// Why it does nothing at present: `idle`: the container asked for nothing for a while; `source`: its source fails or has become slow.
    pub paused: Option<String>,
}

/// A request that is not answered yet.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct LiveRequest {
    /// The driver's number of the request.
    pub unique: u64,
    /// Its name in the protocol, such as `Read`.
    pub operation: String,
    /// FUSE opcode.
    pub opcode: u32,
    /// Where its file is mounted; empty for the directories that lead to mountpoints.
    pub mountpoint: String,
    /// The file, inside the mount; null if it is not known.
    pub path: Option<String>,
    /// Inode number inside the mount.
    pub inode: u64,
    /// Of a read of an image: where it begins, bytes.
    pub offset: Option<u64>,
    /// Of a read of an image: how much is wanted, bytes.
    pub size: Option<u32>,
    /// Time since it came, milliseconds.
    pub age_ms: u64,
    /// Time until it is answered whatever happens, milliseconds; null: it has none.
    pub deadline_ms: Option<u64>,
    /// `data` of an image, a `lock` that somebody else holds, a `worker` or the `thread` that executes it (and the host's disk behind them), or the
    /// `driver`, which has stopped the queue.
    pub waits_for: String,
    /// What data it waits for.
    pub data: Option<AwaitedData>,
}

/// What a read waits for.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct AwaitedData {
    /// Bootstrap of the image.
    pub image: String,
    /// `registry`, `localfs`, ...
    pub source_type: String,
    /// Host or path of the source.
    pub source_host: String,
    /// Blob.
    pub blob: String,
    /// Absent chunks of it that the read needs.
    pub chunks: Vec<u32>,
    /// Why the last attempt failed, if one has.
    pub last_error: Option<String>,
}

/// Latencies of a mount since it was made.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MountLatencies {
    /// Path inside the tag.
    pub mountpoint: String,
    /// By kind of work: `read`, `write`, `metadata`.
    pub by_work: BTreeMap<String, Histogram>,
}

/// How long requests took.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Histogram {
    /// Requests.
    pub count: u64,
    /// Their time, summed up, microseconds.
    pub total_us: u64,
    /// Half of them took no longer, microseconds (upper bound of a class).
    pub p50_us: u64,
    /// 99 of 100 took no longer, microseconds (upper bound of a class).
    pub p99_us: u64,
    /// Requests by class; empty classes are left out.
    pub classes: Vec<LatencyClass>,
}

/// A class of latencies.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct LatencyClass {
    /// Upper bound, microseconds; null for the last class, which has none.
    pub up_to_us: Option<u64>,
    /// Requests that took longer than the class before and no longer than this bound.
    pub count: u64,
}

/// What of a file is local.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Residency {
    /// Path inside the tag.
    pub mountpoint: String,
    /// The file, inside the mount.
    pub path: String,
    /// Inode number inside the mount.
    pub inode: u64,
    /// Bytes of the file.
    pub size: u64,
    /// Its chunks.
    pub chunks: usize,
    /// Those of them that are local and verified.
    pub resident: usize,
    /// Positions of the local chunks in the file: `[first, last]`, ascending.
    pub ranges: Vec<[usize; 2]>,
}

/// Which chunks of an image were read first.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct AccessTrace {
    /// Path inside the tag.
    pub mountpoint: String,
    /// Reads are still recorded.
    pub recording: bool,
    /// Chunks recorded so far, each once.
    pub chunks: usize,
    /// The trace: a line `rafsd-trace 1`, then for each run of accesses to a blob a line `blob ID` and a line with its chunks, `0-3 17 5`, in the
    /// order of their first use.
    pub trace: String,
}

/// A change of the daemon.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct DaemonChange {
    /// `trace debug info warn error off`.
    pub log_level: String,
}

/// New credentials for the source of an image.
#[derive(Clone, Deserialize, JsonSchema)]
pub struct NewCredentials {
    /// base64 of `user:password`.
    #[schemars(with = "String")]
    pub registry_auth: crate::config::Secret,
}

/// How to drain.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct DrainRequest {
    /// How long to wait for requests that wait, milliseconds; at most 60,000.
    #[serde(default)]
    pub timeout_ms: u64,
}

/// How far a drain came.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Drained {
    /// No request waited any more.
    pub drained: bool,
    /// Requests that still waited when the time was over.
    pub waiting: usize,
}

/// The daemon, as its operators see it.
pub trait Operate: Send + Sync + 'static {
    /// The daemon at this moment.
    fn overview(&self) -> Overview;
    /// All mounts, or the one at `mountpoint`.
    fn mount_status(&self, mountpoint: Option<&str>) -> Result<Vec<MountStatus>, ControlError>;
    /// Requests that are not answered yet, oldest first.
    fn live_requests(&self) -> Vec<LiveRequest>;
    /// Latencies of all mounts, or of the one at `mountpoint`.
    fn latencies(&self, mountpoint: Option<&str>) -> Result<Vec<MountLatencies>, ControlError>;
    /// What of the file at `path` of the image at `mountpoint` is local.
    fn residency(&self, mountpoint: &str, path: &str) -> Result<Residency, ControlError>;
    /// Begins to record which chunks of the image at `mountpoint` are read, from nothing.
    fn start_trace(&self, mountpoint: &str) -> Result<(), ControlError>;
    /// Ends the recording; what was recorded is kept as long as the mount.
    fn stop_trace(&self, mountpoint: &str) -> Result<(), ControlError>;
    /// What was recorded of the image at `mountpoint` so far.
    fn trace(&self, mountpoint: &str) -> Result<AccessTrace, ControlError>;
    /// Refuses new mounts from now on, and waits for requests that wait.
    fn drain(&self, request: DrainRequest) -> Drained;
    /// Takes mounts again.
    fn undrain(&self);
    /// All counters in the text format of Prometheus.
    fn exposition(&self) -> String;
}
