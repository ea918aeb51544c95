//! Admission of requests: who may ask a source now, and hold the memory for its answer.
//!
//! Every source has a lane. A request enters its lane with a priority and a size and waits, as a future, until the lane has
//! a free slot and the store has the memory. Three rules keep sources and priorities apart:
//!
//! * a lane that holds nothing is always admitted: no source starves because others sit on the memory;
//! * one lane holds at most half of the memory beyond that;
//! * background requests take at most half of a lane's slots and three eighths of the memory, hinted ones three quarters of the slots: a
//!   read of a guest finds room.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Priority;

/// Names a lane. One per source.
pub(crate) type LaneId = u64;

/// A place in a lane's queue, whose priority can be raised from outside.
#[derive(Debug)]
pub(crate) struct Ticket {
    priority: AtomicU8,
}

impl Ticket {
    pub(crate) fn new(priority: Priority) -> Arc<Self> {
        Arc::new(Self {
            priority: AtomicU8::new(priority as u8),
        })
    }

    pub(crate) fn priority(&self) -> Priority {
        match self.priority.load(Ordering::Relaxed) {
            0 => Priority::Demand,
            1 => Priority::Hinted,
            _ => Priority::Background,
        }
    }
}

/// See the module.
pub(crate) struct Budget {
    state: Mutex<State>,
    memory: u64,
    slots: usize,
}

#[derive(Default)]
struct State {
    used: u64,
    sequence: u64,
    lanes: HashMap<LaneId, Lane>,
}

#[derive(Default)]
struct Lane {
    used: u64,
    running: [usize; 3],
    queue: BTreeMap<(Priority, u64), Entry>,
}

struct Entry {
    bytes: u64,
    ticket: Arc<Ticket>,
    admit: oneshot::Sender<Permit>,
}

/// The right to run one request and to hold its bytes, until it is dropped.
pub(crate) struct Permit {
    budget: Arc<Budget>,
    lane: LaneId,
    priority: Priority,
    bytes: u64,
}

impl Budget {
    pub(crate) fn new(memory: u64, slots: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            memory,
            slots: slots.max(1),
        })
    }

    /// Waits for a permit.
    pub(crate) async fn enter(
        self: &Arc<Self>,
        lane: LaneId,
        ticket: &Arc<Ticket>,
        bytes: u64,
    ) -> Option<Permit> {
        let (admit, admitted) = oneshot::channel();
        {
            let mut state = self.state.lock();
            state.sequence += 1;
            let key = (ticket.priority(), state.sequence);
            let entry = Entry {
                bytes,
                ticket: Arc::clone(ticket),
                admit,
            };
            state.lanes.entry(lane).or_default().queue.insert(key, entry);
        }
        self.pump();
        admitted.await.ok()
    }

    /// Raises the priority of a request, if it still waits.
    pub(crate) fn raise(self: &Arc<Self>, lane: LaneId, ticket: &Arc<Ticket>, priority: Priority) {
        if ticket.priority.fetch_min(priority as u8, Ordering::Relaxed) <= priority as u8 {
            return;
        }
        {
            let mut state = self.state.lock();
            let Some(lane) = state.lanes.get_mut(&lane) else {
                return;
            };
            let key = lane
                .queue
                .iter()
                .find(|(_, entry)| Arc::ptr_eq(&entry.ticket, ticket))
                .map(|(key, _)| *key);
            let Some((old, entry)) = key.and_then(|key| lane.queue.remove_entry(&key)) else {
                return;
            };
            lane.queue.insert((priority, old.1), entry);
        }
        self.pump();
    }

    /// Admits all that may run now.
    fn pump(self: &Arc<Self>) {
        let mut admitted = Vec::new();
        {
            let mut state = self.state.lock();
            let State { used, lanes, .. } = &mut *state;
            for (id, lane) in lanes.iter_mut() {
                lane.queue.retain(|_, entry| !entry.admit.is_closed());
                while let Some(key) = lane.next(*used, self.memory, self.slots) {
                    let Some(entry) = lane.queue.remove(&key) else {
                        break;
                    };
                    *used += entry.bytes;
                    lane.used += entry.bytes;
                    lane.count(key.0, 1);
                    let permit = Permit {
                        budget: Arc::clone(self),
                        lane: *id,
                        priority: key.0,
                        bytes: entry.bytes,
                    };
                    admitted.push((entry.admit, permit));
                }
            }
            lanes.retain(|_, lane| !lane.queue.is_empty() || lane.total() > 0);
        }
        for (admit, permit) in admitted {
            // Whoever lost interest gets the permit back here, by its drop, outside of the lock.
            let _ = admit.send(permit);
        }
    }

    #[cfg(test)]
    fn used(&self) -> u64 {
        self.state.lock().used
    }
}

impl Lane {
    fn total(&self) -> usize {
        self.running.iter().sum()
    }

    fn count(&mut self, priority: Priority, change: isize) {
        if let Some(running) = self.running.get_mut(priority as usize) {
            *running = running.saturating_add_signed(change);
        }
    }

    /// The request to admit next, if there is one that may.
    fn next(&self, used: u64, memory: u64, slots: usize) -> Option<(Priority, u64)> {
        let (key, entry) = self.queue.first_key_value()?;
        let [_, hinted, background] = self.running;
        let free = self.total() < slots;
        let fits = match key.0 {
            Priority::Demand => free,
            Priority::Hinted => free && hinted + background < (slots * 3 / 4).max(1),
            Priority::Background => free && hinted + background < (slots / 2).max(1),
        };
        let most = match key.0 {
            Priority::Demand | Priority::Hinted => memory / 2,
            Priority::Background => memory / 8 * 3,
        };
        let affordable =
            self.total() == 0 || (used + entry.bytes <= memory && self.used + entry.bytes <= most);
        (fits && affordable).then_some(*key)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.budget.state.lock();
            state.used = state.used.saturating_sub(self.bytes);
            if let Some(lane) = state.lanes.get_mut(&self.lane) {
                lane.used = lane.used.saturating_sub(self.bytes);
                lane.count(self.priority, -1);
            }
        }
        self.budget.pump();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn ticket(priority: Priority) -> Arc<Ticket> {
        Ticket::new(priority)
    }

    #[tokio::test]
    async fn an_idle_lane_is_admitted_however_full_the_memory_is() {
        let budget = Budget::new(100, 8);
        let a = budget.enter(1, &ticket(Priority::Demand), 1000).await;
        assert!(a.is_some());
        let waiting = ticket(Priority::Demand);
        let mut more = Box::pin(budget.enter(1, &waiting, 1));
        assert!(more.as_mut().now_or_never().is_none());
        let b = budget.enter(2, &ticket(Priority::Demand), 1000).now_or_never();
        assert!(b.flatten().is_some());
        drop(a);
        assert!(more.now_or_never().flatten().is_some());
    }

    #[tokio::test]
    async fn background_leaves_slots_to_demand() {
        let budget = Budget::new(800, 4);
        let low = ticket(Priority::Background);
        let first = budget.enter(1, &low, 1).now_or_never().flatten();
        assert!(first.is_some());
        let mut large = Box::pin(budget.enter(1, &low, 300));
        assert!(large.as_mut().now_or_never().is_none());
        drop(large);
        let second = budget.enter(1, &low, 1).now_or_never().flatten();
        assert!(second.is_some());
        let mut third = Box::pin(budget.enter(1, &low, 1));
        assert!(third.as_mut().now_or_never().is_none());
        for _ in 0..2 {
            let demand = budget
                .enter(1, &ticket(Priority::Demand), 150)
                .now_or_never()
                .flatten();
            assert!(demand.is_some());
        }
    }

    #[tokio::test]
    async fn a_raised_request_overtakes() {
        let budget = Budget::new(1 << 20, 1);
        let running = budget.enter(1, &ticket(Priority::Demand), 1).await;
        let (hinted, background) = (ticket(Priority::Hinted), ticket(Priority::Background));
        let mut a = Box::pin(budget.enter(1, &hinted, 1));
        let mut b = Box::pin(budget.enter(1, &background, 1));
        assert!(a.as_mut().now_or_never().is_none() && b.as_mut().now_or_never().is_none());
        budget.raise(1, &background, Priority::Demand);
        drop(running);
        assert!(a.as_mut().now_or_never().is_none());
        assert!(b.now_or_never().flatten().is_some());
        assert!(a.now_or_never().flatten().is_some());
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn an_abandoned_request_gives_its_place_back() {
        let budget = Budget::new(1 << 20, 1);
        let running = budget.enter(1, &ticket(Priority::Demand), 7).await;
        let waiting = ticket(Priority::Demand);
        let mut abandoned = Box::pin(budget.enter(1, &waiting, 7));
        assert!(abandoned.as_mut().now_or_never().is_none());
        drop(abandoned);
        drop(running);
        assert_eq!(budget.used(), 0);
    }
}
