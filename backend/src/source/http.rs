//! What all sources over HTTP share: the ways to the origin (mirrors, a proxy, the origin itself), answers checked against the question, silence
//! ended by time-outs, errors with a kind.

use std::error::Error as _;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::header::{CONTENT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, RANGE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use parking_lot::RwLock;
use reqwest::{Client, Response};
use tokio::time::{Instant, sleep, timeout};
use url::Url;

use super::Sink;
use super::clients::{Clients, Peer};
use super::hedge::Hedge;
use super::parts::{Parts, boundary};
use super::route::{Route, secret_headers};
use crate::config::{HttpConfig, ProxyConfig, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// Slowest body that is not taken for a stalled one, in bytes per second.
const SLOWEST: u64 = 4 << 10;
/// Ranges named in one request. Some servers take no more than 200, and header lines of 8 KiB.
const MAX_RANGES: usize = 128;

/// A client, the ways to the origin, and how patient it is.
pub(crate) struct Transport {
    clients: Arc<Clients>,
    client: Client,
    config: HttpConfig,
    mirrors: Vec<Arc<Route>>,
    proxy: RwLock<Option<Arc<Route>>>,
    headers: HeaderMap,
    hedge: Hedge,
    /// Whether the server may know lists of ranges.
    lists: AtomicBool,
    timeout: Duration,
    /// `connect_timeout` and `timeout`: until the head of an answer is there.
    head_timeout: Duration,
}

/// The head of an answer, with the way that it came.
pub(crate) struct Answer {
    response: Response,
    route: Way,
    asked: Instant,
}

/// Before the origin, or the origin itself.
type Way = Option<Arc<Route>>;

impl Deref for Answer {
    type Target = Response;

    fn deref(&self) -> &Response {
        &self.response
    }
}

impl Transport {
    /// To the host of each URL, with signed requests, which no mirror can answer.
    pub(crate) fn new(clients: &Arc<Clients>, config: &HttpConfig) -> Result<Self, SourceError> {
        if let Some(mirror) = config.mirrors.first() {
            let reason = "signed requests can not go to a mirror";
            return Err(SourceError::new(SourceErrorKind::Config, &mirror.host, reason));
        }
        Self::to(clients, config, &Peer::Direct, "")
    }

    /// To `peer`; the mirrors of the configuration stand for the host `origin`.
    pub(crate) fn to(
        clients: &Arc<Clients>,
        config: &HttpConfig,
        peer: &Peer,
        origin: &str,
    ) -> Result<Self, SourceError> {
        let mirrors = config
            .mirrors
            .iter()
            .map(|mirror| Route::mirror(clients, config, origin, mirror));
        let proxy = config
            .proxy
            .as_ref()
            .map(|proxy| Route::proxy(clients, config, proxy));
        Ok(Self {
            client: clients.get(config, peer)?,
            mirrors: mirrors.collect::<Result<_, _>>()?,
            proxy: RwLock::new(proxy.transpose()?.flatten()),
            headers: secret_headers(&config.headers)?,
            hedge: Hedge::default(),
            lists: AtomicBool::new(true),
            timeout: config.timeout,
            head_timeout: config.connect_timeout.saturating_add(config.timeout),
            config: config.clone(),
            clients: Arc::clone(clients),
        })
    }

    /// Goes through the proxy at `url` from now on; without one if it is empty.
    pub(crate) fn replace_proxy(&self, url: Secret) -> Result<(), SourceError> {
        let proxy = ProxyConfig {
            url,
            ..self.config.proxy.clone().unwrap_or_default()
        };
        let route = Route::proxy(&self.clients, &self.config, &proxy)?;
        *self.proxy.write() = route;
        Ok(())
    }

    /// What came was damaged: leaves out mirrors and proxies for a while, as far as the configuration lets us.
    pub(crate) fn distrust(&self) {
        let proxy = self.proxy.read().clone();
        self.mirrors
            .iter()
            .chain(&proxy)
            .for_each(|route| route.distrust());
    }

    /// Whether a mirror or the proxy is left out at present, and not due for another try.
    pub(crate) fn is_detoured(&self) -> bool {
        let proxy = self.proxy.read().clone();
        self.mirrors.iter().chain(&proxy).any(|route| route.is_left_out())
    }

    /// How often errors that look permanent are given another chance.
    pub(crate) fn retry_limit(&self) -> u32 {
        self.config.retry_limit
    }

    /// The ways to try, in their order.
    fn ways(&self, url: &Url) -> Vec<Way> {
        let mirrors = self.mirrors.iter().filter(|mirror| mirror.serves(url));
        let mut ways: Vec<Way> = mirrors
            .filter(|mirror| mirror.usable())
            .map(|mirror| Some(Arc::clone(mirror)))
            .collect();
        let proxy = self.proxy.read().clone();
        let direct = proxy.as_ref().is_none_or(|proxy| proxy.fallback);
        ways.extend(proxy.filter(Route::usable).map(Some));
        if direct {
            ways.push(None);
        }
        ways
    }

    /// Sends a GET and waits for the head of the answer, whatever its status. Goes the first way that is healthy; if that fails, the next.
    /// If an answer takes longer than nearly all before, the next way is asked beside, or the last one again, and the first
    /// good answer counts.
    pub(crate) async fn get(&self, url: &Url, headers: HeaderMap) -> Result<Answer, SourceError> {
        let mut all = self.headers.clone();
        all.extend(headers);
        let mut ways = self.ways(url).into_iter();
        let mut running = FuturesUnordered::new();
        let mut last = ways.next().flatten();
        running.push(self.ask(last.clone(), url, &all));
        let delay = self.hedge.delay();
        let patience = sleep(delay.unwrap_or_default());
        tokio::pin!(patience);
        let mut patient = delay.is_none();
        loop {
            tokio::select! {
                Some((way, asked, outcome)) = running.next() => {
                    match judge(&way, &outcome) {
                        Ok(()) => {
                            self.hedge.answered(asked.elapsed());
                            return outcome.map(|response| Answer { response, route: way, asked });
                        }
                        Err(reason) => {
                            if let (Some(route), Some(reason)) = (&way, reason) {
                                route.failed(&reason);
                            }
                            if running.is_empty() {
                                let Some(way) = ways.next() else {
                                    return outcome.map(|response| Answer { response, route: way, asked });
                                };
                                last = way;
                                running.push(self.ask(last.clone(), url, &all));
                            }
                        }
                    }
                }
                () = &mut patience, if !patient => {
                    patient = true;
                    self.hedge.spend();
                    last = ways.next().unwrap_or(last);
                    running.push(self.ask(last.clone(), url, &all));
                }
            }
        }
    }

    async fn ask(
        &self,
        way: Way,
        url: &Url,
        headers: &HeaderMap,
    ) -> (Way, Instant, Result<Response, SourceError>) {
        let asked = Instant::now();
        let outcome = match &way {
            Some(route) => {
                let (target, headers) = route.request(url, headers);
                self.send(&route.client, &target, headers).await
            }
            None => self.send(&self.client, url, headers.clone()).await,
        };
        (way, asked, outcome)
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

    /// Reads the body of a checked answer: exactly the bytes of `ranges`.
    pub(crate) async fn body(
        &self,
        mut answer: Answer,
        ranges: &[Range<u64>],
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        let outcome = match ranges {
            [range] => self.pieces(&mut answer, range, sink).await,
            ranges => self.parts(&mut answer, ranges, sink).await,
        };
        if let Some(route) = &answer.route {
            match &outcome {
                Ok(()) => route.succeeded(answer.asked.into()),
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
        let mut pace = Pace::new(self.timeout);
        while let Some(mut piece) = self.piece(response, &host).await? {
            let excess = (piece.len() as u64).saturating_sub(left);
            piece.truncate(left.min(piece.len() as u64) as usize);
            left -= piece.len() as u64;
            let size = piece.len();
            if !piece.is_empty() {
                sink(piece);
            }
            if excess > 0 {
                return Err(protocol(&host, "the body goes on after the range".to_owned()));
            }
            if left > 0 {
                pace.check(size, &host)?;
            }
        }
        if left > 0 {
            return Err(protocol(&host, format!("the body ends {left} bytes early")));
        }
        Ok(())
    }

    async fn parts(
        &self,
        response: &mut Answer,
        ranges: &[Range<u64>],
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        let host = host_of(response.url());
        let boundary = boundary_of(response).unwrap_or_default();
        let mut parts = Parts::new(&boundary, ranges);
        let mut pace = Pace::new(self.timeout);
        while let Some(piece) = self.piece(response, &host).await? {
            if parts.complete() {
                // The end of the last line, without which the connection is of no further use.
                continue;
            }
            let size = piece.len();
            parts
                .push(piece, sink)
                .map_err(|reason| self.no_lists(&host, &reason))?;
            pace.check(size, &host)?;
        }
        if parts.complete() {
            Ok(())
        } else {
            Err(protocol(&host, "the body ends early".to_owned()))
        }
    }

    /// Most ranges that a request can name.
    pub(crate) fn ranges_per_request(&self) -> usize {
        if self.lists.load(Ordering::Relaxed) {
            MAX_RANGES
        } else {
            1
        }
    }

    /// The server does not know lists of ranges: it is asked for single ones from now on.
    fn no_lists(&self, host: &str, reason: &str) -> SourceError {
        self.lists.store(false, Ordering::Relaxed);
        protocol(host, format!("no answer to a list of ranges: {reason}"))
    }

    /// Checks that the head of an answer promises `ranges` and nothing else; an error by its status otherwise.
    pub(crate) fn check(&self, answer: &Answer, ranges: &[Range<u64>]) -> Result<(), SourceError> {
        let checked = match ranges {
            [range] => check_head(answer, range),
            _ if answer.status() == StatusCode::PARTIAL_CONTENT && boundary_of(answer).is_some() => Ok(()),
            _ if answer.status().is_success() => {
                return Err(self.no_lists(&host_of(answer.url()), &format!("status {}", answer.status())));
            }
            _ => Err(status_error(answer)),
        };
        if let (Some(route), Err(error)) = (&answer.route, &checked)
            && error.kind == SourceErrorKind::Protocol
        {
            route.failed(error);
        }
        checked
    }

    async fn piece(&self, answer: &mut Answer, host: &str) -> Result<Option<Bytes>, SourceError> {
        match timeout(self.timeout, answer.response.chunk()).await {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => Err(SourceError::new(kind_of(&error), host, describe(&error))),
            Err(_) => Err(stalled(host, self.timeout, "the body goes silent")),
        }
    }
}

/// Whether an answer counts. Otherwise, what speaks against the way that it came, if anything does.
fn judge(way: &Way, outcome: &Result<Response, SourceError>) -> Result<(), Option<String>> {
    match (way, outcome) {
        (None, Ok(_)) => Ok(()),
        (Some(route), Ok(response)) if route.is_final(response.status()) => Ok(()),
        (Some(route), Ok(response)) => Err(route
            .is_failure(response.status())
            .then(|| format!("status {}", response.status()))),
        (_, Err(error)) => Err(Some(error.to_string())),
    }
}

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
fn check_head(response: &Response, range: &Range<u64>) -> Result<(), SourceError> {
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

fn boundary_of(answer: &Answer) -> Option<String> {
    let kind = answer.headers().get(CONTENT_TYPE)?.to_str().ok()?;
    boundary(kind).map(str::to_owned)
}

/// Watches that a body does not trickle.
struct Pace {
    patience: Duration,
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn new(patience: Duration) -> Self {
        Self {
            patience,
            since: Instant::now(),
            bytes: 0,
        }
    }

    fn check(&mut self, size: usize, host: &str) -> Result<(), SourceError> {
        self.bytes += size as u64;
        let spent = self.since.elapsed();
        if spent <= self.patience {
            return Ok(());
        }
        if self.bytes < SLOWEST * self.patience.as_secs().max(1) {
            let detail = format!("{} bytes in {:.1} s", self.bytes, spent.as_secs_f64());
            return Err(SourceError::new(SourceErrorKind::Stalled, host, detail));
        }
        *self = Self::new(self.patience);
        Ok(())
    }
}

/// A protocol error.
pub(crate) fn protocol(host: &str, detail: String) -> SourceError {
    SourceError::new(SourceErrorKind::Protocol, host, detail)
}

pub(super) fn stalled(host: &str, patience: Duration, what: &str) -> SourceError {
    SourceError::new(
        SourceErrorKind::Stalled,
        host,
        format!("{what} for {:.1} s", patience.as_secs_f64()),
    )
}

pub(super) fn kind_of(error: &reqwest::Error) -> SourceErrorKind {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(rustls::Error::InvalidCertificate(_)) = tls_error(inner) {
            return SourceErrorKind::Untrusted;
        }
        cause = inner.source();
    }
    if error.is_builder() {
        SourceErrorKind::Config
    } else if unresolved(error) {
        SourceErrorKind::Unresolved
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

/// Whether no address was found for the name. The connector has no type for it that we could see.
fn unresolved(error: &reqwest::Error) -> bool {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if inner.to_string() == "dns error" {
            return true;
        }
        cause = inner.source();
    }
    false
}

/// The innermost reasons of an error, without the URL, which may hold a signature.
pub(super) fn describe(error: &reqwest::Error) -> String {
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
