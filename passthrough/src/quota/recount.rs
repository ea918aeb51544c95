//! Counting afresh while the tree is in use.
//!
//! What a walk has found is worth something if nothing that it counts has changed meanwhile by way of this mount: then it
//! takes the place of what was known. If the guest was busy, what is known of its own changes is exact anyway, and the
//! walk is made again later.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Account;
use crate::config::ThreadStart;

/// A count is made this often even if nobody asks.
const PERIOD: Duration = Duration::from_secs(600);
/// Shortest rest after a count.
const REST: Duration = Duration::from_secs(1);
/// Rest after a count, in times that it took: 5 % of a processor at most.
const REST_TIMES: u32 = 20;

/// What the counting thread is told.
#[derive(Debug, Default)]
pub(super) struct Wish {
    wanted: bool,
    stop: bool,
}

impl Account {
    pub(super) fn wish_recount(&self) {
        self.wish.lock().wanted = true;
        self.wished.notify_one();
    }

    /// Counts afresh. Returns whether that was of use: the guest has changed nothing meanwhile.
    pub(crate) fn recount(&self) -> io::Result<bool> {
        let before = self.ledger.lock().changes;
        let count = self.count()?;
        // No change is under way, so whatever was changed has been entered.
        let _alone = self.gate.write();
        if self.ledger.lock().changes != before {
            return Ok(false);
        }
        self.charges.rebase(&count.charged);
        let mut ledger = self.ledger.lock();
        let nameless = ledger.nameless;
        ledger.used = count.total;
        ledger.used.add(nameless);
        Ok(true)
    }

    fn serve_recounts(&self) {
        let mut wish = self.wish.lock();
        while !wish.stop {
            if !wish.wanted {
                self.wished.wait_for(&mut wish, PERIOD);
            }
            if wish.stop {
                return;
            }
            wish.wanted = false;
            let started = Instant::now();
            let counted = parking_lot::MutexGuard::unlocked(&mut wish, || self.recount());
            match counted {
                Ok(true) => {}
                // The guest was busy. It may be less so later.
                Ok(false) => wish.wanted = true,
                Err(error) => tracing::debug!(%error, "the use of a quota was not counted"),
            }
            let rested = Instant::now() + (started.elapsed() * REST_TIMES).max(REST);
            while !wish.stop && !self.wished.wait_until(&mut wish, rested).timed_out() {}
        }
    }
}

/// The thread that counts afresh; ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Recounter {
    account: Arc<Account>,
    thread: Option<JoinHandle<()>>,
}

impl Recounter {
    pub(crate) fn start(account: Arc<Account>, start: &ThreadStart) -> io::Result<Self> {
        let (counted, start) = (account.clone(), start.clone());
        let thread = std::thread::Builder::new().name("quota".into()).spawn(move || {
            (start.0)();
            counted.serve_recounts();
        })?;
        Ok(Recounter {
            account,
            thread: Some(thread),
        })
    }
}

impl Drop for Recounter {
    fn drop(&mut self) {
        self.account.stop.store(true, Ordering::Relaxed);
        self.account.wish.lock().stop = true;
        self.account.wished.notify_one();
        if let Some(thread) = self.thread.take() {
            // The thread has no panic to report that it has not printed.
            thread.join().ok();
        }
    }
}
