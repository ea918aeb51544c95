//! Directories of RAFS v5: children have consecutive indexes, sorted by name; `.` and `..` are not stored.

use std::cmp::Ordering;

use super::{Entry, check_name};
use crate::error::Damaged;
use crate::image::Image;
use crate::inode::v5::{name, raw, record, record_offset};
use crate::inode::{Body, Inode, Kind};
use crate::superblock::Table;

/// Cookies 1 and 2 are behind `.` and `..`.
const DOTS: u64 = 2;

fn children(dir: &Inode) -> Result<(u64, u64, u64), Damaged> {
    match dir.body {
        Body::V5 {
            parent,
            child_index,
            child_count,
            ..
        } => Ok((parent, child_index, child_count)),
        Body::V6 { .. } => Err(Damaged::new("inode", dir.offset, "not of RAFS v5")),
    }
}

/// The child at `index`: its name is in its own record, the inode is the one of the first name.
fn child<'a>(image: &'a Image, table: Table, dir: &Inode, index: u64) -> Result<(&'a [u8], Inode), Damaged> {
    let offset = record_offset(image, table, index)?;
    let own = record(image, offset)?;
    let Body::V5 { parent, .. } = own.body else {
        return Err(Damaged::new("inode", offset, "not of RAFS v5"));
    };
    if parent != dir.id {
        return Err(Damaged::new(
            "inode",
            offset,
            "its parent is not the directory that lists it",
        ));
    }
    let inode = if own.id == index {
        own
    } else if own.is_hardlinked() && own.id < index {
        let first = image.inode(own.id)?;
        let same = first.size == own.size && first.nlink == own.nlink;
        if !first.is_hardlinked() || !same || raw(image, first.offset)?.digest != raw(image, offset)?.digest {
            return Err(Damaged::new(
                "inode",
                offset,
                "differs from the inode that it is a link to",
            ));
        }
        first
    } else {
        return Err(Damaged::new("inode", offset, "number differs from its index"));
    };
    Ok((check_name(name(image, offset)?, dir.id)?, inode))
}

pub(super) fn lookup(
    image: &Image,
    table: Table,
    dir: &Inode,
    wanted: &[u8],
) -> Result<Option<Inode>, Damaged> {
    let (parent, first, count) = children(dir)?;
    match wanted {
        b"." => return Ok(Some(*dir)),
        b".." => return parent_of(image, dir, parent).map(Some),
        _ => {}
    }
    let (mut low, mut high) = (first, first + count);
    while low < high {
        let middle = low + (high - low) / 2;
        match name(image, record_offset(image, table, middle)?)?.cmp(wanted) {
            Ordering::Equal => return child(image, table, dir, middle).map(|(_, inode)| Some(inode)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(None)
}

fn parent_of(image: &Image, dir: &Inode, parent: u64) -> Result<Inode, Damaged> {
    if parent == 0 {
        Ok(*dir)
    } else {
        image.inode(parent)
    }
}

pub(super) fn resolve(image: &Image, table: Table, dir: &Inode, entry: &Entry<'_>) -> Result<Inode, Damaged> {
    let (parent, first, _) = children(dir)?;
    match entry.cookie {
        0 => Ok(*dir),
        1 => parent_of(image, dir, parent),
        position => child(image, table, dir, first + position - DOTS).map(|(_, inode)| inode),
    }
}

pub(super) fn list<'a, E: From<Damaged>>(
    image: &'a Image,
    table: Table,
    dir: &Inode,
    cookie: u64,
    visit: &mut dyn FnMut(Entry<'a>) -> Result<bool, E>,
) -> Result<(), E> {
    let (parent, first, count) = children(dir)?;
    for position in cookie..DOTS + count {
        let (name, id, kind): (&[u8], u64, _) = match position {
            0 => (b".", dir.id, Some(Kind::Directory)),
            1 => (
                b"..",
                if parent == 0 { dir.id } else { parent },
                Some(Kind::Directory),
            ),
            _ => {
                let offset = record_offset(image, table, first + position - DOTS)?;
                let record = raw(image, offset)?;
                let name = check_name(name(image, offset)?, dir.id)?;
                (name, record.ino.get(), Kind::from_mode(record.mode.get()))
            }
        };
        if !visit(Entry {
            name,
            id,
            kind,
            cookie: position,
            next: position + 1,
        })? {
            break;
        }
    }
    Ok(())
}
