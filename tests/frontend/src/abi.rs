//! FUSE on the wire: numbers and structures of `include/uapi/linux/fuse.h` (7.40), little-endian.

/// Opcodes.
pub mod opcode {
    #![allow(missing_docs)] // The names are those of the kernel's header.
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const BMAP: u32 = 37;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const POLL: u32 = 40;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SETUPMAPPING: u32 = 48;
    pub const REMOVEMAPPING: u32 = 49;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}

/// INIT flags (the upper half travels as `flags2`).
pub mod init {
    #![allow(missing_docs)] // The names are those of the kernel's header.
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const HAS_IOCTL_DIR: u64 = 1 << 11;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const HANDLE_KILLPRIV: u64 = 1 << 19;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const ABORT_ERROR: u64 = 1 << 21;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const MAP_ALIGNMENT: u64 = 1 << 26;
    pub const SUBMOUNTS: u64 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const SECURITY_CTX: u64 = 1 << 32;
    pub const HAS_INODE_DAX: u64 = 1 << 33;
    pub const CREATE_SUPP_GROUP: u64 = 1 << 34;
    pub const HAS_EXPIRE_ONLY: u64 = 1 << 35;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const PASSTHROUGH: u64 = 1 << 37;
    pub const NO_EXPORT_SUPPORT: u64 = 1 << 38;
    pub const HAS_RESEND: u64 = 1 << 39;
    pub const ALLOW_IDMAP: u64 = 1 << 40;

    /// What the virtiofs driver of Linux 6.12 offers.
    pub const LINUX_6_12: u64 = ASYNC_READ
        | POSIX_LOCKS
        | ATOMIC_O_TRUNC
        | EXPORT_SUPPORT
        | BIG_WRITES
        | DONT_MASK
        | FLOCK_LOCKS
        | HAS_IOCTL_DIR
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | ASYNC_DIO
        | WRITEBACK_CACHE
        | NO_OPEN_SUPPORT
        | PARALLEL_DIROPS
        | HANDLE_KILLPRIV
        | POSIX_ACL
        | ABORT_ERROR
        | MAX_PAGES
        | CACHE_SYMLINKS
        | NO_OPENDIR_SUPPORT
        | EXPLICIT_INVAL_DATA
        | SUBMOUNTS
        | HANDLE_KILLPRIV_V2
        | SETXATTR_EXT
        | INIT_EXT
        | SECURITY_CTX
        | CREATE_SUPP_GROUP
        | HAS_EXPIRE_ONLY
        | DIRECT_IO_ALLOW_MMAP
        | NO_EXPORT_SUPPORT
        | HAS_RESEND
        | ALLOW_IDMAP;
}

/// `O_*` flags that tests use.
pub mod open_flags {
    #![allow(missing_docs)] // The names are those of open(2).
    pub const RDONLY: u32 = 0;
    pub const WRONLY: u32 = 1;
    pub const RDWR: u32 = 2;
    pub const CREAT: u32 = 0o100;
    pub const EXCL: u32 = 0o200;
    pub const TRUNC: u32 = 0o1000;
    pub const APPEND: u32 = 0o2000;
    pub const DIRECT: u32 = 0o40000;
}

/// Bytes of a request header.
pub const IN_HEADER: usize = 40;
/// Bytes of a reply header.
pub const OUT_HEADER: usize = 16;

/// Writes little-endian fields one after the other.
#[derive(Clone, Debug, Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a u16.
    pub fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends a u32.
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends a u64.
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// Appends bytes.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

/// Reads little-endian fields one after the other; zeroes behind the end, see [`Reader::overrun`].
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    overrun: bool,
}

impl<'a> Reader<'a> {
    /// From the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            overrun: false,
        }
    }

    /// The next `len` bytes, if there are so many.
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        match self.bytes.split_at_checked(len) {
            Some((head, tail)) => {
                self.bytes = tail;
                Some(head)
            }
            None => {
                self.overrun = true;
                None
            }
        }
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        if let Some(bytes) = self.take(N) {
            array.copy_from_slice(bytes);
        }
        array
    }

    /// A u16.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// A u32.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// A u64.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Bytes left.
    pub fn rest(&self) -> &'a [u8] {
        self.bytes
    }

    /// Whether more was read than there is.
    pub fn overrun(&self) -> bool {
        self.overrun
    }
}

/// A request header.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // The names are those of the kernel's header.
pub struct InHeader {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub nodeid: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    pub total_extlen: u16,
}

impl InHeader {
    /// Its 40 bytes.
    pub fn bytes(&self) -> Vec<u8> {
        Writer::new()
            .u32(self.len)
            .u32(self.opcode)
            .u64(self.unique)
            .u64(self.nodeid)
            .u32(self.uid)
            .u32(self.gid)
            .u32(self.pid)
            .u16(self.total_extlen)
            .u16(0)
            .0
    }
}

/// Attributes of a node (`fuse_attr`, 88 bytes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the kernel's header.
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: (u64, u32),
    pub mtime: (u64, u32),
    pub ctime: (u64, u32),
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub blksize: u32,
    pub flags: u32,
}

impl Attr {
    pub(crate) fn read(r: &mut Reader<'_>) -> Self {
        let (ino, size, blocks) = (r.u64(), r.u64(), r.u64());
        let (atime, mtime, ctime) = (r.u64(), r.u64(), r.u64());
        let (atimensec, mtimensec, ctimensec) = (r.u32(), r.u32(), r.u32());
        Self {
            ino,
            size,
            blocks,
            atime: (atime, atimensec),
            mtime: (mtime, mtimensec),
            ctime: (ctime, ctimensec),
            mode: r.u32(),
            nlink: r.u32(),
            uid: r.u32(),
            gid: r.u32(),
            rdev: r.u32(),
            blksize: r.u32(),
            flags: r.u32(),
        }
    }

    /// Major and minor number of a device node.
    pub fn device(&self) -> (u32, u32) {
        // The kernel's "new" encoding of dev_t in 32 bits.
        (
            (self.rdev >> 8) & 0xfff,
            (self.rdev & 0xff) | ((self.rdev >> 12) & 0xfff00),
        )
    }
}

/// `rdev` as MKNOD wants it.
pub fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & 0xfff00) << 12)
}

/// A found or made node (`fuse_entry_out`, 128 bytes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the kernel's header.
pub struct Entry {
    pub nodeid: u64,
    pub generation: u64,
    pub entry_valid: (u64, u32),
    pub attr_valid: (u64, u32),
    pub attr: Attr,
}

impl Entry {
    /// Bytes on the wire.
    pub const SIZE: usize = 128;

    pub(crate) fn read(r: &mut Reader<'_>) -> Self {
        let (nodeid, generation, entry_valid, attr_valid) = (r.u64(), r.u64(), r.u64(), r.u64());
        let (entry_nsec, attr_nsec) = (r.u32(), r.u32());
        Self {
            nodeid,
            generation,
            entry_valid: (entry_valid, entry_nsec),
            attr_valid: (attr_valid, attr_nsec),
            attr: Attr::read(r),
        }
    }
}

/// Answer to INIT (64 bytes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the kernel's header.
pub struct InitOut {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    /// Both halves.
    pub flags: u64,
    pub max_background: u16,
    pub congestion_threshold: u16,
    pub max_write: u32,
    pub time_gran: u32,
    pub max_pages: u16,
    pub map_alignment: u16,
    pub max_stack_depth: u32,
}

impl InitOut {
    pub(crate) fn read(r: &mut Reader<'_>) -> Self {
        let (major, minor, max_readahead, flags) = (r.u32(), r.u32(), r.u32(), r.u32());
        let (max_background, congestion_threshold) = (r.u16(), r.u16());
        let (max_write, time_gran) = (r.u32(), r.u32());
        let (max_pages, map_alignment, flags2, max_stack_depth) = (r.u16(), r.u16(), r.u32(), r.u32());
        r.take(24);
        Self {
            major,
            minor,
            max_readahead,
            flags: u64::from(flags) | u64::from(flags2) << 32,
            max_background,
            congestion_threshold,
            max_write,
            time_gran,
            max_pages,
            map_alignment,
            max_stack_depth,
        }
    }
}

/// Answer to STATFS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the kernel's header.
pub struct Statfs {
    pub blocks: u64,
    pub bfree: u64,
    pub bavail: u64,
    pub files: u64,
    pub ffree: u64,
    pub bsize: u32,
    pub namelen: u32,
    pub frsize: u32,
}

/// Answer to STATX, as far as tests look at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the kernel's header.
pub struct Statx {
    pub attr_valid: (u64, u32),
    pub flags: u32,
    pub mask: u32,
    pub blksize: u32,
    pub attributes: u64,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub mode: u16,
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub attributes_mask: u64,
    pub atime: (u64, u32),
    pub btime: (u64, u32),
    pub ctime: (u64, u32),
    pub mtime: (u64, u32),
    pub rdev: (u32, u32),
}

impl Statx {
    pub(crate) fn read(r: &mut Reader<'_>) -> Self {
        let valid = r.u64();
        let attr_valid = (valid, r.u32());
        let flags = r.u32();
        r.take(16);
        let time = |r: &mut Reader<'_>| {
            let seconds = r.u64();
            let nanoseconds = r.u32();
            r.u32();
            (seconds, nanoseconds)
        };
        let (mask, blksize, attributes) = (r.u32(), r.u32(), r.u64());
        let (nlink, uid, gid, mode) = (r.u32(), r.u32(), r.u32(), r.u16());
        r.u16();
        let (ino, size, blocks, attributes_mask) = (r.u64(), r.u64(), r.u64(), r.u64());
        let (atime, btime, ctime, mtime) = (time(r), time(r), time(r), time(r));
        let rdev = (r.u32(), r.u32());
        r.take(8 + 14 * 8);
        Self {
            attr_valid,
            flags,
            mask,
            blksize,
            attributes,
            nlink,
            uid,
            gid,
            mode,
            ino,
            size,
            blocks,
            attributes_mask,
            atime,
            btime,
            ctime,
            mtime,
            rdev,
        }
    }
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the kernel's header.
pub struct Dirent {
    pub ino: u64,
    /// Where to go on reading behind this one.
    pub off: u64,
    /// `DT_*`.
    pub kind: u32,
    pub name: Vec<u8>,
    /// What READDIRPLUS adds.
    pub entry: Option<Entry>,
}
