//! The writer: a tree becomes a bootstrap and a blob.
//!
//! ```text
//! directory ─ scan ──► tree ─┬─ pipeline ─► blob (chunks, each once) ─┬─► v6 / v5 ─► bootstrap
//! tar ────── archive ──►     └──── overlay, on a parent image ────────┘
//! ```
//!
//! * `tree`: inodes and names, the form that every source is turned into.
//! * `scan`, `directory`: names and data of a directory of the host. `archive`: of a tar.
//! * `base`, `overlay`: an image to build upon, and putting a tree on top of it.
//! * `pipeline`: reads file data, digests and compresses chunks on all cores, in a fixed order.
//! * `chunks`, `blob`: which chunk is stored where; the blob file.
//! * `v5`, `v6`: the bootstrap in either format.
//! * `assemble`: composes all of them. `output`: files that appear complete or not at all.
//!
//! The same tree and options give the same bytes, whatever the number of cores: entries are sorted, chunks are
//! stored in the order of the tree, nothing records when or where the image was built.

mod archive;
mod assemble;
mod base;
mod blob;
mod chunks;
mod codec;
mod directory;
mod error;
mod output;
mod overlay;
mod pipeline;
mod scan;
mod tree;
mod v5;
mod v6;
mod xattr;

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use backend::chunk::{Compression, Digester};

pub use error::BuildError;
pub use output::TemporaryFile;

use crate::layout::v6::BlobEntry;
use crate::layout::{Flags, MAX_CHUNK_SIZE, MAX_SYMLINK, MIN_CHUNK_SIZE};
use chunks::ChunkTable;
use pipeline::Settings;
use tree::{Content, InodeId, Tree};

/// Which of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsVersion {
    /// RAFS v5.
    V5,
    /// RAFS v6, an EROFS image.
    V6,
}

/// How a layer says that something of the layers below is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    /// It does not; all files are ordinary ones.
    None,
    /// Files called `.wh.NAME`, and `.wh..wh..opq`.
    Oci,
    /// Character devices 0:0, and directories with the attribute `trusted.overlay.opaque`.
    Overlayfs,
}

/// What to build of.
pub enum Input<'i> {
    /// A directory of the host. The time of its root is dropped (set to 0), as the format wants it: unpacking a tree
    /// twice shall not give two images.
    Directory(&'i Path),
    /// A tar archive, plain or compressed with gzip or zstd.
    Archive {
        /// Its name in messages.
        name: &'i str,
        /// Its bytes.
        stream: &'i mut (dyn Read + Send),
    },
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
    /// Image (bootstrap) that the new one is a layer on top of. Its blobs stay in use.
    pub parent: Option<PathBuf>,
    /// Image (bootstrap) whose chunks are referred to instead of being stored again.
    pub chunk_dictionary: Option<PathBuf>,
    /// Markers that remove what is in the parent; without a parent they are dropped. By default those of OCI layers
    /// with a parent, and none without.
    pub whiteouts: Option<Whiteouts>,
    /// Paths to fetch first, in this order: their files are stored at the head of the blob and named in the image's
    /// prefetch table. A directory stands for all below it. Paths that do not exist are ignored.
    pub prefetch: Vec<PathBuf>,
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
            parent: None,
            chunk_dictionary: None,
            whiteouts: None,
            prefetch: Vec::new(),
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

/// Builds an image: `output/bootstrap` and `output/blobs/<id>`. `output` is created if need be; either file appears only
/// when it is complete, the blob before the bootstrap that names it.
pub fn build(
    input: Input<'_>,
    output: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report, BuildError> {
    options.check()?;
    match input {
        Input::Directory(source) => {
            check_apart(source, output)?;
            create_output(output)?;
            let tree = scan::scan(source, progress)?;
            progress.scan_done();
            check_tree(source, &tree, options)?;
            assemble::assemble(output, options, progress, move |feeder| {
                let first: Vec<Vec<&[u8]>> = options.prefetch.iter().map(|path| names(path)).collect();
                directory::feed(source, &tree, &first, feeder)?;
                Ok(tree)
            })
        }
        Input::Archive { name, stream } => {
            create_output(output)?;
            let mut stream = archive::decompress(stream, name)?;
            assemble::assemble(output, options, progress, move |feeder| {
                let tree = archive::feed(&mut stream, name, feeder, progress)?;
                check_tree(Path::new(name), &tree, options)?;
                Ok(tree)
            })
        }
    }
}

/// [`build`] of a directory of the host.
pub fn build_directory(
    source: &Path,
    output: &Path,
    options: &Options,
    progress: &dyn Progress,
) -> Result<Report, BuildError> {
    build(Input::Directory(source), output, options, progress)
}

/// The names of a path, from the root.
fn names(path: &Path) -> Vec<&[u8]> {
    let name = |component| match component {
        Component::Normal(name) => Some(name),
        _ => None,
    };
    path.components().filter_map(name).map(OsStr::as_bytes).collect()
}

/// Refuses an output that would become part of its own image.
fn check_apart(source: &Path, output: &Path) -> Result<(), BuildError> {
    let source = source.canonicalize().map_err(BuildError::io("open", source))?;
    if !source.is_dir() {
        return Err(BuildError::Unsupported {
            path: source,
            reason: "not a directory".into(),
        });
    }
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
    Ok(())
}

fn create_output(output: &Path) -> Result<(), BuildError> {
    let blobs = output.join("blobs");
    std::fs::create_dir_all(&blobs).map_err(BuildError::io("create directory", &blobs))
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
                && target.len() as u64 > MAX_SYMLINK
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
