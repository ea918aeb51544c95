//! A forward proxy before the origin, such as Dragonfly's, and whether it is worth asking.
//!
//! The circuit opens after a few failures in a row, or when the health check fails. While it is open, requests go to the origin, if
//! the configuration lets them; once per check interval one of them tries the proxy again, or the health check does. Checks are made beside
//! requests, never without: an idle source sends nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reqwest::{Client, Proxy};
use tokio::time::timeout;
use url::Url;

use super::http::{builder, host_of};
use crate::config::{HttpConfig, ProxyConfig};
use crate::error::{SourceError, SourceErrorKind};

/// Failures in a row that open the circuit.
const TOLERATED: u32 = 3;

/// The way through a proxy.
pub(super) struct Route {
    pub(super) client: Client,
    pub(super) fallback: bool,
    use_http: bool,
    interval: Duration,
    /// What to ask for the proxy's health, and how: not through the proxy.
    ping: Option<(Url, Client)>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    failures: u32,
    /// Closed if `None`; otherwise when to try again.
    retry_at: Option<Instant>,
    last_ping: Option<Instant>,
    pinging: bool,
}

impl Route {
    /// `None` if no proxy is configured.
    pub(super) fn new(http: &HttpConfig, config: &ProxyConfig) -> Result<Option<Arc<Self>>, SourceError> {
        if config.url.is_empty() {
            return Ok(None);
        }
        let refuse = |what: &str| SourceError::new(SourceErrorKind::Config, "proxy", what);
        let proxy = Proxy::all(config.url.expose()).map_err(|_| refuse("its URL is none"))?;
        let client = builder(http)?
            .proxy(proxy)
            .build()
            .map_err(|_| refuse("no client can use it"))?;
        let ping = if config.ping_url.is_empty() {
            None
        } else {
            let url = Url::parse(&config.ping_url).map_err(|_| refuse("its ping_url is no URL"))?;
            Some((
                url,
                builder(http)?
                    .build()
                    .map_err(|_| refuse("no client can ask for its health"))?,
            ))
        };
        Ok(Some(Arc::new(Self {
            client,
            fallback: config.fallback,
            use_http: config.use_http,
            interval: config.check_interval.max(Duration::from_millis(100)),
            ping,
            state: Mutex::default(),
        })))
    }

    /// The URL to ask the proxy for.
    pub(super) fn target(&self, url: &Url) -> Url {
        let mut target = url.clone();
        if self.use_http && url.scheme() == "https" {
            let port = url.port_or_known_default();
            let _ = target.set_scheme("http");
            let _ = target.set_port(port.filter(|port| *port != 443));
        }
        target
    }

    /// Whether the next request should go through the proxy. Starts a health check when one is due.
    pub(super) fn usable(self: &Arc<Self>) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        if self.ping.is_some()
            && !state.pinging
            && state.last_ping.is_none_or(|last| now - last >= self.interval)
        {
            state.pinging = true;
            state.last_ping = Some(now);
            tokio::spawn(Arc::clone(self).check());
        }
        match state.retry_at {
            None => true,
            // Without a fallback there is nothing better to do than to try.
            Some(_) if !self.fallback => true,
            // With health checks, those decide.
            Some(_) if self.ping.is_some() => false,
            Some(at) if now < at => false,
            Some(_) => {
                // This request is the probe; the others wait for its outcome.
                state.retry_at = Some(now + self.interval);
                true
            }
        }
    }

    /// A request went well.
    pub(super) fn succeeded(&self) {
        let mut state = self.state.lock();
        state.failures = 0;
        if state.retry_at.take().is_some() {
            tracing::info!("proxy is back");
        }
    }

    /// A request failed by the proxy's doing.
    pub(super) fn failed(&self, reason: &dyn std::fmt::Display) {
        let mut state = self.state.lock();
        state.failures += 1;
        if state.failures >= TOLERATED {
            self.open(&mut state, reason);
        }
    }

    fn open(&self, state: &mut State, reason: &dyn std::fmt::Display) {
        if state.retry_at.is_none() {
            tracing::warn!(%reason, fallback = self.fallback, "proxy is not healthy");
        }
        state.retry_at = Some(Instant::now() + self.interval);
    }

    async fn check(self: Arc<Self>) {
        let Some((url, client)) = &self.ping else { return };
        let healthy = match timeout(self.interval, client.get(url.clone()).send()).await {
            Ok(Ok(response)) if response.status().is_success() => Ok(()),
            Ok(Ok(response)) => Err(format!("{} answers {}", host_of(url), response.status())),
            Ok(Err(_)) => Err(format!("{} can not be asked", host_of(url))),
            Err(_) => Err(format!("{} does not answer", host_of(url))),
        };
        match healthy {
            Ok(()) => self.succeeded(),
            Err(reason) => self.open(&mut self.state.lock(), &reason),
        }
        self.state.lock().pinging = false;
    }
}
