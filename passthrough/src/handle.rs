//! Open files and directories, by the handle numbers that the guest uses.
//!
//! A handle is only good together with the node id it was opened on: a request that pairs it with another one is
//! refused, so a guest cannot use a number it guessed to reach a file by way of a node with other rules.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::fs::DirStream;
use crate::inode::Permit;
use crate::quota::Charge;
use crate::sys::errno;

/// Parts of the table; handles are numbered in sequence, so neighbours lie in different parts.
const SHARDS: usize = 64;

/// A file or directory that a guest has open.
#[derive(Debug)]
pub(crate) struct Handle {
    inode: u64,
    fd: OwnedFd,
    _permit: Permit,
    /// What the mount's quota holds for the file.
    pub(crate) charge: Option<Arc<Charge>>,
    /// Where reading a directory has got to; unused by files.
    pub(crate) stream: Mutex<DirStream>,
    directory: bool,
}

impl Handle {
    pub(crate) fn file(inode: u64, fd: OwnedFd, permit: Permit, charge: Option<Arc<Charge>>) -> Self {
        Handle {
            inode,
            fd,
            _permit: permit,
            charge,
            stream: Mutex::new(DirStream::new()),
            directory: false,
        }
    }

    pub(crate) fn directory(inode: u64, fd: OwnedFd, permit: Permit, charge: Option<Arc<Charge>>) -> Self {
        Handle {
            inode,
            fd,
            _permit: permit,
            charge,
            stream: Mutex::new(DirStream::new()),
            directory: true,
        }
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// All open handles of one mount. Numbers are never used twice.
#[derive(Debug)]
pub(crate) struct HandleTable {
    next: AtomicU64,
    shards: [RwLock<HashMap<u64, Arc<Handle>>>; SHARDS],
}

impl HandleTable {
    pub(crate) fn new() -> Self {
        HandleTable {
            next: AtomicU64::new(1),
            shards: std::array::from_fn(|_| RwLock::default()),
        }
    }

    fn shard(&self, id: u64) -> &RwLock<HashMap<u64, Arc<Handle>>> {
        // The index is a remainder by the number of shards.
        #[allow(clippy::indexing_slicing)]
        &self.shards[(id % SHARDS as u64) as usize]
    }

    pub(crate) fn insert(&self, handle: Handle) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.shard(id).write().insert(id, Arc::new(handle));
        id
    }

    fn get(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        let handle = self.shard(id).read().get(&id).cloned();
        handle
            .filter(|handle| handle.inode == inode)
            .ok_or_else(|| errno(libc::EBADF))
    }

    /// The open file `id` of `inode`, or EBADF.
    pub(crate) fn get_file(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        self.get(id, inode).and_then(|handle| {
            if handle.directory {
                Err(errno(libc::EBADF))
            } else {
                Ok(handle)
            }
        })
    }

    /// The open directory `id` of `inode`, or EBADF.
    pub(crate) fn get_directory(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        self.get(id, inode).and_then(|handle| {
            if handle.directory {
                Ok(handle)
            } else {
                Err(errno(libc::EBADF))
            }
        })
    }

    /// The open file or directory `id` of `inode`, or EBADF.
    pub(crate) fn get_any(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        self.get(id, inode)
    }

    /// Closes `id` if it is open on `inode`; requests that still use it keep the descriptor until they end.
    pub(crate) fn remove(&self, id: u64, inode: u64) -> io::Result<Arc<Handle>> {
        let mut shard = self.shard(id).write();
        match shard.get(&id) {
            Some(handle) if handle.inode == inode => shard.remove(&id).ok_or_else(|| errno(libc::EBADF)),
            _ => Err(errno(libc::EBADF)),
        }
    }

    /// Closes everything.
    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            shard.write().clear();
        }
    }

    /// All that is open now.
    pub(crate) fn all(&self) -> Vec<Arc<Handle>> {
        let of_shard = |shard: &RwLock<HashMap<u64, Arc<Handle>>>| -> Vec<_> {
            shard.read().values().cloned().collect()
        };
        self.shards.iter().flat_map(of_shard).collect()
    }

    /// Number of open handles.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.read().len()).sum()
    }
}
