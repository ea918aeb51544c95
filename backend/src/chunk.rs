//! What a blob and a chunk are, as an image's metadata describes them.

use std::sync::Arc;

use bytes::Bytes;

/// Compression of a blob's chunks (blob table, `compression_algo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Stored as they are.
    None,
    /// One raw LZ4 block per chunk, no frame, no length.
    Lz4Block,
    /// A gzip stream.
    Gzip,
    /// One zstd frame per chunk.
    Zstd,
}

/// Digest algorithm of a blob's chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Digester {
    /// BLAKE3, 32 bytes.
    Blake3,
    /// SHA-256, 32 bytes.
    Sha256,
}

/// Key and initialisation vector of an AES-128-XTS encrypted blob.
#[derive(Clone, PartialEq, Eq)]
pub struct Cipher {
    /// Data key (16 bytes), then tweak key (16 bytes).
    pub key: [u8; 32],
    /// Initialisation vector, the same for every unit.
    pub iv: [u8; 16],
}

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cipher(AES-128-XTS, key hidden)")
    }
}

/// How the decoded bytes of a chunk are made of its compressed range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The range holds this chunk alone.
    Plain {
        /// Whether the blob's compression was applied to it.
        compressed: bool,
    },
    /// The range holds a batch; the chunk is a slice of what it decodes to.
    Batch {
        /// Bytes that the batch decodes to. The batch is compressed iff this differs from the stored size.
        decoded_size: u32,
        /// Where the chunk starts in them.
        offset: u32,
    },
    /// The range is a slice of a gzip stream, entered in the middle.
    Zran {
        /// How to enter it.
        context: Arc<ZranContext>,
        /// Where the chunk starts in the decoded slice.
        offset: u32,
    },
}

/// Entry point into a gzip stream (blob format, section 6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZranContext {
    /// Number in the blob's context table; chunks of one number share one decoded slice.
    pub number: u32,
    /// Bytes that the slice decodes to.
    pub decoded_size: u32,
    /// Number (0..8) of high bits of `byte` that belong to the stream.
    pub bits: u8,
    /// The byte before the slice.
    pub byte: u8,
    /// Window to start with, at most 32 KiB. Slices may share one.
    pub dictionary: Bytes,
}

/// One chunk of a blob. Sizes and offsets are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Number in the blob, and in its residency map.
    pub index: u32,
    /// Where its compressed range starts in the blob. For batch and zran: where the batch or slice starts.
    pub compressed_offset: u64,
    /// Size of the compressed range.
    pub compressed_size: u32,
    /// Where it starts in the uncompressed view, that is in the cache file.
    pub uncompressed_offset: u64,
    /// Its size there, 1 to 16 MiB.
    pub uncompressed_size: u32,
    /// How to decode the range.
    pub encoding: Encoding,
    /// Whether the range is encrypted with the blob's cipher.
    pub encrypted: bool,
    /// Digest of the uncompressed bytes by the blob's digester. Without one and without a CRC
    /// the chunk is only accepted from a blob that says so (`BlobDescription::unverifiable`).
    pub digest: Option<[u8; 32]>,
    /// CRC-32C of the uncompressed bytes.
    pub crc32c: Option<u32>,
}

/// A part of a blob that holds its chunk index (blob.meta), to be read before chunks can be described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexRange {
    /// Blob that holds it; the data blob itself, or its separate meta blob.
    pub blob_id: String,
    /// Where it starts there.
    pub offset: u64,
    /// Its size.
    pub size: u32,
}

/// The index of a blob's chunks is damaged, or contradicts the bootstrap.
#[derive(Clone, Debug, thiserror::Error)]
#[error("chunk index of blob {blob_id}: {reason}")]
pub struct IndexError {
    /// The blob.
    pub blob_id: String,
    /// What is wrong, with offsets and values.
    pub reason: String,
}

/// Describes the chunks of one blob. Implemented over the image's metadata. May take a while the
/// first time; called by fetch threads only, never by a queue thread.
pub trait ChunkIndex: Send + Sync {
    /// What must be read from the source before [`ChunkIndex::chunk`] can answer;
    /// `None` when nothing is (any more) missing.
    fn wanted(&self) -> Option<IndexRange>;

    /// Takes the bytes of [`ChunkIndex::wanted`], as stored. Checks them.
    fn supply(&self, bytes: &[u8]) -> Result<(), IndexError>;

    /// Describes chunk `index`; an error if there is none, or if it makes no sense.
    fn chunk(&self, index: u32) -> Result<Chunk, IndexError>;
}

/// All that the store must know of a blob.
#[derive(Clone)]
pub struct BlobDescription {
    /// Name at the source: normally the hexadecimal sha256 of the blob.
    pub id: String,
    /// Size at the source, as far as chunk data goes; no range request goes beyond it. 0 if unknown.
    pub compressed_size: u64,
    /// Size of the uncompressed view, that is of the cache file.
    pub uncompressed_size: u64,
    /// Number of chunks, that is of bits in the residency map.
    pub chunk_count: u32,
    /// Compression of its chunks.
    pub compression: Compression,
    /// Digest algorithm of its chunks.
    pub digester: Digester,
    /// Cipher, if the blob is encrypted.
    pub cipher: Option<Cipher>,
    /// The image format defines no digests for this blob (tarfs); fetched bytes are taken as they come.
    pub unverifiable: bool,
    /// Describes the chunks.
    pub index: Arc<dyn ChunkIndex>,
}
