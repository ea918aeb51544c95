//! A host directory served as a FUSE file system.
//!
//! The crate answers FUSE operations on one directory tree of the host with plain system calls, good enough to be the
//! writable layer of a guest's overlay, and leaves that tree under no circumstances. It knows nothing of virtio, of
//! images or of the runtime: a caller hands it a decoded request and gets a value or an errno back.
//!
//! | room | job |
//! |---|---|
//! | `config` | what one mount may do: [`Options`], [`CachePolicy`] |
//! | `fs` | [`PassthroughFs`], one file per family of operations below it |
//! | `inode` | node ids, their host files (by handle, within [`FdBudget`]) and their lookup counts |
//! | `handle` | open files and directories |
//! | `quota` | what a mount may take of the host's disk |
//! | `lock` | record locks and flock, waiting included |
//! | `watch` | letting go of what the host unmounts |
//! | `xattr_rules` | attribute names of the guest and of the host |
//! | `ino` | inode numbers that stay unique over several host devices |
//! | `proc` | reaching the file behind a descriptor |
//! | `name` | the only type of name that reaches a system call |
//! | `ids` | users and groups of the guest and of the host |
//! | `credentials` | per-thread identity, umask and capabilities of one request |
//! | `sys` | the crate's `unsafe` code and the calls that `rustix` lacks |
//! | `error` | why a directory cannot be served |

mod config;
mod credentials;
mod error;
mod fs;
mod handle;
mod ids;
mod ino;
mod inode;
mod lock;
mod name;
mod proc;
mod quota;
mod sys;
mod watch;
mod xattr_rules;

pub use config::{CachePolicy, InodeFiles, Options, ThreadStart};
pub use credentials::prepare_thread;
pub use error::Error;
pub use fs::{CreateExtras, IoctlReply, PassthroughFs, Statx, Timestamp};
pub use ids::{IdMap, IdMaps, IdRuleError};
pub use inode::FdBudget;
pub use lock::ranges;
pub use lock::{LockDone, LockWait};
pub use quota::{Quota, QuotaUsage};
pub use watch::MountWatcher;
pub use xattr_rules::{XattrRules, XattrRulesError};
