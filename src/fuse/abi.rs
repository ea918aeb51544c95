//! The FUSE wire format (Linux `include/uapi/linux/fuse.h`, protocol 7.41): structs and numbers, no logic.
//!
//! All structs are plain little memory images; every field is native-endian, as guest and host are the same
//! machine.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! opcodes {
    ($($name:ident = $number:literal,)*) => {
        /// The operations of the protocol that this device knows by name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the names are those of the protocol")]
        pub enum Opcode { $($name = $number,)* Unknown = 0 }

        impl Opcode {
            /// From the number in a request; `Unknown` for numbers that this device does not know.
            pub fn from_wire(number: u32) -> Opcode {
                match number { $($number => Opcode::$name,)* _ => Opcode::Unknown }
            }

            /// All of them, in the order of their numbers.
            pub fn all() -> impl Iterator<Item = Opcode> {
                [Opcode::Unknown, $(Opcode::$name,)*].into_iter()
            }

            /// Its name in the protocol.
            pub fn name(self) -> &'static str {
                match self { $(Opcode::$name => stringify!($name),)* Opcode::Unknown => "Unknown" }
            }
        }
    };
}

opcodes! {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Flush = 25,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Releasedir = 29,
    Fsyncdir = 30,
    Getlk = 31,
    Setlk = 32,
    Setlkw = 33,
    Access = 34,
    Create = 35,
    Interrupt = 36,
    Bmap = 37,
    Destroy = 38,
    Ioctl = 39,
    Poll = 40,
    BatchForget = 42,
    Fallocate = 43,
    Readdirplus = 44,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    Setupmapping = 48,
    Removemapping = 49,
    Syncfs = 50,
    Tmpfile = 51,
    Statx = 52,
}

impl Opcode {
    /// One more than the highest index.
    pub const COUNT: usize = 53;

    /// Whether there is a reply at all.
    pub fn is_answered(self) -> bool {
        !matches!(self, Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt)
    }

    /// A small number for tables.
    pub fn index(self) -> usize {
        self as usize
    }
}

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[allow(missing_docs, reason = "the fields are those of the protocol")]
        pub struct $name { $(pub $field: $kind,)* }
    )*};
}

wire! {
    /// Opens every request.
    InHeader {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        total_extlen: u16,
        padding: u16,
    }
    /// Opens every reply.
    OutHeader { len: u32, error: i32, unique: u64, }
    /// `fuse_attr`.
    Attr {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }
    /// Reply of LOOKUP and of everything that makes an entry.
    EntryOut {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }
    /// Reply of GETATTR and SETATTR.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }
    /// Request of GETATTR.
    GetattrIn { flags: u32, dummy: u32, fh: u64, }
    /// Request of SETATTR.
    SetattrIn {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }
    /// Request of FORGET.
    ForgetIn { nlookup: u64, }
    /// Request of BATCH_FORGET, followed by `count` of [`ForgetOne`].
    BatchForgetIn { count: u32, dummy: u32, }
    /// One of a BATCH_FORGET.
    ForgetOne { nodeid: u64, nlookup: u64, }
    /// Request of MKNOD, followed by the name.
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32, }
    /// Request of MKDIR, followed by the name.
    MkdirIn { mode: u32, umask: u32, }
    /// Request of RENAME, followed by both names.
    RenameIn { newdir: u64, }
    /// Request of RENAME2, followed by both names.
    Rename2In { newdir: u64, flags: u32, padding: u32, }
    /// Request of LINK, followed by the name.
    LinkIn { oldnodeid: u64, }
    /// Request of OPEN and OPENDIR.
    OpenIn { flags: u32, open_flags: u32, }
    /// Reply of OPEN and OPENDIR.
    OpenOut { fh: u64, open_flags: u32, backing_id: i32, }
    /// Request of CREATE and TMPFILE, followed by the name.
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// Request of READ, READDIR and READDIRPLUS.
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32, }
    /// Request of WRITE, followed by the data.
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32, }
    /// Reply of WRITE and COPY_FILE_RANGE.
    WriteOut { size: u32, padding: u32, }
    /// Reply of STATFS.
    StatfsOut {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }
    /// Request of RELEASE and RELEASEDIR.
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    /// Request of FLUSH.
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    /// Request of FSYNC and FSYNCDIR.
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32, }
    /// Request of SETXATTR, followed by name and value, when SETXATTR_EXT was not negotiated.
    SetxattrInCompat { size: u32, flags: u32, }
    /// Request of SETXATTR, followed by name and value.
    SetxattrIn { size: u32, flags: u32, setxattr_flags: u32, padding: u32, }
    /// Request of GETXATTR (followed by the name) and LISTXATTR.
    GetxattrIn { size: u32, padding: u32, }
    /// Reply of GETXATTR and LISTXATTR when asked for the size.
    GetxattrOut { size: u32, padding: u32, }
    /// Request of ACCESS.
    AccessIn { mask: u32, padding: u32, }
    /// Request of INIT up to 7.35.
    InitInCompat { major: u32, minor: u32, max_readahead: u32, flags: u32, }
    /// The rest of an INIT request since 7.36.
    InitInExt { flags2: u32, unused: [u32; 11], }
    /// Reply of INIT.
    InitOut {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        unused: [u32; 6],
    }
    /// `fuse_file_lock`: a range of bytes, both ends included.
    LockRange { start: u64, end: u64, kind: u32, pid: u32, }
    /// Request of GETLK, SETLK and SETLKW; GETLK is answered with a [`LockRange`].
    LockIn { fh: u64, owner: u64, range: LockRange, lock_flags: u32, padding: u32, }
    /// Request of INTERRUPT.
    InterruptIn { unique: u64, }
    /// Request of IOCTL, followed by the argument.
    IoctlIn { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, }
    /// Reply of IOCTL, followed by the result.
    IoctlOut { result: i32, flags: u32, in_iovs: u32, out_iovs: u32, }
    /// Request of FALLOCATE.
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    /// Request of LSEEK.
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32, }
    /// Reply of LSEEK.
    LseekOut { offset: u64, }
    /// Request of COPY_FILE_RANGE.
    CopyFileRangeIn {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }
    /// Request of STATX.
    StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    /// A time in a [`Statx`].
    SxTime { tv_sec: i64, tv_nsec: u32, reserved: i32, }
    /// `fuse_statx`.
    Statx {
        mask: u32,
        blksize: u32,
        attributes: u64,
        nlink: u32,
        uid: u32,
        gid: u32,
        mode: u16,
        spare0: u16,
        ino: u64,
        size: u64,
        blocks: u64,
        attributes_mask: u64,
        atime: SxTime,
        btime: SxTime,
        ctime: SxTime,
        mtime: SxTime,
        rdev_major: u32,
        rdev_minor: u32,
        dev_major: u32,
        dev_minor: u32,
        spare2: [u64; 14],
    }
    /// Reply of STATX.
    StatxOut { attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx, }
    /// An entry of a READDIR reply, followed by the name and padding to 8 bytes.
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32, }
}

/// `fuse_getattr_in.flags`: `fh` is valid.
pub const GETATTR_FH: u32 = 1;
/// `fuse_setattr_in.valid`: `fh` is valid.
pub const FATTR_FH: u32 = 1 << 6;
/// `fuse_fsync_in.fsync_flags`: data only.
pub const FSYNC_FDATASYNC: u32 = 1;
/// `fuse_release_in.release_flags`: flush.
pub const RELEASE_FLUSH: u32 = 1;
/// `fuse_release_in.release_flags`: release the flock lock.
pub const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
/// `fuse_lk_in.lk_flags`: a flock lock.
pub const LOCK_FLOCK: u32 = 1;
/// `fuse_read_in.read_flags`: `lock_owner` is valid.
pub const READ_LOCKOWNER: u32 = 1 << 1;
/// `fuse_write_in.write_flags`: delayed write from the page cache.
pub const WRITE_CACHE: u32 = 1;
/// `fuse_write_in.write_flags`: `lock_owner` is valid.
pub const WRITE_LOCKOWNER: u32 = 1 << 1;

/// `fuse_setxattr_in.setxattr_flags`: clear the set-group-id bit, for an ACL was set.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1;

/// `FUSE_INIT` flags, `flags` in the low and `flags2` in the high half.
#[allow(missing_docs, dead_code, reason = "the list is that of the protocol")]
pub mod init {
    pub const ASYNC_READ: u64 = 1;
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::size_of;

    #[test]
    fn structs_have_the_sizes_of_the_protocol() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<Attr>(), 88);
        assert_eq!(size_of::<EntryOut>(), 128);
        assert_eq!(size_of::<AttrOut>(), 104);
        assert_eq!(size_of::<SetattrIn>(), 88);
        assert_eq!(size_of::<ReadIn>(), 40);
        assert_eq!(size_of::<WriteIn>(), 40);
        assert_eq!(size_of::<StatfsOut>(), 80);
        assert_eq!(size_of::<InitInCompat>() + size_of::<InitInExt>(), 64);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<CopyFileRangeIn>(), 56);
        assert_eq!(size_of::<LockIn>(), 48);
        assert_eq!(size_of::<Statx>(), 256);
        assert_eq!(size_of::<StatxOut>(), 288);
        assert_eq!(size_of::<Dirent>(), 24);
    }

    #[test]
    fn opcodes_keep_their_numbers() {
        for opcode in Opcode::all() {
            assert!(opcode.index() < Opcode::COUNT);
            if opcode != Opcode::Unknown {
                assert_eq!(Opcode::from_wire(opcode.index() as u32), opcode);
            }
        }
        assert_eq!(Opcode::from_wire(4096), Opcode::Unknown);
        assert_eq!(Opcode::from_wire(7), Opcode::Unknown);
    }
}
