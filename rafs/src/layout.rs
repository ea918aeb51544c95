//! What is on disk: structures, constants and the checks that one field allows by itself.
//!
//! Everything is little-endian and unaligned, so a structure can be borrowed from any offset of a mapped file.
//! There is no logic here: reading is in the rooms above, writing in `build`.
//!
//! * [`v5`]: RAFS v5 bootstrap, and the chunk record that v6 uses too.
//! * [`v6`]: RAFS v6 bootstrap, an EROFS image with additional tables.
//! * [`blob`]: what surrounds the chunks in a blob: chunk information, contexts, tar headers, table of contents.

pub mod blob;
pub mod v5;
pub mod v6;

use std::borrow::Cow;

use backend::chunk::{Compression, Digester};

/// Smallest chunk size of an image, in bytes.
pub const MIN_CHUNK_SIZE: u32 = 0x1000;
/// Largest chunk size of an image, in bytes.
pub const MAX_CHUNK_SIZE: u32 = 0x100_0000;
/// Most chunks that a blob can have: chunk indexes have 24 bits.
pub const MAX_CHUNKS: u32 = 1 << 24;
/// Longest name of a directory entry, in bytes.
pub const MAX_NAME: usize = 255;
/// Longest symlink target, in bytes.
pub const MAX_SYMLINK: u64 = 4096;

/// A field has a value that the format does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{structure}: {field} is {value:#x}, {reason}")]
pub struct Invalid {
    /// The structure.
    pub structure: &'static str,
    /// The field.
    pub field: &'static str,
    /// Its value.
    pub value: u64,
    /// What is wrong with it.
    pub reason: Cow<'static, str>,
}

/// Builds the error of a field check.
pub(crate) fn invalid(
    structure: &'static str,
    field: &'static str,
    value: impl Into<u64>,
    reason: impl Into<Cow<'static, str>>,
) -> Invalid {
    Invalid {
        structure,
        field,
        value: value.into(),
        reason: reason.into(),
    }
}

/// Flags of a superblock; the same bits in v5 and v6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(pub u64);

impl Flags {
    /// Chunks are not compressed.
    pub const COMPRESSION_NONE: u64 = 0x1;
    /// Chunks are LZ4 blocks.
    pub const COMPRESSION_LZ4: u64 = 0x2;
    /// Digests are BLAKE3.
    pub const HASH_BLAKE3: u64 = 0x4;
    /// Digests are SHA-256.
    pub const HASH_SHA256: u64 = 0x8;
    /// Owners are stored; otherwise every owner field is 0.
    pub const EXPLICIT_UID_GID: u64 = 0x10;
    /// At least one inode has extended attributes.
    pub const HAS_XATTR: u64 = 0x20;
    /// Chunks are gzip streams.
    pub const COMPRESSION_GZIP: u64 = 0x40;
    /// Chunks are zstd frames.
    pub const COMPRESSION_ZSTD: u64 = 0x80;
    /// All blobs carry their digest array (v6).
    pub const INLINED_CHUNK_DIGEST: u64 = 0x100;
    /// 512-byte blocks over a tar (v6).
    pub const TARFS_MODE: u64 = 0x200;
    /// Not encrypted (v6).
    pub const ENCRYPTION_NONE: u64 = 0x0100_0000;
    /// AES-128-XTS (v6).
    pub const ENCRYPTION_AES_128_XTS: u64 = 0x0200_0000;
    /// Accepted without meaning.
    pub const RESERVED_COMPATIBLE: u64 = 0xFC00_0000;
    /// All bits that do not make an image invalid.
    pub const KNOWN: u64 =
        0x3FF | Self::ENCRYPTION_NONE | Self::ENCRYPTION_AES_128_XTS | Self::RESERVED_COMPATIBLE;

    /// Whether every bit of `bits` is set.
    pub fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// No unknown bit, at most one compression, hash and encryption bit.
    pub fn check(self, structure: &'static str) -> Result<(), Invalid> {
        let at_most_one = |mask: u64| (self.0 & mask).count_ones() <= 1;
        if self.0 & !Self::KNOWN != 0 {
            return Err(invalid(structure, "flags", self.0, "which has unknown bits"));
        }
        let compression =
            Self::COMPRESSION_NONE | Self::COMPRESSION_LZ4 | Self::COMPRESSION_GZIP | Self::COMPRESSION_ZSTD;
        if !at_most_one(compression) {
            return Err(invalid(
                structure,
                "flags",
                self.0,
                "which names more than one compression",
            ));
        }
        if !at_most_one(Self::HASH_BLAKE3 | Self::HASH_SHA256) {
            return Err(invalid(
                structure,
                "flags",
                self.0,
                "which names more than one digest algorithm",
            ));
        }
        if !at_most_one(Self::ENCRYPTION_NONE | Self::ENCRYPTION_AES_128_XTS) {
            return Err(invalid(
                structure,
                "flags",
                self.0,
                "which is both encrypted and not",
            ));
        }
        Ok(())
    }

    /// Compression of the image; LZ4 when no bit says (v5 section 3).
    pub fn compression(self) -> Compression {
        if self.has(Self::COMPRESSION_ZSTD) {
            Compression::Zstd
        } else if self.has(Self::COMPRESSION_GZIP) {
            Compression::Gzip
        } else if self.has(Self::COMPRESSION_NONE) {
            Compression::None
        } else {
            Compression::Lz4Block
        }
    }

    /// Digest algorithm of the image; BLAKE3 when no bit says (v5 section 3).
    pub fn digester(self) -> Digester {
        if self.has(Self::HASH_SHA256) {
            Digester::Sha256
        } else {
            Digester::Blake3
        }
    }

    /// Names of the bits that are set, lowest first.
    pub fn names(self) -> Vec<&'static str> {
        const NAMES: [(u64, &str); 12] = [
            (Flags::COMPRESSION_NONE, "COMPRESSION_NONE"),
            (Flags::COMPRESSION_LZ4, "COMPRESSION_LZ4"),
            (Flags::HASH_BLAKE3, "HASH_BLAKE3"),
            (Flags::HASH_SHA256, "HASH_SHA256"),
            (Flags::EXPLICIT_UID_GID, "EXPLICIT_UID_GID"),
            (Flags::HAS_XATTR, "HAS_XATTR"),
            (Flags::COMPRESSION_GZIP, "COMPRESSION_GZIP"),
            (Flags::COMPRESSION_ZSTD, "COMPRESSION_ZSTD"),
            (Flags::INLINED_CHUNK_DIGEST, "INLINED_CHUNK_DIGEST"),
            (Flags::TARFS_MODE, "TARFS_MODE"),
            (Flags::ENCRYPTION_NONE, "ENCRYPTION_NONE"),
            (Flags::ENCRYPTION_AES_128_XTS, "ENCRYPTION_AES_128_XTS"),
        ];
        NAMES
            .iter()
            .filter(|(bit, _)| self.has(*bit))
            .map(|(_, name)| *name)
            .collect()
    }
}

/// Number of a compression in a v6 blob table and in a chunk information header.
pub fn compression_number(compression: Compression) -> u32 {
    match compression {
        Compression::None => 0,
        Compression::Lz4Block => 1,
        Compression::Gzip => 2,
        Compression::Zstd => 3,
    }
}

/// The compression that a number stands for.
pub fn compression_from_number(number: u32) -> Option<Compression> {
    match number {
        0 => Some(Compression::None),
        1 => Some(Compression::Lz4Block),
        2 => Some(Compression::Gzip),
        3 => Some(Compression::Zstd),
        _ => None,
    }
}

/// Number of a digest algorithm in a v6 blob table.
pub fn digester_number(digester: Digester) -> u32 {
    match digester {
        Digester::Blake3 => 0,
        Digester::Sha256 => 1,
    }
}

/// The digest algorithm that a number stands for.
pub fn digester_from_number(number: u32) -> Option<Digester> {
    match number {
        0 => Some(Digester::Blake3),
        1 => Some(Digester::Sha256),
        _ => None,
    }
}

/// Rounds up to a multiple of `unit`, a power of two; `None` on overflow.
pub fn align_up(value: u64, unit: u64) -> Option<u64> {
    Some(value.checked_add(unit.checked_sub(1)?)? & !(unit - 1))
}

/// A zero-padded text field, without its padding.
pub fn trim_zeros(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    field.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_name_one_compression_or_are_refused() {
        assert!(Flags(0x1).check("x").is_ok());
        assert!(Flags(0).check("x").is_ok());
        assert!(Flags(0x3).check("x").is_err());
        assert!(Flags(0xC).check("x").is_err());
        assert!(Flags(0x400).check("x").is_err());
        assert!(Flags(0x0400_0000 | 0x81).check("x").is_err());
        assert!(Flags(0x0400_0000 | 0x84).check("x").is_ok());
        assert_eq!(Flags(0).compression(), Compression::Lz4Block);
        assert_eq!(Flags(0).digester(), Digester::Blake3);
    }

    #[test]
    fn rounding_up_does_not_wrap() {
        assert_eq!(align_up(0, 8), Some(0));
        assert_eq!(align_up(9, 8), Some(16));
        assert_eq!(align_up(u64::MAX, 8), None);
    }
}
