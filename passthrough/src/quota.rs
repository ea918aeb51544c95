//! What a guest may take of the host's disk through one mount.
//!
//! The mount counts for itself, so any file system of the host will do: what the files below the root take is added up
//! when the mount is made ([`scan`]), and from then on each change is followed by a look at the file that it changed.
//! A file that is being changed has a [`Charge`], which knows what has been counted for it; counting it again adds the
//! difference, so it does not matter in which order concurrent changes are counted.
//!
//! A change that may take space is promised room before it is made: the most that it can take, or, when there is not
//! that much left, what it will really take ([`growth`]). Many changes run side by side under the shared half of a
//! gate; one that is short of room takes the gate for itself, so nothing is promised to others when it is decided. What
//! does not grow is never refused.
//!
//! XFS gives a file that grows as much again, ahead of its data, and takes back what is not used when the file is closed.
//! That is room taken from others, so it is left to do so only while there is plenty ([`Account::ahead`]).
//!
//! What the host changes is found by counting afresh ([`recount`]): now and then, and soon after a refusal.

mod charge;
mod growth;
mod recount;
mod scan;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::inode::Key;
use crate::sys::errno;
pub(crate) use charge::Charge;
use charge::Charges;
pub(crate) use charge::Nameless;
pub(crate) use recount::Recounter;

/// How often the first count is tried again while the host changes the tree.
const FIRST_COUNTS: usize = 10;
/// The number that `fstatfs` has for XFS.
const XFS_SUPER_MAGIC: u64 = 0x5846_5342;
/// A file grows as its host likes while there is room for so many times its size, so that what it is given ahead of its
/// data is an eighth of the room at most.
const AHEAD_TIMES: u64 = 16;
/// What a small file is given ahead of its data, in bytes, and as much for its alignment.
const AHEAD_LEAST: u64 = 128 << 10;

/// The most that a mount may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Bytes of the disk, as `du` counts them; `None`: no limit.
    pub bytes: Option<u64>,
    /// Files, directories and all else that has an inode, the root included; `None`: no limit.
    pub inodes: Option<u64>,
}

impl Quota {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Quota::default()
    }
}

/// What a mount takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaUsage {
    /// Bytes of the disk.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

impl QuotaUsage {
    fn add(&mut self, more: Self) {
        self.bytes = self.bytes.saturating_add(more.bytes);
        self.inodes = self.inodes.saturating_add(more.inodes);
    }

    fn subtract(&mut self, less: Self) {
        self.bytes = self.bytes.saturating_sub(less.bytes);
        self.inodes = self.inodes.saturating_sub(less.inodes);
    }
}

/// What is known of a mount's use.
#[derive(Debug, Default)]
struct Ledger {
    /// All that is counted.
    used: QuotaUsage,
    /// Room for changes that are being made.
    promised: QuotaUsage,
    /// The part of `used` that has no name left, and is given back when the guest lets go of it.
    nameless: QuotaUsage,
    /// Goes up with whatever makes a count that is under way worthless.
    changes: u64,
}

/// How a range of a file comes to have a place on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filling {
    /// By FALLOCATE: all of it, and not more.
    Allocate,
    /// By writing all of it.
    Write,
    /// By writing as much of it as there is room for.
    WritePart,
}

/// The use that one mount makes of its quota.
#[derive(Debug)]
pub(crate) struct Account {
    limits: Quota,
    /// The host gives files that grow space ahead of their data.
    runs_ahead: bool,
    /// What is found on other mounts is not counted.
    mount: u64,
    /// What space is given in, in bytes.
    block: u64,
    /// The root, opened for reading.
    root: OwnedFd,
    gate: RwLock<()>,
    ledger: Mutex<Ledger>,
    charges: Charges,
    wish: Mutex<recount::Wish>,
    wished: Condvar,
    stop: AtomicBool,
}

impl Account {
    /// Counts what is below `root`, a directory opened for reading whose key is `key`.
    ///
    /// # Errors
    ///
    /// What the host says of a directory that cannot be read; EAGAIN if the host goes on moving directories about.
    pub(crate) fn open(limits: Quota, root: OwnedFd, key: Key) -> io::Result<Arc<Self>> {
        let block = rustix::fs::fstatvfs(&root)?.f_frsize.max(512);
        let kind = rustix::fs::fstatfs(&root)?.f_type;
        let account = Account {
            limits,
            runs_ahead: kind as u64 == XFS_SUPER_MAGIC && limits.bytes.is_some(),
            mount: key.mount,
            block,
            root,
            gate: RwLock::new(()),
            ledger: Mutex::default(),
            charges: Charges::default(),
            wish: Mutex::default(),
            wished: Condvar::new(),
            stop: AtomicBool::new(false),
        };
        let mut counted = account.count();
        for _ in 1..FIRST_COUNTS {
            match counted {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => counted = account.count(),
                _ => break,
            }
        }
        account.ledger.lock().used = counted?.total;
        Ok(Arc::new(account))
    }

    fn count(&self) -> io::Result<scan::Count> {
        scan::count(self.root.as_fd(), self.mount, &self.charges, &self.stop)
    }

    /// What is counted now.
    pub(crate) fn usage(&self) -> QuotaUsage {
        self.ledger.lock().used
    }

    /// Whether files on this mount of the host are counted.
    pub(crate) fn counts(&self, key: &Key) -> bool {
        key.mount == self.mount
    }

    /// Begins a change that takes no space.
    pub(crate) fn change(&self) -> Change<'_> {
        self.promised(QuotaUsage::default(), Gate::shared(self))
    }

    /// Begins a change of names that makes `inodes` new files and takes `blocks` of the disk at most.
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(crate) fn change_names(&self, inodes: u64, blocks: u64) -> io::Result<Change<'_>> {
        let mut change = self.change_by(QuotaUsage {
            bytes: self.block.saturating_mul(blocks),
            inodes,
        })?;
        change.names = true;
        Ok(change)
    }

    /// Begins a change that stores `bytes` beside a file.
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(crate) fn change_beside(&self, bytes: u64) -> io::Result<Change<'_>> {
        self.change_by(QuotaUsage {
            bytes: self.rounded(bytes),
            inodes: 0,
        })
    }

    fn change_by(&self, amount: QuotaUsage) -> io::Result<Change<'_>> {
        match self.promise(amount, Gate::shared(self)) {
            Some(change) => Ok(change),
            // Others may have been promised more than they will take.
            None => self
                .promise(amount, Gate::exclusive(self))
                .ok_or_else(|| self.refuse()),
        }
    }

    /// Begins a change that gives `length` bytes of `file` from `offset` on a place on the disk (`None`: at its end).
    /// Returns for how many of them, from the first on, there is room: all, or fewer if they are written in part.
    ///
    /// # Errors
    ///
    /// ENOSPC, and what the host says when asked where the file has space already.
    pub(crate) fn change_data(
        &self,
        file: BorrowedFd<'_>,
        offset: Option<u64>,
        length: u64,
        filling: Filling,
    ) -> io::Result<(Change<'_>, u64)> {
        // One block more than the bytes fill, since they may begin anywhere in the first.
        let bytes = self.rounded(length).saturating_add(self.block);
        let most = QuotaUsage {
            bytes: bytes.saturating_add(self.ahead(file, offset, length, filling)?),
            inodes: 0,
        };
        if let Some(change) = self.promise(most, Gate::shared(self)) {
            return Ok((change, length));
        }
        let gate = Gate::exclusive(self);
        let offset = match offset {
            Some(offset) => offset,
            None => size_of(file)?,
        };
        let room = self.room().bytes;
        let fit = growth::fitting(file, offset, length, self.block, room)?;
        if fit.length < length && (filling != Filling::WritePart || fit.length == 0) {
            drop(gate);
            return Err(self.refuse());
        }
        let exactly = QuotaUsage {
            bytes: fit.growth,
            inodes: 0,
        };
        self.ledger.lock().promised.add(exactly);
        let change = self.promised(exactly, gate);
        if self.runs_ahead && fit.growth > 0 && filling != Filling::Allocate {
            take_place(file, offset, fit.length)?;
        }
        Ok((change, fit.length))
    }

    /// Bytes that there must be room for beside those written, if `file` may be given space ahead of its data.
    fn ahead(
        &self,
        file: BorrowedFd<'_>,
        offset: Option<u64>,
        length: u64,
        filling: Filling,
    ) -> io::Result<u64> {
        if !self.runs_ahead || filling == Filling::Allocate {
            return Ok(0);
        }
        let size = size_of(file)?;
        let end = offset.unwrap_or(size).saturating_add(length);
        if end <= size {
            return Ok(0);
        }
        Ok(end.saturating_mul(AHEAD_TIMES).saturating_add(AHEAD_LEAST))
    }

    fn rounded(&self, bytes: u64) -> u64 {
        bytes.checked_next_multiple_of(self.block).unwrap_or(u64::MAX)
    }

    fn room(&self) -> QuotaUsage {
        self.room_in(&self.ledger.lock())
    }

    fn room_in(&self, ledger: &Ledger) -> QuotaUsage {
        let left = |limit: Option<u64>, used: u64, promised: u64| {
            limit.map_or(u64::MAX, |limit| {
                limit.saturating_sub(used).saturating_sub(promised)
            })
        };
        QuotaUsage {
            bytes: left(self.limits.bytes, ledger.used.bytes, ledger.promised.bytes),
            inodes: left(self.limits.inodes, ledger.used.inodes, ledger.promised.inodes),
        }
    }

    fn promise<'a>(&'a self, amount: QuotaUsage, gate: Gate<'a>) -> Option<Change<'a>> {
        let mut ledger = self.ledger.lock();
        let room = self.room_in(&ledger);
        if room.bytes < amount.bytes || room.inodes < amount.inodes {
            return None;
        }
        ledger.promised.add(amount);
        drop(ledger);
        Some(self.promised(amount, gate))
    }

    fn promised<'a>(&'a self, promised: QuotaUsage, gate: Gate<'a>) -> Change<'a> {
        Change {
            account: self,
            promised,
            names: false,
            _gate: gate,
        }
    }

    /// ENOSPC, as of a disk that is full. Perhaps the host has made room since it was last counted.
    fn refuse(&self) -> io::Error {
        self.wish_recount();
        errno(libc::ENOSPC)
    }

    /// Shows the limits in what the host says of its file system.
    pub(crate) fn limit_statfs(&self, shown: &mut libc::statvfs64) {
        let room = self.room();
        let unit = match shown.f_frsize {
            0 => 1,
            unit => unit,
        };
        if let Some(limit) = self.limits.bytes {
            shown.f_blocks = shown.f_blocks.min(limit / unit);
            shown.f_bfree = shown.f_bfree.min(room.bytes / unit);
            shown.f_bavail = shown.f_bavail.min(room.bytes / unit);
        }
        if let Some(limit) = self.limits.inodes {
            // A file system without a fixed number of inodes says that it has none.
            let least = |shown: u64, ours: u64, none: bool| if none { ours } else { shown.min(ours) };
            let none = shown.f_files == 0;
            shown.f_files = least(shown.f_files, limit, none);
            shown.f_ffree = least(shown.f_ffree, room.inodes, none);
            shown.f_favail = least(shown.f_favail, room.inodes, none);
        }
    }
}

fn size_of(file: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0))
}

/// Gives a range of `file` its place, and not more, so that writing to it takes none.
fn take_place(file: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, length) {
        // Files that are written to another place each time have none.
        Err(Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

/// The gate of an account, passed.
#[derive(Debug)]
enum Gate<'a> {
    Shared(#[allow(dead_code, reason = "held")] RwLockReadGuard<'a, ()>),
    Exclusive(#[allow(dead_code, reason = "held")] RwLockWriteGuard<'a, ()>),
}

impl<'a> Gate<'a> {
    fn shared(account: &'a Account) -> Self {
        Gate::Shared(account.gate.read())
    }

    fn exclusive(account: &'a Account) -> Self {
        Gate::Exclusive(account.gate.write())
    }
}

/// A change that is being made. What it was promised and did not take is given back when it is dropped, by when all that
/// it changed has been counted. A thread makes one at a time.
#[derive(Debug)]
#[must_use = "the change must be counted before this is dropped"]
pub(crate) struct Change<'a> {
    account: &'a Account,
    promised: QuotaUsage,
    /// Names were made, moved or taken.
    names: bool,
    _gate: Gate<'a>,
}

impl Change<'_> {
    /// The files that were promised have been made.
    pub(crate) fn made_inodes(&mut self) {
        let made = QuotaUsage {
            bytes: 0,
            inodes: self.promised.inodes,
        };
        let mut ledger = self.account.ledger.lock();
        ledger.promised.subtract(made);
        ledger.used.add(made);
        self.promised.inodes = 0;
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut ledger = self.account.ledger.lock();
        ledger.promised.subtract(self.promised);
        if self.names {
            ledger.changes += 1;
        }
    }
}
