//! Which chunks there are: for the cross-check of reads, and for the store that fetches them.
//!
//! A [`ChunkMap`] holds, per blob and chunk number, where the chunk lies in the uncompressed view, its size, and
//! which record of the bootstrap describes it: 16 bytes per referenced chunk. It is built once per mount, on the
//! first fetch and by a thread of the store, from the chunk table (v6) or from the records of all files (v5).
//!
//! A file's chunk address is believed only if it agrees with the map, that is with a second place of the
//! bootstrap. So a damaged address, size or record leads to an error for the files that use it, even if
//! the cache already holds what the damaged address points at.

mod context;
mod v5;
mod v6;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use backend::chunk::{
    BlobDescription, Chunk, ChunkIndex, Compression, Digester, Encoding, IndexError, IndexRange,
};

use crate::error::Damaged;
use crate::image::Image;
use crate::layout::blob::{ChunkInfoHeader, Features};
use crate::layout::v5::{ChunkFlags, ChunkRecord};
use crate::layout::v6::MAX_UNCOMPRESSED_SIZE;
use crate::layout::{MAX_CHUNK_SIZE, MAX_CHUNKS};
use crate::superblock::{BlobFacts, Format};
use context::Contexts;

/// Size of the chunks that a tar is fetched in. The image does not say: nothing about a tar is verifiable.
pub(crate) const TARFS_CHUNK: u32 = 1 << 20;

/// Where a chunk lies in the uncompressed view, and what describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    /// Bytes; 0 if the chunk is absent from the map, [`CONTRADICTORY`] if its descriptions differ.
    pub(crate) size: u32,
    /// v6: position in the chunk table. v5: offset of the record in the bootstrap / 8.
    pub(crate) record: u32,
}

const CONTRADICTORY: u32 = u32::MAX;
const ABSENT: Place = Place {
    offset: 0,
    size: 0,
    record: 0,
};

/// The places of one blob's chunks.
#[derive(Debug)]
enum Places {
    /// By chunk number.
    Dense(Vec<Place>),
    /// Sorted by chunk number: an image that uses little of a large blob.
    Sparse(Vec<(u32, Place)>),
}

impl Places {
    fn get(&self, index: u32) -> Option<Place> {
        let place = match self {
            Places::Dense(places) => *places.get(index as usize)?,
            Places::Sparse(places) => {
                let at = places.binary_search_by_key(&index, |(index, _)| *index).ok()?;
                places.get(at)?.1
            }
        };
        (place.size != 0 && place.size != CONTRADICTORY).then_some(place)
    }

    /// Collects `chunks` of a blob with `chunk_count` chunks. `same` tells whether two records mean the same.
    fn collect(mut chunks: Vec<(u32, Place)>, chunk_count: u32, same: impl Fn(u32, u32) -> bool) -> Self {
        let merge = |seen: &mut Place, place: Place| {
            if seen.size == 0 {
                *seen = place;
            } else if *seen != place
                && !(seen.size == place.size
                    && seen.offset == place.offset
                    && same(seen.record, place.record))
            {
                seen.size = CONTRADICTORY;
            }
        };
        if u64::from(chunk_count) <= 2 * chunks.len() as u64 + 1024 {
            let mut places = vec![ABSENT; chunk_count as usize];
            for (index, place) in chunks {
                if let Some(seen) = places.get_mut(index as usize) {
                    merge(seen, place);
                }
            }
            return Places::Dense(places);
        }
        chunks.sort_by_key(|(index, _)| *index);
        chunks.dedup_by(|(index, place), (seen_index, seen)| {
            let equal = index == seen_index;
            if equal {
                merge(seen, *place);
            }
            equal
        });
        chunks.shrink_to_fit();
        Places::Sparse(chunks)
    }
}

/// The chunks of all blobs of an image.
#[derive(Debug)]
pub(crate) struct ChunkMap {
    blobs: Vec<Places>,
}

impl ChunkMap {
    fn build(image: &Image) -> Result<Self, Damaged> {
        match image.superblock.format {
            Format::V5 { inode_table, .. } => v5::build(image, inode_table),
            Format::V6 { chunk_table, .. } => v6::build(image, chunk_table),
        }
    }

    /// Where chunk `index` of blob `blob` lies; `None` if the image does not describe it, or contradicts itself.
    pub(crate) fn place(&self, blob: usize, index: u32) -> Option<Place> {
        self.blobs.get(blob)?.get(index)
    }
}

/// An image and the map of its chunks, shared by the file system and its blobs.
pub(crate) struct Indexed {
    pub(crate) image: Image,
    map: OnceLock<Result<ChunkMap, Damaged>>,
}

impl Indexed {
    pub(crate) fn new(image: Image) -> Self {
        Self {
            image,
            map: OnceLock::new(),
        }
    }

    /// The map, if it was built.
    pub(crate) fn map(&self) -> Option<Result<&ChunkMap, Damaged>> {
        self.map.get().map(|map| map.as_ref().map_err(|damaged| *damaged))
    }

    /// The map; builds it first if need be, which may take some milliseconds.
    pub(crate) fn build_map(&self) -> Result<&ChunkMap, Damaged> {
        self.map
            .get_or_init(|| ChunkMap::build(&self.image))
            .as_ref()
            .map_err(|damaged| *damaged)
    }

    /// The record that describes the chunk at `place`.
    pub(crate) fn record(&self, place: Place) -> Result<&ChunkRecord, Damaged> {
        let offset = match self.image.superblock.format {
            Format::V5 { .. } => u64::from(place.record) * 8,
            Format::V6 { chunk_table, .. } => {
                chunk_table.offset + u64::from(place.record) * size_of::<ChunkRecord>() as u64
            }
        };
        self.image.bootstrap.get("chunk record", offset)
    }
}

/// Sanity of a record, as far as one record and its blob allow.
fn plausible(record: &ChunkRecord, blobs: &[BlobFacts], chunk_size: u32) -> bool {
    let Some(blob) = blobs.get(record.blob_index.get() as usize) else {
        return false;
    };
    let size = record.uncompressed_size.get();
    let end = record.uncompressed_offset.get().checked_add(size.into());
    (1..=chunk_size.min(MAX_CHUNK_SIZE)).contains(&size)
        && record.flags.get() & !ChunkFlags::KNOWN == 0
        && record.index.get()
            < match blob.chunk_count {
                // The largest number says how many there are, and that is paid for.
                0 => MAX_CHUNKS / u32::try_from(blobs.len()).unwrap_or(MAX_CHUNKS),
                count => count,
            }
        && end.is_some_and(|end| {
            end <= match blob.uncompressed_size {
                0 => MAX_UNCOMPRESSED_SIZE,
                size => size,
            }
        })
}

/// The index of one blob, as the store sees it.
pub(crate) struct BlobIndex {
    indexed: Arc<Indexed>,
    blob: usize,
    /// Contexts of batches or gzip slices, once supplied; `None` inside if the blob needs none.
    contexts: Option<Mutex<Option<Arc<Contexts>>>>,
}

impl BlobIndex {
    pub(crate) fn new(indexed: Arc<Indexed>, blob: usize) -> Self {
        let needed = indexed
            .image
            .superblock
            .blobs
            .get(blob)
            .is_some_and(|facts| facts.features.need_contexts());
        Self {
            indexed,
            blob,
            contexts: needed.then(|| Mutex::new(None)),
        }
    }

    fn facts(&self) -> Result<&BlobFacts, IndexError> {
        self.indexed
            .image
            .superblock
            .blobs
            .get(self.blob)
            .ok_or(IndexError {
                blob_id: self.blob.to_string(),
                reason: "not in the blob table".to_owned(),
            })
    }

    fn describe(&self, facts: &BlobFacts, index: u32) -> Result<Chunk, String> {
        if facts.features.has(Features::TARFS) {
            return tar_chunk(facts, index);
        }
        let map = self.indexed.build_map().map_err(|damaged| damaged.to_string())?;
        let place = map
            .place(self.blob, index)
            .ok_or_else(|| format!("the bootstrap does not describe chunk {index}, or contradicts itself"))?;
        let record = self
            .indexed
            .record(place)
            .map_err(|damaged| damaged.to_string())?;
        let flags = record.flags.get();
        let mut chunk = Chunk {
            index,
            compressed_offset: record.compressed_offset.get(),
            compressed_size: record.compressed_size.get(),
            uncompressed_offset: place.offset,
            uncompressed_size: place.size,
            encoding: Encoding::Plain {
                compressed: flags & ChunkFlags::COMPRESSED != 0,
            },
            encrypted: flags & ChunkFlags::ENCRYPTED != 0,
            digest: Some(record.digest),
            crc32c: (flags & ChunkFlags::HAS_CRC32C != 0).then_some(record.crc32c.get()),
        };
        if let Some(contexts) = &self.contexts {
            let contexts = contexts.lock().unwrap_or_else(PoisonError::into_inner).clone();
            contexts
                .ok_or("its contexts were not read yet")?
                .describe(&mut chunk)?;
        }
        Ok(chunk)
    }
}

/// Piece `index` of a tar that is served as it is.
fn tar_chunk(facts: &BlobFacts, index: u32) -> Result<Chunk, String> {
    let offset = u64::from(index) * u64::from(TARFS_CHUNK);
    let size = facts
        .compressed_size
        .checked_sub(offset)
        .filter(|rest| *rest != 0)
        .ok_or_else(|| format!("chunk {index} is beyond the end of the tar"))?
        .min(TARFS_CHUNK.into()) as u32;
    Ok(Chunk {
        index,
        compressed_offset: offset,
        compressed_size: size,
        uncompressed_offset: offset,
        uncompressed_size: size,
        encoding: Encoding::Plain { compressed: false },
        encrypted: false,
        digest: None,
        crc32c: None,
    })
}

impl ChunkIndex for BlobIndex {
    fn wanted(&self) -> Option<IndexRange> {
        let contexts = self.contexts.as_ref()?;
        if contexts.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return None;
        }
        let info = self.facts().ok()?.chunk_info.as_ref()?;
        Some(IndexRange {
            blob_id: info.blob_id.clone(),
            offset: info.offset,
            // At most 256 MiB, checked when the image was opened.
            size: u32::try_from(info.compressed_size + size_of::<ChunkInfoHeader>() as u64).ok()?,
        })
    }

    fn supply(&self, bytes: &[u8]) -> Result<(), IndexError> {
        let facts = self.facts()?;
        let Some(contexts) = &self.contexts else {
            return Ok(());
        };
        let read = Contexts::read(facts, bytes).map_err(|reason| IndexError {
            blob_id: facts.id.clone(),
            reason,
        })?;
        *contexts.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(read));
        Ok(())
    }

    fn chunk(&self, index: u32) -> Result<Chunk, IndexError> {
        let facts = self.facts()?;
        self.describe(facts, index).map_err(|reason| IndexError {
            blob_id: facts.id.clone(),
            reason,
        })
    }
}

/// Describes blob `blob` of the image to the store.
pub(crate) fn describe_blob(
    indexed: &Arc<Indexed>,
    blob: usize,
    facts: &BlobFacts,
) -> Result<BlobDescription, Damaged> {
    let index = Arc::new(BlobIndex::new(indexed.clone(), blob));
    let mut description = BlobDescription {
        id: facts.id.clone(),
        compressed_size: facts.data_end,
        uncompressed_size: facts.uncompressed_size,
        chunk_count: facts.chunk_count,
        compression: facts.compression,
        digester: facts.digester,
        cipher: facts.cipher.clone(),
        unverifiable: false,
        index,
    };
    if facts.features.has(Features::TARFS) {
        let count = facts.compressed_size.div_ceil(TARFS_CHUNK.into());
        description.chunk_count = u32::try_from(count)
            .map_err(|_| Damaged::new("blob table entry", blob as u64, "tar too large"))?;
        description.uncompressed_size = facts.compressed_size;
        description.compression = Compression::None;
        description.digester = Digester::Sha256;
        description.unverifiable = true;
    } else if facts.chunk_count == 0 || facts.uncompressed_size == 0 {
        // Old v5 images do not say; their records do.
        let (chunks, size) = indexed.build_map()?.extent(blob);
        description.chunk_count = description.chunk_count.max(chunks);
        description.uncompressed_size = description.uncompressed_size.max(size);
    }
    Ok(description)
}

impl ChunkMap {
    /// One more than the largest chunk number of a blob, and where its last chunk ends.
    fn extent(&self, blob: usize) -> (u32, u64) {
        let end = |(chunks, size): (u32, u64), (index, place): (u32, Place)| match place.size {
            0 | CONTRADICTORY => (chunks, size),
            bytes => (chunks.max(index + 1), size.max(place.offset + u64::from(bytes))),
        };
        match self.blobs.get(blob) {
            Some(Places::Dense(places)) => (0..).zip(places.iter().copied()).fold((0, 0), end),
            Some(Places::Sparse(places)) => places.iter().copied().fold((0, 0), end),
            None => (0, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(offset: u64, record: u32) -> Place {
        Place {
            offset,
            size: 10,
            record,
        }
    }

    #[test]
    fn chunks_are_found_by_number_whether_few_or_many() {
        let chunks = vec![(7, place(70, 1)), (3, place(30, 0)), (9, place(90, 2))];
        for chunk_count in [10, 1 << 20] {
            let places = Places::collect(chunks.clone(), chunk_count, |_, _| false);
            assert_eq!(matches!(places, Places::Dense(_)), chunk_count == 10);
            assert_eq!(places.get(3), Some(place(30, 0)));
            assert_eq!(places.get(9), Some(place(90, 2)));
            assert_eq!(places.get(8), None);
            assert_eq!(places.get(u32::MAX), None);
        }
    }

    #[test]
    fn a_chunk_with_two_different_descriptions_is_refused() {
        for chunk_count in [10, 1 << 20] {
            let same = |chunks: Vec<(u32, Place)>, same| {
                Places::collect(chunks, chunk_count, move |_, _| same).get(3)
            };
            assert_eq!(same(vec![(3, place(30, 0)), (3, place(31, 1))], true), None);
            assert_eq!(same(vec![(3, place(30, 0)), (3, place(30, 1))], false), None);
            assert_eq!(
                same(vec![(3, place(30, 0)), (3, place(30, 1))], true),
                Some(place(30, 0))
            );
        }
    }
}
