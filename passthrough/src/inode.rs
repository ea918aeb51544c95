//! Node ids, the host files behind them, and how often the guest has looked each of them up.
//!
//! A host file is identified by (mount, device, inode number): the same file seen through two mounts is two nodes, since
//! the mounts may differ in what they allow. A node lives while its lookup count is above zero.

mod budget;
mod file;
mod mount;
mod table;

use std::sync::atomic::{AtomicU64, Ordering};

pub use budget::FdBudget;
pub(crate) use budget::Permit;
use file::InodeFile;
pub(crate) use mount::MOUNT_TABLE;
pub(crate) use table::InodeTable;

/// Node id of the root.
pub(crate) const ROOT: u64 = 1;

/// What makes two lookups find the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Mount id, the never-reused kind where the host kernel has it.
    pub(crate) mount: u64,
    /// Device number.
    pub(crate) device: u64,
    /// Inode number on that device.
    pub(crate) ino: u64,
}

/// What became of a descriptor that was to be closed.
enum GaveUp {
    /// It is closed.
    Closed,
    /// There was none, or none that may be closed.
    HadNone,
    /// It is in use, or was of late.
    InUse,
}

/// A host file that the guest knows.
#[derive(Debug)]
pub(crate) struct Inode {
    id: u64,
    generation: u64,
    key: Key,
    /// The S_IFMT bits; a file never changes its type.
    file_type: u32,
    file: InodeFile,
    lookups: AtomicU64,
}

impl Inode {
    /// The node id within the mount, below 2^40.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Tells two uses of one id apart.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.file_type == libc::S_IFDIR
    }

    pub(crate) fn is_regular(&self) -> bool {
        self.file_type == libc::S_IFREG
    }

    pub(crate) fn is_symlink(&self) -> bool {
        self.file_type == libc::S_IFLNK
    }

    /// Counts one more lookup unless the node is on its way out.
    fn look_up(&self) -> bool {
        self.lookups
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                if count == 0 {
                    None
                } else {
                    Some(count.saturating_add(1))
                }
            })
            .is_ok()
    }

    /// Takes `count` lookups away; true if that took the last one.
    fn forget(&self, count: u64) -> bool {
        self.lookups
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |lookups| {
                if lookups == 0 || count == 0 {
                    None
                } else {
                    Some(lookups.saturating_sub(count))
                }
            })
            .is_ok_and(|before| before <= count)
    }
}
