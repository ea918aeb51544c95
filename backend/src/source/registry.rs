//! An OCI registry: `GET /v2/<repository>/blobs/sha256:<id>` with `Range`.
//!
//! Redirects are followed here, not by the client: their target is kept for the blob until it no longer works, and the registry's
//! credentials are never sent to another origin.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderValue, LOCATION};
use parking_lot::Mutex;
use reqwest::StatusCode;
use url::Url;

use super::auth::Authorizer;
use super::http::{Answer, Transport, host_of, protocol, range_header};
use super::remote::Protocol;
use crate::config::{RegistryConfig, Scheme, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// Redirects followed for one request.
const MAX_HOPS: usize = 5;
/// A redirect is not used for longer, even if it still works.
const REDIRECT_LIFE: Duration = Duration::from_secs(600);

/// See the module.
pub(crate) struct Registry {
    config: RegistryConfig,
    transport: Arc<Transport>,
    authorizer: Arc<Authorizer>,
    /// The scheme that worked, as [`Scheme`] in a number.
    scheme: AtomicU8,
    redirects: Mutex<HashMap<String, Redirect>>,
}

/// Where the registry sent us for a blob.
struct Redirect {
    target: Url,
    since: Instant,
}

impl Registry {
    /// A source over `transport`. No connection is made yet.
    pub(crate) fn new(config: RegistryConfig, transport: Arc<Transport>) -> Result<Self, SourceError> {
        let authorizer = Authorizer::new(
            Arc::clone(&transport),
            &config.host,
            &config.repo,
            config.auth.clone(),
            config.token.as_ref(),
        )?;
        let scheme = AtomicU8::new(config.scheme as u8);
        let registry = Self {
            config,
            transport,
            authorizer: Arc::new(authorizer),
            scheme,
            redirects: Mutex::default(),
        };
        registry.url("https", "00")?;
        Ok(registry)
    }

    fn url(&self, scheme: &str, blob_id: &str) -> Result<Url, SourceError> {
        let refuse = |reason: &dyn std::fmt::Display| {
            SourceError::new(
                SourceErrorKind::Config,
                &self.config.host,
                format!("no URL: {reason}"),
            )
        };
        let base = format!("{scheme}://{}/", self.config.host);
        let mut url = Url::parse(&base).map_err(|error| refuse(&error))?;
        if !url.username().is_empty()
            || url.path() != "/"
            || url.query().is_some()
            || self.config.repo.is_empty()
        {
            return Err(refuse(&"host must be a host and a port, and repo a repository"));
        }
        url.path_segments_mut()
            .map_err(|()| refuse(&"not a base"))?
            .pop_if_empty()
            .push("v2")
            .extend(self.config.repo.split('/'))
            .push("blobs")
            .push(&format!("sha256:{blob_id}"));
        Ok(url)
    }

    /// An answer that promises `ranges`, from wherever the blob is.
    async fn find(&self, blob_id: &str, ranges: &[Range<u64>]) -> Result<Answer, SourceError> {
        if let Some(target) = self.remembered(blob_id) {
            let answer = self.follow(target, None, ranges).await;
            match answer
                .and_then(|(response, url)| self.transport.check(&response, ranges).map(|()| (response, url)))
            {
                Ok((response, _)) => return Ok(response),
                Err(error) => {
                    // Most likely it has expired; whatever it is, the registry knows better.
                    tracing::debug!(%error, "redirect no longer works");
                    self.redirects.lock().remove(blob_id);
                }
            }
        }
        let (response, url) = self.ask(blob_id, ranges).await?;
        self.transport.check(&response, ranges)?;
        if url != self.url(url.scheme(), blob_id)? {
            let redirect = Redirect {
                target: url,
                since: Instant::now(),
            };
            self.redirects.lock().insert(blob_id.to_owned(), redirect);
        }
        Ok(response)
    }

    fn remembered(&self, blob_id: &str) -> Option<Url> {
        let redirects = self.redirects.lock();
        let redirect = redirects.get(blob_id)?;
        (redirect.since.elapsed() < REDIRECT_LIFE).then(|| redirect.target.clone())
    }

    /// Asks the registry itself, with one more try after a 401.
    async fn ask(&self, blob_id: &str, ranges: &[Range<u64>]) -> Result<(Answer, Url), SourceError> {
        let mut again = false;
        loop {
            let (header, generation) = self.authorizer.header().await?;
            let (response, url) = self.ask_by_scheme(blob_id, header, ranges).await?;
            let ours = url.origin() == self.url(url.scheme(), blob_id)?.origin();
            let refused = ours && response.status() == StatusCode::UNAUTHORIZED;
            if !refused || again {
                return Ok((response, url));
            }
            self.authorizer
                .refused(&url, response.headers(), generation)
                .await?;
            again = true;
        }
    }

    /// By the configured scheme, by the one that worked before, or by https and then http.
    async fn ask_by_scheme(
        &self,
        blob_id: &str,
        header: Option<HeaderValue>,
        ranges: &[Range<u64>],
    ) -> Result<(Answer, Url), SourceError> {
        let known = self.scheme.load(Ordering::Relaxed);
        if known == Scheme::Http as u8 {
            return self.follow(self.url("http", blob_id)?, header, ranges).await;
        }
        let secure = self
            .follow(self.url("https", blob_id)?, header.clone(), ranges)
            .await;
        if known == Scheme::Https as u8 {
            return secure;
        }
        match secure {
            Ok(answer) => {
                self.scheme.store(Scheme::Https as u8, Ordering::Relaxed);
                Ok(answer)
            }
            // Nobody speaks TLS there. A certificate that is not trusted is no reason to try without.
            Err(error) if error.kind == SourceErrorKind::Unreachable => {
                let plain = self
                    .follow(self.url("http", blob_id)?, header, ranges)
                    .await
                    .map_err(|_| error)?;
                self.scheme.store(Scheme::Http as u8, Ordering::Relaxed);
                Ok(plain)
            }
            Err(error) => Err(error),
        }
    }

    /// Sends the request, and again to where it is redirected.
    async fn follow(
        &self,
        first: Url,
        header: Option<HeaderValue>,
        ranges: &[Range<u64>],
    ) -> Result<(Answer, Url), SourceError> {
        let origin = first.origin();
        let mut url = first;
        for _ in 0..=MAX_HOPS {
            let mut headers = HeaderMap::from_iter([range_header(ranges)]);
            if let Some(header) = header.as_ref().filter(|_| url.origin() == origin) {
                headers.insert(AUTHORIZATION, header.clone());
            }
            let response = self.transport.get(&url, headers).await?;
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                return Ok((response, url));
            }
            let location = response
                .headers()
                .get(LOCATION)
                .and_then(|location| location.to_str().ok());
            let target = location.and_then(|location| url.join(location).ok());
            let Some(target) = target.filter(|target| matches!(target.scheme(), "http" | "https")) else {
                return Err(protocol(&host_of(&url), "a redirect to nowhere".to_owned()));
            };
            url = self.rewrite(target);
        }
        Err(protocol(
            &self.config.host,
            format!("more than {MAX_HOPS} redirects"),
        ))
    }

    /// Applies `blob_url_scheme` and `blob_redirected_host`.
    fn rewrite(&self, mut target: Url) -> Url {
        if let Some(scheme) = self
            .config
            .blob_url_scheme
            .as_deref()
            .filter(|scheme| !scheme.is_empty())
        {
            let _ = target.set_scheme(scheme);
        }
        if let Some(host) = self
            .config
            .blob_redirected_host
            .as_deref()
            .filter(|host| !host.is_empty())
        {
            let (name, port) = match host.rsplit_once(':') {
                Some((name, port)) if port.parse::<u16>().is_ok() => (name, port.parse().ok()),
                _ => (host, None),
            };
            let _ = target.set_host(Some(name));
            let _ = target.set_port(port);
        }
        target
    }
}

impl Protocol for Registry {
    fn host(&self) -> &str {
        &self.config.host
    }

    fn transport(&self) -> &Transport {
        &self.transport
    }

    async fn open(&self, blob_id: &str, ranges: &[Range<u64>]) -> Result<Answer, SourceError> {
        self.find(blob_id, ranges).await
    }

    fn replace_auth(&self, auth: Secret) -> Result<(), SourceError> {
        self.authorizer.replace(&self.config.host, auth)
    }

    fn token_requests(&self) -> u64 {
        self.authorizer.token_requests()
    }
}
