//! Who may ask: nobody in particular, a user with a password, or the bearer of a token.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;

/// Authentication that the registry asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// None.
    #[default]
    None,
    /// User and password with every request.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// A token that `/token` gives out, for one repository.
    Bearer {
        /// User and password that the token endpoint asks for, if any.
        credentials: Option<(String, String)>,
        /// How long a token is good for.
        ttl: Duration,
    },
}

/// `USER:PASSWORD`.
pub(super) fn parse_credentials(text: &str) -> Result<(String, String), String> {
    match text.split_once(':') {
        Some((user, password)) if !user.is_empty() => Ok((user.to_owned(), password.to_owned())),
        _ => Err("expected USER:PASSWORD".to_owned()),
    }
}

struct Issued {
    expires: Instant,
    repository: Option<String>,
}

/// Checks requests.
pub(super) struct Gate {
    auth: Auth,
    issued: Mutex<HashMap<String, Issued>>,
}

/// A token and the seconds it is good for.
pub(super) struct Token {
    pub(super) token: String,
    pub(super) expires_in: u64,
}

impl Gate {
    pub(super) fn new(auth: Auth) -> Self {
        Self {
            auth,
            issued: Mutex::default(),
        }
    }

    pub(super) fn revoke(&self) {
        self.issued.lock().clear();
    }

    /// Lets a request for `repository` pass, or gives the value of `WWW-Authenticate`. `origin` is where the
    /// client reaches this server.
    pub(super) fn check(
        &self,
        headers: &HeaderMap,
        repository: Option<&str>,
        origin: &str,
    ) -> Result<(), String> {
        match &self.auth {
            Auth::None => Ok(()),
            Auth::Basic { user, password } => {
                if basic(headers).is_some_and(|(u, p)| (u == *user) & (p == *password)) {
                    return Ok(());
                }
                Err("Basic realm=\"rafs\"".to_owned())
            }
            Auth::Bearer { .. } => {
                let token = authorization(headers, "bearer").unwrap_or_default();
                let issued = self.issued.lock();
                let good = issued.get(token).is_some_and(|issued| {
                    issued.expires > Instant::now()
                        && (repository.is_none() || issued.repository.as_deref() == repository)
                });
                if good {
                    return Ok(());
                }
                let scope = repository
                    .map(|r| format!(",scope=\"repository:{r}:pull\""))
                    .unwrap_or_default();
                let error = if token.is_empty() {
                    ""
                } else {
                    ",error=\"invalid_token\""
                };
                Err(format!(
                    "Bearer realm=\"{origin}/token\",service=\"rafs\"{scope}{error}"
                ))
            }
        }
    }

    /// Issues a token for a scope (`repository:<name>:pull`). `None`: there is no such endpoint here. An inner
    /// error is the value of `WWW-Authenticate`.
    pub(super) fn issue(&self, headers: &HeaderMap, scope: Option<&str>) -> Option<Result<Token, String>> {
        let Auth::Bearer { credentials, ttl } = &self.auth else {
            return None;
        };
        if let Some((user, password)) = credentials
            && !basic(headers).is_some_and(|(u, p)| (u == *user) & (p == *password))
        {
            return Some(Err("Basic realm=\"rafs token\"".to_owned()));
        }
        let repository = scope
            .and_then(|scope| scope.strip_prefix("repository:"))
            .and_then(|scope| scope.rsplit_once(':'))
            .map(|(repository, _)| repository.to_owned());
        let token = random_token();
        let now = Instant::now();
        let mut issued = self.issued.lock();
        issued.retain(|_, issued| issued.expires > now);
        issued.insert(
            token.clone(),
            Issued {
                expires: now + *ttl,
                repository,
            },
        );
        Some(Ok(Token {
            token,
            expires_in: ttl.as_secs(),
        }))
    }
}

/// 128 random bits.
fn random_token() -> String {
    let mut bytes = [0_u8; 16];
    // The kernel's generator is ready long before anybody serves images; a short answer is topped up.
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    hex::encode(bytes)
}

fn authorization<'h>(headers: &'h HeaderMap, scheme: &str) -> Option<&'h str> {
    let (given, value) = headers
        .get(header::AUTHORIZATION)?
        .to_str()
        .ok()?
        .split_once(' ')?;
    given.eq_ignore_ascii_case(scheme).then(|| value.trim())
}

fn basic(headers: &HeaderMap) -> Option<(String, String)> {
    let decoded = STANDARD.decode(authorization(headers, "basic")?).ok()?;
    let (user, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}
