//! Requests to answers: routing, and what becomes of a request, with its faults.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{any, get};
use serde_json::json;

use super::State;
use super::body::{Content, LIST, Parts, Plan, stream};
use super::catalog::is_digest;
use super::fault::Fault;
use super::find::{Found, by_digest, by_tag, only_by_digest};
use super::manifest;
use super::pull::Kind;
use super::range::{parse_list, parse_range};

pub(super) fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/", get(index))
        .route("/token", get(token))
        .route("/_fault", get(show_fault).put(set_fault))
        .route("/_requests", get(show_requests).delete(clear_requests))
        .route("/v2", any(ping))
        .route("/v2/", any(ping))
        .route("/v2/{*rest}", any(registry))
        .with_state(state)
}

/// An error as the distribution specification words it.
pub(super) fn refuse(status: StatusCode, code: &str, message: impl Into<String>) -> Response {
    (
        status,
        Json(json!({"errors": [{"code": code, "message": message.into()}]})),
    )
        .into_response()
}

pub(super) fn broken(error: impl std::fmt::Display) -> Response {
    refuse(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", error.to_string())
}

fn unauthorized(challenge: &str) -> Response {
    let answer = refuse(
        StatusCode::UNAUTHORIZED,
        "UNAUTHORIZED",
        "authentication required",
    );
    ([(header::WWW_AUTHENTICATE, challenge)], answer).into_response()
}

async fn index(Shared(state): Shared<Arc<State>>) -> Response {
    match tokio::task::spawn_blocking(move || state.catalog.list()).await {
        Ok(listed) => Json(listed).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn show_fault(Shared(state): Shared<Arc<State>>) -> String {
    format!("{}\n", state.fault.lock())
}

async fn set_fault(Shared(state): Shared<Arc<State>>, text: String) -> Response {
    match text.parse::<Fault>() {
        Ok(fault) => {
            state.dice.reseed(fault.seed);
            *state.fault.lock() = fault;
            StatusCode::NO_CONTENT.into_response()
        }
        Err(reason) => (StatusCode::BAD_REQUEST, format!("{reason}\n")).into_response(),
    }
}

async fn show_requests(Shared(state): Shared<Arc<State>>) -> Response {
    let (requests, bytes) = state.records.totals();
    Json(json!({"requests": requests, "bytes": bytes})).into_response()
}

async fn clear_requests(Shared(state): Shared<Arc<State>>) -> StatusCode {
    state.records.clear();
    StatusCode::NO_CONTENT
}

#[derive(serde::Deserialize)]
struct TokenQuery {
    scope: Option<String>,
}

async fn token(
    Shared(state): Shared<Arc<State>>,
    Query(query): Query<TokenQuery>,
    headers: HeaderMap,
) -> Response {
    delay(&state).await;
    match state.gate.issue(&headers, query.scope.as_deref()) {
        None => refuse(
            StatusCode::NOT_FOUND,
            "UNSUPPORTED",
            "this registry issues no tokens",
        ),
        Some(Err(challenge)) => unauthorized(&challenge),
        Some(Ok(token)) => {
            let (token, expires_in) = (token.token, token.expires_in);
            Json(json!({"token": &token, "access_token": &token, "expires_in": expires_in})).into_response()
        }
    }
}

/// Where the client reaches this server, by its own words.
fn origin(state: &State, headers: &HeaderMap) -> String {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or("localhost");
    format!("{}://{host}", state.scheme)
}

/// The way to a registry and back.
async fn delay(state: &State) {
    let latency = state.fault.lock().latency;
    tokio::time::sleep(latency).await;
}

async fn ping(Shared(state): Shared<Arc<State>>, headers: HeaderMap) -> Response {
    delay(&state).await;
    match state.gate.check(&headers, None, &origin(&state, &headers)) {
        Ok(()) => (
            [("docker-distribution-api-version", "registry/2.0")],
            Json(json!({})),
        )
            .into_response(),
        Err(challenge) => unauthorized(&challenge),
    }
}

/// Everything below `/v2/`. Records the request, whatever becomes of it.
async fn registry(
    Shared(state): Shared<Arc<State>>,
    Path(rest): Path<String>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let time = SystemTime::now();
    delay(&state).await;
    let range = headers
        .get(header::RANGE)
        .map(|range| String::from_utf8_lossy(range.as_bytes()).into_owned());
    let answer = match object(&state, &rest, &method, &headers, range.as_deref()).await {
        Ok(answer) | Err(answer) => answer,
    };
    let (head, body) = answer.into_parts();
    let recording = state
        .records
        .begin(time, method.as_str(), uri.path(), range, head.status.as_u16());
    let body = match head.extensions.get::<Plan>() {
        Some(plan) if method == Method::GET => stream(plan.clone(), recording),
        _ => body,
    };
    Response::from_parts(head, body)
}

/// The answer to a request for a blob or a manifest.
async fn object(
    state: &Arc<State>,
    rest: &str,
    method: &Method,
    headers: &HeaderMap,
    range: Option<&str>,
) -> Result<Response, Response> {
    let split = |what| rest.rsplit_once(what);
    let (repository, name, kind) = split("/blobs/")
        .map(|(repository, name)| (repository, name, Kind::Blob))
        .or_else(|| split("/manifests/").map(|(repository, name)| (repository, name, Kind::Manifest)))
        .ok_or_else(only_by_digest)?;
    state
        .gate
        .check(headers, Some(repository), &origin(state, headers))
        .map_err(|challenge| unauthorized(&challenge))?;
    if method != Method::GET && method != Method::HEAD {
        return Err(refuse(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            "this registry is read-only",
        ));
    }
    let digest = name.strip_prefix("sha256:").filter(|hex| is_digest(hex));
    if digest.is_none() && (kind == Kind::Blob || !manifest::is_tag(name)) {
        return Err(refuse(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            "expected sha256:<64 hex digits>",
        ));
    }
    let fault = state.fault.lock().clone();
    if state.dice.hits(fault.fail) {
        let status = StatusCode::from_u16(fault.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        return Err(refuse(status, "UNKNOWN", "failed on demand"));
    }
    let found = match digest {
        Some(hex) => by_digest(state, kind, repository, hex).await?,
        None => by_tag(state, repository, name).await?,
    };
    answer(state, &fault, found, range).await
}

/// The head of an answer, with the plan of its body.
async fn answer(
    state: &State,
    fault: &Fault,
    found: Found,
    range: Option<&str>,
) -> Result<Response, Response> {
    let Found {
        content,
        size,
        digest,
        kind,
    } = found;
    let (content, list) = match (range.and_then(|range| parse_list(range, size)), content) {
        (Some(ranges), Content::File(file)) => {
            let parts = Parts::new(file, &ranges, size);
            let length = parts.length();
            (Content::Parts(Arc::new(parts)), Some(length))
        }
        (_, content) => (content, None),
    };
    let asked = range.and_then(|range| parse_range(range, size));
    let (status, span) = match &asked {
        _ if list.is_some() => (StatusCode::PARTIAL_CONTENT, 0..list.unwrap_or(0)),
        None => (StatusCode::OK, 0..size),
        Some(Some(span)) => (StatusCode::PARTIAL_CONTENT, span.clone()),
        Some(None) => {
            let answer = refuse(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "RANGE_INVALID",
                "beyond the end of the blob",
            );
            return Err(([(header::CONTENT_RANGE, format!("bytes */{size}"))], answer).into_response());
        }
    };
    let length = span.end - span.start;
    let flip = (length > 0 && state.dice.hits(fault.corrupt)).then(|| {
        (
            span.start + state.dice.next() % length,
            (state.dice.next() % 8) as u8,
        )
    });
    let end = if state.dice.hits(fault.truncate) {
        span.start + length / 2
    } else {
        span.end
    };
    let mut response = Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, if list.is_some() { LIST } else { &kind })
        .header(header::CONTENT_LENGTH, length)
        .header(header::ACCEPT_RANGES, "bytes")
        .header("docker-content-digest", digest);
    if status == StatusCode::PARTIAL_CONTENT && list.is_none() {
        let value = format!("bytes {}-{}/{size}", span.start, span.end - 1);
        response = response.header(header::CONTENT_RANGE, value);
    }
    let plan = Plan {
        content,
        range: span,
        stall: fault.stall,
        rate: fault.rate,
        flip,
        end,
    };
    response
        .extension(plan)
        .body(Body::empty())
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}
