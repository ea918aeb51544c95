//! From a name to a node, and what is told about it.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{ATTR_SUBMOUNT, FsOptions};
use fuse_backend_rs::api::filesystem::Entry;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};

use super::PassthroughFs;
use crate::inode::{Inode, Key, ROOT};
use crate::name::Name;
use crate::sys::errno;

/// `STATX_MNT_ID_UNIQUE` (Linux 6.8): mount ids that are never used twice.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What one `statx` said about a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen(pub(crate) Statx);

impl Seen {
    const MASK: StatxFlags = StatxFlags::BASIC_STATS
        .union(StatxFlags::BTIME)
        .union(StatxFlags::MNT_ID)
        .union(MNT_ID_UNIQUE);

    /// The file behind `fd`.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Seen(rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, Self::MASK)?))
    }

    /// The file that `name` is now.
    pub(crate) fn at(directory: BorrowedFd<'_>, name: Name<'_>) -> io::Result<Self> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        Ok(Seen(rustix::fs::statx(
            directory,
            name.as_c_str(),
            flags,
            Self::MASK,
        )?))
    }

    /// Which file this is; `None` if the kernel does not tell mounts apart (before Linux 5.8).
    pub(crate) fn key(&self) -> Option<Key> {
        let told = self.0.stx_mask & (StatxFlags::MNT_ID | MNT_ID_UNIQUE).bits() != 0;
        told.then(|| Key {
            mount: self.0.stx_mnt_id,
            device: self.device(),
            ino: self.0.stx_ino,
        })
    }

    pub(super) fn device(&self) -> u64 {
        rustix::fs::makedev(self.0.stx_dev_major, self.0.stx_dev_minor)
    }

    pub(crate) fn file_type(&self) -> u32 {
        u32::from(self.0.stx_mode) & libc::S_IFMT
    }
}

/// Opens `name` as a descriptor that can only be used to stand for the file.
pub(super) fn open_path(directory: BorrowedFd<'_>, name: Name<'_>) -> io::Result<OwnedFd> {
    // The name is one component already; RESOLVE_BENEATH would stop a longer one at the directory it starts from.
    Ok(rustix::fs::openat2(
        directory,
        name.as_c_str(),
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )?)
}

impl PassthroughFs {
    /// The node of `name` in `parent`, with one more lookup, and what it looks like.
    pub(super) fn find_child(
        &self,
        parent: BorrowedFd<'_>,
        name: Name<'_>,
    ) -> io::Result<(Arc<Inode>, Seen)> {
        let seen = Seen::at(parent, name)?;
        if let Some(inode) = seen.key().and_then(|key| self.inodes.find(&key)) {
            return Ok((inode, seen));
        }
        // Only what has been opened is certain to stay the same file.
        self.adopt(open_path(parent, name)?)
    }

    /// The node of the file behind the O_PATH descriptor `fd`, with one more lookup, and what it looks like.
    pub(super) fn adopt(&self, fd: OwnedFd) -> io::Result<(Arc<Inode>, Seen)> {
        let seen = Seen::of(fd.as_fd())?;
        let key = seen.key().ok_or_else(|| errno(libc::EOPNOTSUPP))?;
        Ok((
            self.inodes.adopt(fd, key, seen.file_type(), seen.0.stx_nlink)?,
            seen,
        ))
    }

    /// The answer to whatever looked `inode` up. `parent` is absent where it does not matter: for files, and for the
    /// root.
    pub(super) fn entry(&self, parent: Option<&Inode>, inode: &Inode, seen: &Seen) -> Entry {
        let mounted = parent.is_some_and(|parent| parent.key().mount != inode.key().mount);
        let announced = self.options.announce_submounts && self.has(FsOptions::SUBMOUNTS);
        Entry {
            inode: inode.id(),
            generation: inode.generation(),
            attr: self.stat_of(seen),
            attr_flags: if mounted && inode.is_directory() && announced {
                ATTR_SUBMOUNT
            } else {
                0
            },
            attr_timeout: self.options.cache.attr_timeout(),
            entry_timeout: self.options.cache.entry_timeout(),
        }
    }

    /// LOOKUP. `.` is the directory itself and `..` of the root is the root; `..` of any other directory is refused,
    /// since the host may have moved that directory out of the share.
    pub(super) fn lookup_name(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.inode(parent)?;
        if !parent.is_directory() {
            return Err(errno(libc::ENOTDIR));
        }
        let itself = match name.to_bytes() {
            b"." => true,
            b".." => parent.id() == ROOT,
            _ => false,
        };
        if itself {
            let (inode, seen) = self.adopt(self.proc.reopen(parent.fd()?.as_fd(), OFlags::PATH)?)?;
            return Ok(self.entry(None, &inode, &seen));
        }
        let (inode, seen) = self.find_child(parent.fd()?.as_fd(), Name::new(name)?)?;
        Ok(self.entry(Some(&parent), &inode, &seen))
    }
}
