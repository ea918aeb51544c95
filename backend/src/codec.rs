//! Decrypt, decompress and verify, or refuse.
//!
//! A *unit* is what is stored as one piece: a chunk, a batch of chunks, or a slice of a gzip stream. A [`Decoder`]
//! turns the stored bytes of a unit into exactly the size that the metadata promises, and [`verify`] compares each
//! chunk with its digest. Sizes come from an image and are bounded here before anything is allocated.

mod inflate;
mod xts;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::chunk::{BlobDescription, Chunk, Cipher, Compression, Digester, Encoding};
use crate::error::CodecError;

/// Largest chunk, and largest decoded batch.
pub const MAX_CHUNK: u32 = 16 << 20;
/// Largest stored range of a unit, and largest decoded slice of a gzip stream.
pub const MAX_UNIT: u32 = 32 << 20;

/// Checks a chunk's description against its blob's: every size bounded, every range inside.
pub fn check(blob: &BlobDescription, chunk: &Chunk) -> Result<(), CodecError> {
    let refuse = |what: String| Err(CodecError::Description(what));
    let size = chunk.uncompressed_size;
    if size == 0 || size > MAX_CHUNK {
        return refuse(format!("size {size} is not in 1..={MAX_CHUNK}"));
    }
    if chunk
        .uncompressed_offset
        .checked_add(size.into())
        .is_none_or(|end| end > blob.uncompressed_size)
    {
        return refuse(format!(
            "range {}+{size} lies outside of the blob's {} bytes",
            chunk.uncompressed_offset, blob.uncompressed_size
        ));
    }
    let stored = chunk.compressed_size;
    if stored == 0 || stored > MAX_UNIT {
        return refuse(format!("stored size {stored} is not in 1..={MAX_UNIT}"));
    }
    let end = chunk.compressed_offset.checked_add(stored.into());
    if end.is_none_or(|end| blob.compressed_size != 0 && end > blob.compressed_size) {
        return refuse(format!(
            "stored range {}+{stored} lies outside of the blob's {} bytes",
            chunk.compressed_offset, blob.compressed_size
        ));
    }
    if chunk.encrypted && blob.cipher.is_none() {
        return refuse("encrypted, in a blob without a cipher".into());
    }
    if chunk.digest.is_none() && chunk.crc32c.is_none() && !blob.unverifiable {
        return Err(CodecError::Unverifiable);
    }
    match &chunk.encoding {
        Encoding::Plain { compressed: false } if !chunk.encrypted && stored != size => {
            refuse(format!("stored as it is, in {stored} bytes instead of {size}"))
        }
        Encoding::Plain { .. } => Ok(()),
        Encoding::Batch { decoded_size, offset } => inside(*offset, size, *decoded_size, MAX_CHUNK),
        Encoding::Zran { context, offset } => {
            if context.bits > 7 || context.dictionary.len() > 32 << 10 {
                return refuse(format!(
                    "gzip entry point with {} bits and a window of {} bytes",
                    context.bits,
                    context.dictionary.len()
                ));
            }
            inside(*offset, size, context.decoded_size, MAX_UNIT)
        }
    }
}

fn inside(offset: u32, size: u32, decoded: u32, limit: u32) -> Result<(), CodecError> {
    if decoded > limit || offset.checked_add(size).is_none_or(|end| end > decoded) {
        return Err(CodecError::Description(format!(
            "bytes {offset}+{size} of a unit that decodes to {decoded} (at most {limit})"
        )));
    }
    Ok(())
}

/// Whether two chunks are stored in one unit.
pub fn same_unit(a: &Chunk, b: &Chunk) -> bool {
    if a.compressed_offset != b.compressed_offset || a.compressed_size != b.compressed_size {
        return false;
    }
    match (&a.encoding, &b.encoding) {
        (Encoding::Batch { decoded_size: x, .. }, Encoding::Batch { decoded_size: y, .. }) => x == y,
        (Encoding::Zran { context: x, .. }, Encoding::Zran { context: y, .. }) => x.number == y.number,
        _ => false,
    }
}

/// Decrypts a unit that is not a chunk: the chunk index of an encrypted blob comes in two of them.
pub fn decrypt(cipher: &Cipher, unit: &[u8]) -> Result<Vec<u8>, CodecError> {
    xts::decrypt(cipher, unit)
        .ok_or_else(|| CodecError::Description(format!("encrypted unit of {} bytes", unit.len())))
}

/// Where a chunk lies in its decoded unit.
pub fn slice(chunk: &Chunk, decoded: &Bytes) -> Result<Bytes, CodecError> {
    let start = match &chunk.encoding {
        Encoding::Plain { .. } => 0,
        Encoding::Batch { offset, .. } | Encoding::Zran { offset, .. } => *offset as usize,
    };
    let end = start + chunk.uncompressed_size as usize;
    if end > decoded.len() {
        return Err(CodecError::Size {
            expected: end,
            actual: decoded.len(),
        });
    }
    Ok(decoded.slice(start..end))
}

/// Compares `data` with the digest of `chunk`, or with its CRC if it has no digest.
pub fn verify(blob: &BlobDescription, chunk: &Chunk, data: &[u8]) -> Result<(), CodecError> {
    if data.len() != chunk.uncompressed_size as usize {
        return Err(CodecError::Size {
            expected: chunk.uncompressed_size as usize,
            actual: data.len(),
        });
    }
    if let Some(expected) = &chunk.digest {
        let (algorithm, matches) = match blob.digester {
            Digester::Blake3 => ("BLAKE3", blake3::hash(data).as_bytes() == expected),
            Digester::Sha256 => ("SHA-256", Sha256::digest(data).as_slice() == expected),
        };
        return if matches {
            Ok(())
        } else {
            Err(CodecError::Digest { algorithm })
        };
    }
    match chunk.crc32c {
        Some(crc) if crc32c::crc32c(data) == crc => Ok(()),
        Some(_) => Err(CodecError::Digest { algorithm: "CRC-32C" }),
        None if blob.unverifiable => Ok(()),
        None => Err(CodecError::Unverifiable),
    }
}

/// What is verified about a chunk, and where, in 32 bytes that are never all zero: two descriptions have the same stamp only
/// if they mean the same bytes, at the same place of the blob and of the cache file.
pub fn stamp(blob: &BlobDescription, chunk: &Chunk) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("rafsd chunk stamp 1");
    hasher.update(&chunk.compressed_offset.to_le_bytes());
    hasher.update(&chunk.compressed_size.to_le_bytes());
    hasher.update(&chunk.uncompressed_offset.to_le_bytes());
    hasher.update(&chunk.uncompressed_size.to_le_bytes());
    match (chunk.digest, chunk.crc32c) {
        (Some(digest), _) => hasher.update(&[1, blob.digester as u8]).update(&digest),
        (None, Some(crc)) => hasher.update(&[2]).update(&crc.to_le_bytes()),
        (None, None) => hasher.update(&[3]),
    };
    *hasher.finalize().as_bytes()
}

/// Decompressors, kept by each decode thread from unit to unit.
pub struct Decoder {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder that has not decoded yet, and holds no memory.
    pub fn new() -> Self {
        Self { zstd: None }
    }

    /// Decodes the unit that `chunk` is stored in. The description was checked by [`check`].
    pub fn decode(
        &mut self,
        blob: &BlobDescription,
        chunk: &Chunk,
        stored: Bytes,
    ) -> Result<Bytes, CodecError> {
        if stored.len() != chunk.compressed_size as usize {
            return Err(CodecError::Size {
                expected: chunk.compressed_size as usize,
                actual: stored.len(),
            });
        }
        let stored = match blob.cipher.as_ref().filter(|_| chunk.encrypted) {
            Some(cipher) => xts::decrypt(cipher, &stored)
                .ok_or_else(|| damaged("encrypted", &stored, "shorter than a block"))?
                .into(),
            None => stored,
        };
        match &chunk.encoding {
            Encoding::Plain { compressed: false } => exact(stored, chunk.uncompressed_size),
            Encoding::Plain { compressed: true } => {
                self.decompress(blob.compression, &stored, chunk.uncompressed_size)
            }
            // The stored size does not tell whether a batch is compressed if it was padded for encryption.
            Encoding::Batch { decoded_size, .. } if *decoded_size as usize == stored.len() => Ok(stored),
            Encoding::Batch { decoded_size, .. } => self.decompress(blob.compression, &stored, *decoded_size),
            Encoding::Zran { context, .. } => {
                inflate::slice(&stored, context).map_err(|reason| damaged("gzip slice", &stored, reason))
            }
        }
    }

    fn decompress(
        &mut self,
        compression: Compression,
        stored: &[u8],
        size: u32,
    ) -> Result<Bytes, CodecError> {
        let length = size as usize;
        let data: Bytes = match compression {
            Compression::None => {
                return Err(CodecError::Description(
                    "compressed, in a blob without compression".into(),
                ));
            }
            Compression::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => {
                        none.insert(zstd::bulk::Decompressor::new().map_err(|e| damaged("zstd", stored, e))?)
                    }
                };
                zstd.decompress(stored, length)
                    .map_err(|error| damaged("zstd", stored, error))?
                    .into()
            }
            Compression::Lz4Block => lz4_flex::block::decompress(stored, length)
                .map_err(|error| damaged("lz4", stored, error))?
                .into(),
            Compression::Gzip => {
                inflate::whole(stored, length).map_err(|reason| damaged("gzip", stored, reason))?
            }
        };
        exact(data, size)
    }
}

fn damaged(codec: &'static str, stored: &[u8], reason: impl std::fmt::Display) -> CodecError {
    CodecError::Damaged {
        codec,
        stored: stored.len(),
        reason: reason.to_string(),
    }
}

fn exact(data: Bytes, size: u32) -> Result<Bytes, CodecError> {
    if data.len() == size as usize {
        Ok(data)
    } else {
        Err(CodecError::Size {
            expected: size as usize,
            actual: data.len(),
        })
    }
}
