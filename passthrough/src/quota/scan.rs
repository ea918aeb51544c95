//! Adding up what a tree takes.
//!
//! One directory is open at a time, however deep the guest has made the tree: the way back up is `..`, which must lead to
//! the directory that the walk came from. What is kept for each level is one batch of the names of its directories.
//! Files with several names are kept in mind until all of them have been met.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags, SeekFrom};

use super::QuotaUsage;
use super::charge::Charges;
use crate::fs::{Record, Seen};
use crate::inode::Key;
use crate::name::Name;
use crate::sys::{errno, getdents64};

/// Bytes of directory records taken at once.
const BATCH: usize = 32 * 1024;
/// Bytes of the unit of `stx_blocks`.
const SECTOR: u64 = 512;

/// What a walk has found.
#[derive(Debug, Default)]
pub(super) struct Count {
    /// All of it.
    pub(super) total: QuotaUsage,
    /// Bytes of the files that have a charge.
    pub(super) charged: HashMap<Key, u64>,
}

/// A directory on the way down.
struct Level {
    key: Key,
    /// Directories in it that are yet to be walked, of those before `position`.
    names: Vec<CString>,
    /// Where reading it goes on.
    position: u64,
    /// All of it has been read.
    read: bool,
}

/// Adds up what is below `root`, the root included, and on the mount `mount`.
///
/// # Errors
///
/// EAGAIN: a directory was moved meanwhile. EINTR: `stop` was set. Else what the host says; what the daemon may not read
/// is left out, as it is out of the guest's reach as well.
pub(super) fn count(
    root: BorrowedFd<'_>,
    mount: u64,
    charges: &Charges,
    stop: &AtomicBool,
) -> io::Result<Count> {
    let mut walk = Walk {
        mount,
        charges,
        count: Count::default(),
        names_left: HashMap::new(),
    };
    let mut current = open_directory(root, c".")?;
    let seen = Seen::of(current.as_fd())?;
    let mut levels = vec![level_of(walk.add(&seen))?];
    let mut records = vec![0; BATCH];
    while let Some(level) = levels.last_mut() {
        if stop.load(Ordering::Relaxed) {
            return Err(errno(libc::EINTR));
        }
        if let Some(name) = level.names.pop() {
            if let Some((directory, key)) = walk.enter(current.as_fd(), &name)? {
                current = directory;
                levels.push(level_of(Some(key))?);
            }
        } else if !level.read {
            walk.read(current.as_fd(), level, &mut records)?;
        } else {
            levels.pop();
            let Some(parent) = levels.last() else { break };
            current = open_directory(current.as_fd(), c"..")?;
            if Seen::of(current.as_fd())?.key() != Some(parent.key) {
                return Err(errno(libc::EAGAIN));
            }
        }
    }
    Ok(walk.count)
}

fn level_of(key: Option<Key>) -> io::Result<Level> {
    Ok(Level {
        key: key.ok_or_else(|| errno(libc::EAGAIN))?,
        names: Vec::new(),
        position: 0,
        read: false,
    })
}

fn open_directory(from: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(from, name, flags, Mode::empty())?)
}

/// Whether it is no failure of the walk: the file is gone or another one by now, or nobody may look.
fn is_passed_over(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::EACCES | libc::ESTALE)
    )
}

struct Walk<'a> {
    mount: u64,
    charges: &'a Charges,
    count: Count,
    /// Files with several names, and how many of them have not been met.
    names_left: HashMap<Key, u32>,
}

impl Walk<'_> {
    /// Counts a file, unless it has been counted or is on another mount. Returns its key if it is not.
    fn add(&mut self, seen: &Seen) -> Option<Key> {
        let key = seen.key().filter(|key| key.mount == self.mount)?;
        if seen.file_type() != libc::S_IFDIR && seen.0.stx_nlink > 1 {
            if let Some(left) = self.names_left.get_mut(&key) {
                *left = left.saturating_sub(1);
                if *left == 0 {
                    self.names_left.remove(&key);
                }
                return Some(key);
            }
            self.names_left.insert(key, seen.0.stx_nlink - 1);
        }
        let bytes = seen.0.stx_blocks.saturating_mul(SECTOR);
        self.count.total.add(QuotaUsage { bytes, inodes: 1 });
        if self.charges.holds(&key) {
            self.count.charged.insert(key, bytes);
        }
        Some(key)
    }

    /// Opens a directory that has been counted, if it is still there and is one.
    fn enter(&self, parent: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<Option<(OwnedFd, Key)>> {
        let directory = match open_directory(parent, name) {
            Err(error) if is_passed_over(&error) => return Ok(None),
            other => other?,
        };
        let key = Seen::of(directory.as_fd())?.key();
        Ok(key
            .filter(|key| key.mount == self.mount)
            .map(|key| (directory, key)))
    }

    /// Counts the next batch of what is in a directory.
    fn read(&mut self, directory: BorrowedFd<'_>, level: &mut Level, records: &mut [u8]) -> io::Result<()> {
        rustix::fs::seek(directory, SeekFrom::Start(level.position))?;
        let filled = getdents64(directory, records)?;
        let mut rest = records.get(..filled).unwrap_or(&[]);
        level.read = rest.is_empty();
        while let Some(record) = Record::parse(rest) {
            rest = rest.get(record.length..).unwrap_or(&[]);
            level.position = record.next;
            if record.is_dot_or_dot_dot() {
                continue;
            }
            let seen = match Name::new(record.name).and_then(|name| Seen::at(directory, name)) {
                Err(error) if is_passed_over(&error) => continue,
                other => other?,
            };
            if self.add(&seen).is_some() && seen.file_type() == libc::S_IFDIR {
                level.names.push(record.name.to_owned());
            }
        }
        Ok(())
    }
}
