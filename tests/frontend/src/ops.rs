//! FUSE requests, one function each, and how to read their replies.

use crate::abi::{Attr, Dirent, Entry, InitOut, Reader, Statfs, Statx, Writer, opcode};
use crate::{Error, Result};

/// The root of the tag.
pub const ROOT: u64 = 1;

/// A request before it is laid out in memory.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to do.
    pub opcode: u32,
    /// To which node.
    pub nodeid: u64,
    /// On whose behalf: user, group, process.
    pub caller: (u32, u32, u32),
    /// Arguments, each in a descriptor of its own where the guest does as Linux does.
    pub args: Vec<Vec<u8>>,
    /// Length of the request extensions, which are the last argument; in bytes.
    pub extension: usize,
    /// Room for the answer behind its header; `None` if there is none at all.
    pub room: Option<usize>,
    /// `unique` to use in place of a fresh one.
    pub unique: Option<u64>,
}

impl Request {
    /// A request without arguments.
    pub fn new(opcode: u32, nodeid: u64) -> Self {
        Self {
            opcode,
            nodeid,
            caller: (0, 0, 1),
            args: Vec::new(),
            extension: 0,
            room: Some(0),
            unique: None,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<Vec<u8>>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds a name, with the NUL behind it.
    pub fn name(self, name: impl AsRef<[u8]>) -> Self {
        let mut name = name.as_ref().to_vec();
        name.push(0);
        self.arg(name)
    }

    /// Sets the room for the answer.
    pub fn room(mut self, room: usize) -> Self {
        self.room = Some(room);
        self
    }

    /// No answer is expected, and no room given for one.
    pub fn unanswered(mut self) -> Self {
        self.room = None;
        self
    }

    /// Acts for this user and group.
    pub fn by(mut self, uid: u32, gid: u32) -> Self {
        self.caller = (uid, gid, self.caller.2);
        self
    }

    /// Appends request extensions.
    pub fn extended(mut self, bytes: Vec<u8>) -> Self {
        self.extension = bytes.len();
        self.arg(bytes)
    }

    /// Whether it belongs on the high priority queue.
    pub fn is_urgent(&self) -> bool {
        matches!(
            self.opcode,
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT
        )
    }
}

/// What to offer at INIT.
#[derive(Clone, Copy, Debug)]
pub struct Init {
    /// Protocol version.
    pub version: (u32, u32),
    /// Both halves of the flags.
    pub flags: u64,
    /// Send 16 bytes, as drivers before 7.36 do.
    pub short: bool,
}

impl Default for Init {
    fn default() -> Self {
        Self {
            version: (7, 40),
            flags: crate::abi::init::LINUX_6_12,
            short: false,
        }
    }
}

/// INIT.
pub fn init(offer: &Init) -> Request {
    let mut arg = Writer::new()
        .u32(offer.version.0)
        .u32(offer.version.1)
        .u32(128 << 10)
        .u32(offer.flags as u32);
    if !offer.short {
        arg = arg.u32((offer.flags >> 32) as u32).bytes(&[0; 44]);
    }
    Request::new(opcode::INIT, 0).arg(arg.0).room(64)
}

/// DESTROY.
pub fn destroy() -> Request {
    Request::new(opcode::DESTROY, 0)
}

/// LOOKUP.
pub fn lookup(parent: u64, name: impl AsRef<[u8]>) -> Request {
    Request::new(opcode::LOOKUP, parent).name(name).room(Entry::SIZE)
}

/// FORGET.
pub fn forget(nodeid: u64, count: u64) -> Request {
    Request::new(opcode::FORGET, nodeid)
        .arg(Writer::new().u64(count).0)
        .unanswered()
}

/// BATCH_FORGET of (nodeid, count) pairs.
pub fn batch_forget(nodes: &[(u64, u64)]) -> Request {
    let list = nodes.iter().fold(Writer::new(), |list, (nodeid, count)| {
        list.u64(*nodeid).u64(*count)
    });
    Request::new(opcode::BATCH_FORGET, 0)
        .arg(Writer::new().u32(nodes.len() as u32).u32(0).0)
        .arg(list.0)
        .unanswered()
}

/// INTERRUPT of the request `unique`.
pub fn interrupt(unique: u64) -> Request {
    Request::new(opcode::INTERRUPT, 0)
        .arg(Writer::new().u64(unique).0)
        .unanswered()
}

/// GETATTR, by handle if one is given.
pub fn getattr(nodeid: u64, fh: Option<u64>) -> Request {
    let arg = Writer::new()
        .u32(u32::from(fh.is_some()))
        .u32(0)
        .u64(fh.unwrap_or(0));
    Request::new(opcode::GETATTR, nodeid).arg(arg.0).room(104)
}

/// STATX with a mask of `STATX_*`.
pub fn statx(nodeid: u64, mask: u32) -> Request {
    let arg = Writer::new().u32(0).u32(0).u64(0).u32(0).u32(mask);
    Request::new(opcode::STATX, nodeid).arg(arg.0).room(288)
}

/// What SETATTR changes.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // The names are those of the kernel's header.
pub struct Change {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<(u64, u32)>,
    pub mtime: Option<(u64, u32)>,
    pub atime_now: bool,
    pub mtime_now: bool,
    pub fh: Option<u64>,
    pub kill_suidgid: bool,
}

/// SETATTR.
pub fn setattr(nodeid: u64, change: &Change) -> Request {
    let valid = [
        change.mode.is_some(),
        change.uid.is_some(),
        change.gid.is_some(),
        change.size.is_some(),
        change.atime.is_some() || change.atime_now,
        change.mtime.is_some() || change.mtime_now,
        change.fh.is_some(),
        change.atime_now,
        change.mtime_now,
        false,
        false,
        change.kill_suidgid,
    ];
    let valid = valid
        .iter()
        .enumerate()
        .fold(0, |bits, (bit, on)| bits | u32::from(*on) << bit);
    let (atime, mtime) = (change.atime.unwrap_or_default(), change.mtime.unwrap_or_default());
    let arg = Writer::new()
        .u32(valid)
        .u32(0)
        .u64(change.fh.unwrap_or(0))
        .u64(change.size.unwrap_or(0))
        .u64(0)
        .u64(atime.0)
        .u64(mtime.0)
        .u64(0)
        .u32(atime.1)
        .u32(mtime.1)
        .u32(0)
        .u32(change.mode.unwrap_or(0))
        .u32(0)
        .u32(change.uid.unwrap_or(0))
        .u32(change.gid.unwrap_or(0))
        .u32(0);
    Request::new(opcode::SETATTR, nodeid).arg(arg.0).room(104)
}

/// READLINK.
pub fn readlink(nodeid: u64) -> Request {
    Request::new(opcode::READLINK, nodeid).room(4096)
}

/// SYMLINK.
pub fn symlink(parent: u64, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Request {
    Request::new(opcode::SYMLINK, parent)
        .name(name)
        .name(target)
        .room(Entry::SIZE)
}

/// MKNOD; `rdev` from [`crate::abi::device_number`].
pub fn mknod(parent: u64, name: impl AsRef<[u8]>, mode: u32, rdev: u32) -> Request {
    let arg = Writer::new().u32(mode).u32(rdev).u32(0).u32(0);
    Request::new(opcode::MKNOD, parent)
        .arg(arg.0)
        .name(name)
        .room(Entry::SIZE)
}

/// MKDIR.
pub fn mkdir(parent: u64, name: impl AsRef<[u8]>, mode: u32) -> Request {
    let arg = Writer::new().u32(mode).u32(0);
    Request::new(opcode::MKDIR, parent)
        .arg(arg.0)
        .name(name)
        .room(Entry::SIZE)
}

/// UNLINK.
pub fn unlink(parent: u64, name: impl AsRef<[u8]>) -> Request {
    Request::new(opcode::UNLINK, parent).name(name)
}

/// RMDIR.
pub fn rmdir(parent: u64, name: impl AsRef<[u8]>) -> Request {
    Request::new(opcode::RMDIR, parent).name(name)
}

/// RENAME, without flags.
pub fn rename(parent: u64, name: impl AsRef<[u8]>, to: u64, new: impl AsRef<[u8]>) -> Request {
    Request::new(opcode::RENAME, parent)
        .arg(Writer::new().u64(to).0)
        .name(name)
        .name(new)
}

/// RENAME2 with `RENAME_*` flags.
pub fn rename2(parent: u64, name: impl AsRef<[u8]>, to: u64, new: impl AsRef<[u8]>, flags: u32) -> Request {
    let arg = Writer::new().u64(to).u32(flags).u32(0);
    Request::new(opcode::RENAME2, parent)
        .arg(arg.0)
        .name(name)
        .name(new)
}

/// LINK of `nodeid` to `name` in `parent`.
pub fn link(nodeid: u64, parent: u64, name: impl AsRef<[u8]>) -> Request {
    Request::new(opcode::LINK, parent)
        .arg(Writer::new().u64(nodeid).0)
        .name(name)
        .room(Entry::SIZE)
}

/// OPEN with `O_*` flags.
pub fn open(nodeid: u64, flags: u32) -> Request {
    Request::new(opcode::OPEN, nodeid)
        .arg(Writer::new().u32(flags).u32(0).0)
        .room(16)
}

/// OPENDIR.
pub fn opendir(nodeid: u64) -> Request {
    Request::new(opcode::OPENDIR, nodeid)
        .arg(Writer::new().u32(0).u32(0).0)
        .room(16)
}

/// CREATE with `O_*` flags.
pub fn create(parent: u64, name: impl AsRef<[u8]>, mode: u32, flags: u32) -> Request {
    let arg = Writer::new().u32(flags).u32(mode).u32(0).u32(0);
    Request::new(opcode::CREATE, parent)
        .arg(arg.0)
        .name(name)
        .room(Entry::SIZE + 16)
}

/// TMPFILE. (Linux sends a name as well, which means nothing.)
pub fn tmpfile(parent: u64, mode: u32, flags: u32) -> Request {
    let arg = Writer::new().u32(flags).u32(mode).u32(0).u32(0);
    Request::new(opcode::TMPFILE, parent)
        .arg(arg.0)
        .name("/")
        .room(Entry::SIZE + 16)
}

fn io(code: u32, nodeid: u64, fh: u64, offset: u64, size: u32, flags: u32) -> Request {
    let arg = Writer::new()
        .u64(fh)
        .u64(offset)
        .u32(size)
        .u32(0)
        .u64(0)
        .u32(flags)
        .u32(0);
    Request::new(code, nodeid).arg(arg.0)
}

/// READ.
pub fn read(nodeid: u64, fh: u64, offset: u64, size: u32) -> Request {
    io(opcode::READ, nodeid, fh, offset, size, 0).room(size as usize)
}

/// WRITE.
pub fn write(nodeid: u64, fh: u64, offset: u64, data: &[u8]) -> Request {
    io(opcode::WRITE, nodeid, fh, offset, data.len() as u32, 0)
        .arg(data)
        .room(8)
}

/// READDIR.
pub fn readdir(nodeid: u64, fh: u64, offset: u64, size: u32) -> Request {
    io(opcode::READDIR, nodeid, fh, offset, size, 0).room(size as usize)
}

/// READDIRPLUS.
pub fn readdirplus(nodeid: u64, fh: u64, offset: u64, size: u32) -> Request {
    io(opcode::READDIRPLUS, nodeid, fh, offset, size, 0).room(size as usize)
}

/// RELEASE.
pub fn release(nodeid: u64, fh: u64) -> Request {
    Request::new(opcode::RELEASE, nodeid).arg(Writer::new().u64(fh).u32(0).u32(0).u64(0).0)
}

/// RELEASEDIR.
pub fn releasedir(nodeid: u64, fh: u64) -> Request {
    Request::new(opcode::RELEASEDIR, nodeid).arg(Writer::new().u64(fh).u32(0).u32(0).u64(0).0)
}

/// FLUSH.
pub fn flush(nodeid: u64, fh: u64) -> Request {
    Request::new(opcode::FLUSH, nodeid).arg(Writer::new().u64(fh).u32(0).u32(0).u64(0).0)
}

/// FSYNC.
pub fn fsync(nodeid: u64, fh: u64, data_only: bool) -> Request {
    let arg = Writer::new().u64(fh).u32(u32::from(data_only)).u32(0);
    Request::new(opcode::FSYNC, nodeid).arg(arg.0)
}

/// FSYNCDIR.
pub fn fsyncdir(nodeid: u64, fh: u64) -> Request {
    Request::new(opcode::FSYNCDIR, nodeid).arg(Writer::new().u64(fh).u32(0).u32(0).0)
}

/// SYNCFS.
pub fn syncfs(nodeid: u64) -> Request {
    Request::new(opcode::SYNCFS, nodeid).arg(Writer::new().u64(0).0)
}

/// STATFS.
pub fn statfs(nodeid: u64) -> Request {
    Request::new(opcode::STATFS, nodeid).room(80)
}

/// SETXATTR; with `long` in the form of SETXATTR_EXT.
pub fn setxattr(nodeid: u64, name: impl AsRef<[u8]>, value: &[u8], flags: u32, long: bool) -> Request {
    let mut arg = Writer::new().u32(value.len() as u32).u32(flags);
    if long {
        arg = arg.u32(0).u32(0);
    }
    Request::new(opcode::SETXATTR, nodeid)
        .arg(arg.0)
        .name(name)
        .arg(value)
}

/// GETXATTR; size 0 asks for the size.
pub fn getxattr(nodeid: u64, name: impl AsRef<[u8]>, size: u32) -> Request {
    let arg = Writer::new().u32(size).u32(0);
    Request::new(opcode::GETXATTR, nodeid)
        .arg(arg.0)
        .name(name)
        .room(size.max(8) as usize)
}

/// LISTXATTR; size 0 asks for the size.
pub fn listxattr(nodeid: u64, size: u32) -> Request {
    let arg = Writer::new().u32(size).u32(0);
    Request::new(opcode::LISTXATTR, nodeid)
        .arg(arg.0)
        .room(size.max(8) as usize)
}

/// REMOVEXATTR.
pub fn removexattr(nodeid: u64, name: impl AsRef<[u8]>) -> Request {
    Request::new(opcode::REMOVEXATTR, nodeid).name(name)
}

/// ACCESS.
pub fn access(nodeid: u64, mask: u32) -> Request {
    Request::new(opcode::ACCESS, nodeid).arg(Writer::new().u32(mask).u32(0).0)
}

/// FALLOCATE.
pub fn fallocate(nodeid: u64, fh: u64, mode: u32, offset: u64, len: u64) -> Request {
    let arg = Writer::new().u64(fh).u64(offset).u64(len).u32(mode).u32(0);
    Request::new(opcode::FALLOCATE, nodeid).arg(arg.0)
}

/// LSEEK.
pub fn lseek(nodeid: u64, fh: u64, offset: u64, whence: u32) -> Request {
    let arg = Writer::new().u64(fh).u64(offset).u32(whence).u32(0);
    Request::new(opcode::LSEEK, nodeid).arg(arg.0).room(8)
}

/// A position in an open file: (nodeid, fh, offset).
pub type Position = (u64, u64, u64);

/// COPY_FILE_RANGE.
pub fn copy_file_range(from: Position, to: Position, len: u64) -> Request {
    let arg = Writer::new()
        .u64(from.1)
        .u64(from.2)
        .u64(to.0)
        .u64(to.1)
        .u64(to.2)
        .u64(len)
        .u64(0);
    Request::new(opcode::COPY_FILE_RANGE, from.0).arg(arg.0).room(8)
}

/// A POSIX or flock lock request: GETLK, SETLK or SETLKW.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // The names are those of the kernel's header.
pub struct Lock {
    pub owner: u64,
    pub start: u64,
    pub end: u64,
    pub kind: u32,
    pub flock: bool,
}

/// GETLK, SETLK or SETLKW, by `opcode`.
pub fn lock(opcode: u32, nodeid: u64, fh: u64, lock: &Lock) -> Request {
    let arg = Writer::new()
        .u64(fh)
        .u64(lock.owner)
        .u64(lock.start)
        .u64(lock.end)
        .u32(lock.kind)
        .u32(1)
        .u32(u32::from(lock.flock))
        .u32(0);
    Request::new(opcode, nodeid).arg(arg.0).room(24)
}

/// IOCTL of a command without input; `out` bytes come back.
pub fn ioctl(nodeid: u64, fh: u64, command: u32, out: u32) -> Request {
    let arg = Writer::new().u64(fh).u32(0).u32(command).u64(0).u32(0).u32(out);
    Request::new(opcode::IOCTL, nodeid)
        .arg(arg.0)
        .room(16 + out as usize)
}

/// Reads a body with `f` and insists that it was neither too short nor too long.
fn exact<T>(body: &[u8], what: &str, f: impl FnOnce(&mut Reader<'_>) -> T) -> Result<T> {
    let mut reader = Reader::new(body);
    let value = f(&mut reader);
    if reader.overrun() || !reader.rest().is_empty() {
        return Err(Error::Device(format!("{what} of {} bytes", body.len())));
    }
    Ok(value)
}

/// Body of LOOKUP, MKDIR, ...
pub fn read_entry(body: &[u8]) -> Result<Entry> {
    exact(body, "entry", Entry::read)
}

/// Body of GETATTR and SETATTR: how long it is valid, and the attributes.
pub fn read_attr(body: &[u8]) -> Result<((u64, u32), Attr)> {
    exact(body, "attributes", |r| {
        let seconds = r.u64();
        let nanoseconds = r.u32();
        r.u32();
        ((seconds, nanoseconds), Attr::read(r))
    })
}

/// Body of OPEN and OPENDIR: handle and `FOPEN_*` flags.
pub fn read_open(body: &[u8]) -> Result<(u64, u32)> {
    exact(body, "handle", |r| {
        let fh = r.u64();
        let flags = r.u32();
        r.u32();
        (fh, flags)
    })
}

/// Body of CREATE and TMPFILE: entry, handle, `FOPEN_*` flags.
pub fn read_created(body: &[u8]) -> Result<(Entry, u64, u32)> {
    exact(body, "entry and handle", |r| {
        let entry = Entry::read(r);
        let fh = r.u64();
        let flags = r.u32();
        r.u32();
        (entry, fh, flags)
    })
}

/// Body of INIT.
pub fn read_init(body: &[u8]) -> Result<InitOut> {
    exact(body, "INIT", InitOut::read)
}

/// Body of WRITE and COPY_FILE_RANGE.
pub fn read_written(body: &[u8]) -> Result<u32> {
    exact(body, "count", |r| {
        let count = r.u32();
        r.u32();
        count
    })
}

/// Body of LSEEK.
pub fn read_offset(body: &[u8]) -> Result<u64> {
    exact(body, "offset", |r| r.u64())
}

/// Body of STATFS.
pub fn read_statfs(body: &[u8]) -> Result<Statfs> {
    exact(body, "statfs", |r| {
        let statfs = Statfs {
            blocks: r.u64(),
            bfree: r.u64(),
            bavail: r.u64(),
            files: r.u64(),
            ffree: r.u64(),
            bsize: r.u32(),
            namelen: r.u32(),
            frsize: r.u32(),
        };
        r.take(28);
        statfs
    })
}

/// Body of STATX.
pub fn read_statx(body: &[u8]) -> Result<Statx> {
    exact(body, "statx", Statx::read)
}

/// Body of READDIR, or of READDIRPLUS if `plus`.
pub fn read_dirents(body: &[u8], plus: bool) -> Result<Vec<Dirent>> {
    let mut reader = Reader::new(body);
    let mut list = Vec::new();
    while !reader.rest().is_empty() {
        let entry = plus.then(|| Entry::read(&mut reader));
        let (ino, off, len, kind) = (reader.u64(), reader.u64(), reader.u32() as usize, reader.u32());
        let name = reader.take(len).map(<[u8]>::to_vec);
        // The padding of the last entry may not be there.
        let padding = len.next_multiple_of(8) - len;
        reader.take(padding.min(reader.rest().len()));
        match name {
            Some(name) if !reader.overrun() => list.push(Dirent {
                ino,
                off,
                kind,
                name,
                entry,
            }),
            _ => {
                return Err(Error::Device(format!(
                    "directory list of {} bytes ends inside an entry",
                    body.len()
                )));
            }
        }
    }
    Ok(list)
}
