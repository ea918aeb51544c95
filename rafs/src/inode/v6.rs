//! Inodes of RAFS v6, and the flat data of directories and symlinks.

use super::{Body, Inode, Kind, check_nsec};
use crate::error::Damaged;
use crate::image::Image;
use crate::layout::v6::{ChunkAddress, CompactInode, ExtendedInode, InodeFormat, NID_UNIT, XattrHeader};
use crate::layout::{MAX_SYMLINK, align_up};
use crate::superblock::Format;
use zerocopy::little_endian::U16;

/// Local ids have 40 bits.
const MAX_NID: u64 = 1 << 40;

/// Fields that both kinds of records have.
struct Record {
    size_on_disk: u64,
    mode: u16,
    xattr_count: u16,
    size: u64,
    union: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    mtime: u64,
    mtime_nsec: u32,
}

pub(super) fn inode(image: &Image, block_bits: u8, meta: u64, nid: u64) -> Result<Inode, Damaged> {
    if nid == 0 || nid >= MAX_NID {
        return Err(Damaged::new("nid", nid, "not an inode"));
    }
    let offset = nid
        .checked_mul(NID_UNIT)
        .and_then(|offset| offset.checked_add(meta))
        .ok_or(Damaged::new("nid", nid, "beyond the end of the bootstrap"))?;
    let format = image.bootstrap.get::<U16>("inode", offset)?.get();
    if format & !InodeFormat::KNOWN != 0 {
        return Err(Damaged::new("inode", offset, "unknown format"));
    }
    let record = record(image, format, offset)?;
    let mode = u32::from(record.mode);
    let kind = Kind::from_mode(mode).ok_or(Damaged::new("inode", offset, "unknown type"))?;

    let layout = format >> InodeFormat::LAYOUT_SHIFT & InodeFormat::LAYOUT_MASK;
    let allowed = match kind {
        Kind::File => layout == InodeFormat::CHUNK_BASED && record.union & InodeFormat::CHUNK_INDEXES != 0,
        Kind::Directory | Kind::Symlink => {
            matches!(layout, InodeFormat::FLAT_PLAIN | InodeFormat::FLAT_INLINE)
        }
        _ => layout == InodeFormat::FLAT_PLAIN && record.size == 0,
    };
    if !allowed {
        return Err(Damaged::new(
            "inode",
            offset,
            "data layout or size that its type cannot have",
        ));
    }
    if record.nlink == 0 {
        return Err(Damaged::new("inode", offset, "link count 0"));
    }
    if kind == Kind::Symlink && !(1..=MAX_SYMLINK).contains(&record.size) {
        return Err(Damaged::new(
            "inode",
            offset,
            "symlink target of a size that is not allowed",
        ));
    }

    let xattrs = offset + record.size_on_disk;
    let xattrs_size = match u64::from(record.xattr_count) {
        0 => 0,
        count => size_of::<XattrHeader>() as u64 + 4 * (count - 1),
    };
    image
        .bootstrap
        .slice("extended attributes", xattrs, xattrs_size)?;
    let mut tail = xattrs + xattrs_size;
    let mut addresses = 0;
    if kind == Kind::File {
        tail = align_up(tail, size_of::<ChunkAddress>() as u64).unwrap_or(tail);
        addresses = record.size.div_ceil(u64::from(image.superblock.chunk_size));
        image
            .bootstrap
            .array::<ChunkAddress>("chunk addresses", tail, addresses)?;
    }
    let device = matches!(kind, Kind::Char | Kind::Block);
    Ok(Inode {
        id: nid,
        kind,
        mode,
        nlink: record.nlink,
        uid: record.uid,
        gid: record.gid,
        size: record.size,
        rdev: if device { record.union } else { 0 },
        mtime: record.mtime as i64,
        mtime_nsec: check_nsec(record.mtime_nsec, offset)?,
        offset,
        body: Body::V6 {
            inline: layout == InodeFormat::FLAT_INLINE,
            block: u64::from(record.union) << block_bits,
            xattrs,
            xattrs_size,
            tail,
            addresses,
        },
    })
}

/// The number that the builder gave an inode.
pub(crate) struct Number {
    pub(crate) value: u32,
    /// The inode is a file with several names.
    pub(crate) linked: bool,
}

/// The number of inode `nid`, without checking anything else of it; `None` if there is no such inode.
pub(crate) fn number(image: &Image, nid: u64) -> Option<Number> {
    let Format::V6 { meta, .. } = image.superblock.format else {
        return None;
    };
    let offset = nid.checked_mul(NID_UNIT)?.checked_add(meta)?;
    let format = image.bootstrap.get::<U16>("inode", offset).ok()?.get();
    let (value, mode, links) = if format & InodeFormat::EXTENDED != 0 {
        let inode = image.bootstrap.get::<ExtendedInode>("inode", offset).ok()?;
        (inode.ino.get(), inode.mode.get(), inode.nlink.get())
    } else {
        let inode = image.bootstrap.get::<CompactInode>("inode", offset).ok()?;
        (inode.ino.get(), inode.mode.get(), inode.nlink.get().into())
    };
    let linked = Kind::from_mode(mode.into()) == Some(Kind::File) && links > 1;
    Some(Number { value, linked })
}

fn record(image: &Image, format: u16, offset: u64) -> Result<Record, Damaged> {
    if format & InodeFormat::EXTENDED != 0 {
        let inode = image.bootstrap.get::<ExtendedInode>("inode", offset)?;
        Ok(Record {
            size_on_disk: size_of::<ExtendedInode>() as u64,
            mode: inode.mode.get(),
            xattr_count: inode.xattr_count.get(),
            size: inode.size.get(),
            union: inode.union.get(),
            nlink: inode.nlink.get(),
            uid: inode.uid.get(),
            gid: inode.gid.get(),
            mtime: inode.mtime.get(),
            mtime_nsec: inode.mtime_nsec.get(),
        })
    } else {
        let inode = image.bootstrap.get::<CompactInode>("inode", offset)?;
        Ok(Record {
            size_on_disk: size_of::<CompactInode>() as u64,
            mode: inode.mode.get(),
            xattr_count: inode.xattr_count.get(),
            size: inode.size.get().into(),
            union: inode.union.get(),
            nlink: inode.nlink.get().into(),
            uid: inode.uid.get().into(),
            gid: inode.gid.get().into(),
            mtime: 0,
            mtime_nsec: 0,
        })
    }
}

/// Block `index` of the data of a v6 directory or symlink; shorter than a block only at the end.
pub(crate) fn data_block<'a>(image: &'a Image, inode: &Inode, index: u64) -> Result<&'a [u8], Damaged> {
    let (
        Format::V6 { block_bits, .. },
        Body::V6 {
            inline, block, tail, ..
        },
    ) = (image.superblock.format, inode.body)
    else {
        return Err(Damaged::new("inode", inode.offset, "not of RAFS v6"));
    };
    let block_size = 1u64 << block_bits;
    let start = index
        .checked_mul(block_size)
        .filter(|start| *start < inode.size)
        .ok_or(Damaged::new("inode", inode.offset, "block beyond its size"))?;
    let size = block_size.min(inode.size - start);
    let offset = if inline && size < block_size {
        tail
    } else {
        block.checked_add(start).ok_or(Damaged::new(
            "inode",
            inode.offset,
            "data beyond the end of the bootstrap",
        ))?
    };
    image.bootstrap.slice("directory or symlink data", offset, size)
}

/// All data of a symlink.
pub(super) fn flat_data(image: &Image, inode: &Inode) -> Result<Vec<u8>, Damaged> {
    let mut data = Vec::with_capacity(inode.size.min(MAX_SYMLINK) as usize);
    let mut index = 0;
    while (data.len() as u64) < inode.size {
        data.extend_from_slice(data_block(image, inode, index)?);
        index += 1;
    }
    Ok(data)
}
