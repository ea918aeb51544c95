//! The chunks of an image: what is stored where, and which file uses what.

use std::collections::HashMap;

use crate::layout::v5::ChunkRecord;

use super::error::BuildError;
use super::pipeline::Key;
use super::tree::InodeId;

/// Position of a chunk in a [`ChunkTable`].
pub(super) type ChunkNumber = u32;

/// All chunks that the image may refer to, each once, and the chunks of each file.
#[derive(Default)]
pub(super) struct ChunkTable {
    records: Vec<ChunkRecord>,
    by_key: HashMap<Key, ChunkNumber>,
    by_file: Vec<Vec<ChunkNumber>>,
}

impl ChunkTable {
    /// Digests and sizes of all chunks.
    pub(super) fn keys(&self) -> impl Iterator<Item = Key> + '_ {
        self.by_key.keys().copied()
    }

    /// The chunk with these bytes.
    pub(super) fn find(&self, key: Key) -> Option<ChunkNumber> {
        self.by_key.get(&key).copied()
    }

    /// Adds a chunk. A later [`ChunkTable::find`] keeps giving the first of several equal ones.
    pub(super) fn add(&mut self, record: ChunkRecord) -> Result<ChunkNumber, BuildError> {
        let number = self.records.len() as u64;
        BuildError::check_limit("number of chunks", number, u64::from(u32::MAX))?;
        let number = number as ChunkNumber;
        self.by_key
            .entry((record.digest, record.uncompressed_size.get()))
            .or_insert(number);
        self.records.push(record);
        Ok(number)
    }

    /// Makes a chunk the next one of a file.
    pub(super) fn append(&mut self, file: InodeId, number: ChunkNumber) {
        if self.by_file.len() <= file.position() {
            self.by_file.resize_with(file.position() + 1, Vec::new);
        }
        if let Some(chunks) = self.by_file.get_mut(file.position()) {
            chunks.push(number);
        }
    }

    /// The chunks of a file, in the order of the file.
    pub(super) fn of_file(&self, file: InodeId) -> impl ExactSizeIterator<Item = &ChunkRecord> + '_ {
        self.by_file
            .get(file.position())
            .map_or(&[][..], Vec::as_slice)
            .iter()
            .map(|number| self.record(*number))
    }

    /// What is known of a chunk.
    #[allow(clippy::indexing_slicing)] // numbers are positions that `add` gave, and nothing is taken out
    pub(super) fn record(&self, number: ChunkNumber) -> &ChunkRecord {
        &self.records[number as usize]
    }

    /// Every chunk that a file with a name uses, once, by digest, then blob: the chunk table of v6 (section 11).
    /// `named` tells of each inode whether a name leads to it.
    pub(super) fn referenced(&self, named: &[bool]) -> Vec<&ChunkRecord> {
        let mut used = vec![false; self.records.len()];
        let files = self
            .by_file
            .iter()
            .zip(named)
            .filter_map(|(chunks, named)| named.then_some(chunks));
        for number in files.flatten() {
            if let Some(used) = used.get_mut(*number as usize) {
                *used = true;
            }
        }
        let mut records: Vec<&ChunkRecord> = self
            .records
            .iter()
            .zip(used)
            .filter_map(|(record, used)| used.then_some(record))
            .collect();
        records.sort_unstable_by_key(|r| (r.digest, r.blob_index.get(), r.index.get()));
        records
    }
}
