//! Options of FUSE mode.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Options of FUSE mode.
#[derive(Debug, Args)]
#[command(next_help_heading = "FUSE mode")]
pub struct FuseOptions {
    /// Directory of this host to mount at.
    #[arg(short = 'M', long, value_name = "DIR", global = true)]
    pub mountpoint: Option<PathBuf>,
    /// Queues, each with threads of its own; more than 8 count as 8.
    #[arg(long, alias = "thread-num", value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024), global = true)]
    pub fuse_threads: u16,
    /// No effect: a daemon that ends takes its mount with it.
    #[arg(long, value_enum, value_name = "POLICY", global = true)]
    pub failover_policy: Option<FailoverPolicy>,
    /// No effect: images are read-only, host directories writable.
    #[arg(long, global = true)]
    pub writable: bool,
    /// No effect: credentials come with the configuration, or over the API.
    #[arg(long, value_name = "URL", global = true)]
    pub backend_source: Option<String>,
}

/// What should become of requests under way when another daemon takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FailoverPolicy {
    /// Nothing.
    None,
    /// They are sent again.
    Resend,
    /// They fail.
    Flush,
}
