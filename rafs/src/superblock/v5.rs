//! Superblock and tables of RAFS v5.

use std::path::Path;

use super::{BlobFacts, Format, Superblock, Table, blob_id};
use crate::bootstrap::{Bootstrap, Version};
use crate::error::{Damaged, Refused};
use crate::layout::blob::{Features, TAR_HEADER_SIZE};
use crate::layout::v5::{
    BlobEntry, ExtendedBlobEntry, MAX_FILE_SIZE, ROOT_INDEX, SUPERBLOCK_SIZE, SuperBlock, UNIT,
};
use crate::layout::v6::{MAX_COMPRESSED_SIZE, MAX_UNCOMPRESSED_SIZE};
use crate::layout::{Flags, MAX_CHUNKS};
use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

/// Most blobs of an image. The format has no limit; each costs a mount some open files.
const MAX_BLOBS: usize = 1024;

pub(super) fn read(bootstrap: &Bootstrap, path: &Path) -> Result<Superblock, Refused> {
    let size = bootstrap.size();
    if size <= u64::from(SUPERBLOCK_SIZE) || size > MAX_FILE_SIZE || !size.is_multiple_of(UNIT) {
        return Err(Damaged::new("file size", size, "not a multiple of 8 from 8 KiB to 2 GiB").into());
    }
    let superblock = bootstrap.get::<SuperBlock>("superblock", 0)?;
    superblock.check()?;
    let inode_table = Table {
        offset: superblock.inode_table_offset.get(),
        entries: u64::from(superblock.inode_table_entries.get()),
    };
    let prefetch_table = Table {
        offset: superblock.prefetch_table_offset.get(),
        entries: u64::from(superblock.prefetch_table_entries.get()),
    };
    let extended_blob_table = Table {
        offset: superblock.extended_blob_table_offset.get(),
        entries: u64::from(superblock.extended_blob_table_entries.get()),
    };
    let blob_table_offset = superblock.blob_table_offset.get();
    let blob_table_size = u64::from(superblock.blob_table_size.get());
    check_tables(
        size,
        [
            ("inode table", inode_table.offset, inode_table.entries * 4),
            (
                "prefetch table",
                prefetch_table.offset,
                prefetch_table.entries * 4,
            ),
            ("blob table", blob_table_offset, blob_table_size),
            (
                "extended blob table",
                extended_blob_table.offset,
                extended_blob_table.entries * size_of::<ExtendedBlobEntry>() as u64,
            ),
        ],
    )?;
    bootstrap.array::<U32>("inode table", inode_table.offset, inode_table.entries)?;

    let extended = bootstrap.array::<ExtendedBlobEntry>(
        "extended blob table",
        extended_blob_table.offset,
        extended_blob_table.entries,
    )?;
    let flags = Flags(superblock.flags.get());
    let table = bootstrap.slice("blob table", blob_table_offset, blob_table_size)?;
    let blobs = blobs(table, blob_table_offset, extended, flags, path)?;
    Ok(Superblock {
        version: Version::V5,
        chunk_size: superblock.chunk_size.get(),
        flags,
        inodes: superblock.inodes_count.get(),
        root: ROOT_INDEX,
        prefetch_table,
        blob_table: Table {
            offset: blob_table_offset,
            entries: blob_table_size,
        },
        format: Format::V5 {
            inode_table,
            extended_blob_table,
        },
        blobs,
    })
}

/// Tables lie between superblock and end of file, and do not overlap.
fn check_tables(size: u64, mut tables: [(&'static str, u64, u64); 4]) -> Result<(), Damaged> {
    tables.sort_by_key(|(_, offset, _)| *offset);
    let mut free = u64::from(SUPERBLOCK_SIZE);
    for (name, offset, length) in tables {
        if length == 0 {
            continue;
        }
        if offset < free {
            return Err(Damaged::new(
                name,
                offset,
                "overlaps another table or the superblock",
            ));
        }
        free = offset
            .checked_add(length)
            .filter(|end| *end <= size)
            .ok_or(Damaged::new(name, offset, "beyond the end of the bootstrap"))?;
    }
    Ok(())
}

fn blobs(
    table: &[u8],
    offset: u64,
    extended: &[ExtendedBlobEntry],
    flags: Flags,
    path: &Path,
) -> Result<Vec<BlobFacts>, Damaged> {
    let mut blobs = Vec::new();
    let mut rest = table;
    while rest.len() > size_of::<BlobEntry>() {
        if blobs.len() == MAX_BLOBS {
            return Err(Damaged::new("blob table", offset, "more than 1024 blobs"));
        }
        let at = offset + (table.len() - rest.len()) as u64;
        let Ok((entry, after)) = BlobEntry::ref_from_prefix(rest) else {
            break;
        };
        let end = after.iter().position(|byte| *byte == 0).unwrap_or(after.len());
        let (stored, after) = after.split_at_checked(end).unwrap_or((after, &[]));
        rest = after.get(1..).unwrap_or_default();
        let more = extended.get(blobs.len());
        if more.is_none() && !extended.is_empty() {
            // Padding of the blob table, or a table that the extended one does not cover.
            if stored.is_empty() {
                break;
            }
            return Err(Damaged::new(
                "blob table entry",
                at,
                "without an entry in the extended blob table",
            ));
        }
        let features = Features(more.map_or(0, |more| more.features.get()));
        if features.check("extended blob table entry").is_err() {
            return Err(Damaged::new(
                "extended blob table entry",
                at,
                "features with unknown bits",
            ));
        }
        let compressed_size = more.map_or(0, |more| more.compressed_size.get());
        let header = if features.has(Features::HAS_TAR_HEADER) {
            TAR_HEADER_SIZE
        } else {
            0
        };
        let chunk_count = more.map_or(0, |more| more.chunk_count.get());
        if chunk_count > MAX_CHUNKS {
            return Err(Damaged::new(
                "extended blob table entry",
                at,
                "more than 2^24 chunks",
            ));
        }
        let uncompressed_size = more.map_or(0, |more| more.uncompressed_size.get());
        if uncompressed_size > MAX_UNCOMPRESSED_SIZE || compressed_size > MAX_COMPRESSED_SIZE {
            return Err(Damaged::new(
                "extended blob table entry",
                at,
                "larger than any blob",
            ));
        }
        let prefetch = (entry.prefetch_offset.get(), entry.prefetch_size.get());
        blobs.push(BlobFacts {
            id: blob_id(stored, features, path, at)?,
            features,
            compression: flags.compression(),
            digester: flags.digester(),
            chunk_count,
            compressed_size,
            data_end: compressed_size.saturating_sub(header),
            uncompressed_size,
            cipher: None,
            chunk_info: None,
            prefetch: (prefetch.1 != 0).then_some(prefetch),
        });
    }
    Ok(blobs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_tables_are_refused() {
        let check = |a, b| check_tables(20000, [("a", a, 100), ("b", b, 100), ("c", 0, 0), ("d", 7, 0)]);
        assert!(check(8192, 8292).is_ok());
        assert!(check(8292, 8192).is_ok());
        assert!(check(8192, 8291).is_err());
        assert!(check(8191, 9000).is_err());
        assert!(check(8192, 19901).is_err());
        assert!(check(8192, u64::MAX - 10).is_err());
    }

    #[test]
    fn blob_ids_are_separated_by_nul_and_the_last_one_is_not_terminated() {
        let mut table = Vec::new();
        table.extend_from_slice(&[0; 8]);
        table.extend_from_slice(b"abc\0");
        table.extend_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
        table.extend_from_slice(b"defg");
        let blobs = blobs(&table, 0, &[], Flags(0), Path::new("x")).unwrap();
        let ids: Vec<_> = blobs
            .iter()
            .map(|blob| (blob.id.as_str(), blob.prefetch))
            .collect();
        assert_eq!(ids, [("abc", None), ("defg", Some((1, 2)))]);
    }
}
