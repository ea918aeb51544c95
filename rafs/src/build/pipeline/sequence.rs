//! The exit: chunks in feeding order.

use std::collections::BTreeMap;

use crossbeam_channel::{Receiver, Sender};

use super::{Chunk, Done, Slot, Stored};
use crate::build::error::BuildError;

/// Takes finished chunks in the order of their tickets. Returns early with an error; dropping the channels ends
/// the workers and the feeder.
pub(super) fn sequence(
    done: Receiver<Result<Done, BuildError>>,
    free: Sender<Slot>,
    store: &mut dyn FnMut(Chunk<'_>) -> Result<(), BuildError>,
) -> Result<(), BuildError> {
    let mut early = BTreeMap::new();
    let mut next = 1;
    for finished in done {
        let finished = finished?;
        early.insert(finished.ticket, finished);
        while let Some(chunk) = early.remove(&next) {
            let stored = match chunk.stored {
                Stored::Elsewhere => None,
                Stored::Plain => Some((chunk.slot.data.as_slice(), false)),
                Stored::Packed => Some((chunk.slot.packed.as_slice(), true)),
            };
            store(Chunk {
                owner: chunk.owner,
                key: chunk.key,
                crc32c: chunk.crc32c,
                stored,
            })?;
            next += 1;
            // Nobody takes it when the feeder is through.
            let _ = free.send(chunk.slot);
        }
    }
    Ok(())
}
