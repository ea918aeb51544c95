//! A cache directory, as the processes that share it see it: who they are, and how much of it is used.
//!
//! | file | content |
//! |---|---|
//! | `rafsd.lock` | nothing; locked while the files of a blob are made |
//! | `rafsd.usage` | 8 bytes magic, then a word: bytes used on the disk. Locked by the one process that evicts |
//! | `rafsd.owner.N` | nothing; locked by process N for as long as it lives |

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};

use super::evict::{self, Freed};
use super::lock::FileLock;
use super::mapping::Mapping;
use super::word::OWNERS;
use crate::metrics::CacheMetrics;

/// Patience with processes that make files.
const PATIENCE: Duration = Duration::from_secs(5);
/// Patience with the process that evicts.
const EVICTION: Duration = Duration::from_secs(2);
/// After a search that found nothing to evict, the next one is that far.
const PAUSE: Duration = Duration::from_millis(100);
const MAGIC: &[u8; 8] = b"rafsdU1\n";
const PAGE: u64 = 4096;

/// See the module.
pub(crate) struct Directory {
    path: PathBuf,
    owner: u16,
    /// Locked for our life.
    _owner_file: File,
    lock_file: File,
    usage_file: File,
    usage: Mapping,
    /// Reserved by this process and not yet seen on the disk, perhaps.
    reserved: AtomicU64,
    /// Held by the thread that evicts; when the last search found nothing.
    evicting: Mutex<Option<Instant>>,
    /// By this process.
    evicted_chunks: AtomicU64,
    evicted_bytes: AtomicU64,
}

impl Directory {
    /// Makes the directory if it is missing. Fails if it can not be written.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        let lock_file = open(&path.join("rafsd.lock"))?;
        let usage_file = open(&path.join("rafsd.usage"))?;
        let lock = FileLock::exclusive(&lock_file, PATIENCE)?;
        let (owner, owner_file) = own(path)?;
        let mut magic = [0; 8];
        let made = usage_file.read_exact_at(&mut magic, 0).is_err()
            || &magic != MAGIC
            || usage_file.metadata()?.len() != PAGE;
        if made {
            usage_file.write_all_at(&[0; PAGE as usize], 0)?;
            usage_file.set_len(PAGE)?;
            usage_file.write_all_at(MAGIC, 0)?;
        }
        let usage = Mapping::new(&usage_file, PAGE, true)?;
        drop(lock);
        let directory = Self {
            path: path.to_owned(),
            owner,
            _owner_file: owner_file,
            lock_file,
            usage_file,
            usage,
            reserved: AtomicU64::new(0),
            evicting: Mutex::new(None),
            evicted_chunks: AtomicU64::new(0),
            evicted_bytes: AtomicU64::new(0),
        };
        if made {
            directory.measure();
        }
        Ok(directory)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The number of this process.
    pub(super) fn owner(&self) -> u16 {
        self.owner
    }

    /// Keeps other processes from making files of blobs.
    pub(super) fn lock(&self) -> io::Result<FileLock<'_>> {
        FileLock::exclusive(&self.lock_file, PATIENCE)
    }

    /// Whether process `owner` still lives.
    pub(crate) fn alive(&self, owner: u16) -> bool {
        if owner == self.owner {
            return true;
        }
        let file = match File::open(owner_path(&self.path, owner)) {
            Ok(file) => file,
            Err(error) => return error.kind() != ErrorKind::NotFound,
        };
        // The lock that we get ends with the file.
        flock(&file, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Whether no other process uses the directory.
    pub(super) fn is_alone(&self) -> bool {
        (0..OWNERS).all(|owner| owner == self.owner || !self.alive(owner))
    }

    fn used(&self) -> Option<&AtomicU64> {
        self.usage.word(8)
    }

    /// Bytes that all processes use in the directory.
    pub(crate) fn usage(&self) -> u64 {
        self.used().map_or(0, |used| used.load(Ordering::Acquire))
    }

    /// What the directory holds, and what this process evicted from it.
    pub(crate) fn metrics(&self) -> CacheMetrics {
        CacheMetrics {
            used: self.usage(),
            evicted_chunks: self.evicted_chunks.load(Ordering::Relaxed),
            evicted_bytes: self.evicted_bytes.load(Ordering::Relaxed),
        }
    }

    /// Counts what is on the disk, and what this process is about to put there.
    pub(super) fn measure(&self) -> u64 {
        let usage = disk_usage(&self.path) + self.reserved.load(Ordering::Acquire);
        if let Some(used) = self.used() {
            used.store(usage, Ordering::Release);
        }
        usage
    }

    /// Reserves `bytes` of the disk within `quota` (0 for no limit), if need be by evicting what was not used for long.
    pub(super) fn reserve(&self, bytes: u64, quota: u64, evict: bool) -> io::Result<Reservation<'_>> {
        self.reserved.fetch_add(bytes, Ordering::AcqRel);
        let mut reservation = Reservation {
            directory: self,
            bytes,
            written: false,
        };
        let used = self
            .used()
            .map_or(0, |used| used.fetch_add(bytes, Ordering::AcqRel));
        if quota == 0 || used + bytes <= quota || (evict && self.make_room(quota)) {
            return Ok(reservation);
        }
        reservation.written = false;
        Err(io::Error::new(
            ErrorKind::QuotaExceeded,
            "the cache's quota is used up",
        ))
    }

    /// Evicts until usage is below `quota`, and a little more, so that not every chunk has to search.
    fn make_room(&self, quota: u64) -> bool {
        let mut last = self.evicting.lock();
        if self.usage() <= quota {
            return true;
        }
        if last.is_some_and(|last| last.elapsed() < PAUSE) {
            return false;
        }
        let Ok(_among_processes) = FileLock::exclusive(&self.usage_file, EVICTION) else {
            return false;
        };
        let used = self.measure();
        if used > quota {
            let wanted = used - (quota - quota / 16);
            let freed = evict::evict(self, wanted);
            self.evicted_chunks.fetch_add(freed.chunks, Ordering::Relaxed);
            self.evicted_bytes.fetch_add(freed.bytes, Ordering::Relaxed);
            tracing::debug!(directory = %self.path.display(), used, quota, wanted, ?freed, "evicted");
        }
        let enough = self.measure() <= quota;
        *last = (!enough).then(Instant::now);
        enough
    }

    /// Evicts until at most `keep` bytes are used, as far as there is something to evict.
    pub(super) fn shrink(&self, keep: u64) -> io::Result<Freed> {
        let _among_processes = FileLock::exclusive(&self.usage_file, EVICTION)?;
        Ok(match self.measure().saturating_sub(keep) {
            0 => Freed::default(),
            wanted => evict::evict(self, wanted),
        })
    }

    /// What was freed by others means: `bytes` fewer are used.
    fn give_back(&self, bytes: u64) {
        if let Some(used) = self.used() {
            let _ = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                Some(used.saturating_sub(bytes))
            });
        }
    }
}

/// Room on the disk. Given back by its drop unless it was used.
pub(super) struct Reservation<'a> {
    directory: &'a Directory,
    bytes: u64,
    written: bool,
}

impl Reservation<'_> {
    /// The bytes are on the disk.
    pub(super) fn used(mut self) {
        self.written = true;
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.directory.reserved.fetch_sub(self.bytes, Ordering::AcqRel);
        if !self.written {
            self.directory.give_back(self.bytes);
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

fn owner_path(directory: &Path, owner: u16) -> PathBuf {
    directory.join(format!("rafsd.owner.{owner}"))
}

/// Takes the first number that nobody has.
fn own(directory: &Path) -> io::Result<(u16, File)> {
    for owner in 0..OWNERS {
        let file = open(&owner_path(directory, owner))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok((owner, file));
        }
    }
    Err(io::Error::new(
        ErrorKind::ResourceBusy,
        format!("{OWNERS} processes use the directory"),
    ))
}

/// Bytes that the files of `directory` take on the disk.
fn disk_usage(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else {
        return 0;
    };
    entries
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .filter(fs::Metadata::is_file)
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}
