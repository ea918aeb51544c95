//! A `rafs serve` process: the registry that images are loaded from, and the account of what it was asked for.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::config::REPOSITORY;
use crate::http::{self, Answer};

const PATIENCE: Duration = Duration::from_secs(60);

/// A running registry. It is killed when this is dropped.
pub struct Registry {
    process: Child,
    address: SocketAddr,
    /// Kept open: it may have more to say.
    _stdout: BufReader<ChildStdout>,
    /// Holds its log.
    _directory: TempDir,
}

/// What a registry was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Number of requests.
    pub requests: u64,
    /// Bytes of the bodies that it sent.
    pub bytes: u64,
}

impl std::ops::Sub for Traffic {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            requests: self.requests - earlier.requests,
            bytes: self.bytes - earlier.bytes,
        }
    }
}

impl Registry {
    /// Serves the images in `images` on a free port of this host, each answer delayed by `latency`.
    pub fn start(rafs: &Path, images: &Path, latency: Duration) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("registry-").tempdir()?;
        let log = directory.path().join("log");
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(rafs)
            .arg("serve")
            .arg(images)
            .args([
                "--listen",
                "127.0.0.1:0",
                "--latency",
                &latency.as_millis().to_string(),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log)?)
            .spawn()
            .with_context(|| format!("start {}", rafs.display()))?;
        // It says where it listens, once it does.
        let mut first = String::new();
        let mut stdout = BufReader::new(
            process
                .stdout
                .take()
                .context("rafs serve has no standard output")?,
        );
        stdout.read_line(&mut first)?;
        match first.trim().parse() {
            Ok(address) => Ok(Self {
                process,
                address,
                _stdout: stdout,
                _directory: directory,
            }),
            Err(_) => {
                let _ = process.kill();
                let status = process.wait()?;
                bail!(
                    "rafs serve ended ({status}) and said:\n{first}{}",
                    fs::read_to_string(log)?
                )
            }
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it was asked for so far.
    pub fn traffic(&self) -> Result<Traffic> {
        let body = self.get("/_requests")?.text()?;
        let counts: Value = serde_json::from_str(&body)?;
        let count = |name: &str| {
            counts
                .get(name)
                .and_then(Value::as_u64)
                .with_context(|| format!("no {name} in {body}"))
        };
        Ok(Traffic {
            requests: count("requests")?,
            bytes: count("bytes")?,
        })
    }

    /// Fetches a whole blob in one request, as an image puller does, and writes it to `out`.
    pub fn download(&self, digest: &str, out: &mut impl Write) -> Result<u64> {
        let mut body = self.get(&format!("/v2/{REPOSITORY}/blobs/sha256:{digest}"))?.body;
        let length = body.limit();
        let copied = std::io::copy(&mut body, out)?;
        ensure!(
            copied == length,
            "blob sha256:{digest}: {copied} of {length} bytes came"
        );
        Ok(copied)
    }

    /// The answer to a GET request that must succeed.
    fn get(&self, target: &str) -> Result<Answer<TcpStream>> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let answer = http::request(stream, "GET", target, None)?;
        match answer.status {
            200 => Ok(answer),
            status => bail!("GET {target}: {status} {}", answer.text()?),
        }
    }

    /// Stops it; its port is free afterwards.
    pub fn stop(mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
