//! Chunk information of batch and zran blobs: where the unit that holds a chunk is, and how to decode it.
//!
//! The array comes from the source and is not covered by any digest. It is compared with blob table and chunk table
//! where they overlap; what it says beyond that only decides which bytes are decoded, and those must
//! match the chunk's digest.

use std::io::Read;
use std::sync::Arc;

use backend::chunk::{Chunk, Compression, Encoding, ZranContext as EntryPoint};
use backend::codec;
use bytes::Bytes;
use zerocopy::FromBytes;

use crate::layout::blob::{
    BatchContext, CHUNK_INFO_MAGIC, ChunkInfoHeader, ChunkInfoV2, Features, MAX_DICTIONARY, ZranContext,
};
use crate::layout::{MAX_CHUNK_SIZE, compression_number};
use crate::superblock::{BlobFacts, ChunkInfoFacts};

/// Chunk information with its contexts.
pub(super) struct Contexts {
    chunks: Vec<ChunkInfoV2>,
    kind: Kind,
}

enum Kind {
    Batch(Vec<BatchContext>),
    Zran(Vec<(ZranContext, Arc<EntryPoint>)>),
}

impl Contexts {
    /// Reads the stored array and header of a batch or zran blob.
    pub(super) fn read(facts: &BlobFacts, bytes: &[u8]) -> Result<Self, String> {
        let info = facts
            .chunk_info
            .as_ref()
            .ok_or("the blob table names no chunk information")?;
        let stored = usize::try_from(info.compressed_size).map_err(|_| "too large")?;
        let (array, header) = bytes
            .split_at_checked(stored)
            .filter(|(_, header)| header.len() == size_of::<ChunkInfoHeader>())
            .ok_or_else(|| format!("{} bytes instead of {stored} and the header", bytes.len()))?;
        let (array, header) = decrypt(facts, array, header)?;
        let header = ChunkInfoHeader::ref_from_bytes(&header).map_err(|_| "header of a wrong size")?;
        check_header(header, facts, info)?;
        let array = decompress(info, &array)?;
        Self::parse(&array, header, facts)
    }

    fn parse(array: &[u8], header: &ChunkInfoHeader, facts: &BlobFacts) -> Result<Self, String> {
        let entries = header.entries.get() as usize;
        let (chunks, rest) = <[ChunkInfoV2]>::ref_from_prefix_with_elems(array, entries)
            .map_err(|_| format!("array of {} bytes is too small for {entries} chunks", array.len()))?;
        let count = header.context_count.get() as usize;
        if header.context_offset.get() != (array.len() - rest.len()) as u64
            || header.context_size.get() != rest.len() as u64
            || count > entries
        {
            return Err("contexts do not fill the array".to_owned());
        }
        let too_small = || format!("{} bytes are too small for {count} contexts", rest.len());
        let kind = if facts.features.has(Features::ZRAN) {
            let (contexts, dictionaries) =
                <[ZranContext]>::ref_from_prefix_with_elems(rest, count).map_err(|_| too_small())?;
            // Contexts may name the same bytes, so none has a copy of its own.
            let dictionaries = Bytes::copy_from_slice(dictionaries);
            let points = (0u32..)
                .zip(contexts)
                .map(|(number, context)| entry_point(number, context, &dictionaries));
            Kind::Zran(points.collect::<Result<_, _>>()?)
        } else {
            let (contexts, _) =
                <[BatchContext]>::ref_from_prefix_with_elems(rest, count).map_err(|_| too_small())?;
            Kind::Batch(contexts.to_vec())
        };
        Ok(Self {
            chunks: chunks.to_vec(),
            kind,
        })
    }

    /// Completes what the chunk table says of a chunk.
    pub(super) fn describe(&self, chunk: &mut Chunk) -> Result<(), String> {
        let index = chunk.index;
        let info = self
            .chunks
            .get(index as usize)
            .ok_or_else(|| format!("chunk {index} of {} in the chunk information", self.chunks.len()))?;
        if info.uncompressed_offset() != chunk.uncompressed_offset
            || info.uncompressed_size() != chunk.uncompressed_size
        {
            return Err(format!("chunk {index} lies elsewhere than the bootstrap says"));
        }
        let flags = info.flags();
        let member = flags & (ChunkInfoV2::BATCH | ChunkInfoV2::ZRAN);
        chunk.encrypted = flags & ChunkInfoV2::ENCRYPTED != 0;
        let context = info.context();
        let missing = || format!("chunk {index} refers to context {context}, which does not exist");
        match (&self.kind, member) {
            (Kind::Batch(contexts), ChunkInfoV2::BATCH) => {
                let batch = contexts.get(context as usize).ok_or_else(missing)?;
                chunk.compressed_offset = info.compressed_offset();
                chunk.compressed_size = batch.compressed_size.get();
                chunk.encoding = Encoding::Batch {
                    decoded_size: batch.uncompressed_size.get(),
                    offset: info.context_offset(),
                };
            }
            (Kind::Zran(contexts), ChunkInfoV2::ZRAN) => {
                let (slice, point) = contexts.get(context as usize).ok_or_else(missing)?;
                chunk.compressed_offset = slice.in_offset.get();
                chunk.compressed_size = slice.in_size.get();
                chunk.encoding = Encoding::Zran {
                    context: point.clone(),
                    offset: info.context_offset(),
                };
            }
            (_, 0) => {
                chunk.compressed_offset = info.compressed_offset();
                chunk.compressed_size = info.compressed_size();
                chunk.encoding = Encoding::Plain {
                    compressed: flags & ChunkInfoV2::COMPRESSED != 0,
                };
            }
            _ => return Err(format!("chunk {index} is of a kind that its blob does not have")),
        }
        Ok(())
    }
}

fn check_header(header: &ChunkInfoHeader, facts: &BlobFacts, info: &ChunkInfoFacts) -> Result<(), String> {
    let fields = [
        ("magic", header.magic.get().into(), u64::from(CHUNK_INFO_MAGIC)),
        (
            "closing magic",
            header.magic2.get().into(),
            CHUNK_INFO_MAGIC.into(),
        ),
        (
            "compression",
            header.compression.get().into(),
            compression_number(info.compression).into(),
        ),
        (
            "chunk count",
            header.entries.get().into(),
            facts.chunk_count.into(),
        ),
        ("offset", header.offset.get(), info.offset),
        (
            "compressed size",
            header.compressed_size.get(),
            info.compressed_size,
        ),
        (
            "uncompressed size",
            header.uncompressed_size.get(),
            info.uncompressed_size,
        ),
    ];
    match fields.into_iter().find(|(_, found, expected)| found != expected) {
        None => Ok(()),
        Some((field, found, expected)) => Err(format!(
            "{field} in the header is {found:#x}, the bootstrap says {expected:#x}"
        )),
    }
}

/// Array and header are encrypted separately.
fn decrypt(facts: &BlobFacts, array: &[u8], header: &[u8]) -> Result<(Vec<u8>, Vec<u8>), String> {
    let Some(cipher) = &facts.cipher else {
        return Ok((array.to_vec(), header.to_vec()));
    };
    let decrypt = |unit| codec::decrypt(cipher, unit).map_err(|error| error.to_string());
    Ok((decrypt(array)?, decrypt(header)?))
}

fn decompress(info: &ChunkInfoFacts, stored: &[u8]) -> Result<Vec<u8>, String> {
    let size = usize::try_from(info.uncompressed_size).map_err(|_| "too large")?;
    let array = match info.compression {
        Compression::None => stored.to_vec(),
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::new(stored).map_err(|error| error.to_string())?;
            let mut array = Vec::new();
            decoder
                .take(size as u64 + 1)
                .read_to_end(&mut array)
                .map_err(|error| error.to_string())?;
            array
        }
        Compression::Lz4Block => {
            lz4_flex::block::decompress(stored, size).map_err(|error| error.to_string())?
        }
        Compression::Gzip => return Err("compressed by gzip, which no tool does".to_owned()),
    };
    if array.len() != size {
        return Err(format!("decompresses to {} bytes instead of {size}", array.len()));
    }
    Ok(array)
}

fn entry_point(
    number: u32,
    context: &ZranContext,
    dictionaries: &Bytes,
) -> Result<(ZranContext, Arc<EntryPoint>), String> {
    let refuse = |what: &str| Err(format!("gzip context {number}: {what}"));
    if context.bits > 7 {
        return refuse("more than 7 bits");
    }
    if context.dictionary_size.get() > MAX_DICTIONARY {
        return refuse("dictionary larger than the window");
    }
    // Twice the largest chunk is what upstream's slicing can reach.
    if context.out_size.get() > 2 * MAX_CHUNK_SIZE || context.in_size.get() > 2 * MAX_CHUNK_SIZE {
        return refuse("slice too large");
    }
    let start = usize::try_from(context.dictionary_offset.get()).unwrap_or(usize::MAX);
    let end = start.saturating_add(context.dictionary_size.get() as usize);
    if end > dictionaries.len() {
        return refuse("dictionary beyond the end");
    }
    let point = EntryPoint {
        number,
        decoded_size: context.out_size.get(),
        bits: context.bits,
        byte: context.byte,
        dictionary: dictionaries.slice(start..end),
    };
    Ok((*context, Arc::new(point)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_that_name_one_dictionary_share_its_memory() {
        let dictionaries = Bytes::from(vec![7; MAX_DICTIONARY as usize]);
        let context = ZranContext {
            in_offset: 0.into(),
            out_offset: 0.into(),
            dictionary_offset: 0.into(),
            in_size: 10.into(),
            out_size: 10.into(),
            dictionary_size: MAX_DICTIONARY.into(),
            byte: 0,
            bits: 0,
            reserved: [0; 2],
        };
        for number in 0..1000 {
            let (_, point) = entry_point(number, &context, &dictionaries).unwrap();
            assert_eq!(point.dictionary.as_ptr(), dictionaries.as_ptr());
        }
        let beyond = ZranContext {
            dictionary_offset: 1.into(),
            ..context
        };
        assert!(
            entry_point(0, &beyond, &dictionaries)
                .unwrap_err()
                .contains("beyond the end")
        );
        let far = ZranContext {
            dictionary_offset: u64::MAX.into(),
            ..context
        };
        assert!(entry_point(0, &far, &dictionaries).is_err());
    }
}
