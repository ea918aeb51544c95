//! What goes wrong on the way to an answer, as errors with a kind and without secrets.

use std::error::Error as _;
use std::time::Duration;

use url::Url;

use crate::error::{SourceError, SourceErrorKind};

/// `host:port` of a URL, without anything that might be secret.
pub(crate) fn host_of(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => url.scheme().to_owned(),
    }
}

/// A protocol error.
pub(crate) fn protocol(host: &str, detail: String) -> SourceError {
    SourceError::new(SourceErrorKind::Protocol, host, detail)
}

pub(in crate::source) fn stalled(host: &str, patience: Duration, what: &str) -> SourceError {
    SourceError::new(
        SourceErrorKind::Stalled,
        host,
        format!("{what} for {:.1} s", patience.as_secs_f64()),
    )
}

pub(in crate::source) fn kind_of(error: &reqwest::Error) -> SourceErrorKind {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(rustls::Error::InvalidCertificate(_)) = tls_error(inner) {
            return SourceErrorKind::Untrusted;
        }
        cause = inner.source();
    }
    if error.is_builder() {
        SourceErrorKind::Config
    } else if unresolved(error) {
        SourceErrorKind::Unresolved
    } else {
        SourceErrorKind::Unreachable
    }
}

/// The TLS error in `error`. An `io::Error` does not count what it wraps among its sources.
fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    error
        .downcast_ref()
        .or_else(|| tls_error(error.downcast_ref::<std::io::Error>()?.get_ref()?))
}

/// Whether no address was found for the name. The connector has no type for it that we could see.
fn unresolved(error: &reqwest::Error) -> bool {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if inner.to_string() == "dns error" {
            return true;
        }
        cause = inner.source();
    }
    false
}

/// The innermost reasons of an error, without the URL, which may hold a signature.
pub(in crate::source) fn describe(error: &reqwest::Error) -> String {
    let mut reasons = Vec::new();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let reason = inner.to_string();
        if reasons.last() != Some(&reason) {
            reasons.push(reason);
        }
        cause = inner.source();
    }
    match reasons.len() {
        0 => "request failed".to_owned(),
        n => reasons.split_off(n.saturating_sub(2)).join(": "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_shown_without_credentials_and_signatures() {
        let url = Url::parse("https://user:secret@cdn.example:8443/x?sig=secret").unwrap();
        assert_eq!(host_of(&url), "cdn.example:8443");
    }
}
