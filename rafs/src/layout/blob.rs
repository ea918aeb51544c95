//! What surrounds the chunks in a blob: chunk information (blob.meta), contexts, tar headers, table of contents.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Invalid, invalid};

/// Feature bits of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u32);

impl Features {
    /// Chunks start at multiples of 4096 in the uncompressed view.
    pub const ALIGNED: u32 = 0x1;
    /// The bootstrap is inside this blob.
    pub const INLINED_FS_META: u32 = 0x2;
    /// 24-byte chunk information.
    pub const CHUNK_INFO_V2: u32 = 0x4;
    /// The data blob is a gzip stream with entry points.
    pub const ZRAN: u32 = 0x8;
    /// Data and chunk information are in two blobs.
    pub const SEPARATE: u32 = 0x10;
    /// A digest array is present.
    pub const INLINED_CHUNK_DIGEST: u32 = 0x20;
    /// The data blob is a tar, in 512-byte blocks, without chunk information.
    pub const TARFS: u32 = 0x40;
    /// Small chunks are compressed together.
    pub const BATCH: u32 = 0x80;
    /// Encrypted.
    pub const ENCRYPTED: u32 = 0x100;
    /// Made for chunk dictionaries.
    pub const CHUNKDICT_GENERATED: u32 = 0x200;
    /// Holds the prefetched files of another image.
    pub const SEPARATED_PREFETCH_FILES: u32 = 0x400;
    /// The data are somewhere else.
    pub const EXTERNAL: u32 = 0x800;
    /// Sections are followed by tar headers.
    pub const HAS_TAR_HEADER: u32 = 0x1000_0000;
    /// There is a table of contents.
    pub const HAS_TOC: u32 = 0x2000_0000;
    /// Made by a tool that knows tar headers.
    pub const CAP_TAR_TOC: u32 = 0x4000_0000;
    /// Bits that make an image unreadable.
    pub const REFUSED: u32 = 0x8000_F000;

    /// Whether every bit of `bits` is set.
    pub fn has(self, bits: u32) -> bool {
        self.0 & bits == bits
    }

    /// No unknown bit among those that matter, no contradiction.
    pub fn check(self, structure: &'static str) -> Result<(), Invalid> {
        if self.0 & Self::REFUSED != 0 {
            return Err(invalid(structure, "features", self.0, "which has unknown bits"));
        }
        let needs_v2 = self.0 & (Self::ZRAN | Self::BATCH | Self::ENCRYPTED) != 0;
        if needs_v2 && !self.has(Self::CHUNK_INFO_V2) {
            return Err(invalid(
                structure,
                "features",
                self.0,
                "which needs chunk information v2",
            ));
        }
        if self.has(Self::ZRAN | Self::BATCH) {
            return Err(invalid(
                structure,
                "features",
                self.0,
                "which is both zran and batch",
            ));
        }
        Ok(())
    }

    /// Whether chunks can only be found with contexts: those of batches or of slices of a gzip stream.
    pub fn need_contexts(self) -> bool {
        self.0 & (Self::BATCH | Self::ZRAN) != 0
    }

    /// Most bytes of chunk information, uncompressed, that `chunks` chunks and `contexts` contexts can fill.
    pub fn most_chunk_info(self, chunks: u32, contexts: u32) -> u64 {
        let chunk = if self.has(Self::CHUNK_INFO_V2) {
            size_of::<ChunkInfoV2>()
        } else {
            size_of::<ChunkInfoV1>()
        };
        let context = if self.has(Self::ZRAN) {
            size_of::<ZranContext>() + MAX_DICTIONARY as usize
        } else if self.has(Self::BATCH) {
            size_of::<BatchContext>()
        } else {
            0
        };
        u64::from(chunks) * chunk as u64 + u64::from(contexts) * context as u64
    }

    /// Names of the bits that are set, lowest first.
    pub fn names(self) -> Vec<&'static str> {
        const NAMES: [(u32, &str); 15] = [
            (Features::ALIGNED, "ALIGNED"),
            (Features::INLINED_FS_META, "INLINED_FS_META"),
            (Features::CHUNK_INFO_V2, "CHUNK_INFO_V2"),
            (Features::ZRAN, "ZRAN"),
            (Features::SEPARATE, "SEPARATE"),
            (Features::INLINED_CHUNK_DIGEST, "INLINED_CHUNK_DIGEST"),
            (Features::TARFS, "TARFS"),
            (Features::BATCH, "BATCH"),
            (Features::ENCRYPTED, "ENCRYPTED"),
            (Features::CHUNKDICT_GENERATED, "CHUNKDICT_GENERATED"),
            (Features::SEPARATED_PREFETCH_FILES, "SEPARATED_PREFETCH_FILES"),
            (Features::EXTERNAL, "EXTERNAL"),
            (Features::HAS_TAR_HEADER, "HAS_TAR_HEADER"),
            (Features::HAS_TOC, "HAS_TOC"),
            (Features::CAP_TAR_TOC, "CAP_TAR_TOC"),
        ];
        NAMES
            .iter()
            .filter(|(bit, _)| self.has(*bit))
            .map(|(_, name)| *name)
            .collect()
    }
}

/// First and last word of a [`ChunkInfoHeader`].
pub const CHUNK_INFO_MAGIC: u32 = 0xB10B_B10B;

/// Header behind the chunk information array, 4096 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkInfoHeader {
    /// [`CHUNK_INFO_MAGIC`].
    pub magic: U32,
    /// [`Features`].
    pub features: U32,
    /// Compression of the array, by number.
    pub compression: U32,
    /// Number of chunks.
    pub entries: U32,
    /// Where the compressed array starts in this file.
    pub offset: U64,
    /// Its size as stored.
    pub compressed_size: U64,
    /// Its size uncompressed, with contexts and dictionaries.
    pub uncompressed_size: U64,
    /// Where the contexts start in the uncompressed array; 0 if there are none.
    pub context_offset: U64,
    /// Bytes of contexts and dictionaries.
    pub context_size: U64,
    /// Number of contexts.
    pub context_count: U32,
    /// Zero.
    pub reserved: [u8; 4032],
    /// [`CHUNK_INFO_MAGIC`].
    pub magic2: U32,
}

/// Chunk information, version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkInfoV1 {
    /// Packed: bits 8..12 and 44..64 of the size - 1, uncompressed offset without its low 12 bits.
    pub uncompressed: U64,
    /// Packed: compressed offset, bits 40..44 and 44..64 of the size - 1.
    pub compressed: U64,
}

impl ChunkInfoV1 {
    /// Packs the four values. Sizes are from 1 to 16 MiB, offsets below 2^44 (a multiple of 4096) and 2^40.
    pub fn new(
        uncompressed_offset: u64,
        uncompressed_size: u32,
        compressed_offset: u64,
        compressed_size: u32,
    ) -> Self {
        let uncompressed = u64::from(uncompressed_size.saturating_sub(1));
        let compressed = u64::from(compressed_size.saturating_sub(1));
        Self {
            uncompressed: U64::new(
                (uncompressed & 0xF_FFFF) << 44
                    | uncompressed_offset & 0xFFF_FFFF_F000
                    | (uncompressed >> 20 & 0xF) << 8,
            ),
            compressed: U64::new(
                (compressed & 0xF_FFFF) << 44
                    | (compressed >> 20 & 0xF) << 40
                    | compressed_offset & 0xFF_FFFF_FFFF,
            ),
        }
    }

    /// Offset in the uncompressed view.
    pub fn uncompressed_offset(&self) -> u64 {
        self.uncompressed.get() & 0xFFF_FFFF_F000
    }

    /// Bytes there.
    pub fn uncompressed_size(&self) -> u32 {
        let word = self.uncompressed.get();
        ((word >> 8 & 0xF) << 20 | word >> 44) as u32 + 1
    }

    /// Offset in the blob.
    pub fn compressed_offset(&self) -> u64 {
        self.compressed.get() & 0xFF_FFFF_FFFF
    }

    /// Bytes there.
    pub fn compressed_size(&self) -> u32 {
        let word = self.compressed.get();
        ((word >> 40 & 0xF) << 20 | word >> 44) as u32 + 1
    }
}

/// Chunk information, version 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkInfoV2 {
    /// Packed: uncompressed offset in units of 4096, size - 1, flags.
    pub uncompressed: U64,
    /// Packed: compressed offset, size.
    pub compressed: U64,
    /// Context number and offset, or CRC-32C.
    pub data: U64,
}

impl ChunkInfoV2 {
    /// Compressed.
    pub const COMPRESSED: u8 = 1;
    /// In a slice of a gzip stream.
    pub const ZRAN: u8 = 2;
    /// In a batch.
    pub const BATCH: u8 = 4;
    /// Encrypted.
    pub const ENCRYPTED: u8 = 8;
    /// `data` has a CRC-32C.
    pub const HAS_CRC32C: u8 = 0x10;
    /// All of them.
    pub const KNOWN: u8 = 0x1F;

    /// Packs the values. Sizes are at most 16 MiB, offsets below 2^44 (a multiple of 4096) and 2^40.
    pub fn new(
        uncompressed_offset: u64,
        uncompressed_size: u32,
        compressed_offset: u64,
        compressed_size: u32,
        flags: u8,
        data: u64,
    ) -> Self {
        let size = u64::from(uncompressed_size.saturating_sub(1));
        Self {
            uncompressed: U64::new(
                u64::from(flags) << 56 | (size & 0xFF_FFFF) << 32 | uncompressed_offset >> 12 & 0xFFFF_FFFF,
            ),
            compressed: U64::new(
                (u64::from(compressed_size) & 0xFF_FFFF) << 40 | compressed_offset & 0xFF_FFFF_FFFF,
            ),
            data: U64::new(data),
        }
    }

    /// Offset in the uncompressed view.
    pub fn uncompressed_offset(&self) -> u64 {
        (self.uncompressed.get() & 0xFFFF_FFFF) << 12
    }

    /// Bytes there.
    pub fn uncompressed_size(&self) -> u32 {
        (self.uncompressed.get() >> 32 & 0xFF_FFFF) as u32 + 1
    }

    /// The flag byte.
    pub fn flags(&self) -> u8 {
        (self.uncompressed.get() >> 56) as u8
    }

    /// Offset in the blob.
    pub fn compressed_offset(&self) -> u64 {
        self.compressed.get() & 0xFF_FFFF_FFFF
    }

    /// Bytes there; 0 for members of a batch.
    pub fn compressed_size(&self) -> u32 {
        (self.compressed.get() >> 40) as u32
    }

    /// Number of the batch or slice.
    pub fn context(&self) -> u32 {
        (self.data.get() >> 32) as u32
    }

    /// Where the chunk starts in the decoded batch or slice.
    pub fn context_offset(&self) -> u32 {
        self.data.get() as u32
    }

    /// CRC-32C, if flagged.
    pub fn crc32c(&self) -> Option<u32> {
        (self.flags() & Self::HAS_CRC32C != 0).then_some(self.data.get() as u32)
    }
}

/// Batch of chunks that are compressed together.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BatchContext {
    /// Bytes as stored.
    pub compressed_size: U32,
    /// Bytes decoded.
    pub uncompressed_size: U32,
    /// Zero.
    pub reserved: [u8; 32],
}

/// Entry point into a gzip stream.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ZranContext {
    /// First byte of the slice in the gzip file.
    pub in_offset: U64,
    /// Position in the decompressed stream.
    pub out_offset: U64,
    /// Offset in the dictionary area behind the contexts.
    pub dictionary_offset: U64,
    /// Bytes of the slice.
    pub in_size: U32,
    /// Bytes that it decodes to.
    pub out_size: U32,
    /// Bytes of the dictionary, at most 32768.
    pub dictionary_size: U32,
    /// The byte before the slice.
    pub byte: u8,
    /// How many of its high bits belong to the stream, 0 to 7.
    pub bits: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// Most bytes of a dictionary: the window of deflate.
pub const MAX_DICTIONARY: u32 = 32768;

/// Names of the sections of a blob.
pub struct Section;

impl Section {
    /// Chunk data.
    pub const BLOB: &'static [u8] = b"image.blob";
    /// Chunk information array and header.
    pub const META: &'static [u8] = b"blob.meta";
    /// Header of the chunk information, in a table of contents.
    pub const META_HEADER: &'static [u8] = b"blob.meta.header";
    /// Digest array.
    pub const DIGEST: &'static [u8] = b"blob.digest";
    /// Bootstrap.
    pub const BOOTSTRAP: &'static [u8] = b"image.boot";
    /// Table of contents.
    pub const TOC: &'static [u8] = b"rafs.blob.toc";
}

/// Entry of the table of contents.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TocEntry {
    /// Low 4 bits: 1 none, 2 zstd, 4 LZ4.
    pub flags: U32,
    /// 0.
    pub reserved: U32,
    /// Name of the section, zero padded.
    pub name: [u8; 16],
    /// SHA-256 of the uncompressed, unencrypted content.
    pub digest: [u8; 32],
    /// Where it starts in the file.
    pub compressed_offset: U64,
    /// Bytes as stored.
    pub compressed_size: U64,
    /// Bytes uncompressed.
    pub uncompressed_size: U64,
    /// Zero.
    pub reserved2: [u8; 48],
}

impl TocEntry {
    /// Stored as it is.
    pub const NONE: u32 = 1;
    /// One zstd frame.
    pub const ZSTD: u32 = 2;
    /// One LZ4 block.
    pub const LZ4: u32 = 4;
    /// Mask of the above.
    pub const COMPRESSION_MASK: u32 = 0xF;
}

/// Size of a tar header, in bytes.
pub const TAR_HEADER_SIZE: u64 = 512;

/// GNU tar header, behind the section that it names.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TarHeader {
    /// Name, zero padded.
    pub name: [u8; 100],
    /// Octal mode.
    pub mode: [u8; 8],
    /// Octal owner.
    pub uid: [u8; 8],
    /// Octal group.
    pub gid: [u8; 8],
    /// Octal size, 11 digits and NUL.
    pub size: [u8; 12],
    /// Octal modification time.
    pub mtime: [u8; 12],
    /// Octal sum of all bytes of the header, this field counted as spaces.
    pub checksum: [u8; 8],
    /// `0`.
    pub kind: u8,
    /// Zero.
    pub link_name: [u8; 100],
    /// [`TAR_MAGIC`].
    pub magic: [u8; 8],
    /// Zero.
    pub rest: [u8; 247],
}

/// Magic and version of a GNU tar header.
pub const TAR_MAGIC: [u8; 8] = *b"ustar  \0";

impl TarHeader {
    /// Size of the section before this header; `None` if this is no tar header.
    pub fn section_size(&self) -> Option<u64> {
        if self.magic != TAR_MAGIC {
            return None;
        }
        let digits = super::trim_zeros(&self.size);
        if digits.is_empty() {
            return None;
        }
        digits.iter().try_fold(0u64, |value, digit| match digit {
            b'0'..=b'7' => Some(value << 3 | u64::from(digit - b'0')),
            _ => None,
        })
    }

    /// Name of the section.
    pub fn section_name(&self) -> &[u8] {
        super::trim_zeros(&self.name)
    }
}

const _: () = {
    assert!(size_of::<ChunkInfoHeader>() == 4096);
    assert!(size_of::<ChunkInfoV1>() == 16);
    assert!(size_of::<ChunkInfoV2>() == 24);
    assert!(size_of::<BatchContext>() == 40);
    assert!(size_of::<ZranContext>() == 40);
    assert!(size_of::<TocEntry>() == 128);
    assert!(size_of::<TarHeader>() == TAR_HEADER_SIZE as usize);
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunk_information_v1_keeps_what_it_is_given(
            offset in 0u64..1 << 32, size in 1u32..=1 << 24, compressed in 0u64..1 << 40, stored in 1u32..=1 << 24,
        ) {
            let info = ChunkInfoV1::new(offset << 12, size, compressed, stored);
            prop_assert_eq!(info.uncompressed_offset(), offset << 12);
            prop_assert_eq!(info.uncompressed_size(), size);
            prop_assert_eq!(info.compressed_offset(), compressed);
            prop_assert_eq!(info.compressed_size(), stored);
        }

        #[test]
        fn chunk_information_v2_keeps_what_it_is_given(
            offset in 0u64..1 << 32, size in 1u32..=1 << 24, compressed in 0u64..1 << 40, stored in 0u32..1 << 24,
            flags in 0u8..0x20, data: u64,
        ) {
            let info = ChunkInfoV2::new(offset << 12, size, compressed, stored, flags, data);
            prop_assert_eq!(info.uncompressed_offset(), offset << 12);
            prop_assert_eq!(info.uncompressed_size(), size);
            prop_assert_eq!(info.compressed_offset(), compressed);
            prop_assert_eq!(info.compressed_size(), stored);
            prop_assert_eq!(info.flags(), flags);
            prop_assert_eq!(info.data.get(), data);
        }
    }

    #[test]
    fn a_tar_header_tells_the_size_of_what_precedes_it() {
        let mut header = TarHeader::read_from_bytes(&[0; 512]).unwrap();
        assert_eq!(header.section_size(), None);
        header.magic = TAR_MAGIC;
        header.size = *b"00000001750\0";
        header.name[..10].copy_from_slice(Section::BOOTSTRAP);
        assert_eq!(header.section_size(), Some(1000));
        assert_eq!(header.section_name(), Section::BOOTSTRAP);
        header.size[3] = b'8';
        assert_eq!(header.section_size(), None);
    }
}
