//! Guest memory: the one place in this crate with `unsafe` code.
//!
//! The guest may change its memory at any time, so nothing here ever makes a reference to it: bytes are copied in
//! and out, ring indexes are loaded and stored atomically, and buffers are handed to system calls as addresses.
//! Everything that holds an address also holds the [`GuestMemory`] that keeps it mapped, so a mapping that the
//! front-end has taken away stays until its last user is done.
//!
//! Whoever writes marks the pages dirty, after the write: a page that is fetched in between is fetched again.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};

use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use parking_lot::RwLock;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

/// Buffers of one system call at most (`IOV_MAX`).
const MAX_VECTOR: usize = 1024;

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

/// Guest buffers in order, without copying: one direction of a descriptor chain.
#[derive(Default)]
struct Segments {
    // The lifetime is not true: the slices are valid while the `Buffers` that owns them holds its memory. They
    // leave this module only inside calls that borrow the `Buffers`.
    slices: Vec<FileVolatileSlice<'static>>,
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
    fn with_vector<R>(
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

#[derive(Clone, Copy, Default)]
struct Cursor {
    index: usize,
    offset: usize,
}

impl Cursor {
    fn advanced(mut self, slices: &[FileVolatileSlice<'_>], mut by: usize) -> Cursor {
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

/// Guest bytes as the payload of a write.
pub struct GuestReader<'a> {
    segments: &'a mut Segments,
    cursor: Cursor,
    left: usize,
}

impl GuestReader<'_> {
    fn advance(&mut self, by: usize) {
        self.cursor = self.cursor.advanced(&self.segments.slices, by);
        self.left -= by;
    }
}

impl io::Read for GuestReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.left);
        let mut done = 0;
        self.segments.with_vector(self.cursor, count, |slices| {
            for slice in slices {
                if let Some(part) = buffer.get_mut(done..done + slice.len()) {
                    copy_from(slice.as_ptr() as usize, part);
                    done += slice.len();
                }
            }
        });
        self.advance(done);
        Ok(done)
    }
}

impl ZeroCopyReader for GuestReader<'_> {
    fn read_to(&mut self, f: &mut dyn FileReadWriteVolatile, count: usize, off: u64) -> io::Result<usize> {
        let count = count.min(self.left);
        let done = self
            .segments
            .with_vector(self.cursor, count, |slices| match slices {
                [] => Ok(0),
                [one] => f.write_at_volatile(*one, off),
                many => f.write_vectored_at_volatile(many, off),
            })?;
        let done = done.min(count);
        self.advance(done);
        Ok(done)
    }
}

/// Guest room for the data of a read.
pub struct GuestWriter<'a> {
    memory: &'a GuestMemory,
    segments: &'a mut Segments,
    cursor: Cursor,
    left: usize,
    written: usize,
}

impl GuestWriter<'_> {
    /// Bytes written so far.
    pub fn written(&self) -> usize {
        self.written
    }

    fn advance(&mut self, by: usize) {
        if self.memory.log.is_active() {
            let memory = self.memory;
            self.segments.with_vector(self.cursor, by, |slices| {
                for slice in slices {
                    memory.mark_host(slice.as_ptr() as usize, slice.len());
                }
            });
        }
        self.cursor = self.cursor.advanced(&self.segments.slices, by);
        self.left -= by;
        self.written += by;
    }
}

impl io::Write for GuestWriter<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.left);
        let mut done = 0;
        self.segments.with_vector(self.cursor, count, |slices| {
            for slice in slices {
                if let Some(part) = buffer.get(done..done + slice.len()) {
                    copy_to(slice.as_ptr() as usize, part);
                    done += slice.len();
                }
            }
        });
        self.advance(done);
        Ok(done)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ZeroCopyWriter for GuestWriter<'_> {
    fn write_from(&mut self, f: &mut dyn FileReadWriteVolatile, count: usize, off: u64) -> io::Result<usize> {
        let count = count.min(self.left);
        let done = self
            .segments
            .with_vector(self.cursor, count, |slices| match slices {
                [] => Ok(0),
                [one] => f.read_at_volatile(*one, off),
                many => f.read_vectored_at_volatile(many, off),
            })?;
        let done = done.min(count);
        self.advance(done);
        Ok(done)
    }

    fn available_bytes(&self) -> usize {
        self.left
    }
}

/// The front-end's record of pages written: one bit per 4 KiB of guest address space (vhost-user, "Migration").
///
/// The front-end may replace the record at any time and must find no bit set in the old one afterwards, so marks
/// are set under the read side of a lock. Without a record nothing but one flag is looked at.
#[derive(Default)]
pub struct DirtyLog {
    active: AtomicBool,
    state: RwLock<LogState>,
}

#[derive(Default)]
struct LogState {
    wanted: bool,
    map: Option<LogMap>,
}

struct LogMap {
    host: usize,
    length: usize,
}

impl Drop for LogMap {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `DirtyLog::set_map`, is unmapped only here, and references into it
        // live only inside `DirtyLog::mark`, which holds the lock around the owner of this value.
        // A failure leaves a mapping behind, which harms nobody.
        let _ = unsafe { munmap(self.host as *mut std::ffi::c_void, self.length) };
    }
}

impl DirtyLog {
    fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Whether VHOST_F_LOG_ALL is negotiated.
    pub fn set_wanted(&self, wanted: bool) {
        let mut state = self.state.write();
        state.wanted = wanted;
        self.active.store(wanted && state.map.is_some(), Ordering::SeqCst);
    }

    /// Marks pages in `length` bytes at `offset` of `file` from now on, and nowhere else.
    pub fn set_map(&self, file: OwnedFd, offset: u64, length: u64) -> io::Result<()> {
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let size = rustix::fs::fstat(&file)?.st_size;
        let end = offset
            .checked_add(length as u64)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if length == 0 || end > u64::try_from(size).unwrap_or(0) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new shared mapping at an address that the kernel chooses; it aliases no memory of ours.
        let host = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                file.as_fd(),
                offset,
            )
        }?;
        let mut state = self.state.write();
        state.map = Some(LogMap {
            host: host as usize,
            length,
        });
        self.active.store(state.wanted, Ordering::SeqCst);
        Ok(())
    }

    /// Stops marking and forgets the record.
    pub fn clear(&self) {
        let mut state = self.state.write();
        *state = LogState::default();
        self.active.store(false, Ordering::SeqCst);
    }

    fn mark(&self, address: u64, length: usize) {
        let state = self.state.read();
        let Some(map) = state.map.as_ref().filter(|_| state.wanted) else {
            return;
        };
        let last = address.saturating_add(length as u64 - 1) >> 12;
        for page in (address >> 12)..=last {
            let byte = (page >> 3) as usize;
            if byte >= map.length {
                return;
            }
            // SAFETY: the byte lies inside the mapping, which the held lock keeps; the front-end reads and clears
            // it atomically too.
            let cell = unsafe { AtomicU8::from_ptr((map.host + byte) as *mut u8) };
            cell.fetch_or(1 << (page & 7), Ordering::Release);
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
