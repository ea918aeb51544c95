//! Tar archives, as far as images need them: POSIX headers with PAX records, and GNU's long names when reading.
//!
//! Names, targets and attribute values are bytes; nothing here wants UTF-8. What an archive says is not believed:
//! numbers and sizes are checked, records that are kept in memory are bounded.
//!
//! * `read`: a stream of members.
//! * `write`: members to a stream.

mod read;
mod write;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use read::{Reader, TarError};
pub use write::Writer;

/// Unit of an archive in bytes.
pub(crate) const BLOCK: u64 = 512;
/// Prefix of PAX records that hold extended attributes.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// File with data.
    Regular,
    /// Another name of a member that came before.
    HardLink,
    /// Symbolic link.
    Symlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Directory.
    Directory,
    /// Named pipe.
    Fifo,
}

impl Kind {
    /// From the type flag; `None` if that is of no kind that we know.
    fn from_flag(flag: u8) -> Option<Self> {
        Some(match flag {
            b'0' | 0 | b'7' => Self::Regular,
            b'1' => Self::HardLink,
            b'2' => Self::Symlink,
            b'3' => Self::Char,
            b'4' => Self::Block,
            b'5' => Self::Directory,
            b'6' => Self::Fifo,
            _ => return None,
        })
    }

    fn flag(self) -> u8 {
        match self {
            Self::Regular => b'0',
            Self::HardLink => b'1',
            Self::Symlink => b'2',
            Self::Char => b'3',
            Self::Block => b'4',
            Self::Directory => b'5',
            Self::Fifo => b'6',
        }
    }
}

/// A member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Path as the archive has it.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Target of a symbolic link, or path of the member that a hard link names.
    pub link: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds.
    pub mtime: i64,
    /// Its nanoseconds.
    pub mtime_nsec: u32,
    /// Bytes of data that follow; 0 for all but regular files.
    pub size: u64,
    /// Device number: major, minor.
    pub device: (u32, u32),
    /// Extended attributes: complete name, value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Header block.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    name: [u8; 100],
    mode: [u8; 8],
    uid: [u8; 8],
    gid: [u8; 8],
    size: [u8; 12],
    mtime: [u8; 12],
    checksum: [u8; 8],
    flag: u8,
    link: [u8; 100],
    magic: [u8; 6],
    version: [u8; 2],
    user: [u8; 32],
    group: [u8; 32],
    major: [u8; 8],
    minor: [u8; 8],
    prefix: [u8; 155],
    padding: [u8; 12],
}

const _: () = assert!(size_of::<Header>() == BLOCK as usize);

impl Header {
    /// Sum of all bytes, those of the checksum itself counted as spaces.
    fn sum(&self) -> u32 {
        let all: u32 = self.as_bytes().iter().map(|byte| u32::from(*byte)).sum();
        let own: u32 = self.checksum.iter().map(|byte| u32::from(*byte)).sum();
        all - own + 8 * u32::from(b' ')
    }
}
