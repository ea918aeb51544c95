//! Attributes: what a file looks like, and changing it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{SetattrValid, stat64};
use fuse_backend_rs::api::filesystem::Context;
use rustix::fs::{
    Access, AtFlags, Gid, Mode, OFlags, Stat, StatxTimestamp, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
    Uid,
};
use rustix::thread::CapabilitySet;

use super::PassthroughFs;
use super::lookup::Seen;
use super::usage::settle;
use crate::credentials::{ActingAs, WithoutFsetid};
use crate::inode::Inode;
use crate::proc::FdText;
use crate::sys::{empty_stat, errno};

/// Permission, set-id and sticky bits.
const MODE_BITS: u32 = 0o7777;

/// A point in time as `statx` tells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timestamp {
    /// Seconds since 1970, before it if negative.
    pub seconds: i64,
    /// 0..=999,999,999.
    pub nanoseconds: u32,
}

impl From<StatxTimestamp> for Timestamp {
    fn from(time: StatxTimestamp) -> Self {
        Timestamp {
            seconds: time.tv_sec,
            nanoseconds: time.tv_nsec,
        }
    }
}

/// The answer to FUSE_STATX: the fields of `struct fuse_statx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statx {
    /// `STATX_*` bits of the fields that hold something.
    pub mask: u32,
    /// Preferred size of a transfer, in bytes.
    pub blksize: u32,
    /// `STATX_ATTR_*` bits that are set.
    pub attributes: u64,
    /// `STATX_ATTR_*` bits that the host's file system knows.
    pub attributes_mask: u64,
    /// Number of hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Type and permission bits.
    pub mode: u16,
    /// Inode number, folded as in every other answer.
    pub ino: u64,
    /// Length in bytes.
    pub size: u64,
    /// Space taken, in units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Creation.
    pub btime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Last change of the data.
    pub mtime: Timestamp,
    /// Device number of a device node.
    pub rdev: (u32, u32),
}

impl PassthroughFs {
    /// What the guest is told of a file that `statx` described.
    pub(super) fn stat_of(&self, seen: &Seen) -> stat64 {
        let from = &seen.0;
        let mut stat = empty_stat();
        stat.st_dev = seen.device();
        stat.st_ino = self.numbers.fold(seen.device(), from.stx_ino);
        stat.st_mode = u32::from(from.stx_mode);
        stat.st_nlink = from.stx_nlink as _;
        stat.st_uid = self.ids.users.to_guest(from.stx_uid);
        stat.st_gid = self.ids.groups.to_guest(from.stx_gid);
        stat.st_rdev = rustix::fs::makedev(from.stx_rdev_major, from.stx_rdev_minor);
        stat.st_size = from.stx_size as i64;
        stat.st_blksize = from.stx_blksize as _;
        stat.st_blocks = from.stx_blocks as i64;
        stat.st_atime = from.stx_atime.tv_sec;
        stat.st_atime_nsec = i64::from(from.stx_atime.tv_nsec);
        stat.st_mtime = from.stx_mtime.tv_sec;
        stat.st_mtime_nsec = i64::from(from.stx_mtime.tv_nsec);
        stat.st_ctime = from.stx_ctime.tv_sec;
        stat.st_ctime_nsec = i64::from(from.stx_ctime.tv_nsec);
        stat
    }

    /// What the guest is told of a file that `fstat`, the quicker call, described.
    // The kernel's struct has other integer types on other architectures.
    #[allow(clippy::unnecessary_cast)]
    fn stat_of_fd(&self, fd: BorrowedFd<'_>) -> io::Result<stat64> {
        let from: Stat = rustix::fs::fstat(fd)?;
        let mut stat = empty_stat();
        stat.st_dev = from.st_dev as u64;
        stat.st_ino = self.numbers.fold(from.st_dev as u64, from.st_ino as u64);
        stat.st_mode = from.st_mode as u32;
        stat.st_nlink = from.st_nlink as _;
        stat.st_uid = self.ids.users.to_guest(from.st_uid);
        stat.st_gid = self.ids.groups.to_guest(from.st_gid);
        stat.st_rdev = from.st_rdev as u64;
        stat.st_size = from.st_size as i64;
        stat.st_blksize = from.st_blksize as _;
        stat.st_blocks = from.st_blocks as i64;
        stat.st_atime = from.st_atime as i64;
        stat.st_atime_nsec = from.st_atime_nsec as i64;
        stat.st_mtime = from.st_mtime as i64;
        stat.st_mtime_nsec = from.st_mtime_nsec as i64;
        stat.st_ctime = from.st_ctime as i64;
        stat.st_ctime_nsec = from.st_ctime_nsec as i64;
        Ok(stat)
    }

    /// GETATTR.
    pub(super) fn attributes(&self, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        let stat = match handle {
            Some(handle) => self.stat_of_fd(self.handles.get_any(handle, inode)?.as_fd())?,
            None => self.stat_of_fd(self.inode(inode)?.fd()?.as_fd())?,
        };
        Ok((stat, self.options.cache.attr_timeout()))
    }

    /// FUSE_STATX: attributes with the time of birth and the `STATX_ATTR_*` bits.
    ///
    /// # Errors
    ///
    /// ESTALE for an unknown node, EBADF for a handle that is not open on it, else what the host's `statx` says.
    pub fn statx(&self, _: &Context, inode: u64, handle: Option<u64>) -> io::Result<(Statx, Duration)> {
        let seen = match handle {
            Some(handle) => Seen::of(self.handles.get_any(handle, inode)?.as_fd())?,
            None => Seen::of(self.inode(inode)?.fd()?.as_fd())?,
        };
        let from = &seen.0;
        // Mount ids and mount roots of the host mean nothing to the guest, which has mounts of its own.
        let shown = rustix::fs::StatxFlags::BASIC_STATS | rustix::fs::StatxFlags::BTIME;
        let hidden = rustix::fs::StatxAttributes::MOUNT_ROOT;
        let statx = Statx {
            mask: from.stx_mask & shown.bits(),
            blksize: from.stx_blksize,
            attributes: (from.stx_attributes - hidden).bits(),
            attributes_mask: (from.stx_attributes_mask - hidden).bits(),
            nlink: from.stx_nlink,
            uid: self.ids.users.to_guest(from.stx_uid),
            gid: self.ids.groups.to_guest(from.stx_gid),
            mode: from.stx_mode,
            ino: self.numbers.fold(seen.device(), from.stx_ino),
            size: from.stx_size,
            blocks: from.stx_blocks,
            atime: from.stx_atime.into(),
            btime: from.stx_btime.into(),
            ctime: from.stx_ctime.into(),
            mtime: from.stx_mtime.into(),
            rdev: (from.stx_rdev_major, from.stx_rdev_minor),
        };
        Ok((statx, self.options.cache.attr_timeout()))
    }

    /// SETATTR. Ownership comes before mode, because a change of owner clears set-id bits that the mode may set again.
    pub(super) fn change_attributes(
        &self,
        inode: u64,
        attr: &stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.writable()?;
        let node = self.inode(inode)?;
        let handle = handle
            .map(|handle| self.handles.get_any(handle, inode))
            .transpose()?;
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let owner = valid.contains(SetattrValid::UID).then_some(attr.st_uid);
            let group = valid.contains(SetattrValid::GID).then_some(attr.st_gid);
            // -1 means "leave alone" to the host and nobody to the guest.
            if owner == Some(u32::MAX) || group == Some(u32::MAX) {
                return Err(errno(libc::EINVAL));
            }
            let owner = owner
                .map(|id| self.ids.users.to_host(id))
                .transpose()?
                .map(Uid::from_raw);
            let group = group
                .map(|id| self.ids.groups.to_host(id))
                .transpose()?
                .map(Gid::from_raw);
            self.end_capability_of(&node)?;
            rustix::fs::chownat(&node.fd()?, c"", owner, group, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::MODE) {
            self.change_mode(&node, attr.st_mode & MODE_BITS)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(attr.st_size).map_err(|_| errno(libc::EINVAL))?;
            self.end_capability_of(&node)?;
            let _guard = WithoutFsetid::when(valid.contains(SetattrValid::KILL_SUIDGID))?;
            let change = self.change_of(&node);
            let charge = self.charge_in(&change, &node)?;
            let truncated = match &handle {
                Some(handle) => rustix::fs::ftruncate(handle.as_fd(), size).map_err(Into::into),
                None => self.truncate(&node, size),
            };
            settle(&change, &charge, node.fd()?.as_fd());
            truncated?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let access = (SetattrValid::ATIME, SetattrValid::ATIME_NOW);
            let modification = (SetattrValid::MTIME, SetattrValid::MTIME_NOW);
            let times = Timestamps {
                last_access: time(valid, access, attr.st_atime, attr.st_atime_nsec)?,
                last_modification: time(valid, modification, attr.st_mtime, attr.st_mtime_nsec)?,
            };
            rustix::fs::utimensat(&node.fd()?, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        Ok((
            self.stat_of_fd(node.fd()?.as_fd())?,
            self.options.cache.attr_timeout(),
        ))
    }

    /// ACCESS: whether the caller may use the file in the way of `mask` (`R_OK`, `W_OK`, `X_OK`, by owner, group and
    /// others alone). A guest that checks permissions itself never asks.
    pub(super) fn may_access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        let node = self.inode(inode)?;
        let access = Access::from_bits(mask).ok_or_else(|| errno(libc::EINVAL))?;
        if access.contains(Access::WRITE_OK) {
            self.writable()?;
        }
        if node.is_symlink() {
            return Ok(());
        }
        let fd = node.fd()?;
        let text = FdText::number(fd.as_fd())?;
        let (uid, gid) = (
            self.ids.users.to_host(ctx.uid)?,
            self.ids.groups.to_host(ctx.gid)?,
        );
        let _acting = ActingAs::user(uid, gid, None, CapabilitySet::empty())?;
        Ok(rustix::fs::accessat(
            self.proc.directory(),
            text.as_c_str(),
            access,
            AtFlags::EACCESS,
        )?)
    }

    /// Sets permission bits. A symbolic link has none: EOPNOTSUPP, as from a local kernel.
    pub(super) fn change_mode(&self, node: &Arc<Inode>, mode: u32) -> io::Result<()> {
        if node.is_symlink() {
            return Err(errno(libc::EOPNOTSUPP));
        }
        let fd = node.fd()?;
        let text = FdText::number(fd.as_fd())?;
        let mode = Mode::from_raw_mode(mode);
        Ok(rustix::fs::chmodat(
            self.proc.directory(),
            text.as_c_str(),
            mode,
            AtFlags::empty(),
        )?)
    }

    fn truncate(&self, node: &Arc<Inode>, size: u64) -> io::Result<()> {
        if node.is_directory() {
            return Err(errno(libc::EISDIR));
        }
        if !node.is_regular() {
            return Err(errno(libc::EINVAL));
        }
        let file = self
            .proc
            .reopen(node.fd()?.as_fd(), OFlags::WRONLY | OFlags::NONBLOCK)?;
        Ok(rustix::fs::ftruncate(file, size)?)
    }
}

/// One of the two times of a SETATTR: now, a given time, or left alone.
fn time(
    valid: SetattrValid,
    (set, now): (SetattrValid, SetattrValid),
    seconds: i64,
    nanoseconds: i64,
) -> io::Result<Timespec> {
    if valid.contains(now) {
        Ok(Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        })
    } else if !valid.contains(set) {
        Ok(Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        })
    } else if (0..1_000_000_000).contains(&nanoseconds) {
        // The values that mean NOW and OMIT to the host lie outside this range.
        Ok(Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        })
    } else {
        Err(errno(libc::EINVAL))
    }
}
