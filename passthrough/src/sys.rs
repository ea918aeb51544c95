//! The crate's only `unsafe` code, and the system calls that `rustix` does not offer.
//!
//! Everything here is a thin, safe wrapper that turns -1 into an `io::Error`. Policy lives elsewhere.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use rustix::thread::UnshareFlags;

/// An error that is nothing but `code`.
pub(crate) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// -1 means "look at errno", everything else is a length.
fn length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A `stat64` with every field zero, to be filled in.
pub(crate) fn empty_stat() -> stat64 {
    // SAFETY: the struct consists of integers only, for which all-zero bytes are a value.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// A `statvfs64` with every field zero, to be filled in.
pub(crate) fn empty_statvfs() -> libc::statvfs64 {
    // SAFETY: the struct consists of integers only, for which all-zero bytes are a value.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// Gives the calling thread a working directory, root and umask of its own.
pub(crate) fn unshare_fs() -> io::Result<()> {
    // SAFETY: only CLONE_FS is unshared, which leaves memory and the descriptor table alone: descriptors that other
    // threads own stay valid in this one and the other way round.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    Ok(())
}

/// Reads directory records (`struct linux_dirent64`) from the position of `directory` into `buffer`.
///
/// Returns the number of bytes filled, 0 at the end.
pub(crate) fn getdents64(directory: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`, which is exclusively ours for the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            directory.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    length(result as libc::ssize_t)
}

/// Most buffers that one preadv or pwritev takes.
const IOV_MAX: usize = libc::UIO_MAXIOV as usize;

/// A descriptor as the source or target of one zero-copy transfer, with the per-call flags of that transfer.
///
/// Only positioned transfers are offered: the file position of a descriptor that several requests share means nothing.
#[derive(Debug)]
pub(crate) struct Transfer<'a> {
    fd: BorrowedFd<'a>,
    /// `RWF_*` flags of pwritev2.
    flags: i32,
}

impl<'a> Transfer<'a> {
    /// A transfer from or to `fd` with the `RWF_*` flags `flags`.
    pub(crate) fn new(fd: BorrowedFd<'a>, flags: i32) -> Self {
        Transfer { fd, flags }
    }

    /// Runs `call` on the buffers in groups that one system call takes, until one of them is cut short.
    fn in_groups(
        &self,
        bufs: &[FileVolatileSlice],
        offset: u64,
        call: unsafe extern "C" fn(i32, *const libc::iovec, i32, i64, i32) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let mut vectors = [const { MaybeUninit::<libc::iovec>::uninit() }; IOV_MAX];
        let mut done = 0usize;
        for group in bufs.chunks(IOV_MAX) {
            let mut wanted = 0usize;
            for (vector, buf) in vectors.iter_mut().zip(group) {
                vector.write(libc::iovec {
                    iov_base: buf.as_ptr().cast(),
                    iov_len: buf.len(),
                });
                wanted = wanted.saturating_add(buf.len());
            }
            let at = i64::try_from(offset.saturating_add(done as u64)).map_err(|_| errno(libc::EINVAL))?;
            // SAFETY: the first `group.len()` vectors were written above. Each names memory that its FileVolatileSlice
            // vouches for while `bufs` is borrowed, and which is only accessed volatilely, here by the kernel.
            let result = unsafe {
                call(
                    self.fd.as_raw_fd(),
                    vectors.as_ptr().cast(),
                    group.len() as i32,
                    at,
                    self.flags,
                )
            };
            match length(result) {
                Ok(count) => {
                    done += count;
                    if count < wanted {
                        break;
                    }
                }
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

impl FileReadWriteVolatile for Transfer<'_> {
    fn read_volatile(&mut self, _: FileVolatileSlice) -> io::Result<usize> {
        Err(errno(libc::ESPIPE))
    }

    fn write_volatile(&mut self, _: FileVolatileSlice) -> io::Result<usize> {
        Err(errno(libc::ESPIPE))
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice, offset: u64) -> io::Result<usize> {
        self.in_groups(&[slice], offset, libc::preadv64v2)
    }

    fn read_vectored_at_volatile(&mut self, bufs: &[FileVolatileSlice], offset: u64) -> io::Result<usize> {
        self.in_groups(bufs, offset, libc::preadv64v2)
    }

    fn write_at_volatile(&mut self, slice: FileVolatileSlice, offset: u64) -> io::Result<usize> {
        self.in_groups(&[slice], offset, libc::pwritev64v2)
    }

    fn write_vectored_at_volatile(&mut self, bufs: &[FileVolatileSlice], offset: u64) -> io::Result<usize> {
        self.in_groups(bufs, offset, libc::pwritev64v2)
    }
}

/// What a lock request is about: a byte range, or for `l_len` 0 everything from `l_start` on.
pub(crate) fn range_lock(kind: i32, start: i64, len: i64) -> libc::flock64 {
    // SAFETY: the struct consists of integers only, for which all-zero bytes are a value.
    let mut lock: libc::flock64 = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = len;
    lock
}

/// One of `F_OFD_GETLK`, `F_OFD_SETLK`, `F_OFD_SETLKW` on `file`.
pub(crate) fn ofd_lock(file: BorrowedFd<'_>, command: i32, lock: &mut libc::flock64) -> io::Result<()> {
    // SAFETY: the three commands read and write one flock64, which is exclusively ours for the call.
    length(unsafe { libc::fcntl(file.as_raw_fd(), command, lock as *mut libc::flock64) } as libc::ssize_t)
        .map(drop)
}

/// An ioctl whose argument is a structure of `argument.len()` bytes that the kernel reads, writes, or both.
///
/// `request` must be one of the constants below: their sizes are what makes the call sound.
fn ioctl(file: BorrowedFd<'_>, request: libc::c_ulong, argument: &mut [u8]) -> io::Result<()> {
    // SAFETY: both callers pass a buffer of the size that the kernel reads and writes for their request.
    length(unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument.as_mut_ptr()) } as libc::ssize_t)
        .map(drop)
}

/// `FS_IOC_GETFLAGS`, `_IOR('f', 1, long)`.
pub(crate) const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
/// `FS_IOC_SETFLAGS`, `_IOW('f', 2, long)`.
pub(crate) const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
/// `FS_IOC_FSGETXATTR`, `_IOR('X', 31, struct fsxattr)`.
pub(crate) const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`, `_IOW('X', 32, struct fsxattr)`.
pub(crate) const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;

/// Reads or writes the 32 inode flags; the kernel moves an `int` in spite of the request's name.
pub(crate) fn inode_flags(file: BorrowedFd<'_>, request: u32, flags: &mut [u8; 4]) -> io::Result<()> {
    if request != FS_IOC_GETFLAGS && request != FS_IOC_SETFLAGS {
        return Err(errno(libc::ENOTTY));
    }
    ioctl(file, libc::c_ulong::from(request), flags)
}

/// Reads or writes a `struct fsxattr` (28 bytes).
pub(crate) fn extended_flags(file: BorrowedFd<'_>, request: u32, flags: &mut [u8; 28]) -> io::Result<()> {
    if request != FS_IOC_FSGETXATTR && request != FS_IOC_FSSETXATTR {
        return Err(errno(libc::ENOTTY));
    }
    ioctl(file, libc::c_ulong::from(request), flags)
}

/// `FS_IOC_FIEMAP`, `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: u32 = 0xc020_660b;
/// The extent is the file's last.
const EXTENT_LAST: u32 = 0x1;
/// Its data is compressed or otherwise not what it looks like, or lies in the inode: overwriting it may take space.
const EXTENT_ENCODED_OR_INLINE: u32 = 0x8 | 0x200;
/// Most extents that [`extents`] asks for at a time.
const EXTENTS_MAX: usize = 32;

/// Space of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Where in the file it begins, in bytes.
    pub(crate) start: u64,
    /// Bytes.
    pub(crate) length: u64,
    /// Overwriting it may take more space.
    pub(crate) may_grow: bool,
    /// There is none behind it.
    pub(crate) last: bool,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    _physical: u64,
    length: u64,
    _reserved64: [u64; 2],
    flags: u32,
    _reserved: [u32; 3],
}

/// `struct fiemap` with room for extents.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawExtents {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    room: u32,
    _reserved: u32,
    extents: [RawExtent; EXTENTS_MAX],
}

/// Where `file` has space, from `start` on for `length` bytes, written or not. Returns how many of `into` were filled, 32 at
/// most.
///
/// EOPNOTSUPP, ENOTTY: the file system does not tell.
pub(crate) fn extents(
    file: BorrowedFd<'_>,
    start: u64,
    length: u64,
    into: &mut [Extent],
) -> io::Result<usize> {
    let mut raw = RawExtents {
        start,
        length,
        room: into.len().min(EXTENTS_MAX) as u32,
        ..RawExtents::default()
    };
    // SAFETY: the kernel reads the head of `raw` and writes it and at most `room` extents, for which there is space.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as _, &mut raw as *mut RawExtents) };
    crate::sys::length(result as libc::ssize_t)?;
    let told = raw.extents.iter().take(raw.mapped as usize);
    let mut filled = 0;
    for (to, from) in into.iter_mut().zip(told) {
        *to = Extent {
            start: from.logical,
            length: from.length,
            may_grow: from.flags & EXTENT_ENCODED_OR_INLINE != 0,
            last: from.flags & EXTENT_LAST != 0,
        };
        filled += 1;
    }
    Ok(filled)
}

/// Largest file handle the kernel makes (`MAX_HANDLE_SZ`).
pub(crate) const HANDLE_MAX: usize = 128;

/// `struct file_handle` with room for the largest handle.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawHandle {
    handle_bytes: u32,
    handle_type: i32,
    f_handle: [u8; HANDLE_MAX],
}

/// Asks the host for a handle of the file behind `file`; calls `take` with the listed id of its mount, its type and
/// its bytes.
///
/// EOPNOTSUPP: the file system has no handles. EOVERFLOW: the handle is larger than any the kernel makes.
pub(crate) fn name_to_handle<T>(
    file: BorrowedFd<'_>,
    take: impl FnOnce(i32, i32, &[u8]) -> T,
) -> io::Result<T> {
    let mut raw = RawHandle {
        handle_bytes: HANDLE_MAX as u32,
        handle_type: 0,
        f_handle: [0; HANDLE_MAX],
    };
    let mut mount_id: libc::c_int = 0;
    // SAFETY: `raw` has room for the `handle_bytes` it announces, the empty path is NUL-terminated, and both out
    // parameters are exclusively ours for the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &mut raw as *mut RawHandle,
            &mut mount_id as *mut libc::c_int,
            libc::AT_EMPTY_PATH,
        )
    };
    length(result as libc::ssize_t)?;
    let bytes = raw
        .f_handle
        .get(..raw.handle_bytes as usize)
        .ok_or_else(|| errno(libc::EOVERFLOW))?;
    Ok(take(mount_id, raw.handle_type, bytes))
}

/// Opens the file of a handle through `mount`, any descriptor on the mount it was made on.
///
/// ESTALE: the file is gone. EPERM: CAP_DAC_READ_SEARCH is missing.
pub(crate) fn open_by_handle(
    mount: BorrowedFd<'_>,
    kind: i32,
    bytes: &[u8],
    flags: i32,
) -> io::Result<OwnedFd> {
    let mut raw = RawHandle {
        handle_bytes: bytes.len() as u32,
        handle_type: kind,
        f_handle: [0; HANDLE_MAX],
    };
    raw.f_handle
        .get_mut(..bytes.len())
        .ok_or_else(|| errno(libc::EINVAL))?
        .copy_from_slice(bytes);
    // SAFETY: the kernel reads `handle_bytes` (at most HANDLE_MAX) bytes of `raw`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &mut raw as *mut RawHandle,
            flags | libc::O_CLOEXEC,
        )
    };
    let fd = length(result as libc::ssize_t)?;
    // SAFETY: the call succeeded, so the number is a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
