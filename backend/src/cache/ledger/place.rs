//! Places: no two chunks of a blob have the same bytes of its data file, whatever the images say.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Ledger, Record};
use crate::cache::word::{State, Word};

/// Where the bits of turned blocks begin, and how many chunks have one bit.
const TURNED: u64 = 1024;
const BLOCK: u32 = 1024;
/// Neighbours that are looked at together: their records are one read.
const NEIGHBOURS: u32 = 64;

impl Ledger {
    /// Whether nobody else has bytes between `offset` and `offset + size`: all that others of the ledger's chunks have lies before
    /// if their number is lower than `index`, and behind if it is higher. To be asked by who fills chunk `index` and has put
    /// these two into its record.
    ///
    /// Present chunks have passed, so that only the nearest on either side matters. Who is still filling has perhaps not asked yet:
    /// it will see our record, or we see its, and both may give up. A chunk of an earlier boot yields.
    pub(super) fn place_is_free(self: &Arc<Self>, index: u32, offset: u64, size: u32) -> bool {
        let end = offset.saturating_add(size.into());
        let below = |record: &Record| record.offset.saturating_add(record.size.into()) <= offset;
        let above = |record: &Record| record.size == 0 || record.offset >= end;
        self.are_apart(self.before(index), true, &below) && self.are_apart(self.behind(index), false, &above)
    }

    /// Whether all chunks of `groups` up to the first that is present are `apart`; each group from its end if `backwards`.
    fn are_apart(
        self: &Arc<Self>,
        groups: impl Iterator<Item = Range<u32>>,
        backwards: bool,
        apart: &dyn Fn(&Record) -> bool,
    ) -> bool {
        for group in groups {
            // What a record says counts for the state that its chunk had before.
            let words: Vec<(u32, Word)> = group
                .map(|index| (index, self.load(index)))
                .filter(|(_, word)| word.state() != State::Absent)
                .collect();
            let (Some((first, _)), Some((last, _))) = (words.first(), words.last()) else {
                continue;
            };
            let records = self.records(*first, last - first + 1);
            let mut neighbours = words.iter().map(|(index, word)| {
                let record = records.get((index - first) as usize).copied();
                (*index, *word, record.unwrap_or_default())
            });
            while let Some((index, word, record)) = if backwards {
                neighbours.next_back()
            } else {
                neighbours.next()
            } {
                let free = apart(&record);
                match word.state() {
                    State::Present => return free,
                    State::Doubtful if !free && !self.yields(index, word) => return false,
                    State::Filling if !free => return false,
                    State::Absent | State::Doubtful | State::Filling => {}
                }
            }
        }
        true
    }

    /// Whether there is any chunk present. Of an empty ledger hardly a page is touched.
    pub(crate) fn any_present(&self) -> bool {
        (0..self.chunks().div_ceil(BLOCK))
            .filter(|block| self.is_turned(*block))
            .flat_map(|block| block * BLOCK..((block + 1) * BLOCK).min(self.chunks()))
            .any(|index| self.present(index) != 0)
    }

    /// Frees the place of a chunk of an earlier boot.
    fn yields(self: &Arc<Self>, index: u32, word: Word) -> bool {
        self.turn(index, word)
            .is_some_and(|yielding| yielding.record(&Record::default()).is_ok())
    }

    /// The chunks before `index` that were ever turned, in groups, the nearest first.
    fn before(&self, index: u32) -> impl Iterator<Item = Range<u32>> {
        let blocks = (0..=index / BLOCK).rev().filter(|block| self.is_turned(*block));
        blocks.flat_map(move |block| {
            let (first, end) = (block * BLOCK, ((block + 1) * BLOCK).min(index));
            let ends = (0..(end - first).div_ceil(NEIGHBOURS)).map(move |group| end - group * NEIGHBOURS);
            ends.map(move |end| end.saturating_sub(NEIGHBOURS).max(first)..end)
        })
    }

    /// The chunks behind `index` that were ever turned, in groups, the nearest first.
    fn behind(&self, index: u32) -> impl Iterator<Item = Range<u32>> {
        let chunks = self.chunks();
        let blocks = (index / BLOCK..chunks.div_ceil(BLOCK)).filter(|block| self.is_turned(*block));
        blocks.flat_map(move |block| {
            let (first, end) = ((block * BLOCK).max(index + 1), ((block + 1) * BLOCK).min(chunks));
            let starts = (first..end).step_by(NEIGHBOURS as usize);
            starts.map(move |start| start..start.saturating_add(NEIGHBOURS).min(end))
        })
    }

    fn turned(&self, block: u32) -> Option<(&AtomicU64, u64)> {
        let word = self.mapping.word(TURNED + 8 * u64::from(block / 64))?;
        Some((word, 1 << (block % 64)))
    }

    fn is_turned(&self, block: u32) -> bool {
        self.turned(block)
            .is_none_or(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// To be called before the word of chunk `index` is turned.
    pub(super) fn mark_turned(&self, index: u32) {
        if !self.is_turned(index / BLOCK)
            && let Some((word, bit)) = self.turned(index / BLOCK)
        {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }
}
