//! Heads of answers: what they promise, checked against what was asked for, and the errors that statuses stand for.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use http::header::{CONTENT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, RANGE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, StatusCode};
use reqwest::Response;

use super::failure::{host_of, protocol};
use crate::error::{SourceError, SourceErrorKind};
use crate::source::parts::boundary;

/// The header that asks for `ranges`, none of which is empty.
pub(crate) fn range_header(ranges: &[Range<u64>]) -> (HeaderName, HeaderValue) {
    let ranges: Vec<String> = ranges
        .iter()
        .map(|range| format!("{}-{}", range.start, range.end.saturating_sub(1)))
        .collect();
    let text = format!("bytes={}", ranges.join(","));
    (
        RANGE,
        HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("bytes=0-0")),
    )
}

/// Checks the head of an answer to one range.
pub(super) fn check_head(response: &Response, range: &Range<u64>) -> Result<(), SourceError> {
    let host = host_of(response.url());
    let headers = response.headers();
    if headers
        .get(CONTENT_ENCODING)
        .is_some_and(|encoding| encoding != "identity")
    {
        return Err(protocol(
            &host,
            "an encoded body, which was not asked for".to_owned(),
        ));
    }
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let answered = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
            let expected = format!("bytes {}-{}", range.start, range.end.saturating_sub(1));
            let matches = answered
                .and_then(|text| text.trim().rsplit_once('/'))
                .is_some_and(|(range, _)| range == expected);
            if matches {
                Ok(())
            } else {
                Err(protocol(
                    &host,
                    format!(
                        "asked for {expected}, got {}",
                        answered.unwrap_or("no Content-Range")
                    ),
                ))
            }
        }
        // The whole blob is the range that was asked for only if it is just as long.
        StatusCode::OK if range.start == 0 && response.content_length() == Some(range.end) => Ok(()),
        StatusCode::OK => Err(protocol(&host, "answered a range with the whole blob".to_owned())),
        _ => Err(status_error(response)),
    }
}

/// The error that a status stands for.
pub(crate) fn status_error(response: &Response) -> SourceError {
    let status = response.status();
    let retry_after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(parse_retry_after);
    let kind = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => SourceErrorKind::Denied,
        StatusCode::NOT_FOUND | StatusCode::GONE => SourceErrorKind::NotFound,
        StatusCode::RANGE_NOT_SATISFIABLE => SourceErrorKind::RangeRefused,
        StatusCode::TOO_MANY_REQUESTS => SourceErrorKind::Throttled,
        StatusCode::REQUEST_TIMEOUT => SourceErrorKind::Server,
        _ if status.is_server_error() && retry_after.is_some() => SourceErrorKind::Throttled,
        _ if status.is_server_error() => SourceErrorKind::Server,
        _ => SourceErrorKind::Protocol,
    };
    SourceError {
        kind,
        host: host_of(response.url()),
        detail: format!("status {status}"),
        retry_after,
    }
}

/// `Retry-After`: seconds, or a date.
fn parse_retry_after(value: &str) -> Option<Duration> {
    match value.trim().parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(value)
            .ok()?
            .duration_since(SystemTime::now())
            .ok(),
    }
}

/// The boundary of a body of several parts.
pub(super) fn boundary_of(answer: &Response) -> Option<String> {
    let kind = answer.headers().get(CONTENT_TYPE)?.to_str().ok()?;
    boundary(kind).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(parse_retry_after(" 12 "), Some(Duration::from_secs(12)));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        let parsed = parse_retry_after(&soon).unwrap();
        assert!(parsed > Duration::from_secs(90) && parsed <= Duration::from_secs(100));
        assert_eq!(parse_retry_after("soon"), None);
    }
}
