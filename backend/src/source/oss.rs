//! An Aliyun OSS bucket: virtual-hosted GET, signature version 1.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, DATE, InvalidHeaderValue};
use http::{HeaderMap, HeaderValue};
use url::Host;

use super::bucket::{Bucket, Key, Object, Signature, endpoint, hmac_sha1, secret_value};
use super::clients::Clients;
use super::http::Transport;
use crate::config::OssConfig;
use crate::error::{SourceError, SourceErrorKind};

/// See the module.
pub(crate) type Oss = Bucket<Version1>;

/// Signature version 1. It covers the date and the object, and not the range.
pub(crate) struct Version1;

impl Oss {
    /// A source of the objects of a bucket.
    pub(crate) fn new(config: &OssConfig, clients: &Arc<Clients>) -> Result<Self, SourceError> {
        let refuse = |reason: &dyn std::fmt::Display| {
            SourceError::new(SourceErrorKind::Config, &config.endpoint, reason)
        };
        if config.bucket.is_empty() {
            return Err(refuse(&"bucket_name must be given"));
        }
        let mut base = endpoint(config.scheme, &config.endpoint)?;
        // An address has no subdomains.
        let path_style = match base.host() {
            Some(Host::Domain(name)) => name == "localhost" || name.parse::<IpAddr>().is_ok(),
            _ => true,
        };
        if !path_style {
            let host = format!("{}.{}", config.bucket, base.host_str().unwrap_or_default());
            base.set_host(Some(&host)).map_err(|error| refuse(&error))?;
        }
        Ok(Self {
            transport: Transport::new(clients, &config.http)?,
            base,
            path_style,
            name: config.bucket.clone(),
            prefix: config.prefix.clone(),
            key: Key::new(&config.access_key_id, &config.access_key_secret),
            signature: Version1,
        })
    }
}

impl Signature for Version1 {
    fn sign(
        &self,
        key: &Key,
        object: &Object,
        headers: &mut HeaderMap,
        now: SystemTime,
    ) -> Result<(), InvalidHeaderValue> {
        let date = httpdate::fmt_http_date(now);
        // Verb, Content-MD5, Content-Type, date, resource.
        let text = format!("GET\n\n\n{date}\n/{}/{}", object.bucket, object.name);
        let signature = STANDARD.encode(hmac_sha1(key.secret.expose().as_bytes(), text.as_bytes()));
        headers.insert(DATE, HeaderValue::try_from(date)?);
        headers.insert(
            AUTHORIZATION,
            secret_value(format!("OSS {}:{signature}", key.id.expose()))?,
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bucket_is_a_subdomain_where_there_can_be_one() {
        let with = |endpoint: &str| {
            let config = OssConfig {
                endpoint: endpoint.into(),
                bucket: "images".into(),
                prefix: "nydus/".into(),
                ..OssConfig::default()
            };
            let oss = Oss::new(&config, &Arc::default()).unwrap();
            oss.object("00").url.to_string()
        };
        assert_eq!(
            with("oss.example:8443"),
            "https://images.oss.example:8443/nydus/00"
        );
        assert_eq!(with("127.0.0.1:80"), "https://127.0.0.1:80/images/nydus/00");
    }
}
