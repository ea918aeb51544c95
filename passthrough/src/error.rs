//! Why a directory cannot be served. Errors of single requests are `io::Error`s that carry an errno.

use std::io;
use std::path::PathBuf;

/// Failure to start serving a directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The root of the share cannot be opened as a directory.
    #[error("cannot open {path:?} as the root of a share")]
    Root {
        /// The directory as it was asked for.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// `/proc/self/fd` is missing or is not a proc file system; files cannot be reopened without it.
    #[error("/proc/self/fd is not usable")]
    Proc(#[source] io::Error),
    /// What the tree takes of the disk is to be limited and cannot be counted.
    #[error("cannot count what the tree takes of the disk")]
    Usage(#[source] io::Error),
    /// A thread of the mount cannot be started.
    #[error("cannot start a thread of the mount")]
    Thread(#[source] io::Error),
    /// The host kernel lacks a system call that confinement rests on.
    #[error("the host kernel does not offer {call}")]
    Kernel {
        /// Name of the missing system call or flag.
        call: &'static str,
        /// What the host said.
        source: io::Error,
    },
}
