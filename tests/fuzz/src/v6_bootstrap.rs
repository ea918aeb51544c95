//! RAFS v6 bootstraps.

use std::sync::OnceLock;

use backend::chunk::Compression;
use rafs::build::FsVersion;
use rafs::layout::v6;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use crate::bases::{self, Slot};
use crate::explore::explore;
use crate::mutate::Subject;
use crate::script::Script;

struct Setup {
    bases: [Subject; 2],
    slot: Slot,
}

fn setup() -> &'static Setup {
    static SETUP: OnceLock<Setup> = OnceLock::new();
    SETUP.get_or_init(|| {
        let base = |names| {
            let image = bases::image(FsVersion::V6, Compression::Zstd, names);
            bases::v6_subject(image.bootstrap)
        };
        Setup {
            bases: [base(3), base(100)],
            slot: Slot::new(),
        }
    })
}

/// Changes a bootstrap as `input` says, and looks at what became of it.
pub fn run(input: &[u8]) {
    let setup = setup();
    let mut script = Script::new(input);
    let choice = script.u8();
    let bytes = if choice == 0xFF {
        // The input is the image.
        script.rest().to_vec()
    } else {
        let mut subject = setup.bases[usize::from(choice & 1)].clone();
        subject.change(&mut script);
        if choice & 2 != 0 {
            fix_duplicates(&mut subject.bytes);
        }
        subject.bytes
    };
    setup.slot.fill(&bytes);
    explore(&setup.slot.path, bytes.len(), &mut Script::new(input));
}

/// Makes device slots and superblock say what the blob table says.
pub(crate) fn fix_duplicates(bytes: &mut [u8]) {
    let superblock = v6::SUPERBLOCK_OFFSET as usize;
    let Ok((extended, _)) = v6::ExtendedSuperBlock::read_from_prefix(
        bytes
            .get(v6::EXTENDED_SUPERBLOCK_OFFSET as usize..)
            .unwrap_or_default(),
    ) else {
        return;
    };
    let size = extended.blob_table_size.get() as usize;
    let count = size / size_of::<v6::BlobEntry>();
    let offset = extended.blob_table_offset.get();
    for index in 0..count.min(v6::MAX_BLOBS as usize) {
        let at = offset.saturating_add((index * size_of::<v6::BlobEntry>()) as u64);
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        let Some(Ok((mut entry, _))) = bytes.get(at..).map(v6::BlobEntry::read_from_prefix) else {
            return;
        };
        entry.index = U32::new(index as u32);
        entry.chunk_size = extended.chunk_size;
        bytes[at..at + size_of::<v6::BlobEntry>()].copy_from_slice(entry.as_bytes());
        let slot_at = v6::DEVICE_SLOTS_OFFSET as usize + index * size_of::<v6::DeviceSlot>();
        let Some(Ok((mut slot, _))) = bytes.get(slot_at..).map(v6::DeviceSlot::read_from_prefix) else {
            return;
        };
        slot.tag = entry.id;
        slot.blocks = U32::new((entry.uncompressed_size.get() >> v6::BLOCK_BITS) as u32);
        bytes[slot_at..slot_at + size_of::<v6::DeviceSlot>()].copy_from_slice(slot.as_bytes());
    }
    let Ok((mut head, _)) = v6::SuperBlock::read_from_prefix(&bytes[superblock..]) else {
        return;
    };
    head.extra_devices = U16::new(count as u16);
    bytes[superblock..superblock + size_of::<v6::SuperBlock>()].copy_from_slice(head.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_of_a_valid_image_stay_as_they_are() {
        for base in &setup().bases {
            let mut bytes = base.bytes.clone();
            fix_duplicates(&mut bytes);
            assert!(bytes == base.bytes);
        }
    }

    #[test]
    fn unchanged_images_are_explored() {
        for choice in [0, 1, 2, 3] {
            run(&[choice]);
        }
    }
}
