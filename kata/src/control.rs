//! What the API asks of the daemon. Fulfilled by the daemon; called from blocking threads, concurrently.
//!
//! Rooms: this file (the trait, mounts, errors), [`metrics`] (counters in the shapes that clients parse), [`operate`] (what
//! operators ask beyond that).

pub mod metrics;
pub mod operate;

use std::collections::BTreeMap;

use metrics::{AccessRecord, BackendMetrics, CacheMetrics, FileMetrics, FsMetrics, InFlight};
use operate::Operate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Daemon states as the API shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum State {
    /// Composing.
    Init,
    /// Composed, not serving.
    Ready,
    /// Both sockets listen.
    Running,
    /// Ending.
    Stopped,
}

impl State {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Init => "INIT",
            Self::Ready => "READY",
            Self::Running => "RUNNING",
            Self::Stopped => "STOPPED",
        }
    }
}

/// What was built, when and by what. Clients fail to parse an answer that lacks any of these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Version {
    /// Version of the package, `v0.1.0`.
    pub package_ver: String,
    /// Commit, or `unknown`.
    pub git_commit: String,
    /// When, or `unknown`.
    pub build_time: String,
    /// `release` or `debug`.
    pub profile: String,
    /// `rustc 1.95.0 (...)`.
    pub rustc: String,
}

/// A mount request, decoded.
#[derive(Clone, Deserialize, JsonSchema)]
pub struct MountRequest {
    /// `rafs`, `passthrough_fs`, ... as sent.
    #[serde(default)]
    pub fs_type: String,
    /// Bootstrap file, or directory to pass through.
    pub source: String,
    /// Configuration text (JSON or TOML); of a directory, options in JSON or nothing.
    pub config: String,
    /// Absolute paths inside the image to prefetch.
    #[serde(default)]
    pub prefetch_files: Option<Vec<String>>,
}

impl std::fmt::Debug for MountRequest {
    /// Without the configuration, which is full of secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MountRequest")
            .field("fs_type", &self.fs_type)
            .field("source", &self.source)
            .field("prefetch_files", &self.prefetch_files)
            .finish_non_exhaustive()
    }
}

/// One mount as `GET /api/v1/daemon` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct MountInfo {
    /// `Rafs` or `PassthroughFs`.
    pub backend_type: String,
    /// Path inside the tag.
    pub mountpoint: String,
    /// `2026-11-21 21:46:42.629744263 +00:00:00`.
    pub mounted_time: String,
    /// Configuration of generation 2 without secrets, or null.
    pub config: Option<serde_json::Value>,
}

/// Errors that the daemon has met, newest last, as `GET /api/v1/daemon/events` shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Events {
    /// How many are kept.
    pub max_errors: usize,
    /// How many there are.
    pub total_errors: usize,
    /// How many bytes of text are kept.
    pub max_size: usize,
    /// How many bytes there are.
    pub total_size: usize,
    /// Their texts.
    pub errors: Vec<String>,
}

/// What can be changed of a mount while it serves; absent members stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// base64 of `user:password`.
    pub registry_auth: Option<crate::config::Secret>,
    /// Forward proxy.
    pub proxy_url: Option<crate::config::SecretUrl>,
    /// Dragonfly scheduler.
    pub dragonfly_scheduler_endpoint: Option<crate::config::SecretUrl>,
}

/// A request that the daemon refused. `status` is the HTTP status, `message` is for a person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// HTTP status code, 400 to 599.
    pub status: u16,
    /// What failed and why, naming the thing.
    pub message: String,
}

impl ControlError {
    /// The daemon could not do it (500).
    pub fn failed(message: impl Into<String>) -> Self {
        Self {
            status: 500,
            message: message.into(),
        }
    }

    /// The request makes no sense (400).
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self {
            status: 400,
            message: message.into(),
        }
    }

    /// This daemon does not do that (501).
    pub fn unsupported(what: &str) -> Self {
        Self {
            status: 501,
            message: format!("Unsupported: {what}"),
        }
    }

    /// `event` does not fit the present state (400).
    pub fn unexpected_event(event: &str, state: State, wanted: State) -> Self {
        Self::bad_request(format!(
            "UnexpectedEvent(\"{event}\"): the daemon is {}, it must be {}",
            state.name(),
            wanted.name()
        ))
    }

    /// No counter of that kind (404); `why` says for which id, or that an id is needed.
    pub fn no_counter(why: impl std::fmt::Display) -> Self {
        Self {
            status: 404,
            message: format!("NoCounter: {why}"),
        }
    }
}

/// The daemon, as the API sees it. Methods that take an `id` of a counter follow the incumbent: without one,
/// they answer if exactly one counter of that kind exists.
pub trait Control: Operate {
    /// Present state.
    fn state(&self) -> State;
    /// What runs.
    fn version(&self) -> Version;
    /// `--id`, if given.
    fn id(&self) -> Option<String>;
    /// `--supervisor`, if given.
    fn supervisor(&self) -> Option<String>;
    /// All mounts by mountpoint.
    fn mounts(&self) -> BTreeMap<String, MountInfo>;
    /// Mounts; it happened or left nothing.
    fn mount(&self, mountpoint: &str, request: MountRequest) -> Result<(), ControlError>;
    /// Replaces the instance of a RAFS mount.
    fn remount(&self, mountpoint: &str, request: MountRequest) -> Result<(), ControlError>;
    /// Unmounts.
    fn umount(&self, mountpoint: &str) -> Result<(), ControlError>;
    /// `trace debug info warn error off`.
    fn set_log_level(&self, level: &str) -> Result<(), ControlError>;
    /// READY → RUNNING.
    fn start(&self) -> Result<(), ControlError>;
    /// Ends the daemon after this answer.
    fn exit(&self) -> Result<(), ControlError>;
    /// Errors met so far.
    fn events(&self) -> Events;
    /// The superblock of a RAFS mount, in the incumbent's words.
    fn superblock(&self, mountpoint: &str) -> Result<serde_json::Value, ControlError>;
    /// What was changed by [`Control::change_settings`], by mountpoint; secrets are hidden by the API.
    fn settings(&self) -> BTreeMap<String, Settings>;
    /// Changes settings of the mount at `mountpoint`.
    fn change_settings(&self, mountpoint: &str, change: Settings) -> Result<(), ControlError>;
    /// Counters of a mount; `id` is its mountpoint or its configuration's id.
    fn fs_metrics(&self, id: Option<&str>) -> Result<FsMetrics, ControlError>;
    /// Counters per file, by inode number.
    fn file_metrics(&self, id: Option<&str>) -> Result<BTreeMap<u64, FileMetrics>, ControlError>;
    /// Ranges of inode numbers read since the last call: `[number]` or `[first, last]`.
    fn latest_files(&self, id: Option<&str>) -> Result<Vec<Vec<u64>>, ControlError>;
    /// First accesses.
    fn access_pattern(&self, id: Option<&str>) -> Result<Vec<AccessRecord>, ControlError>;
    /// Counters of a source.
    fn backend_metrics(&self, id: Option<&str>) -> Result<BackendMetrics, ControlError>;
    /// Counters of a cache.
    fn cache_metrics(&self, id: Option<&str>) -> Result<CacheMetrics, ControlError>;
    /// Requests that are not answered yet.
    fn in_flight(&self) -> Result<Vec<InFlight>, ControlError>;
}
