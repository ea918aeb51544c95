//! Walks what a guest sees, and compares it with a description of what it should see.
//!
//! The description is the `expected.json` of an image fixture: `entries` with path, type, mode, owner,
//! mtime, nlink, size, digest, symlink target, device number and extended attributes, and
//! `hardlink_groups`. A path that is not UTF-8 is in `path_b64`, a target in `target_b64`.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::abi::{Dirent, Entry};
use crate::guest::Guest;
use crate::{Error, Result};

const DIRECTORY: u32 = 0o040000;
const FILE: u32 = 0o100000;
const SYMLINK: u32 = 0o120000;
const TYPE: u32 = 0o170000;

/// A node of the tree as the guest sees it.
#[derive(Clone, Debug)]
pub struct Node {
    /// What LOOKUP answered. Of the top: only `nodeid` and `attr`.
    pub entry: Entry,
    /// Target of a symlink.
    pub target: Option<Vec<u8>>,
    /// SHA-256 of a file's bytes.
    pub digest: Option<String>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A tree by path; the top is `/`.
pub type Tree = BTreeMap<Vec<u8>, Node>;

/// How to walk.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// Bytes of a READ.
    pub read: u32,
    /// Bytes of a READDIR and a READDIRPLUS.
    pub list: u32,
    /// READs in flight at once.
    pub depth: usize,
}

impl Default for Walk {
    fn default() -> Self {
        Self {
            read: 128 << 10,
            list: 4096,
            depth: 4,
        }
    }
}

impl Walk {
    /// Walks the tree below `top` and reads all of it.
    pub fn run(&self, guest: &Guest, top: u64) -> Result<Tree> {
        let mut tree = Tree::new();
        let entry = Entry {
            nodeid: top,
            attr: guest.getattr(top)?,
            ..Entry::default()
        };
        self.visit(guest, b"/", entry, &mut tree)?;
        Ok(tree)
    }

    fn visit(&self, guest: &Guest, path: &[u8], entry: Entry, tree: &mut Tree) -> Result<()> {
        let at = |e: Error| Error::Usage(format!("{}: {e}", String::from_utf8_lossy(path)));
        let id = entry.nodeid;
        let mut node = Node {
            entry,
            target: None,
            digest: None,
            xattrs: BTreeMap::new(),
        };
        for name in guest.listxattr(id).map_err(at)? {
            let value = guest.getxattr(id, &name).map_err(at)?;
            node.xattrs.insert(name, value);
        }
        let children = match entry.attr.mode & TYPE {
            DIRECTORY => self.children(guest, id).map_err(at)?,
            FILE => {
                node.digest = Some(self.digest(guest, id, entry.attr.size).map_err(at)?);
                Vec::new()
            }
            SYMLINK => {
                node.target = Some(guest.readlink(id).map_err(at)?);
                Vec::new()
            }
            _ => Vec::new(),
        };
        tree.insert(path.to_vec(), node);
        for (name, child) in children {
            let mut below = path.strip_suffix(b"/").unwrap_or(path).to_vec();
            below.push(b'/');
            below.extend(name);
            self.visit(guest, &below, child, tree)?;
        }
        Ok(())
    }

    /// The entries of a directory: listed twice, looked up once more; all three must agree.
    fn children(&self, guest: &Guest, directory: u64) -> Result<Vec<(Vec<u8>, Entry)>> {
        let plain = guest.list(directory, false, self.list)?;
        let plus = guest.list(directory, true, self.list)?;
        let names = |list: &[Dirent]| -> Result<BTreeMap<Vec<u8>, (u64, u32)>> {
            let map: BTreeMap<_, _> = list
                .iter()
                .map(|entry| (entry.name.clone(), (entry.ino, entry.kind)))
                .collect();
            if map.len() != list.len() {
                return Err(Error::Device("a name is listed twice".into()));
            }
            Ok(map)
        };
        let (listed, listed_plus) = (names(&plain)?, names(&plus)?);
        if listed.keys().ne(listed_plus.keys()) {
            return Err(Error::Device(
                "READDIR and READDIRPLUS list different names".into(),
            ));
        }
        for dots in [&b"."[..], b".."] {
            if listed.get(dots).is_none_or(|(_, kind)| *kind != DIRECTORY >> 12) {
                return Err(Error::Device("`.` or `..` is not listed as a directory".into()));
            }
        }
        let mut children = Vec::new();
        for dirent in plus {
            let Some(plus) = dirent
                .entry
                .filter(|_| dirent.name != b"." && dirent.name != b"..")
            else {
                continue;
            };
            let name = String::from_utf8_lossy(&dirent.name).into_owned();
            let entry = guest.lookup(directory, &dirent.name)?;
            // A device may list an entry without looking it up (nodeid 0), but then not say anything else.
            if plus.nodeid != 0 && (plus.nodeid, plus.attr) != (entry.nodeid, entry.attr) {
                return Err(Error::Device(format!(
                    "READDIRPLUS says {plus:?} of {name}, LOOKUP says {entry:?}"
                )));
            }
            let (ino, kind) = listed[&dirent.name];
            if ino != dirent.ino || kind != dirent.kind || kind != entry.attr.mode >> 12 {
                return Err(Error::Device(format!(
                    "{name} is listed as {ino} of type {kind}: {entry:?}"
                )));
            }
            let again = guest.getattr(entry.nodeid)?;
            if again != entry.attr {
                return Err(Error::Device(format!(
                    "GETATTR says {again:?} of {name}, LOOKUP says {:?}",
                    entry.attr
                )));
            }
            guest.forget(entry.nodeid, if plus.nodeid == 0 { 0 } else { 1 })?;
            children.push((dirent.name, entry));
        }
        Ok(children)
    }

    /// SHA-256 of all bytes of a file; insists that it ends where its size says.
    pub fn digest(&self, guest: &Guest, nodeid: u64, size: u64) -> Result<String> {
        let fh = guest.open(nodeid, 0)?;
        let mut digest = Sha256::new();
        let step = u64::from(self.read);
        let mut tickets = std::collections::VecDeque::new();
        let (mut asked, mut read) = (0, 0);
        loop {
            while tickets.len() < self.depth && asked < size {
                tickets.push_back(guest.submit(&crate::ops::read(nodeid, fh, asked, self.read))?);
                asked += step;
            }
            let Some(ticket) = tickets.pop_front() else {
                break;
            };
            let bytes = guest.wait(ticket)?.ok()?;
            let wanted = step.min(size - read);
            if bytes.len() as u64 != wanted {
                return Err(Error::Device(format!(
                    "{} bytes at {read}, {wanted} expected",
                    bytes.len()
                )));
            }
            digest.update(&bytes);
            read += wanted;
        }
        if !guest.read(nodeid, fh, size, 4096)?.is_empty() {
            return Err(Error::Device(format!("bytes behind the end at {size}")));
        }
        guest.release(nodeid, fh)?;
        Ok(hex::encode(digest.finalize()))
    }
}

/// Compares a tree with its description: one line for each difference.
pub fn differences(tree: &Tree, expected: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    let mut wanted = BTreeSet::new();
    for entry in expected["entries"].as_array().into_iter().flatten() {
        let path = bytes_of(entry, "path").unwrap_or_default();
        let name = String::from_utf8_lossy(&path).into_owned();
        match tree.get(&path) {
            Some(node) => compare(node, entry, &mut |field: &str, have: String, want: String| {
                if have != want {
                    lines.push(format!("{name}: {field} is {have}, should be {want}"));
                }
            }),
            None => lines.push(format!("{name}: missing")),
        }
        wanted.insert(path);
    }
    for path in tree.keys().filter(|path| !wanted.contains(*path)) {
        lines.push(format!("{}: should not be there", String::from_utf8_lossy(path)));
    }
    if let Some(groups) = expected["hardlink_groups"].as_array() {
        hardlinks(tree, groups, &mut lines);
    }
    lines
}

fn compare(node: &Node, want: &Value, differ: &mut impl FnMut(&str, String, String)) {
    let attr = &node.entry.attr;
    let kind = match attr.mode & TYPE {
        DIRECTORY => "dir",
        FILE => "file",
        SYMLINK => "symlink",
        0o010000 => "fifo",
        0o140000 => "socket",
        0o020000 => "char",
        0o060000 => "block",
        _ => "unknown",
    };
    let text = |key: &str| want[key].as_str().unwrap_or_default().to_owned();
    differ("type", kind.into(), text("type"));
    differ("mode", format!("{:04o}", attr.mode & 0o7777), text("mode"));
    for (key, have) in [("uid", attr.uid), ("gid", attr.gid), ("nlink", attr.nlink)] {
        differ(key, have.to_string(), want[key].to_string());
    }
    let mtime = format!("[{},{}]", attr.mtime.0 as i64, attr.mtime.1);
    differ("mtime", mtime, want["mtime"].to_string());
    if kind == "file" || kind == "symlink" {
        differ("size", attr.size.to_string(), want["size"].to_string());
    }
    if let Some(digest) = &node.digest {
        differ("digest", digest.clone(), text("sha256"));
    }
    if let Some(target) = &node.target {
        differ(
            "target",
            format!("{target:?}"),
            format!("{:?}", bytes_of(want, "target").unwrap_or_default()),
        );
    }
    if kind == "char" || kind == "block" {
        let (major, minor) = attr.device();
        differ("rdev", format!("[{major},{minor}]"), want["rdev"].to_string());
    }
    let have: BTreeMap<String, String> = node
        .xattrs
        .iter()
        .map(|(name, value)| (String::from_utf8_lossy(name).into_owned(), STANDARD.encode(value)))
        .collect();
    let want: BTreeMap<String, String> = want["xattrs_b64"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()))
        .collect();
    differ("xattrs", format!("{have:?}"), format!("{want:?}"));
}

fn hardlinks(tree: &Tree, groups: &[Value], lines: &mut Vec<String>) {
    let mut by_number: BTreeMap<u64, BTreeSet<String>> = BTreeMap::new();
    // One inode, one node: the guest's page cache hangs on the nodeid.
    let (mut node_of, mut number_of) = (BTreeMap::new(), BTreeMap::new());
    for (path, node) in tree {
        let path = String::from_utf8_lossy(path).into_owned();
        let (ino, nodeid) = (node.entry.attr.ino, node.entry.nodeid);
        let matches =
            *node_of.entry(ino).or_insert(nodeid) == nodeid && *number_of.entry(nodeid).or_insert(ino) == ino;
        if !matches {
            lines.push(format!(
                "{path}: nodeid {nodeid} and inode number {ino} do not match"
            ));
        }
        by_number.entry(ino).or_default().insert(path);
    }
    let have: BTreeSet<_> = by_number.into_values().filter(|paths| paths.len() > 1).collect();
    let want: BTreeSet<BTreeSet<String>> = groups
        .iter()
        .map(|group| {
            group
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect()
        })
        .collect();
    if have != want {
        lines.push(format!("hard links are {have:?}, should be {want:?}"));
    }
}

fn bytes_of(entry: &Value, key: &str) -> Option<Vec<u8>> {
    match entry[format!("{key}_b64")].as_str() {
        Some(coded) => STANDARD.decode(coded).ok(),
        None => entry[key].as_str().map(|text| text.as_bytes().to_vec()),
    }
}
