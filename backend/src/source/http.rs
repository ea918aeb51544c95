//! What all sources over HTTP share: one client per transport configuration, answers checked against the question, silence
//! ended by time-outs, errors with a kind.

use std::error::Error as _;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_RANGE, RANGE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use parking_lot::RwLock;
use reqwest::{Client, ClientBuilder, Response, redirect};
use tokio::time::{Instant, timeout};
use url::Url;

use super::proxy::Route;
use super::{Sink, tls};
use crate::config::{HttpConfig, ProxyConfig, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// Slowest body that is not taken for a stalled one, in bytes per second.
const SLOWEST: u64 = 4 << 10;
/// Idle connections kept per host.
const IDLE: usize = 16;

/// A client, and how patient it is.
pub(crate) struct Transport {
    client: Client,
    config: HttpConfig,
    route: RwLock<Option<Arc<Route>>>,
    headers: HeaderMap,
    timeout: Duration,
    /// `connect_timeout` and `timeout`: until the head of an answer is there.
    head_timeout: Duration,
}

/// The head of an answer, with the way that it came.
pub(crate) struct Answer {
    response: Response,
    route: Option<Arc<Route>>,
}

impl Deref for Answer {
    type Target = Response;

    fn deref(&self) -> &Response {
        &self.response
    }
}

/// A client's settings that do not depend on the source.
pub(super) fn builder(config: &HttpConfig) -> Result<ClientBuilder, SourceError> {
    Ok(Client::builder()
        .tls_backend_preconfigured(tls::client(config.skip_verify, &config.ca_cert_files)?)
        .redirect(redirect::Policy::none())
        .connect_timeout(config.connect_timeout)
        .pool_max_idle_per_host(IDLE)
        .tcp_keepalive(Duration::from_secs(15))
        .no_proxy())
}

impl Transport {
    pub(crate) fn new(config: &HttpConfig) -> Result<Self, SourceError> {
        Self::with(config, |builder| builder)
    }

    /// With more settings of the client.
    pub(crate) fn with(
        config: &HttpConfig,
        more: impl FnOnce(ClientBuilder) -> ClientBuilder,
    ) -> Result<Self, SourceError> {
        let refuse =
            |reason: &dyn std::fmt::Display| SourceError::new(SourceErrorKind::Config, "HTTP client", reason);
        let mut headers = HeaderMap::new();
        for (name, value) in &config.headers {
            let name = HeaderName::try_from(name).map_err(|error| refuse(&error))?;
            let mut value = HeaderValue::try_from(value.expose()).map_err(|error| refuse(&error))?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        let client = more(builder(config)?)
            .build()
            .map_err(|error| refuse(&describe(&error)))?;
        let route = config
            .proxy
            .as_ref()
            .map(|proxy| Route::new(config, proxy))
            .transpose()?
            .flatten();
        Ok(Self {
            client,
            route: RwLock::new(route),
            headers,
            timeout: config.timeout,
            head_timeout: config.connect_timeout.saturating_add(config.timeout),
            config: config.clone(),
        })
    }

    /// Goes through the proxy at `url` from now on; without one if it is empty.
    pub(crate) fn replace_proxy(&self, url: Secret) -> Result<(), SourceError> {
        let proxy = ProxyConfig {
            url,
            ..self.config.proxy.clone().unwrap_or_default()
        };
        let route = Route::new(&self.config, &proxy)?;
        *self.route.write() = route;
        Ok(())
    }

    /// Sends a GET and waits for the head of the answer, whatever its status. Through the proxy, if there is one and it is
    /// healthy; an error of the proxy is followed by the same request to the origin, if that is allowed.
    pub(crate) async fn get(&self, url: &Url, headers: HeaderMap) -> Result<Answer, SourceError> {
        let mut all = self.headers.clone();
        all.extend(headers);
        let route = self.route.read().clone().filter(Route::usable);
        if let Some(route) = route {
            let outcome = self.send(&route.client, &route.target(url), all.clone()).await;
            let failure = match &outcome {
                Ok(response) if !by_proxy(response) => None,
                Ok(response) => Some(format!("status {}", response.status())),
                Err(error) => Some(error.to_string()),
            };
            match failure {
                None => {
                    return outcome.map(|response| Answer {
                        response,
                        route: Some(route),
                    });
                }
                Some(reason) => route.failed(&reason),
            }
            if !route.fallback {
                return outcome.map(|response| Answer {
                    response,
                    route: Some(route),
                });
            }
        }
        self.send(&self.client, url, all).await.map(|response| Answer {
            response,
            route: None,
        })
    }

    async fn send(&self, client: &Client, url: &Url, headers: HeaderMap) -> Result<Response, SourceError> {
        let host = host_of(url);
        match timeout(self.head_timeout, client.get(url.clone()).headers(headers).send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(SourceError::new(kind_of(&error), host, describe(&error))),
            Err(_) => Err(stalled(&host, self.head_timeout, "no answer")),
        }
    }

    /// Reads a small body.
    pub(crate) async fn text(&self, mut response: Answer, limit: usize) -> Result<Vec<u8>, SourceError> {
        let host = host_of(response.url());
        let mut body = Vec::new();
        while let Some(piece) = self.piece(&mut response, &host).await? {
            body.extend_from_slice(&piece);
            if body.len() > limit {
                return Err(protocol(&host, format!("answer of more than {limit} bytes")));
            }
        }
        Ok(body)
    }

    /// Reads the body of a checked answer: exactly the bytes of `range`.
    pub(crate) async fn body(
        &self,
        mut answer: Answer,
        range: &Range<u64>,
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        let outcome = self.pieces(&mut answer, range, sink).await;
        if let Some(route) = &answer.route {
            match &outcome {
                Ok(()) => route.succeeded(),
                Err(error) => route.failed(error),
            }
        }
        outcome
    }

    async fn pieces(
        &self,
        response: &mut Answer,
        range: &Range<u64>,
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        let host = host_of(response.url());
        let mut left = range.end - range.start;
        let mut window = (Instant::now(), left);
        while let Some(mut piece) = self.piece(response, &host).await? {
            let excess = (piece.len() as u64).saturating_sub(left);
            piece.truncate(left.min(piece.len() as u64) as usize);
            left -= piece.len() as u64;
            if !piece.is_empty() {
                sink(piece);
            }
            if excess > 0 {
                return Err(protocol(&host, "the body goes on after the range".to_owned()));
            }
            let (begin, before) = window;
            if begin.elapsed() > self.timeout && left > 0 {
                if before - left < SLOWEST * self.timeout.as_secs().max(1) {
                    let detail = format!(
                        "{} bytes in {:.1} s",
                        before - left,
                        begin.elapsed().as_secs_f64()
                    );
                    return Err(SourceError::new(SourceErrorKind::Stalled, host, detail));
                }
                window = (Instant::now(), left);
            }
        }
        if left > 0 {
            return Err(protocol(&host, format!("the body ends {left} bytes early")));
        }
        Ok(())
    }

    async fn piece(&self, answer: &mut Answer, host: &str) -> Result<Option<Bytes>, SourceError> {
        match timeout(self.timeout, answer.response.chunk()).await {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => Err(SourceError::new(kind_of(&error), host, describe(&error))),
            Err(_) => Err(stalled(host, self.timeout, "the body goes silent")),
        }
    }
}

/// Reads `range` of what is at `url`.
pub(super) async fn read_range(
    transport: &Transport,
    url: &Url,
    mut headers: HeaderMap,
    range: &Range<u64>,
    sink: Sink<'_>,
) -> Result<(), SourceError> {
    if range.is_empty() {
        return Ok(());
    }
    headers.extend([range_header(range)]);
    let response = transport.get(url, headers).await?;
    check(&response, range)?;
    transport.body(response, range, sink).await
}

/// Whether an answer is rather the proxy's than the origin's.
fn by_proxy(response: &Response) -> bool {
    let status = response.status();
    status.is_server_error() || status == StatusCode::PROXY_AUTHENTICATION_REQUIRED
}

/// The header that asks for `range`, which is not empty.
pub(crate) fn range_header(range: &Range<u64>) -> (HeaderName, HeaderValue) {
    let text = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
    (
        RANGE,
        HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("bytes=0-0")),
    )
}

/// Checks that the head of an answer promises `range` and nothing else; an error by its status otherwise.
pub(crate) fn check(response: &Response, range: &Range<u64>) -> Result<(), SourceError> {
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

/// `host:port` of a URL, without anything that might be secret.
pub(crate) fn host_of(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => url.scheme().to_owned(),
    }
}

/// A protocol error.
pub(crate) fn protocol(host: &str, detail: String) -> SourceError {
    SourceError::new(SourceErrorKind::Protocol, host, detail)
}

fn stalled(host: &str, patience: Duration, what: &str) -> SourceError {
    SourceError::new(
        SourceErrorKind::Stalled,
        host,
        format!("{what} for {:.1} s", patience.as_secs_f64()),
    )
}

fn kind_of(error: &reqwest::Error) -> SourceErrorKind {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(rustls::Error::InvalidCertificate(_)) = tls_error(inner) {
            return SourceErrorKind::Untrusted;
        }
        cause = inner.source();
    }
    if error.is_builder() {
        SourceErrorKind::Config
    } else {
        SourceErrorKind::Unreachable
    }
}

/// The TLS error in `error`. An `io::Error` does not count what it wraps among its sources.
fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    error
        .downcast_ref()
        .or_else(|| tls_error(error.downcast_ref::<std::io::Error>()?.get_ref()?))
}

/// The innermost reasons of an error, without the URL, which may hold a signature.
fn describe(error: &reqwest::Error) -> String {
    let mut reasons = Vec::new();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let reason = inner.to_string();
        if reasons.last() != Some(&reason) {
            reasons.push(reason);
        }
        cause = inner.source();
    }
    match reasons.len() {
        0 => "request failed".to_owned(),
        n => reasons.split_off(n.saturating_sub(2)).join(": "),
    }
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

    #[test]
    fn hosts_are_shown_without_credentials_and_signatures() {
        let url = Url::parse("https://user:secret@cdn.example:8443/x?sig=secret").unwrap();
        assert_eq!(host_of(&url), "cdn.example:8443");
    }
}
