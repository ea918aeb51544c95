//! Waits for locks that others hold.
//!
//! Taking such a request out of the table is not enough to end it, for the lock may just have been taken: whoever wants
//! the wait to end says so to the one who keeps the locks, and it is his word that takes the request out.

use std::sync::{Arc, Weak};

use passthrough::LockDone;

use super::Deferred;
use super::entry::{Answer, Entry, LockEnd, LockWait, Wait};
use crate::fuse::errno::Errno;
use crate::mounts::{CancelLock, Mount};
use crate::virtio::request::Request;
use crate::virtio::ring::Ring;

/// Of the descriptors of a ring, the part that may wait for locks: one in so many. Were it all of them, the driver
/// could not ask for the unlocking that they wait for.
const LOCK_SHARE: usize = 4;

impl Deferred {
    /// Puts a request for a lock aside. `start` begins to wait: it is given what to call once with the outcome, and
    /// returns how to end the wait early if there is one.
    pub fn park_lock<S>(&self, request: Request<'_>, mount: &Arc<Mount>, start: S)
    where
        S: FnOnce(LockDone) -> Option<CancelLock>,
    {
        if self.lock_waits(request.ring()) >= usize::from(request.ring().size()) / LOCK_SHARE {
            return request.fail(libc::ENOLCK);
        }
        let wait = Wait {
            mount: Some(Arc::clone(mount)),
            lock: Some(LockWait::default()),
            // How long a lock is held by others says nothing about the mount.
            meter: None,
            ..Wait::on(Some(mount))
        };
        let Some(id) = self.put_aside(request, Some(mount), wait) else {
            return;
        };
        self.metrics.parked();
        let this = Weak::clone(&self.this);
        let cancel = start(Box::new(move |outcome| {
            if let Some(this) = this.upgrade() {
                this.lock_decided(id, outcome);
            }
        }));
        let Some(cancel) = cancel else { return };
        let ended = {
            let mut state = self.state.lock();
            let lock = state
                .entries
                .get_mut(&id)
                .and_then(|entry| entry.wait.lock.as_mut());
            lock.is_some_and(|lock| {
                lock.cancel = Some(Arc::clone(&cancel));
                lock.end.is_some()
            })
        };
        if ended {
            cancel();
        }
    }

    fn lock_waits(&self, ring: &Arc<Ring>) -> usize {
        let state = self.state.lock();
        let waits = |entry: &&Entry| entry.wait.lock.is_some() && Arc::ptr_eq(entry.parked.ring(), ring);
        state.entries.values().filter(waits).count()
    }

    /// The keeper of the locks has decided on request `id`.
    fn lock_decided(&self, id: u64, outcome: std::io::Result<()>) {
        let entry = self.state.lock().entries.remove(&id);
        let Some(mut entry) = entry else { return };
        let end = entry.wait.lock.take().and_then(|lock| lock.end);
        match (outcome, end) {
            (_, Some(LockEnd::Abandon)) => entry.parked.abandon(),
            (Ok(()), _) => self.answer(id, entry, Answer::Body(Vec::new())),
            (Err(_), Some(LockEnd::Fail(errno))) => self.answer(id, entry, Answer::Errno(errno)),
            (Err(error), None) => self.answer(id, entry, Answer::Errno(error.into())),
        }
    }

    /// Ends the waits for locks that are `wanted`; each is taken out when the keeper of the locks says so.
    pub(super) fn end_lock_waits(&self, wanted: impl Fn(&Entry) -> bool, end: LockEnd) {
        let mut state = self.state.lock();
        let cancels: Vec<CancelLock> = state
            .entries
            .values_mut()
            .filter(|entry| wanted(entry))
            .filter_map(|entry| entry.wait.lock.as_mut())
            .filter_map(|lock| {
                lock.end = Some(end);
                lock.cancel.clone()
            })
            .collect();
        drop(state);
        for cancel in cancels {
            cancel();
        }
    }

    /// Answers `EIO` to what waits for locks on `ring`, which is being stopped: they may be held for ever.
    pub fn fail_locks(&self, ring: &Arc<Ring>) {
        let of_ring = |entry: &Entry| Arc::ptr_eq(entry.parked.ring(), ring);
        self.end_lock_waits(of_ring, LockEnd::Fail(Errno::IO));
    }
}
