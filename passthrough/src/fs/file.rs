//! Open files: their data, their space, and what else a descriptor offers.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{FOPEN_IN_KILL_SUIDGID, FsOptions, OpenOptions, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{Context, ZeroCopyReader, ZeroCopyWriter};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};

use super::PassthroughFs;
use super::usage::settle;
use crate::credentials::WithoutFsetid;
use crate::handle::Handle;
use crate::inode::Inode;
use crate::quota::Filling;
use crate::sys::{Transfer, errno};

/// Most bytes that one COPY_FILE_RANGE copies. A guest may ask for 2^64 and is content with less; a worker, and a
/// queue that is to stop, should not be held up for longer than such a copy takes.
const COPY_MAX: u64 = 64 << 20;

/// Modes of FALLOCATE that give space back, or move it.
const TAKES_NO_SPACE: FallocateFlags = FallocateFlags::PUNCH_HOLE
    .union(FallocateFlags::COLLAPSE_RANGE)
    .union(FallocateFlags::INSERT_RANGE);

/// Flags of a guest's open that the host's open gets. The rest is decided here or has been decided by the guest's
/// kernel: creation and type flags, O_NONBLOCK, O_ASYNC, and O_APPEND, which is honoured write by write.
const HONOURED: OFlags = OFlags::RWMODE
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);

impl PassthroughFs {
    /// What the host's open gets of the flags of a guest's.
    pub(super) fn open_flags(&self, flags: u32) -> OFlags {
        let asked = OFlags::from_bits_retain(flags);
        let mut flags = asked & HONOURED | OFlags::CLOEXEC;
        if self.options.allow_direct_io {
            flags |= asked & OFlags::DIRECT;
        }
        if self.has(FsOptions::WRITEBACK_CACHE) && flags & OFlags::RWMODE == OFlags::WRONLY {
            // The guest completes pages that it has written part of, which takes reading.
            flags = (flags - OFlags::RWMODE) | OFlags::RDWR;
        }
        flags
    }

    /// What the guest is told of its cache when it opens a file.
    pub(super) fn open_options(&self, flags: u32) -> OpenOptions {
        let direct = self.options.cache.bypasses_page_cache()
            || self.options.allow_direct_io && flags & libc::O_DIRECT as u32 != 0;
        if direct {
            OpenOptions::DIRECT_IO
        } else if self.options.cache.keeps_data() {
            OpenOptions::KEEP_CACHE
        } else {
            OpenOptions::empty()
        }
    }

    /// Whether an open that truncates costs a file its set-id bits: if the request says so, or, from a guest that clears
    /// them itself (no HANDLE_KILLPRIV_V2), for every user but 0. Such a guest leaves this one case to the device, since it
    /// sends no request of its own for the truncation.
    pub(super) fn open_kills_privileges(&self, ctx: &Context, fuse_flags: u32) -> bool {
        let told = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        told || ctx.uid != 0 && !self.has(FsOptions::HANDLE_KILLPRIV_V2)
    }

    /// Opens a node for real. Only regular files are: a guest's kernel opens special files itself, so whoever asks for
    /// one here must not get the host's device.
    pub(super) fn open_node(
        &self,
        node: &Arc<Inode>,
        flags: u32,
        kill_privileges: bool,
    ) -> io::Result<(u64, OpenOptions)> {
        if node.is_directory() {
            return Err(errno(libc::EISDIR));
        }
        if node.is_symlink() {
            return Err(errno(libc::ELOOP));
        }
        if !node.is_regular() {
            return Err(errno(libc::ENXIO));
        }
        let host_flags = self.open_flags(flags);
        if host_flags & OFlags::RWMODE != OFlags::RDONLY || host_flags.contains(OFlags::TRUNC) {
            self.writable()?;
        }
        if host_flags.contains(OFlags::TRUNC) {
            self.end_capability_of(node)?;
        }
        let _guard = WithoutFsetid::when(kill_privileges && host_flags.contains(OFlags::TRUNC))?;
        let permit = self.budget.take()?;
        let fd = node.fd()?;
        let truncates = host_flags.contains(OFlags::TRUNC);
        let change = truncates.then(|| self.change_of(node)).flatten();
        let charge = self.charge_of(node, fd.as_fd())?;
        let file = match self.proc.reopen(fd.as_fd(), host_flags) {
            // A file that may only be appended to can only be opened that way.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) && flags & libc::O_APPEND as u32 != 0 => {
                self.proc.reopen(fd.as_fd(), host_flags | OFlags::APPEND)?
            }
            other => other?,
        };
        settle(&change, &charge, file.as_fd());
        Ok((
            self.handles.insert(Handle::file(node.id(), file, permit, charge)),
            self.open_options(flags),
        ))
    }

    /// READ, straight into the guest's buffers.
    pub(super) fn read_data(
        &self,
        inode: u64,
        handle: u64,
        into: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        let handle = self.handles.get_file(handle, inode)?;
        into.write_from(&mut Transfer::new(handle.as_fd(), 0), size as usize, offset)
    }

    /// WRITE, straight from the guest's buffers.
    ///
    /// `flags` are those of the guest's open file at this moment. O_APPEND, O_SYNC and O_DSYNC among them are passed on
    /// with this one write, never set on the descriptor, which other requests are using.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn write_data(
        &self,
        inode: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.writable()?;
        let handle = self.handles.get_file(handle, inode)?;
        let asked = OFlags::from_bits_retain(flags);
        let mut per_write = 0;
        // A delayed write comes from the guest's page cache, which knows where it belongs.
        if asked.contains(OFlags::APPEND) && !delayed && !self.has(FsOptions::WRITEBACK_CACHE) {
            per_write |= libc::RWF_APPEND;
        }
        if asked.contains(OFlags::SYNC) {
            per_write |= libc::RWF_SYNC;
        } else if asked.contains(OFlags::DSYNC) {
            per_write |= libc::RWF_DSYNC;
        }
        self.end_capability(handle.as_fd())?;
        let _guard = WithoutFsetid::when(fuse_flags & WRITE_KILL_PRIV != 0)?;
        let file = handle.as_fd();
        let Some(charge) = &handle.charge else {
            return from.read_to(&mut Transfer::new(file, per_write), size as usize, offset);
        };
        let at = (per_write & libc::RWF_APPEND == 0).then_some(offset);
        // Part of a page that the guest has collected is not worth writing: the guest could not tell which.
        let filling = if delayed {
            Filling::Write
        } else {
            Filling::WritePart
        };
        let (change, fits) = charge.account().change_data(file, at, u64::from(size), filling)?;
        let written = from.read_to(&mut Transfer::new(file, per_write), fits as usize, offset);
        charge.settle(&change, file);
        written
    }

    /// FLUSH, sent at each close: reports what closing a descriptor would, such as a write that failed later.
    pub(super) fn flush_handle(&self, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        let handle = self.handles.get_file(handle, inode)?;
        self.locks.drop_owner(inode, lock_owner);
        drop(rustix::io::dup(handle.as_fd())?);
        Ok(())
    }

    /// RELEASE.
    pub(super) fn close_file(&self, inode: u64, handle: u64) -> io::Result<()> {
        let closed = self.handles.remove(handle, inode)?;
        self.locks.drop_handle(inode, handle);
        let charge = closed.charge.clone();
        drop(closed);
        self.locks.handle_closed();
        // Hosts give space ahead of data, and take back at the end what was not used.
        if charge.is_some()
            && let Ok(node) = self.inode(inode)
            && let Ok(fd) = node.fd()
        {
            settle(&self.change_of(&node), &charge, fd.as_fd());
        }
        Ok(())
    }

    /// FSYNC.
    pub(super) fn sync_handle(&self, inode: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let handle = self.handles.get_any(handle, inode)?;
        let sync = if data_only {
            rustix::fs::fdatasync(handle.as_fd())
        } else {
            rustix::fs::fsync(handle.as_fd())
        };
        if let Some(charge) = &handle.charge {
            charge.settle(&charge.account().change(), handle.as_fd());
        }
        Ok(sync?)
    }

    /// FALLOCATE, all modes that the host's file system knows.
    pub(super) fn allocate(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.writable()?;
        let handle = self.handles.get_file(handle, inode)?;
        // The request does not say whether the caller may keep set-id bits; user 0 may.
        self.end_capability(handle.as_fd())?;
        let _guard = WithoutFsetid::when(ctx.uid != 0)?;
        let (file, mode) = (handle.as_fd(), FallocateFlags::from_bits_retain(mode));
        let Some(charge) = &handle.charge else {
            return Ok(rustix::fs::fallocate(file, mode, offset, length)?);
        };
        let account = charge.account();
        let change = match mode.intersects(TAKES_NO_SPACE) {
            true => account.change(),
            false => {
                account
                    .change_data(file, Some(offset), length, Filling::Allocate)?
                    .0
            }
        };
        let allocated = rustix::fs::fallocate(file, mode, offset, length);
        charge.settle(&change, file);
        Ok(allocated?)
    }

    /// LSEEK, which a guest sends for SEEK_DATA and SEEK_HOLE.
    pub(super) fn seek(&self, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let handle = self.handles.get_file(handle, inode)?;
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_SET) => SeekFrom::Start(offset),
            Ok(libc::SEEK_END) => SeekFrom::End(offset as i64),
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            // The position of a descriptor that requests share means nothing.
            _ => return Err(errno(libc::EINVAL)),
        };
        Ok(rustix::fs::seek(handle.as_fd(), position)?)
    }

    /// COPY_FILE_RANGE between two open files of this mount; returns the number of bytes copied.
    ///
    /// # Errors
    ///
    /// EBADF for handles that are not open on their nodes, EINVAL for flags, EROFS, and what the host's
    /// `copy_file_range` says.
    pub fn copy_file_range(
        &self,
        ctx: &Context,
        (inode_in, handle_in, offset_in): (u64, u64, u64),
        (inode_out, handle_out, offset_out): (u64, u64, u64),
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        self.writable()?;
        if flags != 0 {
            return Err(errno(libc::EINVAL));
        }
        let source = self.handles.get_file(handle_in, inode_in)?;
        let target = self.handles.get_file(handle_out, inode_out)?;
        let (mut offset_in, mut offset_out) = (offset_in, offset_out);
        let mut length = length.min(COPY_MAX);
        self.end_capability(target.as_fd())?;
        let _guard = WithoutFsetid::when(ctx.uid != 0)?;
        let mut change = None;
        if let Some(charge) = &target.charge {
            let size = u64::try_from(rustix::fs::fstat(source.as_fd())?.st_size).unwrap_or(0);
            length = length.min(size.saturating_sub(offset_in));
            let (begun, fits) =
                charge
                    .account()
                    .change_data(target.as_fd(), Some(offset_out), length, Filling::WritePart)?;
            (change, length) = (Some(begun), fits);
        }
        let copied = rustix::fs::copy_file_range(
            source.as_fd(),
            Some(&mut offset_in),
            target.as_fd(),
            Some(&mut offset_out),
            length as usize,
        );
        settle(&change, &target.charge, target.as_fd());
        Ok(copied?)
    }
}
