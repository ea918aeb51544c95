//! Counters.

use super::reply::Reply;
use super::request::Call;
use crate::control::{Control, ControlError};

pub(super) fn fs(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.fs_metrics(call.query("id").as_deref())?)
}

pub(super) fn files(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let id = call.query("id");
    if call.query("latest").as_deref() == Some("true") {
        Reply::json(&control.latest_files(id.as_deref())?)
    } else {
        Reply::json(&control.file_metrics(id.as_deref())?)
    }
}

pub(super) fn pattern(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.access_pattern(call.query("id").as_deref())?)
}

pub(super) fn backend(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.backend_metrics(call.query("id").as_deref())?)
}

pub(super) fn cache(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.cache_metrics(call.query("id").as_deref())?)
}

/// 204 when nothing is under way.
pub(super) fn in_flight(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    let requests = control.in_flight()?;
    if requests.is_empty() {
        Ok(Reply::nothing())
    } else {
        Reply::json(&requests)
    }
}
