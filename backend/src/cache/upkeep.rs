//! Looking after a cache directory from outside of the processes that serve from it, while they do.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use super::directory::Directory;
use super::evict::{self, Victim};
use super::ledger::Ledger;
use super::word::{State, Tick};
use super::{index_path, map_path, stamps_path};

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
    data_files(directory)?
        .into_iter()
        .map(|path| {
            let data = File::open(&path)?;
            let metadata = data.metadata()?;
            let ledger = Ledger::open_existing(&stamps_path(&path), &data, None, false, 0);
            Ok(CachedBlob {
                name: name(&path),
                size: metadata.len(),
                used: metadata.blocks() * 512,
                chunks: ledger.map(|ledger| count(&ledger)),
                pinned: is_pinned(&data),
            })
        })
        .collect()
}

/// Evicts the chunks that were not used for longest until `directory` takes at most `keep` bytes of the disk, if a number is given; and,
/// if no process of ours uses it, removes the files of blobs that have no chunk.
pub fn collect(directory: &Path, keep: Option<u64>) -> io::Result<Collected> {
    let files = data_files(directory)?;
    let ours = Directory::open(directory)?;
    let mut collected = Collected::default();
    let used = ours.measure();
    if let Some(wanted) = keep
        .and_then(|keep| used.checked_sub(keep))
        .filter(|wanted| *wanted > 0)
    {
        let freed = evict::evict(&ours, wanted);
        (collected.chunks, collected.bytes) = (freed.chunks, freed.bytes);
    }
    let _nobody_begins = ours.lock()?;
    if ours.is_alone() {
        for path in files {
            let data = File::open(&path)?;
            let ledger = Ledger::open_existing(&stamps_path(&path), &data, None, false, 0);
            let chunks = ledger.map(|ledger| count(&ledger));
            if chunks.is_some_and(|chunks| chunks.present + chunks.doubtful == 0) && !is_pinned(&data) {
                // Without its data the other files mean nothing.
                for file in [&path, &stamps_path(&path), &map_path(&path), &index_path(&path)] {
                    match fs::remove_file(file) {
                        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                collected.removed.push(name(&path));
            }
        }
    }
    collected.used = ours.measure();
    Ok(collected)
}

/// Reads every chunk that is present, and compares it with the checksum that was taken when it was verified. With `drop`, damaged ones are
/// removed.
pub fn verify(directory: &Path, drop: bool) -> io::Result<Verified> {
    let files = data_files(directory)?;
    let ours = Directory::open(directory)?;
    let mut verified = Verified::default();
    for path in files {
        let data = OpenOptions::new().read(true).write(drop).open(&path)?;
        let Some(ledger) = Ledger::open_existing(&stamps_path(&path), &data, None, drop, ours.owner()) else {
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
    let mut bytes = vec![0; size as usize];
    data.read_exact_at(&mut bytes, offset)?;
    Ok(crc32c::crc32c(&bytes))
}

fn is_pinned(data: &File) -> bool {
    // The lock that we get ends with the file.
    flock(data, FlockOperation::NonBlockingLockExclusive).is_err()
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
