//! Who tells whom, and when nobody has to: signals to the driver, kicks from it, and how neither is lost.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::{Ring, State, notify};

impl Ring {
    /// Tells the driver of what was used since the last time, if it wants to be told.
    ///
    /// No signal is lost: we store the used index, then load the driver's wish; it stores its wish before it sleeps,
    /// then loads the used index; both have a full fence in between. So either it sees what was used and does not
    /// sleep, or we see its wish. Calls consider the used indexes one range after the other, without a gap, because
    /// the end of the last range is kept under the lock.
    ///
    /// Returns whether it was told.
    pub fn signal_used(&self) -> bool {
        let mut state = self.state.lock();
        self.signal(&mut state, false)
    }

    pub(super) fn signal(&self, state: &mut State, always: bool) -> bool {
        let new = state.next_used;
        let old = state.signalled.replace(new);
        if old == Some(new) && !always {
            return false;
        }
        let Some(view) = &state.view else { return false };
        // The used index must be visible before the driver's wish is read (VIRTIO 1.3, 2.7.10).
        fence(Ordering::SeqCst);
        let wanted = match (state.event_idx, old) {
            _ if always => true,
            (true, Some(old)) => {
                let event = view.used_event();
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            }
            (true, None) => true,
            (false, _) => u32::from(view.available_flags()) & VRING_AVAIL_F_NO_INTERRUPT == 0,
        };
        let call = state.call.as_ref().filter(|_| wanted);
        if let Some(call) = call {
            notify(call);
            self.metrics.signal();
        }
        call.is_some()
    }

    /// Whether a pop would find something. Nothing but a look: what it does not see, [`Ring::unmute`] will.
    pub fn has_available(&self) -> bool {
        let state = self.state.lock();
        state.running()
            && !state.starved
            && state
                .view
                .as_ref()
                .is_some_and(|view| view.available_index() != state.next_available)
    }

    /// Asks the driver not to kick, while the queue thread is awake anyway.
    ///
    /// It may kick all the same, and may be late to see the wish; nothing depends on it.
    pub fn mute(&self) {
        let state = self.state.lock();
        // With EVENT_IDX a stale event index has that effect: the driver kicks when the available index passes it,
        // which it did when it woke us and does not do again before 65,536 more requests.
        if let Some(view) = state
            .view
            .as_ref()
            .filter(|_| state.running() && !state.event_idx)
        {
            view.set_used_flags(VRING_USED_F_NO_NOTIFY as u16);
        }
    }

    /// Asks the driver to kick again. Returns whether something was made available in the meantime.
    ///
    /// No kick is lost: we store the wish, then load the available index; the driver stores the available index, then
    /// loads the wish; both have a full fence in between. So either we see its request here and do not sleep, or it
    /// sees our wish and kicks, which stays in the eventfd however late we come to wait for it.
    pub fn unmute(&self) -> bool {
        let state = self.state.lock();
        let Some(view) = state.view.as_ref().filter(|_| state.running()) else {
            return false;
        };
        match state.event_idx {
            true => view.set_available_event(state.next_available),
            false => view.set_used_flags(0),
        }
        // The wish must be visible before the available index is read again (VIRTIO 1.3, 2.7.10).
        fence(Ordering::SeqCst);
        view.available_index() != state.next_available && !state.starved
    }
}
