//! The daemon itself: information, log level, life cycle.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

use super::reply::Reply;
use super::request::Call;
use crate::control::operate::DaemonChange;
use crate::control::{Control, ControlError, MountInfo, State, Version};

/// The daemon in the incumbent's words.
#[derive(Serialize, JsonSchema)]
pub(super) struct DaemonInfo {
    version: Version,
    id: Option<String>,
    supervisor: Option<String>,
    state: State,
    backend_collection: Option<BTreeMap<String, MountInfo>>,
}

impl DaemonInfo {
    fn of(control: &dyn Control, mounts: Option<BTreeMap<String, MountInfo>>) -> Self {
        Self {
            version: control.version(),
            id: control.id(),
            supervisor: control.supervisor(),
            state: control.state(),
            backend_collection: mounts,
        }
    }
}

pub(super) fn info(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    Reply::json(&DaemonInfo::of(control, Some(control.mounts())))
}

/// Generation 2 of the API is about blobs; it knows no mounts.
pub(super) fn info_v2(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    Reply::json(&DaemonInfo::of(control, None))
}

const LEVELS: [&str; 6] = ["trace", "debug", "info", "warn", "error", "off"];

pub(super) fn configure(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let DaemonChange { log_level } = call.json()?;
    set_log_level(control, &log_level)?;
    Ok(Reply::nothing())
}

pub(super) fn set_log_level(control: &dyn Control, log_level: &str) -> Result<(), ControlError> {
    if !LEVELS.contains(&log_level) {
        return Err(ControlError::failed(format!(
            "Configure: log_level is {log_level:?}, allowed is one of {}",
            LEVELS.join(", ")
        )));
    }
    control.set_log_level(log_level)
}

pub(super) fn events(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.events())
}

pub(super) fn superblock(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.superblock(&call.required("mountpoint")?)?)
}

pub(super) fn start(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    control.start()?;
    Ok(Reply::nothing())
}

pub(super) fn exit(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    control.exit()?;
    Ok(Reply::nothing())
}

/// Neither a vhost-user daemon nor one in FUSE mode hands its device over; clients only warn.
pub(super) fn send_fd(_: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    Err(ControlError::unsupported(
        "a FUSE device is not handed over, and a vhost-user daemon has none: end this daemon and start the next",
    ))
}

pub(super) fn take_over(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    match control.state() {
        State::Init => Err(ControlError::unsupported(
            "a FUSE device is not taken over, and a vhost-user daemon needs none",
        )),
        state => Err(ControlError::unexpected_event("Takeover", state, State::Init)),
    }
}
