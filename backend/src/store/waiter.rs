//! Somebody who asked for chunks: told exactly once, by the last chunk, the first failure or the timer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::{Completion, FetchError, Held};
use crate::cache::Ledger;

/// How a chunk arrived.
#[derive(Clone)]
pub(crate) enum Arrival {
    /// In the cache file, under this version.
    Resident(u32),
    /// In memory.
    Held(Arc<[u8]>),
}

/// Chunks that stay in the cache for those who asked for them. Ends with its drop, or by itself after some seconds.
pub struct Lease {
    ledger: Arc<Ledger>,
    chunks: Vec<(u32, u32)>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        for (index, version) in &self.chunks {
            self.ledger.release(*index, *version);
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lease({} chunks)", self.chunks.len())
    }
}

/// Somebody who asked for chunks. Told exactly once.
pub(crate) struct Waiter {
    blob_id: String,
    pending: Mutex<Option<Pending>>,
}

struct Pending {
    remaining: usize,
    held: Held,
    lease: Option<Lease>,
    last_error: Option<String>,
    timer: Option<AbortHandle>,
    done: Completion,
}

impl Waiter {
    /// With a ledger, what arrives is leased.
    pub(super) fn new(
        blob_id: &str,
        remaining: usize,
        ledger: Option<&Arc<Ledger>>,
        done: Completion,
    ) -> Arc<Self> {
        let pending = Pending {
            remaining,
            held: Held::default(),
            lease: ledger.map(|ledger| Lease {
                ledger: Arc::clone(ledger),
                chunks: Vec::new(),
            }),
            last_error: None,
            timer: None,
            done,
        };
        Arc::new(Self {
            blob_id: blob_id.to_owned(),
            pending: Mutex::new(Some(pending)),
        })
    }

    /// Starts the timer that ends the wait at `deadline`.
    pub(super) fn limit(self: &Arc<Self>, runtime: &Handle, deadline: Instant) {
        let waiter = Arc::downgrade(self);
        let started = Instant::now();
        let timer = runtime.spawn(async move {
            tokio::time::sleep_until(deadline.into()).await;
            if let Some(waiter) = waiter.upgrade() {
                waiter.time_out(started.elapsed());
            }
        });
        match &mut *self.pending.lock() {
            Some(pending) => pending.timer = Some(timer.abort_handle()),
            None => timer.abort(),
        }
    }

    pub(super) fn live(&self) -> bool {
        self.pending.lock().is_some()
    }

    /// One of the chunks is there.
    pub(super) fn arrived(&self, index: u32, what: Arrival) {
        let mut slot = self.pending.lock();
        let Some(pending) = slot.as_mut() else { return };
        match what {
            Arrival::Resident(version) => {
                if let Some(lease) = &mut pending.lease {
                    lease.ledger.lease(index, version);
                    lease.chunks.push((index, version));
                }
            }
            Arrival::Held(data) => pending.held.chunks.push((index, data)),
        }
        pending.remaining = pending.remaining.saturating_sub(1);
        if pending.remaining > 0 {
            return;
        }
        let finished = slot.take();
        drop(slot);
        if let Some(mut finished) = finished {
            let mut held = std::mem::take(&mut finished.held);
            held.lease = finished.lease.take().map(Arc::new);
            finished.finish(Ok(held));
        }
    }

    /// Remembers why it takes so long.
    pub(super) fn note(&self, error: &str) {
        if let Some(pending) = self.pending.lock().as_mut() {
            pending.last_error = Some(error.to_owned());
        }
    }

    /// Why it takes so long, if that is known.
    pub(super) fn last_error(&self) -> Option<String> {
        self.pending.lock().as_ref()?.last_error.clone()
    }

    pub(super) fn fail(&self, error: FetchError) {
        let pending = self.pending.lock().take();
        if let Some(pending) = pending {
            pending.finish(Err(error));
        }
    }

    pub(super) fn time_out(&self, waited: Duration) {
        let pending = self.pending.lock().take();
        if let Some(pending) = pending {
            let last = pending.last_error.as_deref().unwrap_or("no answer yet");
            let reason = format!("not there after {:.1} s: {last}", waited.as_secs_f64());
            let error = FetchError {
                blob_id: self.blob_id.clone(),
                reason,
                timed_out: true,
            };
            pending.finish(Err(error));
        }
    }
}

impl Pending {
    pub(super) fn finish(self, outcome: Result<Held, FetchError>) {
        if let Some(timer) = &self.timer {
            timer.abort();
        }
        (self.done)(outcome);
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.get_mut().take() {
            pending.finish(Err(FetchError::new(&self.blob_id, "the store gave the fetch up")));
        }
    }
}
