//! Reaching the file behind an O_PATH descriptor.
//!
//! Some system calls take a path but no O_PATH descriptor. `/proc/self/fd/N` is a link that the kernel resolves to the
//! very file, without looking at any name, so following it cannot lead elsewhere.

use std::ffi::{CStr, OsString};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};

use crate::sys::errno;

/// The directory whose links reopen descriptors.
const PROC_SELF_FD: &CStr = c"/proc/self/fd";
/// Longest text made here: "/proc/self/fd/", ten digits, NUL.
const LONGEST: usize = 32;

/// `/proc/self/fd`, held open so that it stays the real one.
#[derive(Debug)]
pub(crate) struct ProcFd {
    directory: OwnedFd,
}

impl ProcFd {
    /// Opens the directory and makes sure that it lies on a proc file system.
    pub(crate) fn open() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(PROC_SELF_FD, flags, Mode::empty())?;
        if rustix::fs::fstatfs(&directory)?.f_type as u64 != rustix::fs::PROC_SUPER_MAGIC as u64 {
            return Err(errno(libc::ENOTSUP));
        }
        Ok(ProcFd { directory })
    }

    /// The directory, for calls relative to it with the text of [`FdText::number`].
    pub(crate) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Where the file behind `fd` is at this moment, as the kernel knows it without looking at a disk.
    pub(crate) fn path(&self, fd: BorrowedFd<'_>) -> io::Result<PathBuf> {
        let text = FdText::number(fd)?;
        let path = rustix::fs::readlinkat(&self.directory, text.as_c_str(), Vec::new())?;
        Ok(PathBuf::from(OsString::from_vec(path.into_bytes())))
    }

    /// Opens the file behind `fd` again. The caller has made sure that it is a regular file or a directory, or passes
    /// O_PATH.
    pub(crate) fn reopen(&self, fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
        let text = FdText::number(fd)?;
        Ok(rustix::fs::openat(
            &self.directory,
            text.as_c_str(),
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }
}

/// The text of a descriptor's link, made without allocation.
///
/// It borrows the descriptor, since the number means another file once that is closed.
#[derive(Debug)]
pub(crate) struct FdText<'fd>([u8; LONGEST], PhantomData<BorrowedFd<'fd>>);

impl<'fd> FdText<'fd> {
    /// `N`, relative to [`ProcFd::directory`].
    pub(crate) fn number(fd: BorrowedFd<'fd>) -> io::Result<Self> {
        Self::write(format_args!("{}\0", fd.as_raw_fd()))
    }

    /// `/proc/self/fd/N`, for calls that take no directory.
    pub(crate) fn absolute(fd: BorrowedFd<'fd>) -> io::Result<Self> {
        Self::write(format_args!("/proc/self/fd/{}\0", fd.as_raw_fd()))
    }

    fn write(text: std::fmt::Arguments<'_>) -> io::Result<Self> {
        let mut buffer = [0; LONGEST];
        buffer.as_mut_slice().write_fmt(text)?;
        Ok(FdText(buffer, PhantomData))
    }

    pub(crate) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }
}
