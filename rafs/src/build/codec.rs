//! Digest and compression of one chunk.

use backend::chunk::{Compression, Digester};
use sha2::Digest;

use super::error::BuildError;

/// Digest of a chunk's uncompressed bytes.
pub(super) fn digest(digester: Digester, data: &[u8]) -> [u8; 32] {
    match digester {
        Digester::Blake3 => *blake3::hash(data).as_bytes(),
        Digester::Sha256 => sha2::Sha256::digest(data).into(),
    }
}

/// A compressor that can be used again and again, by one thread.
pub(super) enum Packer {
    /// Stores everything as it is.
    None,
    /// Raw LZ4 blocks.
    Lz4,
    /// One zstd frame with content size per chunk.
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Packer {
    /// `level` is only used by zstd.
    pub(super) fn new(compression: Compression, level: i32) -> Result<Self, BuildError> {
        Ok(match compression {
            Compression::None => Self::None,
            Compression::Lz4Block => Self::Lz4,
            Compression::Zstd => {
                Self::Zstd(
                    zstd::bulk::Compressor::new(level).map_err(|e| BuildError::Compressor {
                        compressor: "zstd",
                        reason: format!("level {level}: {e}"),
                    })?,
                )
            }
            Compression::Gzip => {
                return Err(BuildError::Options(
                    "images are not built with gzip; use zstd, lz4_block or none".into(),
                ));
            }
        })
    }

    /// Compresses `data` into `packed`. False, if that would not make it smaller: it is stored as it is then
    /// and `packed` means nothing.
    pub(super) fn pack(&mut self, data: &[u8], packed: &mut Vec<u8>) -> Result<bool, BuildError> {
        match self {
            Self::None => Ok(false),
            Self::Lz4 => {
                packed.resize(lz4_flex::block::get_maximum_output_size(data.len()), 0);
                let size =
                    lz4_flex::block::compress_into(data, packed).map_err(|e| BuildError::Compressor {
                        compressor: "lz4",
                        reason: e.to_string(),
                    })?;
                packed.truncate(size);
                Ok(size < data.len())
            }
            Self::Zstd(compressor) => {
                packed.clear();
                packed.reserve(zstd::zstd_safe::compress_bound(data.len()));
                let size =
                    compressor
                        .compress_to_buffer(data, packed)
                        .map_err(|e| BuildError::Compressor {
                            compressor: "zstd",
                            reason: e.to_string(),
                        })?;
                Ok(size < data.len())
            }
        }
    }
}
