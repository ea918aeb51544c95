//! A plain HTTP server of blobs, over TCP or a Unix socket: `GET <path>/<blob id>` with `Range`.

use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::HeaderMap;
use url::Url;

use super::clients::{Clients, Peer};
use super::http::{Transport, host_of, read_range};
use super::{Sink, Source};
use crate::config::{HttpProxyConfig, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// See the module.
pub struct HttpProxy {
    transport: Transport,
    base: Url,
    host: String,
}

impl HttpProxy {
    /// A source at `config.addr`. A Unix socket must be there already.
    pub(crate) fn new(config: &HttpProxyConfig, clients: &Arc<Clients>) -> Result<Self, SourceError> {
        let refuse = |reason: &dyn std::fmt::Display| {
            SourceError::new(
                SourceErrorKind::Config,
                &config.addr,
                format!("http-proxy addr: {reason}"),
            )
        };
        let (transport, server) = if config.addr.starts_with('/') {
            let socket = std::fs::metadata(&config.addr).map_err(|error| refuse(&error))?;
            if !socket.file_type().is_socket() {
                return Err(refuse(&"is no Unix socket"));
            }
            (
                Transport::to(
                    clients,
                    &config.http,
                    &Peer::Socket(config.addr.clone()),
                    "localhost",
                )?,
                "http://localhost",
            )
        } else if config.addr.starts_with("http://") || config.addr.starts_with("https://") {
            let origin = Url::parse(&config.addr).map_err(|error| refuse(&error))?;
            (
                Transport::to(clients, &config.http, &Peer::Direct, &host_of(&origin))?,
                config.addr.as_str(),
            )
        } else {
            return Err(refuse(&"is neither a URL nor an absolute path"));
        };
        let mut base = Url::parse(server).map_err(|error| refuse(&error))?;
        base.path_segments_mut()
            .map_err(|()| refuse(&"not a base"))?
            .pop_if_empty()
            .extend(config.path.split('/').filter(|segment| !segment.is_empty()));
        Ok(Self {
            transport,
            base,
            host: config.addr.clone(),
        })
    }
}

impl HttpProxy {
    async fn read_list(
        &self,
        blob_id: &str,
        ranges: &[Range<u64>],
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.push(blob_id);
        }
        read_range(&self.transport, &url, HeaderMap::new(), ranges, sink).await
    }
}

impl Source for HttpProxy {
    fn host(&self) -> &str {
        &self.host
    }

    fn read<'a>(
        &'a self,
        blob_id: &'a str,
        range: Range<u64>,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        async move { self.read_list(blob_id, &[range], sink).await }.boxed()
    }

    fn ranges_per_request(&self) -> usize {
        self.transport.ranges_per_request()
    }

    fn read_ranges<'a>(
        &'a self,
        blob_id: &'a str,
        ranges: &'a [Range<u64>],
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        self.read_list(blob_id, ranges, sink).boxed()
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
