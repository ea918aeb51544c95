//! File systems without files: every question has an answer, made up from its arguments. They hold the device to what it
//! promises them: names that are names, handles on files only, no more room than the guest gave.

use std::ffi::CStr;
use std::io;
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions, stat64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, SetattrValid,
    ZeroCopyReader, ZeroCopyWriter,
};
use passthrough::CreateExtras;
use rafs::fs::{Absent, HeldChunks, ReadOutcome};
use rafsd::mounts::{CopyEnd, Fetched, HostFs, ImageFs};

/// Local ids below this are directories, so that both kinds come up often.
const DIRECTORIES: u64 = 8;
/// The most that one request may read or write, in bytes.
const LARGEST: usize = 8 << 20;

fn stat(inode: u64) -> stat64 {
    let mut stat = Entry::default().attr;
    stat.st_ino = inode;
    stat.st_nlink = 1;
    stat.st_size = 4096;
    stat.st_mode = match inode {
        0..DIRECTORIES => libc::S_IFDIR | 0o755,
        _ => libc::S_IFREG | 0o644,
    };
    stat
}

fn entry(inode: u64) -> Entry {
    Entry {
        inode,
        attr: stat(inode),
        entry_timeout: Duration::from_secs(1),
        attr_timeout: Duration::from_secs(1),
        ..Entry::default()
    }
}

fn errno(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// What every name must be that gets as far as a file system.
fn check(name: &CStr) -> u64 {
    let bytes = name.to_bytes();
    assert!(
        (1..=255).contains(&bytes.len()),
        "a name of {} bytes",
        bytes.len()
    );
    assert!(
        !bytes.contains(&b'/') && bytes != b"." && bytes != b"..",
        "the name {name:?}"
    );
    bytes
        .iter()
        .fold(1, |id, byte| (id * 31 + u64::from(*byte)) % 64 + 1)
}

fn check_attribute(name: &CStr) {
    let length = name.to_bytes().len();
    assert!(
        (1..=255).contains(&length),
        "an attribute's name of {length} bytes"
    );
}

fn list(
    inode: u64,
    size: u32,
    offset: u64,
    add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
) -> io::Result<()> {
    for position in offset..offset.saturating_add(40).min(100) {
        let name = &b"an entry with a name that is not so short as others"[..(position as usize % 50) + 1];
        let child = position % 64 + 1;
        let listed = DirEntry {
            ino: inode,
            offset: position + 1,
            type_: 4,
            name,
        };
        let taken = add(listed, entry(child))?;
        assert!(taken <= size as usize);
        if taken == 0 {
            break;
        }
    }
    Ok(())
}

/// A tree of the host. Its inode 13 knows no operation, and all fails on its inode 17.
pub(crate) struct NullHost;

/// What `inode` answers in place of its question.
fn mood(inode: u64) -> io::Result<()> {
    match inode {
        13 => Err(errno(libc::ENOSYS)),
        17 => Err(errno(9999)),
        _ => Ok(()),
    }
}

impl FileSystem for NullHost {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        Ok(capable)
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let id = check(name);
        mood(parent)?;
        match name.to_bytes() {
            b"none" => Err(errno(libc::ENOENT)),
            b"absent" => Ok(entry(0)),
            // A local id that is too large for the device.
            b"large" => Ok(entry(1 << 40)),
            _ => Ok(entry(id)),
        }
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        mood(inode)?;
        Ok((stat(inode), Duration::from_secs(1)))
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        mut attr: stat64,
        _: Option<u64>,
        _: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        mood(inode)?;
        attr.st_ino = inode;
        Ok((attr, Duration::MAX))
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        mood(inode)?;
        Ok(vec![b't'; inode as usize % 4096])
    }

    fn symlink(&self, _: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        assert!((1..4096).contains(&target.to_bytes().len()));
        self.lookup(&Context::default(), parent, name)
    }

    fn mknod(&self, c: &Context, parent: u64, name: &CStr, _: u32, _: u32, _: u32) -> io::Result<Entry> {
        self.lookup(c, parent, name)
    }

    fn mkdir(&self, c: &Context, parent: u64, name: &CStr, _: u32, _: u32) -> io::Result<Entry> {
        self.lookup(c, parent, name)
    }

    fn unlink(&self, c: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.lookup(c, parent, name).map(drop)
    }

    fn rmdir(&self, c: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.lookup(c, parent, name).map(drop)
    }

    fn rename(&self, c: &Context, from: u64, name: &CStr, _: u64, new_name: &CStr, _: u32) -> io::Result<()> {
        check(new_name);
        self.lookup(c, from, name).map(drop)
    }

    fn link(&self, c: &Context, _: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.lookup(c, parent, name)
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        mood(inode)?;
        Ok((Some(u64::from(flags)), OpenOptions::empty(), None))
    }

    fn create(
        &self,
        c: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let found = self.lookup(c, parent, name)?;
        Ok((found, Some(u64::from(args.flags)), OpenOptions::empty(), None))
    }

    fn read(
        &self,
        _: &Context,
        inode: u64,
        _: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        mood(inode)?;
        let room = w.available_bytes();
        assert!(
            room <= size as usize && room <= LARGEST,
            "{room} bytes of room for {size}"
        );
        let wanted = room.min(offset as usize % 10_000);
        let written = w.write(&vec![7; wanted])?;
        assert_eq!(written, wanted);
        // An error behind data that was written already.
        if offset == 666 {
            Err(errno(libc::EIO))
        } else {
            Ok(written)
        }
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        _: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        _: u64,
        _: Option<u64>,
        _: bool,
        _: u32,
        _: u32,
    ) -> io::Result<usize> {
        mood(inode)?;
        let mut data = Vec::new();
        r.read_to_end(&mut data)?;
        assert_eq!(data.len(), size as usize);
        Ok(data.len())
    }

    fn flush(&self, _: &Context, inode: u64, _: u64, _: u64) -> io::Result<()> {
        mood(inode)
    }

    fn fsync(&self, _: &Context, inode: u64, _: bool, _: u64) -> io::Result<()> {
        mood(inode)
    }

    fn fallocate(&self, _: &Context, inode: u64, _: u64, _: u32, _: u64, _: u64) -> io::Result<()> {
        mood(inode)
    }

    fn setxattr(&self, _: &Context, inode: u64, name: &CStr, value: &[u8], _: u32) -> io::Result<()> {
        check_attribute(name);
        assert!(value.len() <= 65536);
        mood(inode)
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        check_attribute(name);
        mood(inode)?;
        Ok(match size {
            0 => GetxattrReply::Count(77),
            // Too much, where the guest has no room: the device must notice.
            _ => GetxattrReply::Value(vec![b'v'; inode as usize * 10]),
        })
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        mood(inode)?;
        Ok(match size {
            0 => ListxattrReply::Count(12),
            _ => ListxattrReply::Names(b"user.a\0user.b\0".repeat(inode as usize)),
        })
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        check_attribute(name);
        mood(inode)
    }

    fn readdir(
        &self,
        _: &Context,
        inode: u64,
        _: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        mood(inode)?;
        list(inode, size, offset, &mut |listed, _| add(listed))
    }

    fn readdirplus(
        &self,
        _: &Context,
        inode: u64,
        _: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        mood(inode)?;
        list(inode, size, offset, add)
    }

    fn access(&self, _: &Context, inode: u64, _: u32) -> io::Result<()> {
        mood(inode)
    }

    fn lseek(&self, _: &Context, inode: u64, _: u64, _: u64, _: u32) -> io::Result<u64> {
        mood(inode)?;
        Ok(4711)
    }
}

impl HostFs for NullHost {
    fn tmpfile(
        &self,
        _: &Context,
        parent: u64,
        _: &CreateIn,
        extras: &CreateExtras<'_>,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        for (name, _) in extras.labels {
            check_attribute(name);
        }
        mood(parent)?;
        Ok((entry(20), 5, OpenOptions::empty()))
    }

    fn copy_file_range(
        &self,
        _: &Context,
        from: CopyEnd,
        _: CopyEnd,
        length: u64,
        _: u64,
    ) -> io::Result<usize> {
        mood(from.0)?;
        Ok(length as usize)
    }
}

/// An image. The data of odd inodes is absent half of the time, and no fetch brings it.
pub(crate) struct NullImage;

impl FileSystem for NullImage {
    type Inode = u64;
    type Handle = u64;

    fn lookup(&self, c: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        NullHost.lookup(c, parent, name)
    }

    fn getattr(&self, c: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        NullHost.getattr(c, inode, handle)
    }

    fn readlink(&self, c: &Context, inode: u64) -> io::Result<Vec<u8>> {
        NullHost.readlink(c, inode)
    }

    fn getxattr(&self, c: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        NullHost.getxattr(c, inode, name, size)
    }

    fn listxattr(&self, c: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        NullHost.listxattr(c, inode, size)
    }

    fn readdirplus(
        &self,
        _: &Context,
        inode: u64,
        _: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        list(inode, size, offset, add)
    }
}

impl ImageFs for NullImage {
    fn root(&self) -> u64 {
        5
    }

    fn read_resident(
        &self,
        inode: u64,
        offset: u64,
        size: u32,
        _: &HeldChunks,
        w: &mut dyn ZeroCopyWriter,
    ) -> io::Result<ReadOutcome> {
        mood(inode)?;
        if inode % 2 == 1 && offset % 2 == 1 {
            return Ok(ReadOutcome::Absent(Absent { chunks: Vec::new() }));
        }
        let room = w.available_bytes();
        assert!(room <= size as usize && room <= LARGEST);
        let written = w.write(&vec![9; room.min(offset as usize % 10_000)])?;
        Ok(ReadOutcome::Done(written))
    }

    fn fetch_absent(&self, _: Absent, _: Instant, done: Fetched) {
        // Evicted again before it can be read, until the device gives up.
        done(Ok(HeldChunks::default()));
    }
}
