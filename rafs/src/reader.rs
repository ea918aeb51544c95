//! An image without its data: for tools that look at metadata, and for what the daemon reports of a mount.
//!
//! * `walk`: all of it, by path, faults one by one.

mod walk;

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;

use zerocopy::little_endian::U32;

use crate::bootstrap::Bootstrap;
pub use crate::check::Checked;
use crate::error::{Damaged, OpenError};
use crate::image::Image;
use crate::index::Indexed;
use crate::inode::{Inode, Kind};
use crate::layout::v5::ChunkFlags;
use crate::plan::{Piece, Plan};
use crate::superblock::Superblock;

pub use walk::Step;

/// Metadata of an image.
#[derive(Clone)]
pub struct Reader {
    pub(crate) indexed: Arc<Indexed>,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Its name, raw bytes.
    pub name: Vec<u8>,
    /// Local id of the inode, as the directory says.
    pub id: u64,
    /// Type, as the directory says; `None` if that is none of the known ones.
    pub kind: Option<Kind>,
}

/// A chunk of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileChunk {
    /// Where it starts in the file.
    pub file_offset: u64,
    /// Position of the blob in the blob table.
    pub blob: usize,
    /// Number of the chunk in the blob; for a tar (tarfs), of the piece that it is fetched in.
    pub index: u32,
    /// Its size, in bytes.
    pub size: u32,
    /// Where it starts in the uncompressed view of the blob.
    pub uncompressed_offset: u64,
    /// What its record says beyond that; tarfs has no records.
    pub record: Option<FileChunkRecord>,
}

/// What the record of a chunk says of its place in the blob. Of the members of a batch only the digest is true.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileChunkRecord {
    /// Digest of the uncompressed bytes.
    pub digest: [u8; 32],
    /// Where its compressed bytes start in the blob.
    pub compressed_offset: u64,
    /// How many there are.
    pub compressed_size: u32,
    /// Whether it is compressed.
    pub compressed: bool,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// CRC-32C of the uncompressed bytes.
    pub crc32c: Option<u32>,
}

impl Reader {
    /// Opens the bootstrap at `path`, or the one inside the blob at `path`.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let image = Image::open(path).map_err(|refused| refused.at(path.to_owned()))?;
        Ok(Self {
            indexed: Arc::new(Indexed::new(image)),
        })
    }

    fn image(&self) -> &Image {
        &self.indexed.image
    }

    /// What superblock and tables say.
    pub fn superblock(&self) -> &Superblock {
        &self.image().superblock
    }

    /// The bytes of the bootstrap.
    pub fn bootstrap(&self) -> &Bootstrap {
        &self.image().bootstrap
    }

    /// Local id of the root directory.
    pub fn root(&self) -> u64 {
        self.image().root()
    }

    /// The inode with local id `id`.
    pub fn inode(&self, id: u64) -> Result<Inode, Damaged> {
        self.image().inode(id)
    }

    /// The inode at `path`, from the root and without following symlinks; `None` if there is none.
    pub fn at_path(&self, path: &[u8]) -> Result<Option<Inode>, Damaged> {
        let mut inode = self.inode(self.root())?;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            if inode.kind != Kind::Directory {
                return Ok(None);
            }
            match self.image().lookup(&inode, name)? {
                Some(child) => inode = child,
                None => return Ok(None),
            }
        }
        Ok(Some(inode))
    }

    /// The inode that `name` in `dir` refers to; `None` if there is none.
    pub fn lookup(&self, dir: &Inode, name: &[u8]) -> Result<Option<Inode>, Damaged> {
        self.image().lookup(dir, name)
    }

    /// The entries of `dir` without `.` and `..`, in name order.
    pub fn children(&self, dir: &Inode) -> Result<Vec<DirectoryEntry>, Damaged> {
        let mut children = Vec::new();
        self.image().list::<Damaged>(dir, 0, &mut |entry| {
            if !matches!(entry.name, b"." | b"..") {
                children.push(DirectoryEntry {
                    name: entry.name.to_vec(),
                    id: entry.id,
                    kind: entry.kind,
                });
            }
            Ok(true)
        })?;
        Ok(children)
    }

    /// The target of a symlink.
    pub fn symlink_target(&self, inode: &Inode) -> Result<Vec<u8>, Damaged> {
        self.image().symlink_target(inode)
    }

    /// Names and values of extended attributes.
    pub fn xattrs(&self, inode: &Inode) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Damaged> {
        self.image()
            .xattrs(inode)?
            .map(|xattr| xattr.map(|xattr| (xattr.name().collect(), xattr.value.to_vec())))
            .collect()
    }

    /// The chunks of a regular file, in file order. What they leave out is zeros (v5 images with holes).
    pub fn chunks(&self, inode: &Inode) -> Result<Vec<FileChunk>, Damaged> {
        let map = self.indexed.build_map()?;
        let mut chunks = Vec::new();
        let mut file_offset = 0;
        for piece in Plan::new(self.image(), Some(map), inode, 0, inode.size)? {
            let segment = match piece? {
                Piece::Data(segment) => segment,
                Piece::Hole(size) => {
                    file_offset += size;
                    continue;
                }
            };
            let record = map
                .place(segment.blob, segment.chunk)
                .map(|place| self.indexed.record(place))
                .transpose()?;
            let record = record.map(|record| {
                let flags = record.flags.get();
                FileChunkRecord {
                    digest: record.digest,
                    compressed_offset: record.compressed_offset.get(),
                    compressed_size: record.compressed_size.get(),
                    compressed: flags & ChunkFlags::COMPRESSED != 0,
                    encrypted: flags & ChunkFlags::ENCRYPTED != 0,
                    crc32c: (flags & ChunkFlags::HAS_CRC32C != 0).then_some(record.crc32c.get()),
                }
            });
            chunks.push(FileChunk {
                file_offset,
                blob: segment.blob,
                index: segment.chunk,
                size: segment.size,
                uncompressed_offset: segment.offset,
                record,
            });
            file_offset += u64::from(segment.size);
        }
        Ok(chunks)
    }

    /// Local ids of the inodes that the image wants prefetched, in order. A directory stands for all below it; the
    /// root alone stands for everything.
    pub fn prefetch_table(&self) -> Result<Vec<u64>, Damaged> {
        let table = self.superblock().prefetch_table;
        let entries = self
            .bootstrap()
            .array::<U32>("prefetch table", table.offset, table.entries)?;
        Ok(entries
            .iter()
            .map(|entry| u64::from(entry.get()))
            .take_while(|id| *id != 0)
            .collect())
    }

    /// Local ids of the regular files at and below `inode`, in name order, each once even if it has several names. What
    /// is damaged is left out.
    pub fn files_below(&self, inode: u64) -> Vec<u64> {
        let mut files = Vec::new();
        let mut linked = HashSet::new();
        let found: Result<(), Infallible> = self.walk_below(inode, &mut |step| {
            if let Ok(inode) = step.inode
                && inode.kind == Kind::File
                && (!inode.is_hardlinked() || linked.insert(inode.id))
            {
                files.push(inode.id);
            }
            Ok(())
        });
        match found {
            Ok(()) => files,
        }
    }
}
