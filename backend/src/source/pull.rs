//! Whole objects of a registry, for a server that keeps them: a GET of a path, redirects followed. Credentials are those in the URL, if
//! any; they stay with the registry's own host.

use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use http::header::ACCEPT;
use reqwest::{Client, Response, redirect};
use tokio::time::timeout;
use url::Url;

use super::http::{describe, host_of, kind_of, stalled, status_error};
use super::tls;
use crate::error::{SourceError, SourceErrorKind};

/// Redirects followed for one request.
const MAX_HOPS: usize = 5;
/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest silence, before an answer and within it.
const SILENCE: Duration = Duration::from_secs(30);

/// See the module.
pub struct Upstream {
    client: Client,
    base: Url,
    host: String,
}

impl Upstream {
    /// The registry at `url`: `http` or `https`, a host, and a port if need be. No connection is made yet.
    pub fn new(url: &str) -> Result<Self, SourceError> {
        let refuse = |host: &str, reason: &dyn std::fmt::Display| {
            SourceError::new(SourceErrorKind::Config, host, format!("no upstream: {reason}"))
        };
        let base = Url::parse(url).map_err(|error| refuse("URL", &error))?;
        let host = host_of(&base);
        if !matches!(base.scheme(), "http" | "https")
            || base.path() != "/"
            || base.query().is_some()
            || base.fragment().is_some()
        {
            return Err(refuse(&host, &"expected http[s]://HOST[:PORT]"));
        }
        let client = Client::builder()
            .tls_backend_preconfigured(tls::client(false, &[])?)
            .redirect(redirect::Policy::limited(MAX_HOPS))
            .connect_timeout(CONNECT)
            .no_proxy()
            .build()
            .map_err(|error| refuse(&host, &describe(&error)))?;
        Ok(Self { client, base, host })
    }

    /// Host and port, for messages.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Asks for `path`, which begins with a slash. Any status but 200 is an error.
    pub async fn get(&self, path: &str, accept: &'static str) -> Result<Object, SourceError> {
        let mut url = self.base.clone();
        url.set_path(path);
        let request = self
            .client
            .get(url)
            .header(ACCEPT, HeaderValue::from_static(accept));
        let response = match timeout(CONNECT + SILENCE, request.send()).await {
            Ok(answer) => answer.map_err(|error| self.broken(&error))?,
            Err(_) => return Err(stalled(&self.host, CONNECT + SILENCE, "no answer")),
        };
        if response.status() != http::StatusCode::OK {
            return Err(status_error(&response));
        }
        Ok(Object(response))
    }

    /// The next bytes of an object; `None` at its end.
    pub async fn piece(&self, object: &mut Object) -> Result<Option<Bytes>, SourceError> {
        match timeout(SILENCE, object.0.chunk()).await {
            Ok(piece) => piece.map_err(|error| self.broken(&error)),
            Err(_) => Err(stalled(&self.host, SILENCE, "the body goes silent")),
        }
    }

    fn broken(&self, error: &reqwest::Error) -> SourceError {
        SourceError::new(kind_of(error), &self.host, describe(error))
    }
}

/// An answer whose body is on its way.
pub struct Object(Response);
