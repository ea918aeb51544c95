//! One fetch per chunk among all processes that share a cache directory.
//!
//! A request that may be sent first turns the words of its chunks in the ledger, and goes on with those that it got. What is present by
//! now is landed. What another process is filling is watched until it is there, or until it is given up: by an error, which
//! frees the words before the pause; by the end of the process; or because it takes too long.

use std::sync::Arc;
use std::time::Duration;

use super::Blob;
use super::budget::Ticket;
use super::flight::Unit;
use super::request::{Assembly, request};
use crate::cache::Acquired;

/// Pauses between looks at a chunk that another process fills.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LAST_LOOK: Duration = Duration::from_millis(20);

/// Who has the chunks of a unit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Right {
    Ours,
    Theirs,
}

impl Blob {
    /// Takes the right to fill the chunks of an assembly; gives back what of it is to be fetched now by this request. The rest has
    /// landed, or is on its way by other tasks.
    pub(super) fn secure(self: &Arc<Self>, mut assembly: Assembly, ticket: &Arc<Ticket>) -> Option<Assembly> {
        let mut rights = Vec::new();
        let mut whole = true;
        for unit in assembly.units_mut() {
            let right = self.secure_unit(unit);
            whole &= right == Right::Ours && !unit.chunks.is_empty();
            rights.push(right);
        }
        if whole {
            return (!assembly.is_empty()).then_some(assembly);
        }
        let mut ours = Vec::new();
        for (unit, right) in assembly.into_units().into_iter().zip(rights) {
            if unit.chunks.is_empty() {
                continue;
            }
            match right {
                Right::Ours => ours.push(unit),
                Right::Theirs => {
                    let task = watch(Arc::clone(self), unit, Arc::clone(ticket));
                    self.engine().runtime().spawn(task);
                }
            }
        }
        let mut assemblies = self.assemble(ours, ticket.priority()).into_iter();
        let first = assemblies.next();
        for mut rest in assemblies {
            // They take their place in the queue, and hold up nobody meanwhile.
            rest.release();
            let task = request(Arc::clone(self), rest, Arc::clone(ticket));
            self.engine().runtime().spawn(task);
        }
        first
    }

    /// All chunks of a unit, or none. Lands those that are present.
    fn secure_unit(&self, unit: &mut Unit) -> Right {
        let files = &self.shared.files;
        let mut right = Right::Ours;
        for (chunk, mut claim) in std::mem::take(&mut unit.chunks) {
            if claim.filling.is_none() && right == Right::Ours {
                match files.acquire(chunk.index) {
                    None => {}
                    Some(Acquired::Mine(filling)) => claim.filling = Some(filling),
                    Some(Acquired::Busy) => right = Right::Theirs,
                    Some(Acquired::Present(version)) => match files.recall(chunk.index, &claim.key.1) {
                        Some(version) => {
                            claim.resident(version);
                            continue;
                        }
                        None => match files.replace(chunk.index, version) {
                            Some(filling) => claim.filling = Some(filling),
                            None => right = Right::Theirs,
                        },
                    },
                }
            }
            unit.chunks.push((chunk, claim));
        }
        if right == Right::Theirs {
            unit.release();
        }
        right
    }
}

/// Waits until nobody else fills the chunks of a unit any more; then lands it, or fetches it.
async fn watch(blob: Arc<Blob>, mut unit: Unit, ticket: Arc<Ticket>) {
    let mut pause = FIRST_LOOK;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_LOOK);
        if unit.abandoned() {
            return;
        }
        let right = blob.secure_unit(&mut unit);
        if unit.chunks.is_empty() {
            return;
        }
        if right == Right::Ours {
            unit.release();
            return blob.submit(vec![unit], &ticket);
        }
    }
}
