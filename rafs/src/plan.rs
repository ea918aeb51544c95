//! From (inode, offset, size) to ranges of chunks. Memory only, no allocation.

use crate::error::Damaged;
use crate::image::Image;
use crate::index::{ChunkMap, TARFS_CHUNK};
use crate::inode::{Body, Inode, Kind};
use crate::layout::blob::Features;
use crate::layout::v5::ChunkRecord;
use crate::layout::v6::ChunkAddress;
use crate::superblock::Format;

/// A part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// A range of a chunk.
    Data(Segment),
    /// So many zeros, which are stored nowhere (v5).
    Hole(u64),
}

impl Piece {
    fn size(&self) -> u64 {
        match self {
            Piece::Data(segment) => segment.size.into(),
            Piece::Hole(size) => *size,
        }
    }
}

/// A range of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Position of the blob in the blob table.
    pub(crate) blob: usize,
    /// Number of the chunk.
    pub(crate) chunk: u32,
    /// Where the range starts in the chunk.
    pub(crate) in_chunk: u32,
    /// Where it starts in the uncompressed view.
    pub(crate) offset: u64,
    /// Its size.
    pub(crate) size: u32,
}

/// The pieces that a read consists of, in file order. Once it has failed it yields nothing more.
pub(crate) struct Plan<'a> {
    image: &'a Image,
    /// To check chunk addresses with; without it, segments tell blob and chunk reliably, but no more.
    map: Option<&'a ChunkMap>,
    inode: Inode,
    offset: u64,
    end: u64,
}

impl<'a> Plan<'a> {
    /// Plans to read `size` bytes at `offset`, cut at the end of the file.
    pub(crate) fn new(
        image: &'a Image,
        map: Option<&'a ChunkMap>,
        inode: &Inode,
        offset: u64,
        size: u64,
    ) -> Result<Self, Damaged> {
        if inode.kind != Kind::File {
            return Err(Damaged::new("inode", inode.id, "not a regular file"));
        }
        let end = offset.saturating_add(size).min(inode.size);
        let plan = Self {
            image,
            map,
            inode: *inode,
            offset: offset.min(end),
            end,
        };
        if let Body::V5 {
            chunks,
            child_count,
            holes: true,
            ..
        } = inode.body
        {
            plan.check_order(chunks, child_count)?;
        }
        Ok(plan)
    }

    /// Bytes that are still to come.
    pub(crate) fn remaining(&self) -> u64 {
        self.end - self.offset
    }

    fn piece(&self) -> Result<Piece, Damaged> {
        let chunk_size = u64::from(self.image.superblock.chunk_size);
        let number = self.offset / chunk_size;
        // Bytes of the file that this chunk holds.
        let expected = chunk_size.min(self.inode.size - number * chunk_size);
        let address = match (self.inode.body, self.image.superblock.format) {
            (Body::V6 { tail, .. }, Format::V6 { block_bits, .. }) => {
                self.v6_address(tail + number * size_of::<ChunkAddress>() as u64, block_bits)?
            }
            (
                Body::V5 {
                    chunks,
                    child_count,
                    holes: true,
                    ..
                },
                _,
            ) => return self.sparse_piece(chunks, child_count),
            (
                Body::V5 {
                    chunks, child_count, ..
                },
                _,
            ) if number < child_count => self.v5_address(
                chunks + number * size_of::<ChunkRecord>() as u64,
                number * chunk_size,
            )?,
            _ => return Err(self.damaged("a chunk of it is missing")),
        };
        self.segment(&address, self.offset % chunk_size, expected)
            .map(Piece::Data)
    }

    /// In a file with holes nothing but their order tells that chunks are where they should be. All of them are looked at for
    /// each plan: one in a wrong place would make a hole of another one's data.
    fn check_order(&self, chunks: u64, count: u64) -> Result<(), Damaged> {
        let mut end = 0;
        for record in self.records(chunks, count)? {
            let start = record.file_offset.get();
            if start < end || record.uncompressed_size.get() == 0 {
                return Err(self.damaged("its chunks are not in order, or overlap"));
            }
            end = start.saturating_add(record.uncompressed_size.get().into());
        }
        if end > self.inode.size {
            return Err(self.damaged("a chunk of it lies beyond its end"));
        }
        Ok(())
    }

    fn records(&self, chunks: u64, count: u64) -> Result<&'a [ChunkRecord], Damaged> {
        self.image.bootstrap.array("chunk records", chunks, count)
    }

    /// What is at the offset in a file with holes.
    fn sparse_piece(&self, chunks: u64, count: u64) -> Result<Piece, Damaged> {
        let records = self.records(chunks, count)?;
        let next = records.partition_point(|record| record.file_offset.get() <= self.offset);
        let (before, after) = records.split_at_checked(next).unwrap_or((records, &[]));
        if let Some(record) = before.last() {
            let (start, size) = (
                record.file_offset.get(),
                u64::from(record.uncompressed_size.get()),
            );
            let in_chunk = self.offset.saturating_sub(start);
            if in_chunk < size {
                let address = Address {
                    blob: record.blob_index.get() as usize,
                    chunk: record.index.get(),
                    offset: record.uncompressed_offset.get(),
                };
                return self.segment(&address, in_chunk, size).map(Piece::Data);
            }
        }
        let end = after
            .first()
            .map_or(self.end, |record| record.file_offset.get().min(self.end));
        match end.checked_sub(self.offset) {
            Some(size) if size > 0 => Ok(Piece::Hole(size)),
            _ => Err(self.damaged("its chunks are not in order")),
        }
    }

    /// The range of the chunk at `address` that begins `in_chunk` bytes into it. The chunk has `expected` bytes.
    fn segment(&self, address: &Address, in_chunk: u64, expected: u64) -> Result<Segment, Damaged> {
        let size = (expected - in_chunk).min(self.end - self.offset);
        let facts = self
            .image
            .superblock
            .blobs
            .get(address.blob)
            .ok_or_else(|| self.damaged("a chunk of it is in a blob that does not exist"))?;
        if facts.features.has(Features::TARFS) {
            return self.tar_segment(address, facts.compressed_size, in_chunk, size);
        }
        if facts.chunk_count != 0 && address.chunk >= facts.chunk_count {
            return Err(self.damaged("a chunk of it has a number that its blob does not have"));
        }
        if let Some(map) = self.map {
            let place = map.place(address.blob, address.chunk);
            if place.is_none_or(|place| place.offset != address.offset || u64::from(place.size) != expected) {
                return Err(self.damaged("a chunk address of it contradicts the chunk's record"));
            }
        }
        let offset = address
            .offset
            .checked_add(in_chunk)
            .ok_or_else(|| self.damaged("a chunk of it lies too far out"))?;
        Ok(Segment {
            blob: address.blob,
            chunk: address.chunk,
            in_chunk: in_chunk as u32,
            offset,
            size: size as u32,
        })
    }

    /// A tar is fetched in pieces of its own size.
    fn tar_segment(&self, address: &Address, tar: u64, in_chunk: u64, size: u64) -> Result<Segment, Damaged> {
        let offset = address.offset.saturating_add(in_chunk);
        if offset.checked_add(size).is_none_or(|end| end > tar) {
            return Err(self.damaged("a chunk of it lies beyond the end of the tar"));
        }
        let piece = u64::from(TARFS_CHUNK);
        let in_piece = offset % piece;
        Ok(Segment {
            blob: address.blob,
            chunk: u32::try_from(offset / piece)
                .map_err(|_| self.damaged("a chunk of it lies too far out"))?,
            in_chunk: in_piece as u32,
            offset,
            size: size.min(piece - in_piece) as u32,
        })
    }

    fn v6_address(&self, at: u64, block_bits: u8) -> Result<Address, Damaged> {
        let address = self.image.bootstrap.get::<ChunkAddress>("chunk address", at)?;
        Ok(Address {
            blob: address
                .blob_index()
                .ok_or_else(|| self.damaged("a chunk of it is in no blob"))?,
            chunk: address.index(),
            offset: u64::from(address.blkaddr.get()) << block_bits,
        })
    }

    fn v5_address(&self, at: u64, file_offset: u64) -> Result<Address, Damaged> {
        let record = self.image.bootstrap.get::<ChunkRecord>("chunk record", at)?;
        if record.file_offset.get() != file_offset {
            return Err(self.damaged("a chunk of it is for another place in the file"));
        }
        Ok(Address {
            blob: record.blob_index.get() as usize,
            chunk: record.index.get(),
            offset: record.uncompressed_offset.get(),
        })
    }

    fn damaged(&self, reason: &'static str) -> Damaged {
        Damaged::new("file with inode", self.inode.id, reason)
    }
}

/// What a file says of one of its chunks.
struct Address {
    blob: usize,
    chunk: u32,
    /// Where it starts in the uncompressed view.
    offset: u64,
}

impl Iterator for Plan<'_> {
    type Item = Result<Piece, Damaged>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.offset >= self.end {
            return None;
        }
        let piece = self.piece();
        match &piece {
            Ok(piece) => self.offset += piece.size(),
            Err(_) => self.offset = self.end,
        }
        Some(piece)
    }
}
