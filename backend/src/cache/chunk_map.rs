//! The chunk map that other tools know: rumours of what is in a data file.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use parking_lot::Mutex;

use super::lock::FileLock;

/// The file begins with a page of header.
const HEADER: u64 = 4096;
/// How long others may keep its lock.
const PATIENCE: Duration = Duration::from_millis(200);

/// `ID.blob.data.chunk_map`, as nydusd keeps it: header of four little-endian words, then one bit per chunk from 4096
/// on, most significant bit first.
pub(super) struct ChunkMap {
    file: File,
    chunks: u32,
    all: bool,
    writer: Option<Mutex<()>>,
}

const MAP_MAGIC: u32 = 0x424d_4150;
const MAP_VERSION: u32 = 1;
const MAP_MAGIC2: u32 = 0x434d_4150;
const MAP_ALL: u32 = 0x4d4d_4150;

impl ChunkMap {
    /// Opens or makes the file; `None` if it is not one, which costs other tools our bits and nothing else.
    pub(super) fn open(path: &Path, chunks: u32) -> Option<Self> {
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
        let lock = FileLock::exclusive(&file, PATIENCE)?;
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
            writer: Some(Mutex::new(())),
        })
    }

    /// Opens the file to change it, if it is there.
    pub(super) fn open_existing(path: &Path, chunks: u32) -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
        let all = map_header(&file, chunks).ok()?;
        Some(Self {
            file,
            chunks,
            all,
            writer: Some(Mutex::new(())),
        })
    }

    /// Opens the file as it is.
    pub(super) fn open_readable(path: &Path, chunks: u32) -> Option<Self> {
        let file = File::open(path).ok()?;
        let all = map_header(&file, chunks).ok()?;
        Some(Self {
            file,
            chunks,
            all,
            writer: None,
        })
    }

    pub(super) fn contains(&self, index: u32) -> bool {
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
    pub(super) fn insert(&self, index: u32) {
        if !self.all {
            self.change(index, |byte| byte | mask(index));
        }
    }

    /// Clears a bit, if the file's lock can be had.
    pub(super) fn remove(&self, index: u32) {
        if self.all {
            // Bits count again, as far as there are any.
            let _ = self.file.write_all_at(&0u32.to_le_bytes(), 12);
        }
        self.change(index, |byte| byte & !mask(index));
    }

    fn change(&self, index: u32, new: impl Fn(u8) -> u8) {
        let Some(writer) = self.writer.as_ref().filter(|_| index < self.chunks) else {
            return;
        };
        let _in_this_process = writer.lock();
        let Ok(_among_processes) = FileLock::exclusive(&self.file, PATIENCE) else {
            return;
        };
        if let Some(byte) = self.byte(index).filter(|byte| new(*byte) != *byte) {
            let _ = self
                .file
                .write_all_at(&[new(byte)], HEADER + u64::from(index / 8));
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
