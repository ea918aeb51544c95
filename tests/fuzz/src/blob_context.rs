//! Chunk information and data of blobs: plain (v1, v2), batches, slices of a gzip stream.

use std::io::Write;
use std::sync::OnceLock;

use backend::chunk::{BlobDescription, Compression};
use backend::codec::{self, Decoder, MAX_UNIT};
use bytes::Bytes;
use flate2::{Compress, FlushCompress};
use rafs::build::FsVersion;
use rafs::layout::blob::{
    BatchContext, CHUNK_INFO_MAGIC, ChunkInfoHeader, ChunkInfoV1, ChunkInfoV2, Features, ZranContext,
};
use rafs::layout::v5::ChunkRecord;
use rafs::layout::v6::{BlobEntry, MAX_UNCOMPRESSED_SIZE};
use rafs::reader::Reader;
use rafs::superblock::Format;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::bases::{self, Slot};
use crate::memory;
use crate::mutate::{Region, Subject};
use crate::script::Script;
use crate::v6_bootstrap::fix_duplicates;

/// Chunks that share a batch or a slice.
const SHARED: usize = 3;

/// A blob of one kind behind its bootstrap: one sequence of bytes, so that changes can be anywhere in both.
struct Base {
    subject: Subject,
    /// Where the blob begins.
    blob: usize,
    /// Where the blob's entry of the blob table is.
    entry: usize,
}

struct Setup {
    bases: Vec<Base>,
    slot: Slot,
}

/// What the chunks of a blob look like.
#[derive(Clone, Copy, PartialEq)]
enum Flavour {
    V1,
    V2,
    Batch,
    Zran,
}

fn setup() -> &'static Setup {
    static SETUP: OnceLock<Setup> = OnceLock::new();
    SETUP.get_or_init(|| Setup {
        bases: [
            (Flavour::V1, Compression::Lz4Block),
            (Flavour::V2, Compression::Zstd),
            (Flavour::Batch, Compression::Zstd),
            (Flavour::Batch, Compression::Lz4Block),
            (Flavour::Zran, Compression::None),
        ]
        .map(|(flavour, compression)| base(flavour, compression))
        .into(),
        slot: Slot::new(),
    })
}

/// Changes bootstrap and blob as `input` says, and reads every chunk.
pub fn run(input: &[u8]) {
    let setup = setup();
    let mut script = Script::new(input);
    let choice = script.u8();
    let base = &setup.bases[usize::from(choice >> 2) % setup.bases.len()];
    let mut subject = base.subject.clone();
    subject.change(&mut script);
    let mut bytes = subject.bytes;
    // A blob that was cut off is a blob all the same.
    bytes.resize(bytes.len().max(base.blob), 0);
    if choice & 1 != 0 {
        fix_header(base, &mut bytes);
    }
    if choice & 2 != 0 {
        fix_duplicates(&mut bytes[..base.blob]);
    }
    let (bootstrap, blob) = bytes.split_at(base.blob);
    setup.slot.fill(bootstrap);
    let Ok(reader) = Reader::open(&setup.slot.path) else {
        return;
    };
    for position in 0..reader.superblock().blobs.len().min(3) {
        if let Ok(description) = reader.blob(position) {
            read_all(&reader, position, &description, blob);
        }
    }
}

/// Reads chunk information and chunks as the store does.
fn read_all(reader: &Reader, position: usize, description: &BlobDescription, blob: &[u8]) {
    let range = |offset: u64, size: u32| {
        let start = usize::try_from(offset).ok()?;
        blob.get(start..start.checked_add(size as usize)?)
    };
    if let Some(wanted) = description.index.wanted() {
        let Some(stored) = range(wanted.offset, wanted.size) else {
            return;
        };
        if memory::bounded("chunk information", most_info(reader, position, stored), || {
            description.index.supply(stored)
        })
        .is_err()
        {
            return;
        }
        assert_eq!(description.index.wanted(), None, "supplied, and still wanted");
    }
    let mut decoder = Decoder::new();
    for index in 0..description.chunk_count.min(64) {
        let Ok(chunk) = description.index.chunk(index) else {
            continue;
        };
        if codec::check(description, &chunk).is_err() {
            continue;
        }
        assert!(chunk.uncompressed_offset < MAX_UNCOMPRESSED_SIZE);
        let Some(stored) = range(chunk.compressed_offset, chunk.compressed_size) else {
            continue;
        };
        let stored = Bytes::copy_from_slice(stored);
        // A unit, its window, and zlib's or lz4's state.
        let limit = 2 * MAX_UNIT as usize + (1 << 20);
        let decoded = memory::bounded("a unit", limit, || decoder.decode(description, &chunk, stored));
        let Ok(decoded) = decoded else { continue };
        assert!(decoded.len() <= MAX_UNIT as usize);
        if let Ok(data) = codec::slice(&chunk, &decoded) {
            assert_eq!(data.len(), chunk.uncompressed_size as usize);
            let _ = codec::verify(description, &chunk, &data);
        }
    }
}

/// Most memory that chunk information may take at once: what the blob table states, which its chunks can fill, twice while
/// it grows; the stored bytes; the state of zstd.
fn most_info(reader: &Reader, position: usize, stored: &[u8]) -> usize {
    let facts = &reader.superblock().blobs[position];
    let stated = facts.chunk_info.as_ref().map_or(0, |info| info.uncompressed_size);
    let most = facts
        .features
        .most_chunk_info(facts.chunk_count, facts.chunk_count);
    assert!(stated <= most, "{stated} bytes for {} chunks", facts.chunk_count);
    2 * stated as usize + 2 * stored.len() + (1 << 20)
}

/// Makes the header of the chunk information say what the blob table says.
fn fix_header(base: &Base, bytes: &mut [u8]) {
    let (entry, _) = BlobEntry::read_from_prefix(&bytes[base.entry..]).expect("inside of the bootstrap");
    let Some(at) = usize::try_from(
        entry
            .ci_offset
            .get()
            .saturating_add(entry.ci_compressed_size.get()),
    )
    .ok()
    .and_then(|at| at.checked_add(base.blob)) else {
        return;
    };
    let Some(Ok((mut header, _))) = bytes.get(at..).map(ChunkInfoHeader::read_from_prefix) else {
        return;
    };
    header.magic = U32::new(CHUNK_INFO_MAGIC);
    header.magic2 = U32::new(CHUNK_INFO_MAGIC);
    header.compression = entry.ci_compression;
    header.entries = entry.chunk_count;
    header.offset = entry.ci_offset;
    header.compressed_size = entry.ci_compressed_size;
    header.uncompressed_size = entry.ci_uncompressed_size;
    bytes[at..at + size_of::<ChunkInfoHeader>()].copy_from_slice(header.as_bytes());
}

/// What a blob of a flavour is made of.
#[derive(Default)]
struct Parts {
    data: Vec<u8>,
    info: Vec<u8>,
    contexts: Vec<u8>,
    context_count: u32,
    features: u32,
}

fn base(flavour: Flavour, compression: Compression) -> Base {
    let plain = matches!(flavour, Flavour::V1 | Flavour::V2);
    let stored = if plain { compression } else { Compression::None };
    let image = bases::image(FsVersion::V6, stored, 3);
    let reader = bases::open(&image.bootstrap);
    let superblock = reader.superblock();
    let Format::V6 { chunk_table, .. } = superblock.format else {
        panic!("not v6");
    };
    let count = chunk_table.entries as usize;
    let table = &image.bootstrap[chunk_table.offset as usize..];
    let mut records = <[ChunkRecord]>::ref_from_prefix_with_elems(table, count)
        .unwrap()
        .0
        .to_vec();
    records.sort_by_key(|record| record.index.get());
    let parts = match flavour {
        Flavour::V1 => v1(&records, &image.blob),
        Flavour::V2 => v2(&records, &image.blob),
        Flavour::Batch => batches(&records, &image.blob, compression),
        Flavour::Zran => slices(&records, &image.blob),
    };
    let entry = superblock.blob_table.offset as usize;
    assemble(
        image.bootstrap,
        entry,
        parts,
        compression,
        &records,
        chunk_table.offset as usize,
    )
}

fn assemble(
    mut bytes: Vec<u8>,
    entry_at: usize,
    parts: Parts,
    compression: Compression,
    records: &[ChunkRecord],
    table: usize,
) -> Base {
    let size = (parts.info.len() + parts.contexts.len()) as u64;
    let (mut entry, _) = BlobEntry::read_from_prefix(&bytes[entry_at..]).unwrap();
    entry.features = U32::new(entry.features.get() | parts.features);
    entry.compression = U32::new(rafs::layout::compression_number(compression));
    entry.compressed_size = U64::new(parts.data.len() as u64);
    entry.ci_offset = U64::new(parts.data.len() as u64);
    entry.ci_compression = U32::new(0);
    entry.ci_compressed_size = U64::new(size);
    entry.ci_uncompressed_size = U64::new(size);
    bytes[entry_at..entry_at + size_of::<BlobEntry>()].copy_from_slice(entry.as_bytes());

    let mut header = ChunkInfoHeader::new_zeroed();
    header.features = entry.features;
    if parts.context_count != 0 {
        header.context_offset = U64::new(parts.info.len() as u64);
        header.context_size = U64::new(parts.contexts.len() as u64);
        header.context_count = U32::new(parts.context_count);
    }
    let blob = bytes.len();
    let info = parts.data.len();
    let (info_size, contexts_size) = (parts.info.len(), parts.contexts.len());
    bytes.extend(parts.data);
    bytes.extend(parts.info);
    bytes.extend(parts.contexts);
    bytes.extend(header.as_bytes());
    let region = |offset, size| Region { offset, size };
    let base = Base {
        subject: Subject {
            heads: vec![
                region(entry_at, size_of::<BlobEntry>()),
                region(blob + info + info_size + contexts_size, 80),
                region(blob + info + info_size, contexts_size.max(1)),
            ],
            bodies: (0..records.len())
                .flat_map(|chunk| {
                    [
                        region(table + chunk * 80, 80),
                        region(blob + info + chunk * 24, 24),
                    ]
                })
                .chain([region(blob, info), region(blob + info, info_size + contexts_size)])
                .collect(),
            bytes: Vec::new(),
        },
        blob,
        entry: entry_at,
    };
    fix_header(&base, &mut bytes);
    Base {
        subject: Subject {
            bytes,
            ..base.subject
        },
        ..base
    }
}

fn stored<'b>(record: &ChunkRecord, blob: &'b [u8]) -> &'b [u8] {
    let start = record.compressed_offset.get() as usize;
    &blob[start..start + record.compressed_size.get() as usize]
}

fn v1(records: &[ChunkRecord], blob: &[u8]) -> Parts {
    let end = records
        .iter()
        .map(|r| r.compressed_offset.get() + u64::from(r.compressed_size.get()))
        .max();
    let info = |r: &ChunkRecord| {
        ChunkInfoV1::new(
            r.uncompressed_offset.get(),
            r.uncompressed_size.get(),
            r.compressed_offset.get(),
            r.compressed_size.get(),
        )
    };
    let info: Vec<ChunkInfoV1> = records.iter().map(info).collect();
    Parts {
        data: blob[..end.unwrap_or_default() as usize].to_vec(),
        info: info.as_bytes().to_vec(),
        ..Parts::default()
    }
}

fn v2(records: &[ChunkRecord], blob: &[u8]) -> Parts {
    let info = |r: &ChunkRecord| {
        ChunkInfoV2::new(
            r.uncompressed_offset.get(),
            r.uncompressed_size.get(),
            r.compressed_offset.get(),
            r.compressed_size.get(),
            ChunkInfoV2::COMPRESSED,
            0,
        )
    };
    let info: Vec<ChunkInfoV2> = records.iter().map(info).collect();
    Parts {
        info: info.as_bytes().to_vec(),
        features: Features::CHUNK_INFO_V2,
        ..v1(records, blob)
    }
}

fn batches(records: &[ChunkRecord], blob: &[u8], compression: Compression) -> Parts {
    let mut parts = Parts {
        features: Features::CHUNK_INFO_V2 | Features::BATCH,
        ..Parts::default()
    };
    for (number, group) in (0u64..).zip(records.chunks(SHARED)) {
        let start = parts.data.len() as u64;
        let mut batch = Vec::new();
        for record in group {
            let info = ChunkInfoV2::new(
                record.uncompressed_offset.get(),
                record.uncompressed_size.get(),
                start,
                0,
                ChunkInfoV2::BATCH,
                number << 32 | batch.len() as u64,
            );
            parts.info.extend(info.as_bytes());
            batch.extend(stored(record, blob));
        }
        let packed = match compression {
            Compression::Zstd => zstd::bulk::compress(&batch, 3).unwrap(),
            _ => lz4_flex::block::compress(&batch),
        };
        let context = BatchContext {
            compressed_size: U32::new(packed.len() as u32),
            uncompressed_size: U32::new(batch.len() as u32),
            reserved: [0; 32],
        };
        parts.data.extend(packed);
        parts.contexts.extend(context.as_bytes());
        parts.context_count += 1;
    }
    parts
}

/// A gzip stream that can be entered at every third chunk; every other entry needs what came before as its dictionary.
fn slices(records: &[ChunkRecord], blob: &[u8]) -> Parts {
    let mut parts = Parts {
        features: Features::CHUNK_INFO_V2 | Features::ZRAN,
        ..Parts::default()
    };
    parts
        .data
        .write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255])
        .unwrap();
    let mut deflate = Compress::new(flate2::Compression::fast(), false);
    let (mut out, mut window, mut contexts, mut dictionaries) = (0, Vec::new(), Vec::new(), Vec::new());
    for (number, group) in (0u64..).zip(records.chunks(SHARED)) {
        let start = parts.data.len() as u64;
        let mut slice = Vec::new();
        for record in group {
            let info = ChunkInfoV2::new(
                record.uncompressed_offset.get(),
                record.uncompressed_size.get(),
                start,
                0,
                ChunkInfoV2::ZRAN | ChunkInfoV2::COMPRESSED,
                number << 32 | slice.len() as u64,
            );
            parts.info.extend(info.as_bytes());
            slice.extend(stored(record, blob));
        }
        let flush = if number % 2 == 0 {
            FlushCompress::Sync
        } else {
            FlushCompress::Full
        };
        let mut packed = Vec::with_capacity(2 * slice.len() + 1024);
        deflate.compress_vec(&slice, &mut packed, flush).unwrap();
        let dictionary: &[u8] = if number % 2 == 1 { &window } else { &[] };
        contexts.push(ZranContext {
            in_offset: U64::new(start),
            out_offset: U64::new(out),
            dictionary_offset: U64::new(dictionaries.len() as u64),
            in_size: U32::new(packed.len() as u32),
            out_size: U32::new(slice.len() as u32),
            dictionary_size: U32::new(dictionary.len() as u32),
            byte: 0,
            bits: 0,
            reserved: [0; 2],
        });
        dictionaries.extend(dictionary);
        parts.data.extend(packed);
        out += slice.len() as u64;
        window = slice;
    }
    parts.context_count = contexts.len() as u32;
    parts.contexts = [contexts.as_bytes(), &dictionaries].concat();
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_of_the_unchanged_blobs_is_read() {
        let setup = setup();
        for base in &setup.bases {
            let (bootstrap, blob) = base.subject.bytes.split_at(base.blob);
            let description = bases::open(bootstrap).blob(0).unwrap();
            if let Some(wanted) = description.index.wanted() {
                description.index.supply(&blob[wanted.offset as usize..]).unwrap();
            }
            let mut decoder = Decoder::new();
            assert!(description.chunk_count > 6);
            for index in 0..description.chunk_count {
                let chunk = description.index.chunk(index).unwrap();
                codec::check(&description, &chunk).unwrap();
                let start = chunk.compressed_offset as usize;
                let stored = Bytes::copy_from_slice(&blob[start..start + chunk.compressed_size as usize]);
                let decoded = decoder.decode(&description, &chunk, stored).unwrap();
                codec::verify(&description, &chunk, &codec::slice(&chunk, &decoded).unwrap()).unwrap();
            }
        }
        for choice in 0..=u8::MAX {
            run(&[choice]);
        }
    }

    /// What the target has found.
    #[test]
    fn findings() {
        // Chunk information of a few chunks that zstd expands to megabytes: 6.2 of them, and 16 where the header agrees.
        run(b"\xffun`umn\0\0\0\xff\x0f\x01\0\0\xd0\xff\xff'\x0a\0\0\0\xaeu`n\xdd\xdd\xdd\xdd\xdd\
            \xdd\xff\xff\xdd\xdd\xdd\xdd\xdd\xdd\xdd\xff\xffu`n\xdd\xdd\xdd\xddT\0\0\0\x03T\xdd\xdd\xff\
            \xff\xdd\xdd\xdd\xdd\xdd\xdd\xdd\xdd\xdd\xdd\xd5\xdd\xdd\xdd\xd5\xdd\xdd\xdd\x88\x88\x88\x88TT\x82TTT5\0\xbf");
        run(b"\xffun`umn\0\0\x02\xff\x0f\x05\0\0\xf8\xf8\xf8\0\xf8\xf8\xf8\x18\x04\0(<\x83h\x01\xfd");
    }
}
