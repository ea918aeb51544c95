//! Making files.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions};
use fuse_backend_rs::api::filesystem::{Context, Entry};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::thread::CapabilitySet;

use super::PassthroughFs;
use super::usage::{made_inodes, settle};
use crate::credentials::{ActingAs, Umask};
use crate::handle::Handle;
use crate::inode::{Inode, Permit};
use crate::name::Name;
use crate::quota::Change;
use crate::sys::errno;

/// What a request that creates something may carry beyond its operation's own arguments.
#[derive(Clone, Copy, Debug, Default)]
pub struct CreateExtras<'a> {
    /// The group of the parent directory, if it is among the caller's supplementary groups
    /// (`FUSE_EXT_GROUPS`, sent when FUSE_CREATE_SUPP_GROUP was settled).
    pub group: Option<u32>,
    /// Names and values of security labels for the new file (`fuse_secctx`, sent when FUSE_SECURITY_CTX was settled).
    pub labels: &'a [(&'a CStr, &'a [u8])],
}

/// Identity, umask and permission of a call that creates something; all of it ends with the value.
struct Creation {
    _umask: Umask,
    _acting: ActingAs,
}

impl PassthroughFs {
    /// Everything that a creating call needs before it is made.
    fn begin(
        &self,
        ctx: &Context,
        extras: &CreateExtras<'_>,
        umask: u32,
        keep: CapabilitySet,
    ) -> io::Result<Creation> {
        // The guest's kernel has decided that the caller may create here, by groups and capabilities that we are not
        // told of.
        let keep = keep | CapabilitySet::DAC_OVERRIDE;
        let (uid, gid) = (
            self.ids.users.to_host(ctx.uid)?,
            self.ids.groups.to_host(ctx.gid)?,
        );
        let group = extras.group.map(|id| self.ids.groups.to_host(id)).transpose()?;
        Ok(Creation {
            _umask: Umask::set(umask)?,
            _acting: ActingAs::user(uid, gid, group, keep)?,
        })
    }

    /// The directory `id`, for a change of its contents.
    pub(super) fn directory_to_change(&self, id: u64) -> io::Result<Arc<Inode>> {
        self.writable()?;
        let directory = self.inode(id)?;
        if directory.is_directory() {
            Ok(directory)
        } else {
            Err(errno(libc::ENOTDIR))
        }
    }

    /// Answers a request that has just made `name` in `directory`, which is the node `parent`.
    fn created(
        &self,
        parent: &Inode,
        directory: BorrowedFd<'_>,
        name: Name<'_>,
        extras: &CreateExtras<'_>,
        change: &Option<Change<'_>>,
    ) -> io::Result<Entry> {
        let (inode, seen) = self.find_child(directory, name)?;
        if let Err(error) = self.label(&inode, extras.labels) {
            self.forget_node(inode.id(), 1);
            // Nobody may find the file without its labels.
            let kind = if inode.is_directory() {
                AtFlags::REMOVEDIR
            } else {
                AtFlags::empty()
            };
            self.take_back(change, directory, name, kind)?;
            return Err(error);
        }
        if change.is_some() {
            self.count_new(change, &inode, inode.fd()?.as_fd(), true)?;
        }
        Ok(self.entry(Some(parent), &inode, &seen))
    }

    /// Answers a request that has just made the file that `file` has open.
    fn created_open(
        &self,
        file: OwnedFd,
        permit: Permit,
        flags: u32,
        extras: &CreateExtras<'_>,
        change: &Option<Change<'_>>,
        named: bool,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        let (inode, seen) = self.adopt(self.proc.reopen(file.as_fd(), OFlags::PATH)?)?;
        let charge = self
            .label(&inode, extras.labels)
            .and_then(|()| self.count_new(change, &inode, file.as_fd(), named))
            .inspect_err(|_| self.forget_node(inode.id(), 1))?;
        let entry = self.entry(None, &inode, &seen);
        let handle = self
            .handles
            .insert(Handle::file(inode.id(), file, permit, charge));
        Ok((entry, handle, self.open_options(flags)))
    }

    /// MKNOD: a regular file, fifo, socket or device node; `rdev` counts for device nodes only.
    ///
    /// # Errors
    ///
    /// EINVAL for other types, EROFS, and what the host's `mknodat` says.
    #[allow(clippy::too_many_arguments)]
    pub fn mknod_with(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extras: &CreateExtras<'_>,
    ) -> io::Result<Entry> {
        let parent = self.directory_to_change(parent)?;
        let name = Name::new(name)?;
        let (file_type, keep) = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => (FileType::RegularFile, CapabilitySet::empty()),
            libc::S_IFIFO => (FileType::Fifo, CapabilitySet::empty()),
            libc::S_IFSOCK => (FileType::Socket, CapabilitySet::empty()),
            libc::S_IFCHR => (FileType::CharacterDevice, CapabilitySet::MKNOD),
            libc::S_IFBLK => (FileType::BlockDevice, CapabilitySet::MKNOD),
            _ => return Err(errno(libc::EINVAL)),
        };
        let directory = parent.fd()?;
        let mut change = self.change_names_of(&parent, 1, 1)?;
        let grown = self.charge_in(&change, &parent)?;
        let creation = self.begin(ctx, extras, umask, keep)?;
        let permissions = Mode::from_raw_mode(mode & 0o7777);
        rustix::fs::mknodat(
            &directory,
            name.as_c_str(),
            file_type,
            permissions,
            u64::from(rdev),
        )?;
        drop(creation);
        made_inodes(&mut change);
        settle(&change, &grown, directory.as_fd());
        self.created(&parent, directory.as_fd(), name, extras, &change)
    }

    /// MKDIR.
    ///
    /// # Errors
    ///
    /// EROFS, and what the host's `mkdirat` says.
    pub fn mkdir_with(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extras: &CreateExtras<'_>,
    ) -> io::Result<Entry> {
        let parent = self.directory_to_change(parent)?;
        let name = Name::new(name)?;
        let directory = parent.fd()?;
        let mut change = self.change_names_of(&parent, 1, 2)?;
        let grown = self.charge_in(&change, &parent)?;
        let creation = self.begin(ctx, extras, umask, CapabilitySet::empty())?;
        rustix::fs::mkdirat(&directory, name.as_c_str(), Mode::from_raw_mode(mode & 0o7777))?;
        drop(creation);
        made_inodes(&mut change);
        settle(&change, &grown, directory.as_fd());
        self.created(&parent, directory.as_fd(), name, extras, &change)
    }

    /// SYMLINK: `name` leads to `target`, which is kept as it is and never looked at.
    ///
    /// # Errors
    ///
    /// EROFS, and what the host's `symlinkat` says.
    pub fn symlink_with(
        &self,
        ctx: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
        extras: &CreateExtras<'_>,
    ) -> io::Result<Entry> {
        let parent = self.directory_to_change(parent)?;
        let name = Name::new(name)?;
        let directory = parent.fd()?;
        let mut change = self.change_names_of(&parent, 1, 2)?;
        let grown = self.charge_in(&change, &parent)?;
        let creation = self.begin(ctx, extras, 0, CapabilitySet::empty())?;
        rustix::fs::symlinkat(target, &directory, name.as_c_str())?;
        drop(creation);
        made_inodes(&mut change);
        settle(&change, &grown, directory.as_fd());
        self.created(&parent, directory.as_fd(), name, extras, &change)
    }

    /// CREATE: makes `name` as a regular file and opens it; without O_EXCL, opens the file that is already there.
    ///
    /// # Errors
    ///
    /// EEXIST with O_EXCL, EROFS, and what the host's `openat` says.
    pub fn create_with(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: &CreateIn,
        extras: &CreateExtras<'_>,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        let parent = self.directory_to_change(parent)?;
        let name = Name::new(name)?;
        let may_exist = args.flags & libc::O_EXCL as u32 == 0;
        let mut change = match self.change_names_of(&parent, 1, 1) {
            // There is no room for a new file, but perhaps no need of one.
            Err(full) if may_exist => {
                let existing = self.open_existing(ctx, &parent, name, args);
                return existing.map_err(|error| match error.raw_os_error() {
                    Some(libc::ENOENT) => full,
                    _ => error,
                });
            }
            other => other?,
        };
        let directory = parent.fd()?;
        let grown = self.charge_in(&change, &parent)?;
        let permit = self.budget.take()?;
        match self.create_new(ctx, directory.as_fd(), name, args, extras) {
            Ok(file) => {
                made_inodes(&mut change);
                settle(&change, &grown, directory.as_fd());
                self.created_open(file, permit, args.flags, extras, &change, true)
                    .inspect_err(|_| {
                        // Nobody may find a file whose making has failed.
                        self.take_back(&change, directory.as_fd(), name, AtFlags::empty())
                            .ok();
                    })
            }
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && may_exist => {
                drop((permit, change));
                self.open_existing(ctx, &parent, name, args)
            }
            Err(error) => Err(error),
        }
    }

    /// CREATE of what is there.
    fn open_existing(
        &self,
        ctx: &Context,
        parent: &Arc<Inode>,
        name: Name<'_>,
        args: &CreateIn,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        let (inode, seen) = self.find_child(parent.fd()?.as_fd(), name)?;
        let kill = self.open_kills_privileges(ctx, args.fuse_flags);
        let (handle, options) = self
            .open_node(&inode, args.flags, kill)
            .inspect_err(|_| self.forget_node(inode.id(), 1))?;
        Ok((self.entry(Some(parent), &inode, &seen), handle, options))
    }

    /// Always with O_EXCL, so that nothing that exists is ever opened under the caller's identity.
    fn create_new(
        &self,
        ctx: &Context,
        directory: BorrowedFd<'_>,
        name: Name<'_>,
        args: &CreateIn,
        extras: &CreateExtras<'_>,
    ) -> io::Result<OwnedFd> {
        let flags = self.open_flags(args.flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let _creation = self.begin(ctx, extras, args.umask, CapabilitySet::empty())?;
        let mode = Mode::from_raw_mode(args.mode & 0o7777);
        Ok(rustix::fs::openat(directory, name.as_c_str(), flags, mode)?)
    }

    /// FUSE_TMPFILE: makes a file without a name in `parent` and opens it; LINK can give it a name unless `flags` holds
    /// O_EXCL.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP if the host's file system has no such files, EROFS, and what the host's `openat` says.
    pub fn tmpfile(
        &self,
        ctx: &Context,
        parent: u64,
        flags: u32,
        mode: u32,
        umask: u32,
        extras: &CreateExtras<'_>,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        let parent = self.directory_to_change(parent)?;
        let mut host_flags = self.open_flags(flags) | OFlags::TMPFILE;
        if flags & libc::O_EXCL as u32 != 0 {
            host_flags |= OFlags::EXCL;
        }
        let directory = parent.fd()?;
        let permit = self.budget.take()?;
        let mut change = self.change_names_of(&parent, 1, 0)?;
        let creation = self.begin(ctx, extras, umask, CapabilitySet::empty())?;
        let file = rustix::fs::openat(&directory, c".", host_flags, Mode::from_raw_mode(mode & 0o7777))?;
        drop(creation);
        made_inodes(&mut change);
        self.created_open(file, permit, flags, extras, &change, false)
    }
}
