//! The guest buffers of a descriptor chain, as host addresses, in order.

use std::sync::Arc;

use fuse_backend_rs::file_buf::FileVolatileSlice;

use super::transfer::{GuestReader, GuestWriter};
use super::{GuestMemory, Unmapped, copy_from, copy_to};

/// Buffers of one system call at most (`IOV_MAX`).
pub(super) const MAX_VECTOR: usize = 1024;

/// Guest buffers in order, without copying: one direction of a descriptor chain.
#[derive(Default)]
pub(super) struct Segments {
    // The lifetime is not true: the slices are valid while the `Buffers` that owns them holds its memory. They
    // leave this module only inside calls that borrow the `Buffers`.
    pub(super) slices: Vec<FileVolatileSlice<'static>>,
    length: usize,
}

impl Segments {
    fn clear(&mut self) {
        self.slices.clear();
        self.length = 0;
    }

    fn push(&mut self, host: usize, length: usize) {
        self.length += length;
        if let Some(last) = self.slices.last_mut()
            && last.as_ptr() as usize + last.len() == host
        {
            *last = slice(last.as_ptr() as usize, last.len() + length);
        } else {
            self.slices.push(slice(host, length));
        }
    }

    /// Calls `each` with host address and length of every piece of `offset..offset + length`.
    fn range(&self, offset: usize, length: usize, mut each: impl FnMut(usize, usize)) -> usize {
        let (mut skip, mut left) = (offset, length);
        for slice in &self.slices {
            if left == 0 {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let piece = left.min(slice.len() - skip);
            each(slice.as_ptr() as usize + skip, piece);
            left -= piece;
            skip = 0;
        }
        length - left
    }

    /// Calls `io` with at most `count` bytes from `cursor` on, as one vector.
    pub(super) fn with_vector<R>(
        &mut self,
        cursor: Cursor,
        count: usize,
        io: impl FnOnce(&[FileVolatileSlice<'_>]) -> R,
    ) -> R {
        let rest = self.slices.get_mut(cursor.index..).unwrap_or_default();
        let rest = match rest.len() {
            0..=MAX_VECTOR => rest,
            _ => rest.get_mut(..MAX_VECTOR).unwrap_or_default(),
        };
        // Cut the first and the last slice for the time of the call.
        let Some(first) = rest.first().copied() else {
            return io(&[]);
        };
        let mut skip = cursor.offset;
        let mut left = count;
        let mut used = 0;
        for slice in rest.iter() {
            if left == 0 {
                break;
            }
            left -= left.min(slice.len() - skip);
            skip = 0;
            used += 1;
        }
        let rest = rest.get_mut(..used).unwrap_or_default();
        if let Some(slot) = rest.first_mut() {
            *slot = slice(
                first.as_ptr() as usize + cursor.offset,
                first.len() - cursor.offset,
            );
        }
        let total: usize = rest.iter().map(|slice| slice.len()).sum();
        let surplus = total.saturating_sub(count);
        if let Some(slot) = rest.last_mut() {
            *slot = slice(slot.as_ptr() as usize, slot.len() - surplus);
        }
        let result = io(rest);
        if let Some(slot) = rest.last_mut() {
            *slot = slice(slot.as_ptr() as usize, slot.len() + surplus);
        }
        if let Some(slot) = rest.first_mut() {
            *slot = first;
        }
        result
    }

    fn cursor(&self, offset: usize) -> Cursor {
        Cursor::default().advanced(&self.slices, offset)
    }
}

fn slice(host: usize, length: usize) -> FileVolatileSlice<'static> {
    // SAFETY: the range lies inside one mapped region (see `Buffers::push_*`), and the slice is only used while
    // the `Buffers` that holds it, and so the mapping, is borrowed.
    unsafe { FileVolatileSlice::from_raw_ptr(host as *mut u8, length) }
}

/// A place in a list of slices.
#[derive(Clone, Copy, Default)]
pub(super) struct Cursor {
    index: usize,
    offset: usize,
}

impl Cursor {
    /// The place so many bytes further.
    pub(super) fn advanced(mut self, slices: &[FileVolatileSlice<'_>], mut by: usize) -> Cursor {
        while let Some(slice) = slices.get(self.index) {
            let rest = slice.len() - self.offset;
            if by < rest {
                self.offset += by;
                break;
            }
            by -= rest;
            self.index += 1;
            self.offset = 0;
        }
        self
    }
}

/// The guest buffers of one descriptor chain, with the memory that they are in.
pub struct Buffers {
    memory: Arc<GuestMemory>,
    readable: Segments,
    writable: Segments,
    /// The region in which the last buffer was found: the next one is mostly there too.
    hint: usize,
}

impl Buffers {
    /// No buffers yet.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Buffers {
            memory,
            readable: Segments::default(),
            writable: Segments::default(),
            hint: 0,
        }
    }

    /// Forgets all buffers and takes the next ones from `memory`.
    pub fn reset(&mut self, memory: &Arc<GuestMemory>) {
        self.readable.clear();
        self.writable.clear();
        if !Arc::ptr_eq(&self.memory, memory) {
            self.memory = Arc::clone(memory);
        }
    }

    /// Moves the buffers out, leaving none.
    pub fn take(&mut self) -> Buffers {
        std::mem::replace(self, Buffers::new(Arc::clone(&self.memory)))
    }

    /// Adds bytes that the guest wants read.
    pub fn push_readable(&mut self, address: u64, length: usize) -> Result<(), Unmapped> {
        let Buffers {
            memory,
            readable,
            hint,
            ..
        } = self;
        memory.pieces(hint, address, length, |host, length| readable.push(host, length))
    }

    /// Adds room that the guest wants written.
    pub fn push_writable(&mut self, address: u64, length: usize) -> Result<(), Unmapped> {
        let Buffers {
            memory,
            writable,
            hint,
            ..
        } = self;
        memory.pieces(hint, address, length, |host, length| writable.push(host, length))
    }

    /// Bytes to read.
    pub fn readable(&self) -> usize {
        self.readable.length
    }

    /// Room to write.
    pub fn writable(&self) -> usize {
        self.writable.length
    }

    /// Appends `length` readable bytes at `offset` to `into`, as many as there are.
    pub fn copy_in(&self, offset: usize, length: usize, into: &mut Vec<u8>) -> usize {
        let length = length.min(self.readable.length.saturating_sub(offset));
        let start = into.len();
        into.resize(start + length, 0);
        let mut at = start;
        self.readable.range(offset, length, |host, length| {
            if let Some(part) = into.get_mut(at..at + length) {
                copy_from(host, part);
            }
            at += length;
        })
    }

    /// Copies the first readable bytes into `into`, as many as there are.
    pub fn copy_start(&self, into: &mut [u8]) -> usize {
        let mut done = 0;
        self.readable.range(0, into.len(), |host, length| {
            if let Some(part) = into.get_mut(done..done + length) {
                copy_from(host, part);
            }
            done += length;
        })
    }

    /// Writes `bytes` at `offset` of the writable part, as many as have room.
    pub fn copy_out(&self, offset: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        self.writable.range(offset, bytes.len(), |host, length| {
            if let Some(part) = bytes.get(done..done + length) {
                copy_to(host, part);
                self.memory.mark_host(host, length);
            }
            done += length;
        })
    }

    /// The readable part from `offset` on, at most `limit` bytes.
    pub fn reader(&mut self, offset: usize, limit: usize) -> GuestReader<'_> {
        let left = self.readable.length.saturating_sub(offset).min(limit);
        GuestReader {
            cursor: self.readable.cursor(offset),
            left,
            segments: &mut self.readable,
        }
    }

    /// The writable part from `offset` on, at most `limit` bytes.
    pub fn writer(&mut self, offset: usize, limit: usize) -> GuestWriter<'_> {
        let left = self.writable.length.saturating_sub(offset).min(limit);
        let cursor = self.writable.cursor(offset);
        GuestWriter {
            memory: &self.memory,
            cursor,
            left,
            written: 0,
            segments: &mut self.writable,
        }
    }
}
