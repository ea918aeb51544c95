//! Checks all metadata of an image: every entry, inode, attribute and chunk address, and the digests of v5.

use std::collections::HashSet;

use crate::digest;
use crate::error::Damaged;
use crate::inode::{Inode, Kind};
use crate::reader::Reader;

/// What a complete check has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Directory entries, and the root.
    pub names: u64,
    /// Inodes: names of one file count once.
    pub inodes: u64,
    /// Bytes of all files, each inode once.
    pub bytes: u64,
    /// Faults found.
    pub faults: u64,
}

impl Reader {
    /// Checks everything that can be checked without the blobs, and calls `fault` with path and reason for whatever is
    /// wrong. Goes on after a fault. Touches every page of the metadata.
    pub fn check(&self, fault: &mut dyn FnMut(&[u8], Damaged)) -> Checked {
        let mut check = Check {
            reader: self,
            fault,
            checked: Checked::default(),
            seen: HashSet::new(),
        };
        let found = self.indexed.build_map().map(|_| ());
        check.note(b"/", found);
        check.tree();
        check.checked
    }
}

struct Check<'a> {
    reader: &'a Reader,
    fault: &'a mut dyn FnMut(&[u8], Damaged),
    checked: Checked,
    seen: HashSet<u64>,
}

impl Check<'_> {
    fn note(&mut self, path: &[u8], result: Result<(), Damaged>) {
        if let Err(damaged) = result {
            self.checked.faults += 1;
            (self.fault)(path, damaged);
        }
    }

    fn tree(&mut self) {
        let root = match self.reader.inode(self.reader.root()) {
            Ok(root) => root,
            Err(damaged) => return self.note(b"/", Err(damaged)),
        };
        self.checked.names += 1;
        self.inode(b"/", &root);
        let mut open = vec![(Vec::new(), root)];
        while let Some((path, dir)) = open.pop() {
            let result = self.directory(&path, &dir, &mut open);
            self.note(if path.is_empty() { b"/" } else { &path }, result);
        }
    }

    fn directory(
        &mut self,
        path: &[u8],
        dir: &Inode,
        open: &mut Vec<(Vec<u8>, Inode)>,
    ) -> Result<(), Damaged> {
        let image = &self.reader.indexed.image;
        let mut previous: Option<&[u8]> = None;
        image.list::<Damaged>(dir, 0, &mut |entry| {
            let dot = matches!(entry.name, b"." | b"..");
            let child = [path, b"/", entry.name].concat();
            // `.` and `..` of v5 are not stored, and so not sorted.
            if !dot || self.reader.bootstrap().version() == crate::bootstrap::Version::V6 {
                if previous.is_some_and(|previous| previous >= entry.name) {
                    self.note(
                        &child,
                        Err(Damaged::new("directory", dir.id, "not sorted by name")),
                    );
                }
                previous = Some(entry.name);
            }
            let inode = match image.resolve(dir, &entry) {
                Ok(inode) => inode,
                Err(damaged) => {
                    self.note(&child, Err(damaged));
                    return Ok(true);
                }
            };
            if dot {
                return Ok(true);
            }
            self.checked.names += 1;
            if self.inode(&child, &inode) {
                if inode.kind == Kind::Directory {
                    open.push((child, inode));
                }
            } else if inode.kind == Kind::Directory {
                self.note(&child, Err(Damaged::new("directory", inode.id, "has two names")));
            }
            Ok(true)
        })
    }

    /// Checks an inode unless it was seen before; tells whether it was new.
    fn inode(&mut self, path: &[u8], inode: &Inode) -> bool {
        if !self.seen.insert(inode.id) {
            return false;
        }
        self.checked.inodes += 1;
        let reader = self.reader;
        self.note(path, reader.xattrs(inode).map(|_| ()));
        self.note(path, digest::check(&reader.indexed.image, inode));
        match inode.kind {
            Kind::File => {
                self.checked.bytes += inode.size;
                // A failed build of the map was noted already.
                if reader.indexed.build_map().is_ok() {
                    self.note(path, reader.chunks(inode).map(|_| ()));
                }
            }
            Kind::Symlink if reader.superblock().version == crate::bootstrap::Version::V6 => {
                self.note(path, reader.symlink_target(inode).map(|_| ()));
            }
            _ => {}
        }
        true
    }
}
