//! Directories of RAFS v6: blocks of sorted entries, `.` and `..` among them.
//!
//! Nothing in the format covers an entry by a digest. But a directory knows its parent, and builders number inodes so
//! that the names of one directory, in their order, have consecutive numbers. So an entry that leads to the
//! wrong inode is noticed where it is used: its number does not follow its neighbours'.

use std::cmp::Ordering;

use zerocopy::FromBytes;

use super::{Entry, check_name};
use crate::error::Damaged;
use crate::image::Image;
use crate::inode::v6::{Number, data_block, number};
use crate::inode::{Inode, Kind};
use crate::layout::v6::{Dirent, FileType};
use crate::superblock::Format;

/// Bits of a cookie that count entries within a block; a block of 4096 bytes has less than 400.
const ENTRY_BITS: u32 = 16;

/// One block of entries.
struct Block<'a> {
    bytes: &'a [u8],
    entries: &'a [Dirent],
    /// Inode of the directory, for messages.
    dir: u64,
}

impl<'a> Block<'a> {
    fn read(image: &'a Image, dir: &Inode, index: u64) -> Result<Self, Damaged> {
        let damaged = |reason| Damaged::new("block of directory", dir.id, reason);
        let bytes = data_block(image, dir, index)?;
        let (first, _) = Dirent::ref_from_prefix(bytes).map_err(|_| damaged("too small for an entry"))?;
        let names = usize::from(first.name_offset.get());
        if names == 0 || !names.is_multiple_of(size_of::<Dirent>()) {
            return Err(damaged("first name at an offset that is not allowed"));
        }
        let (entries, _) = <[Dirent]>::ref_from_prefix_with_elems(bytes, names / size_of::<Dirent>())
            .map_err(|_| damaged("entries beyond its end"))?;
        Ok(Self {
            bytes,
            entries,
            dir: dir.id,
        })
    }

    /// Entry `index` and its name; `None` if there is none.
    fn entry(&self, index: usize) -> Result<Option<(&'a Dirent, &'a [u8])>, Damaged> {
        let Some(entry) = self.entries.get(index) else {
            return Ok(None);
        };
        let start = usize::from(entry.name_offset.get());
        let name = match self.entries.get(index + 1) {
            Some(next) => self.bytes.get(start..usize::from(next.name_offset.get())),
            None => self.bytes.get(start..).map(crate::layout::trim_zeros),
        };
        let name = name
            .filter(|_| start >= size_of_val(self.entries))
            .ok_or(Damaged::new(
                "block of directory",
                self.dir,
                "name outside of the block",
            ))?;
        Ok(Some((entry, check_name(name, self.dir)?)))
    }

    /// First name, by which blocks are sorted.
    fn first(&self) -> Result<&'a [u8], Damaged> {
        match self.entry(0)? {
            Some((_, name)) => Ok(name),
            None => Err(Damaged::new("block of directory", self.dir, "empty")),
        }
    }

    /// Position of `name`.
    fn find(&self, name: &[u8]) -> Result<Option<usize>, Damaged> {
        let (mut low, mut high) = (0, self.entries.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let Some((_, found)) = self.entry(middle)? else {
                break;
            };
            match found.cmp(name) {
                Ordering::Equal => return Ok(Some(middle)),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

fn kind(entry: &Dirent) -> Option<Kind> {
    Some(match entry.file_type {
        FileType::REGULAR => Kind::File,
        FileType::DIRECTORY => Kind::Directory,
        FileType::CHAR => Kind::Char,
        FileType::BLOCK => Kind::Block,
        FileType::FIFO => Kind::Fifo,
        FileType::SOCKET => Kind::Socket,
        FileType::SYMLINK => Kind::Symlink,
        _ => return None,
    })
}

/// The inode of entry `index` of `block`, checked against what the directory says of it.
fn target(image: &Image, dir: &Inode, block: &Block<'_>, index: usize) -> Result<Inode, Damaged> {
    let damaged = |reason| Damaged::new("entry of directory", dir.id, reason);
    let (entry, name) = block.entry(index)?.ok_or_else(|| damaged("missing"))?;
    let nid = entry.nid.get();
    let inode = image.inode(nid)?;
    if kind(entry) != Some(inode.kind) {
        return Err(damaged("type differs from the inode's"));
    }
    match name {
        b"." if nid != dir.id => Err(damaged("`.` is another directory")),
        b"." | b".." if inode.kind != Kind::Directory => Err(damaged("`.` or `..` is no directory")),
        b"." | b".." => Ok(inode),
        // The root is its own parent, so the next check would let it through.
        _ if nid == image.root() => Err(damaged("leads back to the root")),
        // The one parent of each directory also keeps a tree free of loops.
        _ if inode.kind == Kind::Directory && parent(image, &inode)? != Some(dir.id) => {
            Err(damaged("leads to a directory with another parent"))
        }
        _ if !follows_neighbours(image, block, index, nid) => {
            Err(damaged("leads to an inode of another name"))
        }
        _ => Ok(inode),
    }
}

/// Node id of the parent that `dir` says it has.
fn parent(image: &Image, dir: &Inode) -> Result<Option<u64>, Damaged> {
    let Some((block, index)) = find(image, dir, b"..")? else {
        return Ok(None);
    };
    Ok(block.entry(index)?.map(|(entry, _)| entry.nid.get()))
}

/// How far to look for a neighbour whose number tells something.
const NEIGHBOURS: usize = 8;

/// Whether the number of inode `nid` fits between those of the entries next to it. True if there is nothing to compare.
fn follows_neighbours(image: &Image, block: &Block<'_>, index: usize, nid: u64) -> bool {
    let own = match number(image, nid) {
        Some(Number { value, linked: false }) if image.numbered => i64::from(value),
        // Of a file with several names only the first one is numbered in its place.
        _ => return true,
    };
    let before = block
        .entries
        .get(..index)
        .unwrap_or_default()
        .iter()
        .enumerate()
        .rev();
    let after = block.entries.iter().enumerate().skip(index + 1);
    // Entries in front of it, nearest first, and how many places the neighbour is away.
    let compare = |neighbours: &mut dyn Iterator<Item = (usize, &Dirent)>| {
        let mut distance = 0;
        for (position, entry) in neighbours.take(NEIGHBOURS) {
            match block.entry(position) {
                Ok(Some((_, b"." | b".."))) => continue,
                Ok(Some(_)) => distance += 1,
                _ => return None,
            }
            match number(image, entry.nid.get()) {
                Some(Number { linked: true, .. }) => {}
                Some(Number { value, .. }) => return Some((i64::from(value), distance)),
                None => return None,
            }
        }
        None
    };
    let before = compare(&mut { before }).map(|(number, distance)| number + distance == own);
    let after = compare(&mut { after }).map(|(number, distance)| number - distance == own);
    // One neighbour that agrees is enough: the other one may be the wrong one.
    !(before == Some(false) && after != Some(true) || after == Some(false) && before != Some(true))
}

/// Whether the builder numbered inodes as upstream does, to judge by the root: its entries have the numbers from 2 on.
pub(super) fn is_numbered(image: &Image, root: &Inode) -> Result<bool, Damaged> {
    let mut expected = 2;
    let (mut yes, mut no) = (0, 0);
    let block = Block::read(image, root, 0)?;
    for (position, entry) in block.entries.iter().enumerate() {
        if let Some((_, b"." | b"..")) = block.entry(position)? {
            continue;
        }
        match number(image, entry.nid.get()) {
            Some(Number { linked: true, .. }) => {}
            Some(Number { value, .. }) if value == expected => yes += 1,
            _ => no += 1,
        }
        expected += 1;
    }
    Ok(yes > no)
}

/// The block and the position in it where `dir` has `name`.
fn find<'a>(image: &'a Image, dir: &Inode, name: &[u8]) -> Result<Option<(Block<'a>, usize)>, Damaged> {
    let Format::V6 { block_bits, .. } = image.superblock.format else {
        return Ok(None);
    };
    // The last block whose first name is not greater.
    let (mut low, mut high) = (0, dir.size.div_ceil(1 << block_bits));
    while low + 1 < high {
        let middle = low + (high - low) / 2;
        if Block::read(image, dir, middle)?.first()? <= name {
            low = middle;
        } else {
            high = middle;
        }
    }
    if low >= high {
        return Ok(None);
    }
    let block = Block::read(image, dir, low)?;
    Ok(block.find(name)?.map(|index| (block, index)))
}

pub(super) fn lookup(image: &Image, dir: &Inode, name: &[u8]) -> Result<Option<Inode>, Damaged> {
    find(image, dir, name)?
        .map(|(block, index)| target(image, dir, &block, index))
        .transpose()
}

fn split(cookie: u64) -> (u64, usize) {
    (cookie >> ENTRY_BITS, (cookie & ((1 << ENTRY_BITS) - 1)) as usize)
}

pub(super) fn resolve(image: &Image, dir: &Inode, entry: &Entry<'_>) -> Result<Inode, Damaged> {
    let (block, index) = split(entry.cookie);
    target(image, dir, &Block::read(image, dir, block)?, index)
}

pub(super) fn list<'a, E: From<Damaged>>(
    image: &'a Image,
    block_bits: u8,
    dir: &Inode,
    cookie: u64,
    visit: &mut dyn FnMut(Entry<'a>) -> Result<bool, E>,
) -> Result<(), E> {
    let blocks = dir.size.div_ceil(1 << block_bits);
    let (mut number, mut index) = split(cookie);
    while number < blocks {
        let block = Block::read(image, dir, number)?;
        while let Some((entry, name)) = block.entry(index)? {
            let cookie = number << ENTRY_BITS | index as u64;
            let found = Entry {
                name,
                id: entry.nid.get(),
                kind: kind(entry),
                cookie,
                next: cookie + 1,
            };
            if !visit(found)? {
                return Ok(());
            }
            index += 1;
        }
        number += 1;
        index = 0;
    }
    Ok(())
}
