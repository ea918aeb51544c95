//! An S3 bucket, or one of a compatible service: path-style GET, signature version 4.

use std::sync::Arc;
use std::time::SystemTime;

use http::header::{AUTHORIZATION, InvalidHeaderValue};
use http::{HeaderMap, HeaderName, HeaderValue};
use sha2::{Digest, Sha256};
use url::Position;

use super::bucket::{Bucket, Key, Object, Signature, compact_date, endpoint, hmac_sha256, secret_value};
use super::clients::Clients;
use super::http::Transport;
use crate::config::S3Config;
use crate::error::{SourceError, SourceErrorKind};

const DEFAULT_ENDPOINT: &str = "s3.amazonaws.com";
/// SHA-256 of nothing: the body of a GET.
const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// See the module.
pub(crate) type S3 = Bucket<Version4>;

/// Signature version 4. It covers all headers.
pub(crate) struct Version4 {
    region: String,
}

impl S3 {
    /// A source of the objects of a bucket.
    pub(crate) fn new(config: &S3Config, clients: &Arc<Clients>) -> Result<Self, SourceError> {
        let name = if config.endpoint.is_empty() {
            DEFAULT_ENDPOINT
        } else {
            &config.endpoint
        };
        let base = endpoint(config.scheme, name)?;
        if config.bucket.is_empty() || config.region.is_empty() {
            return Err(SourceError::new(
                SourceErrorKind::Config,
                name,
                "bucket_name and region must be given",
            ));
        }
        Ok(Self {
            transport: Transport::new(clients, &config.http)?,
            base,
            path_style: true,
            name: config.bucket.clone(),
            prefix: config.prefix.clone(),
            key: Key::new(&config.access_key_id, &config.access_key_secret),
            signature: Version4 {
                region: config.region.clone(),
            },
        })
    }
}

impl Signature for Version4 {
    fn sign(
        &self,
        key: &Key,
        object: &Object,
        headers: &mut HeaderMap,
        now: SystemTime,
    ) -> Result<(), InvalidHeaderValue> {
        let date = compact_date(now);
        let day = date.get(..8).unwrap_or_default();
        headers.insert(
            HeaderName::from_static("x-amz-content-sha256"),
            HeaderValue::from_static(EMPTY),
        );
        headers.insert(
            HeaderName::from_static("x-amz-date"),
            HeaderValue::try_from(&date)?,
        );

        let url = &object.url;
        let host = &url[Position::BeforeHost..Position::AfterPort];
        let mut signed: Vec<(&str, &str)> = vec![("host", host)];
        signed.extend(
            headers
                .iter()
                .map(|(name, value)| (name.as_str(), value.to_str().unwrap_or_default())),
        );
        signed.sort_unstable();
        let names = signed.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let lines: String = signed
            .iter()
            .map(|(name, value)| format!("{name}:{}\n", value.trim()))
            .collect();

        let request = format!(
            "GET\n{}\n{}\n{lines}\n{names}\n{EMPTY}",
            url.path(),
            url.query().unwrap_or_default()
        );
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let digest = hex::encode(Sha256::digest(request));
        let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{digest}");
        let mut secret = format!("AWS4{}", key.secret.expose()).into_bytes();
        for part in [day, &self.region, "s3", "aws4_request"] {
            secret = hmac_sha256(&secret, part.as_bytes());
        }
        let signature = hex::encode(hmac_sha256(&secret, text.as_bytes()));
        let authorization = secret_value(format!(
            "AWS4-HMAC-SHA256 Credential={}/{scope},SignedHeaders={names},Signature={signature}",
            key.id.expose()
        ))?;
        headers.insert(AUTHORIZATION, authorization);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use url::Url;

    use super::*;
    use crate::source::http::range_header;

    /// "GET Object" of the examples in Amazon's description of signature version 4.
    #[test]
    fn the_published_example() {
        let config = S3Config {
            endpoint: "examplebucket.s3.amazonaws.com".into(),
            region: "us-east-1".into(),
            bucket: "unused".into(),
            access_key_id: Some("AKIAIOSFODNN7EXAMPLE".into()),
            access_key_secret: Some("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into()),
            ..S3Config::default()
        };
        let s3 = S3::new(&config, &Arc::default()).unwrap();
        let object = Object {
            bucket: "examplebucket",
            name: "test.txt".into(),
            url: Url::parse("https://examplebucket.s3.amazonaws.com/test.txt").unwrap(),
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_369_353_600);
        let mut headers = HeaderMap::from_iter([range_header(std::slice::from_ref(&(0..10)))]);
        s3.signature
            .sign(s3.key.as_ref().unwrap(), &object, &mut headers, now)
            .unwrap();
        assert_eq!(
            headers[AUTHORIZATION],
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,\
             SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,\
             Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        assert!(!format!("{headers:?}").contains("Signature"));
    }
}
