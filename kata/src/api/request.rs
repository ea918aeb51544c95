//! What a request says beside its path: query and body.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::Request;
use hyper::body::{Body as _, Incoming};
use serde::de::DeserializeOwned;

use super::routes::BodyRule;
use crate::control::ControlError;

/// Longest body, bytes: a configuration of the largest size, escaped into a JSON string, and a long list of
/// files to prefetch.
pub const MAX_BODY: usize = 4 << 20;

/// How long a client may take to send a body.
const BODY_TIME: Duration = Duration::from_secs(30);

/// A request, read completely.
pub(super) struct Call {
    query: String,
    body: Bytes,
}

impl Call {
    /// Reads the body, as far as `rule` allows one.
    pub(super) async fn read(request: Request<Incoming>, rule: BodyRule) -> Result<Self, ControlError> {
        let query = request.uri().query().unwrap_or_default().to_owned();
        let body = match tokio::time::timeout(BODY_TIME, read_body(request.into_body())).await {
            Ok(body) => body?,
            Err(_) => {
                return Err(ControlError {
                    status: 408,
                    message: format!("the body did not arrive within {} s", BODY_TIME.as_secs()),
                });
            }
        };
        match rule {
            BodyRule::None if !body.is_empty() => Err(ControlError::bad_request(
                "BadRequest: this request takes no body",
            )),
            BodyRule::Json if body.is_empty() => Err(ControlError::bad_request(
                "BadRequest: this request needs a JSON body",
            )),
            _ => Ok(Self { query, body }),
        }
    }

    /// The first value of `name` in the query, decoded.
    pub(super) fn query(&self, name: &str) -> Option<Cow<'_, str>> {
        url::form_urlencoded::parse(self.query.as_bytes())
            .find(|(key, _)| key == name)
            .map(|(_, value)| value)
    }

    /// As [`Call::query`], and it must be there.
    pub(super) fn required(&self, name: &str) -> Result<Cow<'_, str>, ControlError> {
        self.query(name).ok_or_else(|| {
            ControlError::bad_request(format!(
                "QueryString: '{name}' should be specified in query string"
            ))
        })
    }

    /// The body as JSON.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, ControlError> {
        serde_json::from_slice(&self.body)
            .map_err(|error| ControlError::bad_request(format!("ParseBody: {error}")))
    }
}

async fn read_body(body: Incoming) -> Result<Bytes, ControlError> {
    if body.size_hint().lower() > MAX_BODY as u64 {
        return Err(too_large());
    }
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Err(error) => Err(ControlError::bad_request(format!("BadRequest: body: {error}"))),
    }
}

fn too_large() -> ControlError {
    ControlError {
        status: 413,
        message: format!("the body is too large, at most {MAX_BODY} bytes are accepted"),
    }
}
