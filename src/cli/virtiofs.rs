//! Options of the device and of the mount made at the start.

use std::path::PathBuf;

use clap::Args;

use super::Virtiofsd;

/// Options of the device and of the mount made at the start.
#[derive(Debug, Args)]
pub struct VirtioFs {
    /// vhost-user socket to listen on.
    #[arg(long, alias = "socket-path", value_name = "PATH", global = true)]
    pub sock: Option<PathBuf>,
    /// Listening vhost-user socket that was inherited.
    #[arg(long, value_name = "FD", global = true)]
    pub fd: Option<i32>,
    /// Request queues to offer.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64), global = true)]
    pub request_queues: u16,
    /// Accepted; images and host directories are always served together.
    #[arg(long, global = true)]
    pub hybrid_mode: bool,
    /// Bootstrap of an image to mount at the start; needs --config or --localfs-dir.
    #[arg(short = 'B', long, value_name = "FILE", global = true)]
    pub bootstrap: Option<PathBuf>,
    /// Configuration of that image.
    #[arg(short = 'C', long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// Directory that holds its blobs, and caches them.
    #[arg(short = 'D', long, value_name = "DIR", global = true)]
    pub localfs_dir: Option<PathBuf>,
    /// Host directory to mount at the start.
    #[arg(short = 's', long, value_name = "DIR", global = true)]
    pub shared_dir: Option<PathBuf>,
    /// Where the mount made at the start goes.
    #[arg(short = 'm', long, value_name = "PATH", default_value = "/", global = true)]
    pub virtual_mountpoint: String,
    /// File that lists files of the image to prefetch, one absolute path a line; needs --bootstrap.
    #[arg(long, value_name = "FILE", global = true)]
    pub prefetch_files: Option<PathBuf>,
    /// Accepted; chunks are shared by their blob anyway.
    #[arg(long, value_name = "FILE", global = true)]
    pub dedup_db: Option<PathBuf>,
    /// Print what this program can do, in the words of the vhost-user specification, and end.
    #[arg(long, global = true)]
    pub print_capabilities: bool,
    /// Options of virtiofsd.
    #[command(flatten)]
    pub virtiofsd: Virtiofsd,
}
