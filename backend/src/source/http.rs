//! What all sources over HTTP share: the ways to the origin (mirrors, a proxy, the origin itself), answers checked against the question, silence
//! ended by time-outs, errors with a kind.

mod body;
mod failure;
mod head;

use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::{HeaderMap, StatusCode};
use parking_lot::RwLock;
use reqwest::{Client, Response};
use tokio::time::{Instant, sleep, timeout};
use url::Url;

pub(super) use self::body::Pace;
pub(super) use self::failure::{describe, kind_of, stalled};
pub(crate) use self::failure::{host_of, protocol};
use self::head::{boundary_of, check_head};
pub(crate) use self::head::{range_header, status_error};
use super::clients::{Clients, Peer};
use super::hedge::Hedge;
use super::route::{Route, secret_headers};
use crate::config::{HttpConfig, ProxyConfig, Secret};
use crate::error::{SourceError, SourceErrorKind};

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
