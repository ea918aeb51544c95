//! `ID.blob.data.stamps`: what every process of the host knows of a blob's chunks.
//!
//! | from byte | content |
//! |---|---|
//! | 0 | header: 16 bytes magic, 36 boot id of the host as text, 4 number of chunks, 8 inode number of the data file, 8 its time of birth in nanoseconds |
//! | 128 | word: chunks withdrawn so far |
//! | 136 | word: state of the chunk index |
//! | 1024 | a bit per 1024 chunks: whether any of them was ever turned |
//! | 4096 | a [`Word`] per chunk |
//! | the next multiple of 4096 | a record per chunk: 32 bytes stamp, 8 offset and 4 size in the data file, 4 CRC-32C of the data (0: not known) |
//!
//! All numbers are little-endian. The words are mapped by every process and only ever changed by compare-and-swap. A record is written
//! by who has turned its chunk's word into `Filling`, and counts for the version that follows.
//!
//! The header says which data file of which boot this is. If it says anything else, a new file takes the place of this one, and
//! the chunks of the old one are `Doubtful`: a host crash may have taken data that were never written back.
//!
//! Parts: `open` (which file is whose), `record` (what is said of a chunk, and where), `place` (who has which bytes of the data file),
//! `filling` (the right to change a chunk).

mod filling;
mod open;
mod place;
mod record;

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(crate) use filling::Filling;
use filling::stuck;
pub(crate) use record::Record;

use super::mapping::Mapping;
use super::word::{State, Tick, Word};

const HEADER: u64 = 4096;
const WITHDRAWN: u64 = 128;
const INDEX: u64 = 136;
/// So long a chunk is kept for those who asked for it, unless they say before that they have read it.
const LEASE: Duration = Duration::from_secs(5);

/// See the module.
pub(crate) struct Ledger {
    file: File,
    mapping: Mapping,
    chunks: u32,
    writable: bool,
    owner: u16,
}

/// What becomes of somebody who wants to fill a chunk.
pub(crate) enum Acquired {
    /// The chunk is present, under this version.
    Present(u32),
    /// It is theirs to fill.
    Mine(Filling),
    /// Somebody else does.
    Busy,
}

impl Ledger {
    pub(super) fn writable(&self) -> bool {
        self.writable
    }

    pub(super) fn chunks(&self) -> u32 {
        self.chunks
    }

    fn word(&self, index: u32) -> Option<&AtomicU64> {
        if index >= self.chunks {
            return None;
        }
        self.mapping.word(HEADER + 8 * u64::from(index))
    }

    pub(super) fn load(&self, index: u32) -> Word {
        Word(self.word(index).map_or(0, |word| word.load(Ordering::Acquire)))
    }

    /// The version under which chunk `index` is present; 0 if it is not.
    pub(crate) fn present(&self, index: u32) -> u32 {
        let word = self.load(index);
        if word.state() == State::Present {
            word.version()
        } else {
            0
        }
    }

    /// Whether chunk `index` is present under `version`. Remembers that it was used.
    pub(crate) fn holds(&self, index: u32, version: u32) -> bool {
        let Some(slot) = self.word(index) else {
            return false;
        };
        let word = Word(slot.load(Ordering::Acquire));
        if word.state() != State::Present || word.version() != version {
            return false;
        }
        let now = Tick::now();
        if self.writable && now.since(word.time()).is_some_and(|ticks| ticks > 0) {
            // Whoever is faster has noted the same.
            let _ = slot.compare_exchange(word.0, word.at(now).0, Ordering::AcqRel, Ordering::Relaxed);
        }
        true
    }

    /// Counts the chunks of the blob that were withdrawn, ever, by anybody.
    pub(crate) fn withdrawn(&self) -> u64 {
        self.mapping
            .word(WITHDRAWN)
            .map_or(0, |count| count.load(Ordering::Acquire))
    }

    /// Keeps chunk `index` for those who asked for it.
    pub(crate) fn lease(&self, index: u32, version: u32) {
        self.set_time(index, version, Tick::now().after(LEASE));
    }

    /// Ends what [`Ledger::lease`] began.
    pub(crate) fn release(&self, index: u32, version: u32) {
        self.set_time(index, version, Tick::now());
    }

    fn set_time(&self, index: u32, version: u32, time: Tick) {
        let Some(slot) = self.word(index).filter(|_| self.writable) else {
            return;
        };
        let _ = slot.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            let word = Word(word);
            (word.state() == State::Present && word.version() == version).then(|| word.at(time).0)
        });
    }

    /// Asks for the right to fill chunk `index`. `alive` tells whether an owner still lives.
    pub(super) fn acquire(self: &Arc<Self>, index: u32, alive: impl Fn(u16) -> bool) -> Acquired {
        loop {
            let word = self.load(index);
            let free = match word.state() {
                State::Present => return Acquired::Present(word.version()),
                State::Filling => stuck(word) || !alive(word.owner()),
                State::Absent | State::Doubtful => true,
            };
            if !free {
                return Acquired::Busy;
            }
            if let Some(filling) = self.turn(index, word) {
                return Acquired::Mine(filling);
            }
        }
    }

    /// Whether chunk `index` was present before the host was restarted.
    pub(super) fn doubtful(&self, index: u32) -> bool {
        self.load(index).state() == State::Doubtful
    }

    /// Takes the right to replace chunk `index`, if it still is present under `version`.
    pub(super) fn replace(self: &Arc<Self>, index: u32, version: u32) -> Option<Filling> {
        let word = self.load(index);
        let same = word.state() == State::Present && word.version() == version;
        if same { self.turn(index, word) } else { None }
    }

    /// Takes the right to change chunk `index` from the state that `word` describes, if it still is in it.
    pub(super) fn turn(self: &Arc<Self>, index: u32, word: Word) -> Option<Filling> {
        let next = word.next(State::Filling, self.owner, Tick::now());
        let slot = self.word(index).filter(|_| self.writable)?;
        self.mark_turned(index);
        slot.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Acquire)
            .ok()?;
        if word.state() == State::Present {
            // Before anything of it changes: whoever reads now looks again.
            if let Some(count) = self.mapping.word(WITHDRAWN) {
                count.fetch_add(1, Ordering::AcqRel);
            }
        }
        Some(Filling::new(Arc::clone(self), index, next))
    }

    /// Begins to read the chunk index, unless another process does.
    pub(super) fn begin_index(&self, alive: impl Fn(u16) -> bool) -> bool {
        let Some(slot) = self.mapping.word(INDEX).filter(|_| self.writable) else {
            return true;
        };
        let word = Word(slot.load(Ordering::Acquire));
        if word.state() == State::Filling && word.owner() != self.owner && !stuck(word) && alive(word.owner())
        {
            return false;
        }
        let next = word.next(State::Filling, self.owner, Tick::now());
        slot.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    pub(super) fn end_index(&self) {
        if let Some(slot) = self.mapping.word(INDEX).filter(|_| self.writable) {
            let word = Word(slot.load(Ordering::Acquire));
            if word.owner() == self.owner {
                let next = word.next(State::Absent, 0, Tick::now());
                let _ = slot.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Acquire);
            }
        }
    }
}
