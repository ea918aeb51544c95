//! What the superblock and the tables of an image say, checked once when it is opened.

mod v5;
mod v6;

use std::ffi::OsStr;
use std::path::Path;

use backend::chunk::{Cipher, Compression, Digester};

use crate::bootstrap::{Bootstrap, Version};
use crate::error::{Damaged, Refused};
use crate::layout::Flags;
use crate::layout::blob::Features;

/// Most chunks that all blobs of an image have together. Each costs a mount some bytes, whether or not the image refers to it.
const MAX_TOTAL_CHUNKS: u64 = 1 << 25;

/// Most bytes of chunk information, uncompressed, that a batch or zran blob has: it is kept while the image is mounted.
const MAX_CHUNK_INFO: u64 = 256 << 20;
/// The same of all blobs of an image.
const MAX_TOTAL_CHUNK_INFO: u64 = 1 << 30;

/// A table of the bootstrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Offset in bytes.
    pub offset: u64,
    /// Number of entries.
    pub entries: u64,
}

/// Facts about an image.
#[derive(Clone, Debug)]
pub struct Superblock {
    /// The format.
    pub version: Version,
    /// Chunk size in bytes.
    pub chunk_size: u32,
    /// Flags as stored.
    pub flags: Flags,
    /// Number of inodes as stored: v5 distinct ones, v6 names.
    pub inodes: u64,
    /// Local id of the root.
    pub root: u64,
    /// Inodes to prefetch: v5 inode numbers, v6 node ids, both local ids.
    pub prefetch_table: Table,
    /// Blob table: v5 its size in bytes, v6 256-byte entries.
    pub blob_table: Table,
    /// What only one version has.
    pub format: Format,
    /// The blobs, in table order.
    pub blobs: Vec<BlobFacts>,
}

/// What only one version has.
#[derive(Clone, Copy, Debug)]
pub enum Format {
    /// RAFS v5.
    V5 {
        /// Offsets of the inode records, in units of 8 bytes.
        inode_table: Table,
        /// Sizes and chunk counts of the blobs.
        extended_blob_table: Table,
    },
    /// RAFS v6.
    V6 {
        /// Block size as a power of two: 12, or 9 for tarfs.
        block_bits: u8,
        /// Offset of node id 0 in bytes.
        meta: u64,
        /// Records of all referenced chunks.
        chunk_table: Table,
    },
}

/// Facts about a blob.
#[derive(Clone, Debug)]
pub struct BlobFacts {
    /// Name at the source.
    pub id: String,
    /// Feature bits.
    pub features: Features,
    /// Compression of its chunks.
    pub compression: Compression,
    /// Digest algorithm of its chunks.
    pub digester: Digester,
    /// Number of chunks stored in it; 0 if unknown (old v5 images).
    pub chunk_count: u32,
    /// Size as stored in the table.
    pub compressed_size: u64,
    /// Where chunk data end in the blob; 0 if unknown (old v5 images).
    pub data_end: u64,
    /// Size of the uncompressed view; 0 if unknown (old v5 images).
    pub uncompressed_size: u64,
    /// Key and vector of an encrypted blob.
    pub cipher: Option<Cipher>,
    /// Where its chunk information is (v6).
    pub chunk_info: Option<ChunkInfoFacts>,
    /// Range at its head to prefetch (v5), in compressed bytes.
    pub prefetch: Option<(u32, u32)>,
}

/// Where the chunk information array of a blob is.
#[derive(Clone, Debug)]
pub struct ChunkInfoFacts {
    /// Blob that holds it: the data blob, or a separate one.
    pub blob_id: String,
    /// Compression of the array.
    pub compression: Compression,
    /// Where it starts.
    pub offset: u64,
    /// Its size as stored.
    pub compressed_size: u64,
    /// Its size uncompressed.
    pub uncompressed_size: u64,
}

impl Superblock {
    /// Reads and checks superblock and tables. `path` names the file that the bootstrap came from.
    pub(crate) fn read(bootstrap: &Bootstrap, path: &Path) -> Result<Self, Refused> {
        let superblock = match bootstrap.version() {
            Version::V5 => v5::read(bootstrap, path),
            Version::V6 => v6::read(bootstrap, path),
        }?;
        superblock.check_totals()?;
        Ok(superblock)
    }

    /// What a mount keeps in memory for each chunk, whether or not the image refers to it, is bounded.
    fn check_totals(&self) -> Result<(), Damaged> {
        let refuse = |reason| Err(Damaged::new("blob table", self.blob_table.offset, reason));
        let chunks: u64 = self.blobs.iter().map(|blob| u64::from(blob.chunk_count)).sum();
        if chunks > MAX_TOTAL_CHUNKS {
            return refuse("its blobs have more than 2^25 chunks together");
        }
        let mut total = 0;
        for blob in self.blobs.iter().filter(|blob| blob.features.need_contexts()) {
            let size = blob.chunk_info.as_ref().map_or(0, |info| info.uncompressed_size);
            if size > MAX_CHUNK_INFO {
                return refuse("a blob has more than 256 MiB of chunk information");
            }
            total += size;
        }
        if total > MAX_TOTAL_CHUNK_INFO {
            return refuse("its blobs have more than 1 GiB of chunk information together");
        }
        Ok(())
    }
}

/// The name of a file without its extensions: the id of a blob that holds its own bootstrap.
fn stem(path: &Path) -> Option<String> {
    let name = path.file_name().and_then(OsStr::to_str)?;
    let stem = name.split('.').next()?;
    is_blob_id(stem.as_bytes()).then(|| stem.to_owned())
}

/// Whether `id` can name a blob: it becomes a file name and a part of a URL.
fn is_blob_id(id: &[u8]) -> bool {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.+=:@".contains(byte);
    (1..=64).contains(&id.len()) && id.first() != Some(&b'.') && id.iter().all(allowed)
}

/// A blob id from a table. Blobs that hold their own bootstrap do not know their name: it is the file's.
fn blob_id(stored: &[u8], features: Features, path: &Path, at: u64) -> Result<String, Damaged> {
    let own = features.has(Features::INLINED_FS_META) && !features.has(Features::SEPARATE);
    if own || stored.iter().all(|byte| *byte == b'x') {
        return stem(path).ok_or(Damaged::new(
            "blob id",
            at,
            "to be taken from the file name, which is no blob id",
        ));
    }
    if !is_blob_id(stored) {
        return Err(Damaged::new(
            "blob id",
            at,
            "empty, or with characters that a blob id cannot have",
        ));
    }
    Ok(String::from_utf8_lossy(stored).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_id_cannot_be_a_path() {
        for id in ["a/b", "..", ".hidden", "", "a b", "a\0b"] {
            assert!(!is_blob_id(id.as_bytes()), "{id:?}");
        }
        assert!(is_blob_id("0123456789abcdef".repeat(4).as_bytes()));
        assert!(!is_blob_id("x".repeat(65).as_bytes()));
        assert!(is_blob_id(b"my-blob_1.v2"));
    }

    #[test]
    fn a_blob_with_its_own_bootstrap_is_called_like_the_file() {
        let inlined = Features(Features::INLINED_FS_META);
        let x = [b'x'; 64];
        let path = Path::new("/a/b/abc123.image.boot");
        assert_eq!(blob_id(&x, inlined, path, 0).unwrap(), "abc123");
        assert_eq!(blob_id(b"def", Features(0), path, 0).unwrap(), "def");
        assert!(blob_id(&x, inlined, Path::new("/a/.b"), 0).is_err());
    }
}
