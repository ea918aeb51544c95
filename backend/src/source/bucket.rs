//! What the object stores share: the URL of an object, and keyed hashes to sign requests with.
//!
//! Only fixed keys are configured, and only GET of one object is asked for. That is so little of the signing protocols that it is
//! written down in `s3` and `oss` rather than taken from a library.

use std::time::{Duration, SystemTime};

use ring::hmac;
use url::Url;

use crate::config::{Scheme, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// A key, if both of its parts are given.
pub(super) struct Key {
    pub(super) id: Secret,
    pub(super) secret: Secret,
}

impl Key {
    pub(super) fn new(id: &Option<Secret>, secret: &Option<Secret>) -> Option<Self> {
        let given = |part: &Option<Secret>| part.clone().filter(|part| !part.is_empty());
        Some(Self {
            id: given(id)?,
            secret: given(secret)?,
        })
    }
}

/// `<scheme>://<endpoint>`; an endpoint may also come with its scheme.
pub(super) fn endpoint(scheme: Scheme, endpoint: &str) -> Result<Url, SourceError> {
    let refuse =
        |reason: String| SourceError::new(SourceErrorKind::Config, endpoint, format!("endpoint: {reason}"));
    let scheme = if scheme == Scheme::Http { "http" } else { "https" };
    let text = if endpoint.contains("://") {
        endpoint.to_owned()
    } else {
        format!("{scheme}://{endpoint}")
    };
    let url = Url::parse(&text).map_err(|error| refuse(error.to_string()))?;
    let plain = url.path() == "/" && url.query().is_none() && url.username().is_empty();
    if !plain || !matches!(url.scheme(), "http" | "https") {
        return Err(refuse("is not a host and a port".into()));
    }
    Ok(url)
}

/// The URL of an object below `base`; slashes in `key` separate segments.
pub(super) fn object(base: &Url, bucket: Option<&str>, key: &str) -> Url {
    let mut url = base.clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(bucket).extend(key.split('/'));
    }
    url
}

pub(super) fn hmac_sha256(key: &[u8], data: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), data)
        .as_ref()
        .to_vec()
}

pub(super) fn hmac_sha1(key: &[u8], data: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, key), data)
        .as_ref()
        .to_vec()
}

/// `20130524T000000Z`.
pub(super) fn compact_date(time: SystemTime) -> String {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years of 365.2425 days, counted from the first of March 0000.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (
        day - (153 * month + 2) / 5 + 1,
        if month < 10 { month + 3 } else { month - 9 },
    );
    let year = era * 400 + year + u64::from(month <= 2);
    format!(
        "{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_as_the_calendar_has_them() {
        let at = |seconds| compact_date(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "19700101T000000Z");
        assert_eq!(at(951_782_400), "20000229T000000Z");
        assert_eq!(at(1_369_353_600), "20130524T000000Z");
        assert_eq!(at(4_107_542_399), "21000228T235959Z");
        assert_eq!(at(4_107_542_400), "21000301T000000Z");
    }

    #[test]
    fn endpoints_with_and_without_a_scheme() {
        assert_eq!(
            endpoint(Scheme::Https, "s3.example:9000").unwrap().as_str(),
            "https://s3.example:9000/"
        );
        assert_eq!(
            endpoint(Scheme::Https, "http://s3.example").unwrap().as_str(),
            "http://s3.example/"
        );
        assert!(endpoint(Scheme::Https, "s3.example/bucket").is_err());
        assert!(endpoint(Scheme::Https, "ftp://s3.example").is_err());
        assert!(endpoint(Scheme::Https, "").is_err());
    }
}
