//! Eviction: frees the chunks that were not used for longest, whichever process mounts their image, or none.
//!
//! A chunk is withdrawn before it is freed: its word becomes `Filling`, the blob's count of withdrawn chunks goes up, its record and its bit
//! in the chunk map are cleared, then the hole is punched, then the word becomes `Absent`. A reader that was under way looks
//! at the count after it has read, and reads again. docs/cache.md has the whole argument.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use super::chunk_map::ChunkMap;
use super::directory::Directory;
use super::ledger::{Ledger, Record};
use super::word::{State, Tick, Word};
use super::{map_path, stamps_path};

/// The files of a blob, as far as eviction needs them.
pub(super) struct Victim {
    pub(super) data: File,
    pub(super) ledger: Arc<Ledger>,
    map: Option<ChunkMap>,
}

/// A chunk that may go.
struct Candidate {
    idle: u32,
    victim: usize,
    index: u32,
    word: Word,
}

/// What an eviction freed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Freed {
    pub(super) chunks: u64,
    /// Of the disk.
    pub(super) bytes: u64,
}

/// Frees about `wanted` bytes. To be called by one process at a time.
pub(super) fn evict(directory: &Directory, wanted: u64) -> Freed {
    let victims = victims(directory);
    let mut candidates = Vec::new();
    for (number, victim) in victims.iter().enumerate() {
        candidates.extend(victim.candidates(number));
    }
    candidates.sort_unstable_by_key(|candidate| std::cmp::Reverse(candidate.idle));
    let mut freed = Freed::default();
    for candidate in candidates {
        if freed.bytes >= wanted {
            break;
        }
        let victim = victims.get(candidate.victim);
        if let Some(bytes) = victim.and_then(|victim| victim.free(candidate.index, candidate.word)) {
            freed.chunks += 1;
            freed.bytes += bytes;
        }
    }
    freed
}

fn victims(directory: &Directory) -> Vec<Victim> {
    let Ok(entries) = fs::read_dir(directory.path()) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().ends_with(".blob.data"))
        .filter_map(|path| Victim::open(&path, directory.owner()))
        .collect()
}

impl Victim {
    /// `None` for a blob that is pinned, whose ledger is not of this boot, or whose file system knows no holes.
    fn open(path: &Path, owner: u16) -> Option<Self> {
        let data = OpenOptions::new().read(true).write(true).open(path).ok()?;
        // Whoever pins the blob holds a shared lock.
        flock(&data, FlockOperation::NonBlockingLockExclusive).ok()?;
        flock(&data, FlockOperation::Unlock).ok()?;
        // Changes nothing, and tells whether holes can be made at all.
        punch(&data, data.metadata().ok()?.len().next_multiple_of(4096), 4096).ok()?;
        let ledger = Ledger::open_existing(&stamps_path(path), &data, None, true, owner)?;
        Some(Self::new(data, ledger, path))
    }

    /// The blob whose data file `data` is at `path`.
    pub(super) fn new(data: File, ledger: Ledger, path: &Path) -> Self {
        Self {
            data,
            map: ChunkMap::open_existing(&map_path(path), ledger.chunks()),
            ledger: Arc::new(ledger),
        }
    }

    fn candidates(&self, number: usize) -> impl Iterator<Item = Candidate> {
        let now = Tick::now();
        (0..self.ledger.chunks()).filter_map(move |index| {
            let word = self.ledger.load(index);
            let evictable = matches!(word.state(), State::Present | State::Doubtful);
            // A time that is still to come is a lease.
            let idle = now.since(word.time()).filter(|_| evictable)?;
            Some(Candidate {
                idle,
                victim: number,
                index,
                word,
            })
        })
    }

    /// Frees chunk `index` if it still is what `word` says; tells how many bytes of the disk that gave, `None` if the chunk stays. One whose
    /// record cannot be true is withdrawn all the same, and gives nothing.
    pub(super) fn free(&self, index: u32, word: Word) -> Option<u64> {
        let record = self.ledger.record(index);
        let end = record.offset.checked_add(record.size.into());
        let within = self
            .data
            .metadata()
            .is_ok_and(|data| end.is_some_and(|end| end <= data.len()));
        let filling = self.ledger.turn(index, word)?;
        if filling.record(&Record::default()).is_err() {
            // Nothing was freed, but what is there can not be vouched for either.
            return Some(0);
        }
        if let Some(map) = &self.map {
            map.remove(index);
        }
        if record.size == 0 || !within {
            return Some(0);
        }
        let before = self.blocks();
        if let Err(error) = punch(&self.data, record.offset, record.size.into()) {
            tracing::debug!(%error, "a chunk can not be freed");
        }
        Some(before.saturating_sub(self.blocks()))
    }

    fn blocks(&self) -> u64 {
        self.data.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }
}

/// Makes a range of the data file a hole.
pub(super) fn punch(data: &File, offset: u64, size: u64) -> rustix::io::Result<()> {
    fallocate(
        data,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        offset,
        size,
    )
}
