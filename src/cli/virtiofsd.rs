//! Options of virtiofsd, which runtimes pass to a daemon whose path was changed.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use passthrough::XattrRules;

use super::values::{self, CacheMode, InodeFileHandles};
use crate::error::Error;
use crate::sandbox;

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
    #[arg(long, value_name = "RULE", action = clap::ArgAction::Append, value_parser = values::id_rule, global = true)]
    pub translate_uid: Vec<String>,
    /// The same for groups.
    #[arg(long, value_name = "RULE", action = clap::ArgAction::Append, value_parser = values::id_rule, global = true)]
    pub translate_gid: Vec<String>,
    /// Let this group, by name or number, connect to the vhost-user socket as its owner does.
    #[arg(long, value_name = "GROUP", global = true)]
    pub socket_group: Option<String>,
    /// Capabilities to keep or to give up beyond the usual, as `+sys_ptrace:-sys_admin`.
    #[arg(long, value_name = "CAPS", allow_hyphen_values = true, global = true)]
    pub modcaps: Option<sandbox::CapabilityChanges>,
    /// No effect.
    #[arg(long, global = true)]
    pub syslog: bool,
    /// Have the device clear set-user-id and set-group-id bits of files that are written, instead of the guest's kernel: one
    /// request less for each write. Not for the upper layer of an overlay, whose writes keep the bits then.
    #[arg(long, global = true)]
    pub killpriv_v2: bool,
    /// Let the guest's security module label new files. Takes extended attributes on every host directory.
    #[arg(long, global = true)]
    pub security_label: bool,
    /// Options in the old style: `-o cache=auto,announce_submounts`.
    #[arg(short = 'o', value_name = "OPTION", value_delimiter = ',', action = clap::ArgAction::Append, global = true)]
    pub o: Vec<String>,
}

impl Virtiofsd {
    /// Turns options of the old style into those of the new; `source` is that of the mount made at the start.
    ///
    /// # Errors
    ///
    /// One has a value that it cannot have.
    pub(super) fn take_old_style(&mut self, source: &mut Option<PathBuf>) -> Result<(), Error> {
        let mut rest = Vec::new();
        for option in std::mem::take(&mut self.o) {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (option.as_str(), None),
            };
            match (key, value) {
                ("cache", Some(value)) => {
                    let mode = CacheMode::from_str(value, true).map_err(|_| {
                        Error::Usage(format!(
                            "-o cache={value}: allowed is auto, always, never or metadata"
                        ))
                    })?;
                    self.cache = Some(mode);
                }
                ("source", Some(value)) => *source = Some(value.into()),
                ("announce_submounts", None) => self.announce_submounts = true,
                ("no_announce_submounts", None) => self.no_announce_submounts = true,
                ("xattr", None) => self.xattr = true,
                ("xattrmap", Some(rules)) => {
                    let rules = rules.parse();
                    let rules = rules.map_err(|error| Error::Usage(format!("-o xattrmap: {error}")))?;
                    self.xattrmap = Some(rules);
                }
                ("security_label", None) => self.security_label = true,
                ("posix_acl", None) => self.posix_acl = true,
                ("writeback", None) => self.writeback = true,
                ("posix_lock" | "flock", None) => self.host_locks = true,
                ("no_posix_lock" | "no_flock", None) => self.host_locks = false,
                ("allow_direct_io", None) => self.allow_direct_io = true,
                ("readonly" | "ro", None) => self.readonly = true,
                _ => rest.push(option),
            }
        }
        self.o = rest;
        Ok(())
    }
}
