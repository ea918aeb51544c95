//! Words that processes share: a range of a file, mapped.
//!
//! Whoever makes such a file writes the range before anybody maps it, so that no store can fail for want of space. Whoever may write to the cache
//! directory can still cut the file short, and then a load ends the process: the directory belongs to one trust domain.

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// See the module.
pub(super) struct Mapping {
    region: MmapRegion,
}

impl Mapping {
    /// Maps the first `size` bytes of `file`, a multiple of the page size.
    pub(super) fn new(file: &File, size: u64, writable: bool) -> io::Result<Self> {
        let mut protection = ProtFlags::READ;
        if writable {
            protection |= ProtFlags::WRITE;
        }
        let region = MmapRegion::build(
            Some(FileOffset::new(file.try_clone()?, 0)),
            usize::try_from(size).map_err(io::Error::other)?,
            protection.bits() as i32,
            MapFlags::SHARED.bits() as i32,
        )
        .map_err(io::Error::other)?;
        Ok(Self { region })
    }

    /// The word at `offset` bytes. It must not be stored to if the mapping is not writable.
    pub(super) fn word(&self, offset: u64) -> Option<&AtomicU64> {
        self.region.get_atomic_ref(offset as usize).ok()
    }
}
