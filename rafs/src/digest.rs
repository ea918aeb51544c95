//! Digests of v5 inodes: of a file over the digests of its chunks, of a symlink over its target, of a directory over
//! the digests of its children. The root's covers all content (but no names and no other metadata).

use backend::chunk::Digester;
use sha2::Digest;

use crate::error::Damaged;
use crate::image::Image;
use crate::inode::v5::{raw, record_offset};
use crate::inode::{Body, Inode, Kind};
use crate::layout::v5::ChunkRecord;
use crate::superblock::Format;

/// The image's digest of `parts`, one after the other.
fn hash<'a>(digester: Digester, parts: impl Iterator<Item = &'a [u8]>) -> [u8; 32] {
    match digester {
        Digester::Blake3 => {
            let mut hasher = blake3::Hasher::new();
            for part in parts {
                hasher.update(part);
            }
            *hasher.finalize().as_bytes()
        }
        Digester::Sha256 => {
            let mut hasher = sha2::Sha256::new();
            for part in parts {
                hasher.update(part);
            }
            hasher.finalize().into()
        }
    }
}

/// Whether the digest of a v5 file is that of its chunk records.
pub(crate) fn file_matches(image: &Image, inode: &Inode, records: &[ChunkRecord]) -> bool {
    let digester = image.superblock.flags.digester();
    let expected = hash(digester, records.iter().map(|record| record.digest.as_slice()));
    raw(image, inode.offset).is_ok_and(|record| record.digest == expected)
}

/// Whether the digest of a v5 symlink is that of its target.
pub(crate) fn symlink_matches(image: &Image, inode: &Inode, target: &[u8]) -> bool {
    let expected = hash(image.superblock.flags.digester(), std::iter::once(target));
    raw(image, inode.offset).is_ok_and(|record| record.digest == expected)
}

/// Compares the digest of a v5 inode with its content. Directories are compared with the digests that their children
/// have, so that a whole tree is right if each of its inodes is.
pub(crate) fn check(image: &Image, inode: &Inode) -> Result<(), Damaged> {
    let (
        Format::V5 { inode_table, .. },
        Body::V5 {
            child_index,
            child_count,
            chunks,
            ..
        },
    ) = (image.superblock.format, inode.body)
    else {
        return Ok(());
    };
    let matches = match inode.kind {
        Kind::File => {
            let records = image
                .bootstrap
                .array::<ChunkRecord>("chunk records", chunks, child_count)?;
            file_matches(image, inode, records)
        }
        Kind::Symlink => symlink_matches(image, inode, &image.symlink_target(inode)?),
        Kind::Directory => {
            let mut digests = Vec::new();
            for index in child_index..child_index + child_count {
                digests.push(raw(image, record_offset(image, inode_table, index)?)?.digest);
            }
            let expected = hash(
                image.superblock.flags.digester(),
                digests.iter().map(<[u8; 32]>::as_slice),
            );
            raw(image, inode.offset)?.digest == expected
        }
        _ => raw(image, inode.offset)?.digest == hash(image.superblock.flags.digester(), std::iter::empty()),
    };
    if matches {
        Ok(())
    } else {
        Err(Damaged::new(
            "inode",
            inode.id,
            "its digest does not match its content",
        ))
    }
}
