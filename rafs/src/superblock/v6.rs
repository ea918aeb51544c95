//! Superblocks and tables of RAFS v6.

use std::path::Path;

use backend::chunk::{Cipher, Compression, Digester};

use super::{BlobFacts, ChunkInfoFacts, Format, Superblock, Table, blob_id, stem};
use crate::bootstrap::{Bootstrap, Version};
use crate::error::{Damaged, Refused};
use crate::layout::blob::{ChunkInfoHeader, Features, TAR_HEADER_SIZE};
use crate::layout::v5::ChunkRecord;
use crate::layout::v6::{
    BlobEntry, CipherNumber, DEVICE_SLOTS_OFFSET, DeviceSlot, EXTENDED_SUPERBLOCK_OFFSET, ExtendedSuperBlock,
    SUPERBLOCK_OFFSET, SuperBlock, TARFS_BLOCK_BITS,
};
use crate::layout::{Flags, compression_from_number, digester_from_number, trim_zeros};

pub(super) fn read(bootstrap: &Bootstrap, path: &Path) -> Result<Superblock, Refused> {
    let superblock = bootstrap.get::<SuperBlock>("superblock", SUPERBLOCK_OFFSET)?;
    superblock.check()?;
    let extended = bootstrap.get::<ExtendedSuperBlock>("extended superblock", EXTENDED_SUPERBLOCK_OFFSET)?;
    extended.check()?;
    let flags = Flags(extended.flags.get());
    if flags.has(Flags::TARFS_MODE) != (superblock.block_bits == TARFS_BLOCK_BITS) {
        return Err(Damaged::new(
            "superblock",
            SUPERBLOCK_OFFSET,
            "block size contradicts the tarfs flag",
        )
        .into());
    }

    let blob_table = Table {
        offset: extended.blob_table_offset.get(),
        entries: u64::from(extended.blob_table_size.get()) / size_of::<BlobEntry>() as u64,
    };
    let chunk_table = Table {
        offset: extended.chunk_table_offset.get(),
        entries: extended.chunk_table_size.get() / size_of::<ChunkRecord>() as u64,
    };
    let prefetch_table = match extended.prefetch_table_offset.get() {
        0 => Table::default(),
        offset => Table {
            offset,
            entries: u64::from(extended.prefetch_table_size.get()) / 4,
        },
    };
    bootstrap.array::<ChunkRecord>("chunk table", chunk_table.offset, chunk_table.entries)?;
    bootstrap.slice(
        "prefetch table",
        prefetch_table.offset,
        prefetch_table.entries * 4,
    )?;
    if chunk_table.entries > u64::from(u32::MAX) {
        return Err(Damaged::new("chunk table", chunk_table.offset, "more than 2^32 records").into());
    }

    let meta = u64::from(superblock.meta_blkaddr.get()) << superblock.block_bits;
    if meta >= bootstrap.size() {
        return Err(Damaged::new("metadata", meta, "beyond the end of the bootstrap").into());
    }
    if blob_table.entries != u64::from(superblock.extra_devices.get()) {
        return Err(Damaged::new("blob table", blob_table.offset, "not one entry per device").into());
    }
    let slots = bootstrap.array::<DeviceSlot>("device table", DEVICE_SLOTS_OFFSET, blob_table.entries)?;
    let entries = bootstrap.array::<BlobEntry>("blob table", blob_table.offset, blob_table.entries)?;
    let mut blobs = Vec::with_capacity(entries.len());
    for (index, (entry, slot)) in (0u32..).zip(entries.iter().zip(slots)) {
        entry.check(index, extended.chunk_size.get())?;
        let at = blob_table.offset + u64::from(index) * size_of::<BlobEntry>() as u64;
        let blocks = entry.uncompressed_size.get() >> superblock.block_bits;
        if u64::from(slot.blocks.get()) != blocks || slot.tag != entry.id {
            return Err(Damaged::new("blob table entry", at, "contradicts its device slot").into());
        }
        blobs.push(facts(entry, at, path)?);
    }
    Ok(Superblock {
        version: Version::V6,
        chunk_size: extended.chunk_size.get(),
        flags,
        inodes: superblock.inodes.get(),
        root: u64::from(superblock.root_nid.get()),
        prefetch_table,
        blob_table,
        format: Format::V6 {
            block_bits: superblock.block_bits,
            meta,
            chunk_table,
        },
        blobs,
    })
}

fn facts(entry: &BlobEntry, at: u64, path: &Path) -> Result<BlobFacts, Damaged> {
    let features = Features(entry.features.get());
    let id = blob_id(trim_zeros(&entry.id), features, path, at)?;
    let encrypted = entry.cipher.get() == CipherNumber::AES_128_XTS;
    let cipher = encrypted.then(|| {
        let mut iv = [0; 16];
        for (to, from) in iv.iter_mut().zip(entry.meta_size.iter().chain(&entry.cipher_iv)) {
            *to = *from;
        }
        Cipher {
            key: entry.meta_digest,
            iv,
        }
    });
    let chunk_info = chunk_info(entry, features, &id, at, path)?;
    let compressed_size = entry.compressed_size.get();
    let data_end = match &chunk_info {
        Some(info) if !features.has(Features::SEPARATE) && features.has(Features::CAP_TAR_TOC) => {
            let header = if features.has(Features::HAS_TAR_HEADER) {
                TAR_HEADER_SIZE
            } else {
                0
            };
            info.offset.saturating_sub(header)
        }
        _ => compressed_size,
    };
    Ok(BlobFacts {
        id,
        features,
        // Checked by `BlobEntry::check`.
        compression: compression_from_number(entry.compression.get()).unwrap_or(Compression::None),
        digester: digester_from_number(entry.digester.get()).unwrap_or(Digester::Blake3),
        chunk_count: entry.chunk_count.get(),
        compressed_size,
        data_end,
        uncompressed_size: entry.uncompressed_size.get(),
        cipher,
        chunk_info,
        prefetch: None,
    })
}

fn chunk_info(
    entry: &BlobEntry,
    features: Features,
    id: &str,
    at: u64,
    path: &Path,
) -> Result<Option<ChunkInfoFacts>, Damaged> {
    let uncompressed_size = entry.ci_uncompressed_size.get();
    if uncompressed_size == 0 {
        return Ok(None);
    }
    // `BlobEntry::check` knows that it is not larger than its chunks can fill.
    if uncompressed_size < features.most_chunk_info(entry.chunk_count.get(), 0) {
        return Err(Damaged::new(
            "blob table entry",
            at,
            "chunk information has no room for its chunks",
        ));
    }
    let offset = entry.ci_offset.get();
    let end = offset
        .checked_add(entry.ci_compressed_size.get())
        .and_then(|end| end.checked_add(size_of::<ChunkInfoHeader>() as u64));
    if end.is_none_or(|end| end > crate::layout::v6::MAX_COMPRESSED_SIZE) {
        return Err(Damaged::new(
            "blob table entry",
            at,
            "chunk information beyond the end of any blob",
        ));
    }
    let blob_id = if !features.has(Features::SEPARATE) {
        id.to_owned()
    } else if entry.meta_digest != [0; 32] {
        hex::encode(entry.meta_digest)
    } else {
        stem(path).ok_or(Damaged::new(
            "blob table entry",
            at,
            "does not name its separate meta blob",
        ))?
    };
    Ok(Some(ChunkInfoFacts {
        blob_id,
        // Checked by `BlobEntry::check`.
        compression: compression_from_number(entry.ci_compression.get()).unwrap_or(Compression::None),
        offset,
        compressed_size: entry.ci_compressed_size.get(),
        uncompressed_size,
    }))
}
