//! Blob objects of generation 2: they belong to the kernel's fscache, which has no part in virtio-fs.

use serde::Deserialize;

use super::reply::Reply;
use super::request::Call;
use crate::control::{Control, ControlError};

fn unsupported() -> ControlError {
    ControlError::unsupported("blob objects belong to fscache, which a virtio-fs daemon does not serve")
}

pub(super) fn list(_: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    call.required("domain_id")?;
    Err(unsupported())
}

/// As much of a blob entry as tells whether it is one.
#[derive(Deserialize)]
struct Entry {
    config: Option<serde_json::Value>,
    config_v2: Option<serde_json::Value>,
}

pub(super) fn create(_: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let entry: Entry = call.json()?;
    if entry.config.is_none() && entry.config_v2.is_none() {
        return Err(ControlError::bad_request(
            "a blob entry needs config or config_v2",
        ));
    }
    Err(unsupported())
}

/// Culling the files of a blob by its id succeeds without effect: nothing of that kind is kept.
pub(super) fn delete(_: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    if call.query("domain_id").is_some() {
        return Err(unsupported());
    }
    match call.query("blob_id") {
        Some(_) => Ok(Reply::nothing()),
        None => Err(ControlError::bad_request(
            "QueryString: 'domain_id' or 'blob_id' should be specified",
        )),
    }
}
