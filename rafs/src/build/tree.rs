//! The tree that goes into an image: inodes, and the names that lead to them.
//!
//! Every source (directory, tar, parent image) is turned into this form first; both bootstrap writers start
//! from it. Names of one directory are kept sorted by raw bytes, the order that the formats demand.

use std::collections::HashMap;

/// Names an inode of a [`Tree`]. Only the tree that made it may be asked about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId(u32);

impl InodeId {
    /// The root directory of every tree.
    pub const ROOT: Self = Self(0);

    /// The id of an inode after `count` others were put in front of it.
    pub(super) fn moved(self, count: usize) -> Self {
        // `Tree::add` and `Tree::append` keep the sum in range.
        Self(self.0.saturating_add(count as u32))
    }

    /// Position in a table with one element per inode.
    pub fn position(self) -> usize {
        self.0 as usize
    }
}

/// What `stat` shows, as far as RAFS keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Type and permission bits, as `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since the epoch.
    pub mtime: i64,
    /// Its nanoseconds.
    pub mtime_nsec: u32,
}

/// An extended attribute: complete name, value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// 1 to 255 bytes, without `/` and NUL.
    pub name: Vec<u8>,
    /// What it leads to.
    pub inode: InodeId,
}

/// What an inode holds besides its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Names, sorted by raw bytes.
    Directory(Vec<Entry>),
    /// File data of so many bytes. Which chunks hold them is known to the chunk table of the build.
    Regular {
        /// Size in bytes.
        size: u64,
    },
    /// Target of a symbolic link.
    Symlink(Vec<u8>),
    /// Character or block device: the low 32 bits of Linux's `dev_t` encoding.
    Device {
        /// The encoded number.
        rdev: u32,
    },
    /// Fifo or socket.
    Special,
}

/// One object of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Owner, mode, time.
    pub attributes: Attributes,
    /// Sorted by name.
    pub xattrs: Vec<Xattr>,
    /// The rest, by type.
    pub content: Content,
}

impl Inode {
    /// An empty directory.
    pub fn directory(attributes: Attributes) -> Self {
        Self {
            attributes,
            xattrs: Vec::new(),
            content: Content::Directory(Vec::new()),
        }
    }

    /// The names in it; none for anything that is not a directory.
    pub fn entries(&self) -> &[Entry] {
        match &self.content {
            Content::Directory(entries) => entries,
            _ => &[],
        }
    }
}

/// A directory as met on a walk through the tree.
pub struct Visit<'t> {
    /// The directory.
    pub inode: InodeId,
    /// Its parent; the root is its own.
    pub parent: InodeId,
    /// Names from the root to it.
    pub path: Vec<&'t [u8]>,
}

/// A whole tree. Inode 0 is the root directory.
#[derive(Clone, Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
}

impl Tree {
    /// A tree of one directory.
    pub fn new(root: Attributes) -> Self {
        Self {
            inodes: vec![Inode::directory(root)],
        }
    }

    /// Adds an inode that no name leads to yet. `None` after 2^32 - 1 of them.
    pub fn add(&mut self, inode: Inode) -> Option<InodeId> {
        let id = u32::try_from(self.inodes.len())
            .ok()
            .filter(|id| *id < u32::MAX)?;
        self.inodes.push(inode);
        Some(InodeId(id))
    }

    /// The inode behind an id.
    #[allow(clippy::indexing_slicing)] // ids are made by `add`, and inodes are never taken out
    pub fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id.position()]
    }

    /// The same, to be changed.
    #[allow(clippy::indexing_slicing)] // as above
    pub fn inode_mut(&mut self, id: InodeId) -> &mut Inode {
        &mut self.inodes[id.position()]
    }

    /// Adds all inodes of another tree, their ids moved by the number of those that are here; its root, which no
    /// name leads to.
    pub(super) fn append(&mut self, other: Self) -> InodeId {
        let moved = self.inodes.len();
        self.inodes.extend(other.inodes.into_iter().map(|mut inode| {
            if let Content::Directory(entries) = &mut inode.content {
                entries
                    .iter_mut()
                    .for_each(|entry| entry.inode = entry.inode.moved(moved));
            }
            inode
        }));
        InodeId::ROOT.moved(moved)
    }

    /// Makes two inodes change places; names lead to the other one then.
    pub(super) fn swap(&mut self, a: InodeId, b: InodeId) {
        self.inodes.swap(a.position(), b.position());
    }

    /// What the names of a path, from the root, lead to.
    pub(super) fn find(&self, names: &[&[u8]]) -> Option<InodeId> {
        names.iter().try_fold(InodeId::ROOT, |at, name| {
            let entries = self.inode(at).entries();
            let found = entries
                .binary_search_by(|entry| entry.name.as_slice().cmp(name))
                .ok()?;
            Some(entries.get(found)?.inode)
        })
    }

    /// Of each inode, whether a name leads to it. Layers leave some behind.
    pub(super) fn named(&self) -> Vec<bool> {
        let mut named = vec![false; self.inodes.len()];
        let mut name = |inode: InodeId| {
            if let Some(named) = named.get_mut(inode.position()) {
                *named = true;
            }
        };
        name(InodeId::ROOT);
        self.directories()
            .flat_map(|visit| self.inode(visit.inode).entries())
            .for_each(|entry| name(entry.inode));
        named
    }

    /// Inodes that a name leads to.
    fn named_inodes(&self) -> impl Iterator<Item = &Inode> {
        self.inodes
            .iter()
            .zip(self.named())
            .filter_map(|(inode, named)| named.then_some(inode))
    }

    /// Number of inodes, including those that no name leads to (any more).
    pub fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    /// Number of names including the root, which counts as one: what both formats call the inode count.
    pub fn name_count(&self) -> u64 {
        1 + self
            .directories()
            .map(|visit| self.inode(visit.inode).entries().len() as u64)
            .sum::<u64>()
    }

    /// Puts the names of every directory into the order that the formats demand.
    pub fn sort(&mut self) {
        for inode in &mut self.inodes {
            if let Content::Directory(entries) = &mut inode.content {
                entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
            }
        }
    }

    /// All directories: each before those below it, siblings in the order of their names. Images number
    /// their inodes and lay out file data in this order: all entries of one directory, then the next one.
    pub fn directories(&self) -> Directories<'_> {
        Directories {
            tree: self,
            stack: vec![Pending {
                inode: InodeId::ROOT,
                parent: InodeId::ROOT,
                name: b"",
                depth: 0,
            }],
            path: Vec::new(),
        }
    }

    /// Bytes of all regular files, those with several names once.
    pub fn data_size(&self) -> u64 {
        let size = |inode: &Inode| match inode.content {
            Content::Regular { size } => size,
            _ => 0,
        };
        self.named_inodes().map(size).sum()
    }

    /// Whether any inode has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.named_inodes().any(|inode| !inode.xattrs.is_empty())
    }

    /// Numbers and link counts of all inodes.
    pub fn number(&self) -> Numbers {
        let mut numbers = Numbers {
            ino: vec![0; self.inodes.len()],
            links: vec![0; self.inodes.len()],
            first_child: HashMap::new(),
        };
        numbers.assign(InodeId::ROOT, 1);
        let mut next = 2_u32;
        for visit in self.directories() {
            numbers.first_child.insert(visit.inode, next);
            let mut subdirectories = 0;
            for entry in self.inode(visit.inode).entries() {
                match self.inode(entry.inode).content {
                    Content::Directory(_) => subdirectories += 1,
                    _ => numbers.add_link(entry.inode),
                }
                numbers.assign(entry.inode, next);
                next = next.saturating_add(1);
            }
            if let Some(links) = numbers.links.get_mut(visit.inode.position()) {
                *links = 2_u32.saturating_add(subdirectories);
            }
        }
        numbers
    }
}

/// Inode numbers and link counts by RAFS rules: names are numbered, the children of one directory get
/// consecutive numbers, and an inode with several names has the number of its first one (v5 section 4).
pub struct Numbers {
    ino: Vec<u32>,
    links: Vec<u32>,
    first_child: HashMap<InodeId, u32>,
}

impl Numbers {
    fn assign(&mut self, inode: InodeId, number: u32) {
        if let Some(ino) = self.ino.get_mut(inode.position())
            && *ino == 0
        {
            *ino = number;
        }
    }

    fn add_link(&mut self, inode: InodeId) {
        if let Some(links) = self.links.get_mut(inode.position()) {
            *links = links.saturating_add(1);
        }
    }

    /// Inode number; 0 if no name leads to it.
    pub fn ino(&self, inode: InodeId) -> u32 {
        self.ino.get(inode.position()).copied().unwrap_or(0)
    }

    /// Number of inodes that some name leads to.
    pub fn distinct(&self) -> u64 {
        self.ino.iter().filter(|ino| **ino != 0).count() as u64
    }

    /// Link count: 2 + subdirectories for a directory, else the number of names in this image.
    pub fn links(&self, inode: InodeId) -> u32 {
        self.links.get(inode.position()).copied().unwrap_or(0)
    }

    /// Number of the first child of a directory, or what it would be.
    pub fn first_child(&self, directory: InodeId) -> u32 {
        self.first_child.get(&directory).copied().unwrap_or(0)
    }
}

struct Pending<'t> {
    inode: InodeId,
    parent: InodeId,
    name: &'t [u8],
    depth: usize,
}

/// Iterator of [`Tree::directories`].
pub struct Directories<'t> {
    tree: &'t Tree,
    stack: Vec<Pending<'t>>,
    path: Vec<&'t [u8]>,
}

impl<'t> Iterator for Directories<'t> {
    type Item = Visit<'t>;

    fn next(&mut self) -> Option<Visit<'t>> {
        let here = self.stack.pop()?;
        if here.depth > 0 {
            self.path.truncate(here.depth - 1);
            self.path.push(here.name);
        }
        for entry in self.tree.inode(here.inode).entries().iter().rev() {
            if matches!(self.tree.inode(entry.inode).content, Content::Directory(_)) {
                self.stack.push(Pending {
                    inode: entry.inode,
                    parent: here.inode,
                    name: &entry.name,
                    depth: here.depth + 1,
                });
            }
        }
        Some(Visit {
            inode: here.inode,
            parent: here.parent,
            path: self.path.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Inode {
        Inode {
            attributes: Attributes::default(),
            xattrs: Vec::new(),
            content: Content::Regular { size: 1 },
        }
    }

    fn name(tree: &mut Tree, directory: InodeId, name: &str, inode: InodeId) {
        let Content::Directory(entries) = &mut tree.inode_mut(directory).content else {
            panic!()
        };
        entries.push(Entry {
            name: name.into(),
            inode,
        });
    }

    /// / { z, a/ { link -> z, c }, b/ { d/ } }
    fn sample() -> (Tree, [InodeId; 5]) {
        let mut tree = Tree::new(Attributes::default());
        let z = tree.add(file()).unwrap();
        let a = tree.add(Inode::directory(Attributes::default())).unwrap();
        let b = tree.add(Inode::directory(Attributes::default())).unwrap();
        let c = tree.add(file()).unwrap();
        let d = tree.add(Inode::directory(Attributes::default())).unwrap();
        name(&mut tree, InodeId::ROOT, "z", z);
        name(&mut tree, InodeId::ROOT, "b", b);
        name(&mut tree, InodeId::ROOT, "a", a);
        name(&mut tree, a, "link", z);
        name(&mut tree, a, "c", c);
        name(&mut tree, b, "d", d);
        tree.sort();
        (tree, [z, a, b, c, d])
    }

    #[test]
    fn children_of_a_directory_get_consecutive_numbers_and_links_share_the_first() {
        let (tree, [z, a, b, c, d]) = sample();
        let numbers = tree.number();
        assert_eq!(numbers.ino(InodeId::ROOT), 1);
        assert_eq!([a, b, z].map(|id| numbers.ino(id)), [2, 3, 4]);
        assert_eq!(numbers.first_child(a), 5);
        assert_eq!(
            numbers.ino(c),
            5,
            "then `link`, number 6, which keeps the number of `z`"
        );
        assert_eq!(numbers.ino(d), 7);
        assert_eq!(tree.name_count(), 7);
    }

    #[test]
    fn links_count_names_of_files_and_subdirectories_of_directories() {
        let (tree, [z, a, b, c, d]) = sample();
        let numbers = tree.number();
        assert_eq!([InodeId::ROOT, a, b, d].map(|id| numbers.links(id)), [4, 2, 3, 2]);
        assert_eq!([z, c].map(|id| numbers.links(id)), [2, 1]);
    }

    #[test]
    fn a_walk_knows_the_path_of_every_directory() {
        let (tree, _) = sample();
        let paths: Vec<String> = tree
            .directories()
            .map(|v| String::from_utf8(v.path.join(&b'/')).unwrap())
            .collect();
        assert_eq!(paths, ["", "a", "b", "b/d"]);
    }
}
