//! HTTP clients, one for all sources whose connections can be shared: a client keeps connections, TLS sessions and threads of name
//! resolution, and a daemon has thousands of images from a few registries.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use reqwest::{Client, Proxy, redirect};

use super::http::describe;
use super::tls;
use crate::config::{HttpConfig, Secret};
use crate::error::{SourceError, SourceErrorKind};

/// Idle connections kept per host.
const IDLE: usize = 16;

/// Whom a client connects to.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum Peer {
    /// The host of the URL.
    Direct,
    /// A forward proxy.
    Proxy(Secret),
    /// A Unix socket.
    Socket(String),
}

/// See the module.
#[derive(Default)]
pub(crate) struct Clients {
    all: Mutex<HashMap<Key, Client>>,
}

/// All that two sources must have in common.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    peer: Peer,
    skip_verify: bool,
    /// With the times of their last change: a renewed file is read again.
    authorities: Vec<(PathBuf, Option<SystemTime>)>,
    connect_timeout: Duration,
}

impl Clients {
    pub(crate) fn get(&self, config: &HttpConfig, peer: &Peer) -> Result<Client, SourceError> {
        let changed = |path: &PathBuf| std::fs::metadata(path).and_then(|file| file.modified()).ok();
        let key = Key {
            peer: peer.clone(),
            skip_verify: config.skip_verify,
            authorities: config
                .ca_cert_files
                .iter()
                .map(|path| (path.clone(), changed(path)))
                .collect(),
            connect_timeout: config.connect_timeout,
        };
        let mut all = self.all.lock();
        if let Some(client) = all.get(&key) {
            return Ok(client.clone());
        }
        let client = build(config, peer)?;
        all.insert(key, client.clone());
        Ok(client)
    }
}

fn build(config: &HttpConfig, peer: &Peer) -> Result<Client, SourceError> {
    let builder = Client::builder()
        .tls_backend_preconfigured(tls::client(config.skip_verify, &config.ca_cert_files)?)
        .redirect(redirect::Policy::none())
        .connect_timeout(config.connect_timeout)
        .pool_max_idle_per_host(IDLE)
        .tcp_keepalive(Duration::from_secs(15))
        .no_proxy();
    let refuse = |reason: String| SourceError::new(SourceErrorKind::Config, "HTTP client", reason);
    let builder = match peer {
        Peer::Direct => builder,
        Peer::Proxy(url) => {
            builder.proxy(Proxy::all(url.expose()).map_err(|_| refuse("the proxy's URL is none".into()))?)
        }
        Peer::Socket(path) => builder.unix_socket(path.as_str()),
    };
    builder.build().map_err(|error| match peer {
        Peer::Proxy(_) => refuse("none can use the proxy".into()),
        _ => refuse(describe(&error)),
    })
}
