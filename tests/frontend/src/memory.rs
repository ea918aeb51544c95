//! Guest memory: memfds mapped here and handed to the device.
//!
//! Addresses are guest-physical. Regions may touch (a buffer can then cross the border between two
//! mappings) or leave holes. Regions come and go while queues run; buffers inside a region keep its
//! mapping alive here, so a removed region stays readable for whoever still holds a slice of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::MemfdFlags;

use crate::{Error, Result};

mod mapping;
pub use mapping::Mapping;

/// Size of a page, and of what one bit of the dirty log stands for.
pub const PAGE: u64 = 4096;

/// Where a region lies, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest-physical address; a multiple of the page size.
    pub address: u64,
    /// Size; a multiple of the page size.
    pub size: u64,
}

/// One region with its file and its mapping.
#[derive(Clone)]
pub struct Region {
    /// Where the guest sees it.
    pub place: Place,
    /// The file behind it.
    pub file: Arc<OwnedFd>,
    /// Where it starts in the file.
    pub file_offset: u64,
    /// Where we see it.
    pub mapping: Arc<Mapping>,
}

impl Region {
    fn new(place: Place, file: Arc<OwnedFd>, file_offset: u64) -> Result<Self> {
        let mapping = Arc::new(Mapping::new(&*file, file_offset, place.size as usize)?);
        Ok(Self {
            place,
            file,
            file_offset,
            mapping,
        })
    }

    fn contains(&self, address: u64) -> bool {
        address >= self.place.address && address - self.place.address < self.place.size
    }
}

/// A piece of one region, for code that cannot afford to look up regions each time.
#[derive(Clone)]
pub struct Slice {
    mapping: Arc<Mapping>,
    offset: usize,
    len: usize,
    /// Guest-physical address of its first byte.
    pub address: u64,
}

impl Slice {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address in this process, as vhost-user names rings.
    pub fn user_address(&self) -> u64 {
        self.mapping.address() + self.offset as u64
    }

    fn check(&self, offset: usize, len: usize) -> usize {
        assert!(
            offset + len <= self.len,
            "{len} bytes at {offset} of a slice of {} bytes",
            self.len
        );
        self.offset + offset
    }

    /// Copies out.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.mapping.read(self.check(offset, into.len()), into);
    }

    /// Copies in.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.mapping.write(self.check(offset, bytes.len()), bytes);
    }

    /// Sets all bytes.
    pub fn fill(&self, value: u8) {
        self.mapping.fill(self.offset, self.len, value);
    }

    /// Fills it from `file` at `position`, with one system call, and returns the number of bytes.
    pub fn read_file(&self, file: &File, position: u64) -> Result<usize> {
        self.mapping.read_file(self.offset, self.len, file, position)
    }

    /// Reads a published u16.
    pub fn load_u16(&self, offset: usize) -> u16 {
        self.mapping.load_u16(self.check(offset, 2))
    }

    /// Publishes a u16.
    pub fn store_u16(&self, offset: usize, value: u16) {
        self.mapping.store_u16(self.check(offset, 2), value);
    }

    /// Reads a u32 that is not published by itself.
    pub fn read_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

/// The memory of a guest.
pub struct GuestMemory {
    regions: RwLock<Vec<Region>>,
    free: Mutex<FreeList>,
}

impl GuestMemory {
    /// Makes memory with these regions, all in one memfd, one after the other, with a page between them
    /// so that every region but the first has an odd file offset.
    pub fn new(places: &[Place]) -> Result<Self> {
        let total: u64 = places.iter().map(|place| place.size + PAGE).sum();
        let file = Arc::new(memfd("guest-memory", total)?);
        let mut regions = Vec::new();
        let mut free = FreeList::default();
        let mut file_offset = 0;
        for place in places {
            regions.push(Region::new(*place, file.clone(), file_offset)?);
            free.give(place.address, place.size, place.address);
            file_offset += place.size + PAGE;
        }
        Ok(Self {
            regions: RwLock::new(regions),
            free: Mutex::new(free),
        })
    }

    /// All regions, as they are now.
    pub fn regions(&self) -> Vec<Region> {
        self.regions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Adds a region with a file of its own.
    pub fn add(&self, place: Place) -> Result<Region> {
        let region = Region::new(place, Arc::new(memfd("guest-memory-added", place.size)?), 0)?;
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        regions.push(region.clone());
        regions.sort_by_key(|region| region.place.address);
        self.free().give(place.address, place.size, place.address);
        Ok(region)
    }

    /// Removes the region at `address`. Nothing allocated may lie in it.
    pub fn remove(&self, address: u64) -> Result<Region> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let index = regions
            .iter()
            .position(|region| region.place.address == address)
            .ok_or_else(|| Error::Usage(format!("no region at {address:#x}")))?;
        let size = regions[index].place.size;
        if !self.free().take_exact(address, size) {
            return Err(Error::Usage(format!("region {address:#x} is in use")));
        }
        Ok(regions.remove(index))
    }

    /// The first address behind all regions.
    pub fn end(&self) -> u64 {
        self.regions()
            .iter()
            .map(|region| region.place.address + region.place.size)
            .max()
            .unwrap_or(0)
    }

    /// A slice of `len` bytes at `address`, which must lie in one region.
    pub fn slice(&self, address: u64, len: usize) -> Result<Slice> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions
            .iter()
            .find(|region| region.contains(address))
            .filter(|region| len as u64 <= region.place.size - (address - region.place.address))
            .map(|region| Slice {
                mapping: region.mapping.clone(),
                offset: (address - region.place.address) as usize,
                len,
                address,
            })
            .ok_or_else(|| Error::Usage(format!("{len} bytes at {address:#x} are not in one region")))
    }

    /// Calls `f` with every (mapping, offset, range) that `len` bytes at `address` consist of.
    fn pieces(&self, address: u64, len: usize, mut f: impl FnMut(&Mapping, usize, std::ops::Range<usize>)) {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        while done < len {
            let at = address + done as u64;
            let Some(region) = regions.iter().find(|region| region.contains(at)) else {
                panic!("{at:#x} is outside of guest memory");
            };
            let offset = (at - region.place.address) as usize;
            let here = (len - done).min(region.place.size as usize - offset);
            f(&region.mapping, offset, done..done + here);
            done += here;
        }
    }

    /// Copies out; may cross regions.
    pub fn read(&self, address: u64, into: &mut [u8]) {
        self.pieces(address, into.len(), |mapping, offset, range| {
            mapping.read(offset, &mut into[range])
        });
    }

    /// Copies in; may cross regions.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.pieces(address, bytes.len(), |mapping, offset, range| {
            mapping.write(offset, &bytes[range])
        });
    }

    /// Sets `len` bytes to `value`.
    pub fn fill(&self, address: u64, len: usize, value: u8) {
        self.pieces(address, len, |mapping, offset, range| {
            mapping.fill(offset, range.len(), value)
        });
    }

    /// A copy of `len` bytes.
    pub fn copy(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(address, &mut bytes);
        bytes
    }

    /// Takes `len` bytes inside one region, aligned to `align` (a power of two).
    pub fn allocate(&self, len: usize, align: u64) -> Result<u64> {
        self.free()
            .take(round_up(len.max(1) as u64, 16), align.max(16))
            .ok_or_else(|| Error::Usage(format!("guest memory has no {len} free bytes")))
    }

    /// Takes `before` bytes below and `after` bytes above the border at which the region that ends at
    /// `border` meets the next one.
    pub fn allocate_across(&self, border: u64, before: u64, after: u64) -> Result<u64> {
        let mut free = self.free();
        if !free.take_exact(border - before, before) {
            return Err(Error::Usage(format!(
                "the {before} bytes below {border:#x} are not free"
            )));
        }
        if !free.take_exact(border, after) {
            return Err(Error::Usage(format!(
                "the {after} bytes above {border:#x} are not free"
            )));
        }
        Ok(border - before)
    }

    /// Gives back what [`GuestMemory::allocate`] took.
    pub fn release(&self, address: u64, len: usize) {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(region) = regions.iter().find(|region| region.contains(address)) {
            self.free()
                .give(address, round_up(len.max(1) as u64, 16), region.place.address);
        }
    }

    fn free(&self) -> MutexGuard<'_, FreeList> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Free ranges by address: (length, start of the region), never merged over a region's border.
#[derive(Default)]
struct FreeList {
    ranges: BTreeMap<u64, (u64, u64)>,
}

impl FreeList {
    fn give(&mut self, mut address: u64, mut len: u64, region: u64) {
        if let Some((&before, &(size, of))) = self.ranges.range(..address).next_back() {
            assert!(before + size <= address, "{address:#x} released twice");
            if before + size == address && of == region {
                self.ranges.remove(&before);
                address = before;
                len += size;
            }
        }
        if let Some(&(size, of)) = self.ranges.get(&(address + len))
            && of == region
        {
            self.ranges.remove(&(address + len));
            len += size;
        }
        self.ranges.insert(address, (len, region));
    }

    fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        let (start, from) = self.ranges.iter().find_map(|(&start, &(size, _))| {
            let from = round_up(start, align);
            (from + len <= start + size).then_some((start, from))
        })?;
        self.carve(start, from, len);
        Some(from)
    }

    fn take_exact(&mut self, address: u64, len: u64) -> bool {
        let Some((&start, &(size, _))) = self.ranges.range(..=address).next_back() else {
            return false;
        };
        if address + len > start + size {
            return false;
        }
        self.carve(start, address, len);
        true
    }

    fn carve(&mut self, start: u64, from: u64, len: u64) {
        if let Some((size, region)) = self.ranges.remove(&start) {
            if from > start {
                self.ranges.insert(start, (from - start, region));
            }
            if from + len < start + size {
                self.ranges
                    .insert(from + len, (start + size - from - len, region));
            }
        }
    }
}

/// The bitmap that the device marks changed pages in, one bit for each page from address 0.
pub struct DirtyLog {
    /// The file to hand to the device.
    pub file: OwnedFd,
    /// Its size in bytes.
    pub size: u64,
    mapping: Mapping,
}

impl DirtyLog {
    /// A clean log for `memory`.
    pub fn new(memory: &GuestMemory) -> Result<Self> {
        let size = round_up(memory.end().div_ceil(PAGE).div_ceil(8), PAGE);
        let file = memfd("dirty-log", size)?;
        let mapping = Mapping::new(&file, 0, size as usize)?;
        Ok(Self { file, size, mapping })
    }

    /// The guest-physical addresses of all marked pages; cleans the log.
    pub fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for word in 0..self.mapping.size() / 8 {
            let bits = self.mapping.take_u64(word * 8);
            pages.extend(
                (0..64)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| (word as u64 * 64 + bit) * PAGE),
            );
        }
        pages
    }
}

fn memfd(name: &str, size: u64) -> Result<OwnedFd> {
    let file =
        rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map_err(|e| Error::io("memfd_create", e))?;
    rustix::fs::ftruncate(&file, size).map_err(|e| Error::io(format!("size a memfd to {size}"), e))?;
    Ok(file)
}

fn round_up(value: u64, to: u64) -> u64 {
    value.next_multiple_of(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two() -> GuestMemory {
        GuestMemory::new(&[
            Place {
                address: 0,
                size: 4 * PAGE,
            },
            Place {
                address: 4 * PAGE,
                size: 4 * PAGE,
            },
            Place {
                address: 16 * PAGE,
                size: PAGE,
            },
        ])
        .unwrap()
    }

    #[test]
    fn a_buffer_may_cross_regions() {
        let memory = two();
        let at = memory.allocate_across(4 * PAGE, 3, 5).unwrap();
        memory.write(at, b"abcdefgh");
        assert_eq!(memory.copy(at, 8), b"abcdefgh");
        assert_eq!(memory.copy(4 * PAGE, 2), b"de");
        assert!(memory.slice(at, 8).is_err());
    }

    #[test]
    fn released_memory_is_whole_again() {
        let memory = two();
        let a = memory.allocate(100, 16).unwrap();
        let b = memory.allocate(5000, 4096).unwrap();
        assert!(memory.remove(0).is_err());
        memory.release(a, 100);
        memory.release(b, 5000);
        assert_eq!(memory.remove(0).unwrap().place.size, 4 * PAGE);
        assert!(memory.slice(0, 1).is_err());
    }

    #[test]
    fn allocations_stay_in_one_region() {
        let memory = two();
        for _ in 0..4 {
            let at = memory.allocate(2 * PAGE as usize, PAGE).unwrap();
            memory.slice(at, 2 * PAGE as usize).unwrap();
        }
        assert!(memory.allocate(2 * PAGE as usize, 16).is_err());
    }
}
