//! Looking after a cache directory from outside of the processes that serve from it, while they do.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::chunk_map::ChunkMap;
use super::directory::Directory;
use super::evict::Victim;
use super::ledger::Ledger;
use super::word::{State, Tick};
use super::{index_path, map_path, old_map_path, stamps_path};

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// A blob in a cache directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedBlob {
    /// Its id, and its size and chunks if several images describe it differently.
    pub name: String,
    /// Bytes, uncompressed.
    pub size: u64,
    /// Bytes of the disk that its data take.
    pub used: u64,
    /// Chunks; `None` if only others than us, or an earlier boot of the host, know of them.
    pub chunks: Option<Chunks>,
    /// Somebody keeps it from being evicted.
    pub pinned: bool,
}

/// Chunks of a blob.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chunks {
    /// All that the blob has.
    pub total: u32,
    /// Those that are there, verified.
    pub present: u32,
    /// Those that were there before the host was restarted; verified when they are used.
    pub doubtful: u32,
    /// Since the last use of any of them.
    pub idle: Option<Duration>,
}

/// What [`collect`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Chunks evicted.
    pub chunks: u64,
    /// Bytes of the disk that this gave.
    pub bytes: u64,
    /// Blobs without any chunk whose files were removed.
    pub removed: Vec<String>,
    /// Bytes of the disk that the directory takes now.
    pub used: u64,
}

/// What [`verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Chunks that are what they were when they were verified.
    pub good: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Chunks of which that cannot be said: their checksum was not kept.
    pub unknown: u64,
    /// Name of the blob and number of the chunk.
    pub damaged: Vec<(String, u32)>,
    /// Damaged chunks that were removed, to be fetched again.
    pub dropped: u64,
}

/// The blobs in `directory`, by name.
pub fn list(directory: &Path) -> io::Result<Vec<CachedBlob>> {
    let mut blobs = Vec::new();
    for path in data_files(directory)? {
        let Some(data) = still_there(File::open(&path))? else {
            continue;
        };
        let metadata = data.metadata()?;
        let ledger = Ledger::open_existing(&stamps_path(&path), &data, None, false, 0);
        blobs.push(CachedBlob {
            name: name(&path),
            size: metadata.len(),
            used: metadata.blocks() * 512,
            chunks: ledger.map(|ledger| count(&ledger)),
            pinned: is_pinned(&data)?,
        });
    }
    Ok(blobs)
}

/// Evicts the chunks that were not used for longest until `directory` takes at most `keep` bytes of the disk, if a number is given; and,
/// if no process of ours uses it, removes the files of blobs that have no chunk.
pub fn collect(directory: &Path, keep: Option<u64>) -> io::Result<Collected> {
    data_files(directory)?;
    let ours = Directory::open(directory)?;
    let mut collected = Collected::default();
    if let Some(keep) = keep {
        let freed = ours.shrink(keep)?;
        (collected.chunks, collected.bytes) = (freed.chunks, freed.bytes);
    }
    let _nobody_begins = ours.lock()?;
    if ours.is_alone() {
        for path in data_files(directory)? {
            let Some(data) = still_there(File::open(&path))? else {
                continue;
            };
            let ledger = Ledger::open_existing(&stamps_path(&path), &data, None, false, 0);
            let chunks = ledger.map(|ledger| count(&ledger));
            let empty = chunks.is_some_and(|chunks| {
                chunks.present + chunks.doubtful == 0 && !is_rumoured(&path, chunks.total)
            });
            if empty && !is_pinned(&data)? {
                remove(&path)?;
                collected.removed.push(name(&path));
            }
        }
    }
    collected.used = ours.measure();
    Ok(collected)
}

/// Whether anybody else says that there are chunks in the data file at `path`.
fn is_rumoured(path: &Path, chunks: u32) -> bool {
    let of = |path: &Path| ChunkMap::open_readable(path, chunks);
    let maps = [of(&map_path(path)), old_map_path(path).and_then(|path| of(&path))];
    let mut maps = maps.into_iter().flatten();
    maps.any(|map| (0..chunks).any(|index| map.contains(index)))
}

/// Removes the files of a blob. Without its data, which go first, the others mean nothing.
fn remove(path: &Path) -> io::Result<()> {
    let others = [stamps_path(path), map_path(path), index_path(path)];
    for file in [path.to_owned()]
        .into_iter()
        .chain(others)
        .chain(old_map_path(path))
    {
        still_there(fs::remove_file(file))?;
    }
    Ok(())
}

/// Nothing, if somebody has removed the file meanwhile.
fn still_there<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// Reads every chunk that is present, and compares it with the checksum that was taken when it was verified. With `drop`, damaged ones are
/// removed; without, the directory need not be writable.
pub fn verify(directory: &Path, drop: bool) -> io::Result<Verified> {
    let files = data_files(directory)?;
    let ours = drop.then(|| Directory::open(directory)).transpose()?;
    let owner = ours.as_ref().map_or(0, Directory::owner);
    let mut verified = Verified::default();
    for path in files {
        let Some(data) = still_there(OpenOptions::new().read(true).write(drop).open(&path))? else {
            continue;
        };
        let Some(ledger) = Ledger::open_existing(&stamps_path(&path), &data, None, drop, owner) else {
            continue;
        };
        let blob = Victim::new(data, ledger, &path);
        for index in 0..blob.ledger.chunks() {
            let word = blob.ledger.load(index);
            if word.state() != State::Present {
                continue;
            }
            let record = blob.ledger.record(index);
            let sound =
                checksum(&blob.data, record.offset, record.size).is_ok_and(|sum| sum == record.crc32c);
            let same = blob.ledger.present(index) == word.version();
            match () {
                // It was evicted or replaced while we read.
                () if !same => {}
                () if record.crc32c == 0 => verified.unknown += 1,
                () if sound => {
                    verified.good += 1;
                    verified.bytes += u64::from(record.size);
                }
                () => {
                    verified.damaged.push((name(&path), index));
                    let gone = drop && blob.free(index, blob.ledger.load(index)).is_some();
                    verified.dropped += u64::from(gone);
                }
            }
        }
    }
    Ok(verified)
}

fn count(ledger: &Ledger) -> Chunks {
    let now = Tick::now();
    let mut chunks = Chunks {
        total: ledger.chunks(),
        ..Chunks::default()
    };
    for index in 0..ledger.chunks() {
        let word = ledger.load(index);
        match word.state() {
            State::Present => chunks.present += 1,
            State::Doubtful => chunks.doubtful += 1,
            State::Absent | State::Filling => continue,
        }
        // A time that is still to come is a lease: it is about to be used.
        let idle = now.since(word.time()).map_or(Duration::ZERO, Tick::duration);
        chunks.idle = Some(chunks.idle.map_or(idle, |least| least.min(idle)));
    }
    chunks
}

fn checksum(data: &File, offset: u64, size: u32) -> io::Result<u32> {
    let end = offset.checked_add(size.into());
    if end.is_none_or(|end| data.metadata().is_ok_and(|data| end > data.len())) {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    // A damaged record may say anything, and most of a data file may be a hole.
    let mut buffer = vec![0; PIECE.min(size as usize)];
    let (mut at, mut left, mut sum) = (offset, size as usize, 0);
    while left > 0 {
        let length = left.min(buffer.len());
        let piece = buffer.get_mut(..length).unwrap_or_default();
        data.read_exact_at(piece, at)?;
        sum = crc32c::crc32c_append(sum, piece);
        at += length as u64;
        left -= length;
    }
    Ok(sum)
}

fn is_pinned(data: &File) -> io::Result<bool> {
    match flock(data, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {
            flock(data, FlockOperation::Unlock)?;
            Ok(false)
        }
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.strip_suffix(".blob.data").unwrap_or(&name).to_owned()
}

/// The data files of `directory`, by name. Fails if it is no cache directory: tools shall not make one of it.
fn data_files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut ours = false;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        ours |= path.ends_with("rafsd.usage");
        if path.to_string_lossy().ends_with(".blob.data") {
            files.push(path);
        }
    }
    if files.is_empty() && !ours {
        return Err(io::Error::new(
            ErrorKind::NotFound,
            "there is no chunk cache in it",
        ));
    }
    files.sort_unstable();
    Ok(files)
}
