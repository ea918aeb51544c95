//! The writer: a tree becomes a bootstrap and a blob.
//!
//! ```text
//! directory ─ scan ─► tree ─┬─ pipeline ─► blob (chunks, each once) ─┬─► v6 / v5 ─► bootstrap
//!                           └────────────────────────────────────────┘
//! ```
//!
//! * `tree`: inodes and names, the form that every source is turned into.
//! * `scan`: reads a directory of the host.
//! * `pipeline`: reads file data, digests and compresses chunks on all cores, in a fixed order.
//! * `chunks`, `blob`: which chunk is stored where; the blob file.
//! * `v5`, `v6`: the bootstrap in either format.
//! * `output`: files that appear complete or not at all.
//!
//! The same tree and options give the same bytes, whatever the number of cores: entries are sorted, chunks are
//! stored in the order of the tree, nothing records when or where the image was built.

mod blob;
mod chunks;
mod codec;
mod error;
mod output;
mod pipeline;
mod scan;
mod tree;
mod v5;
mod v6;
mod xattr;

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use backend::chunk::{Compression, Digester};
use rustix::fs::{Mode, OFlags, ResolveFlags};

pub use error::BuildError;
pub use output::TemporaryFile;

use crate::layout::v6::BlobEntry;
use crate::layout::{Flags, MAX_CHUNK_SIZE, MIN_CHUNK_SIZE, trim_zeros};
use blob::BlobWriter;
use chunks::ChunkTable;
use pipeline::{Feeder, Settings};
use tree::{Content, InodeId, Tree};

/// Which of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsVersion {
    /// RAFS v5.
    V5,
    /// RAFS v6, an EROFS image.
    V6,
}

/// How to build.
#[derive(Clone, Debug)]
pub struct Options {
    /// Format of the bootstrap.
    pub version: FsVersion,
    /// Compression of the chunks. Gzip is refused.
    pub compression: Compression,
    /// Level of zstd.
    pub level: i32,
    /// Digest algorithm of the chunks.
    pub digester: Digester,
    /// Bytes of a chunk: a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Threads that digest and compress; 0 for one per available core. Does not change the result.
    pub threads: usize,
}

impl Default for Options {
    /// What `rafs build` does when not told otherwise.
    fn default() -> Self {
        Self {
            version: FsVersion::V6,
            compression: Compression::Zstd,
            level: 3,
            digester: Digester::Blake3,
            chunk_size: 1 << 20,
            threads: 0,
        }
    }
}

impl Options {
    fn check(&self) -> Result<(), BuildError> {
        if !self.chunk_size.is_power_of_two() || !(MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&self.chunk_size)
        {
            return Err(BuildError::Options(format!(
                "chunk size {} is not a power of two from {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE}",
                self.chunk_size
            )));
        }
        Ok(())
    }

    fn settings(&self) -> Settings {
        Settings {
            compression: self.compression,
            level: self.level,
            digester: self.digester,
            chunk_size: self.chunk_size,
            threads: self.threads,
        }
    }

    fn flags(&self, tree: &Tree) -> u64 {
        let compression = match self.compression {
            Compression::None => Flags::COMPRESSION_NONE,
            Compression::Lz4Block => Flags::COMPRESSION_LZ4,
            Compression::Gzip => Flags::COMPRESSION_GZIP,
            Compression::Zstd => Flags::COMPRESSION_ZSTD,
        };
        let digester = match self.digester {
            Digester::Blake3 => Flags::HASH_BLAKE3,
            Digester::Sha256 => Flags::HASH_SHA256,
        };
        let xattr = if tree.has_xattrs() { Flags::HAS_XATTR } else { 0 };
        compression | digester | xattr | Flags::EXPLICIT_UID_GID
    }
}

/// Told how far a build is. Called from several threads.
pub trait Progress: Sync {
    /// One more inode was found; a regular file has so many bytes.
    fn scanned(&self, _bytes: u64) {}
    /// Everything was found, file data are read from now on.
    fn scan_done(&self) {}
    /// So many more bytes of file data were read.
    fn read(&self, _bytes: u64) {}
}

/// Nobody is told.
impl Progress for () {}

/// What a bootstrap is made of.
struct Parts<'b> {
    tree: &'b Tree,
    chunks: &'b ChunkTable,
    blobs: &'b [BlobEntry],
    flags: u64,
    chunk_size: u32,
    /// Inodes to prefetch, in order.
    prefetch: &'b [InodeId],
}

/// What was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The bootstrap file.
    pub bootstrap: PathBuf,
    /// Its size in bytes.
    pub bootstrap_size: u64,
    /// The blob that was written, if any file had data that were not known already.
    pub blob: Option<BlobReport>,
    /// Names in the image, including the root.
    pub names: u64,
    /// Bytes of all regular files, hardlinked ones once.
    pub data_size: u64,
    /// Chunks that files refer to.
    pub chunk_references: u64,
}

/// A blob that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobReport {
    /// Its id and file name: the hexadecimal sha256 of its bytes.
    pub id: String,
    /// Its size in bytes.
    pub size: u64,
    /// Size of its uncompressed view in bytes.
    pub uncompressed_size: u64,
    /// Chunks in it.
    pub chunk_count: u32,
}

/// Builds an image of the directory `source`: `output/bootstrap` and `output/blobs/<id>`. `output` is created if
/// need be; either file appears only when it is complete, the blob before the bootstrap that names it.
pub fn build_directory(
    source: &Path,
    output: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report, BuildError> {
    options.check()?;
    let blobs = prepare_output(source, output)?;
    let tree = scan::scan(source, progress)?;
    progress.scan_done();
    check_tree(source, &tree, options)?;

    let mut chunks = ChunkTable::default();
    let mut blob = BlobWriter::new(&blobs, options.settings(), options.version, 0);
    let mut references = 0;
    pipeline::run(
        options.settings(),
        std::iter::empty(),
        progress,
        |feeder| feed_directory(source, &tree, feeder),
        |chunk| {
            let number = match (chunks.find(chunk.key), chunk.stored) {
                (Some(known), _) => known,
                (None, Some((bytes, compressed))) => {
                    chunks.add(blob.append(chunk.key, chunk.crc32c, bytes, compressed)?)?
                }
                // The pipeline leaves bytes out only for a key that it handed on before, or that is known.
                (None, None) => return Err(BuildError::GivenUp),
            };
            chunks.append(chunk.owner, number);
            references += 1;
            Ok(())
        },
    )?;
    let entry = blob.finish()?;
    let parts = Parts {
        tree: &tree,
        chunks: &chunks,
        blobs: entry.as_slice(),
        flags: options.flags(&tree),
        chunk_size: options.chunk_size,
        prefetch: &[],
    };
    let bootstrap = match options.version {
        FsVersion::V5 => v5::write(&parts, options.digester)?,
        FsVersion::V6 => v6::write(&parts)?,
    };
    let path = output.join("bootstrap");
    let file = TemporaryFile::create_in(output)?;
    file.file()
        .write_all(&bootstrap)
        .map_err(BuildError::io("write", &path))?;
    file.publish(&path)?;
    Ok(Report {
        bootstrap: path,
        bootstrap_size: bootstrap.len() as u64,
        blob: entry.as_ref().map(blob_report),
        names: tree.name_count(),
        data_size: tree.data_size(),
        chunk_references: references,
    })
}

fn blob_report(entry: &BlobEntry) -> BlobReport {
    BlobReport {
        id: String::from_utf8_lossy(trim_zeros(&entry.id)).into_owned(),
        size: entry.compressed_size.get(),
        uncompressed_size: entry.uncompressed_size.get(),
        chunk_count: entry.chunk_count.get(),
    }
}

/// Creates `output/blobs`; refuses an output that would become part of its own image.
fn prepare_output(source: &Path, output: &Path) -> Result<PathBuf, BuildError> {
    let source = source.canonicalize().map_err(BuildError::io("open", source))?;
    if !source.is_dir() {
        return Err(BuildError::Unsupported {
            path: source,
            reason: "not a directory".into(),
        });
    }
    let blobs = output.join("blobs");
    let existing = output
        .ancestors()
        .find(|path| path.exists())
        .filter(|path| !path.as_os_str().is_empty());
    let above = existing
        .unwrap_or(Path::new("."))
        .canonicalize()
        .map_err(BuildError::io("open", output))?;
    if above.starts_with(&source) {
        return Err(BuildError::Options(format!(
            "the output {} lies inside the source {}",
            output.display(),
            source.display()
        )));
    }
    std::fs::create_dir_all(&blobs).map_err(BuildError::io("create directory", &blobs))?;
    Ok(blobs)
}

/// Finds what the format has no room for, while the path is still known.
fn check_tree(source: &Path, tree: &Tree, options: &Options) -> Result<(), BuildError> {
    for visit in tree.directories() {
        let check = |inode: InodeId, name: &[u8]| -> Result<(), BuildError> {
            let unsupported = |reason: String| {
                let mut path = scan::shown(source, &visit.path);
                path.push(OsStr::from_bytes(name));
                Err(BuildError::Unsupported { path, reason })
            };
            let inode = tree.inode(inode);
            if let Content::Symlink(target) = &inode.content
                && target.len() as u64 > crate::layout::MAX_SYMLINK
            {
                return unsupported(format!(
                    "symbolic link to {} bytes, the format allows 4096",
                    target.len()
                ));
            }
            match options.version {
                FsVersion::V6 => xattr::area_v6(&inode.xattrs).map(drop).or_else(unsupported),
                FsVersion::V5 => Ok(()),
            }
        };
        if visit.inode == InodeId::ROOT {
            check(visit.inode, b"")?;
        }
        for entry in tree.inode(visit.inode).entries() {
            check(entry.inode, &entry.name)?;
        }
    }
    Ok(())
}

/// Opens every regular file of the tree once and feeds it.
fn feed_directory(source: &Path, tree: &Tree, feeder: &mut Feeder<'_>) -> Result<(), BuildError> {
    let root = rustix::fs::open(source, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(BuildError::errno("open", source))?;
    let mut fed = vec![false; tree.inode_count()];
    for visit in tree.directories() {
        let here = scan::shown(source, &visit.path);
        let mut directory = None;
        for entry in tree.inode(visit.inode).entries() {
            let inode = tree.inode(entry.inode);
            let Content::Regular { size } = inode.content else {
                continue;
            };
            let Some(fed) = fed.get_mut(entry.inode.position()) else {
                continue;
            };
            if size == 0 || std::mem::replace(fed, true) {
                continue;
            }
            let directory = match &mut directory {
                Some(directory) => directory,
                none => none.insert(
                    scan::open_directory(root.as_fd(), &visit.path)
                        .map_err(BuildError::errno("open directory", &here))?,
                ),
            };
            let path = here.join(OsStr::from_bytes(&entry.name));
            let flags =
                OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file: File = rustix::fs::openat2(
                &directory,
                entry.name.as_slice(),
                flags,
                Mode::empty(),
                ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
            )
            .map_err(BuildError::errno("open", &path))?
            .into();
            feeder.file(entry.inode, size, &path, &file)?;
            check_unchanged(&file, &path, size, &inode.attributes)?;
        }
    }
    Ok(())
}

/// A file whose size or time is not what the scan saw has no single content that the image could hold.
fn check_unchanged(file: &File, path: &Path, size: u64, seen: &tree::Attributes) -> Result<(), BuildError> {
    let stat = rustix::fs::fstat(file).map_err(BuildError::errno("stat", path))?;
    let changed = |reason: String| {
        Err(BuildError::Changed {
            path: path.to_path_buf(),
            reason,
        })
    };
    if stat.st_size as u64 != size {
        return changed(format!("it had {size} bytes, it has {}", stat.st_size));
    }
    if (stat.st_mtime, stat.st_mtime_nsec as u32) != (seen.mtime, seen.mtime_nsec) {
        return changed("its modification time is another".into());
    }
    Ok(())
}
