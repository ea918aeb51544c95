//! Refusals: each names the field, shows the value and says what is allowed.

use std::path::Path;

use serde_json::Value;

use super::ConfigError;
use super::secret::SecretUrl;
use super::shown::shown;

/// Outcome of a check.
pub(super) type Check = Result<(), ConfigError>;

/// Refuses `value` of `field`.
pub(super) fn refuse(field: &str, value: impl Into<Value>, allowed: &str) -> Check {
    Err(ConfigError::Value {
        field: field.to_owned(),
        value: shown(field, &value.into()),
        allowed: allowed.to_owned(),
    })
}

/// Why `value` of `field` is refused when it is none of `allowed`.
pub(super) fn not_one_of(field: &str, value: &str, allowed: &[&str]) -> ConfigError {
    ConfigError::Value {
        field: field.to_owned(),
        value: shown(field, &value.into()),
        allowed: format!("one of {}", allowed.join(", ")),
    }
}

/// `value` must be one of `allowed`.
pub(super) fn one_of(field: &str, value: &str, allowed: &[&str]) -> Check {
    if allowed.contains(&value) {
        Ok(())
    } else {
        Err(not_one_of(field, value, allowed))
    }
}

/// `name` in the object at `at` must not be empty.
pub(super) fn given(at: &str, name: &str, value: &str) -> Check {
    if value.is_empty() {
        refuse(&format!("{at}.{name}"), "", "a text that is not empty")
    } else {
        Ok(())
    }
}

/// `name` in the object at `at` must be `http` or `https`.
pub(super) fn scheme(at: &str, name: &str, value: &str) -> Check {
    one_of(&format!("{at}.{name}"), value, &["http", "https"])
}

/// `value` must lie between `low` and `high`.
pub(super) fn range(field: &str, value: u64, low: u64, high: u64) -> Check {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        refuse(field, value, &format!("{low} to {high}"))
    }
}

/// An absolute `http://` or `https://` URL.
pub(super) fn http_url(field: &str, value: &SecretUrl) -> Check {
    match url::Url::parse(value.expose()) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(()),
        _ => refuse(
            field,
            value.redacted(),
            "a URL that starts with http:// or https:// and names a host",
        ),
    }
}

/// A URL, or the path of a Unix socket that exists.
pub(super) fn proxy_address(field: &str, value: &SecretUrl) -> Check {
    if value.expose().starts_with('/') {
        return if Path::new(value.expose()).exists() {
            Ok(())
        } else {
            refuse(field, value.redacted(), "the path of an existing Unix socket")
        };
    }
    if value.expose().starts_with("http") {
        return http_url(field, value);
    }
    refuse(
        field,
        value.redacted(),
        "a URL that starts with http:// or https://, or the absolute path of a Unix socket",
    )
}
