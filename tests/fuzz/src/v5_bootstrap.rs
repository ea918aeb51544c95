//! RAFS v5 bootstraps.

use std::sync::OnceLock;

use backend::chunk::Compression;
use rafs::build::FsVersion;
use rafs::layout::v5;
use sha2::Digest;
use zerocopy::little_endian::U32;
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
            let image = bases::image(FsVersion::V5, Compression::Zstd, names);
            bases::v5_subject(image.bootstrap)
        };
        Setup {
            bases: [base(3), base(60)],
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
            fix_digests(&mut subject.bytes);
        }
        subject.bytes
    };
    setup.slot.fill(&bytes);
    explore(&setup.slot.path, bytes.len(), &mut Script::new(input));
}

/// Gives every inode the digest of what it has now, as far as that can be found.
fn fix_digests(bytes: &mut [u8]) {
    let Ok((superblock, _)) = v5::SuperBlock::read_from_prefix(bytes) else {
        return;
    };
    let sha256 = superblock.flags.get() & rafs::layout::Flags::HASH_SHA256 != 0;
    let table = superblock.inode_table_offset.get();
    let count = u64::from(superblock.inode_table_entries.get()).min(bytes.len() as u64 / 4);
    let record = |bytes: &[u8], index: u64| -> Option<usize> {
        let at = usize::try_from(table.checked_add(index.checked_mul(4)?)?).ok()?;
        let (offset, _) = U32::read_from_prefix(bytes.get(at..)?).ok()?;
        usize::try_from(u64::from(offset.get()) * v5::UNIT).ok()
    };
    // Children come after their directory.
    for index in (0..count).rev() {
        let Some(at) = record(bytes, index) else { continue };
        let Some(content) = content(bytes, at, &record) else {
            continue;
        };
        let digest: [u8; 32] = if sha256 {
            sha2::Sha256::digest(&content).into()
        } else {
            *blake3::hash(&content).as_bytes()
        };
        bytes[at..at + 32].copy_from_slice(digest.as_bytes());
    }
}

/// What the digest of the inode at `at` covers.
fn content(bytes: &[u8], at: usize, record: &dyn Fn(&[u8], u64) -> Option<usize>) -> Option<Vec<u8>> {
    let padded = |size: usize| size.next_multiple_of(v5::UNIT as usize);
    let (inode, _) = v5::Inode::read_from_prefix(bytes.get(at..)?).ok()?;
    let mut next = at + size_of::<v5::Inode>() + padded(inode.name_size.get().into());
    let count = u64::from(inode.child_count.get());
    let mut content = Vec::new();
    match inode.mode.get() & 0o170_000 {
        0o120_000 => content.extend(bytes.get(next..next + usize::from(inode.symlink_size.get()))?),
        0o040_000 => {
            let first = u64::from(inode.child_index.get()).checked_sub(1)?;
            for index in first..first + count.min(1000) {
                let child = record(bytes, index)?;
                content.extend(bytes.get(child..child + 32)?);
            }
        }
        0o100_000 => {
            if inode.flags.get() & v5::InodeFlags::XATTR != 0 {
                let (size, _) = U32::read_from_prefix(bytes.get(next..)?).ok()?;
                next += 8 + padded(size.get() as usize);
            }
            for chunk in 0..count.min(1000) as usize {
                let chunk = next + chunk * size_of::<v5::ChunkRecord>();
                content.extend(bytes.get(chunk..chunk + 32)?);
            }
        }
        _ => {}
    }
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_of_a_valid_image_stay_as_they_are() {
        for base in &setup().bases {
            let mut bytes = base.bytes.clone();
            fix_digests(&mut bytes);
            assert!(bytes == base.bytes);
            // And damaged ones become right again.
            for region in &base.bodies {
                bytes[region.offset..region.offset + 32].fill(7);
            }
            fix_digests(&mut bytes);
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
