//! A plain HTTP server of blobs, over TCP or a Unix socket: `GET <path>/<blob id>` with `Range`.

use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use http::HeaderMap;
use url::Url;

use super::clients::{Clients, Peer};
use super::http::{Answer, Transport, host_of, range_header};
use super::remote::Protocol;
use crate::config::HttpProxyConfig;
use crate::error::{SourceError, SourceErrorKind};

/// See the module.
pub(crate) struct HttpProxy {
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

impl Protocol for HttpProxy {
    fn host(&self) -> &str {
        &self.host
    }

    fn transport(&self) -> &Transport {
        &self.transport
    }

    async fn open(&self, blob_id: &str, ranges: &[Range<u64>]) -> Result<Answer, SourceError> {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.push(blob_id);
        }
        let headers = HeaderMap::from_iter([range_header(ranges)]);
        let answer = self.transport.get(&url, headers).await?;
        self.transport.check(&answer, ranges)?;
        Ok(answer)
    }
}
