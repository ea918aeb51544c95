//! What the object stores share: where an object is, and the frame of a signed request.
//!
//! Only fixed keys are configured, and only GET of one object is asked for. That is so little of the signing protocols that it is
//! written down in `s3` and `oss` rather than taken from a library.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use http::header::InvalidHeaderValue;
use http::{HeaderMap, HeaderValue};
use ring::hmac;
use url::Url;

use super::http::{Answer, Transport, range_header};
use super::remote::Protocol;
use crate::config::{Scheme, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// A bucket, and how requests for its objects are signed.
pub(crate) struct Bucket<S> {
    pub(super) transport: Transport,
    pub(super) base: Url,
    /// The bucket is the first segment of paths, and not a part of the host's name.
    pub(super) path_style: bool,
    pub(super) name: String,
    /// What the names of objects begin with.
    pub(super) prefix: String,
    /// Requests are anonymous without.
    pub(super) key: Option<Key>,
    pub(super) signature: S,
}

/// A way to sign requests.
pub(super) trait Signature: Send + Sync {
    /// Signs a GET with `headers`: adds those that it takes.
    fn sign(
        &self,
        key: &Key,
        object: &Object,
        headers: &mut HeaderMap,
        now: SystemTime,
    ) -> Result<(), InvalidHeaderValue>;
}

/// An object of a bucket.
pub(super) struct Object<'a> {
    pub(super) bucket: &'a str,
    pub(super) name: String,
    pub(super) url: Url,
}

impl<S> Bucket<S> {
    pub(super) fn object(&self, blob_id: &str) -> Object<'_> {
        let name = format!("{}{blob_id}", self.prefix);
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments
                .pop_if_empty()
                .extend(self.path_style.then_some(&self.name))
                // Slashes separate segments.
                .extend(name.split('/'));
        }
        Object {
            bucket: &self.name,
            name,
            url,
        }
    }
}

impl<S: Signature> Protocol for Bucket<S> {
    fn host(&self) -> &str {
        self.base.host_str().unwrap_or_default()
    }

    fn transport(&self) -> &Transport {
        &self.transport
    }

    /// They answer one range, whatever they are asked for.
    fn knows_lists(&self) -> bool {
        false
    }

    async fn open(&self, blob_id: &str, ranges: &[Range<u64>]) -> Result<Answer, SourceError> {
        let object = self.object(blob_id);
        let mut headers = HeaderMap::from_iter([range_header(ranges)]);
        if let Some(key) = &self.key {
            self.signature
                .sign(key, &object, &mut headers, SystemTime::now())
                .map_err(|error| SourceError::new(SourceErrorKind::Config, self.host(), error))?;
        }
        let answer = self.transport.get(&object.url, headers).await?;
        self.transport.check(&answer, ranges)?;
        Ok(answer)
    }
}

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

/// The value of an `Authorization` header.
pub(super) fn secret_value(text: String) -> Result<HeaderValue, InvalidHeaderValue> {
    let mut value = HeaderValue::try_from(text)?;
    value.set_sensitive(true);
    Ok(value)
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
