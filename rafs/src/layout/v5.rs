//! RAFS v5 bootstrap.
//!
//! Superblock (8192 bytes), inode table, prefetch table, blob table, extended blob table, then the inode records:
//! 128 bytes, name, symlink target, extended attributes, chunk records, each part padded to 8 bytes.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Flags, Invalid, MAX_CHUNK_SIZE, MIN_CHUNK_SIZE, invalid};

/// First word of a v5 bootstrap.
pub const MAGIC: u32 = 0x5241_4653;
/// Second word of a v5 bootstrap.
pub const VERSION: u32 = 0x500;
/// Size of the superblock in bytes; the inode table follows.
pub const SUPERBLOCK_SIZE: u32 = 8192;
/// Largest bootstrap.
pub const MAX_FILE_SIZE: u64 = 0x8000_0000;
/// Index of the root inode.
pub const ROOT_INDEX: u64 = 1;
/// Unit of the offsets in the inode table, and alignment of everything.
pub const UNIT: u64 = 8;

/// Start of the superblock; the rest of its 8192 bytes is zero.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SuperBlock {
    /// [`MAGIC`].
    pub magic: U32,
    /// [`VERSION`].
    pub version: U32,
    /// [`SUPERBLOCK_SIZE`].
    pub size: U32,
    /// Chunk size in bytes.
    pub chunk_size: U32,
    /// [`Flags`].
    pub flags: U64,
    /// Distinct inodes: a hardlinked file counts once.
    pub inodes_count: U64,
    /// Offset of the inode table.
    pub inode_table_offset: U64,
    /// Offset of the prefetch table, set even if it is empty.
    pub prefetch_table_offset: U64,
    /// Offset of the blob table, set even if it is empty.
    pub blob_table_offset: U64,
    /// Names including the root; each hardlink counts.
    pub inode_table_entries: U32,
    /// Entries of the prefetch table.
    pub prefetch_table_entries: U32,
    /// Bytes of the blob table, a multiple of 8.
    pub blob_table_size: U32,
    /// Entries of the extended blob table, 0 in very old images.
    pub extended_blob_table_entries: U32,
    /// Offset of the extended blob table.
    pub extended_blob_table_offset: U64,
}

impl SuperBlock {
    /// Checks all that can be known without the file.
    pub fn check(&self) -> Result<(), Invalid> {
        const NAME: &str = "v5 superblock";
        if self.magic.get() != MAGIC {
            return Err(invalid(NAME, "magic", self.magic.get(), "expected 0x52414653"));
        }
        if self.version.get() != VERSION {
            return Err(invalid(NAME, "version", self.version.get(), "expected 0x500"));
        }
        if self.size.get() != SUPERBLOCK_SIZE {
            return Err(invalid(NAME, "size", self.size.get(), "expected 0x2000"));
        }
        let chunk_size = self.chunk_size.get();
        if !chunk_size.is_power_of_two() || !(MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&chunk_size) {
            return Err(invalid(
                NAME,
                "chunk size",
                chunk_size,
                "not a power of two from 0x1000 to 0x1000000",
            ));
        }
        Flags(self.flags.get()).check(NAME)?;
        let entries = self.inode_table_entries.get();
        if entries == 0 || self.inodes_count.get() == 0 || self.inodes_count.get() > u64::from(entries) {
            return Err(invalid(
                NAME,
                "inode count",
                self.inodes_count.get(),
                "does not fit the inode table",
            ));
        }
        let offsets = [
            ("inode table offset", self.inode_table_offset),
            ("prefetch table offset", self.prefetch_table_offset),
            ("blob table offset", self.blob_table_offset),
            ("extended blob table offset", self.extended_blob_table_offset),
        ];
        for (field, offset) in offsets {
            if offset.get() % UNIT != 0 {
                return Err(invalid(NAME, field, offset.get(), "not a multiple of 8"));
            }
        }
        if u64::from(self.blob_table_size.get()) % UNIT != 0 {
            return Err(invalid(
                NAME,
                "blob table size",
                self.blob_table_size.get(),
                "not a multiple of 8",
            ));
        }
        Ok(())
    }
}

/// Start of an entry of the blob table; the blob id follows, then a NUL unless it is the last one.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlobEntry {
    /// Start of the compressed range to prefetch.
    pub prefetch_offset: U32,
    /// Its size in bytes; 0 when there is none.
    pub prefetch_size: U32,
}

/// Entry of the extended blob table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedBlobEntry {
    /// Chunks in the blob, whether referenced or not.
    pub chunk_count: U32,
    /// [`super::blob::Features`].
    pub features: U32,
    /// Size of the uncompressed view.
    pub uncompressed_size: U64,
    /// Size of the blob; with an inlined bootstrap, up to it.
    pub compressed_size: U64,
    /// Zero.
    pub reserved: [u8; 40],
}

/// Start of an inode record.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Inode {
    /// Digest of the content, see section 10.
    pub digest: [u8; 32],
    /// Number of the parent directory, 0 for the root.
    pub parent: U64,
    /// Inode number: the index, or the one of the first name for hardlinks.
    pub ino: U64,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Zero.
    pub projid: U32,
    /// `st_mode`.
    pub mode: U32,
    /// Bytes of a file or symlink target.
    pub size: U64,
    /// Units of 512 bytes.
    pub blocks: U64,
    /// [`InodeFlags`].
    pub flags: U64,
    /// Link count, never 0.
    pub nlink: U32,
    /// Index of the first child of a directory.
    pub child_index: U32,
    /// Children of a directory, chunk records of a file.
    pub child_count: U32,
    /// Bytes of the name.
    pub name_size: U16,
    /// Bytes of the symlink target.
    pub symlink_size: U16,
    /// Device number, low 32 bits of the Linux encoding.
    pub rdev: U32,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: U32,
    /// Seconds of the modification time, two's complement.
    pub mtime: U64,
    /// Zero.
    pub reserved: [u8; 8],
}

/// Bits of [`Inode::flags`].
pub struct InodeFlags;

impl InodeFlags {
    /// A symlink target follows the name.
    pub const SYMLINK: u64 = 1;
    /// Several names (tar builds only).
    pub const HARDLINK: u64 = 2;
    /// Extended attributes follow.
    pub const XATTR: u64 = 4;
    /// Chunk records do not cover the whole file.
    pub const HAS_HOLE: u64 = 8;
}

/// Description of a chunk: after a v5 inode, and in the chunk table of v6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkRecord {
    /// Digest of the uncompressed bytes.
    pub digest: [u8; 32],
    /// Position of the blob in the blob table.
    pub blob_index: U32,
    /// [`ChunkFlags`].
    pub flags: U32,
    /// Bytes in the blob.
    pub compressed_size: U32,
    /// Bytes in the file.
    pub uncompressed_size: U32,
    /// Offset in the blob.
    pub compressed_offset: U64,
    /// Offset in the uncompressed view.
    pub uncompressed_offset: U64,
    /// Offset in the file (v5), meaningless in v6.
    pub file_offset: U64,
    /// Number of the chunk in the blob.
    pub index: U32,
    /// CRC-32C of the uncompressed bytes, if flagged.
    pub crc32c: U32,
}

/// Bits of [`ChunkRecord::flags`].
pub struct ChunkFlags;

impl ChunkFlags {
    /// The blob's compression was applied.
    pub const COMPRESSED: u32 = 1;
    /// Reserved.
    pub const HOLE: u32 = 2;
    /// Encrypted with the blob's cipher.
    pub const ENCRYPTED: u32 = 4;
    /// Part of a batch.
    pub const BATCH: u32 = 8;
    /// The CRC field is set.
    pub const HAS_CRC32C: u32 = 0x10;
    /// All of them.
    pub const KNOWN: u32 = 0x1F;
}

const _: () = {
    assert!(size_of::<SuperBlock>() == 80);
    assert!(size_of::<BlobEntry>() == 8);
    assert!(size_of::<ExtendedBlobEntry>() == 64);
    assert!(size_of::<Inode>() == 128);
    assert!(size_of::<ChunkRecord>() == 80);
};
