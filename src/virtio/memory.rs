//! Guest memory: the one place in this crate with `unsafe` code.
//!
//! The guest may change its memory at any time, so nothing here ever makes a reference to it: bytes are copied in
//! and out, ring indexes are loaded and stored atomically, and buffers are handed to system calls as addresses.
//! Everything that holds an address also holds the [`GuestMemory`] that keeps it mapped, so a mapping that the
//! front-end has taken away stays until its last user is done.
//!
//! Whoever writes marks the pages dirty, after the write: a page that is fetched in between is fetched again.
//!
//! * [`Window`]: a part that is contiguous, such as a part of a ring
//! * [`Buffers`]: what a descriptor chain names; [`GuestReader`] and [`GuestWriter`] for system calls on it
//! * [`DirtyLog`]: the front-end's record of what was written

mod buffers;
mod log;
mod transfer;
mod window;

use std::sync::Arc;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

pub use buffers::Buffers;
pub use log::DirtyLog;
pub use transfer::{GuestReader, GuestWriter};
pub use window::Window;

/// An access to memory that the guest does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no guest memory at {address:#x}, {length} bytes")]
pub struct Unmapped {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

struct Region {
    /// Guest physical addresses, end exclusive.
    start: u64,
    end: u64,
    /// Where it is mapped in this process.
    host: usize,
}

/// One state of the guest's memory, mapped for as long as somebody holds it.
pub struct GuestMemory {
    /// By guest address, ascending, disjoint.
    regions: Box<[Region]>,
    log: Arc<DirtyLog>,
    /// Keeps the regions mapped.
    map: GuestMemoryMmap<()>,
}

impl GuestMemory {
    /// Takes over mapped regions; pages written are marked in `log`.
    pub fn new(map: GuestMemoryMmap<()>, log: Arc<DirtyLog>) -> Self {
        let region = |region: &vm_memory::GuestRegionMmap<()>| Region {
            start: region.start_addr().raw_value(),
            end: region.start_addr().raw_value().saturating_add(region.len()),
            host: region.as_ptr() as usize,
        };
        let mut regions: Box<[Region]> = map.iter().map(region).collect();
        regions.sort_unstable_by_key(|region| region.start);
        GuestMemory { regions, log, map }
    }

    /// The regions, to build the next state from.
    pub fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    fn region(&self, address: u64) -> Option<&Region> {
        let index = self.regions.partition_point(|region| region.end <= address);
        self.regions.get(index).filter(|region| region.start <= address)
    }

    /// Calls `each` with the host address and length of every contiguous piece of a guest range, in order. `hint` is
    /// the region where the last range was found.
    fn pieces(
        &self,
        hint: &mut usize,
        address: u64,
        length: usize,
        mut each: impl FnMut(usize, usize),
    ) -> Result<(), Unmapped> {
        if let Some(region) = self.regions.get(*hint)
            && address >= region.start
            && address
                .checked_add(length as u64)
                .is_some_and(|end| end <= region.end)
        {
            if length > 0 {
                each(region.host + (address - region.start) as usize, length);
            }
            return Ok(());
        }
        let unmapped = Unmapped {
            address,
            length: length as u64,
        };
        let (mut at, mut left) = (address, length);
        while left > 0 {
            let index = self.regions.partition_point(|region| region.end <= at);
            let region = self
                .regions
                .get(index)
                .filter(|region| region.start <= at)
                .ok_or(unmapped)?;
            *hint = index;
            let offset = at - region.start;
            let piece = left.min(usize::try_from(region.end - at).unwrap_or(usize::MAX));
            each(region.host + offset as usize, piece);
            left -= piece;
            at = at.saturating_add(piece as u64);
        }
        Ok(())
    }

    /// Copies guest bytes into `buffer`.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), Unmapped> {
        let mut done = 0;
        self.pieces(&mut 0, address, buffer.len(), |host, length| {
            if let Some(part) = buffer.get_mut(done..done + length) {
                copy_from(host, part);
            }
            done += length;
        })
    }

    /// Marks what lies behind a host address range as written.
    fn mark_host(&self, host: usize, length: usize) {
        if !self.log.is_active() || length == 0 {
            return;
        }
        let inside = |region: &&Region| {
            host >= region.host && host - region.host < (region.end - region.start) as usize
        };
        if let Some(region) = self.regions.iter().find(inside) {
            self.log.mark(region.start + (host - region.host) as u64, length);
        }
    }
}

fn volatile<'a>(host: usize, length: usize) -> VolatileSlice<'a> {
    // SAFETY: every caller passes a range that `GuestMemory::pieces` found inside one mapped region and holds a
    // reference to that `GuestMemory`, which keeps the region mapped, for the slice's short life. The slice makes
    // no references to the memory; it copies with volatile accesses, so that a guest that writes at the same
    // time can only make the bytes arbitrary.
    unsafe { VolatileSlice::new(host as *mut u8, length) }
}

fn copy_from(host: usize, buffer: &mut [u8]) {
    volatile(host, buffer.len()).copy_to(buffer);
}

fn copy_to(host: usize, buffer: &[u8]) {
    volatile(host, buffer.len()).copy_from(buffer);
}

#[cfg(test)]
pub(super) mod tests;
