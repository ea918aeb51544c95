//! Chunks of RAFS v5, from the records of all files.
//!
//! A v5 file carries the complete record of each of its chunks, so there is no second place to compare it with.
//! But its inode has a digest of their digests, and the chunks of a blob lie back to back in its uncompressed view, in
//! the order of their numbers. Records that do not match the digest of their inode count for nothing, and a chunk
//! that fits neither of its neighbours is refused.

use super::{CONTRADICTORY, ChunkMap, Place, Places, plausible};
use crate::digest;
use crate::error::Damaged;
use crate::image::Image;
use crate::inode::v5::{record, record_offset};
use crate::inode::{Body, Kind};
use crate::layout::align_up;
use crate::layout::v5::{ChunkRecord, UNIT};
use crate::superblock::Table;

/// Alignment of chunks in images built with aligned chunks.
const ALIGNMENT: u64 = 4096;

pub(super) fn build(image: &Image, inode_table: Table) -> Result<ChunkMap, Damaged> {
    let blobs = &image.superblock.blobs;
    let mut chunks: Vec<Vec<(u32, Place)>> = vec![Vec::new(); blobs.len()];
    // Records do not overlap in a sane image; in another one the sum must stay bounded all the same.
    let mut budget = image.bootstrap.size() / size_of::<ChunkRecord>() as u64;
    for index in 1..=inode_table.entries {
        // A damaged inode describes nothing; whoever uses it gets the error.
        let Ok(inode) = record_offset(image, inode_table, index).and_then(|offset| record(image, offset))
        else {
            continue;
        };
        let Body::V5 {
            child_count,
            chunks: start,
            ..
        } = inode.body
        else {
            continue;
        };
        if inode.kind != Kind::File {
            continue;
        }
        budget = budget.checked_sub(child_count).ok_or(Damaged::new(
            "inode table",
            inode_table.offset,
            "more chunk records than the bootstrap has room for",
        ))?;
        let records = image
            .bootstrap
            .array::<ChunkRecord>("chunk records", start, child_count)?;
        if !digest::file_matches(image, &inode, records) {
            continue;
        }
        for (position, record) in (0u64..).zip(records) {
            if !plausible(record, blobs, image.superblock.chunk_size) {
                continue;
            }
            let offset = start + position * size_of::<ChunkRecord>() as u64;
            let place = Place {
                offset: record.uncompressed_offset.get(),
                size: record.uncompressed_size.get(),
                record: u32::try_from(offset / UNIT)
                    .map_err(|_| Damaged::new("chunk records", offset, "beyond 32 GiB"))?,
            };
            if let Some(chunks) = chunks.get_mut(record.blob_index.get() as usize) {
                chunks.push((record.index.get(), place));
            }
        }
    }
    let places = chunks.into_iter().zip(blobs).map(|(chunks, facts)| {
        let count = match facts.chunk_count {
            0 => chunks
                .iter()
                .map(|(index, _)| index + 1)
                .max()
                .unwrap_or_default(),
            count => count,
        };
        let mut places = Places::collect(chunks, count, |a, b| same(image, a, b));
        match &mut places {
            Places::Dense(places) => {
                let mut present: Vec<_> = (0..)
                    .zip(places.iter_mut())
                    .filter(|(_, place)| place.size != 0)
                    .collect();
                refuse_misplaced(&mut present);
            }
            Places::Sparse(places) => {
                let mut present: Vec<_> = places.iter_mut().map(|(index, place)| (*index, place)).collect();
                refuse_misplaced(&mut present);
            }
        }
        places
    });
    Ok(ChunkMap {
        blobs: places.collect(),
    })
}

/// Whether two records describe the same chunk; they may differ in the place in the file.
fn same(image: &Image, a: u32, b: u32) -> bool {
    let record = |at: u32| {
        image
            .bootstrap
            .get::<ChunkRecord>("chunk record", u64::from(at) * UNIT)
    };
    match (record(a), record(b)) {
        (Ok(a), Ok(b)) => {
            ChunkRecord {
                file_offset: b.file_offset,
                ..*a
            } == *b
        }
        _ => false,
    }
}

/// Marks chunks that fit none of their neighbours. `chunks` are sorted by number.
fn refuse_misplaced(chunks: &mut [(u32, &mut Place)]) {
    // For each chunk: whether it fits its predecessor, as far as there is one to compare with.
    let mut fits: Vec<Option<bool>> = Vec::with_capacity(chunks.len() + 1);
    let mut previous: Option<(u32, Place)> = None;
    for (index, place) in chunks.iter() {
        fits.push(match previous {
            None => (*index == 0).then_some(place.offset == 0),
            Some((before, _)) if before + 1 != *index => None,
            Some((_, before)) if before.size == CONTRADICTORY || place.size == CONTRADICTORY => None,
            Some((_, before)) => {
                let end = before.offset + u64::from(before.size);
                Some(place.offset == end || align_up(end, ALIGNMENT) == Some(place.offset))
            }
        });
        previous = Some((*index, **place));
    }
    fits.push(None);
    // An image whose chunks lie in another order altogether is odd, but not damaged.
    let (yes, no) = fits.iter().flatten().fold(
        (0, 0),
        |(yes, no), fit| if *fit { (yes + 1, no) } else { (yes, no + 1) },
    );
    if no > yes + 2 {
        return;
    }
    let mut before = fits.iter();
    let after = fits.iter().skip(1);
    for ((_, place), after) in chunks.iter_mut().zip(after) {
        let links = [before.next().copied().flatten(), *after];
        if links.contains(&Some(false)) && !links.contains(&Some(true)) {
            place.size = CONTRADICTORY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(offsets: &[(u32, u64)]) -> Vec<u32> {
        let mut places: Vec<(u32, Place)> = offsets
            .iter()
            .map(|(index, offset)| {
                (
                    *index,
                    Place {
                        offset: *offset,
                        size: 10,
                        record: 0,
                    },
                )
            })
            .collect();
        let mut chunks: Vec<_> = places.iter_mut().map(|(index, place)| (*index, place)).collect();
        refuse_misplaced(&mut chunks);
        places
            .iter()
            .filter(|(_, place)| place.size == CONTRADICTORY)
            .map(|(index, _)| *index)
            .collect()
    }

    #[test]
    fn a_chunk_that_fits_no_neighbour_is_refused() {
        assert!(refused(&[(0, 0), (1, 10), (2, 20), (3, 30), (4, 40)]).is_empty());
        assert_eq!(refused(&[(0, 0), (1, 10), (2, 28), (3, 30), (4, 40)]), [2]);
        assert_eq!(refused(&[(0, 8), (1, 10), (2, 20), (3, 30), (4, 40)]), [0]);
        assert_eq!(refused(&[(0, 0), (1, 10), (2, 20), (3, 30), (4, 48)]), [4]);
        assert!(refused(&[(0, 0), (1, 4096), (2, 8192), (3, 8202)]).is_empty());
        assert!(refused(&[(0, 0), (5, 110), (6, 120), (9, 7)]).is_empty());
    }
}
