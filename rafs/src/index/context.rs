//! Chunk information of batch and zran blobs: where the unit that holds a chunk is, and how to decode it.
//!
//! The array comes from the source and is not covered by any digest. It is compared with blob table and chunk table
//! where they overlap; what it says beyond that only decides which bytes are decoded, and those must
//! match the chunk's digest.

use std::borrow::Cow;
use std::io::Read;
use std::sync::Arc;

use backend::chunk::{Chunk, Compression, Encoding, ZranContext as EntryPoint};
use backend::codec;
use bytes::Bytes;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::layout::blob::{
    BatchContext, CHUNK_INFO_MAGIC, ChunkInfoHeader, ChunkInfoV2, Features, MAX_DICTIONARY, ZranContext,
};
use crate::layout::{MAX_CHUNK_SIZE, compression_number};
use crate::superblock::{BlobFacts, ChunkInfoFacts};

/// Chunk information with its contexts: three parts of one array, which are decoded on use.
pub(super) struct Contexts {
    /// [`ChunkInfoV2`]s.
    chunks: Bytes,
    kind: Kind,
}

enum Kind {
    /// [`BatchContext`]s.
    Batch(Bytes),
    Zran {
        /// [`ZranContext`]s.
        contexts: Bytes,
        /// What contexts name parts of, each part by any number of them.
        dictionaries: Bytes,
    },
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
        let header = decrypt(facts, header)?;
        let header = ChunkInfoHeader::ref_from_bytes(&header).map_err(|_| "header of a wrong size")?;
        check_header(header, facts, info)?;
        let parts = Parts::of(header, facts, info)?;
        let array = decompress(info, parts.total, &decrypt(facts, array)?)?;
        Ok(parts.split(array, facts))
    }

    /// Completes what the chunk table says of a chunk.
    pub(super) fn describe(&self, chunk: &mut Chunk) -> Result<(), String> {
        let index = chunk.index;
        let info: &ChunkInfoV2 = nth(&self.chunks, index)
            .ok_or_else(|| format!("chunk {index} is not in the chunk information"))?;
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
                let batch: &BatchContext = nth(contexts, context).ok_or_else(missing)?;
                chunk.compressed_offset = info.compressed_offset();
                chunk.compressed_size = batch.compressed_size.get();
                chunk.encoding = Encoding::Batch {
                    decoded_size: batch.uncompressed_size.get(),
                    offset: info.context_offset(),
                };
            }
            (
                Kind::Zran {
                    contexts,
                    dictionaries,
                },
                ChunkInfoV2::ZRAN,
            ) => {
                let slice: &ZranContext = nth(contexts, context).ok_or_else(missing)?;
                chunk.compressed_offset = slice.in_offset.get();
                chunk.compressed_size = slice.in_size.get();
                chunk.encoding = Encoding::Zran {
                    context: Arc::new(entry_point(context, slice, dictionaries)?),
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

/// Contexts of both kinds are of one size.
const CONTEXT_SIZE: usize = size_of::<BatchContext>();
const _: () = assert!(CONTEXT_SIZE == size_of::<ZranContext>());

/// Sizes of what is in the array, in bytes.
struct Parts {
    chunks: usize,
    contexts: usize,
    /// Of all, dictionaries included.
    total: usize,
}

impl Parts {
    /// What the header says of a blob's array, which must be no more than its chunks and contexts can fill: the array
    /// is stored compressed, and a few bytes can claim to be hundreds of megabytes.
    fn of(header: &ChunkInfoHeader, facts: &BlobFacts, info: &ChunkInfoFacts) -> Result<Self, String> {
        let count = header.context_count.get();
        let chunks = facts.features.most_chunk_info(facts.chunk_count, 0);
        let contexts = u64::from(count) * CONTEXT_SIZE as u64;
        let behind = header.context_size.get();
        let none = count == 0 && header.context_offset.get() == 0;
        if count > facts.chunk_count
            || !(none || header.context_offset.get() == chunks)
            || chunks.checked_add(behind) != Some(info.uncompressed_size)
        {
            return Err("contexts do not fill the array".to_owned());
        }
        if behind < contexts {
            return Err(format!("{behind} bytes are too small for {count} contexts"));
        }
        let most = facts.features.most_chunk_info(facts.chunk_count, count);
        if info.uncompressed_size > most {
            return Err(format!(
                "uncompressed size is {}, more than the {most} that {} chunks and {count} contexts can fill",
                info.uncompressed_size, facts.chunk_count
            ));
        }
        let size = |bytes| usize::try_from(bytes).map_err(|_| "too large");
        Ok(Self {
            chunks: size(chunks)?,
            contexts: size(contexts)?,
            total: size(info.uncompressed_size)?,
        })
    }

    /// Cuts an array of `total` bytes up.
    fn split(&self, mut array: Bytes, facts: &BlobFacts) -> Contexts {
        let dictionaries = array.split_off(self.chunks + self.contexts);
        let contexts = array.split_off(self.chunks);
        let kind = if facts.features.has(Features::ZRAN) {
            Kind::Zran {
                contexts,
                dictionaries,
            }
        } else {
            Kind::Batch(contexts)
        };
        Contexts { chunks: array, kind }
    }
}

/// Array and header are encrypted separately.
fn decrypt<'b>(facts: &BlobFacts, unit: &'b [u8]) -> Result<Cow<'b, [u8]>, String> {
    match &facts.cipher {
        None => Ok(unit.into()),
        Some(cipher) => codec::decrypt(cipher, unit)
            .map(Cow::Owned)
            .map_err(|error| error.to_string()),
    }
}

/// The array, which has `size` bytes or is refused. Memory grows with what is really there.
fn decompress(info: &ChunkInfoFacts, size: usize, stored: &[u8]) -> Result<Bytes, String> {
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
    Ok(array.into())
}

/// Element `number` of an array on disk.
fn nth<T: FromBytes + KnownLayout + Immutable + Unaligned>(array: &[u8], number: u32) -> Option<&T> {
    let element = array.chunks_exact(size_of::<T>()).nth(number as usize)?;
    T::ref_from_bytes(element).ok()
}

fn entry_point(number: u32, context: &ZranContext, dictionaries: &Bytes) -> Result<EntryPoint, String> {
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
    Ok(EntryPoint {
        number,
        decoded_size: context.out_size.get(),
        bits: context.bits,
        byte: context.byte,
        dictionary: dictionaries.slice(start..end),
    })
}

#[cfg(test)]
mod tests {
    use backend::chunk::Digester;
    use zerocopy::{FromZeros, IntoBytes};

    use super::*;

    /// A batch blob of `chunks` chunks and `contexts` contexts, and its array and header as stored.
    fn stored(chunks: u32, contexts: u32, array: &[u8]) -> (BlobFacts, Vec<u8>) {
        let packed = zstd::bulk::compress(array, 1).unwrap();
        let info = ChunkInfoFacts {
            blob_id: "blob".to_owned(),
            compression: Compression::Zstd,
            offset: 0,
            compressed_size: packed.len() as u64,
            uncompressed_size: array.len() as u64,
        };
        let mut header = ChunkInfoHeader::new_zeroed();
        header.magic = CHUNK_INFO_MAGIC.into();
        header.magic2 = CHUNK_INFO_MAGIC.into();
        header.compression = compression_number(Compression::Zstd).into();
        header.entries = chunks.into();
        header.compressed_size = info.compressed_size.into();
        header.uncompressed_size = info.uncompressed_size.into();
        header.context_offset = (u64::from(chunks) * 24).into();
        header.context_size = (info.uncompressed_size - u64::from(chunks) * 24).into();
        header.context_count = contexts.into();
        let facts = BlobFacts {
            id: "blob".to_owned(),
            features: Features(Features::ALIGNED | Features::CHUNK_INFO_V2 | Features::BATCH),
            compression: Compression::Zstd,
            digester: Digester::Sha256,
            chunk_count: chunks,
            compressed_size: 0,
            data_end: 0,
            uncompressed_size: 0,
            cipher: None,
            chunk_info: Some(info),
            prefetch: None,
        };
        (facts, [&packed, header.as_bytes()].concat())
    }

    #[test]
    fn an_array_that_claims_more_than_its_chunks_can_fill_is_not_decompressed() {
        let (facts, bytes) = stored(3, 2, &[0; 3 * 24 + 2 * 40]);
        assert!(Contexts::read(&facts, &bytes).is_ok());
        let (facts, mut bytes) = stored(3, 2, &vec![0; 16 << 20]);
        let refusal = Contexts::read(&facts, &bytes).err().unwrap();
        assert!(
            refusal.contains("16777216") && refusal.contains("152"),
            "{refusal}"
        );
        // Nobody looks at what is compressed.
        bytes[0] ^= 1;
        assert_eq!(Contexts::read(&facts, &bytes).err().unwrap(), refusal);
    }

    #[test]
    fn an_array_that_is_larger_or_smaller_than_it_claims_is_refused() {
        for size in [3 * 24 + 2 * 40 - 1, 3 * 24 + 2 * 40 + 1, 1 << 20] {
            let (_, bytes) = stored(3, 2, &[0; 3 * 24 + 2 * 40]);
            let header = &bytes[bytes.len() - size_of::<ChunkInfoHeader>()..];
            let packed = zstd::bulk::compress(&vec![0; size], 1).unwrap();
            let (mut facts, _) = stored(3, 2, &[0; 3 * 24 + 2 * 40]);
            let mut header = ChunkInfoHeader::read_from_bytes(header).unwrap();
            header.compressed_size = (packed.len() as u64).into();
            facts.chunk_info.as_mut().unwrap().compressed_size = packed.len() as u64;
            let error = Contexts::read(&facts, &[&packed, header.as_bytes()].concat()).err();
            assert!(error.unwrap().contains("instead of 152"));
        }
    }

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
            let point = entry_point(number, &context, &dictionaries).unwrap();
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
