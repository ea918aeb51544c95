//! Inodes of RAFS v5.

use zerocopy::little_endian::{U32, U64};

use super::{Body, Inode, Kind, check_nsec};
use crate::error::Damaged;
use crate::image::Image;
use crate::layout::v5::{self, ChunkRecord, InodeFlags, ROOT_INDEX, SUPERBLOCK_SIZE, UNIT};
use crate::layout::v6::MAX_UNCOMPRESSED_SIZE;
use crate::layout::{MAX_SYMLINK, align_up};
use crate::superblock::Table;

/// Longest name that a reader tolerates.
const MAX_NAME: u64 = 256;

/// Offset of the record of inode `index` (from 1).
pub(crate) fn record_offset(image: &Image, table: Table, index: u64) -> Result<u64, Damaged> {
    if index == 0 || index > table.entries {
        return Err(Damaged::new("inode index", index, "not in the inode table"));
    }
    let entry = image
        .bootstrap
        .get::<U32>("inode table", table.offset + (index - 1) * 4)?;
    let offset = u64::from(entry.get()) * UNIT;
    if offset <= u64::from(SUPERBLOCK_SIZE) {
        return Err(Damaged::new(
            "inode table entry",
            index,
            "points into the superblock",
        ));
    }
    Ok(offset)
}

/// The record at `offset`, unchecked.
pub(crate) fn raw(image: &Image, offset: u64) -> Result<&v5::Inode, Damaged> {
    image.bootstrap.get("inode", offset)
}

/// Name of the record at `offset`.
pub(crate) fn name(image: &Image, offset: u64) -> Result<&[u8], Damaged> {
    let record = raw(image, offset)?;
    image.bootstrap.slice(
        "inode name",
        offset + size_of::<v5::Inode>() as u64,
        record.name_size.get().into(),
    )
}

/// The inode with number `ino`: the record of its first name.
pub(super) fn inode(image: &Image, table: Table, ino: u64) -> Result<Inode, Damaged> {
    let inode = record(image, record_offset(image, table, ino)?)?;
    if inode.id != ino {
        return Err(Damaged::new("inode number", ino, "not the one in its record"));
    }
    Ok(inode)
}

/// Decodes the record at `offset`.
pub(crate) fn record(image: &Image, offset: u64) -> Result<Inode, Damaged> {
    let damaged = |reason| Damaged::new("inode", offset, reason);
    let record = raw(image, offset)?;
    let mode = record.mode.get();
    let kind = Kind::from_mode(mode).ok_or(damaged("unknown type"))?;
    let flags = record.flags.get();
    let ino = record.ino.get();
    let parent = record.parent.get();
    if ino == 0 || parent >= ino && !(kind == Kind::File && record.nlink.get() > 1) {
        return Err(damaged("number or parent out of range"));
    }
    if (ino == ROOT_INDEX) != (parent == 0) {
        return Err(damaged("only the root has no parent"));
    }
    if record.nlink.get() == 0 {
        return Err(damaged("link count 0"));
    }
    let name_size = u64::from(record.name_size.get());
    if !(1..=MAX_NAME).contains(&name_size) {
        return Err(damaged("name of a size that is not allowed"));
    }
    let is_symlink = kind == Kind::Symlink;
    if is_symlink != (flags & InodeFlags::SYMLINK != 0) {
        return Err(damaged("symlink flag against its type"));
    }
    let target_size = u64::from(record.symlink_size.get());
    if is_symlink && (!(1..=MAX_SYMLINK).contains(&target_size) || record.size.get() != target_size) {
        return Err(damaged("symlink target of a size that is not allowed"));
    }

    // Each part is at most 64 KiB, apart from the attributes, whose size is checked against the file.
    let padded = |size: u64| align_up(size, UNIT).unwrap_or(size);
    let target = offset + size_of::<v5::Inode>() as u64 + padded(name_size);
    let mut next = target + if is_symlink { padded(target_size) } else { 0 };
    let mut xattrs = None;
    if flags & InodeFlags::XATTR != 0 {
        let size = image.bootstrap.get::<U64>("extended attributes", next)?.get();
        image.bootstrap.slice("extended attributes", next + UNIT, size)?;
        xattrs = Some(next);
        next += UNIT + padded(size);
    }
    let child_index = u64::from(record.child_index.get());
    let child_count = u64::from(record.child_count.get());
    match kind {
        Kind::File => {
            image
                .bootstrap
                .array::<ChunkRecord>("chunk records", next, child_count)?;
            let needed = record.size.get().div_ceil(image.superblock.chunk_size.into());
            if flags & InodeFlags::HAS_HOLE == 0 && child_count != needed {
                return Err(damaged("not as many chunks as its size needs"));
            }
            if record.size.get() > MAX_UNCOMPRESSED_SIZE {
                return Err(damaged("larger than any file"));
            }
        }
        Kind::Directory if child_count != 0 && child_index <= ino => {
            return Err(damaged("children before their directory"));
        }
        _ => {}
    }
    let device = matches!(kind, Kind::Char | Kind::Block);
    Ok(Inode {
        id: ino,
        kind,
        mode,
        nlink: record.nlink.get(),
        uid: record.uid.get(),
        gid: record.gid.get(),
        size: record.size.get(),
        rdev: if device { record.rdev.get() } else { 0 },
        mtime: record.mtime.get() as i64,
        mtime_nsec: check_nsec(record.mtime_nsec.get(), offset)?,
        offset,
        body: Body::V5 {
            parent,
            child_index,
            child_count,
            target,
            xattrs,
            chunks: next,
            holes: kind == Kind::File && flags & InodeFlags::HAS_HOLE != 0,
        },
    })
}
