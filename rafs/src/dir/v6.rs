//! Directories of RAFS v6: blocks of sorted entries, `.` and `..` among them.

use std::cmp::Ordering;

use zerocopy::FromBytes;

use super::{Entry, check_name};
use crate::error::Damaged;
use crate::image::Image;
use crate::inode::{Inode, Kind, data_block};
use crate::layout::v6::{Dirent, FileType};

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
    if name == b"." && nid != dir.id {
        return Err(damaged("`.` is another directory"));
    }
    Ok(inode)
}

pub(super) fn lookup(
    image: &Image,
    block_bits: u8,
    dir: &Inode,
    name: &[u8],
) -> Result<Option<Inode>, Damaged> {
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
    block
        .find(name)?
        .map(|index| target(image, dir, &block, index))
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
