//! From what instances return to wire structs: nodeids, inode numbers and times of the guest's one file system.

use std::time::Duration;

use fuse_backend_rs::api::filesystem::Entry;
use zerocopy::IntoBytes;

use super::abi::{Attr, AttrOut, Dirent, EntryOut, OpenOut, StatfsOut, Statx, StatxOut, SxTime};
use super::errno::Errno;
use crate::mounts::{Mount, Node, ROOT, nodeid};

/// The attributes of a file in `mount`.
pub fn attr(mount: &Mount, stat: &libc::stat64, flags: u32) -> Attr {
    Attr {
        ino: stat.st_ino ^ mount.ino_mask,
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: stat.st_atime as u64,
        mtime: stat.st_mtime as u64,
        ctime: stat.st_ctime as u64,
        atimensec: stat.st_atime_nsec as u32,
        mtimensec: stat.st_mtime_nsec as u32,
        ctimensec: stat.st_ctime_nsec as u32,
        mode: stat.st_mode,
        nlink: stat.st_nlink as u32,
        uid: stat.st_uid,
        gid: stat.st_gid,
        // The low half of the host's numbering is the kernel's own (`new_encode_dev`).
        rdev: stat.st_rdev as u32,
        blksize: stat.st_blksize as u32,
        flags,
    }
}

/// The attributes of a pseudo directory: as of a directory that root made when the mounts below it changed last.
pub fn pseudo_attr(node: &Node) -> Attr {
    let (seconds, nanoseconds) = node.changed;
    Attr {
        ino: node.ino(),
        size: 4096,
        blocks: 8,
        atime: seconds,
        mtime: seconds,
        ctime: seconds,
        atimensec: nanoseconds,
        mtimensec: nanoseconds,
        ctimensec: nanoseconds,
        mode: libc::S_IFDIR | 0o755,
        nlink: node.links(),
        blksize: 4096,
        ..Attr::default()
    }
}

/// The reply for an entry that an instance has looked up or made.
pub fn entry(mount: &Mount, entry: &Entry) -> Result<EntryOut, Errno> {
    let nodeid = match entry.inode {
        0 => 0,
        local if local == mount.root && mount.is_root() => ROOT,
        local => nodeid(mount.id, local).ok_or(Errno::OVERFLOW)?,
    };
    Ok(EntryOut {
        nodeid,
        generation: entry.generation,
        entry_valid: entry.entry_timeout.as_secs(),
        attr_valid: entry.attr_timeout.as_secs(),
        entry_valid_nsec: entry.entry_timeout.subsec_nanos(),
        attr_valid_nsec: entry.attr_timeout.subsec_nanos(),
        attr: attr(mount, &entry.attr, entry.attr_flags),
    })
}

/// The reply for a pseudo directory. It is never cached: mounts come and go without a way to tell the guest.
pub fn pseudo_entry(node: &Node) -> EntryOut {
    EntryOut {
        nodeid: node.id,
        attr: pseudo_attr(node),
        ..EntryOut::default()
    }
}

/// The reply of GETATTR and SETATTR.
pub fn attr_out(attr: Attr, timeout: Duration) -> AttrOut {
    AttrOut {
        attr_valid: timeout.as_secs(),
        attr_valid_nsec: timeout.subsec_nanos(),
        dummy: 0,
        attr,
    }
}

/// The reply of OPEN and OPENDIR.
pub fn open_out(handle: Option<u64>, flags: u32) -> OpenOut {
    OpenOut {
        fh: handle.unwrap_or(0),
        open_flags: flags,
        backing_id: 0,
    }
}

/// The reply of STATFS.
pub fn statfs_out(stat: &libc::statvfs64) -> StatfsOut {
    StatfsOut {
        blocks: stat.f_blocks,
        bfree: stat.f_bfree,
        bavail: stat.f_bavail,
        files: stat.f_files,
        ffree: stat.f_ffree,
        bsize: stat.f_bsize as u32,
        namelen: stat.f_namemax as u32,
        frsize: stat.f_frsize as u32,
        ..StatfsOut::default()
    }
}

/// The reply of STATX from plain attributes: everything but the birth time.
pub fn statx_from_attr(attr: &Attr, timeout: Duration) -> StatxOut {
    let time = |seconds: u64, nanoseconds: u32| SxTime {
        tv_sec: seconds as i64,
        tv_nsec: nanoseconds,
        reserved: 0,
    };
    let device = u64::from(attr.rdev);
    StatxOut {
        attr_valid: timeout.as_secs(),
        attr_valid_nsec: timeout.subsec_nanos(),
        stat: Statx {
            mask: libc::STATX_BASIC_STATS,
            blksize: attr.blksize,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            mode: attr.mode as u16,
            ino: attr.ino,
            size: attr.size,
            blocks: attr.blocks,
            atime: time(attr.atime, attr.atimensec),
            ctime: time(attr.ctime, attr.ctimensec),
            mtime: time(attr.mtime, attr.mtimensec),
            rdev_major: libc::major(device),
            rdev_minor: libc::minor(device),
            ..Statx::default()
        },
        ..StatxOut::default()
    }
}

/// The reply of STATX from the host's.
pub fn statx_out(mount: &Mount, statx: &passthrough::Statx, timeout: Duration) -> StatxOut {
    let time = |time: &passthrough::Timestamp| SxTime {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds,
        reserved: 0,
    };
    StatxOut {
        attr_valid: timeout.as_secs(),
        attr_valid_nsec: timeout.subsec_nanos(),
        stat: Statx {
            mask: statx.mask & (libc::STATX_BASIC_STATS | libc::STATX_BTIME),
            blksize: statx.blksize,
            attributes: statx.attributes,
            nlink: statx.nlink,
            uid: statx.uid,
            gid: statx.gid,
            mode: statx.mode,
            ino: statx.ino ^ mount.ino_mask,
            size: statx.size,
            blocks: statx.blocks,
            attributes_mask: statx.attributes_mask,
            atime: time(&statx.atime),
            btime: time(&statx.btime),
            ctime: time(&statx.ctime),
            mtime: time(&statx.mtime),
            rdev_major: statx.rdev.0,
            rdev_minor: statx.rdev.1,
            ..Statx::default()
        },
        ..StatxOut::default()
    }
}

/// The body of a READDIR or READDIRPLUS reply, filled up to what the driver has room for.
pub struct Listing<'a> {
    bytes: &'a mut Vec<u8>,
    limit: usize,
}

impl<'a> Listing<'a> {
    /// An empty body of at most `limit` bytes.
    pub fn new(bytes: &'a mut Vec<u8>, limit: usize) -> Self {
        bytes.clear();
        Listing { bytes, limit }
    }

    /// Appends an entry; returns the bytes it took, 0 if it does not fit.
    pub fn add(&mut self, plus: Option<&EntryOut>, ino: u64, position: u64, kind: u32, name: &[u8]) -> usize {
        let padded = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
        let length = padded + plus.map_or(0, |_| size_of::<EntryOut>());
        if self.bytes.len() + length > self.limit {
            return 0;
        }
        let dirent = Dirent {
            ino,
            off: position,
            namelen: name.len() as u32,
            kind,
        };
        if let Some(plus) = plus {
            self.bytes.extend_from_slice(plus.as_bytes());
        }
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes
            .resize(self.bytes.len() + padded - size_of::<Dirent>() - name.len(), 0);
        length
    }

    /// Whether nothing has been added.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}
