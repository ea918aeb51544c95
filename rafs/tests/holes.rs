//! v5 files whose chunks do not cover them: what is left out is zeros. No builder of today makes such images, so one is made
//! of an ordinary image by taking chunk records away.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use rafsd_rafs::build::{FsVersion, Options, build_directory};
use rafsd_rafs::layout::v5;
use rafsd_rafs::reader::Reader;
use rafsd_rafs::superblock::Format;
use support::Place;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

const CHUNK: usize = 0x1000;

fn content() -> Vec<u8> {
    (0..5 * CHUNK as u32 + 100)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8 | 1)
        .collect()
}

/// Makes an image of one file, takes chunk records out of it, and says that the file has `size` bytes.
fn image(dir: &Path, keep: &[usize], size: u64) -> PathBuf {
    fs::create_dir(dir.join("tree")).unwrap();
    fs::write(dir.join("tree/file"), content()).unwrap();
    let options = Options {
        version: FsVersion::V5,
        chunk_size: CHUNK as u32,
        threads: 1,
        ..Options::default()
    };
    build_directory(&dir.join("tree"), &dir.join("image"), &options, &()).unwrap();
    let path = dir.join("image/bootstrap");
    let reader = Reader::open(&path).unwrap();
    let id = reader.at_path(b"/file").unwrap().unwrap().id;
    let Format::V5 { inode_table, .. } = reader.superblock().format else {
        panic!("not v5");
    };
    let mut bytes = fs::read(&path).unwrap();
    let entry = inode_table.offset as usize + (id as usize - 1) * 4;
    let at = U32::read_from_prefix(&bytes[entry..]).unwrap().0.get() as usize * 8;
    let (mut inode, _) = v5::Inode::read_from_prefix(&bytes[at..]).unwrap();
    let records = at + size_of::<v5::Inode>() + usize::from(inode.name_size.get()).next_multiple_of(8);
    let size_of_record = size_of::<v5::ChunkRecord>();
    let old = bytes[records..records + inode.child_count.get() as usize * size_of_record].to_vec();
    let mut digests = Vec::new();
    for (to, from) in keep.iter().enumerate() {
        let record = &old[from * size_of_record..][..size_of_record];
        bytes[records + to * size_of_record..][..size_of_record].copy_from_slice(record);
        digests.extend(&record[..32]);
    }
    inode.child_count = U32::new(keep.len() as u32);
    inode.flags = U64::new(inode.flags.get() | v5::InodeFlags::HAS_HOLE);
    inode.size = U64::new(size);
    inode.digest = *blake3::hash(&digests).as_bytes();
    bytes[at..at + size_of::<v5::Inode>()].copy_from_slice(inode.as_bytes());
    fs::write(&path, bytes).unwrap();
    path
}

fn check(keep: &[usize], size: usize) {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), keep, size as u64);
    let content = content();
    let mut expected = vec![0; size];
    for chunk in keep {
        let range = chunk * CHUNK..((chunk + 1) * CHUNK).min(content.len());
        expected[range.clone()].copy_from_slice(&content[range]);
    }
    let mount = Place::new(&dir.path().join("image/blobs")).mount(&path).unwrap();
    let file = mount.lookup(mount.fs.root(), b"file").unwrap().inode;
    assert!(mount.read(file, 0, size + 10).unwrap() == expected, "{keep:?}");
    for offset in (0..size).step_by(1777) {
        let read = mount.read(file, offset as u64, 5000).unwrap();
        assert!(
            read == expected[offset..(offset + 5000).min(size)],
            "{keep:?} at {offset}"
        );
    }
    let reader = mount.fs.reader();
    let inode = reader.at_path(b"/file").unwrap().unwrap();
    let chunks: Vec<u64> = reader
        .chunks(&inode)
        .unwrap()
        .iter()
        .map(|chunk| chunk.file_offset)
        .collect();
    let offsets: Vec<u64> = keep.iter().map(|chunk| (chunk * CHUNK) as u64).collect();
    assert_eq!(chunks, offsets);
}

#[test]
fn what_no_chunk_covers_is_zeros() {
    let whole = content().len();
    check(&[0, 1, 3, 5], whole);
    check(&[2], whole);
    check(&[1, 2], 40 * CHUNK + 1);
    check(&[0, 1, 2, 3, 4, 5], whole);
    check(&[], 70_000);
}

#[test]
fn chunks_out_of_order_are_an_error_and_no_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &[3, 1, 2], content().len() as u64);
    let mount = Place::new(&dir.path().join("image/blobs")).mount(&path).unwrap();
    let file = mount.lookup(mount.fs.root(), b"file").unwrap().inode;
    assert!(mount.read(file, 0, content().len()).is_err());
    // A chunk that ends behind the end of the file.
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &[0, 1], CHUNK as u64 + 5);
    let mount = Place::new(&dir.path().join("image/blobs")).mount(&path).unwrap();
    let file = mount.lookup(mount.fs.root(), b"file").unwrap().inode;
    assert!(mount.read(file, 0, 3 * CHUNK).is_err());
}
