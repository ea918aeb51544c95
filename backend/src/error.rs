//! What can go wrong between "these chunks, please" and "they are local and verified".
//!
//! A message names the blob, the place and the reason; an error of a source also its host, the attempts made and the
//! time spent. None shows a credential or the query of a URL (signed URLs carry credentials there).

use std::fmt;
use std::time::Duration;

/// Why chunks could not be made resident.
#[derive(Clone, Debug, thiserror::Error)]
#[error("blob {blob_id}: {reason}")]
pub struct FetchError {
    /// The blob.
    pub blob_id: String,
    /// What failed, with the source's host, attempts and time spent; no secrets.
    pub reason: String,
    /// The deadline passed (the guest may retry with success later).
    pub timed_out: bool,
}

impl FetchError {
    pub(crate) fn new(blob_id: &str, reason: impl fmt::Display) -> Self {
        Self {
            blob_id: blob_id.to_owned(),
            reason: reason.to_string(),
            timed_out: false,
        }
    }
}

/// What kind of failure a source met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceErrorKind {
    /// The source has no such blob.
    NotFound,
    /// The source refuses these credentials, or wants some.
    Denied,
    /// The source asks to come back later.
    Throttled,
    /// No address for its name.
    Unresolved,
    /// No connection: refused, reset, no route.
    Unreachable,
    /// No certificate that we trust.
    Untrusted,
    /// Connected, and then silent for too long.
    Stalled,
    /// The source failed by its own account (5xx).
    Server,
    /// The source says that the range lies outside of the blob.
    RangeRefused,
    /// The answer is not one to the question asked: another range, more or fewer bytes, no HTTP.
    Protocol,
    /// Reading a local file failed.
    Io,
    /// The source's configuration can not work.
    Config,
}

impl SourceErrorKind {
    /// Whether asking again, soon and unchanged, has a fair chance.
    pub fn transient(self) -> bool {
        match self {
            Self::Throttled
            | Self::Unresolved
            | Self::Unreachable
            | Self::Stalled
            | Self::Server
            | Self::Protocol
            | Self::Io => true,
            Self::NotFound | Self::Denied | Self::Untrusted | Self::RangeRefused | Self::Config => false,
        }
    }
}

impl fmt::Display for SourceErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFound => "not found",
            Self::Denied => "denied",
            Self::Throttled => "throttled",
            Self::Unresolved => "name not resolved",
            Self::Unreachable => "unreachable",
            Self::Untrusted => "untrusted certificate",
            Self::Stalled => "stalled",
            Self::Server => "server error",
            Self::RangeRefused => "range refused",
            Self::Protocol => "protocol error",
            Self::Io => "i/o error",
            Self::Config => "bad configuration",
        })
    }
}

/// A source could not deliver a range.
#[derive(Clone, Debug, thiserror::Error)]
#[error("source {host}: {kind}: {detail}")]
pub struct SourceError {
    /// Kind, for those who decide.
    pub kind: SourceErrorKind,
    /// Host or path of the source.
    pub host: String,
    /// What happened, for those who read.
    pub detail: String,
    /// Not before so long, by the source's own word.
    pub retry_after: Option<Duration>,
}

impl SourceError {
    /// An error without a `retry_after`.
    pub fn new(kind: SourceErrorKind, host: impl Into<String>, detail: impl fmt::Display) -> Self {
        Self {
            kind,
            host: host.into(),
            detail: detail.to_string(),
            retry_after: None,
        }
    }
}

/// A chunk could not be made of the stored bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The decompressor refused.
    #[error("{codec} data of {stored} bytes: {reason}")]
    Damaged {
        /// Which one.
        codec: &'static str,
        /// Bytes it was given.
        stored: usize,
        /// Its reason.
        reason: String,
    },
    /// It decodes, to another size.
    #[error("decodes to {actual} bytes instead of {expected}")]
    Size {
        /// What the metadata says.
        expected: usize,
        /// What came out.
        actual: usize,
    },
    /// It decodes, to other bytes.
    #[error("{algorithm} digest differs")]
    Digest {
        /// Of the digest, or CRC-32C.
        algorithm: &'static str,
    },
    /// The metadata gives nothing to verify it by.
    #[error("no digest to verify it by")]
    Unverifiable,
    /// The metadata makes no sense.
    #[error("{0}")]
    Description(String),
}

/// A cache directory or file can not be used.
#[derive(Debug, thiserror::Error)]
#[error("cache file {path}: {action}")]
pub struct CacheError {
    /// The file or directory.
    pub path: std::path::PathBuf,
    /// What was tried.
    pub action: &'static str,
    /// Why it failed.
    #[source]
    pub source: std::io::Error,
}
