//! The sparse data file of a blob and what is known of it.
//!
//! Files of blob `ID` in a cache directory, which processes may share:
//!
//! | file | content | also read by |
//! |---|---|---|
//! | `ID.blob.data` | uncompressed view of the blob, holes where chunks are absent | nydusd |
//! | `ID.blob.data.chunk_map` | one bit per chunk: somebody says that it is there | nydusd |
//! | `ID.chunk_map` | the same, from older releases | nydusd up to 2.2 |
//! | `ID.blob.data.stamps` | for each chunk its state, and what we verified it to be (`ledger`) | us |
//! | `ID.blob.index` | the blob's chunk index, as stored at the source | us |
//!
//! A bit of the chunk map is a rumour: it was perhaps written before a power cut that took the data, or by a tool that
//! does not verify. A *stamp* is a statement: during this boot of the host, one of our processes compared the bytes in the data file
//! with this digest, and wrote them before the stamp. A chunk is believed only if its stamp is the one that the reading image expects, so
//! an image with other digests never believes what was verified for another. Anything less is read and
//! hashed again, or fetched.
//!
//! Images that describe a blob in different ways cannot harm each other: where they differ in its size or number of chunks they
//! have files of their own (`ID.SIZE-CHUNKS.blob.data`), and no chunk is written over another one's place.
//!
//! Who changes a chunk's bytes, be it to fill or to free them, first turns the chunk's word in the ledger, which all processes see.
//! Parts: `directory` (who shares it, how much is used), `ledger` and `word` (states of chunks), `residency` (what one image
//! believes), `evict`, `upkeep` (from outside), `chunk_map`; `mapping` and `lock` are tools. docs/cache.md tells the whole.

mod chunk_map;
mod directory;
mod evict;
mod ledger;
mod lock;
mod mapping;
mod residency;
pub mod upkeep;
mod word;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, MemfdFlags};

use crate::chunk::{BlobDescription, Chunk, IndexRange};
use crate::config::CacheConfig;
use crate::error::CacheError;

use chunk_map::ChunkMap;
pub(crate) use directory::Directory;
pub(crate) use ledger::{Acquired, Filling, Ledger, Record};
pub(crate) use residency::Residency;

/// Start of the file that keeps a chunk index.
const INDEX_MAGIC: &[u8; 16] = b"rafsd index 1\n\0\0";

/// The files of one blob.
pub(crate) struct CacheFiles {
    data: File,
    /// `None` if the directory can not be written and nobody has written it before; then nothing is ever resident.
    ledger: Option<Arc<Ledger>>,
    /// `None` if the directory can not be written.
    directory: Option<Arc<Directory>>,
    map: Option<ChunkMap>,
    /// The map that nydusd 2.2 left under another name. Only read.
    old_map: Option<ChunkMap>,
    index_path: PathBuf,
    quota: u64,
    pin: bool,
}

impl CacheFiles {
    /// Opens or makes the files. A directory that can not be written gives a cache that stays as it is.
    pub(crate) fn open(
        config: &CacheConfig,
        directory: io::Result<Arc<Directory>>,
        blob: &BlobDescription,
    ) -> Result<Self, CacheError> {
        let path = config.dir.join(format!("{}.blob.data", blob.id));
        let own = config.dir.join(format!(
            "{}.{:x}-{:x}.blob.data",
            blob.id, blob.uncompressed_size, blob.chunk_count
        ));
        let mut files = match Self::open_writable(&path, &own, directory, blob) {
            Ok(files) => files,
            Err(error) if degradable(error.source.kind()) => {
                tracing::warn!(%error, reason = %error.source, "cache is not writable, blob {} is served uncached", blob.id);
                Self::open_readable(if fits(&path, blob) { &path } else { &own }, blob)?
            }
            Err(error) => return Err(error),
        };
        files.quota = config.quota;
        if config.pin {
            files.pin();
        }
        Ok(files)
    }

    /// `path` if that is of a blob like this one; `own` if other images have made something else of it.
    fn open_writable(
        path: &Path,
        own: &Path,
        directory: io::Result<Arc<Directory>>,
        blob: &BlobDescription,
    ) -> Result<Self, CacheError> {
        let failed = |path: &Path, action| {
            let path = path.to_owned();
            move |source| CacheError { path, action, source }
        };
        let parent = path.parent().unwrap_or(path);
        let directory = directory.map_err(failed(parent, "use the directory"))?;
        // Others must not see a data file of the wrong size, nor make a ledger beside ours.
        let lock = directory.lock().map_err(failed(parent, "lock"))?;
        let path = if fits(path, blob) {
            path
        } else {
            tracing::warn!(blob = %blob.id, path = %path.display(), "images describe it as another blob; this one gets a file of its own");
            own
        };
        let data = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed(path, "open"))?;
        let size = data.metadata().map_err(failed(path, "stat"))?.len();
        let stamps_path = stamps_path(path);
        if size == 0 && blob.uncompressed_size > 0 {
            // What a ledger says of another file is not about this one.
            let _ = fs::remove_file(&stamps_path);
            data.set_len(blob.uncompressed_size)
                .map_err(failed(path, "extend"))?;
        } else if size != blob.uncompressed_size {
            let reason = format!("has {size} bytes, the blob {}", blob.uncompressed_size);
            let source = io::Error::new(ErrorKind::InvalidData, reason);
            return Err(failed(path, "use")(source));
        }
        let ledger = Ledger::open(&stamps_path, &data, blob.chunk_count, directory.owner())
            .map_err(failed(&stamps_path, "open"))?;
        let map = ChunkMap::open(&map_path(path), blob.chunk_count);
        drop(lock);
        Ok(Self {
            data,
            ledger: Some(Arc::new(ledger)),
            directory: Some(directory),
            map,
            old_map: old_map(path, blob),
            index_path: index_path(path),
            quota: 0,
            pin: false,
        })
    }

    fn open_readable(path: &Path, blob: &BlobDescription) -> Result<Self, CacheError> {
        let whole = |file: &File| {
            file.metadata()
                .is_ok_and(|metadata| metadata.len() == blob.uncompressed_size)
        };
        let data = match File::open(path).ok().filter(whole) {
            Some(file) => file,
            None => empty(blob)?,
        };
        let ledger = Ledger::open_existing(&stamps_path(path), &data, Some(blob.chunk_count), false, 0);
        Ok(Self {
            data,
            ledger: ledger.map(Arc::new),
            directory: None,
            map: ChunkMap::open_readable(&map_path(path), blob.chunk_count),
            old_map: old_map(path, blob),
            index_path: index_path(path),
            quota: 0,
            pin: false,
        })
    }

    /// Keeps everybody from evicting chunks of this blob, as long as the files are open. Readers of a directory that can not be
    /// written can pin, too.
    fn pin(&mut self) {
        match rustix::fs::flock(&self.data, FlockOperation::LockShared) {
            Ok(()) => self.pin = true,
            Err(error) => tracing::warn!(%error, "blob can not be pinned"),
        }
    }

    /// Whether a view with this configuration can share the files.
    pub(crate) fn fits(&self, config: &CacheConfig) -> bool {
        self.quota == config.quota && self.pin == config.pin
    }

    /// Bytes that the directory may take, 0 for no limit.
    pub(crate) fn quota(&self) -> u64 {
        self.quota
    }

    /// The data file.
    pub(crate) fn data(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }

    /// What is known of the chunks.
    pub(crate) fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.ledger.as_ref()
    }

    /// Whether chunks can be put here at all.
    pub(crate) fn writable(&self) -> Option<(&Arc<Ledger>, &Directory)> {
        let ledger = self.ledger.as_ref().filter(|ledger| ledger.writable())?;
        Some((ledger, self.directory.as_deref()?))
    }

    /// The version under which chunk `index` is here, verified to be what `stamp` says.
    pub(crate) fn recall(&self, index: u32, stamp: &[u8; 32]) -> Option<u32> {
        let ledger = self.ledger.as_ref()?;
        // The record counts for the version that was there before it was read.
        let version = ledger.present(index);
        (version != 0 && ledger.record(index).stamp == *stamp).then_some(version)
    }

    /// Versions and stamps of those of `first..first + count` that are here.
    pub(crate) fn recall_all(&self, first: u32, count: u32) -> Vec<(u32, u32, [u8; 32])> {
        let Some(ledger) = &self.ledger else {
            return Vec::new();
        };
        let versions: Vec<(u32, u32)> = (first..first.saturating_add(count))
            .map(|index| (index, ledger.present(index)))
            .collect();
        let records = ledger.records(first, count);
        versions
            .into_iter()
            .zip(records)
            .filter(|((_, version), _)| *version != 0)
            .map(|((index, version), record)| (index, version, record.stamp))
            .collect()
    }

    /// Whether somebody says, or said before the host was restarted, that chunk `index` is in the data file.
    pub(crate) fn rumoured(&self, index: u32) -> bool {
        [&self.map, &self.old_map]
            .into_iter()
            .flatten()
            .any(|map| map.contains(index))
            || self.ledger.as_ref().is_some_and(|ledger| ledger.doubtful(index))
    }

    /// Asks for the right to fill chunk `index`; `None` if nothing can be put here.
    pub(crate) fn acquire(&self, index: u32) -> Option<Acquired> {
        let (ledger, directory) = self.writable()?;
        Some(ledger.acquire(index, |owner| directory.alive(owner)))
    }

    /// Takes the right to replace chunk `index`, which is present under `version` and not what it should be.
    pub(crate) fn replace(&self, index: u32, version: u32) -> Option<Filling> {
        self.writable()?.0.replace(index, version)
    }

    /// Reads what is in a chunk's place, to find out whether it is the chunk.
    pub(crate) fn read(&self, filling: &Filling, chunk: &Chunk) -> io::Result<Vec<u8>> {
        if !filling.reserve(chunk.uncompressed_offset, chunk.uncompressed_size)? {
            return Err(ErrorKind::ResourceBusy.into());
        }
        let mut data = vec![0; chunk.uncompressed_size as usize];
        std::os::unix::fs::FileExt::read_exact_at(&self.data, &mut data, chunk.uncompressed_offset)?;
        Ok(data)
    }

    /// Writes a verified chunk, then its record, then its bit; returns the version under which it is present. With `evict`,
    /// chunks that were not used for long make room for it. `None` if the right was lost meanwhile.
    pub(crate) fn store(
        &self,
        filling: Filling,
        chunk: &Chunk,
        data: &[u8],
        stamp: [u8; 32],
        evict: bool,
    ) -> io::Result<Option<u32>> {
        let Some((_, directory)) = self.writable() else {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        };
        let bytes = (data.len() as u64).next_multiple_of(4096);
        let room = directory.reserve(bytes, self.quota, evict)?;
        let record = Record {
            stamp,
            offset: chunk.uncompressed_offset,
            size: chunk.uncompressed_size,
            crc32c: crc32c::crc32c(data),
        };
        if !filling.reserve(record.offset, record.size)? {
            return Err(io::Error::new(
                ErrorKind::ResourceBusy,
                "another image has other bytes in its place",
            ));
        }
        let written = std::os::unix::fs::FileExt::write_all_at(&self.data, data, record.offset)
            .and_then(|()| filling.record(&record));
        if let Err(error) = written {
            // Half a chunk is of no use to anybody.
            let _ = evict::punch(&self.data, record.offset, record.size.into());
            return Err(error);
        }
        room.used();
        Ok(self.finish(filling, chunk.index))
    }

    /// Records that the data file's bytes of a chunk were read back and found to be good.
    pub(crate) fn confirm(
        &self,
        filling: Filling,
        chunk: &Chunk,
        data: &[u8],
        stamp: [u8; 32],
    ) -> Option<u32> {
        let record = Record {
            stamp,
            offset: chunk.uncompressed_offset,
            size: chunk.uncompressed_size,
            crc32c: crc32c::crc32c(data),
        };
        filling.record(&record).ok()?;
        self.finish(filling, chunk.index)
    }

    fn finish(&self, filling: Filling, index: u32) -> Option<u32> {
        let version = filling.done()?;
        // The bit is for other tools; without it they fetch again.
        if let Some(map) = &self.map {
            map.insert(index);
        }
        Some(version)
    }

    /// Whether this process shall read the chunk index; `false` if another does so now.
    pub(crate) fn begin_index(&self) -> bool {
        self.writable()
            .is_none_or(|(ledger, directory)| ledger.begin_index(|owner| directory.alive(owner)))
    }

    /// Ends what [`CacheFiles::begin_index`] allowed.
    pub(crate) fn end_index(&self) {
        if let Some((ledger, _)) = self.writable() {
            ledger.end_index();
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

/// Whether the data file at `path`, if there is one, is of a blob with this size and so many chunks.
fn fits(path: &Path, blob: &BlobDescription) -> bool {
    let size = fs::metadata(path).map_or(0, |metadata| metadata.len());
    let chunks = Ledger::chunks_at(&stamps_path(path));
    size == 0 || size == blob.uncompressed_size && chunks.is_none_or(|chunks| chunks == blob.chunk_count)
}

fn index_path(data: &Path) -> PathBuf {
    data.with_extension("index")
}

fn map_path(data: &Path) -> PathBuf {
    data.with_added_extension("chunk_map")
}

fn old_map(data: &Path, blob: &BlobDescription) -> Option<ChunkMap> {
    ChunkMap::open_readable(&old_map_path(data)?, blob.chunk_count)
}

/// Where nydusd 2.2 has the map; `None` for a name that it would not give.
fn old_map_path(data: &Path) -> Option<PathBuf> {
    let name = data.file_name()?.to_str()?.strip_suffix(".blob.data")?;
    Some(data.with_file_name(format!("{name}.chunk_map")))
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
fn empty(blob: &BlobDescription) -> Result<File, CacheError> {
    let make = || -> io::Result<File> {
        let file = rustix::fs::memfd_create("uncached-blob", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, blob.uncompressed_size)?;
        Ok(file.into())
    };
    make().map_err(|source| CacheError {
        path: "memfd".into(),
        action: "create",
        source,
    })
}
