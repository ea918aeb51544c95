//! Tree and chunks → v5 bootstrap.
//!
//! Tables first, then one record per *name*, in depth-first order; the inode table leads from a name's number to
//! its record. Digests cover the content of the whole tree, so they are computed from the leaves up before
//! anything is written.

use backend::chunk::Digester;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::layout::trim_zeros;
use crate::layout::v5::{self, BlobEntry, ExtendedBlobEntry, InodeFlags, SuperBlock};

use super::Parts;
use super::codec::digest;
use super::error::BuildError;
use super::tree::{Content, Inode, InodeId, Numbers, Tree};
use super::xattr;

/// Unit of the size that a directory shows.
const DIRECTORY_UNIT: u64 = 4096;
/// What an entry counts for in it besides its name.
const DIRECTORY_ENTRY: u64 = 8;

/// The complete bootstrap.
pub(super) fn write(parts: &Parts<'_>, digester: Digester) -> Result<Vec<u8>, BuildError> {
    let tree = parts.tree;
    let numbers = tree.number();
    let names = tree.name_count();
    BuildError::check_limit("number of names", names, u64::from(u32::MAX))?;
    let (blob_table, extended) = blob_tables(parts);

    let inode_table_offset = u64::from(v5::SUPERBLOCK_SIZE);
    let prefetch_table_offset = inode_table_offset + align8(4 * names);
    let blob_table_offset = prefetch_table_offset + align8(4 * parts.prefetch.len() as u64);
    let extended_offset = blob_table_offset + blob_table.len() as u64;
    let records_offset = extended_offset + size_of_val(extended.as_slice()) as u64;

    let mut writer = Records {
        parts,
        numbers: &numbers,
        digests: digests(parts, digester),
        start: records_offset,
        bytes: Vec::new(),
        table: vec![0; names as usize],
    };
    writer.append_tree()?;
    let Records {
        bytes: records,
        table,
        ..
    } = writer;
    BuildError::check_limit(
        "size of the bootstrap",
        records_offset + records.len() as u64,
        v5::MAX_FILE_SIZE,
    )?;

    let superblock = SuperBlock {
        magic: U32::new(v5::MAGIC),
        version: U32::new(v5::VERSION),
        size: U32::new(v5::SUPERBLOCK_SIZE),
        chunk_size: U32::new(parts.chunk_size),
        flags: U64::new(parts.flags),
        inodes_count: U64::new(numbers.distinct()),
        inode_table_offset: U64::new(inode_table_offset),
        prefetch_table_offset: U64::new(prefetch_table_offset),
        blob_table_offset: U64::new(blob_table_offset),
        inode_table_entries: U32::new(names as u32),
        prefetch_table_entries: U32::new(parts.prefetch.len() as u32),
        blob_table_size: U32::new(blob_table.len() as u32),
        extended_blob_table_entries: U32::new(extended.len() as u32),
        extended_blob_table_offset: U64::new(extended_offset),
    };
    let mut image = superblock.as_bytes().to_vec();
    image.resize(inode_table_offset as usize, 0);
    for offset in table {
        image.extend_from_slice(&offset.to_le_bytes());
    }
    image.resize(prefetch_table_offset as usize, 0);
    for inode in parts.prefetch {
        image.extend_from_slice(&numbers.ino(*inode).to_le_bytes());
    }
    image.resize(blob_table_offset as usize, 0);
    image.extend_from_slice(&blob_table);
    image.extend_from_slice(extended.as_slice().as_bytes());
    image.extend_from_slice(&records);
    Ok(image)
}

fn align8(value: u64) -> u64 {
    value.next_multiple_of(v5::UNIT)
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(v5::UNIT as usize), 0);
}

/// Blob table (padded) and extended blob table (v5 section 6).
fn blob_tables(parts: &Parts<'_>) -> (Vec<u8>, Vec<ExtendedBlobEntry>) {
    let mut table = Vec::new();
    for (index, blob) in parts.blobs.iter().enumerate() {
        if index > 0 {
            table.push(0);
        }
        let entry = BlobEntry {
            prefetch_offset: U32::new(0),
            prefetch_size: U32::new(0),
        };
        table.extend_from_slice(entry.as_bytes());
        table.extend_from_slice(trim_zeros(&blob.id));
    }
    pad(&mut table);
    let extended = parts.blobs.iter().map(|blob| ExtendedBlobEntry {
        chunk_count: blob.chunk_count,
        features: blob.features,
        uncompressed_size: blob.uncompressed_size,
        compressed_size: blob.compressed_size,
        reserved: [0; 40],
    });
    (table, extended.collect())
}

/// Content digests of all inodes (v5 section 10).
fn digests(parts: &Parts<'_>, digester: Digester) -> Vec<[u8; 32]> {
    let tree = parts.tree;
    let nothing = digest(digester, b"");
    let mut digests = vec![nothing; tree.inode_count()];
    let mut set = |inode: InodeId, digest| {
        if let Some(place) = digests.get_mut(inode.position()) {
            *place = digest;
        }
    };
    let directories: Vec<InodeId> = tree.directories().map(|visit| visit.inode).collect();
    for entry in directories
        .iter()
        .flat_map(|directory| tree.inode(*directory).entries())
    {
        match &tree.inode(entry.inode).content {
            Content::Regular { .. } => {
                let chunks: Vec<u8> = parts
                    .chunks
                    .of_file(entry.inode)
                    .flat_map(|chunk| chunk.digest)
                    .collect();
                set(entry.inode, digest(digester, &chunks));
            }
            Content::Symlink(target) => set(entry.inode, digest(digester, target)),
            Content::Directory(_) | Content::Device { .. } | Content::Special => {}
        }
    }
    // Directories come before what is below them: backwards, every child is ready.
    for directory in directories.into_iter().rev() {
        let children: Vec<u8> = tree
            .inode(directory)
            .entries()
            .iter()
            .flat_map(|entry| digests.get(entry.inode.position()).copied().unwrap_or(nothing))
            .collect();
        if let Some(place) = digests.get_mut(directory.position()) {
            *place = digest(digester, &children);
        }
    }
    digests
}

/// The inode records and the table that leads to them.
struct Records<'b> {
    parts: &'b Parts<'b>,
    numbers: &'b Numbers,
    digests: Vec<[u8; 32]>,
    /// Offset of the first record.
    start: u64,
    bytes: Vec<u8>,
    table: Vec<u32>,
}

impl Records<'_> {
    /// Depth first, children in the order of their names.
    fn append_tree(&mut self) -> Result<(), BuildError> {
        let tree: &Tree = self.parts.tree;
        self.append(InodeId::ROOT, 1, b"/", 0)?;
        let mut stack = vec![(InodeId::ROOT, 0)];
        while let Some((directory, position)) = stack.pop() {
            let Some(entry) = tree.inode(directory).entries().get(position) else {
                continue;
            };
            stack.push((directory, position + 1));
            let index = self.numbers.first_child(directory) + position as u32;
            self.append(entry.inode, index, &entry.name, self.numbers.ino(directory))?;
            if matches!(tree.inode(entry.inode).content, Content::Directory(_)) {
                stack.push((entry.inode, 0));
            }
        }
        Ok(())
    }

    /// One name: 128 bytes, name, target, attributes, chunk records (v5 section 7).
    fn append(&mut self, id: InodeId, index: u32, name: &[u8], parent: u32) -> Result<(), BuildError> {
        let inode = self.parts.tree.inode(id);
        let offset = self.start + self.bytes.len() as u64;
        BuildError::check_limit("offset of an inode", offset, v5::MAX_FILE_SIZE)?;
        if let Some(place) = self.table.get_mut(index as usize - 1) {
            *place = (offset / v5::UNIT) as u32;
        }
        let xattrs = xattr::payload_v5(&inode.xattrs);
        let size = shown_size(inode);
        let (flags, target) = match &inode.content {
            Content::Symlink(target) => (InodeFlags::SYMLINK, target.as_slice()),
            _ => (0, &[][..]),
        };
        let (child_index, child_count) = match &inode.content {
            Content::Directory(entries) => (self.numbers.first_child(id), entries.len() as u32),
            Content::Regular { .. } => (0, self.parts.chunks.of_file(id).len() as u32),
            _ => (0, 0),
        };
        let attributes = &inode.attributes;
        let record = v5::Inode {
            digest: self.digests.get(id.position()).copied().unwrap_or_default(),
            parent: U64::new(u64::from(parent)),
            ino: U64::new(u64::from(self.numbers.ino(id))),
            uid: U32::new(attributes.uid),
            gid: U32::new(attributes.gid),
            projid: U32::new(0),
            mode: U32::new(attributes.mode),
            size: U64::new(size),
            blocks: U64::new((size + align8(xattrs.len() as u64)).div_ceil(512)),
            flags: U64::new(flags | if xattrs.is_empty() { 0 } else { InodeFlags::XATTR }),
            nlink: U32::new(self.numbers.links(id)),
            child_index: U32::new(child_index),
            child_count: U32::new(child_count),
            name_size: U16::new(name.len() as u16),
            symlink_size: U16::new(target.len() as u16),
            rdev: U32::new(if let Content::Device { rdev } = inode.content {
                rdev
            } else {
                0
            }),
            mtime_nsec: U32::new(attributes.mtime_nsec),
            mtime: U64::new(attributes.mtime as u64),
            reserved: [0; 8],
        };
        self.bytes.extend_from_slice(record.as_bytes());
        for part in [name, target] {
            self.bytes.extend_from_slice(part);
            pad(&mut self.bytes);
        }
        if !xattrs.is_empty() {
            self.bytes.extend_from_slice(&(xattrs.len() as u64).to_le_bytes());
            self.bytes.extend_from_slice(&xattrs);
            pad(&mut self.bytes);
        }
        for (number, chunk) in self.parts.chunks.of_file(id).enumerate() {
            let mut chunk = *chunk;
            chunk.file_offset = U64::new(number as u64 * u64::from(self.parts.chunk_size));
            self.bytes.extend_from_slice(chunk.as_bytes());
        }
        Ok(())
    }
}

/// Size as `stat` shows it.
fn shown_size(inode: &Inode) -> u64 {
    match &inode.content {
        Content::Regular { size } => *size,
        Content::Symlink(target) => target.len() as u64,
        Content::Directory(entries) => {
            let size: u64 = entries
                .iter()
                .map(|entry| entry.name.len() as u64 + DIRECTORY_ENTRY)
                .sum();
            size.next_multiple_of(DIRECTORY_UNIT).max(DIRECTORY_UNIT)
        }
        Content::Device { .. } | Content::Special => 0,
    }
}
