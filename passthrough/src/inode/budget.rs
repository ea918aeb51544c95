//! How many descriptors may be held on behalf of guests.
//!
//! The limit of open files is the daemon's, not the guest's: a guest that looks up a million files or opens all it can
//! must not take the descriptors with which the daemon serves others. One budget, shared by any number of mounts,
//! covers both kinds of descriptors: those that must be held (open files, nodes without a file handle, lock owners),
//! and those that are kept because they save opening a node by its handle again. The second kind makes way for the
//! first, and among itself the one that was not used since the last round of a clock hand goes first.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::Inode;
use crate::sys::errno;

/// Most descriptors that a budget takes by itself from a generous limit of open files; each one keeps an inode of the
/// host in memory.
const DEFAULT_MAX: usize = 65_536;
/// Vacant places on the clock that are not worth clearing away.
const VACANT_MIN: usize = 64;
/// Fewest descriptors that a budget can be made with.
const MIN: usize = 16;

/// A number of descriptors that guests may hold.
#[derive(Debug)]
pub struct FdBudget {
    limit: usize,
    used: AtomicUsize,
    /// Nodes that keep a descriptor they could do without, in the order of the clock.
    kept: Mutex<VecDeque<Weak<Inode>>>,
    /// Places in `kept` whose node is gone, roughly.
    vacant: AtomicUsize,
}

impl FdBudget {
    /// A budget of `limit` descriptors, at least 16.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(FdBudget {
            limit: limit.max(MIN),
            used: AtomicUsize::new(0),
            kept: Mutex::new(VecDeque::new()),
            vacant: AtomicUsize::new(0),
        })
    }

    /// A budget of half of what the process may open, at most 65,536.
    pub fn of_process() -> Arc<Self> {
        let open_files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let half = open_files.map_or(usize::MAX, |limit| {
            usize::try_from(limit / 2).unwrap_or(usize::MAX)
        });
        Self::new(half.min(DEFAULT_MAX))
    }

    /// Descriptors that may be held.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Descriptors that are held.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Room for a descriptor that must be held, if need be that of one that need not. ENFILE: the guests hold all.
    pub(crate) fn take(self: &Arc<Self>) -> io::Result<Permit> {
        if self.reserve() {
            Ok(Permit(self.clone()))
        } else {
            Err(errno(libc::ENFILE))
        }
    }

    /// Counts one more descriptor, whose holder gives it back by [`Self::release`].
    pub(super) fn reserve(&self) -> bool {
        loop {
            let room = self
                .used
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                    (used < self.limit).then_some(used + 1)
                });
            if room.is_ok() {
                return true;
            }
            if !self.evict() {
                return false;
            }
        }
    }

    pub(super) fn release(&self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }

    /// As [`Self::release`], by a node that is gone. Its place on the clock keeps its memory, so vacant places are
    /// cleared away when they are the most.
    pub(super) fn release_kept(&self) {
        self.release();
        let vacant = self.vacant.fetch_add(1, Ordering::Relaxed) + 1;
        if vacant < VACANT_MIN {
            return;
        }
        // A thread that holds the lock may be the one that drops the node.
        if let Some(mut kept) = self.kept.try_lock()
            && vacant > kept.len() / 2
        {
            self.clear_vacant(&mut kept);
        }
    }

    fn clear_vacant(&self, kept: &mut VecDeque<Weak<Inode>>) {
        kept.retain(|place| place.upgrade().is_some_and(|inode| inode.keeps_descriptor()));
        kept.shrink_to(kept.len().saturating_mul(2));
        self.vacant.store(0, Ordering::Relaxed);
    }

    /// Puts `inode`, which has just got a descriptor that was reserved here, on the clock.
    pub(super) fn keep(&self, inode: &Arc<Inode>) {
        let mut kept = self.kept.lock();
        if kept.len() > self.limit.saturating_mul(2) {
            self.clear_vacant(&mut kept);
        }
        kept.push_back(Arc::downgrade(inode));
    }

    /// Closes one descriptor that need not be held; false if there is none that is not in use right now.
    fn evict(&self) -> bool {
        let mut kept = self.kept.lock();
        // Twice around: the first round may find every node used since it was last passed.
        for _ in 0..kept.len().saturating_mul(2) {
            let Some(place) = kept.pop_front() else {
                return false;
            };
            let Some(inode) = place.upgrade() else { continue };
            match inode.give_up_descriptor() {
                super::GaveUp::Closed => return true,
                super::GaveUp::HadNone => {}
                super::GaveUp::InUse => kept.push_back(place),
            }
        }
        false
    }
}

/// Room for one descriptor; returned when dropped, which must be after the descriptor is closed.
#[derive(Debug)]
pub(crate) struct Permit(Arc<FdBudget>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.release();
    }
}
