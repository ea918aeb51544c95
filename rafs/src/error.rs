//! What can be wrong with an image, said with offset and reason.

use std::io;
use std::path::PathBuf;

use backend::store::FetchError;

use crate::layout::Invalid;

/// Metadata contradict the format or each other. The file concerned answers EIO, everything else goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("damaged metadata: {what} at {at:#x}: {reason}")]
pub struct Damaged {
    /// The structure.
    pub what: &'static str,
    /// Offset in the bootstrap, or the number of the inode or chunk, as `what` says.
    pub at: u64,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Damaged {
    pub(crate) fn new(what: &'static str, at: u64, reason: &'static str) -> Self {
        Self { what, at, reason }
    }
}

impl From<Damaged> for io::Error {
    /// The one place where damage becomes an errno.
    fn from(_: Damaged) -> Self {
        io::Error::from_raw_os_error(libc::EIO)
    }
}

/// An image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file could not be read.
    #[error("bootstrap {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is neither a bootstrap nor a blob with a bootstrap inside.
    #[error("{path} is not a RAFS image: {reason}")]
    NotRafs {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        reason: &'static str,
    },
    /// A field of a superblock or table has a value that the format does not allow.
    #[error("bootstrap {path}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Which field.
        source: Invalid,
    },
    /// Superblock, tables or tree contradict each other.
    #[error("bootstrap {path}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        source: Damaged,
    },
    /// A blob of the image could not be opened.
    #[error("opening a blob of {path}")]
    Blob {
        /// The bootstrap.
        path: PathBuf,
        /// Why.
        source: FetchError,
    },
}

/// Why an image is refused, before the path is known.
#[derive(Debug)]
pub(crate) enum Refused {
    Io(io::Error),
    NotRafs(&'static str),
    Invalid(Invalid),
    Damaged(Damaged),
}

impl Refused {
    pub(crate) fn at(self, path: PathBuf) -> OpenError {
        match self {
            Refused::Io(source) => OpenError::Io { path, source },
            Refused::NotRafs(reason) => OpenError::NotRafs { path, reason },
            Refused::Invalid(source) => OpenError::Invalid { path, source },
            Refused::Damaged(source) => OpenError::Damaged { path, source },
        }
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Refused::Io(error)
    }
}

impl From<Invalid> for Refused {
    fn from(error: Invalid) -> Self {
        Refused::Invalid(error)
    }
}

impl From<Damaged> for Refused {
    fn from(error: Damaged) -> Self {
        Refused::Damaged(error)
    }
}
