//! What one mount may do, fixed when it is made.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::ids::IdMaps;
use crate::inode::FdBudget;
use crate::quota::Quota;
use crate::xattr_rules::XattrRules;

/// Time-out of cached entries and attributes where the guest is told to keep them "for ever".
const LONG: Duration = Duration::from_secs(86_400);

/// How much a guest may cache, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachePolicy {
    /// Nothing: every look at a name or an attribute asks the host, data bypasses the guest's page cache.
    Never,
    /// Names and attributes for a day, data never. For trees that only this guest changes.
    Metadata,
    /// Names and attributes for `timeout`, data from open to close. For trees that the host changes too.
    Auto {
        /// Longest time for which a change made on the host may stay unseen.
        timeout: Duration,
    },
    /// Names, attributes and data for a day, over close and open. For trees that only this guest changes.
    Always,
}

impl Default for CachePolicy {
    fn default() -> Self {
        CachePolicy::Auto {
            timeout: Duration::from_secs(1),
        }
    }
}

impl CachePolicy {
    /// How long a guest may keep a name it has looked up.
    pub fn entry_timeout(self) -> Duration {
        match self {
            CachePolicy::Never => Duration::ZERO,
            CachePolicy::Auto { timeout } => timeout,
            CachePolicy::Metadata | CachePolicy::Always => LONG,
        }
    }

    /// How long a guest may keep attributes.
    pub fn attr_timeout(self) -> Duration {
        self.entry_timeout()
    }

    /// Whether data must bypass the guest's page cache.
    pub(crate) fn bypasses_page_cache(self) -> bool {
        matches!(self, CachePolicy::Never | CachePolicy::Metadata)
    }

    /// Whether cached data and directory contents outlive the last close.
    pub(crate) fn keeps_data(self) -> bool {
        matches!(self, CachePolicy::Always)
    }
}

/// How nodes keep hold of the host's files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InodeFiles {
    /// By file handle where the file system and the daemon's capabilities (CAP_DAC_READ_SEARCH) allow it, else by
    /// descriptor. Nodes then cost no descriptors and keep no mount busy.
    #[default]
    Handles,
    /// By descriptor, always.
    Descriptors,
}

/// What one mount serves and allows.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory that becomes the root. Trusted: symbolic links in it are followed, once, at the start.
    pub root: PathBuf,
    /// Refuse every change with EROFS before any system call is made.
    pub read_only: bool,
    /// What the guest may cache.
    pub cache: CachePolicy,
    /// Serve extended attributes. Off: every request for one is answered EOPNOTSUPP.
    pub xattr: bool,
    /// Names under which the host stores the guest's attributes; `None`: their own.
    pub xattr_rules: Option<Arc<XattrRules>>,
    /// What users and groups of the guest are on the host. Empty: the same, or, where the daemon may not change its own,
    /// the guest's user 0 and group 0 are the daemon's. Numbers inside ACLs are not translated, so there are none then.
    pub ids: IdMaps,
    /// Serve POSIX ACLs: asks for them, and for unmasked modes, at INIT. Needs `xattr`.
    pub posix_acl: bool,
    /// Honour O_DIRECT of a guest's open. Off: the flag is dropped.
    pub allow_direct_io: bool,
    /// Let the guest collect writes before it sends them. Only for trees that only this guest changes.
    pub writeback: bool,
    /// Serve POSIX, OFD and flock locks on the host. Off: the guest keeps them to itself.
    pub locks: bool,
    /// Mark directories on which the host has mounted something, so that the guest gives them a device number of
    /// their own.
    pub announce_submounts: bool,
    /// How nodes keep hold of the host's files.
    pub inode_files: InodeFiles,
    /// Descriptors that the guest may make the daemon hold; to be shared by the mounts of a daemon. `None`: this mount
    /// alone may take half of what the process may open.
    pub budget: Option<Arc<FdBudget>>,
    /// The most that the tree may take of the host's disk. What is mounted below it is not part of it.
    pub quota: Quota,
    /// Answer READDIRPLUS; off: the guest is told to use READDIR and LOOKUP.
    pub readdirplus: bool,
    /// What the mount's own threads, which try waiting locks and count what the tree takes, do first.
    pub thread_start: ThreadStart,
}

/// Called by a thread of this crate before anything else. The default does nothing.
#[derive(Clone)]
pub struct ThreadStart(pub Arc<dyn Fn() + Send + Sync>);

impl Default for ThreadStart {
    fn default() -> Self {
        ThreadStart(Arc::new(|| ()))
    }
}

impl fmt::Debug for ThreadStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ThreadStart")
    }
}

impl Options {
    /// Serves `root` read-write with the defaults.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Options {
            root: root.into(),
            read_only: false,
            cache: CachePolicy::default(),
            xattr: true,
            xattr_rules: None,
            ids: IdMaps::default(),
            posix_acl: false,
            allow_direct_io: false,
            writeback: false,
            locks: true,
            announce_submounts: true,
            inode_files: InodeFiles::default(),
            budget: None,
            quota: Quota::default(),
            readdirplus: true,
            thread_start: ThreadStart::default(),
        }
    }
}
