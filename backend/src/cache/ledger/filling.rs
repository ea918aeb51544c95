//! The right to change one chunk's bytes and record, among all processes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Ledger, Record};
use crate::cache::word::{State, Tick, Word};

/// A fill takes no longer, or its owner is stuck.
const LONGEST_FILL: Duration = Duration::from_secs(10);

/// Whether a fill lasts for so long that its owner must be stuck.
pub(super) fn stuck(word: Word) -> bool {
    // A beginning that lies ahead is damage.
    Tick::now().since(word.time()).is_none_or(|ticks| {
        word.time()
            .after(LONGEST_FILL)
            .since(word.time())
            .is_some_and(|most| ticks > most)
    })
}

/// See the module. Given back by its drop: the chunk is absent then.
pub(crate) struct Filling {
    ledger: Arc<Ledger>,
    index: u32,
    word: Word,
}

impl Filling {
    /// Of chunk `index`, whose word was turned into `word`.
    pub(super) fn new(ledger: Arc<Ledger>, index: u32, word: Word) -> Self {
        Self { ledger, index, word }
    }

    /// Reserves the chunk's place in the data file, before its bytes are changed or believed. `false` if another chunk has it: images
    /// describe the blob in ways that contradict each other.
    pub(crate) fn reserve(&self, offset: u64, size: u32) -> io::Result<bool> {
        self.record(&Record {
            offset,
            size,
            ..Record::default()
        })?;
        if self.ledger.place_is_free(self.index, offset, size) {
            return Ok(true);
        }
        self.record(&Record::default())?;
        Ok(false)
    }

    /// Writes the chunk's record; the bytes must be there.
    pub(crate) fn record(&self, record: &Record) -> io::Result<()> {
        self.ledger.write(self.index, record)
    }

    /// The chunk is what its record says. Returns the version; `None` if the right was lost meanwhile, for we were taken for stuck.
    pub(crate) fn done(mut self) -> Option<u32> {
        let next = self.word.next(State::Present, 0, Tick::now());
        self.settle(next).then_some(next.version())
    }

    fn settle(&mut self, next: Word) -> bool {
        let word = std::mem::replace(&mut self.word, next);
        self.ledger.word(self.index).is_some_and(|slot| {
            slot.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        })
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if self.word.state() == State::Filling {
            let next = self.word.next(State::Absent, 0, Tick::now());
            self.settle(next);
        }
    }
}
