//! An Aliyun OSS bucket: virtual-hosted GET, signature version 1.

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::HeaderMap;
use http::header::{AUTHORIZATION, DATE, HeaderValue};
use url::{Host, Url};

use super::bucket::{Key, endpoint, hmac_sha1, object};
use super::clients::Clients;
use super::http::{Transport, read_range};
use super::{Sink, Source};
use crate::config::{OssConfig, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// See the module.
pub struct Oss {
    transport: Transport,
    base: Url,
    /// The bucket is the first segment of paths, because the endpoint is an address, which has no subdomains.
    path_style: bool,
    bucket: String,
    prefix: String,
    key: Option<Key>,
}

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
            bucket: config.bucket.clone(),
            prefix: config.prefix.clone(),
            key: Key::new(&config.access_key_id, &config.access_key_secret),
        })
    }

    /// The headers of a signed GET of object `name`.
    fn sign(&self, key: &Key, name: &str, now: SystemTime) -> Result<HeaderMap, SourceError> {
        let value = |text: &str| {
            HeaderValue::try_from(text)
                .map_err(|error| SourceError::new(SourceErrorKind::Config, self.host(), error))
        };
        let date = httpdate::fmt_http_date(now);
        // Verb, Content-MD5, Content-Type, date, resource.
        let text = format!("GET\n\n\n{date}\n/{}/{name}", self.bucket);
        let signature = STANDARD.encode(hmac_sha1(key.secret.expose().as_bytes(), text.as_bytes()));
        let mut authorization = value(&format!("OSS {}:{signature}", key.id.expose()))?;
        authorization.set_sensitive(true);
        Ok(HeaderMap::from_iter([
            (DATE, value(&date)?),
            (AUTHORIZATION, authorization),
        ]))
    }
}

impl Source for Oss {
    fn host(&self) -> &str {
        self.base.host_str().unwrap_or_default()
    }

    fn read<'a>(
        &'a self,
        blob_id: &'a str,
        range: Range<u64>,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        async move {
            let name = format!("{}{blob_id}", self.prefix);
            let url = object(&self.base, self.path_style.then_some(self.bucket.as_str()), &name);
            let headers = match &self.key {
                Some(key) => self.sign(key, &name, SystemTime::now())?,
                None => HeaderMap::new(),
            };
            read_range(&self.transport, &url, headers, &[range], sink).await
        }
        .boxed()
    }

    fn replace_proxy(&self, url: Secret) -> Result<(), SourceError> {
        self.transport.replace_proxy(url)
    }

    fn distrust(&self) {
        self.transport.distrust();
    }

    fn is_detoured(&self) -> bool {
        self.transport.is_detoured()
    }

    fn retry_limit(&self) -> u32 {
        self.transport.retry_limit()
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
                ..OssConfig::default()
            };
            let oss = Oss::new(&config, &Arc::default()).unwrap();
            object(&oss.base, oss.path_style.then_some("images"), "nydus/00").to_string()
        };
        assert_eq!(
            with("oss.example:8443"),
            "https://images.oss.example:8443/nydus/00"
        );
        assert_eq!(with("127.0.0.1:80"), "https://127.0.0.1:80/images/nydus/00");
    }
}
