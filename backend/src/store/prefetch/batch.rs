//! What is fetched together.

use super::{Wanted, Wish};
use crate::store::Priority;
use crate::store::fetch::MAX_REQUEST;

/// A replay is asked for in so many parts, each of the chunks that are used next, so that the first ones are there before the last: but no
/// part is smaller than this.
const REPLAY_PARTS: u64 = 6;
const REPLAY_LEAST: u64 = 256 << 10;

/// Chunks to be fetched together.
pub(super) struct Batch {
    pub(super) chunks: Vec<u32>,
    pub(super) bytes: u64,
    /// Where the next one begins: in the list, or in the blob.
    pub(super) next: usize,
}

impl Wish {
    pub(super) fn priority(&self) -> Priority {
        match self.wanted {
            Wanted::Replay(_) | Wanted::Listed(_) => Priority::Hinted,
            Wanted::Whole => Priority::Background,
        }
    }

    /// Fetches under way at a time, of `most` that the caller wants.
    pub(super) fn room(&self, most: usize) -> usize {
        let width = match self.wanted {
            Wanted::Replay(_) | Wanted::Listed(_) => most,
            Wanted::Whole => self.blob.shared.origin.width().min(most),
        };
        width.max(1)
    }

    /// Compressed bytes of a chunk. One that can not be described yet is counted as an average one.
    pub(super) fn stored_size(&self, index: u32) -> u64 {
        let description = self.blob.description();
        let average = description.compressed_size / u64::from(description.chunk_count.max(1));
        self.blob
            .describe(index)
            .map_or(average, |chunk| chunk.compressed_size.into())
            .max(1)
    }

    /// The absent chunks from position `from` on, one or more, up to `size` compressed bytes of them; empty at the end.
    pub(super) fn batch(&self, from: usize, size: u32) -> Batch {
        let size = match &self.wanted {
            Wanted::Replay(list) => {
                let all: u64 = list.iter().map(|index| self.stored_size(*index)).sum();
                (all / REPLAY_PARTS).clamp(REPLAY_LEAST, MAX_REQUEST)
            }
            Wanted::Listed(_) | Wanted::Whole => size.into(),
        };
        let description = self.blob.description();
        let mut batch = Batch {
            chunks: Vec::new(),
            bytes: 0,
            next: from,
        };
        loop {
            let index = match &self.wanted {
                Wanted::Replay(list) | Wanted::Listed(list) => list.get(batch.next).copied(),
                Wanted::Whole => u32::try_from(batch.next)
                    .ok()
                    .filter(|index| *index < description.chunk_count),
            };
            let Some(index) = index else { break };
            if self.blob.is_resident(index) || index >= description.chunk_count {
                batch.next += 1;
                continue;
            }
            let bytes = self.stored_size(index);
            if !batch.chunks.is_empty() && batch.bytes + bytes > size {
                break;
            }
            batch.next += 1;
            batch.bytes += bytes;
            batch.chunks.push(index);
        }
        batch
    }
}
