//! A disk, or its image, that holds one blob per GPT partition (`localdisk`).
//!
//! A blob id of 64 hexadecimal digits does not fit a partition's name: the name has the first 32, the partition's GUID the others. In a
//! partition of type "basic data" the name alone is the id, cut to 32 digits.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::{Sink, Source, file};
use crate::config::LocalDiskConfig;
use crate::error::{SourceError, SourceErrorKind};

const SECTOR: u64 = 512;
/// Most bytes of a partition table that are read.
const MAX_TABLE: u64 = 1 << 20;
/// "Basic data", as it is stored.
const BASIC_DATA: [u8; 16] = [
    0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7,
];
/// Digits of a blob id that a name holds.
const NAME_DIGITS: usize = 32;

/// See the module.
pub struct Disk {
    file: Arc<File>,
    host: String,
    blobs: Blobs,
}

/// Where blobs lie on the disk.
enum Blobs {
    /// Every blob asked for begins at the first byte.
    Whole(u64),
    /// By id, or by its first digits.
    Partitions(HashMap<String, Range<u64>>),
}

impl Disk {
    /// Opens the disk and reads its partition table.
    pub fn new(config: &LocalDiskConfig) -> Result<Self, SourceError> {
        let host = config.device.display().to_string();
        let refuse = |error: io::Error| SourceError::new(SourceErrorKind::Config, &host, error);
        let mut file = File::open(&config.device).map_err(refuse)?;
        // The metadata of a device have no size.
        let size = file.seek(SeekFrom::End(0)).map_err(refuse)?;
        let blobs = if config.disable_gpt {
            Blobs::Whole(size)
        } else {
            Blobs::Partitions(partitions(&file, size).map_err(refuse)?)
        };
        Ok(Self {
            file: Arc::new(file),
            host,
            blobs,
        })
    }

    fn find(&self, blob_id: &str) -> Option<Range<u64>> {
        match &self.blobs {
            Blobs::Whole(size) => Some(0..*size),
            Blobs::Partitions(blobs) => {
                let whole = blobs.get(blob_id);
                whole.or_else(|| blobs.get(blob_id.get(..NAME_DIGITS)?)).cloned()
            }
        }
    }
}

impl Source for Disk {
    fn host(&self) -> &str {
        &self.host
    }

    fn read<'a>(
        &'a self,
        blob_id: &'a str,
        range: Range<u64>,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        async move {
            let Some(blob) = self.find(blob_id) else {
                let detail = format!("no partition for blob {blob_id}");
                return Err(SourceError::new(SourceErrorKind::NotFound, &self.host, detail));
            };
            let start = blob.start.checked_add(range.start);
            let end = blob.start.checked_add(range.end).filter(|end| *end <= blob.end);
            let (Some(start), Some(end)) = (start, end) else {
                let detail = format!("blob {blob_id} has {} bytes", blob.end - blob.start);
                return Err(SourceError::new(
                    SourceErrorKind::RangeRefused,
                    &self.host,
                    detail,
                ));
            };
            file::read(&self.host, Arc::clone(&self.file), start..end, sink).await
        }
        .boxed()
    }
}

/// Reads the partition table (UEFI specification, section 5.3) of a disk of `size` bytes.
fn partitions(disk: &File, size: u64) -> io::Result<HashMap<String, Range<u64>>> {
    let invalid = |what: String| io::Error::new(ErrorKind::InvalidData, what);
    let mut header = [0; 92];
    disk.read_exact_at(&mut header, SECTOR)?;
    if !header.starts_with(b"EFI PART") {
        return Err(invalid("no GUID partition table".into()));
    }
    let (first, count, entry_size) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
    let table_size = u64::from(count) * u64::from(entry_size);
    if entry_size < 128 || table_size > MAX_TABLE {
        return Err(invalid(format!(
            "partition table of {count} entries of {entry_size} bytes"
        )));
    }
    let start = first
        .checked_mul(SECTOR)
        .ok_or_else(|| invalid(format!("partition table at sector {first}")))?;
    let mut table = vec![0; table_size as usize];
    disk.read_exact_at(&mut table, start)?;
    let mut found = HashMap::new();
    for entry in table.chunks_exact(entry_size as usize) {
        let kind = entry.get(..16).unwrap_or_default();
        if kind.iter().all(|byte| *byte == 0) {
            continue;
        }
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let begin = first.checked_mul(SECTOR);
        let end = last.checked_add(1).and_then(|end| end.checked_mul(SECTOR));
        let (Some(begin), Some(end)) = (begin, end.filter(|end| *end <= size)) else {
            return Err(invalid(format!(
                "partition of sectors {first}..={last}, beyond the disk's {size} bytes"
            )));
        };
        let name = name(entry);
        let id = if kind == BASIC_DATA {
            name
        } else {
            name + &guid_digits(entry)
        };
        if begin >= end || id.is_empty() || found.insert(id.clone(), begin..end).is_some() {
            return Err(invalid(format!("partition {id:?} of sectors {first}..={last}")));
        }
    }
    Ok(found)
}

/// The partition's name, up to its first NUL.
fn name(entry: &[u8]) -> String {
    let units = entry.get(56..128).unwrap_or_default().as_chunks().0;
    let units = units
        .iter()
        .map(|unit| u16::from_le_bytes(*unit))
        .take_while(|unit| *unit != 0);
    char::decode_utf16(units)
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

/// The partition's GUID in 32 digits. Its first three fields are stored least significant byte first.
fn guid_digits(entry: &[u8]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    hex::encode(order.map(|at: usize| entry.get(16 + at).copied().unwrap_or_default()))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
