//! An image that another one is built upon: a parent below it, or a dictionary of chunks.

use std::collections::HashMap;
use std::path::Path;

use zerocopy::FromZeros;
use zerocopy::little_endian::{U32, U64};

use crate::bootstrap::Version;
use crate::error::Damaged;
use crate::inode::{Inode as Stored, Kind};
use crate::layout::blob::Features;
use crate::layout::v6::BlobEntry;
use crate::layout::{Flags, compression_number, digester_number};
use crate::reader::Reader;
use crate::superblock::{BlobFacts, Format};

use super::chunks::{ChunkNumber, ChunkTable};
use super::error::BuildError;
use super::tree::{Attributes, Content, Entry, Inode, InodeId, Tree};
use super::{FsVersion, Options};

/// An image, taken apart.
pub(super) struct Base {
    pub(super) tree: Tree,
    pub(super) chunks: ChunkTable,
    pub(super) blobs: Vec<BlobEntry>,
}

/// Reads the image at `path`, which has to be of the kind that `options` build.
pub(super) fn load(path: &Path, options: &Options) -> Result<Base, BuildError> {
    let reader = Reader::open(path).map_err(BuildError::Image)?;
    check_compatible(&reader, path, options)?;
    let damaged = |source| BuildError::Damaged {
        path: path.to_owned(),
        source,
    };
    let blobs = reader.superblock().blobs.iter().enumerate();
    let blobs = blobs
        .map(|(position, facts)| blob_entry(&reader, position, facts))
        .collect::<Result<_, _>>();
    let mut loader = Loader {
        reader: &reader,
        chunks: ChunkTable::default(),
        known: HashMap::new(),
        seen: HashMap::new(),
    };
    let tree = loader.tree(&damaged)?;
    Ok(Base {
        tree,
        chunks: loader.chunks,
        blobs: blobs.map_err(damaged)?,
    })
}

fn check_compatible(reader: &Reader, path: &Path, options: &Options) -> Result<(), BuildError> {
    let superblock = reader.superblock();
    let refuse = |reason: String| Err(BuildError::Options(format!("{}: {reason}", path.display())));
    let version = match superblock.version {
        Version::V5 => FsVersion::V5,
        Version::V6 => FsVersion::V6,
    };
    if version != options.version {
        return refuse(format!(
            "is RAFS {version:?}, the new image is {:?}",
            options.version
        ));
    }
    if superblock.chunk_size != options.chunk_size {
        return refuse(format!(
            "has chunks of {} bytes, the new image of {}",
            superblock.chunk_size, options.chunk_size
        ));
    }
    if !superblock.flags.has(Flags::EXPLICIT_UID_GID) {
        return refuse("stores no owners".into());
    }
    if superblock.flags.has(Flags::TARFS_MODE) {
        return refuse("is a tarfs image, whose chunks have no digests".into());
    }
    for blob in &superblock.blobs {
        if blob.digester != options.digester {
            return refuse(format!(
                "has {:?} digests, the new image {:?}",
                blob.digester, options.digester
            ));
        }
        if blob.cipher.is_some() {
            return refuse("is encrypted".into());
        }
        // In v5 the whole image has one compression.
        if version == FsVersion::V5 && blob.compression != options.compression {
            return refuse(format!(
                "is compressed with {:?}, the new image with {:?}",
                blob.compression, options.compression
            ));
        }
    }
    Ok(())
}

/// The blob's entry as it goes into the new image. v5 has no such entries; one is made of what it has.
fn blob_entry(reader: &Reader, position: usize, facts: &BlobFacts) -> Result<BlobEntry, Damaged> {
    let superblock = reader.superblock();
    let mut entry = match superblock.format {
        Format::V6 { .. } => {
            let offset = superblock.blob_table.offset + (position * size_of::<BlobEntry>()) as u64;
            *reader.bootstrap().get::<BlobEntry>("blob table entry", offset)?
        }
        Format::V5 { .. } => {
            let mut entry = BlobEntry::new_zeroed();
            entry.chunk_size = U32::new(superblock.chunk_size);
            entry.chunk_count = U32::new(facts.chunk_count);
            entry.compression = U32::new(compression_number(facts.compression));
            entry.digester = U32::new(digester_number(facts.digester));
            entry.compressed_size = U64::new(facts.compressed_size);
            entry.uncompressed_size = U64::new(facts.uncompressed_size);
            entry
        }
    };
    // The bootstrap inside the blob is the old image's.
    entry.features = U32::new(facts.features.0 & !Features::INLINED_FS_META);
    entry.id = [0; 64];
    for (to, from) in entry.id.iter_mut().zip(facts.id.as_bytes()) {
        *to = *from;
    }
    Ok(entry)
}

struct Loader<'r> {
    reader: &'r Reader,
    chunks: ChunkTable,
    /// (blob, chunk) to its number in `chunks`.
    known: HashMap<(usize, u32), ChunkNumber>,
    /// Local ids of regular files to inodes of the tree.
    seen: HashMap<u64, InodeId>,
}

impl Loader<'_> {
    fn tree(&mut self, damaged: &dyn Fn(Damaged) -> BuildError) -> Result<Tree, BuildError> {
        let reader = self.reader;
        let root = reader.inode(reader.root()).map_err(damaged)?;
        let mut tree = Tree::new(attributes(&root));
        tree.inode_mut(InodeId::ROOT).xattrs = reader.xattrs(&root).map_err(damaged)?.into_iter().collect();
        let mut pending = vec![(InodeId::ROOT, root)];
        let mut directories = std::collections::HashSet::from([root.id]);
        while let Some((id, directory)) = pending.pop() {
            let mut entries = Vec::new();
            for child in reader.children(&directory).map_err(damaged)? {
                let stored = reader
                    .lookup(&directory, &child.name)
                    .and_then(|found| {
                        found.ok_or(Damaged::new("directory entry", child.id, "not found by its name"))
                    })
                    .map_err(damaged)?;
                let known = self
                    .seen
                    .get(&stored.id)
                    .copied()
                    .filter(|_| stored.kind == Kind::File);
                let inode = match known {
                    Some(known) => known,
                    None => self.inode(&mut tree, &stored).map_err(damaged)??,
                };
                if stored.kind == Kind::Directory {
                    if !directories.insert(stored.id) {
                        return Err(damaged(Damaged::new(
                            "directory",
                            stored.id,
                            "reached by two paths",
                        )));
                    }
                    pending.push((inode, stored));
                }
                entries.push(Entry {
                    name: child.name,
                    inode,
                });
            }
            tree.inode_mut(id).content = Content::Directory(entries);
        }
        tree.sort();
        Ok(tree)
    }

    /// Outer error: the image is damaged. Inner: the new one would be too large.
    fn inode(&mut self, tree: &mut Tree, stored: &Stored) -> Result<Result<InodeId, BuildError>, Damaged> {
        let content = match stored.kind {
            Kind::File => Content::Regular { size: stored.size },
            Kind::Directory => Content::Directory(Vec::new()),
            Kind::Symlink => Content::Symlink(self.reader.symlink_target(stored)?),
            Kind::Char | Kind::Block => Content::Device { rdev: stored.rdev },
            Kind::Fifo | Kind::Socket => Content::Special,
        };
        let xattrs = self.reader.xattrs(stored)?.into_iter().collect();
        let inode = Inode {
            attributes: attributes(stored),
            xattrs,
            content,
        };
        let id = match tree.add(inode) {
            Some(id) => id,
            None => return Ok(Err(BuildError::too_many_inodes())),
        };
        if stored.kind == Kind::File {
            self.seen.insert(stored.id, id);
            return self.file(id, stored).map(|added| added.map(|()| id));
        }
        Ok(Ok(id))
    }

    fn file(&mut self, id: InodeId, stored: &Stored) -> Result<Result<(), BuildError>, Damaged> {
        let map = self.reader.indexed.build_map()?;
        for chunk in self.reader.chunks(stored)? {
            let number = match self.known.get(&(chunk.blob, chunk.index)) {
                Some(number) => *number,
                None => {
                    let place = map.place(chunk.blob, chunk.index).ok_or(Damaged::new(
                        "chunk",
                        chunk.index.into(),
                        "without a record",
                    ))?;
                    match self.chunks.add(*self.reader.indexed.record(place)?) {
                        Ok(number) => number,
                        Err(e) => return Ok(Err(e)),
                    }
                }
            };
            self.known.insert((chunk.blob, chunk.index), number);
            self.chunks.append(id, number);
        }
        Ok(Ok(()))
    }
}

fn attributes(stored: &Stored) -> Attributes {
    Attributes {
        mode: stored.mode,
        uid: stored.uid,
        gid: stored.gid,
        mtime: stored.mtime,
        mtime_nsec: stored.mtime_nsec,
    }
}
