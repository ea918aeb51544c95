//! Blobs with a bootstrap inside: found by a tar header, or by a table of contents.

use std::sync::OnceLock;

use backend::chunk::Compression;
use rafs::build::FsVersion;
use rafs::layout::blob::{Section, TAR_MAGIC, TarHeader, TocEntry};
use sha2::{Digest, Sha256};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::bases::{self, Slot};
use crate::explore::explore;
use crate::mutate::{Region, Subject};
use crate::script::Script;

/// Blobs as their builders make them: data, sections each with a tar header behind it, perhaps a table of contents.
struct Setup {
    bases: Vec<Subject>,
    slot: Slot,
}

fn setup() -> &'static Setup {
    static SETUP: OnceLock<Setup> = OnceLock::new();
    SETUP.get_or_init(|| {
        let bootstrap = |version| bases::image(version, Compression::None, 3).bootstrap;
        let (v5, v6) = (bootstrap(FsVersion::V5), bootstrap(FsVersion::V6));
        Setup {
            bases: vec![
                blob(&v5, None),
                blob(&v6, None),
                blob(&v6, Some(TocEntry::NONE)),
                blob(&v6, Some(TocEntry::ZSTD)),
            ],
            slot: Slot::new(),
        }
    })
}

/// Changes a blob as `input` says, and looks for its bootstrap.
pub fn run(input: &[u8]) {
    let setup = setup();
    let mut script = Script::new(input);
    let choice = script.u8();
    let bytes = if choice == 0xFF {
        // The input is the blob.
        script.rest().to_vec()
    } else {
        let mut subject = setup.bases[usize::from(choice >> 1) % setup.bases.len()].clone();
        subject.change(&mut script);
        if choice & 1 != 0 {
            fix_digest(&mut subject.bytes);
        }
        subject.bytes
    };
    setup.slot.fill(&bytes);
    // A bootstrap that is decompressed may be larger than the blob: as large as the table of contents says.
    let size = unpacked(&bytes).unwrap_or_default().max(bytes.len());
    explore(&setup.slot.path, size, &mut Script::new(input));
}

/// The entry of the bootstrap, where the table of contents is expected.
fn entry(bytes: &[u8]) -> Option<(usize, TocEntry)> {
    let table = bytes
        .len()
        .checked_sub(size_of::<TarHeader>() + 2 * size_of::<TocEntry>())?;
    let at = table + size_of::<TocEntry>();
    Some((at, TocEntry::read_from_prefix(&bytes[at..]).ok()?.0))
}

fn section<'b>(bytes: &'b [u8], entry: &TocEntry) -> Option<&'b [u8]> {
    let start = usize::try_from(entry.compressed_offset.get()).ok()?;
    let size = usize::try_from(entry.compressed_size.get()).ok()?;
    bytes.get(start..start.checked_add(size)?)
}

/// Decompressed size of the bootstrap.
fn unpacked(bytes: &[u8]) -> Option<usize> {
    let (_, entry) = entry(bytes)?;
    zstd::stream::decode_all(section(bytes, &entry)?)
        .ok()
        .map(|bytes| bytes.len())
}

/// Makes the table of contents have the digest of the bootstrap that it names.
fn fix_digest(bytes: &mut [u8]) {
    let Some((at, mut entry)) = entry(bytes) else {
        return;
    };
    let Some(stored) = section(bytes, &entry) else {
        return;
    };
    let digest = match entry.flags.get() & TocEntry::COMPRESSION_MASK {
        TocEntry::ZSTD => match zstd::stream::decode_all(stored) {
            Ok(bootstrap) => {
                entry.uncompressed_size = U64::new(bootstrap.len() as u64);
                Sha256::digest(bootstrap)
            }
            Err(_) => return,
        },
        _ => Sha256::digest(stored),
    };
    entry.digest = digest.into();
    bytes[at..at + size_of::<TocEntry>()].copy_from_slice(entry.as_bytes());
}

fn tar_header(name: &[u8], size: usize) -> TarHeader {
    let mut header = TarHeader::new_zeroed();
    header.name[..name.len()].copy_from_slice(name);
    header.size[..11].copy_from_slice(format!("{size:011o}").as_bytes());
    header.magic = TAR_MAGIC;
    header
}

fn blob(bootstrap: &[u8], contents: Option<u32>) -> Subject {
    let mut bytes = vec![0x5A; 1000];
    bytes.extend(tar_header(Section::BLOB, 1000).as_bytes());
    let packed = match contents {
        Some(TocEntry::ZSTD) => zstd::bulk::compress(bootstrap, 3).unwrap(),
        _ => bootstrap.to_vec(),
    };
    let start = bytes.len();
    bytes.extend(&packed);
    let header_at = bytes.len();
    bytes.extend(tar_header(Section::BOOTSTRAP, packed.len()).as_bytes());
    let region = |offset, size| Region { offset, size };
    let mut heads = vec![
        region(header_at, 160),
        region(header_at + 257, 8),
        region(start, 1600),
    ];
    if let Some(flags) = contents {
        let table = bytes.len();
        for (name, offset, size) in [
            (Section::BLOB, 0, 1000),
            (Section::BOOTSTRAP, start, packed.len()),
        ] {
            let mut entry = TocEntry::new_zeroed();
            entry.flags = U32::new(flags);
            entry.name[..name.len()].copy_from_slice(name);
            entry.compressed_offset = U64::new(offset as u64);
            entry.compressed_size = U64::new(size as u64);
            entry.uncompressed_size = U64::new(bootstrap.len() as u64);
            entry.digest = Sha256::digest(bootstrap).into();
            bytes.extend(entry.as_bytes());
        }
        bytes.extend(tar_header(Section::TOC, 2 * size_of::<TocEntry>()).as_bytes());
        heads.extend([0, 1].map(|entry| region(table + entry * 128, 80)));
        heads.push(region(table + 256, 160));
        heads.push(region(table + 256 + 257, 8));
    }
    Subject {
        bodies: vec![region(start, packed.len())],
        heads,
        bytes,
    }
}

#[cfg(test)]
mod tests {
    use rafs::reader::Reader;

    use super::*;

    #[test]
    fn the_bootstraps_of_unchanged_blobs_are_found() {
        let setup = setup();
        for base in &setup.bases {
            setup.slot.fill(&base.bytes);
            assert!(Reader::open(&setup.slot.path).unwrap().bootstrap().inlined());
            let mut fixed = base.bytes.clone();
            fix_digest(&mut fixed);
            if base.heads.len() > 3 {
                assert!(fixed == base.bytes);
            }
        }
        for choice in 0..8 {
            run(&[choice]);
        }
    }
}
