//! Images of our own writer, read back: needs nothing from outside of the repository.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::mem::offset_of;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use backend::store::PrefetchOptions;
use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use proptest::prelude::*;
use rafsd_rafs::build::{FsVersion, Options, build_directory};
use rafsd_rafs::layout::v5::ChunkRecord;
use rafsd_rafs::layout::v6::{BlobEntry, DEVICE_SLOTS_OFFSET, DeviceSlot};
use rafsd_rafs::reader::Reader;
use rafsd_rafs::superblock::Format;
use rafsd_rafs::trace::Trace;
use support::{Mount, Place};

/// A tree with every case that a reader treats differently, as far as any user can make it.
fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("many")).unwrap();
    fs::create_dir_all(root.join("deep/er/and/deeper")).unwrap();
    for number in 0..300 {
        fs::write(
            root.join(format!("many/entry-{number:04}-with-a-rather-long-name")),
            [number as u8; 10],
        )
        .unwrap();
    }
    let large: Vec<u8> = (0..50_000u32)
        .flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(root.join("large"), &large).unwrap();
    fs::write(root.join("zeros"), vec![0; 30_000]).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join("deep/er/and/deeper/file"), b"at the bottom").unwrap();
    fs::hard_link(root.join("large"), root.join("deep/link")).unwrap();
    symlink("deep/er", root.join("short-symlink")).unwrap();
    symlink("x".repeat(4090), root.join("long-symlink")).unwrap();
}

struct OwnImage {
    dir: tempfile::TempDir,
}

impl OwnImage {
    fn build(version: FsVersion) -> Self {
        Self::build_of(version, make_tree)
    }

    fn build_of(version: FsVersion, make: fn(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        make(&dir.path().join("tree"));
        let options = Options {
            version,
            chunk_size: 0x1000,
            threads: 1,
            ..Options::default()
        };
        build_directory(&dir.path().join("tree"), &dir.path().join("image"), &options, &()).unwrap();
        Self { dir }
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    fn bootstrap(&self) -> PathBuf {
        self.dir.path().join("image/bootstrap")
    }

    fn place(&self) -> Arc<Place> {
        Place::new(&self.dir.path().join("image/blobs"))
    }
}

/// Paths of a directory of the host.
fn host_paths(root: &Path, below: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(root.join(below)).unwrap() {
        let path = below.join(entry.unwrap().file_name());
        found.push(path.clone());
        if fs::symlink_metadata(root.join(&path)).unwrap().is_dir() {
            host_paths(root, &path, found);
        }
    }
}

fn check_against_source(version: FsVersion) {
    let image = OwnImage::build(version);
    let mount = image.place().mount(&image.bootstrap()).unwrap();
    let tree = mount.walk().unwrap();
    let mut paths = Vec::new();
    host_paths(&image.tree(), Path::new(""), &mut paths);
    assert_eq!(tree.len(), paths.len() + 1);
    let mut links: BTreeMap<u64, u64> = BTreeMap::new();
    for path in paths {
        let host = fs::symlink_metadata(image.tree().join(&path)).unwrap();
        let shown = &tree[format!("/{}", path.display()).as_bytes()];
        assert_eq!(
            (shown.attr.st_mode, shown.attr.st_uid),
            (host.mode(), host.uid()),
            "{path:?}"
        );
        assert_eq!(
            (shown.attr.st_mtime, shown.attr.st_mtime_nsec),
            (host.mtime(), host.mtime_nsec())
        );
        if host.is_file() {
            let expected = fs::read(image.tree().join(&path)).unwrap();
            // In pieces that end within chunks, and at once.
            let pieces: Vec<u8> = (0..expected.len() as u64 + 1)
                .step_by(3_333)
                .flat_map(|offset| mount.read(shown.inode, offset, 3_333).unwrap())
                .collect();
            assert!(pieces == expected, "{path:?}");
            assert!(
                mount.read(shown.inode, 0, 1 << 20).unwrap() == expected,
                "{path:?}"
            );
            assert_eq!(
                *links.entry(host.ino()).or_insert(shown.inode),
                shown.inode,
                "{path:?}"
            );
        } else if host.is_symlink() {
            let target = mount.fs.readlink(&Context::default(), shown.inode).unwrap();
            assert_eq!(
                target,
                fs::read_link(image.tree().join(&path))
                    .unwrap()
                    .into_os_string()
                    .into_encoded_bytes()
            );
        }
    }
    let mut faults = Vec::new();
    mount
        .fs
        .reader()
        .check(&mut |path, damaged| faults.push(format!("{path:?}: {damaged}")));
    assert_eq!(faults, [""; 0]);
}

#[test]
fn a_v6_image_reads_like_the_tree_that_it_was_built_from() {
    check_against_source(FsVersion::V6);
}

#[test]
fn a_v5_image_reads_like_the_tree_that_it_was_built_from() {
    check_against_source(FsVersion::V5);
}

#[test]
fn a_recorded_trace_brings_what_was_read_and_no_more() {
    for version in [FsVersion::V5, FsVersion::V6] {
        let image = OwnImage::build(version);
        let mount = image.place().mount(&image.bootstrap()).unwrap();
        let find =
            |mount: &Mount, path: &str| mount.fs.reader().at_path(path.as_bytes()).unwrap().unwrap().id;
        let wanted = [
            ("/large", 40_000, 9000),
            ("/deep/er/and/deeper/file", 0, 100),
            ("/large", 0, 5000),
        ];
        mount
            .read(find(&mount, "/many/entry-0007-with-a-rather-long-name"), 0, 10)
            .unwrap();
        assert_eq!(mount.fs.trace(), Trace::default(), "not asked to record");
        mount.fs.start_trace();
        let contents =
            wanted.map(|(path, offset, size)| mount.read(find(&mount, path), offset, size).unwrap());
        mount.fs.stop_trace();
        mount.read(find(&mount, "/large"), 100_000, 5000).unwrap();
        let text = mount.fs.trace().to_string();
        let trace: Trace = text.parse().unwrap();
        assert_eq!(trace.chunks(), 3 + 1 + 2, "{text}");

        // The next mount: another cache.
        let place = image.place();
        let mount = place.mount(&image.bootstrap()).unwrap();
        let prefetch = place
            .store
            .prefetch(trace.wishes(&mount.fs), PrefetchOptions::default());
        let begin = std::time::Instant::now();
        while prefetch.progress().ended.is_none() {
            assert!(begin.elapsed().as_secs() < 60);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(prefetch.progress().chunks, 6);
        fs::remove_dir_all(image.dir.path().join("image/blobs")).unwrap();
        for ((path, offset, size), content) in wanted.into_iter().zip(contents) {
            assert!(mount.read(find(&mount, path), offset, size).unwrap() == content);
        }
    }
}

#[test]
fn nothing_of_an_image_can_be_changed() {
    let image = OwnImage::build(FsVersion::V6);
    let mount = image.place().mount(&image.bootstrap()).unwrap();
    let context = Context::default();
    let file = mount.lookup(mount.fs.root(), b"large").unwrap().inode;
    let name = c"new";
    let refused = [
        mount.fs.open(&context, file, libc::O_WRONLY as u32, 0).err(),
        mount.fs.open(&context, file, libc::O_RDWR as u32, 0).err(),
        mount.fs.open(&context, file, libc::O_TRUNC as u32, 0).err(),
        mount.fs.mkdir(&context, mount.fs.root(), name, 0o755, 0).err(),
        mount.fs.unlink(&context, mount.fs.root(), c"large").err(),
        mount.fs.setxattr(&context, file, c"user.x", b"y", 0).err(),
        mount.fs.removexattr(&context, file, c"user.x").err(),
        mount
            .fs
            .rename(&context, mount.fs.root(), c"large", mount.fs.root(), name, 0)
            .err(),
        mount.fs.access(&context, file, libc::W_OK as u32).err(),
    ];
    for error in refused {
        assert_eq!(error.and_then(|error| error.raw_os_error()), Some(libc::EROFS));
    }
    let errno = |result: std::io::Result<u64>| result.map_err(|error| error.raw_os_error().unwrap());
    let seek = |offset, whence: i32| errno(mount.fs.lseek(&context, file, 0, offset, whence as u32));
    assert_eq!(seek(5, libc::SEEK_DATA), Ok(5));
    assert_eq!(seek(5, libc::SEEK_HOLE), Ok(200_000));
    assert_eq!(seek(200_000, libc::SEEK_DATA), Err(libc::ENXIO));
    let stat = mount.fs.statfs(&context, mount.fs.root()).unwrap();
    assert!(stat.f_blocks * stat.f_bsize > 200_000 && stat.f_bfree == 0 && stat.f_namemax == 255);
    assert!(stat.f_files > 300);
}

#[test]
fn a_directory_cannot_be_entered_from_below() {
    // One name per directory: no neighbours tell that an entry is wrong.
    let image = OwnImage::build_of(FsVersion::V6, |root| {
        fs::create_dir_all(root.join("deep/er/and")).unwrap()
    });
    let reader = Reader::open(&image.bootstrap()).unwrap();
    let id = |path: &[u8]| reader.at_path(path).unwrap().unwrap().id;
    let bytes = fs::read(image.bootstrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join("bootstrap");
    // Entries: node id, offset of the name, type 2 for directories.
    let entries = |nid: u64| -> Vec<usize> {
        let is_entry = |at: &usize| bytes[*at..].starts_with(&nid.to_le_bytes()) && bytes[at + 10] == 2;
        (0..bytes.len() - 12).filter(is_entry).collect()
    };
    let root = reader.root();
    for (child, ancestor) in [
        (id(b"/deep"), root),
        (id(b"/deep/er"), root),
        (id(b"/deep/er/and"), id(b"/deep")),
    ] {
        let mut refused = 0;
        for at in entries(child) {
            let mut copy = fs::read(image.bootstrap()).unwrap();
            copy[at..at + 8].copy_from_slice(&ancestor.to_le_bytes());
            fs::write(&damaged, &copy).unwrap();
            let reader = Reader::open(&damaged).unwrap();
            refused += reader.check(&mut |_, _| {}).faults;
            let mount = image.place().mount(&damaged).unwrap();
            assert!(mount.walk().unwrap().len() < 10, "a loop");
        }
        assert!(refused > 0, "no entry was changed");
    }
}

#[test]
fn a_blob_that_says_no_size_is_no_larger_than_any_blob() {
    let image = OwnImage::build(FsVersion::V6);
    let superblock = Reader::open(&image.bootstrap()).unwrap().superblock().clone();
    let Format::V6 { chunk_table, .. } = superblock.format else {
        panic!("not v6");
    };
    let mut bytes = fs::read(image.bootstrap()).unwrap();
    let mut set = |at: u64, value: &[u8]| bytes[at as usize..][..value.len()].copy_from_slice(value);
    // No size in the blob table nor in the device slot, and the first chunk very far out.
    set(
        superblock.blob_table.offset + offset_of!(BlobEntry, uncompressed_size) as u64,
        &[0; 8],
    );
    set(
        DEVICE_SLOTS_OFFSET + offset_of!(DeviceSlot, blocks) as u64,
        &[0; 4],
    );
    set(
        chunk_table.offset + offset_of!(ChunkRecord, uncompressed_offset) as u64,
        &(1u64 << 60).to_le_bytes(),
    );
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join("bootstrap");
    fs::write(&damaged, &bytes).unwrap();
    let blob = Reader::open(&damaged).unwrap().blob(0).unwrap();
    assert!(blob.uncompressed_size < 1 << 40, "{:#x}", blob.uncompressed_size);
}

#[test]
fn blobs_with_more_chunks_than_memory_is_given_to_are_refused() {
    // Two layers, so that there are two blobs.
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["lower", "upper", "third"] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join(name), name).unwrap();
    }
    let mut parent = None;
    for name in ["lower", "upper", "third"] {
        let options = Options {
            parent: parent.clone(),
            threads: 1,
            ..Options::default()
        };
        let image = path(&format!("image-{name}"));
        build_directory(&path(name), &image, &options, &()).unwrap();
        parent = Some(image.join("bootstrap"));
    }
    let image = parent.unwrap();
    let table = Reader::open(&image).unwrap().superblock().blob_table;
    assert_eq!(table.entries, 3);
    let mut bytes = fs::read(&image).unwrap();
    let mut set = |blob: usize, chunks: u32| {
        let at = table.offset as usize + blob * size_of::<BlobEntry>();
        let size = 16 * u64::from(chunks);
        for (field, value) in [
            (offset_of!(BlobEntry, chunk_count), &chunks.to_le_bytes()[..]),
            (offset_of!(BlobEntry, ci_uncompressed_size), &size.to_le_bytes()),
        ] {
            bytes[at + field..][..value.len()].copy_from_slice(value);
        }
        fs::write(path("changed"), &bytes).unwrap();
        Reader::open(&path("changed"))
    };
    set(0, 1 << 24).unwrap();
    set(1, (1 << 24) - 1).unwrap();
    let Err(refused) = set(2, 2) else {
        panic!("more than 2^25 chunks");
    };
    assert!(support::chain(&refused).contains("2^25"), "{refused}");
}

/// Looks at everything that a damaged image still gives. Must end, and must not panic.
fn explore(reader: &Reader) {
    reader.check(&mut |_, _| {});
    let _ = reader.prefetch_table();
    for file in reader.files_below(reader.root()) {
        let _ = reader.inode(file).and_then(|inode| reader.chunks(&inode));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_damage_makes_a_reader_panic_or_go_on_for_ever(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        length in any::<prop::sample::Index>(),
        truncate in proptest::bool::weighted(0.2),
    ) {
        static IMAGE: std::sync::OnceLock<OwnImage> = std::sync::OnceLock::new();
        let image = IMAGE.get_or_init(|| OwnImage::build(FsVersion::V6));
        let mut bytes = fs::read(image.bootstrap()).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if truncate {
            bytes.truncate(length.index(bytes.len()));
        }
        let dir = tempfile::tempdir().unwrap();
        let damaged = dir.path().join("bootstrap");
        fs::write(&damaged, &bytes).unwrap();
        if let Ok(reader) = Reader::open(&damaged) {
            explore(&reader);
        }
    }
}

#[test]
fn every_byte_of_superblocks_and_tables_can_be_damaged() {
    let image = OwnImage::build(FsVersion::V6);
    let bytes = fs::read(image.bootstrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join("bootstrap");
    let (mut refused, mut opened) = (0, 0);
    for at in (1024..1600).chain(4096..4352) {
        let mut copy = bytes.clone();
        copy[at] ^= 0xFF;
        fs::write(&damaged, &copy).unwrap();
        match Reader::open(&damaged) {
            Ok(_) => opened += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(
        refused > 100 && opened > 100,
        "{refused} refused, {opened} opened"
    );
    assert!(Mount::open(&dir.path().join("nothing"), dir.path()).is_err());
}
