//! Whole objects of a registry, for a server that keeps them: a GET of a path, redirects followed, challenges answered, an account of the
//! time that it takes. Credentials stay with the registry's own host and the token service that it names.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, LOCATION};
use http::{HeaderMap, HeaderValue, StatusCode};
use parking_lot::Mutex;
use url::Url;

use super::auth::Authorizer;
use super::clients::{Clients, Peer};
use super::http::{Answer, Pace, Transport, host_of, protocol, status_error};
use crate::config::{HttpConfig, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// Redirects followed for one request.
const MAX_HOPS: usize = 5;
/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest silence, before an answer and within it, unless the caller has less patience.
const SILENCE: Duration = Duration::from_secs(30);
/// Repositories whose tokens are kept.
const REPOSITORIES: usize = 256;

/// How an upstream is reached.
#[derive(Clone, Debug, Default)]
pub struct UpstreamOptions {
    /// `http[s]://[USER:PASSWORD@]HOST[:PORT]`.
    pub url: Secret,
    /// PEM files with authorities to trust, beside the host's.
    pub authorities: Vec<PathBuf>,
    /// Longest silence, before an answer and within it; also the time in which a body must bring 4 KiB for each of its seconds. 30 s if `None`.
    pub silence: Option<Duration>,
}

/// See the module.
pub struct Upstream {
    transport: Arc<Transport>,
    base: Url,
    host: String,
    basic: Option<Secret>,
    silence: Duration,
    authorizers: Mutex<HashMap<String, Arc<Authorizer>>>,
}

impl Upstream {
    /// The registry at the URL of `options`. No connection is made yet.
    pub fn new(options: &UpstreamOptions) -> Result<Self, SourceError> {
        let refuse = |host: &str, reason: &dyn std::fmt::Display| {
            SourceError::new(SourceErrorKind::Config, host, format!("no upstream: {reason}"))
        };
        let mut base = Url::parse(options.url.expose()).map_err(|error| refuse("URL", &error))?;
        let host = host_of(&base);
        if !matches!(base.scheme(), "http" | "https")
            || base.path() != "/"
            || base.query().is_some()
            || base.fragment().is_some()
        {
            return Err(refuse(&host, &"expected http[s]://HOST[:PORT]"));
        }
        let basic = credentials(&base).map_err(|reason| refuse(&host, &reason))?;
        let bare = base.set_username("").and_then(|()| base.set_password(None));
        bare.map_err(|()| refuse(&host, &"no host"))?;
        let silence = options.silence.unwrap_or(SILENCE);
        let config = HttpConfig {
            connect_timeout: CONNECT,
            timeout: silence,
            ca_cert_files: options.authorities.clone(),
            ..HttpConfig::default()
        };
        let transport = Transport::to(&Arc::new(Clients::default()), &config, &Peer::Direct, &host)?;
        Ok(Self {
            transport: Arc::new(transport),
            base,
            host,
            basic,
            silence,
            authorizers: Mutex::default(),
        })
    }

    /// Host and port, for messages.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Asks for `path`, which begins with a slash and is of `repository`. Any status but 200 is an error.
    pub async fn get(
        &self,
        repository: &str,
        path: &str,
        accept: &'static str,
    ) -> Result<Object, SourceError> {
        let authorizer = self.authorizer(repository)?;
        let mut url = self.base.clone();
        url.set_path(path);
        let mut again = false;
        let answer = loop {
            let (header, generation) = authorizer.header().await?;
            let (answer, ours) = self.follow(url.clone(), header, accept).await?;
            if answer.status() != StatusCode::UNAUTHORIZED || !ours || again {
                break answer;
            }
            authorizer.refused(&url, answer.headers(), generation).await?;
            again = true;
        };
        if answer.status() != StatusCode::OK {
            return Err(status_error(&answer));
        }
        Ok(Object {
            answer,
            pace: Pace::new(self.silence),
        })
    }

    /// Sends the request, and again to where it is redirected; tells whether the answer is the registry's own.
    async fn follow(
        &self,
        mut url: Url,
        authorization: Option<HeaderValue>,
        accept: &'static str,
    ) -> Result<(Answer, bool), SourceError> {
        for _ in 0..=MAX_HOPS {
            let ours = url.origin() == self.base.origin();
            let mut headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]);
            if let Some(header) = authorization.as_ref().filter(|_| ours) {
                headers.insert(AUTHORIZATION, header.clone());
            }
            let answer = self.transport.get(&url, headers).await?;
            if !answer.status().is_redirection() || answer.status() == StatusCode::NOT_MODIFIED {
                return Ok((answer, ours));
            }
            let location = answer
                .headers()
                .get(LOCATION)
                .and_then(|target| target.to_str().ok());
            url = location
                .and_then(|location| url.join(location).ok())
                .filter(|target| matches!(target.scheme(), "http" | "https"))
                .ok_or_else(|| protocol(&host_of(&url), "a redirect to nowhere".to_owned()))?;
        }
        Err(protocol(&self.host, format!("more than {MAX_HOPS} redirects")))
    }

    /// Tokens are for one repository each.
    fn authorizer(&self, repository: &str) -> Result<Arc<Authorizer>, SourceError> {
        let mut all = self.authorizers.lock();
        if let Some(authorizer) = all.get(repository) {
            return Ok(Arc::clone(authorizer));
        }
        if all.len() >= REPOSITORIES {
            all.clear();
        }
        let transport = Arc::clone(&self.transport);
        let authorizer = Authorizer::new(transport, &self.host, repository, self.basic.clone(), None)?;
        let authorizer = Arc::new(authorizer);
        all.insert(repository.to_owned(), Arc::clone(&authorizer));
        Ok(authorizer)
    }

    /// The next bytes of an object; `None` at its end. An object that trickles is an error, as one that goes silent.
    pub async fn piece(&self, object: &mut Object) -> Result<Option<Bytes>, SourceError> {
        let piece = self.transport.piece(&mut object.answer, &self.host).await?;
        if let Some(piece) = &piece {
            object.pace.check(piece.len(), &self.host)?;
        }
        Ok(piece)
    }
}

/// User and password of a URL, as a registry wants to see them.
fn credentials(url: &Url) -> Result<Option<Secret>, String> {
    let plain = |text: &str| {
        let bytes = percent_encoding::percent_decode_str(text).decode_utf8();
        bytes
            .map(String::from)
            .map_err(|_| "credentials that are no UTF-8".to_owned())
    };
    let (user, password) = (plain(url.username())?, plain(url.password().unwrap_or_default())?);
    Ok((!user.is_empty() || !password.is_empty())
        .then(|| Secret::new(STANDARD.encode(format!("{user}:{password}")))))
}

/// An answer whose body is on its way.
pub struct Object {
    answer: Answer,
    pace: Pace,
}
