//! Values that must not be shown: in logs, in error texts, in answers of the API.

use std::fmt;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that is never printed and serialises as the empty string.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself. Each caller is a place where a secret leaves its wrapping.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is nothing to hide.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() {
            "Secret(empty)"
        } else {
            "Secret(hidden)"
        })
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "" } else { "***" })
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("")
    }
}

impl<'de> Deserialize<'de> for Secret {
    /// Not derived: serde's own messages quote the value that did not fit.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_newtype_struct("Secret", Text).map(Self)
    }
}

/// Takes a text, and does not tell what else there was.
struct Text;

impl<'de> Visitor<'de> for Text {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => Ok(text),
            _ => Err(D::Error::invalid_type(Unexpected::Other("hidden value"), &self)),
        }
    }
}

/// Serialises a secret that may be missing as missing.
pub(super) fn as_null<S: Serializer>(_: &Option<Secret>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_none()
}

/// A URL that may carry `user:password@`; everything that shows it leaves that part out.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The URL with its credentials.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether no URL is given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it is an `http://` or `https://` URL with a host; `field` is what a refusal names.
    ///
    /// # Errors
    ///
    /// It is not.
    pub fn check(&self, field: &str) -> Result<(), super::ConfigError> {
        super::check::http_url(field, self)
    }

    /// The URL without credentials, for people.
    pub fn redacted(&self) -> String {
        without_credentials(&self.0)
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.redacted())
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.redacted())
    }
}

impl Serialize for SecretUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.redacted())
    }
}

impl<'de> Deserialize<'de> for SecretUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_newtype_struct("SecretUrl", Text)
            .map(Self)
    }
}

/// `text` without what stands between `//` (or the start) and the last `@` of the authority, and without
/// a query, which is where signed URLs carry their signatures. Works on text that is no valid URL, too:
/// what cannot be parsed must not be shown either.
pub fn without_credentials(text: &str) -> String {
    let (scheme, rest) = match text.find("://") {
        Some(at) => text.split_at(at + 3),
        None => ("", text),
    };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let path = tail.split(['?', '#']).next().unwrap_or_default();
    // An `@` later on means that the authority was not where it seemed to be (`http://user:pa/ss@host`).
    let path = path.rsplit_once('@').map_or(path, |_| "");
    format!("{scheme}{host}{path}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_shows_a_secret() {
        let secret = Secret::new("hunter2");
        assert!(!format!("{secret} {secret:?}").contains("hunter2"));
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"\"");
        let error = serde_json::from_str::<Secret>("4711").unwrap_err().to_string();
        assert!(!error.contains("4711"), "{error}");
    }

    #[test]
    fn urls_lose_their_credentials_and_nothing_else() {
        for (url, shown) in [
            ("http://u:p@proxy:3128/x", "http://proxy:3128/x"),
            ("http://proxy:3128", "http://proxy:3128"),
            ("u:p@proxy:3128", "proxy:3128"),
            ("http://u:p@q@proxy/", "http://proxy/"),
            ("/run/dragonfly.sock", "/run/dragonfly.sock"),
            ("http://h/x?sig=abc", "http://h/x"),
            ("", ""),
        ] {
            assert_eq!(without_credentials(url), shown);
        }
        assert!(!without_credentials("http://user:pa/ss@host/").contains("ss"));
    }
}
