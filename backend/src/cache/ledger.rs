//! `ID.blob.data.stamps`: what every process of the host knows of a blob's chunks.
//!
//! | from byte | content |
//! |---|---|
//! | 0 | header: 16 bytes magic, 36 boot id of the host as text, 4 number of chunks, 8 inode number of the data file, 8 its time of birth in nanoseconds |
//! | 128 | word: chunks withdrawn so far |
//! | 136 | word: state of the chunk index |
//! | 1024 | a bit per 1024 chunks: whether any of them was ever turned |
//! | 4096 | a [`Word`] per chunk |
//! | the next multiple of 4096 | a record per chunk: 32 bytes stamp, 8 offset and 4 size in the data file, 4 CRC-32C of the data (0: not known) |
//!
//! All numbers are little-endian. The words are mapped by every process and only ever changed by compare-and-swap. A record is written
//! by who has turned its chunk's word into `Filling`, and counts for the version that follows.
//!
//! The header says which data file of which boot this is. If it says anything else, a new file takes the place of this one, and
//! the chunks of the old one are `Doubtful`: a host crash may have taken data that were never written back.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{AtFlags, StatxFlags};

use super::mapping::Mapping;
use super::word::{State, Tick, Word};

const MAGIC: &[u8; 16] = b"rafsd stamps 2\n\0";
const HEADER: u64 = 4096;
/// Bytes of the header that say which data file it is.
const IDENTITY: usize = 72;
const WITHDRAWN: u64 = 128;
const INDEX: u64 = 136;
const RECORD: u64 = 48;
/// Where the bits of turned blocks begin, and how many chunks have one bit.
const TURNED: u64 = 1024;
const BLOCK: u32 = 1024;
/// More chunks than any blob has; a blob that claims to is served uncached.
const MAX_CHUNKS: u32 = 1 << 24;
/// A fill takes no longer, or its owner is stuck.
const LONGEST_FILL: Duration = Duration::from_secs(10);
/// So long a chunk is kept for those who asked for it, unless they say before that they have read it.
const LEASE: Duration = Duration::from_secs(5);

/// What a chunk was verified to be, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    /// See [`crate::codec::stamp`]; all zero for nothing.
    pub(crate) stamp: [u8; 32],
    pub(crate) offset: u64,
    pub(crate) size: u32,
    /// CRC-32C of the data, for those who know no image; 0 if it is not known.
    pub(crate) crc32c: u32,
}

/// See the module.
pub(crate) struct Ledger {
    file: File,
    mapping: Mapping,
    chunks: u32,
    writable: bool,
    owner: u16,
}

/// What becomes of somebody who wants to fill a chunk.
pub(crate) enum Acquired {
    /// The chunk is present, under this version.
    Present(u32),
    /// It is theirs to fill.
    Mine(Filling),
    /// Somebody else does.
    Busy,
}

impl Ledger {
    /// Opens the ledger of `data`, or makes one. To be called under the directory's lock.
    pub(super) fn open(path: &Path, data: &File, chunks: u32, owner: u16) -> io::Result<Self> {
        if chunks > MAX_CHUNKS {
            return Err(io::Error::new(
                ErrorKind::Unsupported,
                format!("{chunks} chunks are too many to cache"),
            ));
        }
        let identity = identity(data, chunks)?;
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) if is_of(&file, &identity, chunks)? => Self::map(file, chunks, true, owner),
            Ok(old) => {
                let ledger = Self::make(path, &identity, chunks, owner)?;
                ledger.inherit(&old, &identity);
                Ok(ledger)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Self::make(path, &identity, chunks, owner),
            Err(error) => Err(error),
        }
    }

    /// Opens the ledger of `data` as it is; `None` unless it speaks of this boot and this data file.
    pub(super) fn open_existing(
        path: &Path,
        data: &File,
        chunks: Option<u32>,
        writable: bool,
        owner: u16,
    ) -> Option<Self> {
        let file = OpenOptions::new().read(true).write(writable).open(path).ok()?;
        let chunks = match chunks {
            Some(chunks) => chunks,
            None => {
                let mut count = [0; 4];
                file.read_exact_at(&mut count, 52).ok()?;
                u32::from_le_bytes(count)
            }
        };
        let identity = identity(data, chunks).ok()?;
        let valid = chunks <= MAX_CHUNKS && is_of(&file, &identity, chunks).ok()?;
        valid
            .then(|| Self::map(file, chunks, writable, owner).ok())
            .flatten()
    }

    /// How many chunks the ledger at `path` is for, whatever data file it speaks of.
    pub(super) fn chunks_at(path: &Path) -> Option<u32> {
        let mut header = [0; IDENTITY];
        File::open(path).ok()?.read_exact_at(&mut header, 0).ok()?;
        let count = header.strip_prefix(MAGIC)?.get(36..40)?;
        Some(u32::from_le_bytes(count.try_into().ok()?))
    }

    fn make(path: &Path, identity: &[u8], chunks: u32, owner: u16) -> io::Result<Self> {
        let new = path.with_added_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        // Written and not left as a hole, so that no store to the mapping can fail for want of space.
        let made = zero(&file, records_at(chunks))
            .and_then(|()| file.set_len(file_size(chunks)))
            .and_then(|()| file.write_all_at(identity, 0))
            .and_then(|()| Self::map(file, chunks, true, owner))
            .and_then(|ledger| fs::rename(&new, path).map(|()| ledger));
        if made.is_err() {
            let _ = fs::remove_file(&new);
        }
        made
    }

    fn map(file: File, chunks: u32, writable: bool, owner: u16) -> io::Result<Self> {
        let mapping = Mapping::new(&file, records_at(chunks), writable)?;
        Ok(Self {
            file,
            mapping,
            chunks,
            writable,
            owner,
        })
    }

    /// Takes the chunks of the same data file over from another boot, as doubtful ones.
    fn inherit(&self, old: &File, identity: &[u8]) {
        let mut header = [0; IDENTITY];
        let same = old.read_exact_at(&mut header, 0).is_ok()
            && header.get(..16) == identity.get(..16)
            && header.get(52..) == identity.get(52..)
            && old
                .metadata()
                .is_ok_and(|metadata| metadata.len() == file_size(self.chunks));
        if !same {
            return;
        }
        let now = Tick::now();
        for index in 0..self.chunks {
            let record = read_record(old, self.chunks, index);
            // One without a stamp was only reserved.
            if record.size > 0
                && record.stamp != [0; 32]
                && self.write(index, &record).is_ok()
                && let Some(word) = self.word(index)
            {
                self.mark_turned(index);
                word.store(Word(0).next(State::Doubtful, 0, now).0, Ordering::Release);
            }
        }
    }

    pub(super) fn writable(&self) -> bool {
        self.writable
    }

    pub(super) fn chunks(&self) -> u32 {
        self.chunks
    }

    fn word(&self, index: u32) -> Option<&AtomicU64> {
        if index >= self.chunks {
            return None;
        }
        self.mapping.word(HEADER + 8 * u64::from(index))
    }

    pub(super) fn load(&self, index: u32) -> Word {
        Word(self.word(index).map_or(0, |word| word.load(Ordering::Acquire)))
    }

    /// The version under which chunk `index` is present; 0 if it is not.
    pub(crate) fn present(&self, index: u32) -> u32 {
        let word = self.load(index);
        if word.state() == State::Present {
            word.version()
        } else {
            0
        }
    }

    /// Whether there is any chunk present.
    pub(crate) fn any_present(&self) -> bool {
        (0..self.chunks).any(|index| self.present(index) != 0)
    }

    /// Whether chunk `index` is present under `version`. Remembers that it was used.
    pub(crate) fn holds(&self, index: u32, version: u32) -> bool {
        let Some(slot) = self.word(index) else {
            return false;
        };
        let word = Word(slot.load(Ordering::Acquire));
        if word.state() != State::Present || word.version() != version {
            return false;
        }
        let now = Tick::now();
        if self.writable && now.since(word.time()).is_some_and(|ticks| ticks > 0) {
            // Whoever is faster has noted the same.
            let _ = slot.compare_exchange(word.0, word.at(now).0, Ordering::AcqRel, Ordering::Relaxed);
        }
        true
    }

    /// Counts the chunks of the blob that were withdrawn, ever, by anybody.
    pub(crate) fn withdrawn(&self) -> u64 {
        self.mapping
            .word(WITHDRAWN)
            .map_or(0, |count| count.load(Ordering::Acquire))
    }

    /// Keeps chunk `index` for those who asked for it.
    pub(crate) fn lease(&self, index: u32, version: u32) {
        self.set_time(index, version, Tick::now().after(LEASE));
    }

    /// Ends what [`Ledger::lease`] began.
    pub(crate) fn release(&self, index: u32, version: u32) {
        self.set_time(index, version, Tick::now());
    }

    fn set_time(&self, index: u32, version: u32, time: Tick) {
        let Some(slot) = self.word(index).filter(|_| self.writable) else {
            return;
        };
        let _ = slot.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            let word = Word(word);
            (word.state() == State::Present && word.version() == version).then(|| word.at(time).0)
        });
    }

    /// The records of `first..first + count`.
    pub(super) fn records(&self, first: u32, count: u32) -> Vec<Record> {
        let mut bytes = vec![0; count as usize * RECORD as usize];
        match self.file.read_exact_at(&mut bytes, record_at(self.chunks, first)) {
            Ok(()) => bytes.as_chunks().0.iter().map(decode).collect(),
            Err(_) => Vec::new(),
        }
    }

    pub(super) fn record(&self, index: u32) -> Record {
        read_record(&self.file, self.chunks, index)
    }

    pub(super) fn write(&self, index: u32, record: &Record) -> io::Result<()> {
        self.file
            .write_all_at(&encode(record), record_at(self.chunks, index))
    }

    /// Whether nobody else has bytes between `offset` and `offset + size`: all that others of the ledger's chunks have lies before
    /// if their number is lower than `index`, and behind if it is higher. To be asked by who fills chunk `index` and has put
    /// these two into its record.
    ///
    /// Present chunks have passed, so that only the nearest on either side matters. Who is still filling has perhaps not asked yet:
    /// it will see our record, or we see its, and both may give up. A chunk of an earlier boot yields.
    fn place_is_free(self: &Arc<Self>, index: u32, offset: u64, size: u32) -> bool {
        let end = offset.saturating_add(size.into());
        let clear = |other: u32, apart: &dyn Fn(&Record) -> bool| -> Option<bool> {
            let word = self.load(other);
            match word.state() {
                State::Absent => None,
                State::Present => Some(apart(&self.record(other))),
                State::Filling => (!apart(&self.record(other))).then_some(false),
                State::Doubtful if apart(&self.record(other)) => None,
                State::Doubtful => match self.turn(other, word) {
                    Some(yielding) if yielding.record(&Record::default()).is_ok() => None,
                    _ => Some(false),
                },
            }
        };
        let own = index / BLOCK;
        let turned = |block: &u32| self.is_turned(*block);
        let mut before = (0..=own)
            .rev()
            .filter(turned)
            .flat_map(|block| (block * BLOCK..((block + 1) * BLOCK).min(index)).rev());
        let mut behind = (own..self.chunks.div_ceil(BLOCK))
            .filter(turned)
            .flat_map(|block| (block * BLOCK).max(index + 1)..((block + 1) * BLOCK).min(self.chunks));
        let below = |record: &Record| record.offset.saturating_add(record.size.into()) <= offset;
        let above = |record: &Record| record.size == 0 || record.offset >= end;
        before.find_map(|other| clear(other, &below)) != Some(false)
            && behind.find_map(|other| clear(other, &above)) != Some(false)
    }

    fn turned(&self, block: u32) -> Option<(&AtomicU64, u64)> {
        let word = self.mapping.word(TURNED + 8 * u64::from(block / 64))?;
        Some((word, 1 << (block % 64)))
    }

    fn is_turned(&self, block: u32) -> bool {
        self.turned(block)
            .is_none_or(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// To be called before the word of chunk `index` is turned.
    fn mark_turned(&self, index: u32) {
        if !self.is_turned(index / BLOCK)
            && let Some((word, bit)) = self.turned(index / BLOCK)
        {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Asks for the right to fill chunk `index`. `alive` tells whether an owner still lives.
    pub(super) fn acquire(self: &Arc<Self>, index: u32, alive: impl Fn(u16) -> bool) -> Acquired {
        loop {
            let word = self.load(index);
            let free = match word.state() {
                State::Present => return Acquired::Present(word.version()),
                State::Filling => stuck(word) || !alive(word.owner()),
                State::Absent | State::Doubtful => true,
            };
            if !free {
                return Acquired::Busy;
            }
            if let Some(filling) = self.turn(index, word) {
                return Acquired::Mine(filling);
            }
        }
    }

    /// Whether chunk `index` was present before the host was restarted.
    pub(super) fn doubtful(&self, index: u32) -> bool {
        self.load(index).state() == State::Doubtful
    }

    /// Takes the right to replace chunk `index`, if it still is present under `version`.
    pub(super) fn replace(self: &Arc<Self>, index: u32, version: u32) -> Option<Filling> {
        let word = self.load(index);
        let same = word.state() == State::Present && word.version() == version;
        if same { self.turn(index, word) } else { None }
    }

    /// Takes the right to change chunk `index` from the state that `word` describes, if it still is in it.
    pub(super) fn turn(self: &Arc<Self>, index: u32, word: Word) -> Option<Filling> {
        let next = word.next(State::Filling, self.owner, Tick::now());
        let slot = self.word(index).filter(|_| self.writable)?;
        self.mark_turned(index);
        slot.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Acquire)
            .ok()?;
        if word.state() == State::Present {
            // Before anything of it changes: whoever reads now looks again.
            if let Some(count) = self.mapping.word(WITHDRAWN) {
                count.fetch_add(1, Ordering::AcqRel);
            }
        }
        Some(Filling {
            ledger: Arc::clone(self),
            index,
            word: next,
        })
    }

    /// Begins to read the chunk index, unless another process does.
    pub(super) fn begin_index(&self, alive: impl Fn(u16) -> bool) -> bool {
        let Some(slot) = self.mapping.word(INDEX).filter(|_| self.writable) else {
            return true;
        };
        let word = Word(slot.load(Ordering::Acquire));
        if word.state() == State::Filling && word.owner() != self.owner && !stuck(word) && alive(word.owner())
        {
            return false;
        }
        let next = word.next(State::Filling, self.owner, Tick::now());
        slot.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    pub(super) fn end_index(&self) {
        if let Some(slot) = self.mapping.word(INDEX).filter(|_| self.writable) {
            let word = Word(slot.load(Ordering::Acquire));
            if word.owner() == self.owner {
                let next = word.next(State::Absent, 0, Tick::now());
                let _ = slot.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Acquire);
            }
        }
    }
}

/// Whether a fill lasts for so long that its owner must be stuck.
fn stuck(word: Word) -> bool {
    // A beginning that lies ahead is damage.
    Tick::now().since(word.time()).is_none_or(|ticks| {
        word.time()
            .after(LONGEST_FILL)
            .since(word.time())
            .is_some_and(|most| ticks > most)
    })
}

/// The right to change one chunk's bytes and record, among all processes. Given back by its drop: the chunk is absent then.
pub(crate) struct Filling {
    ledger: Arc<Ledger>,
    index: u32,
    word: Word,
}

impl Filling {
    /// Reserves the chunk's place in the data file, before its bytes are changed or believed. `false` if another chunk has it: images
    /// describe the blob in ways that contradict each other.
    pub(super) fn reserve(&self, offset: u64, size: u32) -> io::Result<bool> {
        self.record(&Record {
            offset,
            size,
            ..Record::default()
        })?;
        if self.ledger.place_is_free(self.index, offset, size) {
            return Ok(true);
        }
        self.record(&Record::default())?;
        Ok(false)
    }

    /// Writes the chunk's record; the bytes must be there.
    pub(super) fn record(&self, record: &Record) -> io::Result<()> {
        self.ledger.write(self.index, record)
    }

    /// The chunk is what its record says. Returns the version; `None` if the right was lost meanwhile, for we were taken for stuck.
    pub(super) fn done(mut self) -> Option<u32> {
        let next = self.word.next(State::Present, 0, Tick::now());
        self.settle(next).then_some(next.version())
    }

    fn settle(&mut self, next: Word) -> bool {
        let word = std::mem::replace(&mut self.word, next);
        self.ledger.word(self.index).is_some_and(|slot| {
            slot.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        })
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if self.word.state() == State::Filling {
            let next = self.word.next(State::Absent, 0, Tick::now());
            self.settle(next);
        }
    }
}

fn zero(file: &File, size: u64) -> io::Result<()> {
    let page = [0; 4096];
    (0..size)
        .step_by(page.len())
        .try_for_each(|at| file.write_all_at(&page, at))
}

fn records_at(chunks: u32) -> u64 {
    HEADER + (8 * u64::from(chunks)).next_multiple_of(4096)
}

fn record_at(chunks: u32, index: u32) -> u64 {
    records_at(chunks) + RECORD * u64::from(index)
}

fn file_size(chunks: u32) -> u64 {
    record_at(chunks, chunks)
}

fn read_record(file: &File, chunks: u32, index: u32) -> Record {
    let mut bytes = [0; RECORD as usize];
    match file.read_exact_at(&mut bytes, record_at(chunks, index)) {
        Ok(()) => decode(&bytes),
        Err(_) => Record::default(),
    }
}

fn encode(record: &Record) -> [u8; RECORD as usize] {
    let mut bytes = [0; RECORD as usize];
    let parts = [
        &record.stamp[..],
        &record.offset.to_le_bytes(),
        &record.size.to_le_bytes(),
        &record.crc32c.to_le_bytes(),
    ];
    for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    bytes
}

fn decode(bytes: &[u8; RECORD as usize]) -> Record {
    let mut record = Record::default();
    let (stamp, rest) = bytes.split_at(32);
    record.stamp.copy_from_slice(stamp);
    if let Some((offset, rest)) = rest.split_first_chunk() {
        record.offset = u64::from_le_bytes(*offset);
        if let Some((size, rest)) = rest.split_first_chunk() {
            record.size = u32::from_le_bytes(*size);
            record.crc32c = rest.first_chunk().map_or(0, |crc| u32::from_le_bytes(*crc));
        }
    }
    record
}

fn identity(data: &File, chunks: u32) -> io::Result<Vec<u8>> {
    let stat = rustix::fs::statx(
        data.as_fd(),
        "",
        AtFlags::EMPTY_PATH,
        StatxFlags::INO | StatxFlags::BTIME,
    )?;
    let birth = stat
        .stx_btime
        .tv_sec
        .wrapping_mul(1_000_000_000)
        .wrapping_add(stat.stx_btime.tv_nsec.into());
    let boot = fs::read("/proc/sys/kernel/random/boot_id")?;
    let boot = boot.get(..36).ok_or(ErrorKind::InvalidData)?;
    Ok([
        &MAGIC[..],
        boot,
        &chunks.to_le_bytes(),
        &stat.stx_ino.to_le_bytes(),
        &birth.to_le_bytes(),
    ]
    .concat())
}

fn is_of(file: &File, identity: &[u8], chunks: u32) -> io::Result<bool> {
    let mut actual = vec![0; identity.len()];
    Ok(file.metadata()?.len() == file_size(chunks)
        && file.read_exact_at(&mut actual, 0).is_ok()
        && actual == identity)
}
