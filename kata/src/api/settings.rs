//! Settings of a mount that can change while it serves: credentials and proxy.

use std::collections::BTreeMap;

use super::reply::Reply;
use super::request::Call;
use crate::config::{Secret, SecretUrl};
use crate::control::{Control, ControlError, Settings};

const REGISTRY_AUTH: &str = "registry_auth";
const PROXY_URL: &str = "proxy_url";
const DRAGONFLY: &str = "dragonfly_scheduler_endpoint";

/// Tells what was set, and hides what is secret: `***` for credentials, URLs without theirs.
pub(super) fn show(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let all = control.settings();
    let mut shown = BTreeMap::new();
    match call.query("id") {
        Some(id) => {
            for (key, value) in all.get(id.as_ref()).map(visible).unwrap_or_default() {
                shown.insert(key.to_owned(), value);
            }
        }
        None => {
            for (id, settings) in &all {
                for (key, value) in visible(settings) {
                    shown.insert(format!("{id}:{key}"), value);
                }
            }
        }
    }
    Reply::json(&shown)
}

fn visible(settings: &Settings) -> Vec<(&'static str, String)> {
    let mut shown = Vec::new();
    if let Some(auth) = &settings.registry_auth {
        shown.push((REGISTRY_AUTH, auth.to_string()));
    }
    if let Some(url) = &settings.proxy_url {
        shown.push((PROXY_URL, url.redacted()));
    }
    if let Some(endpoint) = &settings.dragonfly_scheduler_endpoint {
        shown.push((DRAGONFLY, endpoint.redacted()));
    }
    shown
}

pub(super) fn change(control: &dyn Control, call: &Call) -> Result<Reply, ControlError> {
    let id = call.required("id")?;
    let mut change = Settings::default();
    // Not read as a map of texts: the error would quote a secret of the wrong type.
    for (key, value) in call.json::<BTreeMap<String, Secret>>()? {
        match key.as_str() {
            REGISTRY_AUTH => change.registry_auth = Some(value),
            PROXY_URL => change.proxy_url = Some(SecretUrl::new(value.expose())),
            DRAGONFLY => change.dragonfly_scheduler_endpoint = Some(SecretUrl::new(value.expose())),
            other => {
                return Err(ControlError::failed(format!(
                    "Configure: {other} cannot be changed, only {REGISTRY_AUTH}, {PROXY_URL} and {DRAGONFLY} can"
                )));
            }
        }
    }
    control.change_settings(&id, change)?;
    Ok(Reply::nothing())
}
