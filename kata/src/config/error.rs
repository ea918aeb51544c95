//! Why a configuration is refused.

use super::MAX_TEXT;

/// Why a configuration is refused. No variant shows a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Neither JSON nor TOML.
    #[error("failed to parse configuration information: {format}: {reason}")]
    Syntax {
        /// The syntax it seems to be meant in.
        format: &'static str,
        /// What is wrong, and where.
        reason: String,
    },
    /// A field is missing.
    #[error("failed to parse configuration information: {field}: {reason}")]
    Field {
        /// Path of the field.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// A value is of a type or size that its field cannot have.
    #[error("failed to parse configuration information: {field} is {value}, allowed is {allowed}")]
    Type {
        /// Path of the field.
        field: String,
        /// Its value, as JSON; long ones are cut, secrets hidden.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// A value is not allowed.
    #[error("invalid configuration: {field} is {value}, allowed is {allowed}")]
    Value {
        /// Path of the field.
        field: String,
        /// Its value, as JSON; long ones are cut, secrets hidden.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// A whole object is missing that the use needs.
    #[error("invalid configuration: {0} is missing, but needed to mount a RAFS image")]
    Missing(&'static str),
    /// Longer than [`MAX_TEXT`].
    #[error("configuration of {0} bytes is too long, at most {MAX_TEXT} bytes are allowed")]
    TooLong(u64),
    /// The file could not be read.
    #[error("configuration file {path}: {reason}")]
    File {
        /// Its path.
        path: String,
        /// Why not.
        reason: String,
    },
}
