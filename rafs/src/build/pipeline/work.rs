//! The workers: digest and compression, each in a thread of its own.

use std::collections::HashMap;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use super::{Done, Job, Key, Settings, Slot, Stored};
use crate::build::codec::{Packer, digest};
use crate::build::error::BuildError;

/// What the workers share.
pub(super) struct Shared {
    settings: Settings,
    /// Lowest ticket that was seen with a key.
    claims: Mutex<HashMap<Key, u64>>,
    /// Digest and CRC of runs of zeros, by length.
    zeros: Mutex<HashMap<u32, ([u8; 32], u32)>>,
}

impl Shared {
    /// `known` are keys that need no bytes any more.
    pub(super) fn new(settings: Settings, known: impl Iterator<Item = Key>) -> Self {
        Self {
            settings,
            // Tickets start at 1.
            claims: Mutex::new(known.map(|key| (key, 0)).collect()),
            zeros: Mutex::default(),
        }
    }

    /// Whether the holder of `ticket` has to provide the bytes for `key`.
    fn claim(&self, key: Key, ticket: u64) -> bool {
        let mut claims = self.claims.lock();
        let first = claims.entry(key).or_insert(ticket);
        if *first < ticket {
            return false;
        }
        *first = ticket;
        true
    }
}

/// Makes chunks of jobs until there are no more, or nobody wants them.
pub(super) fn work(shared: &Shared, jobs: &Receiver<Job>, done: &Sender<Result<Done, BuildError>>) {
    let mut packer = match Packer::new(shared.settings.compression, shared.settings.level) {
        Ok(packer) => packer,
        Err(e) => {
            let _ = done.send(Err(e));
            return;
        }
    };
    for job in jobs {
        if done.send(process(shared, &mut packer, job)).is_err() {
            return; // given up
        }
    }
}

fn process(shared: &Shared, packer: &mut Packer, job: Job) -> Result<Done, BuildError> {
    let Job {
        ticket,
        owner,
        mut slot,
        zeros,
    } = job;
    let fill = |slot: &mut Slot, size: u32| {
        slot.data.clear();
        slot.data.resize(size as usize, 0);
    };
    let sum = |data: &[u8]| (digest(shared.settings.digester, data), crc32c::crc32c(data));
    let (size, (digest, crc32c)) = match zeros {
        Some(size) => {
            let known = shared.zeros.lock().get(&size).copied();
            let sums = known.unwrap_or_else(|| {
                fill(&mut slot, size);
                let sums = sum(&slot.data);
                shared.zeros.lock().insert(size, sums);
                sums
            });
            (size, sums)
        }
        None => (slot.data.len() as u32, sum(&slot.data)),
    };
    let key = (digest, size);
    let stored = if !shared.claim(key, ticket) {
        Stored::Elsewhere
    } else {
        if zeros.is_some() {
            fill(&mut slot, size);
        }
        if packer.pack(&slot.data, &mut slot.packed)? {
            Stored::Packed
        } else {
            Stored::Plain
        }
    };
    Ok(Done {
        ticket,
        owner,
        slot,
        key,
        crc32c,
        stored,
    })
}
