//! The file system: what a FUSE operation becomes on the host.
//!
//! Three rules hold everywhere below:
//!
//! * a file is reached from a descriptor, by at most one [`Name`](crate::name::Name), and no symbolic link is ever
//!   followed on the guest's behalf;
//! * the descriptors that stand for nodes are O_PATH: they cannot read, write or touch a device. Only regular files and
//!   directories are ever opened for real, through `/proc/self/fd`, which reopens the very file and keeps the mount it
//!   was found on;
//! * a read-only mount is refused changes before any system call.

mod attr;
mod create;
mod dir;
mod file;
mod ioctl;
mod locks;
mod lookup;
mod names;
mod ops;
mod usage;
mod xattr;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use rustix::fs::{Mode, OFlags, ResolveFlags};

pub use attr::{Statx, Timestamp};
pub use create::CreateExtras;
pub(crate) use dir::{DirStream, Record};
pub use ioctl::IoctlReply;

use crate::config::Options;
use crate::credentials;
use crate::error::Error;
use crate::handle::HandleTable;
use crate::ids::IdMaps;
use crate::ino::InodeNumbers;
use crate::inode::{FdBudget, Inode, InodeTable};
use crate::lock::{LockThread, Locks};
use crate::proc::ProcFd;
use crate::quota::{Account, Nameless, QuotaUsage, Recounter};
use crate::sys::errno;
pub(crate) use lookup::Seen;

/// One directory tree of the host, served.
///
/// Node ids are below 2^40 and the root is 1. All methods may be called from any number of threads; each thread that
/// calls them gets credentials and a umask of its own, see [`prepare_thread`](crate::prepare_thread).
#[derive(Debug)]
pub struct PassthroughFs {
    options: Options,
    /// What INIT settled for the whole connection, as `FsOptions` bits.
    negotiated: AtomicU64,
    inodes: InodeTable,
    handles: HandleTable,
    numbers: InodeNumbers,
    proc: Arc<ProcFd>,
    budget: Arc<FdBudget>,
    locks: Arc<Locks>,
    _lock_thread: Option<LockThread>,
    /// What the tree takes, if that is limited.
    account: Option<Arc<Account>>,
    nameless: Nameless,
    _recounter: Option<Recounter>,
    /// What users and groups of the guest are on the host.
    ids: IdMaps,
    /// What the host calls file capabilities, if it is to know nothing of them.
    stored_capability: Option<CString>,
    /// The root opened for reading, for system calls that refuse O_PATH descriptors.
    root_directory: OwnedFd,
}

impl PassthroughFs {
    /// Opens the root and checks what the host offers.
    ///
    /// # Errors
    ///
    /// [`Error::Root`] if the root is not a directory that can be opened, [`Error::Proc`] if `/proc/self/fd` is not
    /// usable, [`Error::Kernel`] if the host kernel is older than 5.8, [`Error::Usage`] if what the tree takes is to be
    /// limited and cannot be counted, [`Error::Thread`].
    pub fn new(options: Options) -> Result<Self, Error> {
        let root_error = |source: io::Error| Error::Root {
            path: options.root.clone(),
            source,
        };
        let path_flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::open(&options.root, path_flags, Mode::empty()).map_err(|e| root_error(e.into()))?;
        rustix::fs::openat2(&root, c".", path_flags, Mode::empty(), ResolveFlags::BENEATH).map_err(
            |source| Error::Kernel {
                call: "openat2",
                source: source.into(),
            },
        )?;
        let proc = Arc::new(ProcFd::open().map_err(Error::Proc)?);
        let budget = options.budget.clone().unwrap_or_else(FdBudget::of_process);
        let root_directory = rustix::fs::openat(
            &root,
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| root_error(e.into()))?;
        let seen = Seen::of(root.as_fd()).map_err(root_error)?;
        let key = seen.key().ok_or_else(|| Error::Kernel {
            call: "statx with STATX_MNT_ID",
            source: errno(libc::ENOSYS),
        })?;
        let locks = Arc::new(Locks::new(proc.clone(), budget.clone(), options.read_only));
        let lock_thread = options
            .locks
            .then(|| LockThread::start(locks.clone(), &options.thread_start))
            .transpose()
            .map_err(Error::Thread)?;
        let account = match options.quota.is_none() {
            true => None,
            false => {
                let root = root_directory.try_clone().map_err(Error::Usage)?;
                Some(Account::open(options.quota, root, key).map_err(Error::Usage)?)
            }
        };
        let recounter = account
            .clone()
            .map(|account| Recounter::start(account, &options.thread_start))
            .transpose()
            .map_err(Error::Thread)?;
        let stored_capability = options
            .xattr_rules
            .as_ref()
            .filter(|_| options.xattr)
            .and_then(|rules| rules.stored_capability());
        let ids = match options.ids.is_empty() {
            true => credentials::ids_of_daemon(),
            false => options.ids.clone(),
        };
        Ok(PassthroughFs {
            numbers: InodeNumbers::new(key.device),
            inodes: InodeTable::new(root, key, proc.clone(), budget.clone(), options.inode_files),
            handles: HandleTable::new(),
            negotiated: AtomicU64::new(0),
            proc,
            budget,
            locks,
            _lock_thread: lock_thread,
            account,
            nameless: Nameless::default(),
            _recounter: recounter,
            stored_capability,
            ids,
            root_directory,
            options,
        })
    }

    /// What this mount was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// What the tree takes of the host's disk, if that is limited. Only what lies on the mount of the root is counted.
    pub fn quota_usage(&self) -> Option<QuotaUsage> {
        self.account.as_ref().map(|account| account.usage())
    }

    /// Number of nodes that the guest has looked up and not forgotten, the root included.
    pub fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    /// Number of files and directories that the guest has open.
    pub fn handle_count(&self) -> usize {
        self.handles.len()
    }

    /// Where node `inode` is below the root at this moment, for people: `/dir/file`, with ` (deleted)` when it has no name any
    /// more. Asks no disk, so that a disk that does not answer can be told by the files that wait for it; what
    /// cannot be known in this way is not told: the node of a file whose descriptor was given up, or one on a
    /// mount that is gone.
    pub fn path_of(&self, inode: u64) -> Option<PathBuf> {
        let inode = self.inodes.get(inode)?;
        let root = self.proc.path(self.root_directory.as_fd()).ok()?;
        let path = self.proc.path(inode.fd_at_hand()?.as_fd()).ok()?;
        let below = path.strip_prefix(root).ok()?;
        Some(Path::new("/").join(below))
    }

    /// Lets go of files on mounts below the root that the host has unmounted, as far as they are kept by handle: their
    /// nodes are stale from now on, and the mounts are busy no longer. Open files stay open, as on a disk.
    ///
    /// Returns the number of such mounts. See [`MountWatcher`](crate::MountWatcher) for when to call it.
    ///
    /// # Errors
    ///
    /// If the mount table cannot be read.
    pub fn release_unmounted(&self) -> io::Result<usize> {
        self.inodes.release_unmounted()
    }

    /// Descriptors that the guests of this mount's budget make the daemon hold.
    pub fn budget(&self) -> &Arc<FdBudget> {
        &self.budget
    }

    /// The INIT flags that this mount wants, of those in `capable`.
    ///
    /// Remembers `capable`: of what is settled for the whole connection, wanted here or not, the caller reports by
    /// calling this again.
    fn negotiate(&self, capable: FsOptions) -> FsOptions {
        let mut wanted = FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::MAX_PAGES
            | FsOptions::HANDLE_KILLPRIV_V2;
        if self.options.readdirplus {
            wanted |= FsOptions::DO_READDIRPLUS | FsOptions::READDIRPLUS_AUTO;
        }
        if self.options.announce_submounts {
            wanted |= FsOptions::SUBMOUNTS;
        }
        if self.options.writeback {
            wanted |= FsOptions::WRITEBACK_CACHE;
        }
        if self.serves_acls() {
            wanted |= FsOptions::POSIX_ACL | FsOptions::DONT_MASK;
        }
        if self.options.locks {
            wanted |= FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS;
        }
        self.negotiated.store(capable.bits(), Ordering::Relaxed);
        wanted & capable
    }

    /// Whether the guest may have POSIX ACLs here. Numbers in them are not translated.
    fn serves_acls(&self) -> bool {
        self.options.xattr && self.options.posix_acl && self.ids.is_empty()
    }

    fn has(&self, option: FsOptions) -> bool {
        self.negotiated.load(Ordering::Relaxed) & option.bits() != 0
    }

    /// Drops every node but the root and closes every handle: the guest is gone or starts afresh.
    fn reset(&self) {
        self.locks.clear();
        self.handles.clear();
        self.inodes.clear();
        self.nameless.clear();
    }

    /// The node `id`; ESTALE if the guest has forgotten it, or made it up.
    fn inode(&self, id: u64) -> io::Result<Arc<Inode>> {
        self.inodes.get(id).ok_or_else(|| errno(libc::ESTALE))
    }

    /// Refuses changes on a read-only mount.
    fn writable(&self) -> io::Result<()> {
        if self.options.read_only {
            Err(errno(libc::EROFS))
        } else {
            Ok(())
        }
    }

    /// Flushes the host file system on which node `inode` lies, as FUSE_SYNCFS asks.
    ///
    /// # Errors
    ///
    /// ESTALE for an unknown node, else what the host's `syncfs` says.
    pub fn syncfs(&self, inode: u64) -> io::Result<()> {
        let inode = self.inode(inode)?;
        if inode.id() == crate::inode::ROOT {
            return Ok(rustix::fs::syncfs(&self.root_directory)?);
        }
        if !inode.is_directory() {
            return Err(errno(libc::EINVAL));
        }
        let directory = self.open_directory(inode.fd()?.as_fd())?;
        Ok(rustix::fs::syncfs(directory)?)
    }

    /// Opens the directory `directory` itself for reading.
    fn open_directory(&self, directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(rustix::fs::openat(directory, c".", flags, Mode::empty())?)
    }
}
