//! A tar archive → [`Tree`], its file data straight into the pipeline.
//!
//! The archive is read once, from front to back, and may come from a pipe. What it says last about a path holds.
//! Directories that it names no member for belong to root, mode 0755, time 0.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::FileType;

use crate::layout::MAX_NAME;
use crate::tar::{Kind, Member, Reader};

use super::error::BuildError;
use super::pipeline::Feeder;
use super::scan::encode_rdev;
use super::tree::{Attributes, Content, Entry, Inode, InodeId, Tree};
use super::{Progress, xattr};

/// Takes off gzip or zstd, by the first bytes.
pub(super) fn decompress<'a>(
    archive: &'a mut (dyn Read + Send),
    name: &str,
) -> Result<Box<dyn Read + Send + 'a>, BuildError> {
    let mut archive = BufReader::with_capacity(1 << 18, archive);
    let start = archive.fill_buf().map_err(BuildError::io("read", name))?;
    if start.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(archive)));
    }
    if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return Ok(Box::new(
            zstd::Decoder::with_buffer(archive).map_err(BuildError::io("read", name))?,
        ));
    }
    Ok(Box::new(archive))
}

/// Reads the archive and feeds its files. `name` is for messages.
pub(super) fn feed(
    archive: &mut dyn Read,
    name: &str,
    feeder: &mut Feeder<'_>,
    progress: &dyn Progress,
) -> Result<Tree, BuildError> {
    let mut reader = Reader::new(archive);
    let mut builder = Builder::new(name);
    while let Some(member) = builder.checked(reader.next_member())? {
        let added = builder.add(&member)?;
        progress.scanned(member.size);
        if let (Kind::Regular, Some(inode)) = (member.kind, added) {
            feeder.stream(inode, member.size, &builder.shown(&member.path), &mut reader)?;
        }
    }
    Ok(builder.finish())
}

struct Builder<'n> {
    name: &'n str,
    tree: Tree,
    directories: HashMap<InodeId, BTreeMap<Vec<u8>, InodeId>>,
}

impl<'n> Builder<'n> {
    fn new(name: &'n str) -> Self {
        let tree = Tree::new(Self::unnamed_directory());
        Self {
            name,
            tree,
            directories: HashMap::from([(InodeId::ROOT, BTreeMap::new())]),
        }
    }

    fn unnamed_directory() -> Attributes {
        Attributes {
            mode: FileType::Directory.as_raw_mode() | 0o755,
            ..Attributes::default()
        }
    }

    /// A path of the archive in messages.
    fn shown(&self, path: &[u8]) -> PathBuf {
        PathBuf::from(format!("{}:", self.name)).join(OsStr::from_bytes(path.trim_ascii_start()))
    }

    fn checked<T>(&self, read: Result<T, crate::tar::TarError>) -> Result<T, BuildError> {
        read.map_err(|source| BuildError::Archive {
            name: self.name.to_owned(),
            source,
        })
    }

    fn unsupported(&self, path: &[u8], reason: impl Into<String>) -> BuildError {
        BuildError::Unsupported {
            path: self.shown(path),
            reason: reason.into(),
        }
    }

    /// Adds a member; the inode of a new one, `None` for another name of one that was there.
    fn add(&mut self, member: &Member) -> Result<Option<InodeId>, BuildError> {
        let names = self.names(&member.path)?;
        for (name, _) in &member.xattrs {
            xattr::check_name(name).map_err(|reason| self.unsupported(&member.path, reason))?;
        }
        let Some((name, above)) = names.split_last() else {
            // The root itself.
            if member.kind == Kind::Directory {
                let root = self.tree.inode_mut(InodeId::ROOT);
                root.attributes = attributes(member, FileType::Directory);
                root.xattrs = member.xattrs.clone();
            }
            return Ok(None);
        };
        let parent = self.directory(above, &member.path)?;
        if member.kind == Kind::HardLink {
            let target = self.names(&member.link)?;
            let inode = self.find(&target).ok_or_else(|| {
                self.unsupported(
                    &member.path,
                    format!(
                        "hard link to {}, which did not come before",
                        String::from_utf8_lossy(&member.link)
                    ),
                )
            })?;
            let inode = self.linked(inode, member)?;
            self.put(parent, name, inode);
            return Ok(None);
        }
        let known = self
            .directories
            .get(&parent)
            .and_then(|names| names.get(*name))
            .copied();
        if member.kind == Kind::Directory
            && let Some(known) = known.filter(|known| self.directories.contains_key(known))
        {
            let directory = self.tree.inode_mut(known);
            directory.attributes = attributes(member, FileType::Directory);
            directory.xattrs = member.xattrs.clone();
            return Ok(None);
        }
        let inode = self.inode(member)?;
        let id = self.insert(inode)?;
        self.put(parent, name, id);
        Ok(Some(id))
    }

    /// What another name of `inode` leads to. Only regular files are shared; the formats keep every other kind apart.
    fn linked(&mut self, inode: InodeId, member: &Member) -> Result<InodeId, BuildError> {
        match self.tree.inode(inode).content {
            Content::Regular { .. } => Ok(inode),
            Content::Directory(_) => Err(self.unsupported(&member.path, "hard link to a directory")),
            _ => {
                let copy = self.tree.inode(inode).clone();
                self.insert(copy)
            }
        }
    }

    fn inode(&self, member: &Member) -> Result<Inode, BuildError> {
        let (kind, content) = match member.kind {
            // A hard link has no inode of its own; it does not come here.
            Kind::Regular | Kind::HardLink => (FileType::RegularFile, Content::Regular { size: member.size }),
            Kind::Directory => (FileType::Directory, Content::Directory(Vec::new())),
            Kind::Symlink => (FileType::Symlink, Content::Symlink(member.link.clone())),
            Kind::Fifo => (FileType::Fifo, Content::Special),
            Kind::Char | Kind::Block => {
                let kind = if member.kind == Kind::Char {
                    FileType::CharacterDevice
                } else {
                    FileType::BlockDevice
                };
                let (major, minor) = member.device;
                let rdev = encode_rdev(major, minor, &self.shown(&member.path))?;
                (kind, Content::Device { rdev })
            }
        };
        if matches!(&content, Content::Symlink(target) if target.is_empty()) {
            return Err(self.unsupported(&member.path, "symbolic link without a target"));
        }
        Ok(Inode {
            attributes: attributes(member, kind),
            xattrs: member.xattrs.clone(),
            content,
        })
    }

    /// The names of a path, from the root.
    fn names<'p>(&self, path: &'p [u8]) -> Result<Vec<&'p [u8]>, BuildError> {
        let names = path
            .split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty() && *name != b".");
        names
            .map(|name| match name {
                b".." => Err(self.unsupported(path, "path with ..")),
                _ if name.len() > MAX_NAME => Err(self.unsupported(path, "name of more than 255 bytes")),
                _ if name.contains(&0) => Err(self.unsupported(path, "name with a NUL")),
                _ => Ok(name),
            })
            .collect()
    }

    fn find(&self, names: &[&[u8]]) -> Option<InodeId> {
        names.iter().try_fold(InodeId::ROOT, |at, name| {
            self.directories.get(&at)?.get(*name).copied()
        })
    }

    /// The directory at `names`, made if need be.
    fn directory(&mut self, names: &[&[u8]], path: &[u8]) -> Result<InodeId, BuildError> {
        let mut at = InodeId::ROOT;
        for name in names {
            let known = self
                .directories
                .get(&at)
                .and_then(|entries| entries.get(*name))
                .copied();
            at = match known {
                Some(known) if self.directories.contains_key(&known) => known,
                Some(_) => {
                    let name = String::from_utf8_lossy(name);
                    return Err(self.unsupported(path, format!("{name} above it is not a directory")));
                }
                None => {
                    let made = self.insert(Inode::directory(Self::unnamed_directory()))?;
                    self.put(at, name, made);
                    made
                }
            };
        }
        Ok(at)
    }

    fn insert(&mut self, inode: Inode) -> Result<InodeId, BuildError> {
        let is_directory = matches!(inode.content, Content::Directory(_));
        let id = self.tree.add(inode).ok_or_else(BuildError::too_many_inodes)?;
        if is_directory {
            self.directories.insert(id, BTreeMap::new());
        }
        Ok(id)
    }

    fn put(&mut self, parent: InodeId, name: &[u8], inode: InodeId) {
        if let Some(names) = self.directories.get_mut(&parent) {
            names.insert(name.to_vec(), inode);
        }
    }

    fn finish(mut self) -> Tree {
        for (id, names) in self.directories {
            let entries = names
                .into_iter()
                .map(|(name, inode)| Entry { name, inode })
                .collect();
            self.tree.inode_mut(id).content = Content::Directory(entries);
        }
        self.tree
    }
}

fn attributes(member: &Member, kind: FileType) -> Attributes {
    // As on a file system, a symbolic link has all permissions.
    let mode = if kind == FileType::Symlink {
        0o777
    } else {
        member.mode
    };
    Attributes {
        mode: kind.as_raw_mode() | mode,
        uid: member.uid,
        gid: member.gid,
        mtime: member.mtime,
        mtime_nsec: member.mtime_nsec,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(path: &str, kind: Kind) -> Member {
        Member {
            path: path.into(),
            kind,
            link: Vec::new(),
            mode: 0o640,
            uid: 7,
            gid: 8,
            mtime: 9,
            mtime_nsec: 10,
            size: 0,
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }

    fn names(tree: &Tree) -> Vec<String> {
        let all = tree.directories().flat_map(|visit| {
            let below = tree.inode(visit.inode).entries().iter();
            below.map(move |e| {
                String::from_utf8([visit.path.join(&b'/'), e.name.clone()].join(&b'/')).unwrap()
            })
        });
        all.collect()
    }

    #[test]
    fn paths_are_cleaned_and_missing_directories_made() {
        let mut builder = Builder::new("x.tar");
        builder.add(&member("./a//b/./file", Kind::Regular)).unwrap();
        builder.add(&member("/abs", Kind::Fifo)).unwrap();
        builder.add(&member("./", Kind::Directory)).unwrap();
        let tree = builder.finish();
        assert_eq!(names(&tree), ["/a", "/abs", "a/b", "a/b/file"]);
        let root = &tree.inode(InodeId::ROOT).attributes;
        assert_eq!(
            (root.mode, root.mtime),
            (0o40640, 9),
            "an archive's root has a time"
        );
        let made = &tree.inode(tree.find(&[b"a"]).unwrap()).attributes;
        assert_eq!((made.mode, made.uid, made.mtime), (0o40755, 0, 0));
    }

    #[test]
    fn the_last_member_of_a_name_holds() {
        let mut builder = Builder::new("x.tar");
        builder.add(&member("f", Kind::Regular)).unwrap();
        builder
            .add(&Member {
                size: 5,
                ..member("f", Kind::Regular)
            })
            .unwrap();
        builder.add(&member("d/below", Kind::Regular)).unwrap();
        builder.add(&member("d", Kind::Directory)).unwrap();
        builder.add(&member("gone/below", Kind::Regular)).unwrap();
        builder.add(&member("gone", Kind::Regular)).unwrap();
        let tree = builder.finish();
        assert_eq!(
            names(&tree),
            ["/d", "/f", "/gone", "d/below"],
            "a directory keeps what is in it"
        );
        assert_eq!(tree.data_size(), 5);
        assert_eq!(tree.name_count(), 5);
    }

    #[test]
    fn hard_links_share_regular_files_and_copy_the_rest() {
        let mut builder = Builder::new("x.tar");
        builder.add(&member("f", Kind::Regular)).unwrap();
        builder
            .add(&Member {
                link: b"./f".to_vec(),
                ..member("g", Kind::HardLink)
            })
            .unwrap();
        builder
            .add(&Member {
                link: b"target".to_vec(),
                ..member("s", Kind::Symlink)
            })
            .unwrap();
        builder
            .add(&Member {
                link: b"s".to_vec(),
                ..member("t", Kind::HardLink)
            })
            .unwrap();
        let tree = builder.finish();
        assert_eq!(tree.find(&[b"f"]), tree.find(&[b"g"]));
        let (s, t) = (tree.find(&[b"s"]).unwrap(), tree.find(&[b"t"]).unwrap());
        assert!(s != t && tree.inode(s) == tree.inode(t));
    }

    #[test]
    fn what_could_mean_anything_is_refused_by_name() {
        for (path, kind, link) in [
            ("../up", Kind::Regular, ""),
            ("a/../b", Kind::Regular, ""),
            ("late", Kind::HardLink, "not/there"),
            ("loop", Kind::HardLink, "dir"),
            ("dangling", Kind::Symlink, ""),
        ] {
            let mut builder = Builder::new("x.tar");
            builder.add(&member("dir", Kind::Directory)).unwrap();
            let error = builder
                .add(&Member {
                    link: link.into(),
                    ..member(path, kind)
                })
                .unwrap_err();
            assert!(error.to_string().contains("x.tar:"), "{error}");
        }
        let mut builder = Builder::new("x.tar");
        builder
            .add(&Member {
                link: b"/etc".to_vec(),
                ..member("link", Kind::Symlink)
            })
            .unwrap();
        assert!(
            builder.add(&member("link/passwd", Kind::Regular)).is_err(),
            "not through a symbolic link"
        );
        assert!(builder.add(&member(&"n".repeat(256), Kind::Regular)).is_err());
    }
}
