//! Mount, remount, unmount.

use super::reply::Reply;
use super::request::Call;
use crate::control::{Control, ControlError, MountRequest};

pub(super) fn mount(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let mountpoint = call.required("mountpoint")?;
    control.mount(&mountpoint, call.json::<MountRequest>()?)?;
    Ok(Reply::nothing())
}

pub(super) fn remount(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let mountpoint = call.required("mountpoint")?;
    control.remount(&mountpoint, call.json::<MountRequest>()?)?;
    Ok(Reply::nothing())
}

pub(super) fn umount(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    control.umount(&call.required("mountpoint")?)?;
    Ok(Reply::nothing())
}
