//! One request for what several readers want at nearly the same time, where the source takes lists of ranges.
//!
//! A fetch that somebody waits for is sent at once if nobody else waits. Otherwise it is held until all that are waited for are, but only for a
//! small part of the time that the source usually takes to answer, and sent together with what came meanwhile. Readers that wait for
//! the same answer go on at the same time, so that their next fetches meet again.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::budget::Ticket;
use super::flight::Unit;
use super::{Blob, Priority};

/// The part of the usual time of an answer for which fetches are held, and the most that it comes to.
const SHARE: u32 = 4;
const LONGEST: Duration = Duration::from_millis(10);

/// Most bytes of several ranges in one request: the last range comes after all others.
const MAX_LIST: u64 = 1 << 20;

/// What of an image's view of a blob is held.
#[derive(Default)]
pub(super) struct Gather {
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    fetches: usize,
    units: Vec<Unit>,
}

impl Blob {
    /// Sends what a reader waits for on its way, together with what others wait for.
    pub(super) fn submit_with_others(self: &Arc<Self>, units: Vec<Unit>, ticket: &Arc<Ticket>) {
        let origin = &self.shared.origin;
        let pause = (origin.usual_answer() / SHARE).min(LONGEST);
        let alone = origin.waiting() <= 1 || origin.source.ranges_per_request() <= 1 || pause.is_zero();
        if units.is_empty() || alone || ticket.priority() != Priority::Demand {
            return self.submit(units, ticket);
        }
        let mut held = self.gather.held.lock();
        held.fetches += 1;
        held.units.extend(units);
        let (first, all) = (held.fetches == 1, held.fetches >= origin.waiting());
        drop(held);
        if all {
            self.send_held();
        } else if first {
            let blob = Arc::clone(self);
            self.engine().runtime().spawn(async move {
                tokio::time::sleep(pause).await;
                blob.send_held();
            });
        }
    }

    fn send_held(self: &Arc<Self>) {
        let held = std::mem::take(&mut *self.gather.held.lock());
        if held.units.is_empty() {
            return;
        }
        let lists = self.shared.origin.source.ranges_per_request();
        let assemblies = self.assemble_lists(held.units, lists, MAX_LIST);
        self.send(assemblies, &Ticket::new(Priority::Demand));
    }
}
