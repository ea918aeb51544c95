//! The crate's unsafe code: mapping a bootstrap, and reading a cache file into a front-end's buffers.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use memmap2::{Mmap, MmapOptions};

/// Maps `size` bytes at `offset` of `file` for reading.
pub(crate) fn map(file: &File, offset: u64, size: usize) -> io::Result<Mmap> {
    // SAFETY: The mapping is read-only and private to this process, and is used as plain bytes: every structure
    // borrowed from it is valid for any bit pattern (zerocopy). What Rust cannot rule out is that another process
    // writes to the file meanwhile: bytes may then differ between two reads, which the callers bear because they
    // check each value where they use it and never index unchecked; or it truncates the file, which raises SIGBUS.
    // Files up to `bootstrap::COPY_LIMIT` are copied instead of mapped for that reason; larger ones belong to the
    // host's snapshotter, which replaces images by new files and never in place.
    unsafe { MmapOptions::new().offset(offset).len(size).map(file) }
}

/// Most buffers that one system call fills; more need more calls.
const MAX_BUFFERS: usize = 256;

/// A cache file, read at given offsets without a copy and without a file object of its own.
pub(crate) struct CacheFile<'a>(pub BorrowedFd<'a>);

impl CacheFile<'_> {
    fn preadv(&self, buffers: &[libc::iovec], offset: u64) -> io::Result<usize> {
        let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let count = i32::try_from(buffers.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: The descriptor is open for as long as it is borrowed. Each element describes memory that a
        // `FileVolatileSlice` vouches for during the caller's borrow; it may be guest memory that others write at
        // the same time, which the kernel does not mind.
        let read = unsafe { libc::preadv64(self.0.as_raw_fd(), buffers.as_ptr(), count, offset) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }
}

fn unsupported() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "a cache file is only read, and at given offsets",
    )
}

impl FileReadWriteVolatile for CacheFile<'_> {
    fn read_volatile(&mut self, _slice: FileVolatileSlice) -> io::Result<usize> {
        Err(unsupported())
    }

    fn write_volatile(&mut self, _slice: FileVolatileSlice) -> io::Result<usize> {
        Err(unsupported())
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice, offset: u64) -> io::Result<usize> {
        self.read_vectored_at_volatile(&[slice], offset)
    }

    fn read_vectored_at_volatile(&mut self, bufs: &[FileVolatileSlice], offset: u64) -> io::Result<usize> {
        let mut buffers = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; MAX_BUFFERS];
        let mut count = 0;
        for (buffer, slice) in buffers.iter_mut().zip(bufs) {
            *buffer = libc::iovec {
                iov_base: slice.as_ptr().cast(),
                iov_len: slice.len(),
            };
            count += 1;
        }
        self.preadv(buffers.get(..count).unwrap_or_default(), offset)
    }

    fn write_at_volatile(&mut self, _slice: FileVolatileSlice, _offset: u64) -> io::Result<usize> {
        Err(unsupported())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn a_cache_file_fills_buffers_in_order() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let mut buffers = [0u8; 7];
        let (first, second) = buffers.split_at_mut(3);
        // SAFETY: The array outlives the slices, and nothing else uses it meanwhile.
        let slices = unsafe {
            [
                FileVolatileSlice::from_mut_slice(first),
                FileVolatileSlice::from_mut_slice(second),
            ]
        };
        let mut cache = CacheFile(file.as_fd());
        assert_eq!(cache.read_vectored_at_volatile(&slices, 2).unwrap(), 7);
        assert_eq!(cache.read_at_volatile(slices[0], 10).unwrap(), 0);
        assert!(cache.write_at_volatile(slices[0], 0).is_err());
        assert_eq!(&buffers, b"2345678");
    }
}
