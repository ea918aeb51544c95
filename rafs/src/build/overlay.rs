//! One tree on top of another, with whiteouts (v5 section 12).

use std::collections::BTreeMap;

use super::Whiteouts;
use super::tree::{Content, Entry, Inode, InodeId, Tree};

const OCI_PREFIX: &[u8] = b".wh.";
const OCI_OPAQUE: &[u8] = b".wh..wh..opq";
const OVERLAYFS_OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// Puts `upper` on top of `lower`. Inodes of `lower` keep their ids; those of `upper` follow them, their ids moved by
/// `lower.inode_count()`.
pub(super) fn overlay(lower: Tree, upper: Tree, whiteouts: Whiteouts) -> Tree {
    let moved = lower.inode_count();
    let mut tree = lower;
    let root = tree.append(upper);
    merge(&mut tree, Some(InodeId::ROOT), root, whiteouts, true);
    tree.swap(InodeId::ROOT, root);
    debug_assert_eq!(root.position(), moved);
    tree
}

/// Drops the markers of a tree that lies on nothing.
pub(super) fn drop_markers(tree: &mut Tree, whiteouts: Whiteouts) {
    merge(tree, None, InodeId::ROOT, whiteouts, false);
}

/// Merges the directory `lower`, if there is one, into the directory `upper`, and so on below. A first layer (not
/// `layered`) keeps its opaque marks, for whoever puts it on something later.
fn merge(tree: &mut Tree, lower: Option<InodeId>, upper: InodeId, whiteouts: Whiteouts, layered: bool) {
    let mut pending = vec![(lower, upper)];
    while let Some((lower, upper)) = pending.pop() {
        let mut merged: BTreeMap<Vec<u8>, InodeId> = BTreeMap::new();
        let opaque = layered && take_opaque(tree, upper, whiteouts);
        if let Some(lower) = lower.filter(|_| !opaque) {
            merged = tree
                .inode(lower)
                .entries()
                .iter()
                .map(|entry| (entry.name.clone(), entry.inode))
                .collect();
        }
        let entries = std::mem::replace(&mut tree.inode_mut(upper).content, Content::Special);
        let Content::Directory(entries) = entries else {
            tree.inode_mut(upper).content = entries;
            continue;
        };
        // All whiteouts first: they never hide an entry of their own layer.
        let (markers, entries): (Vec<Entry>, Vec<Entry>) = entries
            .into_iter()
            .partition(|entry| is_marker(entry, tree.inode(entry.inode), whiteouts));
        for marker in markers {
            match whiteouts {
                Whiteouts::Oci if marker.name == OCI_OPAQUE => merged.clear(),
                Whiteouts::Oci => drop(
                    marker
                        .name
                        .strip_prefix(OCI_PREFIX)
                        .map(|name| merged.remove(name)),
                ),
                Whiteouts::Overlayfs => drop(merged.remove(&marker.name)),
                Whiteouts::None => {}
            }
        }
        for Entry { name, inode } in entries {
            let below = merged.insert(name, inode);
            if is_directory(tree, inode) {
                pending.push((below.filter(|below| is_directory(tree, *below)), inode));
            }
        }
        tree.inode_mut(upper).content = Content::Directory(
            merged
                .into_iter()
                .map(|(name, inode)| Entry { name, inode })
                .collect(),
        );
    }
}

fn is_directory(tree: &Tree, inode: InodeId) -> bool {
    matches!(tree.inode(inode).content, Content::Directory(_))
}

fn is_marker(entry: &Entry, inode: &Inode, whiteouts: Whiteouts) -> bool {
    match whiteouts {
        Whiteouts::None => false,
        Whiteouts::Oci => entry.name.starts_with(OCI_PREFIX),
        Whiteouts::Overlayfs => {
            let character = rustix::fs::FileType::from_raw_mode(inode.attributes.mode)
                == rustix::fs::FileType::CharacterDevice;
            character && inode.content == Content::Device { rdev: 0 }
        }
    }
}

/// Whether the directory hides all that lies below it; if so, its mark is taken off.
fn take_opaque(tree: &mut Tree, directory: InodeId, whiteouts: Whiteouts) -> bool {
    if whiteouts != Whiteouts::Overlayfs {
        return false;
    }
    let xattrs = &mut tree.inode_mut(directory).xattrs;
    let before = xattrs.len();
    xattrs.retain(|(name, value)| !(name == OVERLAYFS_OPAQUE && value == b"y"));
    xattrs.len() < before
}

#[cfg(test)]
mod tests {
    use super::super::tree::Attributes;
    use super::*;

    /// A tree from paths; one that ends with `/` is a directory, `*` behind a name makes a 0:0 device, `!` an opaque
    /// directory.
    fn tree(uid: u32, paths: &[&str]) -> Tree {
        let attributes = |mode| Attributes {
            mode,
            uid,
            ..Attributes::default()
        };
        let mut tree = Tree::new(attributes(0o40755));
        for path in paths {
            let mut at = InodeId::ROOT;
            let mut names = path.split('/').filter(|name| !name.is_empty()).peekable();
            while let Some(name) = names.next() {
                let (name, opaque) = name.strip_suffix('!').map_or((name, false), |name| (name, true));
                let (name, device) = name.strip_suffix('*').map_or((name, false), |name| (name, true));
                let known = tree
                    .inode(at)
                    .entries()
                    .iter()
                    .find(|e| e.name == name.as_bytes())
                    .map(|e| e.inode);
                let next = known.unwrap_or_else(|| {
                    let inode = if names.peek().is_some() || path.ends_with('/') {
                        let xattrs = if opaque {
                            vec![(OVERLAYFS_OPAQUE.to_vec(), b"y".to_vec())]
                        } else {
                            Vec::new()
                        };
                        Inode {
                            xattrs,
                            ..Inode::directory(attributes(0o40755))
                        }
                    } else {
                        let (mode, content) = if device {
                            (0o20644, Content::Device { rdev: 0 })
                        } else {
                            (0o100_644, Content::Regular { size: 1 })
                        };
                        Inode {
                            attributes: attributes(mode),
                            xattrs: Vec::new(),
                            content,
                        }
                    };
                    tree.add(inode).unwrap()
                });
                if known.is_none() {
                    let Content::Directory(entries) = &mut tree.inode_mut(at).content else {
                        panic!("{path}")
                    };
                    entries.push(Entry {
                        name: name.into(),
                        inode: next,
                    });
                }
                at = next;
            }
        }
        tree.sort();
        tree
    }

    /// Paths with the owner, which tells the layers apart.
    fn listing(tree: &Tree) -> Vec<String> {
        let mut found = vec![format!("/ {}", tree.inode(InodeId::ROOT).attributes.uid)];
        for visit in tree.directories() {
            for entry in tree.inode(visit.inode).entries() {
                let mut names = visit.path.clone();
                names.push(&entry.name);
                let inode = tree.inode(entry.inode);
                let mark = if inode.xattrs.is_empty() { "" } else { " opaque" };
                let path = String::from_utf8(names.join(&b'/')).unwrap();
                found.push(format!("/{path} {}{mark}", inode.attributes.uid));
            }
        }
        found.sort();
        found
    }

    const LOWER: [&str; 5] = ["a/1", "a/2", "b/deep/x", "c", "d"];

    #[test]
    fn oci_markers_remove_names_or_everything_below() {
        let upper = ["a/.wh.1", "a/3", "b/.wh..wh..opq", "b/y", ".wh.c", ".wh.missing"];
        let merged = overlay(tree(1, &LOWER), tree(2, &upper), Whiteouts::Oci);
        assert_eq!(
            listing(&merged),
            ["/ 2", "/a 2", "/a/2 1", "/a/3 2", "/b 2", "/b/y 2", "/d 1"]
        );
    }

    #[test]
    fn overlayfs_markers_do_the_same() {
        let upper = ["a/1*", "a/3", "b!/y", "c*"];
        let merged = overlay(tree(1, &LOWER), tree(2, &upper), Whiteouts::Overlayfs);
        assert_eq!(
            listing(&merged),
            ["/ 2", "/a 2", "/a/2 1", "/a/3 2", "/b 2", "/b/y 2", "/d 1"]
        );
    }

    #[test]
    fn without_whiteouts_markers_are_files() {
        let merged = overlay(tree(1, &["c"]), tree(2, &[".wh.c", "d*"]), Whiteouts::None);
        assert_eq!(listing(&merged), ["/ 2", "/.wh.c 2", "/c 1", "/d 2"]);
    }

    #[test]
    fn a_directory_replaces_a_file_and_a_file_a_directory() {
        let merged = overlay(tree(1, &LOWER), tree(2, &["a", "c/new"]), Whiteouts::Oci);
        assert_eq!(
            listing(&merged),
            [
                "/ 2",
                "/a 2",
                "/b 1",
                "/b/deep 1",
                "/b/deep/x 1",
                "/c 2",
                "/c/new 2",
                "/d 1"
            ]
        );
        assert_eq!(merged.name_count(), 8);
        assert_eq!(
            merged.data_size(),
            4,
            "what lies below a replaced directory is not counted"
        );
    }

    #[test]
    fn a_whiteout_never_hides_its_own_layer() {
        let merged = overlay(tree(1, &["c"]), tree(2, &[".wh.c", "c"]), Whiteouts::Oci);
        assert_eq!(listing(&merged), ["/ 2", "/c 2"]);
    }

    #[test]
    fn a_first_layer_loses_markers_and_keeps_opaque_marks() {
        let mut first = tree(1, &["a/.wh.1", "a/.wh..wh..opq", "a/2"]);
        drop_markers(&mut first, Whiteouts::Oci);
        assert_eq!(listing(&first), ["/ 1", "/a 1", "/a/2 1"]);
        let mut first = tree(1, &["b!/x", "b!/y*"]);
        drop_markers(&mut first, Whiteouts::Overlayfs);
        assert_eq!(listing(&first), ["/ 1", "/b 1 opaque", "/b/x 1"]);
    }
}
