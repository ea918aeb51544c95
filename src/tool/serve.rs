//! `rafs serve`: image directories as a read-only registry, for demonstrations, tests and small installations.
//!
//! Speaks the part of the OCI distribution specification that a lazy loader needs: `GET` and `HEAD` of
//! `/v2/<any repository>/blobs/sha256:<hex>` with single ranges, `/v2/`, and a token endpoint. Every answer can be
//! delayed or damaged on demand, at any time, so that a client can be shown a registry on a bad day. With an upstream, what
//! the directories lack is fetched from there once, manifests too.
//!
//! | path | answer |
//! |---|---|
//! | `/` | what is served, as JSON |
//! | `/v2/`, `/v2/<repository>/blobs/<digest>` | the registry |
//! | `/token` | bearer tokens, with [`Auth::Bearer`] |
//! | `GET`, `PUT /_fault` | the faults in force, as in `--fault` |
//! | `GET`, `DELETE /_requests` | number of registry requests and body bytes since the start or the last `DELETE` |
//!
//! * `catalog`: digests to files.
//! * `auth`: who may ask.
//! * `fault`: what goes wrong.
//! * `answer`: what becomes of a request. `range`: what of a body it asks for. `body`: where that comes from, and how it is sent.
//! * `record`: the account of what was asked.
//! * `find`: what is asked for. `pull`: what the directories lack, from an upstream. `manifest`: manifests and names.

mod answer;
mod auth;
mod body;
mod catalog;
mod fault;
mod find;
mod manifest;
mod pull;
mod range;
mod record;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

pub use auth::Auth;
pub use backend::source::pull::UpstreamOptions;
pub use fault::Fault;
pub use record::Request;
pub use tls::Identity;

use super::{BoxError, interrupted};
use auth::Gate;
use catalog::Catalog;
use fault::Dice;
use pull::Pull;
use record::Records;

/// Arguments of `rafs serve`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directories with images: `DIR/bootstrap` and `DIR/blobs/<id>`, also one level deeper.
    #[arg(required = true)]
    directories: Vec<PathBuf>,
    /// Address to listen on; port 0 takes a free one. The address is the first line on standard output.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:5000")]
    listen: SocketAddr,
    /// Delay every answer by so many milliseconds; short for `--fault latency=MS`.
    #[arg(long, value_name = "MS")]
    latency: Option<u64>,
    /// What goes wrong, comma separated: latency=MS, fail=P, status=CODE, corrupt=P, truncate=P, stall=SECONDS,
    /// rate=BYTES (per second and request), seed=N. P is a probability from 0 to 1.
    #[arg(long, value_name = "LIST", default_value = "")]
    fault: Fault,
    /// Ask for a user and a password: basic authentication, or at the token endpoint with --token.
    #[arg(long, value_name = "USER:PASSWORD", value_parser = auth::parse_credentials)]
    auth: Option<(String, String)>,
    /// Ask for bearer tokens, issued at /token.
    #[arg(long)]
    token: bool,
    /// Seconds that a token is good for.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, requires = "token")]
    token_ttl: u64,
    /// Registry to fetch from, once, what the directories lack: http[s]://HOST[:PORT]. It is kept in the first directory, which
    /// has to be writable; blobs are verified against their digest. Credentials go into the URL: USER:PASSWORD@HOST.
    #[arg(long, value_name = "URL")]
    upstream: Option<String>,
    /// Authority (PEM) to trust beside the host's where the upstream speaks https; may be given several times.
    #[arg(long, value_name = "FILE", requires = "upstream")]
    upstream_ca: Vec<PathBuf>,
    /// Append one JSON object per registry request to this file.
    #[arg(long, value_name = "FILE")]
    request_log: Option<PathBuf>,
    /// Certificate chain (PEM) to serve https with.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key (PEM) of the certificate.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// How to serve.
#[derive(Default)]
pub struct Options {
    /// Directories with images.
    pub directories: Vec<PathBuf>,
    /// Where to listen; a free port of 127.0.0.1 if `None`.
    pub listen: Option<SocketAddr>,
    /// What goes wrong from the start.
    pub fault: Fault,
    /// Who may ask.
    pub auth: Auth,
    /// Registry that what is not there is fetched from, to be kept in the first directory.
    pub upstream: Option<UpstreamOptions>,
    /// File that a JSON line per registry request is appended to.
    pub request_log: Option<PathBuf>,
    /// Serve https.
    pub tls: Option<Identity>,
}

/// The server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A file or directory cannot be used.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// There are no threads to be had.
    #[error("cannot start the server's threads")]
    Runtime(#[source] io::Error),
    /// Certificate or key are of no use.
    #[error("cannot use the TLS certificate: {0}")]
    Tls(String),
    /// The upstream's URL is none.
    #[error("cannot use the upstream")]
    Upstream(#[source] backend::error::SourceError),
    /// Nowhere to keep what the upstream sends.
    #[error("an upstream needs a directory")]
    NoStore,
}

/// What all requests share.
struct State {
    catalog: Catalog,
    pull: Option<Arc<Pull>>,
    gate: Gate,
    fault: Mutex<Fault>,
    dice: Dice,
    records: Arc<Records>,
    /// `http` or `https`.
    scheme: &'static str,
}

/// A running server. Stops when dropped: connections break off, the port is free.
pub struct Server {
    addr: SocketAddr,
    state: Arc<State>,
    runtime: Option<Runtime>,
}

impl Server {
    /// Listens and serves on threads of its own until stopped.
    pub fn start(options: Options) -> Result<Self, ServeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("serve")
            .enable_all()
            .build()
            .map_err(ServeError::Runtime)?;
        let tls = options.tls.as_ref().map(Identity::acceptor).transpose()?;
        let pull = match (&options.upstream, options.directories.first()) {
            (None, _) => None,
            (Some(upstream), Some(store)) => Some(Arc::new(Pull::new(upstream, store)?)),
            (Some(_), None) => return Err(ServeError::NoStore),
        };
        let state = Arc::new(State {
            pull,
            catalog: Catalog::new(options.directories)?,
            gate: Gate::new(options.auth),
            dice: Dice::new(options.fault.seed),
            fault: Mutex::new(options.fault),
            records: Arc::new(Records::new(options.request_log)?),
            scheme: if tls.is_some() { "https" } else { "http" },
        });
        let wanted = options.listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
        let listen = |source| ServeError::Listen {
            address: wanted,
            source,
        };
        let listener = runtime.block_on(TcpListener::bind(wanted)).map_err(listen)?;
        let addr = listener.local_addr().map_err(listen)?;
        runtime.spawn(accept(listener, tls, answer::router(state.clone())));
        Ok(Self {
            addr,
            state,
            runtime: Some(runtime),
        })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://host:port`, or `https` with a certificate.
    pub fn url(&self) -> String {
        format!("{}://{}", self.state.scheme, self.addr)
    }

    /// Registry requests so far, oldest first. Of a request that is still being answered the bytes sent so far
    /// are counted. Only the latest 65,536 are kept.
    pub fn requests(&self) -> Vec<Request> {
        self.state.records.list()
    }

    /// Forgets the requests so far.
    pub fn clear_requests(&self) {
        self.state.records.clear();
    }

    /// Replaces the faults in force. Answers that have begun keep theirs.
    pub fn set_fault(&self, fault: Fault) {
        self.state.dice.reseed(fault.seed);
        *self.state.fault.lock() = fault;
    }

    /// Makes all tokens invalid that were issued so far.
    pub fn revoke_tokens(&self) {
        self.state.gate.revoke();
    }

    /// Stops: connections break off where they are, the port is free afterwards.
    pub fn stop(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, tls: Option<tokio_rustls::TlsAcceptor>, router: Router) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely: give them time to come back.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        // Answers are small writes; they shall not wait for acknowledgements.
        let _ = stream.set_nodelay(true);
        let (tls, router) = (tls.clone(), router.clone());
        tokio::spawn(async move {
            match tls {
                None => converse(stream, router).await,
                Some(acceptor) => {
                    let handshake = tokio::time::timeout(Duration::from_secs(10), acceptor.accept(stream));
                    if let Ok(Ok(stream)) = handshake.await {
                        converse(stream, router).await;
                    }
                }
            }
        });
    }
}

async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin + 'static, router: Router) {
    // An error is a client that went away, or an answer that was broken off on purpose.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await;
}

/// Serves until SIGTERM or SIGINT.
pub fn run(arguments: Arguments) -> Result<ExitCode, BoxError> {
    let mut fault = arguments.fault;
    if let Some(latency) = arguments.latency {
        fault.latency = Duration::from_millis(latency);
    }
    let ttl = Duration::from_secs(arguments.token_ttl);
    let auth = match (arguments.auth, arguments.token) {
        (None, false) => Auth::None,
        (Some((user, password)), false) => Auth::Basic { user, password },
        (credentials, true) => Auth::Bearer { credentials, ttl },
    };
    let tls = match (arguments.tls_cert, arguments.tls_key) {
        (Some(certificate), Some(key)) => Some(Identity::read(&certificate, &key)?),
        _ => None,
    };
    let mut server = Server::start(Options {
        directories: arguments.directories,
        listen: Some(arguments.listen),
        fault,
        auth,
        upstream: arguments.upstream.map(|url| UpstreamOptions {
            url: url.into(),
            authorities: arguments.upstream_ca,
            silence: None,
        }),
        request_log: arguments.request_log,
        tls,
    })?;
    println!("{}", server.addr());
    let Some(runtime) = server.runtime.take() else {
        return Ok(ExitCode::SUCCESS);
    };
    let end = {
        let _entered = runtime.enter();
        interrupted()?
    };
    runtime.block_on(end);
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}
