//! Names of files that exist: giving, moving and taking them.
//!
//! A file that loses its last name stays whole for whoever knows it, as on a disk. The daemon may hold no descriptor of
//! such a file, and its handle would be worth nothing once the host has freed it; so before a name goes, the node that
//! it names, if the guest knows it, is pinned.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::Entry;
use rustix::fs::{AtFlags, RenameFlags};

use super::PassthroughFs;
use super::lookup::Seen;
use super::usage::{made_inodes, settle};
use crate::config::InodeFiles;
use crate::inode::Inode;
use crate::name::Name;
use crate::proc::FdText;
use crate::sys::errno;

impl PassthroughFs {
    /// Pins what `name` is, if it is about to lose its last name. Returns the node to unpin if it does not.
    ///
    /// Should the host swap names in between, another file is pinned, until it is forgotten, and this one is lost to the
    /// guest with its name.
    fn pin_nameless(&self, directory: BorrowedFd<'_>, name: Name<'_>) -> Option<Arc<Inode>> {
        if self.options.inode_files == InodeFiles::Descriptors {
            return None;
        }
        let seen = Seen::at(directory, name).ok()?;
        if seen.file_type() != libc::S_IFDIR && seen.0.stx_nlink > 1 {
            return None;
        }
        self.inodes.peek(&seen.key()?).filter(Inode::pin)
    }

    /// UNLINK and RMDIR.
    pub(super) fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        let parent = self.directory_to_change(parent)?;
        let name = Name::new(name)?;
        let directory = parent.fd()?;
        let change = self.change_names_of(&parent, 0, 0)?;
        let shrunk = self.charge_in(&change, &parent)?;
        let counted = self.charge_of_name(&change, directory.as_fd(), name);
        let pinned = self.pin_nameless(directory.as_fd(), name);
        let removed = rustix::fs::unlinkat(&directory, name.as_c_str(), flags);
        unpin_unless(removed.is_ok(), pinned);
        self.count_removed(&change, counted);
        settle(&change, &shrunk, directory.as_fd());
        Ok(removed?)
    }

    /// RENAME and RENAME2, with the `RENAME_*` flags that Linux knows.
    pub(super) fn move_name(&self, from: (u64, &CStr), to: (u64, &CStr), flags: u32) -> io::Result<()> {
        let source = self.directory_to_change(from.0)?;
        let target = self.directory_to_change(to.0)?;
        let flags = RenameFlags::from_bits(flags)
            .filter(|flags| RenameFlags::all().contains(*flags))
            .ok_or_else(|| errno(libc::EINVAL))?;
        let (old, new) = (Name::new(from.1)?, Name::new(to.1)?);
        // Moving a name is a way out of a full disk; a whiteout is a new file.
        let whiteouts = u64::from(flags.contains(RenameFlags::WHITEOUT));
        let mut change = self.change_names_of(&source, whiteouts, 0)?;
        let charges = [
            self.charge_in(&change, &source)?,
            self.charge_in(&change, &target)?,
        ];
        let (source, target) = (source.fd()?, target.fd()?);
        let replaces = !flags.intersects(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE);
        let pinned = replaces.then(|| self.pin_nameless(target.as_fd(), new)).flatten();
        let counted = replaces
            .then(|| self.charge_of_name(&change, target.as_fd(), new))
            .flatten();
        let moved = rustix::fs::renameat_with(&source, old.as_c_str(), &target, new.as_c_str(), flags);
        unpin_unless(moved.is_ok(), pinned);
        if moved.is_ok() {
            made_inodes(&mut change);
        }
        self.count_removed(&change, counted);
        for (charge, directory) in charges.iter().zip([&source, &target]) {
            settle(&change, charge, directory.as_fd());
        }
        Ok(moved?)
    }

    /// LINK: one more name for the file of node `inode`.
    pub(super) fn add_link(&self, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.directory_to_change(parent)?;
        let node = self.inode(inode)?;
        let name = Name::new(name)?;
        let (directory, file) = (parent.fd()?, node.fd()?);
        let change = self.change_names_of(&parent, 0, 1)?;
        let charges = [self.charge_in(&change, &parent)?, self.charge_in(&change, &node)?];
        let text = FdText::number(file.as_fd())?;
        // The link in /proc is followed, and only that: it leads to the file itself, be that a symbolic link.
        let follow = AtFlags::SYMLINK_FOLLOW;
        rustix::fs::linkat(
            self.proc.directory(),
            text.as_c_str(),
            &directory,
            name.as_c_str(),
            follow,
        )?;
        for (charge, counted) in charges.iter().zip([&directory, &file]) {
            settle(&change, charge, counted.as_fd());
        }
        let (inode, seen) = self.find_child(directory.as_fd(), name)?;
        Ok(self.entry(Some(&parent), &inode, &seen))
    }
}

fn unpin_unless(gone: bool, pinned: Option<Arc<Inode>>) {
    if let Some(inode) = pinned.filter(|_| !gone) {
        inode.unpin();
    }
}
