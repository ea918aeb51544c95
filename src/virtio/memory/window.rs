//! Parts of guest memory that are contiguous in this process too, accessed as numbers: rings and tables.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use super::{GuestMemory, Unmapped, copy_from, copy_to};

/// What keeps guest memory mapped: nothing but these two, whose target is always the same.
pub trait Keeps: Deref<Target = GuestMemory> {}

impl Keeps for Arc<GuestMemory> {}
impl Keeps for &GuestMemory {}

/// A part of guest memory that is contiguous in this process too, such as one of the three parts of a ring.
pub struct Window<M: Keeps = Arc<GuestMemory>> {
    memory: M,
    host: usize,
    length: usize,
}

impl<M: Keeps> Window<M> {
    /// `length` bytes at `address`, which must be a multiple of `align`.
    pub fn new(memory: M, address: u64, length: usize, align: u64) -> Result<Self, Unmapped> {
        let unmapped = Unmapped {
            address,
            length: length as u64,
        };
        let region = memory.region(address).ok_or(unmapped)?;
        let host = region.host + (address - region.start) as usize;
        if region.end - address < length as u64 || !(host as u64).is_multiple_of(align) {
            return Err(unmapped);
        }
        Ok(Window { memory, host, length })
    }

    fn atomic(&self, offset: usize) -> Option<&AtomicU16> {
        let host = self.host + offset;
        if offset.checked_add(2)? > self.length || !host.is_multiple_of(2) {
            return None;
        }
        // SAFETY: the two bytes lie inside the window, are aligned, and stay mapped while `self.memory` lives,
        // which the returned lifetime does not exceed. All bit patterns are valid, and this process only ever
        // accesses ring indexes through atomics.
        Some(unsafe { AtomicU16::from_ptr(host as *mut u16) })
    }

    /// The little-endian number at `offset`; 0 outside of the window.
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        self.atomic(offset)
            .map_or(0, |value| u16::from_le(value.load(order)))
    }

    /// Stores a little-endian number at `offset`; nothing outside of the window.
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        if let Some(cell) = self.atomic(offset) {
            cell.store(value.to_le(), order);
            self.memory.mark_host(self.host + offset, 2);
        }
    }

    /// Copies 16 bytes at `offset`, a multiple of 16, as a little-endian number; 0 outside of the window.
    pub fn load_u128(&self, offset: usize) -> u128 {
        let host = self.host + offset;
        if offset.checked_add(16).is_none_or(|end| end > self.length) {
            return 0;
        }
        if !host.is_multiple_of(8) {
            let mut bytes = [0; 16];
            copy_from(host, &mut bytes);
            return u128::from_le_bytes(bytes);
        }
        // SAFETY: the sixteen bytes lie inside the window, are aligned for two numbers of eight, and stay mapped
        // while `self.memory` lives. All bit patterns are valid.
        let halves = unsafe {
            [
                AtomicU64::from_ptr(host as *mut u64),
                AtomicU64::from_ptr((host + 8) as *mut u64),
            ]
        };
        let [low, high] = halves.map(|half| u128::from(u64::from_le(half.load(Ordering::Relaxed))));
        low | high << 64
    }

    /// Writes `bytes` at `offset`; nothing outside of the window.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        if offset
            .checked_add(bytes.len())
            .is_some_and(|end| end <= self.length)
        {
            copy_to(self.host + offset, bytes);
            self.memory.mark_host(self.host + offset, bytes.len());
        }
    }

    /// The memory that the window is in.
    pub fn memory(&self) -> &M {
        &self.memory
    }
}
