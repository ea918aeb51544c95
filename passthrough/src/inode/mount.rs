//! The mounts of the host that files were found on.
//!
//! A file handle is opened through a descriptor on the mount it was made on: the file comes back with that mount's
//! restrictions, and a handle of one file system means nothing to another. So each mount that handles come from has one
//! descriptor, for as long as a node of it is known, or until the host unmounts it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use parking_lot::RwLock;
use rustix::fs::OFlags;

use super::budget::FdBudget;
use super::file::FileHandle;
use super::{Inode, Key};
use crate::proc::ProcFd;
use crate::sys::errno;

/// The mounts of the calling thread's namespace, one line each; the first field is the id.
pub(crate) const MOUNT_TABLE: &str = "/proc/thread-self/mountinfo";

/// A mount whose files are kept by handle.
#[derive(Debug)]
pub(crate) struct Mount {
    /// The id that the mount table lists, which is not reused while the descriptor is open.
    listed_id: i32,
    /// A file of the mount, opened for reading, as `open_by_handle_at` wants it; none once the host has unmounted it.
    fd: RwLock<Option<OwnedFd>>,
    budget: Arc<FdBudget>,
}

impl Mount {
    pub(super) fn budget(&self) -> &Arc<FdBudget> {
        &self.budget
    }

    /// Whether the host still has it mounted, as far as is known.
    pub(super) fn is_attached(&self) -> bool {
        self.fd.read_recursive().is_some()
    }

    /// Runs `open` with a descriptor on the mount. ESTALE: the host has unmounted it.
    pub(super) fn with_fd<T>(&self, open: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        let fd = self.fd.read_recursive();
        open(fd.as_ref().ok_or_else(|| errno(libc::ESTALE))?.as_fd())
    }
}

#[derive(Debug)]
enum Known {
    /// Files can be opened by handle as long as one of them is known.
    Handles(Weak<Mount>),
    /// They cannot: the file system has no handles, or will not open them.
    Without,
}

/// All mounts that the guest has met, by the mount id of [`Key`].
#[derive(Debug)]
pub(super) struct Mounts {
    known: RwLock<HashMap<u64, Known>>,
    proc: Arc<ProcFd>,
    budget: Arc<FdBudget>,
}

impl Mounts {
    pub(super) fn new(proc: Arc<ProcFd>, budget: Arc<FdBudget>) -> Self {
        Mounts {
            known: RwLock::default(),
            proc,
            budget,
        }
    }

    /// The mount of `root`, the first file to be met, if its files can be kept by handle.
    pub(super) fn meet(&self, root: &Arc<Inode>) -> Option<Arc<Mount>> {
        let fd = root.fd().ok()?;
        let (handle, listed_id) = FileHandle::of(fd.as_fd()).ok()?;
        self.of(root.key(), fd.as_fd(), &handle, listed_id)
    }

    /// The mount of the file behind `fd`, if that can be kept by its handle `handle`. A mount that is met for the first
    /// time is tried with it.
    pub(super) fn of(
        &self,
        key: &Key,
        fd: BorrowedFd<'_>,
        handle: &FileHandle,
        listed_id: i32,
    ) -> Option<Arc<Mount>> {
        match self.known.read().get(&key.mount) {
            Some(Known::Without) => return None,
            Some(Known::Handles(mount)) => {
                if let Some(mount) = mount.upgrade().filter(|mount| mount.is_attached()) {
                    return Some(mount);
                }
            }
            None => {}
        }
        // A mount is met by way of its root, so this keeps no other file busy. Where that root is a single device node
        // that was mounted on a file, it goes by descriptor.
        let opened = self.open_for_reading(fd)?;
        let mount = handle.open(opened.as_fd()).is_ok().then(|| {
            Arc::new(Mount {
                listed_id,
                fd: RwLock::new(Some(opened)),
                budget: self.budget.clone(),
            })
        });
        let mut known = self.known.write();
        if let Some(Known::Handles(other)) = known.get(&key.mount)
            && let Some(other) = other.upgrade().filter(|mount| mount.is_attached())
        {
            return Some(other);
        }
        known.retain(|_, known| !matches!(known, Known::Handles(mount) if mount.strong_count() == 0));
        known.insert(
            key.mount,
            mount
                .as_ref()
                .map_or(Known::Without, |mount| Known::Handles(Arc::downgrade(mount))),
        );
        mount
    }

    fn open_for_reading(&self, fd: BorrowedFd<'_>) -> Option<OwnedFd> {
        let openable = matches!(
            rustix::fs::fstat(fd).ok()?.st_mode & libc::S_IFMT,
            libc::S_IFDIR | libc::S_IFREG
        );
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        openable.then(|| self.proc.reopen(fd, flags).ok())?
    }

    /// Closes the descriptors of mounts that the mount table lists no longer; returns their ids.
    pub(super) fn detach_unlisted(&self) -> io::Result<Vec<u64>> {
        let mut gone = Vec::new();
        // Only what was known before the table was read can be missing from it.
        let attached: Vec<(u64, Arc<Mount>)> = self
            .known
            .read()
            .iter()
            .filter_map(|(id, known)| match known {
                Known::Handles(mount) => Some((*id, mount.upgrade().filter(|mount| mount.is_attached())?)),
                Known::Without => None,
            })
            .collect();
        let table = std::fs::read_to_string(MOUNT_TABLE)?;
        let listed: HashSet<i32> = table
            .lines()
            .filter_map(|line| line.split_ascii_whitespace().next()?.parse().ok())
            .collect();
        for (id, mount) in attached {
            if !listed.contains(&mount.listed_id) {
                mount.fd.write().take();
                gone.push(id);
            }
        }
        Ok(gone)
    }
}
