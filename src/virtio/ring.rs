//! One split virtqueue (VIRTIO 1.3, 2.7): what the front-end set up, what is popped, what is used.
//!
//! A [`Ring`] is shared by its queue thread, by the threads that complete requests later, and by the control
//! thread. Its lock is held for a pop or a completion, never while a request is executed. Popped requests are
//! either *active*: some thread may touch their guest memory, or *parked*: none may. A drain waits for the
//! active ones; parked ones can only become active while the ring runs.

mod signals;
mod view;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

pub use self::view::Addresses;
use self::view::View;
use super::chain::{self, ChainError};
use super::memory::{Buffers, GuestMemory};
use crate::metrics::Metrics;

#[derive(Default)]
struct State {
    // What the front-end set.
    size: u16,
    addresses: Option<Addresses>,
    memory: Option<Arc<GuestMemory>>,
    event_idx: bool,
    started: bool,
    enabled: bool,
    /// Being stopped: nothing is popped, but what was popped may be completed.
    stopping: bool,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    // What follows from it.
    view: Option<View>,
    // Progress.
    next_available: u16,
    next_used: u16,
    /// The used index when the driver was last considered for a signal; none after a start.
    signalled: Option<u16>,
    /// Heads popped and not used yet.
    in_flight: u32,
    /// Of these, those whose guest memory may be touched now.
    active: u32,
    /// The driver has more in flight than the ring has descriptors; somebody must look again.
    starved: bool,
    /// Counts stops that had to leave requests behind.
    epoch: u32,
}

/// A popped head, as its ring knows it.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    descriptor: u16,
    epoch: u32,
}

impl State {
    fn running(&self) -> bool {
        self.started && self.enabled
    }

    fn resolve(&mut self) {
        self.view = match (&self.memory, self.addresses) {
            (Some(memory), Some(addresses)) if self.size > 0 => View::new(memory, addresses, self.size).ok(),
            _ => None,
        };
    }
}

/// What a look at the available ring found.
pub enum Popped {
    /// A chain; its buffers are filled in.
    Chain {
        /// Its first descriptor.
        head: Head,
        /// Whether the chain is well formed. If not, it still has to be completed.
        valid: Result<(), ChainError>,
    },
    /// Nothing to do.
    Empty,
}

/// A ring and its lock.
pub struct Ring {
    index: u16,
    state: Mutex<State>,
    /// Signalled when `active` or `in_flight` falls while somebody drains.
    calmed: Condvar,
    draining: AtomicBool,
    /// Wakes the queue thread.
    wake: OwnedFd,
    metrics: Arc<Metrics>,
}

impl Ring {
    /// Ring number `index`, of at most `size` descriptors; `wake` is an eventfd that the queue thread waits for.
    pub fn new(index: u16, size: u16, wake: OwnedFd, metrics: Arc<Metrics>) -> Self {
        Ring {
            index,
            state: Mutex::new(State {
                size,
                ..State::default()
            }),
            calmed: Condvar::new(),
            draining: AtomicBool::new(false),
            wake,
            metrics,
        }
    }

    /// Its number; 0 is the high-priority queue.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its descriptors.
    pub fn size(&self) -> u16 {
        self.state.lock().size
    }

    /// The eventfd that wakes the queue thread.
    pub fn wake_fd(&self) -> &OwnedFd {
        &self.wake
    }

    /// Wakes the queue thread.
    pub fn wake(&self) {
        notify(&self.wake);
    }

    // Set-up, by the control thread.

    /// SET_VRING_NUM.
    pub fn set_size(&self, size: u16) {
        let mut state = self.state.lock();
        state.size = size;
        state.resolve();
    }

    /// SET_VRING_ADDR. The used index is taken from the ring: the front-end has no message for it.
    pub fn set_addresses(&self, addresses: Addresses) -> bool {
        let mut state = self.state.lock();
        state.addresses = Some(addresses);
        state.resolve();
        let used = state.view.as_ref().map(View::used_index);
        if let Some(used) = used {
            state.next_used = used;
        }
        used.is_some()
    }

    /// SET_VRING_BASE.
    pub fn set_base(&self, base: u16) {
        self.state.lock().next_available = base;
    }

    /// The next available index, for GET_VRING_BASE.
    pub fn base(&self) -> u16 {
        self.state.lock().next_available
    }

    /// SET_VRING_CALL.
    pub fn set_call(&self, call: Option<OwnedFd>) {
        let mut state = self.state.lock();
        state.call = call;
        // What was used before the driver could be told, it must be told now.
        if state.running() && state.call.is_some() {
            self.signal(&mut state, true);
        }
    }

    /// SET_VRING_ERR.
    pub fn set_error(&self, error: Option<OwnedFd>) {
        self.state.lock().error = error;
    }

    /// The guest's memory has changed: look for the ring's parts in the new one.
    pub fn set_memory(&self, memory: Option<Arc<GuestMemory>>) {
        let mut state = self.state.lock();
        state.memory = memory;
        state.resolve();
    }

    /// Negotiation of VIRTIO_RING_F_EVENT_IDX.
    pub fn set_event_idx(&self, event_idx: bool) {
        self.state.lock().event_idx = event_idx;
    }

    /// Started by a kick descriptor, stopped by GET_VRING_BASE.
    pub fn set_started(&self, started: bool) {
        let mut state = self.state.lock();
        if started && !state.started {
            state.signalled = None;
        }
        state.started = started;
        drop(state);
        self.wake();
    }

    /// SET_VRING_ENABLE.
    pub fn set_enabled(&self, enabled: bool) {
        self.state.lock().enabled = enabled;
        self.wake();
    }

    /// Whether parked requests may be completed now.
    pub fn can_complete(&self) -> bool {
        let state = self.state.lock();
        state.running() || state.stopping
    }

    /// GET_VRING_BASE, before and after the drain.
    pub fn set_stopping(&self, stopping: bool) {
        self.state.lock().stopping = stopping;
    }

    /// Where events of this ring are counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Waits until no active request is left, or with `all`, until no request is left at all. The ring must have
    /// been stopped or disabled before. Returns whether that came true by the deadline.
    pub fn drain(&self, all: bool, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        self.draining.store(true, Ordering::SeqCst);
        let busy = |state: &State| state.active > 0 || (all && state.in_flight > 0);
        while busy(&state) && !self.calmed.wait_until(&mut state, deadline).timed_out() {}
        self.draining.store(false, Ordering::SeqCst);
        !busy(&state)
    }

    /// Heads popped and not used.
    pub fn in_flight(&self) -> u32 {
        self.state.lock().in_flight
    }

    // The life of a request.

    /// Takes the next available chain, whose buffers replace those in `buffers`.
    pub fn pop(&self, buffers: &mut Option<Buffers>) -> Popped {
        let mut state = self.state.lock();
        let state = &mut *state;
        let Some(view) = state.view.as_ref().filter(|_| state.started && state.enabled) else {
            return Popped::Empty;
        };
        let pending = view.available_index().wrapping_sub(state.next_available);
        if pending == 0 {
            return Popped::Empty;
        }
        if pending > view.size {
            // No driver gets there. Take what can be taken; the ring makes no sense, but it harms only its owner.
            self.metrics.malformed();
            if let Some(error) = &state.error {
                notify(error);
            }
        }
        if state.in_flight >= u32::from(view.size) {
            state.starved = true;
            return Popped::Empty;
        }
        let descriptor = view.head(state.next_available);
        state.next_available = state.next_available.wrapping_add(1);
        state.in_flight += 1;
        state.active += 1;
        let memory = view.descriptors.memory();
        let buffers = match buffers {
            Some(buffers) => {
                buffers.reset(memory);
                buffers
            }
            None => buffers.insert(Buffers::new(Arc::clone(memory))),
        };
        let valid = match descriptor < view.size {
            true => chain::walk(&view.descriptors, view.size, descriptor, buffers),
            false => Err(ChainError::BadIndex(descriptor)),
        };
        self.metrics.popped();
        Popped::Chain {
            head: Head {
                descriptor,
                epoch: state.epoch,
            },
            valid,
        }
    }

    /// Returns an active request's head, with `length` bytes written. Does not signal.
    pub fn complete(&self, head: Head, length: u32) {
        let mut state = self.state.lock();
        if head.epoch == state.epoch {
            self.use_head(&mut state, head.descriptor, length);
            state.active -= 1;
            self.settle(state);
        }
    }

    fn use_head(&self, state: &mut State, descriptor: u16, length: u32) {
        if let Some(view) = &state.view {
            view.add_used(state.next_used, descriptor, length);
        }
        self.metrics.used();
        state.next_used = state.next_used.wrapping_add(1);
        state.in_flight -= 1;
        if state.starved {
            state.starved = false;
            self.wake();
        }
    }

    /// An active request will be completed later: from now on its guest memory is not touched.
    pub fn park(&self, head: Head) {
        let mut state = self.state.lock();
        if head.epoch == state.epoch {
            state.active -= 1;
            self.settle(state);
        }
    }

    /// A parked request is about to be completed. False if it may not be now.
    pub fn unpark(&self, head: Head) -> bool {
        let mut state = self.state.lock();
        let allowed = head.epoch == state.epoch && (state.running() || state.stopping);
        if allowed {
            state.active += 1;
        }
        allowed
    }

    /// A parked request will never be completed: there is nobody who waits for it.
    pub fn abandon(&self, head: Head) {
        let mut state = self.state.lock();
        if head.epoch == state.epoch {
            state.in_flight -= 1;
            self.settle(state);
        }
    }

    /// What is still in flight after a drain will not be completed: its descriptors are the driver's again.
    pub fn forget_in_flight(&self) {
        let mut state = self.state.lock();
        state.epoch = state.epoch.wrapping_add(1);
        (state.in_flight, state.active, state.starved) = (0, 0, false);
    }

    fn settle(&self, state: MutexGuard<'_, State>) {
        if self.draining.load(Ordering::Relaxed) {
            drop(state);
            self.calmed.notify_all();
        }
    }
}

/// Adds one to an eventfd.
pub fn notify(event: &impl AsFd) {
    // The only errors are a full counter, which also wakes, and a descriptor that the front-end chose badly.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}
