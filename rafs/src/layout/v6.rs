//! RAFS v6 bootstrap: an uncompressed, chunk-based, multi-device EROFS image with RAFS tables.
//!
//! Device 0 is the bootstrap; device `i + 1` is the uncompressed view of blob `i`.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::blob::Features;
use super::{
    Flags, Invalid, MAX_CHUNK_SIZE, MAX_CHUNKS, MIN_CHUNK_SIZE, compression_from_number,
    digester_from_number, invalid,
};

/// EROFS magic.
pub const MAGIC: u32 = 0xE0F5_E1E2;
/// RAFS version, as reported (it is not on disk).
pub const VERSION: u32 = 0x600;
/// Offset of the EROFS superblock.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Offset of the RAFS superblock.
pub const EXTENDED_SUPERBLOCK_OFFSET: u64 = 1152;
/// Offset of the device slots.
pub const DEVICE_SLOTS_OFFSET: u64 = 1408;
/// The same in units of 128 bytes, as the superblock has it.
pub const DEVICE_SLOTS_SLOT: u16 = 11;
/// Compatible feature bit of RAFS v6.
pub const FEATURE_COMPAT_RAFS: u32 = 0x4000_0000;
/// Incompatible features: CHUNKED_FILE and DEVICE_TABLE, exactly.
pub const FEATURE_INCOMPAT: u32 = 0xC;
/// Block size of everything but tarfs, as a power of two.
pub const BLOCK_BITS: u8 = 12;
/// Block size of tarfs, as a power of two.
pub const TARFS_BLOCK_BITS: u8 = 9;
/// Alignment of the tables and of the file.
pub const TABLE_ALIGNMENT: u64 = 4096;
/// Unit of node ids, in bytes.
pub const NID_UNIT: u64 = 32;
/// Most blobs of an image: a device id has 8 bits, of which 0 is the bootstrap.
pub const MAX_BLOBS: u64 = 254;
/// Largest blob.
pub const MAX_COMPRESSED_SIZE: u64 = 1 << 40;
/// Largest uncompressed view.
pub const MAX_UNCOMPRESSED_SIZE: u64 = 1 << 44;

/// EROFS superblock.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SuperBlock {
    /// [`MAGIC`].
    pub magic: U32,
    /// 0, there is none.
    pub checksum: U32,
    /// [`FEATURE_COMPAT_RAFS`] at least.
    pub feature_compat: U32,
    /// Block size as a power of two.
    pub block_bits: u8,
    /// 0.
    pub extension_slots: u8,
    /// Node id of the root, not 0.
    pub root_nid: U16,
    /// Names including the root.
    pub inodes: U64,
    /// 0.
    pub build_time: U64,
    /// 0.
    pub build_time_nsec: U32,
    /// Blocks of all devices without the bootstrap.
    pub blocks: U32,
    /// Where node id 0 is, in blocks.
    pub meta_blkaddr: U32,
    /// 0, no shared attributes.
    pub xattr_blkaddr: U32,
    /// Zero.
    pub uuid: [u8; 16],
    /// Zero.
    pub volume_name: [u8; 16],
    /// [`FEATURE_INCOMPAT`].
    pub feature_incompat: U32,
    /// 0.
    pub compression: U16,
    /// Number of blobs.
    pub extra_devices: U16,
    /// [`DEVICE_SLOTS_SLOT`].
    pub device_slots: U16,
    /// Zero.
    pub reserved: [u8; 38],
}

impl SuperBlock {
    /// Checks all that can be known without the file.
    pub fn check(&self) -> Result<(), Invalid> {
        const NAME: &str = "v6 superblock";
        if self.magic.get() != MAGIC {
            return Err(invalid(NAME, "magic", self.magic.get(), "expected 0xe0f5e1e2"));
        }
        if self.checksum.get() != 0 {
            return Err(invalid(NAME, "checksum", self.checksum.get(), "expected 0"));
        }
        if self.feature_compat.get() & FEATURE_COMPAT_RAFS == 0 {
            return Err(invalid(
                NAME,
                "feature_compat",
                self.feature_compat.get(),
                "without the RAFS v6 bit",
            ));
        }
        if ![BLOCK_BITS, TARFS_BLOCK_BITS].contains(&self.block_bits) {
            return Err(invalid(
                NAME,
                "block size bits",
                self.block_bits,
                "expected 12 or 9",
            ));
        }
        if self.extension_slots != 0 {
            return Err(invalid(
                NAME,
                "extension slots",
                self.extension_slots,
                "expected 0",
            ));
        }
        if self.root_nid.get() == 0 {
            return Err(invalid(NAME, "root nid", 0u64, "expected another"));
        }
        if self.inodes.get() == 0 {
            return Err(invalid(NAME, "inode count", 0u64, "expected at least the root"));
        }
        if self.xattr_blkaddr.get() != 0 {
            return Err(invalid(
                NAME,
                "xattr_blkaddr",
                self.xattr_blkaddr.get(),
                "expected 0",
            ));
        }
        if self.feature_incompat.get() != FEATURE_INCOMPAT {
            return Err(invalid(
                NAME,
                "feature_incompat",
                self.feature_incompat.get(),
                "expected 0xc",
            ));
        }
        if self.compression.get() != 0 {
            return Err(invalid(NAME, "compression", self.compression.get(), "expected 0"));
        }
        if u64::from(self.extra_devices.get()) > MAX_BLOBS {
            return Err(invalid(
                NAME,
                "extra devices",
                self.extra_devices.get(),
                "more than 254",
            ));
        }
        if self.device_slots.get() != DEVICE_SLOTS_SLOT {
            return Err(invalid(
                NAME,
                "device table slot",
                self.device_slots.get(),
                "expected 11",
            ));
        }
        Ok(())
    }
}

/// RAFS superblock, after the one of EROFS.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedSuperBlock {
    /// [`Flags`].
    pub flags: U64,
    /// Offset of the blob table.
    pub blob_table_offset: U64,
    /// Its size in bytes, a multiple of 256.
    pub blob_table_size: U32,
    /// Chunk size in bytes.
    pub chunk_size: U32,
    /// Offset of the chunk table.
    pub chunk_table_offset: U64,
    /// Its size in bytes, a multiple of 80.
    pub chunk_table_size: U64,
    /// Offset of the prefetch table, 0 when there is none.
    pub prefetch_table_offset: U64,
    /// Its size in bytes, a multiple of 4.
    pub prefetch_table_size: U32,
    /// 0.
    pub padding: U32,
    /// Zero.
    pub reserved: [u8; 200],
}

impl ExtendedSuperBlock {
    /// Checks all that can be known without the file.
    pub fn check(&self) -> Result<(), Invalid> {
        const NAME: &str = "v6 extended superblock";
        Flags(self.flags.get()).check(NAME)?;
        let chunk_size = self.chunk_size.get();
        if !chunk_size.is_power_of_two() || !(MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&chunk_size) {
            return Err(invalid(
                NAME,
                "chunk size",
                chunk_size,
                "not a power of two from 0x1000 to 0x1000000",
            ));
        }
        if !self.blob_table_offset.get().is_multiple_of(TABLE_ALIGNMENT) {
            return Err(invalid(
                NAME,
                "blob table offset",
                self.blob_table_offset.get(),
                "not a multiple of 4096",
            ));
        }
        if !(self.blob_table_size.get() as usize).is_multiple_of(size_of::<BlobEntry>()) {
            return Err(invalid(
                NAME,
                "blob table size",
                self.blob_table_size.get(),
                "not a multiple of 256",
            ));
        }
        if !self.chunk_table_offset.get().is_multiple_of(TABLE_ALIGNMENT) {
            return Err(invalid(
                NAME,
                "chunk table offset",
                self.chunk_table_offset.get(),
                "not a multiple of 4096",
            ));
        }
        if !self
            .chunk_table_size
            .get()
            .is_multiple_of(size_of::<super::v5::ChunkRecord>() as u64)
        {
            return Err(invalid(
                NAME,
                "chunk table size",
                self.chunk_table_size.get(),
                "not a multiple of 80",
            ));
        }
        if !self.prefetch_table_size.get().is_multiple_of(4) {
            return Err(invalid(
                NAME,
                "prefetch table size",
                self.prefetch_table_size.get(),
                "not a multiple of 4",
            ));
        }
        Ok(())
    }
}

/// Device slot of a blob.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DeviceSlot {
    /// Blob id, zero padded.
    pub tag: [u8; 64],
    /// Blocks of the uncompressed view, not 0.
    pub blocks: U32,
    /// Where it starts in the flat address space of a single-device image, in blocks.
    pub mapped_blkaddr: U32,
    /// Zero.
    pub reserved: [u8; 56],
}

/// Entry of the blob table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlobEntry {
    /// Blob id, zero padded; 64 times `x` if the bootstrap is inlined in this very blob.
    pub id: [u8; 64],
    /// Position in the table.
    pub index: U32,
    /// The superblock's chunk size.
    pub chunk_size: U32,
    /// Chunks stored in the blob.
    pub chunk_count: U32,
    /// Compression of the chunks, by number.
    pub compression: U32,
    /// Digest algorithm of the chunks, by number.
    pub digester: U32,
    /// [`Features`].
    pub features: U32,
    /// Size of the blob, see section 3 of the blob format.
    pub compressed_size: U64,
    /// Size of the uncompressed view, a multiple of 4096.
    pub uncompressed_size: U64,
    /// Size of the table of contents with its tar header; 0 if unknown.
    pub toc_size: U32,
    /// Compression of the chunk information array, by number.
    pub ci_compression: U32,
    /// Where the compressed array starts in the blob, or in the separate meta blob.
    pub ci_offset: U64,
    /// Its size as stored.
    pub ci_compressed_size: U64,
    /// Its size uncompressed, with contexts; 0 when there is none.
    pub ci_uncompressed_size: U64,
    /// SHA-256 of the table of contents with its tar header, or zero.
    pub toc_digest: [u8; 32],
    /// SHA-256 of a separate meta blob; the key of an encrypted blob.
    pub meta_digest: [u8; 32],
    /// Size of a separate meta blob; bytes 0 to 8 of the initialisation vector of an encrypted blob.
    pub meta_size: [u8; 8],
    /// Bytes 8 to 16 of that vector.
    pub cipher_iv: [u8; 8],
    /// 0 none, 1 AES-128-XTS.
    pub cipher: U32,
    /// Zero.
    pub reserved: [u8; 36],
}

/// Values of [`BlobEntry::cipher`].
pub struct CipherNumber;

impl CipherNumber {
    /// Not encrypted.
    pub const NONE: u32 = 0;
    /// AES-128-XTS.
    pub const AES_128_XTS: u32 = 1;
}

impl BlobEntry {
    /// Checks all that can be known without the blob. `index` is the position in the table, `chunk_size` the
    /// superblock's.
    pub fn check(&self, index: u32, chunk_size: u32) -> Result<(), Invalid> {
        const NAME: &str = "v6 blob table entry";
        if self.index.get() != index {
            return Err(invalid(NAME, "index", self.index.get(), "not its position"));
        }
        if self.chunk_size.get() != chunk_size {
            return Err(invalid(
                NAME,
                "chunk size",
                self.chunk_size.get(),
                "not the superblock's",
            ));
        }
        if self.chunk_count.get() > MAX_CHUNKS {
            return Err(invalid(
                NAME,
                "chunk count",
                self.chunk_count.get(),
                "more than 2^24",
            ));
        }
        if compression_from_number(self.compression.get()).is_none() {
            return Err(invalid(NAME, "compression", self.compression.get(), "unknown"));
        }
        if digester_from_number(self.digester.get()).is_none() {
            return Err(invalid(NAME, "digest algorithm", self.digester.get(), "unknown"));
        }
        let features = Features(self.features.get());
        features.check(NAME)?;
        if features.has(Features::ALIGNED) == features.has(Features::TARFS) {
            return Err(invalid(
                NAME,
                "features",
                features.0,
                "expected either ALIGNED or TARFS",
            ));
        }
        if self.compressed_size.get() > MAX_COMPRESSED_SIZE {
            return Err(invalid(
                NAME,
                "compressed size",
                self.compressed_size.get(),
                "more than 2^40",
            ));
        }
        if self.uncompressed_size.get() > MAX_UNCOMPRESSED_SIZE {
            return Err(invalid(
                NAME,
                "uncompressed size",
                self.uncompressed_size.get(),
                "more than 2^44",
            ));
        }
        let unit = if features.has(Features::TARFS) {
            1 << TARFS_BLOCK_BITS
        } else {
            1 << BLOCK_BITS
        };
        if !self.uncompressed_size.get().is_multiple_of(unit) {
            return Err(invalid(
                NAME,
                "uncompressed size",
                self.uncompressed_size.get(),
                "not whole blocks",
            ));
        }
        if self.ci_compressed_size.get() > self.ci_uncompressed_size.get() {
            return Err(invalid(
                NAME,
                "compressed size of the chunk information",
                self.ci_compressed_size.get(),
                "more than uncompressed",
            ));
        }
        if compression_from_number(self.ci_compression.get()).is_none() {
            return Err(invalid(
                NAME,
                "compression of the chunk information",
                self.ci_compression.get(),
                "unknown",
            ));
        }
        let chunks = self.chunk_count.get();
        let most = features.most_chunk_info(chunks, chunks);
        if self.ci_uncompressed_size.get() > most {
            return Err(invalid(
                NAME,
                "size of the chunk information",
                self.ci_uncompressed_size.get(),
                format!("more than the {most:#x} bytes that {chunks} chunks can fill"),
            ));
        }
        match (self.cipher.get(), features.has(Features::ENCRYPTED)) {
            (CipherNumber::NONE, false) | (CipherNumber::AES_128_XTS, true) => Ok(()),
            (cipher, _) => Err(invalid(
                NAME,
                "cipher",
                cipher,
                "unknown, or against the features",
            )),
        }
    }
}

/// Extended inode: every inode that upstream writes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedInode {
    /// [`InodeFormat`].
    pub format: U16,
    /// 0, or 1 + (size of the attribute area - 12) / 4.
    pub xattr_count: U16,
    /// `st_mode`.
    pub mode: U16,
    /// 0.
    pub reserved: U16,
    /// Bytes of the file, directory or target.
    pub size: U64,
    /// Chunk format, first data block or device number.
    pub union: U32,
    /// Sequential number from the builder.
    pub ino: U32,
    /// Owner.
    pub uid: U32,
    /// Group.
    pub gid: U32,
    /// Seconds of the modification time.
    pub mtime: U64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: U32,
    /// Link count.
    pub nlink: U32,
    /// Zero.
    pub reserved2: [u8; 16],
}

/// Compact inode: no modification time, narrow fields.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CompactInode {
    /// [`InodeFormat`].
    pub format: U16,
    /// 0, or 1 + (size of the attribute area - 12) / 4.
    pub xattr_count: U16,
    /// `st_mode`.
    pub mode: U16,
    /// Link count.
    pub nlink: U16,
    /// Bytes of the file, directory or target.
    pub size: U32,
    /// 0.
    pub reserved: U32,
    /// Chunk format, first data block or device number.
    pub union: U32,
    /// Sequential number from the builder.
    pub ino: U32,
    /// Owner.
    pub uid: U16,
    /// Group.
    pub gid: U16,
    /// 0.
    pub reserved2: U32,
}

/// Values of the format field of an inode.
pub struct InodeFormat;

impl InodeFormat {
    /// The inode is an [`ExtendedInode`].
    pub const EXTENDED: u16 = 1;
    /// How far the data layout is shifted.
    pub const LAYOUT_SHIFT: u16 = 1;
    /// Mask of the data layout, shifted.
    pub const LAYOUT_MASK: u16 = 7;
    /// Data layout: whole blocks elsewhere.
    pub const FLAT_PLAIN: u16 = 0;
    /// Data layout: whole blocks elsewhere, the rest after the inode.
    pub const FLAT_INLINE: u16 = 2;
    /// Data layout: chunk addresses after the inode.
    pub const CHUNK_BASED: u16 = 4;
    /// All bits that may be set.
    pub const KNOWN: u16 = 0xF;
    /// Bit of the union of a chunk-based inode: the chunk addresses are [`ChunkAddress`]es.
    pub const CHUNK_INDEXES: u32 = 0x20;
}

/// Element of the chunk index array of a regular file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkAddress {
    /// Bits 0 to 16 of the chunk's number in its blob.
    pub index_low: U16,
    /// Position of the blob, plus one.
    pub device: u8,
    /// Bits 16 to 24 of the chunk's number.
    pub index_high: u8,
    /// Where the chunk starts in the uncompressed view, in blocks.
    pub blkaddr: U32,
}

impl ChunkAddress {
    /// The chunk's number in its blob.
    pub fn index(&self) -> u32 {
        u32::from(self.index_high) << 16 | u32::from(self.index_low.get())
    }

    /// Position of the blob in the blob table; `None` if the device is the bootstrap.
    pub fn blob_index(&self) -> Option<usize> {
        usize::from(self.device).checked_sub(1)
    }

    /// An element for chunk `index` (24 bits) of blob `blob_index` (below [`MAX_BLOBS`]).
    pub fn new(blob_index: u8, index: u32, blkaddr: u32) -> Self {
        Self {
            index_low: U16::new(index as u16),
            device: blob_index.saturating_add(1),
            index_high: (index >> 16) as u8,
            blkaddr: U32::new(blkaddr),
        }
    }
}

/// Directory entry; the names follow the last entry of a block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Dirent {
    /// Node id of the child.
    pub nid: U64,
    /// Offset of the name from the start of the block.
    pub name_offset: U16,
    /// [`FileType`].
    pub file_type: u8,
    /// 0.
    pub reserved: u8,
}

/// Values of [`Dirent::file_type`].
pub struct FileType;

impl FileType {
    /// Regular file.
    pub const REGULAR: u8 = 1;
    /// Directory.
    pub const DIRECTORY: u8 = 2;
    /// Character device.
    pub const CHAR: u8 = 3;
    /// Block device.
    pub const BLOCK: u8 = 4;
    /// Named pipe.
    pub const FIFO: u8 = 5;
    /// Socket.
    pub const SOCKET: u8 = 6;
    /// Symbolic link.
    pub const SYMLINK: u8 = 7;
}

/// Start of the attribute area of an inode; [`XattrEntry`]s follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrHeader {
    /// 0.
    pub reserved: U32,
    /// 0, no shared attributes.
    pub shared_count: u8,
    /// Zero.
    pub reserved2: [u8; 7],
}

/// Extended attribute; name suffix and value follow, then zeros up to a multiple of 4 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    /// Bytes of the name without its prefix.
    pub name_len: u8,
    /// Which prefix, see [`XATTR_PREFIXES`].
    pub name_index: u8,
    /// Bytes of the value.
    pub value_size: U16,
}

/// Prefixes of attribute names by number. The two ACL names are complete: their suffix is empty.
pub const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

const _: () = {
    assert!(size_of::<SuperBlock>() == 128);
    assert!(size_of::<ExtendedSuperBlock>() == 256);
    assert!(size_of::<DeviceSlot>() == 128);
    assert!(size_of::<BlobEntry>() == 256);
    assert!(size_of::<ExtendedInode>() == 64);
    assert!(size_of::<CompactInode>() == 32);
    assert!(size_of::<ChunkAddress>() == 8);
    assert!(size_of::<Dirent>() == 12);
    assert!(size_of::<XattrHeader>() == 12);
    assert!(size_of::<XattrEntry>() == 4);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_address_keeps_24_bits_of_the_index() {
        let address = ChunkAddress::new(253, 0xAB_CDEF, 0x1234_5678);
        assert_eq!(
            address.as_bytes(),
            [0xEF, 0xCD, 254, 0xAB, 0x78, 0x56, 0x34, 0x12]
        );
        assert_eq!(address.index(), 0xAB_CDEF);
        assert_eq!(address.blob_index(), Some(253));
    }
}
