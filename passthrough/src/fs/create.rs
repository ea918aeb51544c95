//! Making and removing names.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, OpenOptions};
use fuse_backend_rs::api::filesystem::{Context, Entry};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::thread::CapabilitySet;

use super::PassthroughFs;
use super::path::FdText;
use crate::credentials::{ActingAs, Umask};
use crate::handle::Handle;
use crate::inode::Inode;
use crate::name::Name;
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
        Ok(Creation {
            _umask: Umask::set(umask)?,
            _acting: ActingAs::user(ctx.uid, ctx.gid, extras.group, keep)?,
        })
    }

    /// The directory `id`, for a change of its contents.
    fn directory_to_change(&self, id: u64) -> io::Result<Arc<Inode>> {
        self.writable()?;
        let directory = self.inode(id)?;
        if directory.is_directory() {
            Ok(directory)
        } else {
            Err(errno(libc::ENOTDIR))
        }
    }

    /// Answers a request that has just made `name`.
    fn created(&self, parent: &Inode, name: Name<'_>, extras: &CreateExtras<'_>) -> io::Result<Entry> {
        let (inode, seen) = self.find_child(parent, name)?;
        if let Err(error) = self.label(&inode, extras.labels) {
            self.inodes.forget(inode.id(), 1);
            return Err(error);
        }
        Ok(self.entry(Some(parent), &inode, &seen))
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
        let creation = self.begin(ctx, extras, umask, keep)?;
        let permissions = Mode::from_raw_mode(mode & 0o7777);
        rustix::fs::mknodat(
            parent.as_fd(),
            name.as_c_str(),
            file_type,
            permissions,
            u64::from(rdev),
        )?;
        drop(creation);
        self.created(&parent, name, extras)
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
        let creation = self.begin(ctx, extras, umask, CapabilitySet::empty())?;
        rustix::fs::mkdirat(
            parent.as_fd(),
            name.as_c_str(),
            Mode::from_raw_mode(mode & 0o7777),
        )?;
        drop(creation);
        self.created(&parent, name, extras)
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
        let creation = self.begin(ctx, extras, 0, CapabilitySet::empty())?;
        rustix::fs::symlinkat(target, parent.as_fd(), name.as_c_str())?;
        drop(creation);
        self.created(&parent, name, extras)
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
        match self.create_new(ctx, &parent, name, args, extras) {
            Ok(file) => {
                let (inode, seen) = self.adopt(self.proc.reopen(file.as_fd(), OFlags::PATH)?)?;
                if let Err(error) = self.label(&inode, extras.labels) {
                    self.inodes.forget(inode.id(), 1);
                    return Err(error);
                }
                let entry = self.entry(None, &inode, &seen);
                let handle = self.handles.insert(Handle::file(inode.id(), file));
                Ok((entry, handle, self.open_options(args.flags)))
            }
            Err(error)
                if error.raw_os_error() == Some(libc::EEXIST) && args.flags & libc::O_EXCL as u32 == 0 =>
            {
                let (inode, seen) = self.find_child(&parent, name)?;
                let kill = args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                match self.open_node(&inode, args.flags, kill) {
                    Ok((handle, options)) => Ok((self.entry(Some(&parent), &inode, &seen), handle, options)),
                    Err(error) => {
                        self.inodes.forget(inode.id(), 1);
                        Err(error)
                    }
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Always with O_EXCL, so that nothing that exists is ever opened under the caller's identity.
    fn create_new(
        &self,
        ctx: &Context,
        parent: &Inode,
        name: Name<'_>,
        args: &CreateIn,
        extras: &CreateExtras<'_>,
    ) -> io::Result<OwnedFd> {
        let flags = self.open_flags(args.flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let _creation = self.begin(ctx, extras, args.umask, CapabilitySet::empty())?;
        let mode = Mode::from_raw_mode(args.mode & 0o7777);
        Ok(rustix::fs::openat(parent.as_fd(), name.as_c_str(), flags, mode)?)
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
        let creation = self.begin(ctx, extras, umask, CapabilitySet::empty())?;
        let file = rustix::fs::openat(
            parent.as_fd(),
            c".",
            host_flags,
            Mode::from_raw_mode(mode & 0o7777),
        )?;
        drop(creation);
        let (inode, seen) = self.adopt(self.proc.reopen(file.as_fd(), OFlags::PATH)?)?;
        if let Err(error) = self.label(&inode, extras.labels) {
            self.inodes.forget(inode.id(), 1);
            return Err(error);
        }
        let entry = self.entry(None, &inode, &seen);
        let handle = self.handles.insert(Handle::file(inode.id(), file));
        Ok((entry, handle, self.open_options(flags)))
    }

    /// UNLINK and RMDIR.
    pub(super) fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        let parent = self.directory_to_change(parent)?;
        Ok(rustix::fs::unlinkat(
            parent.as_fd(),
            Name::new(name)?.as_c_str(),
            flags,
        )?)
    }

    /// RENAME and RENAME2, with the `RENAME_*` flags that Linux knows.
    pub(super) fn move_name(&self, from: (u64, &CStr), to: (u64, &CStr), flags: u32) -> io::Result<()> {
        let source = self.directory_to_change(from.0)?;
        let target = self.directory_to_change(to.0)?;
        let flags = RenameFlags::from_bits(flags)
            .filter(|flags| RenameFlags::all().contains(*flags))
            .ok_or_else(|| errno(libc::EINVAL))?;
        let (old, new) = (Name::new(from.1)?, Name::new(to.1)?);
        Ok(rustix::fs::renameat_with(
            source.as_fd(),
            old.as_c_str(),
            target.as_fd(),
            new.as_c_str(),
            flags,
        )?)
    }

    /// LINK: one more name for the file of node `inode`.
    pub(super) fn add_link(&self, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.directory_to_change(parent)?;
        let node = self.inode(inode)?;
        let name = Name::new(name)?;
        let text = FdText::number(node.as_fd())?;
        // The link in /proc is followed, and only that: it leads to the file itself, be that a symbolic link.
        rustix::fs::linkat(
            self.proc.directory(),
            text.as_c_str(),
            parent.as_fd(),
            name.as_c_str(),
            AtFlags::SYMLINK_FOLLOW,
        )?;
        let (inode, seen) = self.find_child(&parent, name)?;
        Ok(self.entry(Some(&parent), &inode, &seen))
    }
}
