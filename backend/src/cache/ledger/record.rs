//! Records: what a chunk was verified to be, and where its bytes are.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{HEADER, Ledger};

const RECORD: u64 = 48;

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

impl Ledger {
    /// The records of `first..first + count`.
    pub(crate) fn records(&self, first: u32, count: u32) -> Vec<Record> {
        let mut bytes = vec![0; count as usize * RECORD as usize];
        match self.file.read_exact_at(&mut bytes, record_at(self.chunks, first)) {
            Ok(()) => bytes.as_chunks().0.iter().map(decode).collect(),
            Err(_) => Vec::new(),
        }
    }

    pub(crate) fn record(&self, index: u32) -> Record {
        read_record(&self.file, self.chunks, index)
    }

    pub(crate) fn write(&self, index: u32, record: &Record) -> io::Result<()> {
        self.file
            .write_all_at(&encode(record), record_at(self.chunks, index))
    }
}

pub(super) fn records_at(chunks: u32) -> u64 {
    HEADER + (8 * u64::from(chunks)).next_multiple_of(4096)
}

fn record_at(chunks: u32, index: u32) -> u64 {
    records_at(chunks) + RECORD * u64::from(index)
}

pub(super) fn file_size(chunks: u32) -> u64 {
    record_at(chunks, chunks)
}

pub(super) fn read_record(file: &File, chunks: u32, index: u32) -> Record {
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
