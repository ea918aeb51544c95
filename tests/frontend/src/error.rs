//! What can go wrong between a guest and its device.

use std::io;
use std::time::Duration;

/// Outcome of an operation of the front-end or the guest.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure, by whose it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device answered with this errno (positive).
    #[error("errno {}", io::Error::from_raw_os_error(*.0))]
    Errno(i32),
    /// No answer came in time.
    #[error("no {what} within {waited:?}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The device did what no device may do.
    #[error("device error: {0}")]
    Device(String),
    /// The device refused a vhost-user message.
    #[error("{request} refused with {code:#x}")]
    Refused {
        /// Name of the message.
        request: String,
        /// Value of the acknowledgement.
        code: u64,
    },
    /// The socket, or the host.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The queue has no room for this chain now.
    #[error("virtqueue {0} is full")]
    QueueFull(usize),
    /// Guest memory has no room, or the caller asked for what cannot be.
    #[error("{0}")]
    Usage(String),
}

impl Error {
    /// The errno that the device answered with, if that is what failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Errno(errno) => Some(*errno),
            _ => None,
        }
    }

    /// Whether no answer came in time.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Error::Timeout { .. })
    }

    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Io {
            what: what.into(),
            source: source.into(),
        }
    }
}
