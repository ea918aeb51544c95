//! The command line: what runtimes and snapshotters pass, and our own.
//!
//! All options may stand before or after the subcommand, and where one is repeated the last one wins, so that a
//! runtime's extra arguments can overrule its own. `--sock` without a subcommand means `virtiofs`, as
//! the documentation of the incumbent has it.
//!
//! Options of virtiofsd are accepted as well, for a runtime whose daemon path was changed may still pass them. Those that
//! have no meaning here are reported by [`VirtioFs::without_effect`] in one line.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use passthrough::{IdMap, IdRuleError, XattrRules};

use crate::error::Error;
use crate::sandbox;

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
    #[arg(long, value_name = "[HOST:]PORT", value_parser = tcp_address, global = true)]
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

/// Options of virtiofsd, as far as runtimes pass them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Accepted for compatibility with virtiofsd")]
pub struct Virtiofsd {
    /// How long guests may cache host directories.
    #[arg(long, value_enum, value_name = "POLICY", global = true)]
    pub cache: Option<CacheMode>,
    /// Refuse changes of host directories.
    #[arg(long, global = true)]
    pub readonly: bool,
    /// Serve extended attributes of host directories (always on).
    #[arg(long, global = true)]
    pub xattr: bool,
    /// Serve POSIX ACLs of host directories.
    #[arg(long, global = true)]
    pub posix_acl: bool,
    /// Let guests collect writes to host directories.
    #[arg(long, global = true)]
    pub writeback: bool,
    /// Keep the locks of host directories' files on the host, so that they hold between guests.
    #[arg(long, global = true)]
    pub host_locks: bool,
    /// Honour O_DIRECT on host directories.
    #[arg(long, global = true)]
    pub allow_direct_io: bool,
    /// Tell guests where the host has mounted something (always on).
    #[arg(long, global = true)]
    pub announce_submounts: bool,
    /// Do not.
    #[arg(long, global = true)]
    pub no_announce_submounts: bool,
    /// No effect.
    #[arg(long, alias = "threads", value_name = "N", global = true)]
    pub thread_pool_size: Option<u32>,
    /// How to be kept from the rest of the host.
    #[arg(
        long,
        value_enum,
        value_name = "MODE",
        default_value = "namespace",
        global = true
    )]
    pub sandbox: sandbox::Mode,
    /// What a system call costs that the daemon never makes.
    #[arg(
        long,
        value_enum,
        value_name = "ACTION",
        default_value = "kill",
        global = true
    )]
    pub seccomp: sandbox::SystemCalls,
    /// Hold host files by handle where that is possible, or by descriptor.
    #[arg(long, value_enum, value_name = "MODE", global = true)]
    pub inode_file_handles: Option<InodeFileHandles>,
    /// Rules for the names of extended attributes, as `:prefix:all:trusted.:user.virtiofs.:`; `built-in` for a safe set.
    #[arg(long, value_name = "RULES", global = true)]
    pub xattrmap: Option<XattrRules>,
    /// What users of guests are on the host, as `map:0:100000:65536`; may be repeated.
    #[arg(long, value_name = "RULE", action = clap::ArgAction::Append, value_parser = id_rule, global = true)]
    pub translate_uid: Vec<String>,
    /// The same for groups.
    #[arg(long, value_name = "RULE", action = clap::ArgAction::Append, value_parser = id_rule, global = true)]
    pub translate_gid: Vec<String>,
    /// No effect.
    #[arg(long, value_name = "GROUP", global = true)]
    pub socket_group: Option<String>,
    /// Capabilities to keep or to give up beyond the usual, as `+sys_ptrace:-sys_admin`.
    #[arg(long, value_name = "CAPS", allow_hyphen_values = true, global = true)]
    pub modcaps: Option<sandbox::CapabilityChanges>,
    /// No effect.
    #[arg(long, global = true)]
    pub syslog: bool,
    /// No effect.
    #[arg(long, global = true)]
    pub killpriv_v2: bool,
    /// Let the guest's security module label new files. Takes extended attributes on every host directory.
    #[arg(long, global = true)]
    pub security_label: bool,
    /// Options in the old style: `-o cache=auto,announce_submounts`.
    #[arg(short = 'o', value_name = "OPTION", value_delimiter = ',', action = clap::ArgAction::Append, global = true)]
    pub o: Vec<String>,
}

/// Whether a service manager says that it passes sockets to this process.
fn socket_activation() -> bool {
    std::env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string())
}

/// `9477`, `127.0.0.1:9477`, `[::1]:9477`.
fn tcp_address(text: &str) -> Result<SocketAddr, String> {
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
fn id_rule(text: &str) -> Result<String, IdRuleError> {
    IdMap::default().add(text).map(|()| text.to_owned())
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
        self.virtiofs.take_old_style()?;
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
}

impl VirtioFs {
    /// Turns options of the old style into those of the new.
    fn take_old_style(&mut self) -> Result<(), Error> {
        let mut rest = Vec::new();
        for option in std::mem::take(&mut self.virtiofsd.o) {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (option.as_str(), None),
            };
            let known = &mut self.virtiofsd;
            match (key, value) {
                ("cache", Some(value)) => {
                    let mode = CacheMode::from_str(value, true).map_err(|_| {
                        Error::Usage(format!(
                            "-o cache={value}: allowed is auto, always, never or metadata"
                        ))
                    })?;
                    known.cache = Some(mode);
                }
                ("source", Some(value)) => self.shared_dir = Some(value.into()),
                ("announce_submounts", None) => known.announce_submounts = true,
                ("no_announce_submounts", None) => known.no_announce_submounts = true,
                ("xattr", None) => known.xattr = true,
                ("xattrmap", Some(rules)) => {
                    let rules = rules.parse();
                    let rules = rules.map_err(|error| Error::Usage(format!("-o xattrmap: {error}")))?;
                    known.xattrmap = Some(rules);
                }
                ("security_label", None) => known.security_label = true,
                ("posix_acl", None) => known.posix_acl = true,
                ("writeback", None) => known.writeback = true,
                ("posix_lock" | "flock", None) => known.host_locks = true,
                ("no_posix_lock" | "no_flock", None) => known.host_locks = false,
                ("allow_direct_io", None) => known.allow_direct_io = true,
                ("readonly" | "ro", None) => known.readonly = true,
                _ => rest.push(option),
            }
        }
        self.virtiofsd.o = rest;
        Ok(())
    }

    /// Options that were given and have no effect, as they are written.
    pub fn without_effect(&self, process: &Process, fuse: &FuseOptions) -> Vec<String> {
        let given = &self.virtiofsd;
        let mut list: Vec<String> = [
            (process.upgrade, "--upgrade"),
            (self.dedup_db.is_some(), "--dedup-db"),
            (given.thread_pool_size.is_some(), "--thread-pool-size"),
            (given.socket_group.is_some(), "--socket-group"),
            (given.syslog, "--syslog"),
            (given.killpriv_v2, "--killpriv-v2"),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, String> {
        let cli = Cli::try_parse_from(line.split_whitespace()).map_err(|error| error.to_string())?;
        match cli.check() {
            Ok(Task::Serve(cli)) => Ok(*cli),
            Ok(Task::Print(text)) => Err(text.to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn accepted(line: &str) -> Cli {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn l1_kata_go() {
        let cli = accepted("rafsd virtiofs --log-level debug --apisock /a --sock /v");
        assert_eq!(cli.process.log_level, LogLevel::Debug);
        assert_eq!(cli.process.apisock.unwrap().to_str(), Some("/a"));
        assert_eq!(cli.virtiofs.sock.unwrap().to_str(), Some("/v"));
    }

    #[test]
    fn l2_kata_runtime_rs() {
        assert!(
            accepted("rafsd virtiofs --hybrid-mode --log-level info --apisock /a --sock /v")
                .virtiofs
                .hybrid_mode
        );
    }

    #[test]
    fn l3_rootless() {
        let cli = accepted(
            "rafsd virtiofs --hybrid-mode --log-level info --apisock nydusd-api.sock --sock virtiofsd.sock",
        );
        assert_eq!(cli.virtiofs.sock.unwrap().to_str(), Some("virtiofsd.sock"));
    }

    #[test]
    fn l4_l5_l8_fuse() {
        let dedicated = "rafsd fuse --thread-num 10 --id i --config /c --bootstrap /b --mountpoint /m --apisock /a --log-level info \
            --log-rotation-size 100 --supervisor /s --log-file /l --prefetch-files /p --backend-source http://x --failover-policy resend";
        let shared = "rafsd fuse --upgrade --mountpoint /m --apisock /a --log-level info";
        let smoke = "rafsd --mountpoint /m --apisock /a --log-level error --thread-num 10 --config /c --bootstrap /b --dedup-db /d --writable";
        for line in [dedicated, shared, smoke] {
            let cli = accepted(line);
            assert!(cli.serves_fuse() && cli.fuse.mountpoint.is_some(), "{line}");
        }
        assert_eq!(accepted(smoke).fuse.fuse_threads, 10);
        for line in [
            "rafsd fuse",
            "rafsd fuse --mountpoint /m --sock /v",
            "rafsd virtiofs --sock /v --mountpoint /m",
            "rafsd fuse -M /m --fuse-threads 0",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn l7_version_probe() {
        let text = parse("rafsd --version").unwrap_err();
        let commit = text
            .lines()
            .find_map(|line| line.strip_prefix("Git Commit: "))
            .unwrap();
        assert!(!commit.trim().is_empty());
    }

    #[test]
    fn l9_without_subcommand() {
        let cli = accepted("rafsd --config /c --sock /v --bootstrap /b --log-level info");
        assert_eq!(cli.command, None);
        assert_eq!(cli.virtiofs.bootstrap.unwrap().to_str(), Some("/b"));
        accepted("rafsd --log-level info --sock /v --apisock /a");
    }

    #[test]
    fn l10_extra_arguments_of_the_documentation() {
        let base = "rafsd virtiofs --log-level info --apisock /a --sock /v";
        assert_eq!(
            accepted(&format!("{base} --log-level debug")).process.log_level,
            LogLevel::Debug
        );
        let cli = accepted(&format!("{base} --threads 4"));
        assert_eq!(
            cli.virtiofs.without_effect(&cli.process, &cli.fuse),
            ["--thread-pool-size"]
        );
    }

    #[test]
    fn l11_default_extra_arguments() {
        let base = "rafsd virtiofs --log-level info --apisock /a --sock /v --thread-pool-size=1";
        assert!(
            accepted(&format!("{base} --announce-submounts"))
                .virtiofs
                .virtiofsd
                .announce_submounts
        );
        assert!(
            accepted(&format!("{base} -o announce_submounts"))
                .virtiofs
                .virtiofsd
                .announce_submounts
        );
    }

    #[test]
    fn options_of_virtiofsd() {
        let cli = accepted(
            "rafsd --socket-path=/v --shared-dir /s --cache=never --sandbox chroot --xattr --seccomp=none --syslog -o x,cache=always",
        );
        assert_eq!(cli.virtiofs.virtiofsd.cache, Some(CacheMode::Always));
        assert_eq!(
            cli.virtiofs.without_effect(&cli.process, &cli.fuse),
            ["--syslog", "-o x"]
        );
        assert_eq!(
            accepted("rafsd --fd=3 -o source=/s")
                .virtiofs
                .shared_dir
                .unwrap()
                .to_str(),
            Some("/s")
        );
        assert!(
            parse("rafsd --print-capabilities")
                .unwrap_err()
                .contains("\"fs\"")
        );
    }

    #[test]
    fn options_stand_on_either_side_of_the_subcommand() {
        let cli = accepted("rafsd --apisock /a --log-level warn virtiofs --sock /v --log-level error");
        assert_eq!(cli.process.log_level, LogLevel::Error);
        assert_eq!(
            accepted("rafsd -l trace virtiofs --sock /v").process.log_level,
            LogLevel::Trace
        );
    }

    #[test]
    fn addresses_for_metrics() {
        let of = |text| {
            accepted(&format!("rafsd --sock /v --metrics-address {text}"))
                .process
                .metrics_address
                .unwrap()
                .to_string()
        };
        assert_eq!(of("9477"), "127.0.0.1:9477");
        assert_eq!(of("10.0.0.1:9477"), "10.0.0.1:9477");
        assert_eq!(of("[::1]:9477"), "[::1]:9477");
        assert!(parse("rafsd --sock /v --metrics-address nonsense").is_err());
    }

    #[test]
    fn bad_usage_is_refused() {
        for line in [
            "rafsd",
            "rafsd virtiofs",
            "rafsd virtiofs --sock /v --no-such-option",
            "rafsd virtiofs --sock /v --log-level loud",
            "rafsd virtiofs --sock /v --fd 3",
            "rafsd virtiofs --sock /v --id x",
            "rafsd virtiofs --sock /v --supervisor /s",
            "rafsd virtiofs --sock /v --bootstrap /b --shared-dir /s --config /c",
            "rafsd virtiofs --sock /v --bootstrap /b --localfs-dir /d --config /c",
            "rafsd virtiofs --sock /v --prefetch-files /p",
            "rafsd virtiofs --sock /v --request-queues 0",
            "rafsd virtiofs --sock /v -o cache=some",
            "rafsd virtiofs --sock /v --sandbox tight",
            "rafsd virtiofs --sock /v --inode-file-handles often",
            "rafsd virtiofs --sock /v --xattrmap :nonsense:",
            "rafsd virtiofs --sock /v --translate-uid map:0:1",
            "rafsd virtiofs --sock /v --seccomp maybe",
            "rafsd virtiofs --sock /v --modcaps +everything",
            "rafsd singleton --sock /v",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
