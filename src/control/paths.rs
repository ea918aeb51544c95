//! Where in an image an inode is. Images say what a directory holds, not where a file stands, so that the tree is searched
//! when somebody asks, and what was found is kept.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;
use rafs::reader::Reader;

/// Entries of directories that are looked at before a search is given up.
const LIMIT: usize = 1_000_000;

/// Paths that are kept.
const KEPT: usize = 4096;

/// Paths of one image that somebody asked for, by local id. Those that were not found are kept, too.
#[derive(Default)]
pub(super) struct Paths {
    found: Mutex<BTreeMap<u64, Option<String>>>,
}

impl Paths {
    /// The paths of `wanted`, as far as there are such files. Of a file with several names it is the first.
    pub fn find(&self, reader: &Reader, wanted: &BTreeSet<u64>) -> BTreeMap<u64, String> {
        let mut found = self.found.lock();
        let missing: BTreeSet<u64> = wanted
            .iter()
            .copied()
            .filter(|id| !found.contains_key(id))
            .collect();
        if !missing.is_empty() {
            if found.len() + missing.len() > KEPT {
                found.clear();
            }
            let mut new = search(reader, missing.clone());
            found.extend(missing.into_iter().map(|id| (id, new.remove(&id))));
        }
        wanted
            .iter()
            .filter_map(|id| Some((*id, found.get(id)?.clone()?)))
            .collect()
    }
}

fn search(reader: &Reader, mut missing: BTreeSet<u64>) -> BTreeMap<u64, String> {
    let mut found = BTreeMap::new();
    if missing.remove(&reader.root()) {
        found.insert(reader.root(), "/".to_owned());
    }
    let mut directories = vec![(reader.root(), String::new())];
    // A damaged image may have directories that lead to each other.
    let mut seen = BTreeSet::from([reader.root()]);
    let mut looked_at = 0;
    while let Some((id, path)) = directories.pop() {
        let Ok(children) = reader.inode(id).and_then(|inode| reader.children(&inode)) else {
            continue;
        };
        for child in children {
            looked_at += 1;
            if missing.is_empty() || looked_at > LIMIT {
                return found;
            }
            if matches!(child.name.as_slice(), b"." | b"..") {
                continue;
            }
            let path = format!("{path}/{}", String::from_utf8_lossy(&child.name));
            if missing.remove(&child.id) {
                found.insert(child.id, path.clone());
            }
            if child.kind == Some(rafs::inode::Kind::Directory) && seen.insert(child.id) {
                directories.push((child.id, path));
            }
        }
    }
    found
}
