//! Tree and chunks → v6 bootstrap.
//!
//! Two passes. The first gives every inode its place, in the order of [`Tree::directories`]; small directories
//! and symlinks get their data right behind the inode, larger ones whole blocks. The second writes, now that
//! every node id is known. Offsets of the first pass count from the metadata base, that is from node id 0.
//!
//! * `allocate`: where there is room. `names`: entries of directories, cut into blocks.

mod allocate;
mod names;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use crate::layout::blob::Features;
use crate::layout::v5::ChunkRecord;
use crate::layout::v6::{
    self, BlobEntry, ChunkAddress, DeviceSlot, Dirent, ExtendedInode, ExtendedSuperBlock, FileType,
    InodeFormat, SuperBlock,
};
use crate::layout::{Flags, MAX_SYMLINK};

use super::Parts;
use super::error::BuildError;
use super::tree::{Content, Inode, InodeId, Numbers, Tree};
use super::xattr;
use allocate::Allocator;
use names::{Name, blocks_of, directory_size, sorted_names};

const BLOCK: u64 = 1 << v6::BLOCK_BITS;
/// The root is one block behind the metadata base, so that its node id is not 0.
const ROOT_OFFSET: u64 = BLOCK;
/// Alignment of blobs in the flat address space of a single-device image.
const MAPPED_ALIGNMENT: u64 = 0x8_0000;

/// The complete bootstrap.
pub(super) fn write(parts: &Parts<'_>) -> Result<Vec<u8>, BuildError> {
    BuildError::check_limit("number of blobs", parts.blobs.len() as u64, v6::MAX_BLOBS)?;
    let plan = Plan::new(parts)?;
    let blob_table_offset = align(
        v6::DEVICE_SLOTS_OFFSET + (parts.blobs.len() * size_of::<DeviceSlot>()) as u64,
        v6::TABLE_ALIGNMENT,
    );
    let blob_table_size = size_of_val(parts.blobs) as u64;
    let prefetch: &[InodeId] = if parts.blobs.is_empty() {
        &[]
    } else {
        parts.prefetch
    };
    let prefetch_offset = blob_table_offset + blob_table_size;
    let prefetch_size = 4 * prefetch.len() as u64;
    let base = if parts.blobs.is_empty() {
        0
    } else {
        align(prefetch_offset + prefetch_size, v6::TABLE_ALIGNMENT)
    };
    let referenced = parts.chunks.referenced(&parts.tree.named());
    let chunk_table_offset = align(base + plan.end, v6::TABLE_ALIGNMENT);
    let chunk_table_size = (referenced.len() * size_of::<ChunkRecord>()) as u64;
    let size = align(chunk_table_offset + chunk_table_size, v6::TABLE_ALIGNMENT);
    BuildError::check_limit(
        "block address of the bootstrap's end",
        size / BLOCK,
        u64::from(u32::MAX),
    )?;

    let mut image = Image {
        bytes: vec![0; size as usize],
    };
    let mut position = size;
    let mut blocks = 0_u64;
    for (index, blob) in parts.blobs.iter().enumerate() {
        let blob_blocks = blob.uncompressed_size.get() / BLOCK;
        let mapped = align(position, MAPPED_ALIGNMENT) / BLOCK;
        position = (mapped + blob_blocks) * BLOCK;
        blocks += blob_blocks;
        BuildError::check_limit(
            "block address in the flat image",
            position / BLOCK,
            u64::from(u32::MAX),
        )?;
        let slot = DeviceSlot {
            tag: blob.id,
            blocks: U32::new(blob_blocks as u32),
            mapped_blkaddr: U32::new(mapped as u32),
            reserved: [0; 56],
        };
        image.put(
            v6::DEVICE_SLOTS_OFFSET + (index * size_of::<DeviceSlot>()) as u64,
            slot.as_bytes(),
        );
        let mut entry = *blob;
        entry.index = U32::new(index as u32);
        image.put(
            blob_table_offset + (index * size_of::<BlobEntry>()) as u64,
            entry.as_bytes(),
        );
    }
    let superblock = SuperBlock {
        magic: U32::new(v6::MAGIC),
        checksum: U32::new(0),
        feature_compat: U32::new(v6::FEATURE_COMPAT_RAFS),
        block_bits: v6::BLOCK_BITS,
        extension_slots: 0,
        root_nid: U16::new((ROOT_OFFSET / v6::NID_UNIT) as u16),
        inodes: U64::new(plan.names),
        build_time: U64::new(0),
        build_time_nsec: U32::new(0),
        blocks: U32::new(blocks as u32),
        meta_blkaddr: U32::new((base / BLOCK) as u32),
        xattr_blkaddr: U32::new(0),
        uuid: [0; 16],
        volume_name: [0; 16],
        feature_incompat: U32::new(v6::FEATURE_INCOMPAT),
        compression: U16::new(0),
        extra_devices: U16::new(parts.blobs.len() as u16),
        device_slots: U16::new(v6::DEVICE_SLOTS_SLOT),
        reserved: [0; 38],
    };
    image.put(v6::SUPERBLOCK_OFFSET, superblock.as_bytes());
    // True of no blob, too.
    let all_inlined = parts
        .blobs
        .iter()
        .all(|blob| Features(blob.features.get()).has(Features::INLINED_CHUNK_DIGEST));
    let inlined = if all_inlined {
        Flags::INLINED_CHUNK_DIGEST
    } else {
        0
    };
    let extended = ExtendedSuperBlock {
        flags: U64::new(parts.flags | Flags::ENCRYPTION_NONE | inlined),
        blob_table_offset: U64::new(blob_table_offset),
        blob_table_size: U32::new(blob_table_size as u32),
        chunk_size: U32::new(parts.chunk_size),
        chunk_table_offset: U64::new(chunk_table_offset),
        chunk_table_size: U64::new(chunk_table_size),
        prefetch_table_offset: U64::new(if prefetch.is_empty() { 0 } else { prefetch_offset }),
        prefetch_table_size: U32::new(prefetch_size as u32),
        padding: U32::new(0),
        reserved: [0; 200],
    };
    image.put(v6::EXTENDED_SUPERBLOCK_OFFSET, extended.as_bytes());
    for (index, inode) in prefetch.iter().enumerate() {
        let nid = plan.nid(*inode);
        BuildError::check_limit("node id in the prefetch table", nid, u64::from(u32::MAX))?;
        image.put(prefetch_offset + 4 * index as u64, &(nid as u32).to_le_bytes());
    }
    let mut written = vec![false; parts.tree.inode_count()];
    for visit in parts.tree.directories() {
        plan.write_inode(parts, &mut image, base, visit.inode, visit.parent)?;
        for entry in parts.tree.inode(visit.inode).entries() {
            let directory = matches!(parts.tree.inode(entry.inode).content, Content::Directory(_));
            if !directory
                && let Some(written) = written.get_mut(entry.inode.position())
                && !std::mem::replace(written, true)
            {
                plan.write_inode(parts, &mut image, base, entry.inode, visit.inode)?;
            }
        }
    }
    for (index, record) in referenced.into_iter().enumerate() {
        image.put(
            chunk_table_offset + (index * size_of::<ChunkRecord>()) as u64,
            record.as_bytes(),
        );
    }
    Ok(image.bytes)
}

fn align(value: u64, unit: u64) -> u64 {
    value.next_multiple_of(unit)
}

/// The bytes of the bootstrap, written in any order.
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Offsets and sizes come from the plan, which the size of the image was computed from.
    #[allow(clippy::indexing_slicing)]
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let offset = offset as usize;
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// Where an inode is, counted from the metadata base.
#[derive(Clone, Copy, Default)]
struct Place {
    offset: u64,
    /// Data of a directory or symlink in whole blocks.
    blocks: Option<u64>,
    /// The rest of the data follows the inode.
    inline: bool,
    size: u64,
}

struct Plan {
    places: Vec<Place>,
    numbers: Numbers,
    names: u64,
    end: u64,
}

impl Plan {
    fn new(parts: &Parts<'_>) -> Result<Self, BuildError> {
        let tree = parts.tree;
        let mut allocator = Allocator::new();
        let mut places: Vec<Option<Place>> = vec![None; tree.inode_count()];
        let mut names = 1;
        let mut place = |id: InodeId| -> Result<(), BuildError> {
            if let Some(place) = places.get_mut(id.position())
                && place.is_none()
            {
                *place = Some(Self::place(parts, &mut allocator, id)?);
            }
            Ok(())
        };
        for visit in tree.directories() {
            place(visit.inode)?;
            for entry in tree.inode(visit.inode).entries() {
                names += 1;
                if !matches!(tree.inode(entry.inode).content, Content::Directory(_)) {
                    place(entry.inode)?;
                }
            }
        }
        BuildError::check_limit("number of names", names, u64::from(u32::MAX))?;
        let places = places.into_iter().map(Option::unwrap_or_default).collect();
        Ok(Self {
            places,
            numbers: tree.number(),
            names,
            end: allocator.cursor,
        })
    }

    fn place(parts: &Parts<'_>, allocator: &mut Allocator, id: InodeId) -> Result<Place, BuildError> {
        let inode = parts.tree.inode(id);
        let head = inode_head_size(inode)?;
        Ok(match &inode.content {
            Content::Regular { size } => {
                let chunks = parts.chunks.of_file(id).len() as u64;
                let offset =
                    allocator.inode(chunk_array_offset(head) + chunks * size_of::<ChunkAddress>() as u64);
                Place {
                    offset,
                    size: *size,
                    ..Place::default()
                }
            }
            Content::Directory(_) => flat(allocator, head, directory_size(inode)),
            Content::Symlink(target) => {
                BuildError::check_limit("length of a symlink target", target.len() as u64, MAX_SYMLINK)?;
                flat(allocator, head, target.len() as u64)
            }
            Content::Device { .. } | Content::Special => Place {
                offset: allocator.inode(head),
                ..Place::default()
            },
        })
    }

    fn of(&self, id: InodeId) -> Place {
        self.places.get(id.position()).copied().unwrap_or_default()
    }

    fn nid(&self, id: InodeId) -> u64 {
        self.of(id).offset / v6::NID_UNIT
    }

    fn write_inode(
        &self,
        parts: &Parts<'_>,
        image: &mut Image,
        base: u64,
        id: InodeId,
        parent: InodeId,
    ) -> Result<(), BuildError> {
        let inode = parts.tree.inode(id);
        let place = self.of(id);
        let xattrs = xattr_area(inode)?;
        let head = (size_of::<ExtendedInode>() + xattrs.len()) as u64;
        let (layout, union) = match &inode.content {
            Content::Regular { size } => (InodeFormat::CHUNK_BASED, self.chunk_format(parts, id, *size)),
            Content::Device { rdev } => (InodeFormat::FLAT_PLAIN, *rdev),
            Content::Special => (InodeFormat::FLAT_PLAIN, 0),
            Content::Directory(_) | Content::Symlink(_) => {
                let layout = if place.inline {
                    InodeFormat::FLAT_INLINE
                } else {
                    InodeFormat::FLAT_PLAIN
                };
                // Without whole blocks the address has no meaning; the inode's own block is a harmless one.
                let data = place.blocks.unwrap_or(place.offset);
                (layout, ((base + data) / BLOCK) as u32)
            }
        };
        let attributes = &inode.attributes;
        let record = ExtendedInode {
            format: U16::new(InodeFormat::EXTENDED | layout << InodeFormat::LAYOUT_SHIFT),
            xattr_count: U16::new(xattr::icount_v6(xattrs.len()).unwrap_or(0)),
            mode: U16::new(attributes.mode as u16),
            reserved: U16::new(0),
            size: U64::new(place.size),
            union: U32::new(union),
            ino: U32::new(self.numbers.ino(id)),
            uid: U32::new(attributes.uid),
            gid: U32::new(attributes.gid),
            mtime: U64::new(attributes.mtime as u64),
            mtime_nsec: U32::new(attributes.mtime_nsec),
            nlink: U32::new(self.numbers.links(id)),
            reserved2: [0; 16],
        };
        let offset = base + place.offset;
        image.put(offset, record.as_bytes());
        image.put(offset + size_of::<ExtendedInode>() as u64, &xattrs);
        match &inode.content {
            Content::Regular { .. } => {
                let array = offset + chunk_array_offset(head);
                for (number, chunk) in parts.chunks.of_file(id).enumerate() {
                    let address = ChunkAddress::new(
                        chunk.blob_index.get() as u8,
                        chunk.index.get(),
                        (chunk.uncompressed_offset.get() / BLOCK) as u32,
                    );
                    image.put(
                        array + (number * size_of::<ChunkAddress>()) as u64,
                        address.as_bytes(),
                    );
                }
            }
            Content::Directory(_) => {
                self.put_flat(
                    image,
                    base,
                    place,
                    head,
                    &self.directory_data(parts.tree, id, parent),
                );
            }
            Content::Symlink(target) => self.put_flat(image, base, place, head, target),
            Content::Device { .. } | Content::Special => {}
        }
        Ok(())
    }

    /// Data of a directory or symlink: whole blocks where the plan put them, the rest behind the inode.
    fn put_flat(&self, image: &mut Image, base: u64, place: Place, head: u64, data: &[u8]) {
        let split = if place.inline {
            data.len() - data.len() % BLOCK as usize
        } else {
            data.len()
        };
        let (whole, tail) = data.split_at(split);
        if let Some(blocks) = place.blocks {
            image.put(base + blocks, whole);
        }
        image.put(base + place.offset + head, tail);
    }

    /// The chunk bits of `i_u` (v6 section 7). A file of several chunks that lie back to back in one blob is
    /// shown to an EROFS driver as one chunk.
    fn chunk_format(&self, parts: &Parts<'_>, id: InodeId, size: u64) -> u32 {
        let chunk_size = u64::from(parts.chunk_size);
        let shown = if size > chunk_size && contiguous(parts.chunks.of_file(id), chunk_size) {
            size.next_power_of_two()
        } else {
            chunk_size
        };
        InodeFormat::CHUNK_INDEXES | (shown.trailing_zeros() - u32::from(v6::BLOCK_BITS))
    }

    /// The blocks of a directory (v6 section 8).
    fn directory_data(&self, tree: &Tree, id: InodeId, parent: InodeId) -> Vec<u8> {
        let names = sorted_names(tree.inode(id));
        let target = |name: &Name<'_>| match name {
            Name::This => id,
            Name::Parent => parent,
            Name::Child(entry) => entry.inode,
        };
        let mut data = Vec::new();
        for (number, block) in blocks_of(&names).into_iter().enumerate() {
            data.resize(number * BLOCK as usize, 0);
            let mut name_offset = block.len() * size_of::<Dirent>();
            for name in block {
                let child = target(name);
                let entry = Dirent {
                    nid: U64::new(self.nid(child)),
                    name_offset: U16::new(name_offset as u16),
                    file_type: file_type(tree.inode(child)),
                    reserved: 0,
                };
                data.extend_from_slice(entry.as_bytes());
                name_offset += name.bytes().len();
            }
            for name in block {
                data.extend_from_slice(name.bytes());
            }
        }
        data
    }
}

/// Whether the chunks follow each other in one blob's uncompressed view without gap.
fn contiguous<'c>(mut chunks: impl Iterator<Item = &'c ChunkRecord>, chunk_size: u64) -> bool {
    let Some(first) = chunks.next() else { return false };
    let mut expected = first.uncompressed_offset.get();
    chunks.all(|chunk| {
        expected += chunk_size;
        chunk.blob_index == first.blob_index && chunk.uncompressed_offset.get() == expected
    })
}

/// Place of an inode whose data are not chunks (v6 section 8).
fn flat(allocator: &mut Allocator, head: u64, size: u64) -> Place {
    let tail = size % BLOCK;
    if tail != 0 && head + tail <= BLOCK {
        let offset = allocator.within_block(head + tail);
        let blocks = (size > tail).then(|| allocator.blocks(size - tail));
        Place {
            offset,
            blocks,
            inline: true,
            size,
        }
    } else {
        let offset = allocator.inode(head);
        Place {
            offset,
            blocks: Some(allocator.blocks(size)),
            inline: false,
            size,
        }
    }
}

fn xattr_area(inode: &Inode) -> Result<Vec<u8>, BuildError> {
    xattr::area_v6(&inode.xattrs).map_err(BuildError::Options)
}

/// Inode and attributes.
fn inode_head_size(inode: &Inode) -> Result<u64, BuildError> {
    Ok((size_of::<ExtendedInode>() + xattr_area(inode)?.len()) as u64)
}

fn chunk_array_offset(head: u64) -> u64 {
    align(head, size_of::<ChunkAddress>() as u64)
}

fn file_type(inode: &Inode) -> u8 {
    match rustix::fs::FileType::from_raw_mode(inode.attributes.mode) {
        rustix::fs::FileType::Directory => FileType::DIRECTORY,
        rustix::fs::FileType::CharacterDevice => FileType::CHAR,
        rustix::fs::FileType::BlockDevice => FileType::BLOCK,
        rustix::fs::FileType::Fifo => FileType::FIFO,
        rustix::fs::FileType::Socket => FileType::SOCKET,
        rustix::fs::FileType::Symlink => FileType::SYMLINK,
        rustix::fs::FileType::RegularFile | rustix::fs::FileType::Unknown => FileType::REGULAR,
    }
}
