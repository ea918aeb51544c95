//! Walks a descriptor chain (VIRTIO 1.3, 2.7.5): direct and indirect descriptors to guest buffers.
//!
//! Everything in the table comes from the guest and may change while we look: each descriptor is copied once,
//! then checked. The walk ends after as many descriptors as the table has, so a loop ends it too.

use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::memory::{Buffers, GuestMemory, Unmapped, Window};

/// Bytes of a descriptor.
pub const DESCRIPTOR: usize = 16;
/// Bytes of one direction of a chain at most. The largest request that a driver sends is a little over 1 MiB
/// with what INIT allows it.
const MAX_BYTES: usize = 8 << 20;
/// Entries of an indirect table at most: what a 16-bit index can name.
const MAX_INDIRECT: usize = 1 << 16;

/// Why a chain was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A buffer or table outside of guest memory.
    #[error(transparent)]
    Unmapped(#[from] Unmapped),
    /// An index outside of its table.
    #[error("descriptor index {0} is outside of its table")]
    BadIndex(u16),
    /// More descriptors than the table has.
    #[error("the chain loops")]
    Loop,
    /// A readable buffer after a writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// An indirect table in an indirect table, or one followed by another descriptor, or of no whole entries.
    #[error("bad indirect table")]
    Indirect,
    /// Too many bytes.
    #[error("the chain has more than {MAX_BYTES} bytes")]
    TooLong,
}

struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn decode(all: u128) -> Self {
        Descriptor {
            address: all as u64,
            length: (all >> 64) as u32,
            flags: (all >> 96) as u16,
            next: (all >> 112) as u16,
        }
    }

    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

/// Where descriptors are taken from.
enum Table<'a> {
    Own(&'a Window),
    Indirect(Window<&'a GuestMemory>),
    /// An indirect table that is not contiguous in this process.
    Scattered(&'a GuestMemory, u64),
}

impl Table<'_> {
    fn get(&self, index: u16) -> Result<Descriptor, Unmapped> {
        let offset = usize::from(index) * DESCRIPTOR;
        match self {
            Table::Own(window) => Ok(Descriptor::decode(window.load_u128(offset))),
            Table::Indirect(window) => Ok(Descriptor::decode(window.load_u128(offset))),
            Table::Scattered(memory, address) => {
                let mut bytes = [0; DESCRIPTOR];
                memory.read(address.saturating_add(offset as u64), &mut bytes)?;
                Ok(Descriptor::decode(u128::from_le_bytes(bytes)))
            }
        }
    }
}

/// Collects the buffers of the chain that starts at `head` of the descriptor table `table` of `size` entries.
/// After an error `buffers` holds what was found before it.
pub fn walk(table: &Window, size: u16, head: u16, buffers: &mut Buffers) -> Result<(), ChainError> {
    // The driver's stores to the table precede its store to the available index, which was loaded with acquire.
    std::sync::atomic::fence(Ordering::Acquire);
    match walk_table(&Table::Own(table), usize::from(size), head, buffers)? {
        None => Ok(()),
        Some(indirect) => {
            let length = indirect.length as usize;
            let entries = length / DESCRIPTOR;
            if entries == 0 || !length.is_multiple_of(DESCRIPTOR) || entries > MAX_INDIRECT {
                return Err(ChainError::Indirect);
            }
            let memory: &GuestMemory = table.memory();
            let nested = match Window::new(memory, indirect.address, length, 1) {
                Ok(window) => Table::Indirect(window),
                Err(_) => Table::Scattered(memory, indirect.address),
            };
            match walk_table(&nested, entries, 0, buffers)? {
                None => Ok(()),
                Some(_) => Err(ChainError::Indirect),
            }
        }
    }
}

/// Follows one table; returns the indirect descriptor that ended it, if any.
fn walk_table(
    table: &Table<'_>,
    size: usize,
    head: u16,
    buffers: &mut Buffers,
) -> Result<Option<Descriptor>, ChainError> {
    let mut index = head;
    for _ in 0..size {
        if usize::from(index) >= size {
            return Err(ChainError::BadIndex(index));
        }
        let descriptor = table.get(index)?;
        if descriptor.has(VRING_DESC_F_INDIRECT) {
            return match descriptor.has(VRING_DESC_F_NEXT) {
                true => Err(ChainError::Indirect),
                false => Ok(Some(descriptor)),
            };
        }
        add(&descriptor, buffers)?;
        if !descriptor.has(VRING_DESC_F_NEXT) {
            return Ok(None);
        }
        index = descriptor.next;
    }
    Err(ChainError::Loop)
}

fn add(descriptor: &Descriptor, buffers: &mut Buffers) -> Result<(), ChainError> {
    let length = descriptor.length as usize;
    if descriptor.has(VRING_DESC_F_WRITE) {
        if buffers.writable() + length > MAX_BYTES {
            return Err(ChainError::TooLong);
        }
        buffers.push_writable(descriptor.address, length)?;
    } else {
        if buffers.writable() > 0 {
            return Err(ChainError::Order);
        }
        if buffers.readable() + length > MAX_BYTES {
            return Err(ChainError::TooLong);
        }
        buffers.push_readable(descriptor.address, length)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
