//! Directories: finding a name, and listing names from any point.
//!
//! A cookie tells where a listing goes on. It is a position in the image, so it is stable for ever and any
//! listing may start with any cookie. 0 is the beginning.

mod v5;
mod v6;

use crate::error::Damaged;
use crate::image::Image;
use crate::inode::{Inode, Kind};
use crate::superblock::Format;

/// An entry of a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a [u8],
    /// Local id of the inode.
    pub(crate) id: u64,
    /// Its type, as the directory says; `None` if it says nothing that makes sense.
    pub(crate) kind: Option<Kind>,
    /// Cookie of this entry.
    pub(crate) cookie: u64,
    /// Cookie of the next one.
    pub(crate) next: u64,
}

/// Checks what may be shown to a guest as a name.
fn check_name(name: &[u8], at: u64) -> Result<&[u8], Damaged> {
    if name.is_empty() || name.len() > crate::layout::MAX_NAME {
        return Err(Damaged::new(
            "directory entry",
            at,
            "name of a length that is not allowed",
        ));
    }
    if name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        return Err(Damaged::new(
            "directory entry",
            at,
            "name with a character that is not allowed",
        ));
    }
    Ok(name)
}

fn check_directory(dir: &Inode) -> Result<(), Damaged> {
    if dir.kind == Kind::Directory {
        Ok(())
    } else {
        Err(Damaged::new("inode", dir.id, "not a directory"))
    }
}

impl Image {
    /// The inode called `name` in `dir`; `None` if there is none.
    pub(crate) fn lookup(&self, dir: &Inode, name: &[u8]) -> Result<Option<Inode>, Damaged> {
        check_directory(dir)?;
        match self.superblock.format {
            Format::V5 { inode_table, .. } => v5::lookup(self, inode_table, dir, name),
            Format::V6 { .. } => v6::lookup(self, dir, name),
        }
    }

    /// Calls `visit` for each entry of `dir` from `cookie` on, `.` and `..` included, until it returns `false`.
    /// A damaged inode does not disturb the listing of its directory: entries are resolved one by one.
    pub(crate) fn list<'a, E: From<Damaged>>(
        &'a self,
        dir: &Inode,
        cookie: u64,
        visit: &mut dyn FnMut(Entry<'a>) -> Result<bool, E>,
    ) -> Result<(), E> {
        check_directory(dir)?;
        match self.superblock.format {
            Format::V5 { inode_table, .. } => v5::list(self, inode_table, dir, cookie, visit),
            Format::V6 { block_bits, .. } => v6::list(self, block_bits, dir, cookie, visit),
        }
    }

    /// Whether names of one directory have consecutive numbers (v6; v5 stores the order itself).
    pub(crate) fn is_numbered(&self) -> Result<bool, Damaged> {
        match self.superblock.format {
            Format::V5 { .. } => Ok(false),
            Format::V6 { .. } => v6::is_numbered(self, &self.inode(self.root())?),
        }
    }

    /// The inode that an entry of `dir` refers to, checked against what the directory says of it.
    pub(crate) fn resolve(&self, dir: &Inode, entry: &Entry<'_>) -> Result<Inode, Damaged> {
        match self.superblock.format {
            Format::V5 { inode_table, .. } => v5::resolve(self, inode_table, dir, entry),
            Format::V6 { .. } => v6::resolve(self, dir, entry),
        }
    }
}
