//! The account of what was asked for and sent.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::ServeError;

/// Requests that are remembered.
const KEPT: usize = 65_536;

/// A registry request and its answer.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Request {
    /// When it came, in seconds since the epoch.
    pub time: f64,
    /// Method.
    pub method: String,
    /// Path.
    pub path: String,
    /// Value of its `Range` header.
    pub range: Option<String>,
    /// Status of the answer.
    pub status: u16,
    /// Bytes of the body that were sent.
    pub bytes: u64,
}

/// All requests of a server.
pub(super) struct Records {
    kept: Mutex<VecDeque<Arc<Kept>>>,
    count: AtomicU64,
    bytes: AtomicU64,
    log: Option<Arc<Mutex<File>>>,
}

struct Kept {
    request: Request,
    bytes: AtomicU64,
}

impl Kept {
    fn snapshot(&self) -> Request {
        Request {
            bytes: self.bytes.load(Ordering::Relaxed),
            ..self.request.clone()
        }
    }
}

impl Records {
    pub(super) fn new(log: Option<PathBuf>) -> Result<Self, ServeError> {
        let open = |path: PathBuf| {
            File::options()
                .create(true)
                .append(true)
                .open(&path)
                .map(|file| Arc::new(Mutex::new(file)))
                .map_err(|source| ServeError::File {
                    action: "write the request log",
                    path,
                    source,
                })
        };
        Ok(Self {
            kept: Mutex::default(),
            count: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            log: log.map(open).transpose()?,
        })
    }

    /// Notes an answer that is about to be sent.
    pub(super) fn begin(
        self: &Arc<Self>,
        time: SystemTime,
        method: &str,
        path: &str,
        range: Option<String>,
        status: u16,
    ) -> Recording {
        let time = time
            .duration_since(UNIX_EPOCH)
            .map_or(0.0, |since| since.as_secs_f64());
        let request = Request {
            time,
            method: method.to_owned(),
            path: path.to_owned(),
            range,
            status,
            bytes: 0,
        };
        let kept = Arc::new(Kept {
            request,
            bytes: AtomicU64::new(0),
        });
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut list = self.kept.lock();
        if list.len() == KEPT {
            list.pop_front();
        }
        list.push_back(kept.clone());
        Recording {
            records: self.clone(),
            kept,
        }
    }

    pub(super) fn list(&self) -> Vec<Request> {
        self.kept.lock().iter().map(|kept| kept.snapshot()).collect()
    }

    /// Number of requests and bytes.
    pub(super) fn totals(&self) -> (u64, u64) {
        (
            self.count.load(Ordering::Relaxed),
            self.bytes.load(Ordering::Relaxed),
        )
    }

    pub(super) fn clear(&self) {
        self.kept.lock().clear();
        self.count.store(0, Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
    }
}

/// One answer while it is being sent; dropped with it, which writes the line of the log.
pub(super) struct Recording {
    records: Arc<Records>,
    kept: Arc<Kept>,
}

impl Recording {
    /// So many more bytes of the body go out.
    pub(super) fn sent(&self, bytes: u64) {
        self.kept.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.records.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let Some(log) = &self.records.log
            && let Ok(mut line) = serde_json::to_vec(&self.kept.snapshot())
        {
            line.push(b'\n');
            // A full disk must not stop the registry; the account in memory is complete.
            let _ = log.lock().write_all(&line);
        }
    }
}
