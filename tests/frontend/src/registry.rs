//! A registry that serves blobs, and fails as it is told to.
//!
//! `GET /v2/REPO/blobs/ID` with `Range`, over HTTP/1.1 on a loopback port. Every request, connection and
//! byte is counted.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{Error, Result};

/// What the registry does wrong at present.
#[derive(Clone, Debug, Default)]
pub struct Fault {
    /// Accept requests and do not answer them.
    pub stalled: bool,
    /// Wait before every answer.
    pub latency: Duration,
    /// Answer every blob request with this status.
    pub status: Option<u16>,
    /// Flip the lowest bit of the byte at this offset of every blob.
    pub flip: Option<u64>,
}

#[derive(Default)]
struct State {
    blobs: HashMap<String, Vec<u8>>,
    fault: Mutex<Fault>,
    changed: Condvar,
    gone: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
    connections: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl State {
    fn fault(&self) -> MutexGuard<'_, Fault> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A registry on a loopback port. Ends when dropped.
pub struct Registry {
    /// Where it listens.
    pub address: SocketAddr,
    state: Arc<State>,
}

/// Name of the one repository.
pub const REPOSITORY: &str = "team/app";

impl Registry {
    /// Serves the files of `directory`, each under its name.
    pub fn start(directory: &Path) -> Result<Self> {
        let mut blobs = HashMap::new();
        let read = |e| Error::io(format!("read blobs in {}", directory.display()), e);
        for file in std::fs::read_dir(directory).map_err(read)?.flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            blobs.insert(name, std::fs::read(file.path()).map_err(read)?);
        }
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| Error::io("listen", e))?;
        let address = listener.local_addr().map_err(|e| Error::io("listen", e))?;
        let state = Arc::new(State {
            blobs,
            ..State::default()
        });
        let serving = state.clone();
        std::thread::spawn(move || accept(&listener, &serving));
        Ok(Self { address, state })
    }

    /// Changes what goes wrong.
    pub fn set(&self, change: impl FnOnce(&mut Fault)) {
        change(&mut self.state.fault());
        self.state.changed.notify_all();
    }

    /// Goes away for good: closes all connections and refuses new ones.
    pub fn vanish(&self) {
        if self.state.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        self.state.changed.notify_all();
        // Wakes the acceptor, which then drops the listener.
        let _ = TcpStream::connect(self.address);
        for stream in self
            .state
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(..)
        {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Requests for blobs so far.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::Relaxed)
    }

    /// Bytes of blobs sent so far.
    pub fn bytes(&self) -> u64 {
        self.state.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.vanish();
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    for stream in listener.incoming().flatten() {
        if state.gone.load(Ordering::Acquire) {
            return;
        }
        state.connections.fetch_add(1, Ordering::Relaxed);
        if let Ok(copy) = stream.try_clone() {
            state
                .open
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(copy);
        }
        let state = state.clone();
        std::thread::spawn(move || {
            // A client that goes away is none of our business.
            let _ = converse(&stream, &state);
            let _ = stream.shutdown(Shutdown::Both);
        });
    }
}

fn converse(stream: &TcpStream, state: &State) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split(' ');
        let (method, target) = (
            words.next().unwrap_or("").to_owned(),
            words.next().unwrap_or("").to_owned(),
        );
        let mut range = None;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 {
                return Ok(());
            }
            let header = header.trim();
            if header.is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("range")
            {
                range = parse_range(value.trim());
            }
        }
        answer(stream, state, &method, &target, range)?;
    }
}

fn parse_range(value: &str) -> Option<(usize, Option<usize>)> {
    let (from, to) = value.strip_prefix("bytes=")?.split_once('-')?;
    Some((from.parse().ok()?, to.parse().ok()))
}

fn answer(
    mut stream: &TcpStream,
    state: &State,
    method: &str,
    target: &str,
    range: Option<(usize, Option<usize>)>,
) -> std::io::Result<()> {
    let path = target.split('?').next().unwrap_or(target);
    let blob = path
        .strip_prefix(&format!("/v2/{REPOSITORY}/blobs/"))
        .and_then(|id| state.blobs.get(id.strip_prefix("sha256:").unwrap_or(id)));
    let Some(blob) = blob else {
        let status = if path == "/v2/" { "200 OK" } else { "404 Not Found" };
        return write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
    };
    state.requests.fetch_add(1, Ordering::Relaxed);
    let fault = {
        let mut fault = state.fault();
        while fault.stalled && !state.gone.load(Ordering::Acquire) {
            fault = state.changed.wait(fault).unwrap_or_else(PoisonError::into_inner);
        }
        fault.clone()
    };
    std::thread::sleep(fault.latency);
    if let Some(status) = fault.status {
        return write!(stream, "HTTP/1.1 {status} Fault\r\nContent-Length: 0\r\n\r\n");
    }
    let (from, to) = match range {
        Some((from, to)) => (from, to.map_or(blob.len(), |last| (last + 1).min(blob.len()))),
        None => (0, blob.len()),
    };
    if from >= to {
        return write!(
            stream,
            "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */{}\r\nContent-Length: 0\r\n\r\n",
            blob.len()
        );
    }
    let mut body = blob[from..to].to_vec();
    if let Some(at) = fault
        .flip
        .map(|at| at as usize)
        .filter(|at| (from..to).contains(at))
    {
        body[at - from] ^= 1;
    }
    let status = if range.is_some() {
        format!(
            "206 Partial Content\r\nContent-Range: bytes {from}-{}/{}",
            to - 1,
            blob.len()
        )
    } else {
        "200 OK".into()
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )?;
    if method != "HEAD" {
        state.bytes.fetch_add(body.len() as u64, Ordering::Relaxed);
        stream.write_all(&body)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn get(registry: &Registry, range: &str) -> String {
        let mut stream = TcpStream::connect(registry.address).unwrap();
        write!(
            stream,
            "GET /v2/team/app/blobs/sha256:one HTTP/1.1\r\nHost: x\r\nRange: {range}\r\n\r\n"
        )
        .unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn ranges_and_faults() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("one"), "abcdefgh").unwrap();
        let registry = Registry::start(directory.path()).unwrap();
        assert!(get(&registry, "bytes=2-4").ends_with("bytes 2-4/8\r\nContent-Length: 3\r\n\r\ncde"));
        registry.set(|fault| fault.flip = Some(3));
        assert!(get(&registry, "bytes=2-4").ends_with("cee"));
        assert!(get(&registry, "bytes=8-9").starts_with("HTTP/1.1 416"));
        registry.set(|fault| fault.status = Some(503));
        assert!(get(&registry, "bytes=0-").starts_with("HTTP/1.1 503"));
        assert_eq!(
            (registry.connections(), registry.requests(), registry.bytes()),
            (4, 4, 6)
        );
        registry.vanish();
        std::thread::sleep(Duration::from_millis(50));
        assert!(TcpStream::connect(registry.address).is_err());
    }
}
