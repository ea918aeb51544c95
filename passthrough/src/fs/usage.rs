//! Counting what the guest takes of the host's disk, where that is limited.
//!
//! Each function does nothing, at the cost of one comparison, on a mount without a quota and for files on other mounts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::AtFlags;

use super::PassthroughFs;
use super::lookup::{Seen, open_path};
use crate::inode::{Inode, Key};
use crate::name::Name;
use crate::quota::{Account, Change, Charge};

impl PassthroughFs {
    /// The account that files on the mount of `key` are counted by.
    fn account_of(&self, key: &Key) -> Option<&Arc<Account>> {
        self.account.as_ref().filter(|account| account.counts(key))
    }

    /// Begins a change of the file of `node` that takes no space.
    pub(super) fn change_of(&self, node: &Inode) -> Option<Change<'_>> {
        self.account_of(node.key()).map(|account| account.change())
    }

    /// Begins a change of the names in `directory` that makes `inodes` new files and takes `blocks` of the disk at most.
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(super) fn change_names_of(
        &self,
        directory: &Inode,
        inodes: u64,
        blocks: u64,
    ) -> io::Result<Option<Change<'_>>> {
        self.account_of(directory.key())
            .map(|account| account.change_names(inodes, blocks))
            .transpose()
    }

    /// Begins a change that stores `bytes` beside the file of `node`.
    ///
    /// # Errors
    ///
    /// ENOSPC.
    pub(super) fn change_beside(&self, node: &Inode, bytes: usize) -> io::Result<Option<Change<'_>>> {
        self.account_of(node.key())
            .map(|account| account.change_beside(bytes as u64))
            .transpose()
    }

    /// What is counted for the file of `node`, which `file` stands for.
    pub(super) fn charge_of(&self, node: &Inode, file: BorrowedFd<'_>) -> io::Result<Option<Arc<Charge>>> {
        match self.account_of(node.key()) {
            None => Ok(None),
            Some(account) => account.charge(node.key(), file),
        }
    }

    /// What is counted for the file of `node`, if a change of it is to be counted.
    pub(super) fn charge_in(
        &self,
        change: &Option<Change<'_>>,
        node: &Arc<Inode>,
    ) -> io::Result<Option<Arc<Charge>>> {
        match change {
            None => Ok(None),
            Some(_) => self.charge_of(node, node.fd()?.as_fd()),
        }
    }

    /// Counts what is new: the file of `node`, which `change` has made.
    pub(super) fn count_new(
        &self,
        change: &Option<Change<'_>>,
        node: &Inode,
        file: BorrowedFd<'_>,
        named: bool,
    ) -> io::Result<Option<Arc<Charge>>> {
        let (Some(change), Some(account)) = (change, self.account_of(node.key())) else {
            return Ok(None);
        };
        let charge = account.charge_new(change, node.key(), file, named)?;
        if let Some(charge) = charge.as_ref().filter(|charge| charge.is_nameless()) {
            self.keep_nameless(node.id(), charge.clone());
        }
        Ok(charge)
    }

    /// Counts a file without a name for as long as the guest knows the node.
    fn keep_nameless(&self, id: u64, charge: Arc<Charge>) {
        self.nameless.keep(id, charge, || self.inodes.get(id).is_some());
    }

    /// What is counted for the file that `name` is now, to be looked at again by [`Self::count_removed`].
    pub(super) fn charge_of_name(
        &self,
        change: &Option<Change<'_>>,
        directory: BorrowedFd<'_>,
        name: Name<'_>,
    ) -> Option<Removal> {
        change.as_ref()?;
        let file = open_path(directory, name).ok()?;
        let key = Seen::of(file.as_fd()).ok()?.key()?;
        let charge = self.account_of(&key)?.charge(&key, file.as_fd()).ok()??;
        Some(Removal { file, key, charge })
    }

    /// Counts a file that may have lost a name. If it has none left, it is counted for as long as the guest can reach it.
    pub(super) fn count_removed(&self, change: &Option<Change<'_>>, removed: Option<Removal>) {
        let (Some(change), Some(removed)) = (change, removed) else {
            return;
        };
        removed.charge.settle(change, removed.file.as_fd());
        if removed.charge.is_nameless()
            && let Some(node) = self.inodes.peek(&removed.key)
        {
            self.keep_nameless(node.id(), removed.charge);
        }
    }

    /// Takes a name away that this change has given, since what should have followed has failed.
    pub(super) fn take_back(
        &self,
        change: &Option<Change<'_>>,
        directory: BorrowedFd<'_>,
        name: Name<'_>,
        kind: AtFlags,
    ) -> io::Result<()> {
        let removed = self.charge_of_name(change, directory, name);
        let taken = rustix::fs::unlinkat(directory, name.as_c_str(), kind);
        self.count_removed(change, removed);
        Ok(taken?)
    }

    /// Shows what is limited in what STATFS tells of `node`.
    pub(super) fn limit_statfs(&self, node: &Inode, shown: &mut libc::statvfs64) {
        if let Some(account) = self.account_of(node.key()) {
            account.limit_statfs(shown);
        }
    }

    /// FORGET.
    pub(super) fn forget_node(&self, id: u64, count: u64) {
        if self.inodes.forget(id, count) && self.account.is_some() {
            self.nameless.let_go(id);
        }
    }
}

/// A file that may be about to lose a name.
pub(super) struct Removal {
    file: std::os::fd::OwnedFd,
    key: Key,
    charge: Arc<Charge>,
}

/// Counts the file behind `file`, if it is counted.
pub(super) fn settle(change: &Option<Change<'_>>, charge: &Option<Arc<Charge>>, file: BorrowedFd<'_>) {
    if let (Some(change), Some(charge)) = (change, charge) {
        charge.settle(change, file);
    }
}

/// The files for which `change` was promised room have been made.
pub(super) fn made_inodes(change: &mut Option<Change<'_>>) {
    if let Some(change) = change {
        change.made_inodes();
    }
}
