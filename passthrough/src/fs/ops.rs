//! The operations as the `FileSystem` trait names them: each hands on to the room that knows it.
//!
//! One rule is kept here for all: no answer is ENOSYS, which a Linux guest takes as "never ask again" for the whole
//! connection, of which this mount is but a part.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, SetattrValid, stat64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileLock, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
    ZeroCopyWriter,
};
use rustix::fs::AtFlags;

use super::{CreateExtras, PassthroughFs};
use crate::sys::{empty_statvfs, errno};

/// Events that are always due on a regular file (`DEFAULT_POLLMASK`).
const ALWAYS_READY: u32 = (libc::POLLIN | libc::POLLOUT | libc::POLLRDNORM | libc::POLLWRNORM) as u32;

fn answer<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSYS) => errno(libc::EOPNOTSUPP),
        _ => error,
    })
}

impl FileSystem for PassthroughFs {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        Ok(self.negotiate(capable))
    }

    fn destroy(&self) {
        self.reset();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        answer(self.lookup_name(parent, name))
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.forget_node(inode, count);
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.forget_node(inode, count);
        }
    }

    fn getattr(&self, _: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        answer(self.attributes(inode, handle))
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        answer(self.change_attributes(inode, &attr, handle, valid))
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let node = self.inode(inode)?;
        if !node.is_symlink() {
            return Err(errno(libc::EINVAL));
        }
        answer(rustix::fs::readlinkat(&node.fd()?, c"", Vec::new()).map_err(io::Error::from))
            .map(|to| to.into_bytes())
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        answer(self.symlink_with(ctx, target, parent, name, &CreateExtras::default()))
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        answer(self.mknod_with(ctx, parent, name, mode, rdev, umask, &CreateExtras::default()))
    }

    fn mkdir(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, umask: u32) -> io::Result<Entry> {
        answer(self.mkdir_with(ctx, parent, name, mode, umask, &CreateExtras::default()))
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        answer(self.remove(parent, name, AtFlags::empty()))
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        answer(self.remove(parent, name, AtFlags::REMOVEDIR))
    }

    fn rename(
        &self,
        _: &Context,
        from: u64,
        old_name: &CStr,
        to: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        answer(self.move_name((from, old_name), (to, new_name), flags))
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        answer(self.add_link(inode, parent, name))
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let node = self.inode(inode)?;
        let kills = self.open_kills_privileges(ctx, fuse_flags);
        let (handle, options) = answer(self.open_node(&node, flags, kills))?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let (entry, handle, options) =
            answer(self.create_with(ctx, parent, name, &args, &CreateExtras::default()))?;
        Ok((entry, Some(handle), options, None))
    }

    fn read(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        answer(self.read_data(inode, handle, w, size, offset))
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        answer(self.write_data(inode, handle, r, size, offset, delayed_write, flags, fuse_flags))
    }

    fn flush(&self, _: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        answer(self.flush_handle(inode, handle, lock_owner))
    }

    fn fsync(&self, _: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        answer(self.sync_handle(inode, handle, datasync))
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        answer(self.allocate(ctx, inode, handle, mode, offset, length))
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.close_file(inode, handle)
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<libc::statvfs64> {
        let node = self.inode(inode)?;
        let from = answer(rustix::fs::fstatvfs(&node.fd()?).map_err(io::Error::from))?;
        let mut to = empty_statvfs();
        to.f_bsize = from.f_bsize as _;
        to.f_frsize = from.f_frsize as _;
        to.f_blocks = from.f_blocks;
        to.f_bfree = from.f_bfree;
        to.f_bavail = from.f_bavail;
        to.f_files = from.f_files;
        to.f_ffree = from.f_ffree;
        to.f_favail = from.f_favail;
        to.f_fsid = from.f_fsid as _;
        to.f_namemax = from.f_namemax as _;
        self.limit_statfs(&node, &mut to);
        Ok(to)
    }

    fn setxattr(&self, _: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        answer(self.setxattr_with(inode, name, value, flags, false))
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        answer(self.get_xattr(inode, name, size))
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        answer(self.list_xattr(inode, size))
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        answer(self.remove_xattr(inode, name))
    }

    fn opendir(&self, _: &Context, inode: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = answer(self.open_directory_node(inode))?;
        Ok((Some(handle), options))
    }

    fn readdir(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        answer(self.read_directory(inode, handle, offset, add_entry))
    }

    fn readdirplus(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        _: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        answer(self.read_directory_plus(inode, handle, offset, add_entry))
    }

    fn fsyncdir(&self, _: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        answer(self.sync_handle(inode, handle, datasync))
    }

    fn releasedir(&self, _: &Context, inode: u64, _: u32, handle: u64) -> io::Result<()> {
        self.handles.remove(handle, inode).map(drop)
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        answer(self.may_access(ctx, inode, mask))
    }

    fn lseek(&self, _: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        answer(self.seek(inode, handle, offset, whence))
    }

    fn getlk(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<FileLock> {
        answer(self.get_lock(inode, handle, owner, lock, flags))
    }

    fn setlk(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<()> {
        answer(self.set_lock(inode, handle, owner, lock, flags))
    }

    fn setlkw(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<()> {
        answer(self.set_lock_blocking(inode, handle, owner, lock, flags))
    }

    fn bmap(&self, _: &Context, _: u64, _: u64, _: u32) -> io::Result<u64> {
        Err(errno(libc::EOPNOTSUPP))
    }

    fn poll(&self, _: &Context, _: u64, _: u64, _: u64, _: u32, events: u32) -> io::Result<u32> {
        Ok(events & ALWAYS_READY)
    }
}
