//! Inodes: decoded from the bootstrap on every use, checked as far as one inode allows.

pub(crate) mod v5;
pub(crate) mod v6;

use fuse_backend_rs::abi::fuse_abi::stat64;

use crate::digest;
use crate::error::{Damaged, Refused};
use crate::image::Image;
use crate::layout::v5::ChunkRecord;
use crate::layout::v6::ChunkAddress;
use crate::superblock::Format;

/// Unit of `st_blocks`, in bytes.
const STAT_BLOCK: u64 = 512;
/// Preferred I/O size that is reported, in bytes.
pub(crate) const BLOCK_SIZE: u32 = 4096;

/// Type of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
}

impl Kind {
    /// The type in `mode`.
    pub fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & libc::S_IFMT {
            libc::S_IFREG => Kind::File,
            libc::S_IFDIR => Kind::Directory,
            libc::S_IFLNK => Kind::Symlink,
            libc::S_IFCHR => Kind::Char,
            libc::S_IFBLK => Kind::Block,
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFSOCK => Kind::Socket,
            _ => return None,
        })
    }

    /// `d_type` of a directory entry.
    pub fn dirent_type(self) -> u32 {
        u32::from(match self {
            Kind::File => libc::DT_REG,
            Kind::Directory => libc::DT_DIR,
            Kind::Symlink => libc::DT_LNK,
            Kind::Char => libc::DT_CHR,
            Kind::Block => libc::DT_BLK,
            Kind::Fifo => libc::DT_FIFO,
            Kind::Socket => libc::DT_SOCK,
        })
    }
}

/// An inode.
#[derive(Clone, Copy, Debug)]
pub struct Inode {
    /// Local id, unique in the image: v6 node id, v5 inode number.
    pub id: u64,
    /// Type.
    pub kind: Kind,
    /// `st_mode`.
    pub mode: u32,
    /// Link count.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of a file, directory or symlink target.
    pub size: u64,
    /// Device number of a device.
    pub rdev: u32,
    /// Seconds of the modification time.
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
    /// Offset of the record in the bootstrap.
    pub(crate) offset: u64,
    pub(crate) body: Body,
}

/// Where the rest of an inode is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Body {
    V5 {
        /// Number of the parent directory.
        parent: u64,
        /// Index of the first child of a directory.
        child_index: u64,
        /// Children of a directory, chunk records of a file.
        child_count: u64,
        /// Offset of the symlink target.
        target: u64,
        /// Offset of the attributes, if there are any.
        xattrs: Option<u64>,
        /// Offset of the chunk records of a file.
        chunks: u64,
        /// Whether they leave parts of the file out, which are zeros.
        holes: bool,
    },
    V6 {
        /// Whether the rest of the data follows the inode (directories and symlinks).
        inline: bool,
        /// First data block of directories and symlinks.
        block: u64,
        /// Offset of the attribute area.
        xattrs: u64,
        /// Its size.
        xattrs_size: u64,
        /// Offset of what follows: inline data, or chunk addresses.
        tail: u64,
        /// Number of chunk addresses.
        addresses: u64,
    },
}

impl Inode {
    /// Whether several names may refer to it.
    pub fn is_hardlinked(&self) -> bool {
        self.kind == Kind::File && self.nlink > 1
    }

    /// Bytes of the bootstrap that are this inode's alone, apart from the record itself: attributes, target, chunk addresses.
    pub(crate) fn extent(&self) -> u64 {
        match self.body {
            Body::V5 {
                target,
                chunks,
                child_count,
                ..
            } => {
                let records = if self.kind == Kind::File { child_count } else { 0 };
                chunks - target + records * size_of::<ChunkRecord>() as u64
            }
            Body::V6 {
                xattrs,
                tail,
                addresses,
                ..
            } => tail - xattrs + addresses * size_of::<ChunkAddress>() as u64,
        }
    }

    /// Attributes as `stat` shows them. There is one time stamp; it stands for all three.
    pub fn stat(&self) -> stat64 {
        let mut stat = zeroed_stat();
        stat.st_ino = self.id;
        stat.st_mode = self.mode;
        stat.st_nlink = self.nlink.into();
        stat.st_uid = self.uid;
        stat.st_gid = self.gid;
        stat.st_rdev = self.rdev.into();
        stat.st_size = i64::try_from(self.size).unwrap_or(i64::MAX);
        stat.st_blksize = BLOCK_SIZE.into();
        stat.st_blocks = self.size.div_ceil(STAT_BLOCK) as i64;
        stat.st_atime = self.mtime;
        stat.st_atime_nsec = self.mtime_nsec.into();
        stat.st_mtime = stat.st_atime;
        stat.st_mtime_nsec = stat.st_atime_nsec;
        stat.st_ctime = stat.st_atime;
        stat.st_ctime_nsec = stat.st_atime_nsec;
        stat
    }
}

fn zeroed_stat() -> stat64 {
    fuse_backend_rs::api::filesystem::Entry::default().attr
}

/// Nanoseconds are below one second, in every version.
fn check_nsec(nsec: u32, at: u64) -> Result<u32, Damaged> {
    if nsec < 1_000_000_000 {
        Ok(nsec)
    } else {
        Err(Damaged::new("inode", at, "modification time out of range"))
    }
}

impl Image {
    /// Decodes the inode with local id `id`.
    pub(crate) fn inode(&self, id: u64) -> Result<Inode, Damaged> {
        let mut inode = match self.superblock.format {
            Format::V5 { inode_table, .. } => v5::inode(self, inode_table, id)?,
            Format::V6 { block_bits, meta, .. } => v6::inode(self, block_bits, meta, id)?,
        };
        if let Some((uid, gid)) = self.owner {
            inode.uid = uid;
            inode.gid = gid;
        }
        Ok(inode)
    }

    /// The target of a symlink.
    pub(crate) fn symlink_target(&self, inode: &Inode) -> Result<Vec<u8>, Damaged> {
        if inode.kind != Kind::Symlink {
            return Err(Damaged::new("inode", inode.id, "not a symlink"));
        }
        let target = match inode.body {
            Body::V5 { target, .. } => self
                .bootstrap
                .slice("symlink target", target, inode.size)?
                .to_vec(),
            Body::V6 { .. } => v6::flat_data(self, inode)?,
        };
        if target.contains(&0) {
            return Err(Damaged::new(
                "symlink target of inode",
                inode.id,
                "contains a NUL",
            ));
        }
        if matches!(inode.body, Body::V5 { .. }) && !digest::symlink_matches(self, inode, &target) {
            return Err(Damaged::new(
                "symlink target of inode",
                inode.id,
                "does not match its digest",
            ));
        }
        Ok(target)
    }

    /// The root is a directory.
    pub(crate) fn check_root(&self) -> Result<(), Refused> {
        let root = self.inode(self.root())?;
        if root.kind != Kind::Directory {
            return Err(Damaged::new("root inode", root.offset, "not a directory").into());
        }
        Ok(())
    }
}
