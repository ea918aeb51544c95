//! What the API asks of the daemon. Fulfilled by the daemon; called from blocking threads, concurrently.

use std::collections::BTreeMap;

/// Daemon states as the API shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
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

/// A mount request, decoded.
#[derive(Clone, Debug)]
pub struct MountRequest {
    /// `rafs`, `passthrough_fs`, ... as sent.
    pub fs_type: String,
    /// Bootstrap file, or directory to pass through.
    pub source: String,
    /// Configuration text (JSON or TOML); empty for passthrough.
    pub config: String,
    /// Absolute paths inside the image to prefetch.
    pub prefetch_files: Vec<String>,
}

/// One mount as `GET /api/v1/daemon` shows it.
#[derive(Clone, Debug, serde::Serialize)]
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

/// A request that the daemon refused. `status` is the HTTP status, `message` is for a person.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// HTTP status code, 400 to 599.
    pub status: u16,
    /// What failed and why, naming the thing.
    pub message: String,
}

/// The daemon, as the API sees it.
pub trait Control: Send + Sync + 'static {
    /// Present state.
    fn state(&self) -> State;
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
}
