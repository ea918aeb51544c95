//! A `rafs serve` process: the registry that images are loaded from, and the account of what it was asked for.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::config::REPOSITORY;

const PATIENCE: Duration = Duration::from_secs(60);

/// A running registry. It is killed when this is dropped.
pub struct Registry {
    process: Child,
    address: SocketAddr,
    directory: TempDir,
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
        // Free a moment ago: the registry has it to itself in all but the unluckiest case, and then says so.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let log = fs::File::create(directory.path().join("log"))?;
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(rafs)
            .arg("serve")
            .arg(images)
            .args([
                "--listen",
                &address.to_string(),
                "--latency",
                &latency.as_millis().to_string(),
            ])
            .arg("--request-log")
            .arg(directory.path().join("requests"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", rafs.display()))?;
        let mut registry = Self {
            process,
            address,
            directory,
        };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            let said = || fs::read_to_string(registry.directory.path().join("log")).unwrap_or_default();
            if let Some(status) = registry.process.try_wait()? {
                bail!("rafs serve ended ({status}) and said:\n{}", said());
            }
            ensure!(
                Instant::now() < deadline,
                "rafs serve does not listen; it said:\n{}",
                said()
            );
            thread::sleep(Duration::from_millis(2));
        }
        Ok(registry)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it was asked for so far.
    pub fn traffic(&self) -> Result<Traffic> {
        let path = self.directory.path().join("requests");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let mut traffic = Traffic::default();
        for line in text.lines() {
            let bytes = bytes_sent(line).with_context(|| format!("not a line of a request log: {line:?}"))?;
            traffic.requests += 1;
            traffic.bytes += bytes;
        }
        Ok(traffic)
    }

    /// Fetches a whole blob in one request, as an image puller does, and writes it to `out`.
    pub fn download(&self, digest: &str, out: &mut impl Write) -> Result<u64> {
        let mut stream = TcpStream::connect(self.address)?;
        write!(
            stream,
            "GET /v2/{REPOSITORY}/blobs/sha256:{digest} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            self.address
        )?;
        let mut answer = BufReader::new(stream);
        let mut status = String::new();
        answer.read_line(&mut status)?;
        ensure!(
            status.split(' ').nth(1) == Some("200"),
            "blob sha256:{digest}: {}",
            status.trim()
        );
        let mut length = None;
        loop {
            let mut line = String::new();
            answer.read_line(&mut line)?;
            match line.trim_end().split_once(':') {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = Some(value.trim().parse::<u64>()?);
                }
                Some(_) => {}
                None => break,
            }
        }
        let length = length.context("the registry names no length")?;
        let copied = std::io::copy(&mut answer.take(length), out)?;
        ensure!(
            copied == length,
            "blob sha256:{digest}: {copied} of {length} bytes came"
        );
        Ok(copied)
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

/// The number of bytes that a line of the request log says were sent.
fn bytes_sent(line: &str) -> Option<u64> {
    line.split_whitespace().last()?.parse().ok()
}
