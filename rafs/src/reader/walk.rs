//! All of an image, by path, faults one by one.

use std::collections::HashSet;
use std::rc::Rc;

use backend::chunk::BlobDescription;

use super::Reader;
use crate::dir::Entry;
use crate::error::Damaged;
use crate::image::Image;
use crate::index::describe_blob;
use crate::inode::{Inode, Kind};
use crate::superblock::Format;

/// Smallest entry of a v6 directory, in bytes: the entry and one of the name.
const SMALLEST_ENTRY: u64 = 13;
/// Longest path that is followed, in bytes. No tool makes such trees; a hostile image could, to make paths the most that there is of it.
const MAX_PATH: usize = 16 << 10;

/// Something that a walk comes by.
pub struct Step<'a> {
    /// `/` for the root, else `/a/b`.
    pub path: &'a [u8],
    /// What is there. A directory whose entries are damaged is met a second time, with that damage.
    pub inode: Result<&'a Inode, Damaged>,
}

/// A directory that was entered.
struct Dir {
    path: Vec<u8>,
    inode: Inode,
}

/// What is still to be met. Entries are resolved one by one, when it is their turn: a directory takes little memory.
struct Walk<'a> {
    image: &'a Image,
    open: Vec<(Rc<Dir>, Entry<'a>)>,
    /// Directories, and files with several names.
    seen: HashSet<u64>,
    /// How many names a sane image of this size can still have.
    names: u64,
    /// How many bytes of attributes and chunk addresses.
    bytes: u64,
}

impl Reader {
    /// What the store needs to read chunks of the blob at `position` of the blob table.
    pub fn blob(&self, position: usize) -> Result<BlobDescription, Damaged> {
        let facts = self.superblock().blobs.get(position).ok_or(Damaged::new(
            "blob table",
            position as u64,
            "no such entry",
        ))?;
        describe_blob(&self.indexed, position, facts)
    }

    /// Meets everything, a directory before what is below it, names in the order of the image. Damage is handed
    /// over where it is found, and the walk goes on. `visit` ends it with an error of its own.
    ///
    /// An image in which more can be met than its size has room for contradicts itself, and the walk ends there: no image makes
    /// a walk take longer than one of its size can.
    pub fn walk<E>(&self, visit: &mut dyn FnMut(Step<'_>) -> Result<(), E>) -> Result<(), E> {
        self.walk_below(self.root(), visit)
    }

    /// [`Reader::walk`] from the inode with local id `id`, whose path is taken for the root's.
    pub(crate) fn walk_below<E>(
        &self,
        id: u64,
        visit: &mut dyn FnMut(Step<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let size = self.bootstrap().size();
        let mut walk = Walk {
            image: self.image(),
            open: Vec::new(),
            seen: HashSet::new(),
            names: match self.superblock().format {
                Format::V5 { inode_table, .. } => inode_table.entries,
                Format::V6 { .. } => size / SMALLEST_ENTRY,
            },
            bytes: size,
        };
        walk.meet(Vec::new(), self.inode(id), visit)?;
        while let Some((dir, entry)) = walk.open.pop() {
            let path = [dir.path.as_slice(), b"/", entry.name].concat();
            let inode = walk.image.resolve(&dir.inode, &entry);
            walk.meet(path, inode, visit)?;
        }
        Ok(())
    }
}

impl<'a> Walk<'a> {
    /// Shows what is at `path`, and enters it if it is a directory.
    fn meet<E>(
        &mut self,
        path: Vec<u8>,
        inode: Result<Inode, Damaged>,
        visit: &mut dyn FnMut(Step<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let inode = inode.and_then(|inode| self.admit(&path, inode));
        let shown: &[u8] = if path.is_empty() { b"/" } else { &path };
        let step = Step {
            path: shown,
            inode: inode.as_ref().map_err(|damaged| *damaged),
        };
        visit(step)?;
        match inode {
            Ok(inode) if inode.kind == Kind::Directory => {
                let dir = Rc::new(Dir { path, inode });
                if let Err(damaged) = self.enter(&dir) {
                    let shown: &[u8] = if dir.path.is_empty() { b"/" } else { &dir.path };
                    visit(Step {
                        path: shown,
                        inode: Err(damaged),
                    })?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Refuses what only a damaged image leads to, and could lead to for ever.
    fn admit(&mut self, path: &[u8], inode: Inode) -> Result<Inode, Damaged> {
        let first = match inode.kind {
            Kind::Directory if !self.seen.insert(inode.id) => {
                return Err(Damaged::new("directory", inode.id, "reached by two paths"));
            }
            Kind::Directory if path.len() > MAX_PATH => {
                return Err(Damaged::new(
                    "directory",
                    inode.id,
                    "its path is longer than 16 KiB",
                ));
            }
            _ => !inode.is_hardlinked() || self.seen.insert(inode.id),
        };
        if first {
            self.bytes = self.bytes.checked_sub(inode.extent()).ok_or_else(|| {
                self.open.clear();
                Damaged::new("inode", inode.id, "more metadata than the bootstrap has room for")
            })?;
        }
        Ok(inode)
    }

    fn enter(&mut self, dir: &Rc<Dir>) -> Result<(), Damaged> {
        let first = self.open.len();
        let mut previous: Option<&[u8]> = None;
        let mut sorted = true;
        let (open, names) = (&mut self.open, &mut self.names);
        let listed = self.image.list::<Damaged>(&dir.inode, 0, &mut |entry| {
            if !matches!(entry.name, b"." | b"..") {
                sorted &= previous.is_none_or(|previous| previous < entry.name);
                previous = Some(entry.name);
                *names = names.checked_sub(1).ok_or(Damaged::new(
                    "directory",
                    dir.inode.id,
                    "more names than the bootstrap has room for",
                ))?;
                open.push((Rc::clone(dir), entry));
            }
            Ok(true)
        });
        if self.names == 0 && listed.is_err() {
            self.open.clear();
            return listed;
        }
        if let Some(found) = self.open.get_mut(first..) {
            found.reverse();
        }
        if !sorted {
            return listed.and(Err(Damaged::new("directory", dir.inode.id, "not sorted by name")));
        }
        listed
    }
}
