//! Answers: JSON with a length, nothing at all (204), or an error in its one shape.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::{Method, Response, StatusCode};
use serde::Serialize;

use crate::control::ControlError;

/// Body of every answer.
pub(super) type Body = Full<Bytes>;

/// An answer.
#[derive(Debug)]
pub(super) struct Reply {
    status: StatusCode,
    content_type: &'static str,
    allow: Option<String>,
    body: Bytes,
}

/// The shape of all errors.
#[derive(Serialize)]
struct ErrorBody<'a> {
    code: &'a str,
    message: &'a str,
}

impl Reply {
    /// 204: no body, no length.
    pub(super) fn nothing() -> Self {
        Self {
            status: StatusCode::NO_CONTENT,
            content_type: "",
            allow: None,
            body: Bytes::new(),
        }
    }

    /// 200 with `value` as JSON.
    pub(super) fn json<T: Serialize>(value: &T) -> Result<Self, ControlError> {
        let body = serde_json::to_vec(value)
            .map_err(|error| ControlError::failed(format!("cannot write the answer: {error}")))?;
        Ok(Self {
            status: StatusCode::OK,
            content_type: "application/json",
            allow: None,
            body: Bytes::from(body),
        })
    }

    /// 200 with `text` of the type `kind`.
    pub(super) fn text(text: String, kind: &'static str) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: kind,
            allow: None,
            body: Bytes::from(text),
        }
    }

    /// The same, whose error is said in our own API's words.
    pub(super) fn with_own_codes(mut self, message: &str) -> Self {
        let code = match self.status.as_u16() {
            400 => "BAD_REQUEST",
            404 => "NOT_FOUND",
            408 => "TIMED_OUT",
            413 => "TOO_LARGE",
            501 => "UNSUPPORTED",
            503 => "UNAVAILABLE",
            _ => "FAILED",
        };
        let body = ErrorBody { code, message };
        self.body = Bytes::from(serde_json::to_string(&body).unwrap_or_default());
        self
    }

    /// 400, as the incumbent answers, with the methods that would have been right.
    pub(super) fn wrong_method(method: &Method, allowed: String) -> Self {
        let error = ControlError::bad_request(format!("BadRequest: method {method}, allowed is {allowed}"));
        Self {
            allow: Some(allowed),
            ..Self::from(error)
        }
    }

    pub(super) fn into_response(self, head_only: bool) -> Response<Body> {
        let body = if head_only { Bytes::new() } else { self.body };
        let mut response = Response::new(Full::new(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(SERVER, HeaderValue::from_static("Nydus API"));
        if !self.content_type.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        }
        if let Some(allow) = self.allow.and_then(|allow| HeaderValue::from_str(&allow).ok()) {
            headers.insert(ALLOW, allow);
        }
        response
    }
}

impl From<ControlError> for Reply {
    fn from(error: ControlError) -> Self {
        Self {
            status: StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            content_type: "application/json",
            allow: None,
            body: Bytes::from(error_text(&error.message)),
        }
    }
}

/// Clients know one code only; the message is what people read.
fn error_text(message: &str) -> String {
    let body = ErrorBody {
        code: "UNDEFINED",
        message,
    };
    serde_json::to_string(&body).unwrap_or_default()
}

/// The whole answer to one connection too many.
pub(super) fn too_many_connections() -> String {
    let body = error_text(&format!(
        "{} connections are open, no more are served",
        super::MAX_CONNECTIONS
    ));
    format!(
        "HTTP/1.1 503 Service Unavailable\r\nServer: Nydus API\r\nContent-Type: application/json\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}
