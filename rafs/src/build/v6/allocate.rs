//! Places for inodes and data, counted from the metadata base.

use crate::layout::v6;

use super::{BLOCK, ROOT_OFFSET, align};

/// Slots of a block.
const SLOTS: usize = (BLOCK / v6::NID_UNIT) as usize;

/// Places for inodes and data. Rests of blocks that something did not fit into are kept and used again.
pub(super) struct Allocator {
    /// Where nothing was placed yet.
    pub(super) cursor: u64,
    /// Offsets of free rests, by their number of slots.
    free: Vec<Vec<u64>>,
}

impl Allocator {
    pub(super) fn new() -> Self {
        Self {
            cursor: ROOT_OFFSET,
            free: vec![Vec::new(); SLOTS],
        }
    }

    /// The smallest rest that `size` bytes fit into; what is left of it stays free.
    fn take_rest(&mut self, size: u64) -> Option<u64> {
        let slots = size.div_ceil(v6::NID_UNIT) as usize;
        let (found, offset) = (slots..SLOTS).find_map(|n| Some((n, self.free.get_mut(n)?.pop()?)))?;
        self.give_rest(offset + slots as u64 * v6::NID_UNIT, found - slots);
        Some(offset)
    }

    fn give_rest(&mut self, offset: u64, slots: usize) {
        if slots > 0
            && let Some(rests) = self.free.get_mut(slots)
        {
            rests.push(offset);
        }
    }

    fn advance(&mut self, size: u64) -> u64 {
        let offset = self.cursor;
        self.cursor = align(offset + size, v6::NID_UNIT);
        offset
    }

    fn next_block(&mut self) {
        let next = align(self.cursor, BLOCK);
        self.give_rest(self.cursor, ((next - self.cursor) / v6::NID_UNIT) as usize);
        self.cursor = next;
    }

    /// Room that may cross a block boundary.
    pub(super) fn inode(&mut self, size: u64) -> u64 {
        match self.take_rest(size) {
            Some(offset) => offset,
            None => self.advance(size),
        }
    }

    /// Room inside one block.
    pub(super) fn within_block(&mut self, size: u64) -> u64 {
        match self.take_rest(size) {
            Some(offset) => offset,
            None => {
                if self.cursor % BLOCK + size > BLOCK {
                    self.next_block();
                }
                self.advance(size)
            }
        }
    }

    /// Whole blocks.
    pub(super) fn blocks(&mut self, size: u64) -> u64 {
        self.next_block();
        self.advance(align(size, BLOCK))
    }
}
