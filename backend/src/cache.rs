//! The sparse data file of a blob and what is known of it.
//!
//! Files of blob `ID` in a cache directory, which processes may share:
//!
//! | file | content | also read by |
//! |---|---|---|
//! | `ID.blob.data` | uncompressed view of the blob, holes where chunks are absent | nydusd |
//! | `ID.blob.data.chunk_map` | one bit per chunk: somebody says that it is there | nydusd |
//! | `ID.blob.data.stamps` | 32 bytes per chunk: what we verified it to be | us |
//! | `ID.blob.index` | the blob's chunk index, as stored at the source | us |
//!
//! A bit of the chunk map is a rumour: it was perhaps written before a power cut that took the data, or by a tool that
//! does not verify. A *stamp* is a statement: during this boot of the host, one of our processes compared the bytes in the data file
//! with this digest, and wrote them before the stamp. A chunk is believed only if its stamp is the one that the reading image expects, so
//! an image with other digests never believes what was verified for another. Anything less is read and
//! hashed again, or fetched.

mod residency;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;

use crate::chunk::{BlobDescription, IndexRange};
use crate::config::CacheConfig;
use crate::error::CacheError;

pub(crate) use residency::Residency;
use residency::{ChunkMap, Stamps};

/// Start of the file that keeps a chunk index.
const INDEX_MAGIC: &[u8; 16] = b"rafsd index 1\n\0\0";

/// The files of one blob.
pub(crate) struct CacheFiles {
    data: OwnedFd,
    /// `None` if the directory can not be written; then nothing is ever resident that was not before.
    stamps: Option<Stamps>,
    map: Option<ChunkMap>,
    index_path: PathBuf,
}

impl CacheFiles {
    /// Opens or makes the files. A directory that can not be written gives a cache that stays as it is.
    pub(crate) fn open(config: &CacheConfig, blob: &BlobDescription) -> Result<Self, CacheError> {
        let path = config.dir.join(format!("{}.blob.data", blob.id));
        let index_path = config.dir.join(format!("{}.blob.index", blob.id));
        match Self::open_writable(config, blob, &path) {
            Ok((data, stamps, map)) => Ok(Self {
                data: data.into(),
                stamps: Some(stamps),
                map,
                index_path,
            }),
            Err(error) if degradable(error.source.kind()) => {
                tracing::warn!(%error, reason = %error.source, "cache is not writable, blob {} is served uncached", blob.id);
                let data = match Self::open_readable(blob, &path) {
                    Some(file) => file.into(),
                    None => empty(blob)?,
                };
                let stamps = Stamps::open_readable(&stamps_path(&path), &data.as_fd(), blob.chunk_count);
                let map = ChunkMap::open_readable(&map_path(&path), blob.chunk_count);
                Ok(Self {
                    data,
                    stamps,
                    map,
                    index_path,
                })
            }
            Err(error) => Err(error),
        }
    }

    fn open_writable(
        config: &CacheConfig,
        blob: &BlobDescription,
        path: &Path,
    ) -> Result<(File, Stamps, Option<ChunkMap>), CacheError> {
        let failed = |path: &Path, action| {
            let path = path.to_owned();
            move |source| CacheError { path, action, source }
        };
        fs::create_dir_all(&config.dir).map_err(failed(&config.dir, "create the directory"))?;
        let data = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed(path, "open"))?;
        let size = data.metadata().map_err(failed(path, "stat"))?.len();
        if size > blob.uncompressed_size {
            let source = io::Error::new(
                ErrorKind::InvalidData,
                format!(
                    "has {size} bytes, more than the blob's {}",
                    blob.uncompressed_size
                ),
            );
            return Err(CacheError {
                path: path.to_owned(),
                action: "use",
                source,
            });
        }
        if size < blob.uncompressed_size {
            data.set_len(blob.uncompressed_size)
                .map_err(failed(path, "extend"))?;
        }
        let stamps_path = stamps_path(path);
        let whole = size == blob.uncompressed_size;
        let stamps = Stamps::open(&stamps_path, data.as_fd(), whole, blob.chunk_count)
            .map_err(failed(&stamps_path, "open"))?;
        let map = ChunkMap::open(&map_path(path), blob.chunk_count);
        Ok((data, stamps, map))
    }

    fn open_readable(blob: &BlobDescription, path: &Path) -> Option<File> {
        let file = File::open(path).ok()?;
        (file.metadata().ok()?.len() == blob.uncompressed_size).then_some(file)
    }

    /// The data file.
    pub(crate) fn data(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }

    /// What chunks `first..first + count` were verified to be; all zero for nothing.
    pub(crate) fn stamps(&self, first: u32, count: u32) -> Vec<[u8; 32]> {
        self.stamps
            .as_ref()
            .map(|stamps| stamps.read(first, count))
            .unwrap_or_default()
    }

    /// Whether somebody says that chunk `index` is in the data file.
    pub(crate) fn claimed(&self, index: u32) -> bool {
        self.map.as_ref().is_some_and(|map| map.contains(index))
    }

    /// Whether stamps of an earlier run, or of another process, may be there.
    pub(crate) fn inherited(&self) -> bool {
        self.stamps.as_ref().is_some_and(Stamps::inherited)
            || self.map.as_ref().is_some_and(ChunkMap::inherited)
    }

    /// Reads from the data file.
    pub(crate) fn read(&self, offset: u64, size: u32) -> io::Result<Vec<u8>> {
        let mut data = vec![0; size as usize];
        let mut filled = 0;
        while let Some(rest) = data.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match rustix::io::pread(&self.data, rest, offset + filled as u64) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => filled += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(data)
    }

    /// Writes a verified chunk, then its stamp, then its bit.
    pub(crate) fn store(&self, index: u32, offset: u64, data: &[u8], stamp: &[u8; 32]) -> io::Result<()> {
        let Some(stamps) = self.stamps.as_ref().filter(|stamps| stamps.writable()) else {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        };
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            match rustix::io::pwrite(&self.data, rest, at) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    at += n as u64;
                    rest = rest.get(n..).unwrap_or_default();
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        stamps.write(index, stamp)?;
        self.claim(index);
        Ok(())
    }

    /// Records that the data file's bytes of a chunk were read back and found to be good.
    pub(crate) fn confirm(&self, index: u32, stamp: &[u8; 32]) {
        if let Some(stamps) = self.stamps.as_ref().filter(|stamps| stamps.writable())
            && let Err(error) = stamps.write(index, stamp)
        {
            tracing::debug!(%error, index, "stamp not written");
        }
        self.claim(index);
    }

    /// The bit is for other tools; without it they fetch again.
    fn claim(&self, index: u32) {
        if let Some(map) = &self.map {
            map.insert(index);
        }
    }

    /// The chunk index kept by an earlier run, if it is whole and of this range.
    pub(crate) fn load_index(&self, range: &IndexRange) -> Option<Vec<u8>> {
        let header = index_header(range);
        let limit = header.len() as u64 + 32 + u64::from(range.size);
        let mut file = Vec::new();
        File::open(&self.index_path)
            .ok()?
            .take(limit + 1)
            .read_to_end(&mut file)
            .ok()?;
        let rest = file.strip_prefix(header.as_slice())?;
        let (digest, bytes) = rest.split_at_checked(32)?;
        (bytes.len() == range.size as usize && blake3::hash(bytes).as_bytes() == digest)
            .then(|| bytes.to_vec())
    }

    /// Keeps the chunk index for runs without a network. Failing costs those runs, not this one.
    pub(crate) fn save_index(&self, range: &IndexRange, bytes: &[u8]) {
        let temporary = self
            .index_path
            .with_extension(format!("index.{}", std::process::id()));
        let digest = blake3::hash(bytes);
        let content = [&index_header(range), &digest.as_bytes()[..], bytes].concat();
        let saved = fs::write(&temporary, content).and_then(|()| fs::rename(&temporary, &self.index_path));
        if let Err(error) = saved {
            tracing::debug!(%error, path = %self.index_path.display(), "chunk index not kept");
            let _ = fs::remove_file(&temporary);
        }
    }

    /// Forgets a kept chunk index that turned out to be damaged.
    pub(crate) fn drop_index(&self) {
        let _ = fs::remove_file(&self.index_path);
    }
}

fn map_path(data: &Path) -> PathBuf {
    data.with_added_extension("chunk_map")
}

fn stamps_path(data: &Path) -> PathBuf {
    data.with_added_extension("stamps")
}

fn index_header(range: &IndexRange) -> Vec<u8> {
    let holder = blake3::hash(range.blob_id.as_bytes());
    [
        &INDEX_MAGIC[..],
        holder.as_bytes(),
        &range.offset.to_le_bytes(),
        &range.size.to_le_bytes(),
    ]
    .concat()
}

/// Errors after which a blob is served uncached instead of not at all.
fn degradable(kind: ErrorKind) -> bool {
    !matches!(
        kind,
        ErrorKind::InvalidData
            | ErrorKind::InvalidInput
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::AlreadyExists
            | ErrorKind::InvalidFilename
    )
}

/// A data file without data, for caches that can not have one.
fn empty(blob: &BlobDescription) -> Result<OwnedFd, CacheError> {
    let make = || -> io::Result<OwnedFd> {
        let file = rustix::fs::memfd_create("uncached-blob", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, blob.uncompressed_size)?;
        Ok(file)
    };
    make().map_err(|source| CacheError {
        path: "memfd".into(),
        action: "create",
        source,
    })
}
