//! The instance: a read-only file system over one mapped bootstrap.
//!
//! Implements `fuse_backend_rs::api::filesystem::FileSystem<Inode = u64, Handle = u64>` for metadata (in
//! `fs/metadata.rs`). Reads go through [`RafsFs::read`], which never waits: it writes what is resident, or says what
//! is absent.
//!
//! An image never changes, so nothing is locked and nothing is counted: every request decodes what it needs
//! from the bootstrap, and all answers may be cached by the guest for ever.

mod metadata;
mod read;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use backend::chunk::BlobDescription;
use backend::store::{Blob, FetchError, Held};

pub use crate::error::OpenError;
use crate::error::{Damaged, Refused};
use crate::image::Image;
use crate::index::{Indexed, describe_blob};
use crate::reader::Reader;
use crate::superblock::Superblock;
use crate::trace::Recorder;

/// How an instance is presented.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Show the image's extended attributes.
    pub xattr: bool,
    /// Check all metadata at mount, including the digest tree of v5, and refuse the image if anything is wrong.
    /// Without it, each file is checked when it is used.
    pub validate: bool,
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
    /// Fetch these, then read again from the start, into a fresh writer: nothing of what this one may have taken
    /// counts (a chunk can be evicted while it is read).
    Absent(Absent),
}

/// Chunks of several blobs that are held in memory because they could not be cached.
#[derive(Default, Debug)]
pub struct HeldChunks {
    /// Per blob id.
    pub blobs: Vec<(String, Held)>,
}

/// Damage is logged this often per mount; a guest can trigger it at will.
const MAX_REPORTS: u32 = 32;

/// A mounted RAFS image.
pub struct RafsFs {
    reader: Reader,
    /// In the order of the blob table.
    blobs: Vec<Arc<Blob>>,
    options: Options,
    path: PathBuf,
    reports: AtomicU32,
    pub(crate) recorder: Recorder,
}

impl RafsFs {
    /// Opens and checks the bootstrap at `path`, or the one inside the blob at `path`, and opens each of its
    /// blobs with `open_blob`. No network: only superblock and tables are read.
    pub fn open(
        path: &Path,
        options: Options,
        open_blob: &mut dyn FnMut(BlobDescription) -> Result<Arc<Blob>, FetchError>,
    ) -> Result<Self, OpenError> {
        let refused = |error: Refused| error.at(path.to_owned());
        let reader = Reader::open(path)?;
        if options.validate {
            let mut first = None;
            reader.check(&mut |_, damaged| {
                first.get_or_insert(damaged);
            });
            first.map_or(Ok(()), |damaged| Err(refused(damaged.into())))?;
        }
        let indexed = &reader.indexed;
        let mut blobs = Vec::with_capacity(indexed.image.superblock.blobs.len());
        for (position, facts) in indexed.image.superblock.blobs.iter().enumerate() {
            let description =
                describe_blob(indexed, position, facts).map_err(|error| refused(error.into()))?;
            let blob = open_blob(description).map_err(|source| OpenError::Blob {
                path: path.to_owned(),
                source,
            })?;
            blobs.push(blob);
        }
        Ok(Self {
            reader,
            blobs,
            options,
            path: path.to_owned(),
            reports: AtomicU32::new(0),
            recorder: Recorder::default(),
        })
    }

    /// Local id of the root directory.
    pub fn root(&self) -> u64 {
        self.reader.root()
    }

    /// What superblock and blob table say.
    pub fn superblock(&self) -> &Superblock {
        self.reader.superblock()
    }

    /// The metadata, for whoever wants more than the file system interface tells.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    fn indexed(&self) -> &Indexed {
        &self.reader.indexed
    }

    fn image(&self) -> &Image {
        &self.reader.indexed.image
    }

    /// The blobs, in the order of the blob table.
    pub fn blobs(&self) -> &[Arc<Blob>] {
        &self.blobs
    }

    /// Logs damage and turns it into an errno.
    fn report(&self, damaged: Damaged) -> std::io::Error {
        let reports = self.reports.load(Ordering::Relaxed);
        if reports < MAX_REPORTS {
            self.reports.store(reports + 1, Ordering::Relaxed);
            tracing::warn!(image = %self.path.display(), error = %damaged, "answering EIO");
        }
        damaged.into()
    }
}
