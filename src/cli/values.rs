//! What options take.

use std::net::{Ipv4Addr, SocketAddr};

use clap::ValueEnum;
use passthrough::{IdMap, IdRuleError};

/// `9477`, `127.0.0.1:9477`, `[::1]:9477`.
pub(super) fn tcp_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse::<u16>() {
        return Ok((Ipv4Addr::LOCALHOST, port).into());
    }
    text.parse()
        .map_err(|_| "not an address: expected is PORT, ADDRESS:PORT or [ADDRESS]:PORT".to_owned())
}

/// Levels of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// What helps to find a bug.
    Debug,
    /// What an operator wants to know.
    Info,
    /// What may be wrong.
    Warn,
    /// What is wrong.
    Error,
}

/// How a line of the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line, for collectors of logs.
    Json,
}

/// What guests may cache of host directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// For a moment.
    Auto,
    /// For ever.
    Always,
    /// Not at all.
    Never,
    /// Names and attributes for ever, data not at all.
    Metadata,
}

/// How host files are held while a guest knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum InodeFileHandles {
    /// By descriptor.
    Never,
    /// By handle where the file system and the daemon's capabilities allow it.
    #[serde(alias = "mandatory")]
    #[value(alias = "mandatory")]
    Prefer,
}

/// One rule of a translation of ids.
pub(super) fn id_rule(text: &str) -> Result<String, IdRuleError> {
    IdMap::default().add(text).map(|()| text.to_owned())
}
