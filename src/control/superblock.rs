//! The superblock of an image, in the words of the incumbent's API.

use rafs::layout::{v5, v6};
use rafs::superblock::{Format, Superblock};
use serde_json::{Value, json};

/// Every member that clients may look for; those that the format does not have are 0. `batch_size` comes
/// from the configuration of the mount.
pub(super) fn dump(superblock: &Superblock, batch_size: u64) -> Value {
    // Guests may keep what they know of an image for ever; this is what stands for it.
    let for_ever = json!({"secs": 1u64 << 32, "nanos": 0});
    let mut dump = json!({
        "sb_size": 0, "root_inode": superblock.root, "chunk_size": superblock.chunk_size, "batch_size": batch_size,
        "inodes_count": superblock.inodes, "flags": {"bits": superblock.flags.0},
        "inode_table_entries": 0, "inode_table_offset": 0,
        "blob_table_size": superblock.blob_table.entries, "blob_table_offset": superblock.blob_table.offset,
        "extended_blob_table_offset": 0, "extended_blob_table_entries": 0,
        "blob_device_table_count": 0, "blob_device_table_offset": 0,
        "prefetch_table_offset": superblock.prefetch_table.offset,
        "prefetch_table_entries": superblock.prefetch_table.entries,
        "attr_timeout": for_ever, "entry_timeout": for_ever,
        "is_chunk_dict": false, "meta_blkaddr": 0, "root_nid": 0,
        "chunk_table_offset": 0, "chunk_table_size": 0,
    });
    let own = match superblock.format {
        Format::V5 {
            inode_table,
            extended_blob_table,
        } => json!({
            "magic": v5::MAGIC, "version": v5::VERSION, "sb_size": v5::SUPERBLOCK_SIZE,
            "inode_table_entries": inode_table.entries, "inode_table_offset": inode_table.offset,
            "extended_blob_table_offset": extended_blob_table.offset,
            "extended_blob_table_entries": extended_blob_table.entries,
        }),
        Format::V6 {
            block_bits,
            meta,
            chunk_table,
        } => json!({
            "magic": v6::MAGIC, "version": v6::VERSION, "sb_size": v6::DEVICE_SLOTS_OFFSET,
            "blob_table_size": table_size::<v6::BlobEntry>(superblock.blob_table.entries),
            "blob_device_table_count": superblock.blob_table.entries,
            "blob_device_table_offset": v6::DEVICE_SLOTS_OFFSET,
            "meta_blkaddr": meta >> block_bits, "root_nid": superblock.root,
            "chunk_table_offset": chunk_table.offset,
            "chunk_table_size": table_size::<v5::ChunkRecord>(chunk_table.entries),
        }),
    };
    if let (Value::Object(dump), Value::Object(own)) = (&mut dump, own) {
        dump.extend(own);
    }
    dump
}

/// Bytes of a table of so many `T`.
fn table_size<T>(entries: u64) -> u64 {
    entries.saturating_mul(size_of::<T>() as u64)
}
