//! Chunks of an image from a directory of blobs, verified.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use backend::chunk::{BlobDescription, Chunk, IndexError};
use backend::codec::{self, Decoder};
use backend::error::CodecError;
use bytes::Bytes;
use parking_lot::Mutex;
use rafs::error::Damaged;
use rafs::reader::Reader as Image;

/// A chunk cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ChunkError {
    /// The blob's file cannot be read.
    #[error("blob {id}: {reason}")]
    Blob {
        /// The blob.
        id: String,
        /// What was tried and why it failed.
        reason: String,
    },
    /// The image does not describe the chunk.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The image contradicts itself.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// Its bytes are not what they should be.
    #[error("chunk {chunk} of blob {id}: {reason}")]
    Codec {
        /// The blob.
        id: String,
        /// Number of the chunk.
        chunk: u32,
        /// What is wrong.
        reason: String,
    },
}

/// The blobs of an image, shared by the threads that read them.
pub(super) struct Blobs {
    blobs: Vec<Blob>,
}

struct Blob {
    description: BlobDescription,
    file: Result<File, ChunkError>,
    /// Held while the chunk index is completed.
    index: Mutex<()>,
}

impl Blobs {
    /// Opens every blob of `image` in `directory`. A blob that is missing is an error of each of its chunks.
    pub(super) fn open(image: &Image, directory: &Path) -> Result<Arc<Self>, Damaged> {
        let open = |position| -> Result<Blob, Damaged> {
            let description = image.blob(position)?;
            let file = open_blob(directory, &description.id);
            Ok(Blob {
                description,
                file,
                index: Mutex::new(()),
            })
        };
        let blobs = (0..image.superblock().blobs.len())
            .map(open)
            .collect::<Result<_, _>>()?;
        Ok(Arc::new(Self { blobs }))
    }

    /// Describes a chunk; reads what the description needs from the blobs first.
    pub(super) fn describe(&self, directory: &Path, blob: usize, chunk: u32) -> Result<Chunk, ChunkError> {
        let blob = self.blob(blob)?;
        let index = &blob.description.index;
        let _guard = blob.index.lock();
        if let Some(wanted) = index.wanted() {
            let file = open_blob(directory, &wanted.blob_id)?;
            let mut bytes = vec![0; wanted.size as usize];
            file.read_exact_at(&mut bytes, wanted.offset)
                .map_err(|e| unreadable(&wanted.blob_id, "chunk information", &e))?;
            index.supply(&bytes)?;
        }
        Ok(index.chunk(chunk)?)
    }

    fn blob(&self, position: usize) -> Result<&Blob, ChunkError> {
        self.blobs.get(position).ok_or_else(|| {
            Damaged {
                what: "blob table",
                at: position as u64,
                reason: "no such entry",
            }
            .into()
        })
    }
}

fn unreadable(id: &str, what: &str, error: &io::Error) -> ChunkError {
    ChunkError::Blob {
        id: id.to_owned(),
        reason: format!("cannot read {what}: {error}"),
    }
}

fn open_blob(directory: &Path, id: &str) -> Result<File, ChunkError> {
    let path: PathBuf = directory.join(id);
    File::open(&path).map_err(|e| ChunkError::Blob {
        id: id.to_owned(),
        reason: format!("cannot open {}: {e}", path.display()),
    })
}

/// Decoded units that a [`Reader`] keeps: enough for files that share slices of a gzip stream.
const KEPT_UNITS: usize = 4;

/// Reads chunks; one per thread.
pub(super) struct Reader {
    blobs: Arc<Blobs>,
    directory: PathBuf,
    decoder: Decoder,
    /// The latest decoded units, newest first.
    units: Vec<(usize, Chunk, Bytes)>,
    /// The latest chunk: blob, number, verified bytes. Runs of zeros are one chunk again and again.
    latest: Option<(usize, u32, Bytes)>,
}

impl Reader {
    pub(super) fn new(blobs: Arc<Blobs>, directory: &Path) -> Self {
        Self {
            blobs,
            directory: directory.to_owned(),
            decoder: Decoder::new(),
            units: Vec::new(),
            latest: None,
        }
    }

    /// The verified bytes of a chunk.
    pub(super) fn read(&mut self, position: usize, index: u32) -> Result<Bytes, ChunkError> {
        if let Some((blob, chunk, data)) = &self.latest
            && (*blob, *chunk) == (position, index)
        {
            return Ok(data.clone());
        }
        let blobs = self.blobs.clone();
        let blob = blobs.blob(position)?;
        let chunk = blobs.describe(&self.directory, position, index)?;
        let id = || blob.description.id.clone();
        let codec = |e: CodecError| ChunkError::Codec {
            id: id(),
            chunk: index,
            reason: e.to_string(),
        };
        codec::check(&blob.description, &chunk).map_err(codec)?;
        let known = self.units.iter().position(|(p, known, _)| {
            *p == position && (known.index == index || codec::same_unit(known, &chunk))
        });
        let unit = match known.map(|known| self.units.remove(known)) {
            Some((_, _, unit)) => unit,
            None => {
                let file = blob.file.as_ref().map_err(Clone::clone)?;
                let mut stored = vec![0; chunk.compressed_size as usize];
                file.read_exact_at(&mut stored, chunk.compressed_offset)
                    .map_err(|e| unreadable(&id(), &format!("chunk {index}"), &e))?;
                self.decoder
                    .decode(&blob.description, &chunk, stored.into())
                    .map_err(codec)?
            }
        };
        let data = codec::slice(&chunk, &unit).map_err(codec)?;
        self.units.insert(0, (position, chunk.clone(), unit));
        self.units.truncate(KEPT_UNITS);
        codec::verify(&blob.description, &chunk, &data).map_err(codec)?;
        self.latest = Some((position, index, data.clone()));
        Ok(data)
    }

    /// `size` bytes of a chunk that start at `offset` of the blob's uncompressed view.
    pub(super) fn read_at(
        &mut self,
        position: usize,
        index: u32,
        offset: u64,
        size: u32,
    ) -> Result<Bytes, ChunkError> {
        let data = self.read(position, index)?;
        let chunk = self.blobs.describe(&self.directory, position, index)?;
        let start = offset
            .checked_sub(chunk.uncompressed_offset)
            .and_then(|start| usize::try_from(start).ok());
        start
            .filter(|start| {
                start
                    .checked_add(size as usize)
                    .is_some_and(|end| end <= data.len())
            })
            .map(|start| data.slice(start..start + size as usize))
            .ok_or_else(|| {
                let reason = "a file's range lies outside of the chunk";
                Damaged {
                    what: "chunk",
                    at: index.into(),
                    reason,
                }
                .into()
            })
    }
}
