//! Requests to answers: routing, ranges, bodies with their faults.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{any, get};
use serde_json::json;

use super::State;
use super::catalog::is_digest;
use super::fault::Fault;
use super::find::{Content, Found, by_digest, by_tag, only_by_digest};
use super::manifest;
use super::pull::Kind;
use super::record::Recording;

/// Bytes that are read from a blob at a time.
const PIECE: u64 = 256 << 10;

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
    let body = match head.extensions.get::<Planned>() {
        Some(plan) if method == Method::GET => stream(plan.clone(), recording),
        _ => body,
    };
    Response::from_parts(head, body)
}

/// The body that an answer is to have.
#[derive(Clone)]
struct Planned {
    content: Content,
    range: Range<u64>,
    stall: Duration,
    rate: Option<u64>,
    /// Offset in the content and bit that is turned over.
    flip: Option<(u64, u8)>,
    /// Offset in the content where the body breaks off.
    end: u64,
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
            let body = tokio::task::spawn_blocking(move || parts(&file, &ranges, size));
            let body = body.await.map_err(io::Error::other).flatten().map_err(broken)?;
            let length = body.len() as u64;
            (Content::Bytes(body), Some(length))
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
    let plan = Planned {
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

/// RFC 9110, section 14. Outer `None`: the header is not of a kind that is understood, and ignored. Inner `None`:
/// the range cannot be satisfied.
fn parse_range(header: &str, size: u64) -> Option<Option<Range<u64>>> {
    let (unit, spec) = header.split_once('=')?;
    let (first, last) = spec.split_once('-')?;
    if unit.trim() != "bytes" || spec.contains(',') {
        return None;
    }
    let (first, last) = (first.trim(), last.trim());
    if first.is_empty() {
        let suffix: u64 = last.parse().ok()?;
        return Some((suffix > 0 && size > 0).then(|| size.saturating_sub(suffix)..size));
    }
    let first: u64 = first.parse().ok()?;
    let last = if last.is_empty() {
        u64::MAX
    } else {
        last.parse().ok()?
    };
    if last < first {
        return None;
    }
    Some((first < size).then(|| first..last.saturating_add(1).min(size)))
}

/// Between the parts of an answer to a list of ranges.
const BOUNDARY: &str = "rafs-serve-part";
const LIST: &str = "multipart/byteranges; boundary=rafs-serve-part";
/// Longest list of ranges, and most bytes of one, that are answered as such.
const MAX_RANGES: usize = 1024;
const MAX_LIST: u64 = 64 << 20;

/// A list of ranges, none of which lies beyond the end. Any other list is answered with the whole blob.
fn parse_list(header: &str, size: u64) -> Option<Vec<Range<u64>>> {
    let ranges: Vec<Range<u64>> = header
        .strip_prefix("bytes=")?
        .split(',')
        .take(MAX_RANGES + 1)
        .map(|range| parse_range(&format!("bytes={range}"), size).flatten())
        .collect::<Option<_>>()?;
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    ((2..=MAX_RANGES).contains(&ranges.len()) && total <= MAX_LIST.min(size)).then_some(ranges)
}

/// The body of the answer to a list of ranges (RFC 9110, section 14.6).
fn parts(file: &File, ranges: &[Range<u64>], size: u64) -> io::Result<Bytes> {
    let mut body = Vec::new();
    for range in ranges {
        let head = format!(
            "\r\n--{BOUNDARY}\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes {}-{}/{size}\r\n\r\n",
            range.start,
            range.end - 1
        );
        body.extend_from_slice(head.as_bytes());
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start)?;
        body.extend_from_slice(&bytes);
    }
    body.extend_from_slice(format!("\r\n--{BOUNDARY}--\r\n").as_bytes());
    Ok(body.into())
}

/// Sends a range of a file, piece by piece, with the faults of the plan.
fn stream(plan: Planned, recording: Recording) -> Body {
    let at = plan.range.start;
    let pieces = futures_util::stream::unfold(Some((plan, recording, at)), |state| async {
        let (plan, recording, at) = state?;
        if at == plan.range.start {
            tokio::time::sleep(plan.stall).await;
        }
        if at >= plan.end {
            if plan.end == plan.range.end {
                return None;
            }
            // An error makes the connection drop what it has not written yet.
            tokio::time::sleep(Duration::from_millis(20)).await;
            return Some((Err(io::Error::other("broken off on demand")), None));
        }
        // With a rate: about ten pieces per second.
        let piece = plan
            .rate
            .map_or(PIECE, |rate| (rate / 10).clamp(1, PIECE))
            .min(plan.end - at);
        let read = {
            let plan = plan.clone();
            tokio::task::spawn_blocking(move || read_piece(&plan, at, piece)).await
        };
        let bytes = match read {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(e)) => return Some((Err(e), None)),
            Err(e) => return Some((Err(io::Error::other(e)), None)),
        };
        if let Some(rate) = plan.rate {
            tokio::time::sleep(Duration::from_secs_f64(piece as f64 / rate as f64)).await;
        }
        recording.sent(piece);
        Some((Ok(bytes), Some((plan, recording, at + piece))))
    });
    Body::from_stream(pieces)
}

fn read_piece(plan: &Planned, at: u64, size: u64) -> io::Result<Bytes> {
    let mut bytes = match &plan.content {
        Content::File(file) => {
            let mut bytes = vec![0; size as usize];
            file.read_exact_at(&mut bytes, at)?;
            bytes
        }
        Content::Bytes(body) => {
            let piece = body.get(at as usize..(at + size) as usize);
            piece.ok_or(io::ErrorKind::UnexpectedEof)?.to_vec()
        }
    };
    if let Some((offset, bit)) = plan.flip
        && let Some(byte) = offset
            .checked_sub(at)
            .and_then(|index| bytes.get_mut(index as usize))
    {
        *byte ^= 1 << bit;
    }
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_ranges_are_taken_whole_or_not_at_all() {
        assert_eq!(parse_list("bytes=0-9,20-29", 100), Some(vec![0..10, 20..30]));
        assert_eq!(parse_list("bytes=0-9, -5", 100), Some(vec![0..10, 95..100]));
        for ignored in [
            "bytes=0-9",
            "bytes=0-9,100-",
            "bytes=0-9,x",
            "bytes=0-,0-",
            "lines=0-1,2-3",
        ] {
            assert_eq!(parse_list(ignored, 100), None, "{ignored}");
        }
    }

    #[test]
    fn ranges_follow_the_specification() {
        assert_eq!(parse_range("bytes=0-9", 100), Some(Some(0..10)));
        assert_eq!(parse_range("bytes=90-", 100), Some(Some(90..100)));
        assert_eq!(parse_range("bytes=-10", 100), Some(Some(90..100)));
        assert_eq!(parse_range("bytes=-1000", 100), Some(Some(0..100)));
        assert_eq!(parse_range("bytes=50-1000", 100), Some(Some(50..100)));
        assert_eq!(
            parse_range("bytes=0-18446744073709551615", 100),
            Some(Some(0..100))
        );
        assert_eq!(parse_range("bytes=100-", 100), Some(None), "not satisfiable");
        assert_eq!(parse_range("bytes=-0", 100), Some(None));
        assert_eq!(parse_range("bytes=0-", 0), Some(None));
        for ignored in [
            "bytes=9-0",
            "bytes=0-1,5-6",
            "lines=0-1",
            "bytes",
            "bytes=a-b",
            "bytes=-",
        ] {
            assert_eq!(parse_range(ignored, 100), None, "{ignored}");
        }
    }
}
