//! Why an image could not be built.

use std::io;
use std::path::PathBuf;

use crate::error::{Damaged, OpenError};
use crate::tar::TarError;

/// An image could not be built. The message names the path or value; the cause, where there is one, is the
/// error's source.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A system call failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb phrase ("read", "create").
        action: &'static str,
        /// What it was tried on.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The tree holds something that a RAFS image cannot express.
    #[error("{}: {reason}", path.display())]
    Unsupported {
        /// Path inside the tree.
        path: PathBuf,
        /// What it is, and what the format allows.
        reason: String,
    },
    /// The tree was modified while it was being read, so no consistent image can be made of it.
    #[error("{}: changed while the image was built ({reason})", path.display())]
    Changed {
        /// Path inside the tree.
        path: PathBuf,
        /// What is different.
        reason: String,
    },
    /// The image would exceed a limit of the format.
    #[error("{what} would be {value}, the format allows {limit}")]
    Limit {
        /// Which quantity.
        what: &'static str,
        /// What the image would need.
        value: u64,
        /// The most that can be expressed.
        limit: u64,
    },
    /// The options contradict each other or the format.
    #[error("{0}")]
    Options(String),
    /// An archive cannot be read.
    #[error("{name}")]
    Archive {
        /// The archive.
        name: String,
        /// Why.
        source: TarError,
    },
    /// An image that was to be built upon cannot be opened.
    #[error("cannot build upon an image")]
    Image(#[source] OpenError),
    /// An image that was to be built upon is damaged.
    #[error("cannot build upon {}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// Where.
        source: Damaged,
    },
    /// The build was given up because another part of it failed; that part's error is the one to report.
    #[error("the build was given up")]
    GivenUp,
    /// A compressor refused its input.
    #[error("cannot compress a chunk with {compressor}: {reason}")]
    Compressor {
        /// Which one.
        compressor: &'static str,
        /// What it said.
        reason: String,
    },
}

impl BuildError {
    /// For `map_err` on a system call.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// The same for the errors of `rustix`.
    pub(crate) fn errno(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(rustix::io::Errno) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source: source.into(),
        }
    }

    /// The tree has outgrown its ids.
    pub(crate) fn too_many_inodes() -> Self {
        let limit = u64::from(u32::MAX);
        Self::Limit {
            what: "number of inodes",
            value: limit + 1,
            limit,
        }
    }

    /// Checks a quantity against a limit of the format.
    pub(crate) fn check_limit(what: &'static str, value: u64, limit: u64) -> Result<(), Self> {
        if value > limit {
            Err(Self::Limit { what, value, limit })
        } else {
            Ok(())
        }
    }
}
