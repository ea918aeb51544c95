//! Chunks of RAFS v6, from the chunk table.

use super::{ChunkMap, Place, Places, plausible};
use crate::error::Damaged;
use crate::image::Image;
use crate::layout::blob::Features;
use crate::layout::v5::ChunkRecord;
use crate::superblock::Table;

pub(super) fn build(image: &Image, chunk_table: Table) -> Result<ChunkMap, Damaged> {
    let blobs = &image.superblock.blobs;
    let records =
        image
            .bootstrap
            .array::<ChunkRecord>("chunk table", chunk_table.offset, chunk_table.entries)?;
    let mut chunks: Vec<Vec<(u32, Place)>> = vec![Vec::new(); blobs.len()];
    for (position, record) in (0u32..).zip(records) {
        // A record that makes no sense describes nothing: files that need it get an error.
        if !plausible(record, blobs, image.superblock.chunk_size) {
            continue;
        }
        let place = Place {
            offset: record.uncompressed_offset.get(),
            size: record.uncompressed_size.get(),
            record: position,
        };
        if let Some(chunks) = chunks.get_mut(record.blob_index.get() as usize) {
            chunks.push((record.index.get(), place));
        }
    }
    let places = chunks.into_iter().zip(blobs).map(|(chunks, facts)| {
        if facts.features.has(Features::TARFS) {
            return Places::Sparse(Vec::new());
        }
        Places::collect(chunks, facts.chunk_count, |a, b| {
            match (records.get(a as usize), records.get(b as usize)) {
                (Some(a), Some(b)) => a == b,
                _ => false,
            }
        })
    });
    Ok(ChunkMap {
        blobs: places.collect(),
    })
}
