//! Our own API, beside that of the incumbent: what that cannot say.

use super::openapi;
use super::reply::Reply;
use super::request::Call;
use crate::control::operate::{DaemonChange, DrainRequest, NewCredentials};
use crate::control::{Control, ControlError, Settings};

pub(super) fn overview(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.overview())
}

pub(super) fn configure(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let DaemonChange { log_level } = call.json()?;
    super::daemon::set_log_level(control, &log_level)?;
    Ok(Reply::nothing())
}

pub(super) fn mounts(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.mount_status(call.query("mountpoint").as_deref())?)
}

pub(super) fn requests(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.live_requests())
}

pub(super) fn latencies(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.latencies(call.query("mountpoint").as_deref())?)
}

pub(super) fn residency(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.residency(&call.required("mountpoint")?, &call.required("path")?)?)
}

pub(super) fn start_trace(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    control.start_trace(&call.required("mountpoint")?)?;
    Ok(Reply::nothing())
}

pub(super) fn stop_trace(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    control.stop_trace(&call.required("mountpoint")?)?;
    Ok(Reply::nothing())
}

pub(super) fn trace(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    Reply::json(&control.trace(&call.required("mountpoint")?)?)
}

pub(super) fn credentials(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let mountpoint = call.required("mountpoint")?;
    let NewCredentials { registry_auth } = call.json()?;
    let change = Settings {
        registry_auth: Some(registry_auth),
        ..Settings::default()
    };
    control.change_settings(&mountpoint, change)?;
    Ok(Reply::nothing())
}

pub(super) fn drain(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let request: DrainRequest = call.json()?;
    if request.timeout_ms > 60_000 {
        return Err(ControlError::bad_request(format!(
            "timeout_ms is {}, allowed is 0 to 60000",
            request.timeout_ms
        )));
    }
    Reply::json(&control.drain(request))
}

pub(super) fn undrain(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    control.undrain();
    Ok(Reply::nothing())
}

pub(super) fn document(_: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    Reply::json(&openapi::document())
}

pub(super) fn exposition(control: &dyn Control, _: &Call) -> Result<Reply, ControlError> {
    Ok(Reply::text(control.exposition(), super::EXPOSITION))
}
