//! Which ledger belongs to which data file: opened, made, or taken over from an earlier boot of the host.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, StatxFlags};

use super::record::{file_size, read_record, records_at};
use super::{Ledger, Mapping};
use crate::cache::word::{State, Tick, Word};

const MAGIC: &[u8; 16] = b"rafsd stamps 2\n\0";
/// Bytes of the header that say which data file it is.
const IDENTITY: usize = 72;
/// More chunks than any blob has; a blob that claims to is served uncached.
const MAX_CHUNKS: u32 = 1 << 24;

impl Ledger {
    /// Opens the ledger of `data`, or makes one. To be called under the directory's lock.
    pub(crate) fn open(path: &Path, data: &File, chunks: u32, owner: u16) -> io::Result<Self> {
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
    pub(crate) fn open_existing(
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
    pub(crate) fn chunks_at(path: &Path) -> Option<u32> {
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
}

fn zero(file: &File, size: u64) -> io::Result<()> {
    let page = [0; 4096];
    (0..size)
        .step_by(page.len())
        .try_for_each(|at| file.write_all_at(&page, at))
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
