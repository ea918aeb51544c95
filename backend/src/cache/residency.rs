//! Which chunks are in the data file: the bitmap in memory that readers ask, the stamps that it is made from, and the
//! chunk map that other tools know.
//!
//! All three are only ever changed after the data they speak of was written. Stamps have a slot of their own each, so writers need no lock. A byte of
//! the chunk map is shared by eight chunks and is changed under a file lock.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FlockOperation, StatxFlags};

/// Both files begin with a page of header.
const HEADER: u64 = 4096;

/// The chunks that are complete, verified for this image, and may be read from the data file.
pub(crate) struct Residency {
    words: Box<[AtomicU64]>,
}

impl Residency {
    pub(crate) fn new(chunk_count: u32) -> Self {
        Self {
            words: (0..chunk_count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// One load. Whoever sees the bit sees the data that were written before it was set.
    pub(crate) fn contains(&self, index: u32) -> bool {
        self.words
            .get((index / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (index % 64)) != 0)
    }

    pub(crate) fn insert(&self, index: u32) {
        if let Some(word) = self.words.get((index / 64) as usize) {
            word.fetch_or(1 << (index % 64), Ordering::Release);
        }
    }

    /// Number of resident chunks.
    pub(crate) fn count(&self) -> u32 {
        self.words
            .iter()
            .map(|word| word.load(Ordering::Relaxed).count_ones())
            .sum()
    }
}

/// `ID.blob.data.stamps`. Header, little-endian:
///
/// | offset | size | value |
/// |---|---|---|
/// | 0 | 16 | magic |
/// | 16 | 36 | boot id of the host, as text |
/// | 52 | 4 | number of chunks |
/// | 56 | 8 | inode number of the data file |
/// | 64 | 8 | its time of birth, in nanoseconds |
///
/// then 32 bytes per chunk from 4096 on, zero for "not verified". If any of it is not as it is now, all stamps are void: a host
/// crash may have taken data that were never written back, a copied or replaced data file was not verified by us.
pub(crate) struct Stamps {
    file: File,
    writable: bool,
    inherited: bool,
}

const STAMPS_MAGIC: &[u8; 16] = b"rafsd stamps 1\n\0";
const STAMP: u64 = 32;

impl Stamps {
    /// Opens the file, and voids it if it does not speak of this boot and this data file. `whole` says that
    /// the data file had its full size when it was found.
    pub(crate) fn open(path: &Path, data: BorrowedFd<'_>, whole: bool, chunks: u32) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let header = stamps_header(data, chunks)?;
        let size = HEADER + STAMP * u64::from(chunks);
        let lock = FileLock::exclusive(&file)?;
        let inherited = whole && file.metadata()?.len() == size && starts_with(&file, &header);
        if !inherited {
            file.set_len(0)?;
            file.set_len(size)?;
            file.write_all_at(&header, 0)?;
        }
        drop(lock);
        Ok(Self {
            file,
            writable: true,
            inherited,
        })
    }

    /// Opens the file as it is; `None` unless it speaks of this boot and this data file.
    pub(crate) fn open_readable(path: &Path, data: &BorrowedFd<'_>, chunks: u32) -> Option<Self> {
        let file = File::open(path).ok()?;
        let header = stamps_header(*data, chunks).ok()?;
        starts_with(&file, &header).then_some(Self {
            file,
            writable: false,
            inherited: true,
        })
    }

    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    pub(crate) fn inherited(&self) -> bool {
        self.inherited
    }

    /// Stamps of `first..first + count`, or fewer if they can not be read.
    pub(crate) fn read(&self, first: u32, count: u32) -> Vec<[u8; 32]> {
        let mut bytes = vec![0; count as usize * STAMP as usize];
        match self
            .file
            .read_exact_at(&mut bytes, HEADER + STAMP * u64::from(first))
        {
            Ok(()) => bytes.as_chunks().0.to_vec(),
            Err(_) => Vec::new(),
        }
    }

    pub(crate) fn write(&self, index: u32, stamp: &[u8; 32]) -> io::Result<()> {
        self.file.write_all_at(stamp, HEADER + STAMP * u64::from(index))
    }
}

fn stamps_header(data: BorrowedFd<'_>, chunks: u32) -> io::Result<Vec<u8>> {
    let stat = rustix::fs::statx(data, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::BTIME)?;
    let birth = stat
        .stx_btime
        .tv_sec
        .wrapping_mul(1_000_000_000)
        .wrapping_add(stat.stx_btime.tv_nsec.into());
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    let boot = boot.get(..36).ok_or(ErrorKind::InvalidData)?;
    Ok([
        &STAMPS_MAGIC[..],
        boot,
        &chunks.to_le_bytes(),
        &stat.stx_ino.to_le_bytes(),
        &birth.to_le_bytes(),
    ]
    .concat())
}

fn starts_with(file: &File, expected: &[u8]) -> bool {
    let mut actual = vec![0; expected.len()];
    file.read_exact_at(&mut actual, 0).is_ok() && actual == expected
}

/// `ID.blob.data.chunk_map`, as nydusd keeps it: header of four little-endian words, then one bit per chunk from 4096
/// on, most significant bit first.
pub(crate) struct ChunkMap {
    file: File,
    chunks: u32,
    all: bool,
    inherited: bool,
    writer: Option<Mutex<()>>,
}

const MAP_MAGIC: u32 = 0x424d_4150;
const MAP_VERSION: u32 = 1;
const MAP_MAGIC2: u32 = 0x434d_4150;
const MAP_ALL: u32 = 0x4d4d_4150;

impl ChunkMap {
    /// Opens or makes the file; `None` if it is not one, which costs other tools our bits and nothing else.
    pub(crate) fn open(path: &Path, chunks: u32) -> Option<Self> {
        match Self::try_open(path, chunks) {
            Ok(map) => Some(map),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "chunk map not used");
                None
            }
        }
    }

    fn try_open(path: &Path, chunks: u32) -> io::Result<Self> {
        if chunks == 0 {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the blob has no chunks"));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let lock = FileLock::exclusive(&file)?;
        let made = file.metadata()?.len() == 0;
        if made {
            file.set_len(map_size(chunks))?;
            let header: Vec<u8> = [MAP_MAGIC, MAP_VERSION, MAP_MAGIC2]
                .iter()
                .flat_map(|w| w.to_le_bytes())
                .collect();
            file.write_all_at(&header, 0)?;
        }
        let all = map_header(&file, chunks)?;
        drop(lock);
        Ok(Self {
            file,
            chunks,
            all,
            inherited: !made,
            writer: Some(Mutex::new(())),
        })
    }

    /// Opens the file as it is.
    pub(crate) fn open_readable(path: &Path, chunks: u32) -> Option<Self> {
        let file = File::open(path).ok()?;
        let all = map_header(&file, chunks).ok()?;
        Some(Self {
            file,
            chunks,
            all,
            inherited: true,
            writer: None,
        })
    }

    pub(crate) fn inherited(&self) -> bool {
        self.inherited
    }

    pub(crate) fn contains(&self, index: u32) -> bool {
        index < self.chunks && (self.all || self.byte(index).is_some_and(|byte| byte & mask(index) != 0))
    }

    fn byte(&self, index: u32) -> Option<u8> {
        let mut byte = [0];
        self.file
            .read_exact_at(&mut byte, HEADER + u64::from(index / 8))
            .ok()?;
        Some(byte[0])
    }

    /// Sets a bit, if the file's lock can be had.
    pub(crate) fn insert(&self, index: u32) {
        let Some(writer) = self.writer.as_ref().filter(|_| index < self.chunks && !self.all) else {
            return;
        };
        let _in_this_process = writer.lock();
        let Ok(_among_processes) = FileLock::exclusive(&self.file) else {
            return;
        };
        if let Some(byte) = self.byte(index).filter(|byte| byte & mask(index) == 0) {
            let _ = self
                .file
                .write_all_at(&[byte | mask(index)], HEADER + u64::from(index / 8));
        }
    }
}

fn mask(index: u32) -> u8 {
    0x80 >> (index % 8)
}

fn map_size(chunks: u32) -> u64 {
    HEADER + u64::from(chunks.div_ceil(8))
}

/// Checks the header, and tells whether it says "all chunks".
fn map_header(file: &File, chunks: u32) -> io::Result<bool> {
    let invalid = |what| Err(io::Error::new(ErrorKind::InvalidData, what));
    let mut header = [0; 16];
    file.read_exact_at(&mut header, 0)?;
    let mut words = header.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
    if file.metadata()?.len() != map_size(chunks) {
        return invalid("size does not fit the number of chunks");
    }
    if words.by_ref().take(3).ne([MAP_MAGIC, MAP_VERSION, MAP_MAGIC2]) {
        return invalid("no chunk map");
    }
    Ok(words.next() == Some(MAP_ALL))
}

/// An advisory lock on a whole file, held briefly by every process that changes it.
struct FileLock<'a>(&'a File);

impl<'a> FileLock<'a> {
    /// Waits a little for other processes; `WouldBlock` if one keeps the lock, for then it is stuck.
    fn exclusive(file: &'a File) -> io::Result<Self> {
        for pause in [0, 1, 2, 5, 10, 20, 50, 100] {
            match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                    std::thread::sleep(std::time::Duration::from_millis(pause));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(ErrorKind::WouldBlock.into())
    }
}

impl Drop for FileLock<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::flock(self.0, FlockOperation::Unlock);
    }
}
