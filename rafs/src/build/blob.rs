//! The blob file: chunk data back to back, for v6 followed by the chunk information array and its header.

use std::io::{BufWriter, Write};
use std::path::Path;

use backend::chunk::Compression;
use sha2::{Digest, Sha256};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use crate::layout::blob::{CHUNK_INFO_MAGIC, ChunkInfoHeader, ChunkInfoV1, Features};
use crate::layout::v5::{ChunkFlags, ChunkRecord};
use crate::layout::v6::{self, BlobEntry};
use crate::layout::{MAX_CHUNKS, compression_number, digester_number};

use super::FsVersion;
use super::codec::Packer;
use super::error::BuildError;
use super::output::TemporaryFile;
use super::pipeline::{Key, Settings};

/// Alignment of chunks in the uncompressed view of a v6 blob.
const V6_ALIGNMENT: u64 = 4096;

/// Writes one blob. Nothing is visible under its final name before [`BlobWriter::finish`].
pub(super) struct BlobWriter<'d> {
    directory: &'d Path,
    settings: Settings,
    version: FsVersion,
    /// Created with the first chunk: an image without data has no blob.
    output: Option<Output>,
    chunk_count: u32,
    uncompressed_end: u64,
    info: Vec<ChunkInfoV1>,
}

struct Output {
    file: BufWriter<TemporaryWriter>,
    hash: Sha256,
    size: u64,
}

/// `Write` by reference to the temporary file, so that it can be published afterwards.
struct TemporaryWriter(TemporaryFile);

impl Write for TemporaryWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.file().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.file().flush()
    }
}

impl Output {
    fn append(&mut self, bytes: &[u8], directory: &Path) -> Result<u64, BuildError> {
        let offset = self.size;
        self.file
            .write_all(bytes)
            .map_err(BuildError::io("write a blob in", directory))?;
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(offset)
    }
}

impl<'d> BlobWriter<'d> {
    /// A blob in `directory`.
    pub(super) fn new(directory: &'d Path, settings: Settings, version: FsVersion) -> Self {
        Self {
            directory,
            settings,
            version,
            output: None,
            chunk_count: 0,
            uncompressed_end: 0,
            info: Vec::new(),
        }
    }

    /// Stores a chunk and describes where; which number the blob has in its image is for the caller to say.
    pub(super) fn append(
        &mut self,
        key: Key,
        crc32c: u32,
        bytes: &[u8],
        compressed: bool,
    ) -> Result<ChunkRecord, BuildError> {
        // Upstream stops one short of the format's limit.
        BuildError::check_limit(
            "number of chunks",
            u64::from(self.chunk_count) + 1,
            u64::from(MAX_CHUNKS) - 1,
        )?;
        let output = match &mut self.output {
            Some(output) => output,
            none => {
                let file = BufWriter::with_capacity(
                    1 << 18,
                    TemporaryWriter(TemporaryFile::create_in(self.directory)?),
                );
                none.insert(Output {
                    file,
                    hash: Sha256::new(),
                    size: 0,
                })
            }
        };
        let (digest, size) = key;
        let compressed_offset = output.append(bytes, self.directory)?;
        let uncompressed_offset = match self.version {
            FsVersion::V5 => self.uncompressed_end,
            FsVersion::V6 => self.uncompressed_end.next_multiple_of(V6_ALIGNMENT),
        };
        self.uncompressed_end = uncompressed_offset + u64::from(size);
        let compressed_size = bytes.len() as u32;
        if self.version == FsVersion::V6 {
            self.info.push(ChunkInfoV1::new(
                uncompressed_offset,
                size,
                compressed_offset,
                compressed_size,
            ));
        }
        let record = ChunkRecord {
            digest,
            blob_index: U32::new(0),
            flags: U32::new(ChunkFlags::HAS_CRC32C | if compressed { ChunkFlags::COMPRESSED } else { 0 }),
            compressed_size: U32::new(compressed_size),
            uncompressed_size: U32::new(size),
            compressed_offset: U64::new(compressed_offset),
            uncompressed_offset: U64::new(uncompressed_offset),
            file_offset: U64::new(0),
            index: U32::new(self.chunk_count),
            crc32c: U32::new(crc32c),
        };
        self.chunk_count += 1;
        Ok(record)
    }

    /// What is known of the blob so far.
    pub(super) fn entry(&self) -> BlobEntry {
        BlobEntry {
            id: [0; 64],
            index: U32::new(0),
            chunk_size: U32::new(self.settings.chunk_size),
            chunk_count: U32::new(self.chunk_count),
            compression: U32::new(compression_number(self.settings.compression)),
            digester: U32::new(digester_number(self.settings.digester)),
            features: U32::new(Features::CAP_TAR_TOC),
            compressed_size: U64::new(0),
            uncompressed_size: U64::new(self.uncompressed_end),
            toc_size: U32::new(0),
            ci_compression: U32::new(compression_number(Compression::None)),
            ci_offset: U64::new(0),
            ci_compressed_size: U64::new(0),
            ci_uncompressed_size: U64::new(0),
            toc_digest: [0; 32],
            meta_digest: [0; 32],
            meta_size: [0; 8],
            cipher_iv: [0; 8],
            cipher: U32::new(0),
            reserved: [0; 36],
        }
    }

    /// Completes the blob and gives it its name, the hexadecimal sha256 of its bytes. `None` if no chunk was
    /// stored.
    pub(super) fn finish(mut self) -> Result<Option<BlobEntry>, BuildError> {
        let Some(mut output) = self.output.take() else {
            return Ok(None);
        };
        let mut entry = self.entry();
        if self.version == FsVersion::V6 {
            entry.features = U32::new(Features::CAP_TAR_TOC | Features::ALIGNED);
            entry.uncompressed_size = U64::new(self.uncompressed_end.next_multiple_of(V6_ALIGNMENT));
            self.append_information(&mut output, &mut entry)?;
        }
        entry.compressed_size = U64::new(output.size);
        BuildError::check_limit("blob size", output.size, v6::MAX_COMPRESSED_SIZE)?;
        BuildError::check_limit(
            "uncompressed blob size",
            entry.uncompressed_size.get(),
            v6::MAX_UNCOMPRESSED_SIZE,
        )?;
        let name = hex::encode(output.hash.finalize());
        for (to, from) in entry.id.iter_mut().zip(name.as_bytes()) {
            *to = *from;
        }
        let TemporaryWriter(file) = output
            .file
            .into_inner()
            .map_err(|e| BuildError::io("write a blob in", self.directory)(e.into_error()))?;
        file.publish(&self.directory.join(name))?;
        Ok(Some(entry))
    }

    /// Chunk information array, compressed if that helps, and its header (blob format, section 4).
    fn append_information(&self, output: &mut Output, entry: &mut BlobEntry) -> Result<(), BuildError> {
        let array = self.info.as_slice().as_bytes();
        let mut packed = Vec::new();
        let compressed =
            Packer::new(self.settings.compression, self.settings.level)?.pack(array, &mut packed)?;
        let (stored, compression) = if compressed {
            (packed.as_slice(), self.settings.compression)
        } else {
            (array, Compression::None)
        };
        let offset = output.append(stored, self.directory)?;
        entry.ci_compression = U32::new(compression_number(compression));
        entry.ci_offset = U64::new(offset);
        entry.ci_compressed_size = U64::new(stored.len() as u64);
        entry.ci_uncompressed_size = U64::new(array.len() as u64);
        let header = ChunkInfoHeader {
            magic: U32::new(CHUNK_INFO_MAGIC),
            features: entry.features,
            compression: entry.ci_compression,
            entries: entry.chunk_count,
            offset: entry.ci_offset,
            compressed_size: entry.ci_compressed_size,
            uncompressed_size: entry.ci_uncompressed_size,
            context_offset: U64::new(0),
            context_size: U64::new(0),
            context_count: U32::new(0),
            reserved: [0; 4032],
            magic2: U32::new(CHUNK_INFO_MAGIC),
        };
        output.append(header.as_bytes(), self.directory)?;
        Ok(())
    }
}
