//! The file system interface, all but READ.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    ZeroCopyReader, ZeroCopyWriter,
};

use super::{HeldChunks, RafsFs, ReadOutcome};
use crate::dir;
use crate::error::Damaged;
use crate::inode::{BLOCK_SIZE, Inode, Kind};

/// An image never changes: guests may believe an answer for ever (the time does not fit 32 bits of seconds).
pub const FOREVER: Duration = Duration::from_secs(1 << 32);

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

fn entry(inode: &Inode) -> Entry {
    Entry {
        inode: inode.id,
        generation: 0,
        attr: inode.stat(),
        attr_flags: 0,
        attr_timeout: FOREVER,
        entry_timeout: FOREVER,
    }
}

/// There is no such name, and there never will be.
fn negative_entry() -> Entry {
    Entry {
        entry_timeout: FOREVER,
        attr_timeout: FOREVER,
        ..Entry::default()
    }
}

/// The callback of a directory listing failed, or the image did.
enum ListError {
    Damaged(Damaged),
    Callback(io::Error),
}

impl From<Damaged> for ListError {
    fn from(damaged: Damaged) -> Self {
        ListError::Damaged(damaged)
    }
}

impl RafsFs {
    fn inode(&self, id: u64) -> io::Result<Inode> {
        self.image().inode(id).map_err(|damaged| self.report(damaged))
    }

    fn directory(&self, id: u64) -> io::Result<Inode> {
        let inode = self.inode(id)?;
        if inode.kind == Kind::Directory {
            Ok(inode)
        } else {
            Err(errno(libc::ENOTDIR))
        }
    }

    fn list<'a>(
        &'a self,
        dir: &Inode,
        cookie: u64,
        visit: &mut dyn FnMut(dir::Entry<'a>) -> io::Result<bool>,
    ) -> io::Result<()> {
        self.image()
            .list(dir, cookie, &mut |entry| {
                visit(entry).map_err(ListError::Callback)
            })
            .map_err(|error| match error {
                ListError::Damaged(damaged) => self.report(damaged),
                ListError::Callback(error) => error,
            })
    }
}

fn dir_entry<'a>(entry: &dir::Entry<'a>) -> DirEntry<'a> {
    let kind = entry.kind.map_or(u32::from(libc::DT_UNKNOWN), Kind::dirent_type);
    DirEntry {
        ino: entry.id,
        offset: entry.next,
        type_: kind,
        name: entry.name,
    }
}

fn read_only<T>() -> io::Result<T> {
    Err(errno(libc::EROFS))
}

impl FileSystem for RafsFs {
    type Inode = u64;
    type Handle = u64;

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.directory(parent)?;
        if name.count_bytes() > crate::layout::MAX_NAME {
            return Err(errno(libc::ENAMETOOLONG));
        }
        let found = self
            .image()
            .lookup(&parent, name.to_bytes())
            .map_err(|d| self.report(d))?;
        Ok(found.as_ref().map_or_else(negative_entry, entry))
    }

    fn forget(&self, _ctx: &Context, _inode: u64, _count: u64) {}

    fn batch_forget(&self, _ctx: &Context, _requests: Vec<(u64, u64)>) {}

    fn getattr(&self, _ctx: &Context, inode: u64, _handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        Ok((self.inode(inode)?.stat(), FOREVER))
    }

    fn readlink(&self, _ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let inode = self.inode(inode)?;
        if inode.kind != Kind::Symlink {
            return Err(errno(libc::EINVAL));
        }
        self.image().symlink_target(&inode).map_err(|d| self.report(d))
    }

    fn open(
        &self,
        _ctx: &Context,
        inode: u64,
        flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let writes = libc::O_TRUNC | libc::O_APPEND | libc::O_CREAT;
        let access = flags as i32 & libc::O_ACCMODE;
        if access != libc::O_RDONLY || flags as i32 & writes != 0 {
            return read_only();
        }
        match self.inode(inode)?.kind {
            Kind::Directory => Err(errno(libc::EISDIR)),
            Kind::Symlink => Err(errno(libc::ELOOP)),
            _ => Ok((None, OpenOptions::KEEP_CACHE, None)),
        }
    }

    fn opendir(&self, _ctx: &Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.directory(inode)?;
        Ok((None, OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        inode: u64,
        _handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let dir = self.directory(inode)?;
        self.list(&dir, offset, &mut |entry| Ok(add_entry(dir_entry(&entry))? != 0))
    }

    /// An entry whose inode is damaged is listed with inode 0, which tells the guest to look it up by itself, and
    /// get the error, if it wants to know more.
    fn readdirplus(
        &self,
        _ctx: &Context,
        inode: u64,
        _handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let dir = self.directory(inode)?;
        self.list(&dir, offset, &mut |listed| {
            let attributes = match self.image().resolve(&dir, &listed) {
                Ok(inode) => entry(&inode),
                Err(damaged) => {
                    let _ = self.report(damaged);
                    Entry::default()
                }
            };
            Ok(add_entry(dir_entry(&listed), attributes)? != 0)
        })
    }

    fn getxattr(&self, _ctx: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let inode = self.inode(inode)?;
        if !self.options.xattr {
            return Err(errno(libc::ENODATA));
        }
        for xattr in self.image().xattrs(&inode).map_err(|d| self.report(d))? {
            let xattr = xattr.map_err(|d| self.report(d))?;
            if !xattr.is_called(name.to_bytes()) {
                continue;
            }
            return match size as usize {
                0 => Ok(GetxattrReply::Count(xattr.value.len() as u32)),
                size if size < xattr.value.len() => Err(errno(libc::ERANGE)),
                _ => Ok(GetxattrReply::Value(xattr.value.to_vec())),
            };
        }
        Err(errno(libc::ENODATA))
    }

    fn listxattr(&self, _ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let inode = self.inode(inode)?;
        let mut names = Vec::new();
        if self.options.xattr {
            for xattr in self.image().xattrs(&inode).map_err(|d| self.report(d))? {
                names.extend(xattr.map_err(|d| self.report(d))?.name());
                names.push(0);
            }
        }
        match size as usize {
            0 => Ok(ListxattrReply::Count(names.len() as u32)),
            size if size < names.len() => Err(errno(libc::ERANGE)),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    /// Sizes are those of the uncompressed views and the bootstrap; nothing is free.
    fn statfs(&self, _ctx: &Context, _inode: u64) -> io::Result<statvfs64> {
        let superblock = self.superblock();
        let data: u64 = superblock
            .blobs
            .iter()
            .map(|blob| blob.uncompressed_size.div_ceil(BLOCK_SIZE.into()))
            .fold(0, u64::saturating_add);
        let blocks = data.saturating_add(self.image().bootstrap.size().div_ceil(BLOCK_SIZE.into()));
        // The only way to a zeroed structure that needs no unsafe code is the trait's own default.
        let mut stat = Nothing.statfs(&Context::default(), 0)?;
        stat.f_bsize = BLOCK_SIZE.into();
        stat.f_frsize = BLOCK_SIZE.into();
        stat.f_blocks = blocks;
        stat.f_files = superblock.inodes;
        stat.f_namemax = crate::layout::MAX_NAME as u64;
        stat.f_flag = libc::ST_RDONLY;
        Ok(stat)
    }

    /// Guests check permissions themselves (virtio-fs always mounts with `default_permissions`); what is left is that
    /// nothing can be written.
    fn access(&self, _ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        let inode = self.inode(inode)?;
        let stored = matches!(inode.kind, Kind::File | Kind::Directory | Kind::Symlink);
        if mask as i32 & libc::W_OK != 0 && stored {
            read_only()
        } else {
            Ok(())
        }
    }

    /// Images store holes as data, so a file is one piece of data with the hole behind its end.
    fn lseek(&self, _ctx: &Context, inode: u64, _handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let inode = self.inode(inode)?;
        let inside = offset < inode.size;
        match (i32::try_from(whence), inside) {
            (Ok(libc::SEEK_DATA), true) => Ok(offset),
            (Ok(libc::SEEK_HOLE), true) => Ok(inode.size),
            (Ok(libc::SEEK_DATA | libc::SEEK_HOLE), false) => Err(errno(libc::ENXIO)),
            _ => Err(errno(libc::EINVAL)),
        }
    }

    /// Reads what is resident; EAGAIN if something is absent. A device calls [`RafsFs::read`] instead.
    fn read(
        &self,
        _ctx: &Context,
        inode: u64,
        _handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        match RafsFs::read(self, inode, offset, size, &HeldChunks::default(), w)? {
            ReadOutcome::Done(written) => Ok(written),
            ReadOutcome::Absent(_) => Err(errno(libc::EAGAIN)),
        }
    }

    fn flush(&self, _ctx: &Context, _inode: u64, _handle: u64, _lock_owner: u64) -> io::Result<()> {
        Ok(())
    }

    fn fsync(&self, _ctx: &Context, _inode: u64, _datasync: bool, _handle: u64) -> io::Result<()> {
        Ok(())
    }

    fn fsyncdir(&self, _ctx: &Context, _inode: u64, _datasync: bool, _handle: u64) -> io::Result<()> {
        Ok(())
    }

    fn release(
        &self,
        _ctx: &Context,
        _inode: u64,
        _flags: u32,
        _handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn releasedir(&self, _ctx: &Context, _inode: u64, _flags: u32, _handle: u64) -> io::Result<()> {
        Ok(())
    }

    // Everything that changes something. ENOSYS, the default, would make guests give the operation up for the
    // whole connection.

    fn setattr(
        &self,
        _ctx: &Context,
        _inode: u64,
        _attr: stat64,
        _handle: Option<u64>,
        _valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        read_only()
    }

    fn symlink(&self, _ctx: &Context, _target: &CStr, _parent: u64, _name: &CStr) -> io::Result<Entry> {
        read_only()
    }

    fn mknod(
        &self,
        _ctx: &Context,
        _parent: u64,
        _name: &CStr,
        _mode: u32,
        _rdev: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        read_only()
    }

    fn mkdir(
        &self,
        _ctx: &Context,
        _parent: u64,
        _name: &CStr,
        _mode: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        read_only()
    }

    fn unlink(&self, _ctx: &Context, _parent: u64, _name: &CStr) -> io::Result<()> {
        read_only()
    }

    fn rmdir(&self, _ctx: &Context, _parent: u64, _name: &CStr) -> io::Result<()> {
        read_only()
    }

    fn rename(
        &self,
        _ctx: &Context,
        _dir: u64,
        _name: &CStr,
        _new_dir: u64,
        _new_name: &CStr,
        _flags: u32,
    ) -> io::Result<()> {
        read_only()
    }

    fn link(&self, _ctx: &Context, _inode: u64, _parent: u64, _name: &CStr) -> io::Result<Entry> {
        read_only()
    }

    fn create(
        &self,
        _ctx: &Context,
        _parent: u64,
        _name: &CStr,
        _args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        read_only()
    }

    fn write(
        &self,
        _ctx: &Context,
        _inode: u64,
        _handle: u64,
        _r: &mut dyn ZeroCopyReader,
        _size: u32,
        _offset: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        _flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<usize> {
        read_only()
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        _inode: u64,
        _handle: u64,
        _mode: u32,
        _offset: u64,
        _length: u64,
    ) -> io::Result<()> {
        read_only()
    }

    fn setxattr(
        &self,
        _ctx: &Context,
        _inode: u64,
        _name: &CStr,
        _value: &[u8],
        _flags: u32,
    ) -> io::Result<()> {
        read_only()
    }

    fn removexattr(&self, _ctx: &Context, _inode: u64, _name: &CStr) -> io::Result<()> {
        read_only()
    }
}

/// A file system that answers by the trait's defaults.
struct Nothing;

impl FileSystem for Nothing {
    type Inode = u64;
    type Handle = u64;
}
