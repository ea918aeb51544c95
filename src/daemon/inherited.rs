//! Sockets that the parent process opened for us. The root crate's only place where a number becomes a descriptor.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use rustix::net::AddressFamily;

use crate::error::Error;

/// Takes over descriptor `number`, which must be a listening Unix stream socket. Call it once per number, before
/// anything else has opened files.
///
/// # Errors
///
/// The descriptor is not open, is one of the standard ones, or is no such socket.
pub fn listener(number: RawFd) -> Result<UnixListener, Error> {
    let error = |reason: String| Error::Socket {
        path: format!("descriptor {number}"),
        reason,
    };
    if number <= 2 {
        return Err(error("an inherited socket has a number above 2".into()));
    }
    // SAFETY: a number is never -1 here. Whether it is open is what the calls below find out; a number that is not open
    // makes them fail with EBADF. Nothing else in the process closes descriptors that it did not open, so the
    // borrow stays valid for its three calls.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let failed = |reason: rustix::io::Errno| error(reason.to_string());
    let family = rustix::net::sockopt::socket_domain(borrowed).map_err(failed)?;
    let listens = rustix::net::sockopt::socket_acceptconn(borrowed).map_err(failed)?;
    if family != AddressFamily::UNIX || !listens {
        return Err(error("not a listening Unix socket".into()));
    }
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC).map_err(failed)?;
    // SAFETY: the descriptor is open (it answered above) and was given to this process by its parent for this
    // purpose; no other value in the process owns it, since it was open before the process began.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    Ok(UnixListener::from(owned))
}
