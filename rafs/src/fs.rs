//! The instance: a read-only file system over one mapped bootstrap.
//!
//! Implements `fuse_backend_rs::api::filesystem::FileSystem<Inode = u64, Handle = u64>` for metadata.
//! Reads go through [`RafsFs::read`], which never waits: it writes what is resident, or says what is absent.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use backend::chunk::BlobDescription;
use backend::store::{Blob, FetchError, Held};
use fuse_backend_rs::api::filesystem::ZeroCopyWriter;

/// How an instance is presented.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Show the image's extended attributes.
    pub xattr: bool,
    /// Check the v5 digest tree at mount.
    pub validate: bool,
}

/// An image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Skeleton.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Chunks that a read needs and that are not resident.
pub struct Absent {
    /// Per blob, the chunk indexes, ascending.
    pub chunks: Vec<(Arc<Blob>, Vec<u32>)>,
}

/// What became of a read.
pub enum ReadOutcome {
    /// So many bytes were written; fewer than asked for means end of file.
    Done(usize),
    /// Nothing was written. Fetch these, then read again.
    Absent(Absent),
}

/// Chunks of several blobs that are held in memory because they could not be cached.
#[derive(Default, Debug)]
pub struct HeldChunks {
    /// Per blob id.
    pub blobs: Vec<(String, Held)>,
}

/// A mounted RAFS image.
pub struct RafsFs {}

impl RafsFs {
    /// Maps and checks the bootstrap at `path` and opens each of its blobs with `open_blob`.
    pub fn open(
        _path: &Path,
        _options: Options,
        _open_blob: &mut dyn FnMut(BlobDescription) -> Result<Arc<Blob>, FetchError>,
    ) -> Result<Self, OpenError> {
        todo!()
    }

    /// Reads `size` bytes at `offset` of `inode` into `w`. Memory and page cache only; no allocation when all is
    /// resident, which is checked before the first byte is written.
    pub fn read(
        &self,
        _inode: u64,
        _offset: u64,
        _size: u32,
        _held: &HeldChunks,
        _w: &mut dyn ZeroCopyWriter,
    ) -> io::Result<ReadOutcome> {
        todo!()
    }

    /// Starts fetching what a read found absent; `done` is called once, from a thread of the store.
    pub fn fetch(
        &self,
        _absent: Absent,
        _deadline: Instant,
        _done: Box<dyn FnOnce(Result<HeldChunks, FetchError>) + Send>,
    ) {
        todo!()
    }
}
