//! A small HTTP/1.1 server whose every answer a test decides.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub target: String,
    pub headers: HashMap<String, String>,
    pub at: Instant,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The `Range` header, end exclusive.
    pub fn range(&self) -> Option<Range<usize>> {
        let (start, end) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some(start.parse().ok()?..end.parse::<usize>().ok()? + 1)
    }
}

#[derive(Clone, Debug, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Instead of the length of the body.
    pub length: Option<usize>,
    /// Before the head.
    pub delay: Duration,
    /// Close the connection after so many bytes of body.
    pub cut: Option<usize>,
    /// Go silent after so many bytes of body.
    pub stall: Option<usize>,
    /// Pause between single bytes of the body.
    pub drip: Option<Duration>,
    /// Close the connection without an answer.
    pub reset: bool,
}

impl Reply {
    pub fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn json(text: String) -> Self {
        Self {
            body: text.into_bytes(),
            ..Self::status(200)
        }
    }

    /// What a good server answers.
    pub fn blob(request: &Request, data: &[u8]) -> Self {
        match request.range() {
            None => Self {
                body: data.to_vec(),
                ..Self::status(200)
            },
            Some(range) if range.start >= data.len() => {
                Self::status(416).with("Content-Range", format!("bytes */{}", data.len()))
            }
            Some(range) => {
                let end = range.end.min(data.len());
                let content = format!("bytes {}-{}/{}", range.start, end - 1, data.len());
                Self {
                    body: data[range.start..end].to_vec(),
                    ..Self::status(206)
                }
                .with("Content-Range", content)
            }
        }
    }
}

impl Request {
    /// All ranges of the `Range` header, end exclusive.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        let list = self
            .header("range")
            .and_then(|value| value.strip_prefix("bytes="))
            .unwrap_or_default();
        list.split(',')
            .filter_map(|range| {
                let (start, end) = range.split_once('-')?;
                Some(start.parse().ok()?..end.parse::<usize>().ok()? + 1)
            })
            .collect()
    }
}

impl Reply {
    /// What a server answers that knows lists of ranges.
    pub fn parts(request: &Request, data: &[u8]) -> Self {
        let ranges = request.ranges();
        if ranges.len() < 2 {
            return Self::blob(request, data);
        }
        let mut body = Vec::new();
        for range in ranges {
            let content = format!("bytes {}-{}/{}", range.start, range.end - 1, data.len());
            body.extend(format!("\r\n--frontier\r\nContent-Range: {content}\r\n\r\n").into_bytes());
            body.extend(&data[range]);
        }
        body.extend(b"\r\n--frontier--\r\n");
        Self {
            body,
            ..Self::status(206)
        }
        .with("Content-Type", "multipart/byteranges; boundary=frontier")
    }
}

type Handler = Arc<dyn Fn(&Request) -> Reply + Send + Sync>;

pub struct Server {
    pub address: SocketAddr,
    pub certificate: Option<String>,
    log: Arc<Mutex<Vec<Request>>>,
    _runtime: Runtime,
}

impl Server {
    pub fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::run(Arc::new(handler), false)
    }

    pub fn start_tls(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::run(Arc::new(handler), true)
    }

    fn run(handler: Handler, secure: bool) -> Self {
        let runtime = Runtime::new().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (acceptor, certificate) = if secure {
            let (acceptor, pem) = tls();
            (Some(acceptor), Some(pem))
        } else {
            (None, None)
        };
        let seen = Arc::clone(&log);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (handler, log, acceptor) = (Arc::clone(&handler), Arc::clone(&seen), acceptor.clone());
                tokio::spawn(async move {
                    match acceptor {
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                serve(stream, handler, log).await;
                            }
                        }
                        None => serve(stream, handler, log).await,
                    }
                });
            }
        });
        Self {
            address,
            certificate,
            log,
            _runtime: runtime,
        }
    }

    /// On a Unix socket.
    pub fn start_unix(path: &Path, handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let runtime = Runtime::new().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let _guard = runtime.enter();
        let listener = UnixListener::bind(path).unwrap();
        let (handler, seen): (Handler, _) = (Arc::new(handler), Arc::clone(&log));
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&handler), Arc::clone(&seen)));
            }
        });
        drop(_guard);
        Self {
            address: ([0, 0, 0, 0], 0).into(),
            certificate: None,
            log,
            _runtime: runtime,
        }
    }

    pub fn host(&self) -> String {
        format!("localhost:{}", self.address.port())
    }

    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    pub fn count(&self, part: &str) -> usize {
        self.requests()
            .iter()
            .filter(|request| request.target.contains(part))
            .count()
    }

    /// Writes the server's certificate to a file.
    pub fn certificate_file(&self, dir: &Path) -> PathBuf {
        let path = dir.join(format!("{}.pem", self.address.port()));
        std::fs::write(&path, self.certificate.as_ref().unwrap()).unwrap();
        path
    }
}

fn tls() -> (TlsAcceptor, String) {
    let mut parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    // As `openssl req -x509` makes them.
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = parameters.self_signed(&key).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    (TlsAcceptor::from(Arc::new(config)), certificate.pem())
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    handler: Handler,
    log: Arc<Mutex<Vec<Request>>>,
) {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            match stream.read_buf(&mut buffer).await {
                Ok(n) if n > 0 => {}
                _ => return,
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end + 4);
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap().split(' ');
        let request = Request {
            method: first.next().unwrap().to_owned(),
            target: first.next().unwrap_or_default().to_owned(),
            headers: headers(lines),
            at: Instant::now(),
        };
        log.lock().unwrap().push(request.clone());
        let reply = handler(&request);
        tokio::time::sleep(reply.delay).await;
        if reply.reset || answer(&mut stream, reply).await.is_none() {
            return;
        }
    }
}

/// A header that comes twice has both values, as signatures see it.
fn headers<'a>(lines: impl Iterator<Item = &'a str>) -> HashMap<String, String> {
    let mut headers: HashMap<String, String> = HashMap::new();
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        headers
            .entry(name.to_ascii_lowercase())
            .and_modify(|values| *values += &format!(",{}", value.trim()))
            .or_insert_with(|| value.trim().to_owned());
    }
    headers
}

/// `None` to close the connection.
async fn answer<S: AsyncWrite + Unpin>(stream: &mut S, reply: Reply) -> Option<()> {
    let mut head = format!("HTTP/1.1 {} Reason\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!(
        "Content-Length: {}\r\n\r\n",
        reply.length.unwrap_or(reply.body.len())
    );
    stream.write_all(head.as_bytes()).await.ok()?;
    let end = reply
        .cut
        .or(reply.stall)
        .unwrap_or(usize::MAX)
        .min(reply.body.len());
    match reply.drip {
        None => stream.write_all(&reply.body[..end]).await.ok()?,
        Some(pause) => {
            for byte in &reply.body[..end] {
                stream.write_all(&[*byte]).await.ok()?;
                stream.flush().await.ok()?;
                tokio::time::sleep(pause).await;
            }
        }
    }
    stream.flush().await.ok()?;
    if reply.stall.is_some() {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    (reply.cut.is_none() && reply.stall.is_none() && reply.length.is_none()).then_some(())
}
