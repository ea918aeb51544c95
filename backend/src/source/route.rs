//! A way to the origin that is tried before the origin itself: a mirror, or a forward proxy such as Dragonfly's; and whether it is worth
//! trying.
//!
//! The circuit opens after a few failures in a row, when the health check fails, or when somebody finds that what comes this way is damaged. While it is open,
//! requests go the next way; once per check interval one of them tries this one again, or the health check does. Health is checked for
//! as long as there are requests, and a while longer; an idle source sends nothing.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::Mutex;
use reqwest::{Client, Proxy};
use tokio::time::{sleep, timeout};
use url::Url;

use super::clients::{Clients, Peer};
use super::http::host_of;
use crate::config::{HttpConfig, MirrorConfig, ProxyConfig, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// Failures in a row that open the circuit of a proxy.
const TOLERATED: u32 = 3;

/// See the module.
pub(super) struct Route {
    pub(super) client: Client,
    kind: Kind,
    /// Whether the next way may be tried when this one fails.
    pub(super) fallback: bool,
    tolerated: u32,
    health: Option<Health>,
    interval: Duration,
    state: Mutex<State>,
}

enum Kind {
    Proxy { use_http: bool },
    Mirror(Box<Mirror>),
}

struct Mirror {
    /// Requests to this host go to the mirror.
    origin: String,
    base: Url,
    headers: HeaderMap,
    auth_through: bool,
}

/// What to ask for health, and how: not through the proxy.
struct Health {
    url: Url,
    client: Client,
    /// Checks end when nobody has asked for so long.
    pause: Duration,
}

#[derive(Default)]
struct State {
    failures: u32,
    /// Closed if `None`.
    open: Option<Open>,
    last_use: Option<Instant>,
    checking: bool,
}

/// An open circuit.
#[derive(Clone, Copy)]
struct Open {
    retry_at: Instant,
    /// Only what was asked for since then can close it: other answers are older than the reason to open it.
    closed_by: Instant,
}

impl Route {
    /// The way through a proxy; `None` if none is configured.
    pub(super) fn proxy(
        clients: &Clients,
        http: &HttpConfig,
        config: &ProxyConfig,
    ) -> Result<Option<Arc<Self>>, SourceError> {
        if config.url.is_empty() {
            return Ok(None);
        }
        let refuse = |what: &str| SourceError::new(SourceErrorKind::Config, "proxy", what);
        // Its message could show the URL.
        Proxy::all(config.url.expose()).map_err(|_| refuse("its URL is none"))?;
        let client = clients.get(http, &Peer::Proxy(config.url.clone()))?;
        Ok(Some(Arc::new(Self {
            client,
            kind: Kind::Proxy {
                use_http: config.use_http,
            },
            fallback: config.fallback,
            tolerated: TOLERATED,
            health: Health::new(clients, http, &config.ping_url, config.check_pause_elapsed)?,
            interval: config.check_interval.max(Duration::from_millis(100)),
            state: Mutex::default(),
        })))
    }

    /// The way by a mirror of `origin` (`host[:port]`).
    pub(super) fn mirror(
        clients: &Clients,
        http: &HttpConfig,
        origin: &str,
        config: &MirrorConfig,
    ) -> Result<Arc<Self>, SourceError> {
        let refuse = |reason: String| SourceError::new(SourceErrorKind::Config, "mirror", reason);
        let base = Url::parse(&config.host).map_err(|error| refuse(format!("host: {error}")))?;
        if !matches!(base.scheme(), "http" | "https") || base.host().is_none() {
            return Err(refuse("host is no http or https URL".into()));
        }
        Ok(Arc::new(Self {
            client: clients.get(http, &Peer::Direct)?,
            kind: Kind::Mirror(Box::new(Mirror {
                origin: origin.to_owned(),
                base,
                headers: secret_headers(&config.headers)?,
                auth_through: config.auth_through,
            })),
            fallback: true,
            tolerated: config.failure_limit.max(1),
            health: Health::new(clients, http, &config.ping_url, config.check_pause_elapsed)?,
            interval: config.check_interval.max(Duration::from_millis(100)),
            state: Mutex::default(),
        }))
    }

    /// Whether requests for `url` can go this way at all.
    pub(super) fn serves(&self, url: &Url) -> bool {
        match &self.kind {
            Kind::Proxy { .. } => true,
            Kind::Mirror(mirror) => host_of(url) == mirror.origin,
        }
    }

    /// Whether an answer with `status` is the origin's, so that there is no point in asking further.
    pub(super) fn is_final(&self, status: http::StatusCode) -> bool {
        match self.kind {
            Kind::Proxy { .. } => {
                !status.is_server_error() && status != http::StatusCode::PROXY_AUTHENTICATION_REQUIRED
            }
            // A mirror may lack what the origin has, and know nobody's credentials.
            Kind::Mirror(_) => status.is_success() || status.is_redirection(),
        }
    }

    /// Whether an answer that is not final speaks against the route itself.
    pub(super) fn is_failure(&self, status: http::StatusCode) -> bool {
        match self.kind {
            Kind::Proxy { .. } => true,
            Kind::Mirror(_) => status.is_server_error() || status == http::StatusCode::TOO_MANY_REQUESTS,
        }
    }

    /// What to ask this way for.
    pub(super) fn request(&self, url: &Url, headers: &HeaderMap) -> (Url, HeaderMap) {
        let (mut target, mut headers) = (url.clone(), headers.clone());
        match &self.kind {
            Kind::Proxy { use_http } => {
                if *use_http && url.scheme() == "https" {
                    let port = url.port_or_known_default();
                    let _ = target.set_scheme("http");
                    let _ = target.set_port(port.filter(|port| *port != 443));
                }
            }
            Kind::Mirror(mirror) => {
                let _ = target.set_scheme(mirror.base.scheme());
                let _ = target.set_host(mirror.base.host_str());
                let _ = target.set_port(mirror.base.port());
                if !mirror.auth_through {
                    headers.remove(AUTHORIZATION);
                }
                headers.extend(mirror.headers.clone());
            }
        }
        (target, headers)
    }

    /// Whether the next request should go this way. Starts the health checks.
    pub(super) fn usable(self: &Arc<Self>) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.last_use = Some(now);
        if self.health.is_some() && !state.checking {
            state.checking = true;
            tokio::spawn(check(Arc::downgrade(self)));
        }
        match &mut state.open {
            None => true,
            // Without a fallback there is nothing better to do than to try.
            Some(_) if !self.fallback => true,
            // With health checks, those decide.
            Some(_) if self.health.is_some() => false,
            Some(open) if now < open.retry_at => false,
            Some(open) => {
                // This request is the probe; the others wait for its outcome.
                open.retry_at = now + self.interval;
                true
            }
        }
    }

    /// Whether requests go another way for now. Once that this one is due for a try, the answer is no, even if it waits for the
    /// health check.
    pub(super) fn is_left_out(&self) -> bool {
        self.state
            .lock()
            .open
            .is_some_and(|open| Instant::now() < open.retry_at)
    }

    /// What was asked for at `asked` went well.
    pub(super) fn succeeded(&self, asked: Instant) {
        let mut state = self.state.lock();
        if state.open.is_some_and(|open| asked < open.closed_by) {
            return;
        }
        state.failures = 0;
        if state.open.take().is_some() {
            tracing::info!(route = self.name(), "is back");
        }
    }

    /// A request failed by the doing of this way.
    pub(super) fn failed(&self, reason: &dyn std::fmt::Display) {
        let mut state = self.state.lock();
        state.failures += 1;
        if state.failures >= self.tolerated {
            self.open(&mut state, reason, Duration::ZERO);
        }
    }

    /// What came this way was perhaps damaged, which neither the end of that very answer nor a health check disproves: it is left out for
    /// a whole interval.
    pub(super) fn distrust(&self) {
        if self.fallback {
            self.open(&mut self.state.lock(), &"data were damaged", self.interval);
        }
    }

    /// Opens the circuit, for `least` at least.
    fn open(&self, state: &mut State, reason: &dyn std::fmt::Display, least: Duration) {
        if state.open.is_none() {
            tracing::warn!(route = self.name(), %reason, fallback = self.fallback, "is not used for now");
        }
        let now = Instant::now();
        let before = state.open.map_or(now, |open| open.closed_by);
        state.open = Some(Open {
            retry_at: now + self.interval,
            closed_by: before.max(now + least),
        });
    }

    fn name(&self) -> String {
        match &self.kind {
            Kind::Proxy { .. } => "proxy".to_owned(),
            Kind::Mirror(mirror) => format!("mirror {}", host_of(&mirror.base)),
        }
    }
}

impl Health {
    fn new(
        clients: &Clients,
        http: &HttpConfig,
        url: &str,
        pause: Duration,
    ) -> Result<Option<Self>, SourceError> {
        if url.is_empty() {
            return Ok(None);
        }
        let url = Url::parse(url).map_err(|_| {
            SourceError::new(SourceErrorKind::Config, "proxy or mirror", "ping_url is no URL")
        })?;
        let client = clients.get(http, &Peer::Direct)?;
        Ok(Some(Self { url, client, pause }))
    }

    async fn ask(&self, patience: Duration) -> Result<(), String> {
        let host = host_of(&self.url);
        match timeout(patience, self.client.get(self.url.clone()).send()).await {
            Ok(Ok(response)) if response.status().is_success() => Ok(()),
            Ok(Ok(response)) => Err(format!("{host} answers {}", response.status())),
            Ok(Err(_)) => Err(format!("{host} can not be asked")),
            Err(_) => Err(format!("{host} does not answer")),
        }
    }
}

/// Checks the health of a route once per interval, until it is gone or idle.
async fn check(route: Weak<Route>) {
    while let Some(route) = route.upgrade() {
        let Some(health) = &route.health else { return };
        let asked = Instant::now();
        match health.ask(route.interval).await {
            Ok(()) => route.succeeded(asked),
            Err(reason) => route.open(&mut route.state.lock(), &reason, Duration::ZERO),
        }
        {
            let mut state = route.state.lock();
            if state.last_use.is_none_or(|last| last.elapsed() > health.pause) {
                state.checking = false;
                return;
            }
        }
        let interval = route.interval;
        drop(route);
        sleep(interval).await;
    }
}

/// Headers that are not shown.
pub(super) fn secret_headers(headers: &[(String, Secret)]) -> Result<HeaderMap, SourceError> {
    let refuse =
        |reason: &dyn std::fmt::Display| SourceError::new(SourceErrorKind::Config, "HTTP header", reason);
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let name = HeaderName::try_from(name).map_err(|error| refuse(&error))?;
        let mut value = HeaderValue::try_from(value.expose()).map_err(|error| refuse(&error))?;
        value.set_sensitive(true);
        map.insert(name, value);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror() -> Arc<Route> {
        let config = MirrorConfig {
            host: "http://mirror.example".into(),
            check_interval: Duration::from_secs(60),
            failure_limit: 2,
            ..MirrorConfig::default()
        };
        Route::mirror(
            &Clients::default(),
            &HttpConfig::default(),
            "origin.example",
            &config,
        )
        .unwrap()
    }

    #[test]
    fn the_end_of_a_damaged_answer_does_not_bring_its_way_back() {
        let route = mirror();
        let asked = Instant::now();
        route.distrust();
        route.succeeded(asked);
        route.succeeded(Instant::now());
        assert!(!route.usable() && route.is_left_out());
        // An interval later:
        let now = Instant::now();
        route.state.lock().open = Some(Open {
            retry_at: now,
            closed_by: now,
        });
        assert!(route.usable(), "one of the requests tries it again");
        assert!(!route.usable(), "the others wait for what it finds");
        route.succeeded(Instant::now());
        assert!(route.usable() && !route.is_left_out());
    }

    #[test]
    fn an_answer_that_was_on_its_way_before_the_failures_does_not_bring_it_back() {
        let route = mirror();
        let asked = Instant::now();
        route.failed(&"refused");
        assert!(route.usable());
        route.failed(&"refused");
        route.succeeded(asked);
        assert!(!route.usable());
        route.succeeded(Instant::now());
        assert!(route.usable());
    }
}
