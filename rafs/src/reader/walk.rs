//! All of an image, by path, faults one by one.

use std::collections::HashSet;

use backend::chunk::BlobDescription;

use super::Reader;
use crate::error::Damaged;
use crate::index::describe_blob;
use crate::inode::{Inode, Kind};

/// Something that a walk comes by.
pub struct Step<'a> {
    /// `/` for the root, else `/a/b`.
    pub path: &'a [u8],
    /// What is there. A directory whose entries are damaged is met a second time, with that damage.
    pub inode: Result<&'a Inode, Damaged>,
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
    pub fn walk<E>(&self, visit: &mut dyn FnMut(Step<'_>) -> Result<(), E>) -> Result<(), E> {
        let mut seen = HashSet::new();
        let mut stack: Vec<(Vec<u8>, Result<Inode, Damaged>)> = vec![(Vec::new(), self.inode(self.root()))];
        while let Some((path, inode)) = stack.pop() {
            let shown: &[u8] = if path.is_empty() { b"/" } else { &path };
            let inode = match inode {
                // Only a damaged image leads to a directory twice; it could lead there for ever.
                Ok(inode) if inode.kind == Kind::Directory && !seen.insert(inode.id) => {
                    let damaged = Damaged::new("directory", inode.id, "reached by two paths");
                    visit(Step {
                        path: shown,
                        inode: Err(damaged),
                    })?;
                    continue;
                }
                Ok(inode) => inode,
                Err(damaged) => {
                    visit(Step {
                        path: shown,
                        inode: Err(damaged),
                    })?;
                    continue;
                }
            };
            visit(Step {
                path: shown,
                inode: Ok(&inode),
            })?;
            if inode.kind != Kind::Directory {
                continue;
            }
            let mut below = Vec::new();
            let listed = self.image().list::<Damaged>(&inode, 0, &mut |entry| {
                if !matches!(entry.name, b"." | b"..") {
                    let path = [path.as_slice(), b"/", entry.name].concat();
                    below.push((path, self.image().resolve(&inode, &entry)));
                }
                Ok(true)
            });
            if let Err(damaged) = listed {
                visit(Step {
                    path: shown,
                    inode: Err(damaged),
                })?;
            }
            stack.extend(below.into_iter().rev());
        }
        Ok(())
    }
}
