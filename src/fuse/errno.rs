//! Error numbers: decided once, here, at the border to the guest.

use std::io;

/// An error number of Linux, positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(i32);

impl Errno {
    pub const IO: Errno = Errno(libc::EIO);
    pub const INTR: Errno = Errno(libc::EINTR);
    pub const STALE: Errno = Errno(libc::ESTALE);
    pub const NOENT: Errno = Errno(libc::ENOENT);
    pub const INVAL: Errno = Errno(libc::EINVAL);
    pub const ROFS: Errno = Errno(libc::EROFS);
    pub const XDEV: Errno = Errno(libc::EXDEV);
    pub const NOSYS: Errno = Errno(libc::ENOSYS);
    pub const NOTTY: Errno = Errno(libc::ENOTTY);
    pub const NODATA: Errno = Errno(libc::ENODATA);
    pub const NOTSUP: Errno = Errno(libc::EOPNOTSUPP);
    pub const NAMETOOLONG: Errno = Errno(libc::ENAMETOOLONG);
    pub const NXIO: Errno = Errno(libc::ENXIO);
    pub const RANGE: Errno = Errno(libc::ERANGE);
    pub const OVERFLOW: Errno = Errno(libc::EOVERFLOW);
    pub const PROTO: Errno = Errno(libc::EPROTO);
    pub const AGAIN: Errno = Errno(libc::EAGAIN);
    pub const NOLCK: Errno = Errno(libc::ENOLCK);
    pub const ISDIR: Errno = Errno(libc::EISDIR);

    /// The number.
    pub fn get(self) -> i32 {
        self.0
    }
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        // The guest's kernel takes numbers from 1 to 511 and treats anything else as a broken reply.
        match error.raw_os_error() {
            Some(number @ 1..=511) => Errno(number),
            _ => Errno::IO,
        }
    }
}
