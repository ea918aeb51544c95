//! The only unsafe room of this crate: a shared mapping of a memfd.
//!
//! Another process writes to it while we read. All access goes through raw pointers, so that no Rust
//! reference to the bytes ever exists; ring indices are read and written as atomics.

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

use crate::{Error, Result};

/// A shared, writable mapping. Offsets and lengths are in bytes.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory that stays where it is until it is dropped, and it is only touched
// by raw copies and atomics, which make no assumption about who else touches it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `fd` from `offset`.
    pub fn new(fd: impl AsFd, offset: u64, len: usize) -> Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing of ours.
        let address = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                offset,
            )
        }
        .map_err(|e| Error::io(format!("map {len} bytes"), e))?;
        let base = NonNull::new(address.cast::<u8>()).ok_or_else(|| Error::Usage("mapped at 0".into()))?;
        Ok(Self { base, len })
    }

    /// Where it is mapped here: the "VMM virtual address" of vhost-user.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Its length.
    pub fn size(&self) -> usize {
        self.len
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset:#x} are outside of a mapping of {:#x} bytes",
            self.len
        );
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Copies out of the mapping.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: `from` is valid for the length (checked by `at`), and `into` is ours alone.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies into the mapping.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `to` is valid for the length (checked by `at`); the kernel mapped it writable.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Sets `len` bytes to `value`.
    pub fn fill(&self, offset: usize, len: usize, value: u8) {
        let to = self.at(offset, len);
        // SAFETY: as in `write`.
        unsafe { ptr::write_bytes(to, value, len) }
    }

    /// Reads `len` bytes of `file` at `position` into the mapping, with one system call.
    pub fn read_file(&self, offset: usize, len: usize, file: &File, position: u64) -> Result<usize> {
        let vector = [libc::iovec {
            iov_base: self.at(offset, len).cast::<c_void>(),
            iov_len: len,
        }];
        // SAFETY: the vector has one element, which names bytes inside the mapping (checked by `at`); the kernel writes
        // to them as another process would.
        let done = unsafe { libc::preadv64(file.as_raw_fd(), vector.as_ptr(), 1, position as i64) };
        usize::try_from(done).map_err(|_| Error::io("preadv", std::io::Error::last_os_error()))
    }

    /// Reads a little-endian u16 that the other side publishes.
    pub fn load_u16(&self, offset: usize) -> u16 {
        let at = self.at(offset, 2).cast::<u16>();
        assert!(at.is_aligned());
        // SAFETY: valid and aligned, as just checked; both sides use it as an atomic.
        u16::from_le(unsafe { AtomicU16::from_ptr(at) }.load(Ordering::Acquire))
    }

    /// Publishes a little-endian u16.
    pub fn store_u16(&self, offset: usize, value: u16) {
        let at = self.at(offset, 2).cast::<u16>();
        assert!(at.is_aligned());
        // SAFETY: valid and aligned, as just checked; both sides use it as an atomic.
        unsafe { AtomicU16::from_ptr(at) }.store(value.to_le(), Ordering::Release);
    }

    /// Takes all bits of a u64 and leaves zero (dirty log).
    pub fn take_u64(&self, offset: usize) -> u64 {
        let at = self.at(offset, 8).cast::<u64>();
        assert!(at.is_aligned());
        // SAFETY: valid and aligned, as just checked; both sides use it as an atomic.
        u64::from_le(unsafe { AtomicU64::from_ptr(at) }.swap(0, Ordering::AcqRel))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and nothing refers to it any more.
        if let Err(e) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast::<c_void>(), self.len) } {
            eprintln!("unmap guest memory: {e}");
        }
    }
}
