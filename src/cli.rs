//! The command line: what runtimes and snapshotters pass, and our own.
//!
//! All options may stand before or after the subcommand, and where one is repeated the last one wins, so that a
//! runtime's extra arguments can overrule its own. `--sock` without a subcommand means `virtiofs`, as
//! the documentation of the incumbent has it.
//!
//! Options of virtiofsd are accepted as well, for a runtime whose daemon path was changed may still pass them. Those that
//! have no meaning here are reported by [`Cli::without_effect`] in one line.
//!
//! Rooms: `virtiofs` (the device), `virtiofsd` (options of that program), `fuse` (FUSE mode), `values` (what options take).

mod fuse;
#[cfg(test)]
mod tests;
mod values;
mod virtiofs;
mod virtiofsd;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::error::Error;
pub use fuse::{FailoverPolicy, FuseOptions};
pub use values::{CacheMode, InodeFileHandles, LogFormat, LogLevel};
pub use virtiofs::VirtioFs;
pub use virtiofsd::Virtiofsd;

/// What `--version` prints after the name. Clients look for the line of the commit.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\nGit Commit: ",
    env!("RAFSD_GIT_COMMIT"),
    "\nBuild Time: ",
    env!("RAFSD_BUILD_TIME"),
    "\nProfile: ",
    env!("RAFSD_PROFILE"),
    "\nRustc: ",
    env!("RAFSD_RUSTC"),
);

/// Serves lazily loaded images and host directories to a virtual machine, over vhost-user virtio-fs.
#[derive(Debug, Parser)]
#[command(name = "rafsd", version = VERSION, args_override_self = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of the process.
    #[command(flatten)]
    pub process: Process,
    /// Options of the device.
    #[command(flatten)]
    pub virtiofs: VirtioFs,
    /// Options of FUSE mode.
    #[command(flatten)]
    pub fuse: FuseOptions,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Serve a vhost-user front-end (the default with --sock).
    Virtiofs,
    /// Serve a directory of this host over /dev/fuse (the default with --mountpoint).
    Fuse,
}

/// Options of the process.
#[derive(Debug, Args)]
pub struct Process {
    /// Socket of the HTTP API; without it there is no API.
    #[arg(short = 'A', long, value_name = "PATH", global = true)]
    pub apisock: Option<PathBuf>,
    /// Answer GET /metrics on this TCP address as well; a port alone means 127.0.0.1.
    #[arg(long, value_name = "[HOST:]PORT", value_parser = values::tcp_address, global = true)]
    pub metrics_address: Option<SocketAddr>,
    /// Write the process id to this file once the daemon serves; it is removed at the end.
    #[arg(long, value_name = "PATH", global = true)]
    pub pid_file: Option<PathBuf>,
    /// Identifier to show; needs --supervisor.
    #[arg(long, value_name = "ID", global = true)]
    pub id: Option<String>,
    /// Supervisor socket to show; needs --id.
    #[arg(long, value_name = "PATH", global = true)]
    pub supervisor: Option<String>,
    /// Accepted; a vhost-user daemon has nothing to take over.
    #[arg(long, global = true)]
    pub upgrade: bool,
    /// What to log.
    #[arg(
        short = 'l',
        long,
        value_enum,
        value_name = "LEVEL",
        default_value = "info",
        global = true
    )]
    pub log_level: LogLevel,
    /// How to write a line of the log.
    #[arg(
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "text",
        global = true
    )]
    pub log_format: LogFormat,
    /// Log to this file instead of stderr; `.log` is added if it has no extension.
    #[arg(short = 'L', long, value_name = "PATH", global = true)]
    pub log_file: Option<PathBuf>,
    /// Start a new log file when it has so many MB; 0: never.
    #[arg(long, value_name = "MB", default_value_t = 0, global = true)]
    pub log_rotation_size: u64,
    /// Open files to ask for; 0: leave the limit alone.
    #[arg(long, value_name = "N", default_value_t = 1_000_000, global = true)]
    pub rlimit_nofile: u64,
}

/// Whether a service manager says that it passes sockets to this process.
fn socket_activation() -> bool {
    std::env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string())
}

/// A command line that makes sense.
#[derive(Debug)]
pub enum Task {
    /// Print this and end.
    Print(&'static str),
    /// Serve a vhost-user front-end.
    Serve(Box<Cli>),
}

impl Cli {
    /// Parses the command line of the process. Help, version and refusals are printed, and end the process with the
    /// documented code.
    pub fn of_process() -> Task {
        let cli = Self::parse();
        match cli.check() {
            Ok(task) => task,
            Err(error) => Self::command()
                .error(clap::error::ErrorKind::ArgumentConflict, error)
                .exit(),
        }
    }

    /// Whether the mounts are for this host instead of for a guest.
    pub fn serves_fuse(&self) -> bool {
        match self.command {
            Some(Command::Fuse) => true,
            Some(Command::Virtiofs) => false,
            None => self.fuse.mountpoint.is_some(),
        }
    }

    /// Checks what the parser cannot.
    ///
    /// # Errors
    ///
    /// Options are missing that others need, or contradict each other.
    pub fn check(mut self) -> Result<Task, Error> {
        let usage = |text: &str| Err(Error::Usage(text.to_owned()));
        let device = &mut self.virtiofs;
        device.virtiofsd.take_old_style(&mut device.shared_dir)?;
        let (process, device) = (&self.process, &self.virtiofs);
        if device.print_capabilities {
            return Ok(Task::Print("{\n  \"type\": \"fs\"\n}"));
        }
        if self.serves_fuse() {
            if self.fuse.mountpoint.is_none() {
                return usage("--mountpoint DIR is required");
            }
            if device.sock.is_some() || device.fd.is_some() {
                return usage("--mountpoint cannot be used with --sock or --fd");
            }
        } else if self.fuse.mountpoint.is_some() {
            return usage("--mountpoint belongs to the subcommand fuse");
        } else if device.sock.is_none() && device.fd.is_none() && !socket_activation() {
            return usage("--sock PATH is required (or --fd FD, or sockets passed by systemd)");
        }
        if device.sock.is_some() && device.fd.is_some() {
            return usage("--sock cannot be used with --fd");
        }
        if device.virtiofsd.socket_group.is_some() && device.sock.is_none() {
            return usage("--socket-group needs --sock");
        }
        if process.id.is_some() != process.supervisor.is_some() {
            return usage("--id and --supervisor need each other");
        }
        if device.bootstrap.is_some() && device.shared_dir.is_some() {
            return usage("--bootstrap cannot be used with --shared-dir");
        }
        if device.localfs_dir.is_some() && device.config.is_some() {
            return usage("--localfs-dir cannot be used with --config");
        }
        if device.prefetch_files.is_some() && device.bootstrap.is_none() {
            return usage("--prefetch-files needs --bootstrap");
        }
        Ok(Task::Serve(Box::new(self)))
    }

    /// Options that were given and have no effect, as they are written.
    pub fn without_effect(&self) -> Vec<String> {
        let (process, device, fuse) = (&self.process, &self.virtiofs, &self.fuse);
        let given = &device.virtiofsd;
        let mut list: Vec<String> = [
            (process.upgrade, "--upgrade"),
            (device.dedup_db.is_some(), "--dedup-db"),
            (given.thread_pool_size.is_some(), "--thread-pool-size"),
            (given.syslog, "--syslog"),
        ]
        .into_iter()
        .filter(|(given, _)| *given)
        .map(|(_, name)| name.to_owned())
        .collect();
        let fuse = [
            (fuse.failover_policy.is_some(), "--failover-policy"),
            (fuse.writable, "--writable"),
            (fuse.backend_source.is_some(), "--backend-source"),
        ];
        list.extend(
            fuse.into_iter()
                .filter(|(given, _)| *given)
                .map(|(_, name)| name.to_owned()),
        );
        list.extend(given.o.iter().map(|option| format!("-o {option}")));
        list
    }
}
