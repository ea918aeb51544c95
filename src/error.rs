//! Why the daemon ends, and with which exit code.

use std::process::ExitCode;

/// The daemon could not start, or not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line asks for something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The command line makes sense, and still it cannot be done.
    #[error("{0}")]
    Start(String),
    /// A layer of the sandbox could not be put on.
    #[error(transparent)]
    Sandbox(#[from] crate::sandbox::Failure),
    /// A socket could not be made.
    #[error("socket {path}: {reason}")]
    Socket {
        /// Its path as given.
        path: String,
        /// What stands in the way.
        reason: String,
    },
}

impl Error {
    /// 2 for bad usage, as by the command line parser; 1 for everything else.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(2),
            Self::Start(_) | Self::Sandbox(_) | Self::Socket { .. } => ExitCode::FAILURE,
        }
    }
}
