//! Credentials of one (registry, repository): answers challenges, keeps the token, renews it before it ends.
//!
//! One renewal runs at a time however many requests were refused, and none starts within [`PAUSE`] of the one before, so that a
//! registry that refuses everything sees few token requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderValue};
use parking_lot::Mutex;
use serde::Deserialize;
use url::Url;

use super::http::{Transport, host_of, protocol, status_error};
use crate::config::Secret;
use crate::error::{SourceError, SourceErrorKind};

/// Least time between two renewals.
const PAUSE: Duration = Duration::from_secs(1);
/// Life of a token whose service does not say (distribution token specification).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// Longest answer of a token service.
const MAX_ANSWER: usize = 1 << 20;

/// See the module.
pub(crate) struct Authorizer {
    transport: Arc<Transport>,
    repo: String,
    state: Mutex<State>,
    renewal: tokio::sync::Mutex<Option<Instant>>,
    asked: AtomicU64,
}

struct State {
    /// `user:password` in Base64.
    basic: Option<Secret>,
    grant: Grant,
    /// Changes with the grant, so that a refused request knows whether somebody has renewed it meanwhile.
    generation: u64,
}

/// What requests are sent with.
enum Grant {
    /// Nothing, until the registry asks.
    None,
    /// The same for ever.
    Fixed(HeaderValue),
    /// A token.
    Token {
        header: HeaderValue,
        renew_at: Instant,
        ends_at: Instant,
        realm: Realm,
    },
}

/// Where a token came from.
#[derive(Clone, Debug, PartialEq)]
struct Realm {
    url: Url,
    service: Option<String>,
    scope: Option<String>,
}

/// What the registry wants to see.
#[derive(Debug, PartialEq)]
enum Challenge {
    Basic,
    Bearer(Realm),
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Authorizer {
    /// With `user:password` in Base64, or a token, or neither.
    pub(crate) fn new(
        transport: Arc<Transport>,
        host: &str,
        repo: &str,
        basic: Option<Secret>,
        token: Option<&Secret>,
    ) -> Result<Self, SourceError> {
        let grant = match token.filter(|token| !token.is_empty()) {
            Some(token) => Grant::Fixed(sensitive(host, "Bearer", token.expose())?),
            None => Grant::None,
        };
        let basic = basic.filter(|auth| !auth.is_empty());
        if let Some(auth) = &basic {
            check_basic(host, auth)?;
        }
        let state = State {
            basic,
            grant,
            generation: 0,
        };
        Ok(Self {
            transport,
            repo: repo.to_owned(),
            state: Mutex::new(state),
            renewal: tokio::sync::Mutex::new(None),
            asked: AtomicU64::new(0),
        })
    }

    /// Tokens asked for so far.
    pub(crate) fn token_requests(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Uses other credentials from now on.
    pub(crate) fn replace(&self, host: &str, basic: Secret) -> Result<(), SourceError> {
        check_basic(host, &basic)?;
        let mut state = self.state.lock();
        state.basic = Some(basic);
        state.grant = Grant::None;
        state.generation += 1;
        Ok(())
    }

    /// The header to send, if any, and its generation. Renews a token that has ended, and in the background one that will soon.
    pub(crate) async fn header(self: &Arc<Self>) -> Result<(Option<HeaderValue>, u64), SourceError> {
        let generation = {
            let state = self.state.lock();
            match &state.grant {
                Grant::None => return Ok((None, state.generation)),
                Grant::Fixed(header) => return Ok((Some(header.clone()), state.generation)),
                Grant::Token {
                    header,
                    renew_at,
                    ends_at,
                    realm,
                } => {
                    let now = Instant::now();
                    if now < *ends_at {
                        if now >= *renew_at && self.renewal.try_lock().is_ok() {
                            let (this, realm, generation) =
                                (Arc::clone(self), realm.clone(), state.generation);
                            tokio::spawn(async move {
                                // A failure is found again, and told, when the token has ended.
                                let _ = this.renew(Challenge::Bearer(realm), generation).await;
                            });
                        }
                        return Ok((Some(header.clone()), state.generation));
                    }
                    (state.generation, realm.clone())
                }
            }
        };
        let (generation, realm) = generation;
        self.renew(Challenge::Bearer(realm), generation).await?;
        let state = self.state.lock();
        let header = match &state.grant {
            Grant::None => None,
            Grant::Fixed(header) | Grant::Token { header, .. } => Some(header.clone()),
        };
        Ok((header, state.generation))
    }

    /// A request with the header of `generation` was answered by 401 and these challenges. After `Ok` it is worth sending again.
    pub(crate) async fn refused(
        &self,
        from: &Url,
        headers: &HeaderMap,
        generation: u64,
    ) -> Result<(), SourceError> {
        let host = host_of(from);
        let denied = |detail: &str| SourceError::new(SourceErrorKind::Denied, &host, detail);
        {
            let state = self.state.lock();
            if state.generation != generation {
                return Ok(());
            }
            if matches!(state.grant, Grant::Fixed(_)) {
                return Err(denied("refuses the credentials"));
            }
        }
        let values = headers.get_all(http::header::WWW_AUTHENTICATE);
        let challenges: Vec<Challenge> = values
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(parse_challenges)
            .collect();
        let mut bearer = None;
        let mut basic = false;
        for challenge in challenges {
            match challenge {
                Challenge::Bearer(realm) => bearer = bearer.or(Some(realm)),
                Challenge::Basic => basic = true,
            }
        }
        match (bearer, basic) {
            (Some(realm), _) if from.scheme() == "https" && realm.url.scheme() != "https" => Err(denied(
                &format!("names a token service without TLS: {}", host_of(&realm.url)),
            )),
            (Some(realm), _) => self.renew(Challenge::Bearer(realm), generation).await,
            (None, true) => self.renew(Challenge::Basic, generation).await,
            (None, false) => Err(denied("wants credentials of a kind that is not supported")),
        }
    }

    /// Replaces the grant of `generation`, unless somebody else has.
    async fn renew(&self, challenge: Challenge, generation: u64) -> Result<(), SourceError> {
        let mut last = self.renewal.lock().await;
        let basic = {
            let state = self.state.lock();
            if state.generation != generation {
                return Ok(());
            }
            state.basic.clone()
        };
        let grant = match challenge {
            Challenge::Basic => {
                let Some(basic) = basic else {
                    return Err(SourceError::new(
                        SourceErrorKind::Denied,
                        &self.repo,
                        "wants credentials, none given",
                    ));
                };
                Grant::Fixed(sensitive(&self.repo, "Basic", basic.expose())?)
            }
            Challenge::Bearer(realm) => {
                if let Some(wait) = last.and_then(|last| PAUSE.checked_sub(last.elapsed())) {
                    let mut error = SourceError::new(
                        SourceErrorKind::Denied,
                        host_of(&realm.url),
                        "refuses a fresh token",
                    );
                    error.retry_after = Some(wait);
                    return Err(error);
                }
                *last = Some(Instant::now());
                self.ask(realm, basic).await?
            }
        };
        let mut state = self.state.lock();
        if state.generation == generation {
            state.grant = grant;
            state.generation += 1;
        }
        Ok(())
    }

    async fn ask(&self, realm: Realm, basic: Option<Secret>) -> Result<Grant, SourceError> {
        let mut url = realm.url.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &realm.service {
                query.append_pair("service", service);
            }
            let scope = realm
                .scope
                .clone()
                .unwrap_or_else(|| format!("repository:{}:pull", self.repo));
            query.append_pair("scope", &scope);
        }
        let host = host_of(&url);
        let mut headers = HeaderMap::new();
        if let Some(basic) = basic {
            headers.insert(AUTHORIZATION, sensitive(&host, "Basic", basic.expose())?);
        }
        let asked = Instant::now();
        self.asked.fetch_add(1, Ordering::Relaxed);
        let response = self.transport.get(&url, headers).await?;
        if !response.status().is_success() {
            let mut error = status_error(&response);
            error.detail = format!("token service: {}", error.detail);
            return Err(error);
        }
        let body = self.transport.text(response, MAX_ANSWER).await?;
        let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|error| {
            protocol(
                &host,
                format!(
                    "token service: not the JSON expected, at column {}",
                    error.column()
                ),
            )
        })?;
        let token = answer
            .token
            .or(answer.access_token)
            .filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| protocol(&host, "token service: no token".to_owned()))?;
        let life = answer
            .expires_in
            .map_or(DEFAULT_LIFE, Duration::from_secs)
            .clamp(PAUSE, Duration::from_secs(86_400));
        let header = sensitive(&host, "Bearer", &token)?;
        tracing::debug!(service = %host, repo = %self.repo, life_s = life.as_secs(), "token");
        Ok(Grant::Token {
            header,
            renew_at: asked + life.mul_f64(0.7),
            ends_at: asked + life.mul_f64(0.95),
            realm,
        })
    }
}

fn sensitive(host: &str, scheme: &str, text: &str) -> Result<HeaderValue, SourceError> {
    let mut header = HeaderValue::try_from(format!("{scheme} {text}")).map_err(|_| {
        SourceError::new(
            SourceErrorKind::Config,
            host,
            "credentials that no header can carry",
        )
    })?;
    header.set_sensitive(true);
    Ok(header)
}

fn check_basic(host: &str, auth: &Secret) -> Result<(), SourceError> {
    let valid = STANDARD
        .decode(auth.expose())
        .is_ok_and(|text| text.contains(&b':'));
    if valid {
        return Ok(());
    }
    Err(SourceError::new(
        SourceErrorKind::Config,
        host,
        "auth is not user:password in Base64",
    ))
}

/// Challenges of one `WWW-Authenticate` value (RFC 9110, section 11.6.1), as far as we know how to answer them.
fn parse_challenges(value: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut rest = value.trim();
    while !rest.is_empty() {
        let (scheme, after) = rest.split_once(' ').unwrap_or((rest, ""));
        let (parameters, next) = parse_parameters(after);
        let get = |name: &str| {
            parameters
                .iter()
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.clone())
        };
        if scheme.eq_ignore_ascii_case("basic") {
            challenges.push(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer")
            && let Some(url) = get("realm").and_then(|realm| Url::parse(&realm).ok())
            && matches!(url.scheme(), "http" | "https")
        {
            challenges.push(Challenge::Bearer(Realm {
                url,
                service: get("service"),
                scope: get("scope"),
            }));
        }
        rest = next;
    }
    challenges
}

/// `key=value` or `key="value"` pairs up to the next challenge, and what follows.
fn parse_parameters(text: &str) -> (Vec<(String, String)>, &str) {
    let mut parameters = Vec::new();
    let mut rest = text.trim_start_matches([' ', ',']);
    loop {
        let Some((key, after)) = rest.split_once('=') else {
            return (parameters, "");
        };
        if key.contains([' ', ',']) {
            // The next scheme: "Basic realm=...".
            return (parameters, rest);
        }
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let end = after.find([',', ' ']).unwrap_or(after.len());
                let (value, after) = after.split_at(end);
                (value.to_owned(), after)
            }
        };
        parameters.push((key.to_owned(), value));
        rest = after.trim_start_matches([' ', ',']);
        if rest.is_empty() {
            return (parameters, rest);
        }
    }
}

/// The rest of a quoted string, and what follows it.
fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, text.get(at + 1..).unwrap_or_default()),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn realm(url: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer(Realm {
            url: Url::parse(url).unwrap(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        })
    }

    #[test]
    fn challenges_as_registries_write_them() {
        let docker = r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull""#;
        assert_eq!(
            parse_challenges(docker),
            [realm(
                "https://auth.example/token",
                Some("registry.example"),
                Some("repository:a/b:pull")
            )]
        );
        assert_eq!(
            parse_challenges(r#"Basic realm="Registry Realm""#),
            [Challenge::Basic]
        );
        assert_eq!(parse_challenges("Basic"), [Challenge::Basic]);
        assert_eq!(
            parse_challenges(r#"bearer realm=https://a.example/t, service="a \"b\" c", Basic realm="x""#),
            [
                realm("https://a.example/t", Some(r#"a "b" c"#), None),
                Challenge::Basic
            ]
        );
        assert_eq!(
            parse_challenges(r#"Negotiate, Basic realm="x""#),
            [Challenge::Basic]
        );
        assert_eq!(parse_challenges(r#"Bearer realm="file:///etc/passwd""#), []);
    }

    proptest::proptest! {
        #[test]
        fn no_challenge_hangs_or_panics(value in "[ -~]{0,80}") {
            parse_challenges(&value);
        }
    }
}
