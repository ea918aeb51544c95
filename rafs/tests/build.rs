//! Images made of directories: reproducible, complete, and as upstream makes them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use backend::chunk::{Compression, Digester};
use rafsd_rafs::build::{
    BuildError, FsVersion, Input, Options, Progress, Report, Whiteouts, build_directory,
};
use tempfile::TempDir;

fn build(source: &Path, output: &Path, options: &Options) -> Report {
    build_directory(source, output, options, &()).unwrap()
}

/// Every file below `directory` with its bytes.
fn contents(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_path_buf()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if kind.is_dir() {
                pending.push(path);
            } else if kind.is_symlink() {
                found.push((
                    path.clone(),
                    fs::read_link(&path)
                        .unwrap()
                        .into_os_string()
                        .into_encoded_bytes(),
                ));
            } else {
                found.push((path.clone(), fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// The same below `a` and `b`, names relative.
fn assert_same_output(a: &Path, b: &Path) {
    let relative = |root: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        contents(root)
            .into_iter()
            .map(|(p, c)| (p.strip_prefix(root).unwrap().to_path_buf(), c))
            .collect()
    };
    let (a, b) = (relative(a), relative(b));
    let names = |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|(p, _)| p.clone()).collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b));
    assert!(a == b, "same files, other bytes");
}

/// A tree without anything that needs privileges: odd names, links, repeated and sparse data, empty things.
fn make_tree(root: &Path) {
    let file = |name: &[u8], data: &[u8]| {
        let path = root.join(std::ffi::OsStr::from_bytes(name));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    };
    for name in [
        b"!before-dot".as_slice(),
        b" space",
        b"new\nline",
        b"not-utf8-\xff\xfe",
        &[b'n'; 255],
    ] {
        file(&[b"names/", name].concat(), name);
    }
    file(b"empty", b"");
    file(
        b"text",
        &b"all work and no play makes chunks compress well\n".repeat(5000),
    );
    file(
        b"copy/of/text",
        &b"all work and no play makes chunks compress well\n".repeat(5000),
    );
    let noise: Vec<u8> = (0..300_000_u64)
        .map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
        .collect();
    file(b"noise", &noise);
    fs::create_dir(root.join("empty-directory")).unwrap();
    fs::hard_link(root.join("noise"), root.join("copy/hardlink")).unwrap();
    symlink("../text", root.join("copy/symlink")).unwrap();
    symlink("x".repeat(4095), root.join("long-symlink")).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(1 << 26).unwrap();
    sparse.write_all_at(b"island", 0x180_0123).unwrap();
    fs::set_permissions(root.join("text"), fs::Permissions::from_mode(0o4751)).unwrap();
    for i in 0..400 {
        file(format!("many/{i:040}").as_bytes(), b"the same");
    }
}

#[test]
fn the_same_tree_gives_the_same_bytes_with_any_number_of_threads() {
    let directory = TempDir::new().unwrap();
    let source = directory.path().join("source");
    make_tree(&source);
    for (name, chunk_size) in [("small", 0x1000), ("large", 0x10_0000)] {
        let options = Options {
            chunk_size,
            ..Options::default()
        };
        let one = directory.path().join(name);
        build(
            &source,
            &one,
            &Options {
                threads: 1,
                ..options.clone()
            },
        );
        for threads in [0, 2, 7] {
            let other = directory.path().join(format!("{name}-{threads}"));
            build(
                &source,
                &other,
                &Options {
                    threads,
                    ..options.clone()
                },
            );
            assert_same_output(&one, &other);
        }
    }
}

#[test]
fn when_and_where_a_tree_was_unpacked_does_not_show() {
    let directory = TempDir::new().unwrap();
    let (a, b) = (directory.path().join("a"), directory.path().join("elsewhere/b"));
    for root in [&a, &b] {
        make_tree(root);
        // Times below the root are the tree's own; only the root's is dropped.
        for (path, _) in contents(root) {
            set_mtime(&path);
        }
        let mut directories = vec![root.clone()];
        while let Some(path) = directories.pop() {
            let below = fs::read_dir(&path)
                .unwrap()
                .map(|e| e.unwrap())
                .filter(|e| e.file_type().unwrap().is_dir());
            directories.extend(below.map(|e| e.path()));
            if path != *root {
                set_mtime(&path);
            }
        }
    }
    build(&a, &directory.path().join("image-a"), &Options::default());
    build(&b, &directory.path().join("image-b"), &Options::default());
    assert_same_output(
        &directory.path().join("image-a"),
        &directory.path().join("image-b"),
    );
}

fn set_mtime(path: &Path) {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    let time = Timespec {
        tv_sec: 1_600_000_000,
        tv_nsec: 123,
    };
    utimensat(
        CWD,
        path,
        &Timestamps {
            last_access: time,
            last_modification: time,
        },
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .unwrap();
}

#[test]
fn equal_chunks_are_stored_once_and_holes_cost_one_chunk() {
    let directory = TempDir::new().unwrap();
    let source = directory.path().join("source");
    make_tree(&source);
    let options = Options {
        chunk_size: 0x1000,
        compression: Compression::None,
        ..Options::default()
    };
    let report = build(&source, &directory.path().join("image"), &options);
    let blob = report.blob.unwrap();
    assert!(report.chunk_references > u64::from(blob.chunk_count) + (1 << 26) / 0x1000);
    assert!(
        blob.size < 700_000,
        "64 MiB of holes and a copied text take no room: {blob:?}"
    );
    let stored = fs::read(directory.path().join("image/blobs").join(&blob.id)).unwrap();
    assert_eq!(stored.len() as u64, blob.size);
    assert_eq!(
        hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&stored)),
        blob.id
    );
}

#[test]
fn a_tree_without_data_has_no_blob() {
    let directory = TempDir::new().unwrap();
    let source = directory.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("empty"), "").unwrap();
    let report = build(&source, &directory.path().join("image"), &Options::default());
    assert_eq!(report.blob, None);
    assert_eq!(report.bootstrap_size, 8192);
    assert_eq!(
        fs::read_dir(directory.path().join("image/blobs"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn an_output_inside_the_source_is_refused() {
    let directory = TempDir::new().unwrap();
    let error = build_directory(
        directory.path(),
        &directory.path().join("new/image"),
        &Options::default(),
        &(),
    )
    .unwrap_err();
    assert!(matches!(error, BuildError::Options(_)), "{error}");
    assert_eq!(
        fs::read_dir(directory.path()).unwrap().count(),
        0,
        "nothing was created"
    );
}

#[test]
fn a_failed_build_names_the_path_and_leaves_no_file() {
    let directory = TempDir::new().unwrap();
    let source = directory.path().join("source");
    fs::create_dir_all(source.join("deep")).unwrap();
    fs::write(source.join("deep/file"), vec![1; 100_000]).unwrap();
    struct Truncate(PathBuf);
    impl Progress for Truncate {
        fn scan_done(&self) {
            fs::write(&self.0, b"shorter").unwrap();
        }
    }
    let output = directory.path().join("image");
    let error = build_directory(
        &source,
        &output,
        &Options::default(),
        &Truncate(source.join("deep/file")),
    )
    .unwrap_err();
    assert!(matches!(error, BuildError::Changed { .. }), "{error}");
    assert!(error.to_string().contains("deep/file"), "{error}");
    assert_eq!(
        contents(&output),
        [],
        "neither bootstrap nor blob nor temporary file"
    );
}

#[test]
fn paths_longer_than_path_max_are_built() {
    let directory = TempDir::new().unwrap();
    let source = directory.path().join("source");
    fs::create_dir(&source).unwrap();
    let name = "d".repeat(250);
    let mut at = rustix::fs::open(&source, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap();
    for _ in 0..40 {
        rustix::fs::mkdirat(&at, &name, 0o755.into()).unwrap();
        at = rustix::fs::openat(
            &at,
            &name,
            rustix::fs::OFlags::DIRECTORY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    rustix::io::write(
        rustix::fs::openat(&at, "bottom", flags, 0o644.into()).unwrap(),
        b"deep down",
    )
    .unwrap();
    let report = build(&source, &directory.path().join("image"), &Options::default());
    assert_eq!(report.names, 42);
    assert_eq!(report.data_size, 9);
    // `remove_dir_all` of the test's directory walks by descriptors as well.
}

fn shared() -> Option<PathBuf> {
    let shared = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared"));
    shared
        .join("fixtures/make_tree.py")
        .exists()
        .then(|| shared.to_path_buf())
}

/// The tree that fixtures were made of; `None`, with a reason printed, where that is not possible.
fn fixture_tree(name: &str, directory: &Path) -> Option<(PathBuf, PathBuf)> {
    let Some(shared) = shared() else {
        println!("skipped: ../shared is not there");
        return None;
    };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: device nodes and owners need root");
        return None;
    }
    let tree = directory.join("tree");
    let made = Command::new("python3")
        .arg(shared.join("fixtures/make_tree.py"))
        .args(["build", name])
        .arg(&tree)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Some((shared, tree))
}

/// Where nothing is left to taste (no compression or the same library; no attribute pairs, which upstream writes in
/// random order) the bytes are upstream's.
#[test]
fn blob_and_bootstrap_are_those_of_upstream() {
    use Compression::{None as Plain, Zstd};
    for (fixture, tree, chunk_size, compression, compare_bootstrap) in [
        ("v6-none-sha256", "main", 0x1000, Plain, false),
        ("v6-many", "many", 0x10_0000, Zstd, true),
        ("v6-nodata", "nodata", 0x10_0000, Zstd, false),
        ("v5-none-sha256", "main", 0x1000, Plain, false),
        ("v5-many", "many", 0x10_0000, Zstd, true),
        ("v5-nodata", "nodata", 0x10_0000, Zstd, false),
    ] {
        let directory = TempDir::new().unwrap();
        let Some((shared, source)) = fixture_tree(tree, directory.path()) else {
            return;
        };
        let version = if fixture.starts_with("v5") {
            FsVersion::V5
        } else {
            FsVersion::V6
        };
        let options = Options {
            version,
            chunk_size,
            compression,
            digester: Digester::Sha256,
            ..Options::default()
        };
        let image = directory.path().join("image");
        build(&source, &image, &options);
        let fixture = shared.join("fixtures/rafs").join(fixture);
        let names = |path: &Path| -> BTreeSet<_> {
            fs::read_dir(path)
                .map(|d| d.map(|e| e.unwrap().file_name()).collect())
                .unwrap_or_default()
        };
        assert_eq!(
            names(&image.join("blobs")),
            names(&fixture.join("blobs")),
            "{}",
            fixture.display()
        );
        let (ours, theirs) = (
            fs::read(image.join("bootstrap")).unwrap(),
            fs::read(fixture.join("bootstrap")).unwrap(),
        );
        assert_eq!(ours.len(), theirs.len());
        assert!(!compare_bootstrap || ours == theirs, "{}", fixture.display());
    }
}

/// Upstream's own checker, where there is one: `NYDUS_IMAGE` names it, or it is in the search path. It takes no
/// names that are not UTF-8.
#[test]
fn upstream_accepts_the_images() {
    let program = std::env::var_os("NYDUS_IMAGE").unwrap_or_else(|| "nydus-image".into());
    if Command::new(&program).arg("--version").output().is_err() {
        println!("skipped: there is no {}", program.display());
        return;
    }
    let directory = TempDir::new().unwrap();
    let source = directory.path().join("source");
    make_tree(&source);
    fs::remove_file(source.join(std::ffi::OsStr::from_bytes(b"names/not-utf8-\xff\xfe"))).unwrap();
    for version in [FsVersion::V5, FsVersion::V6] {
        for compression in [Compression::None, Compression::Lz4Block, Compression::Zstd] {
            for digester in [Digester::Blake3, Digester::Sha256] {
                let image = directory
                    .path()
                    .join(format!("{version:?}-{compression:?}-{digester:?}"));
                build(
                    &source,
                    &image,
                    &Options {
                        version,
                        compression,
                        digester,
                        ..Options::default()
                    },
                );
                let checked = Command::new(&program)
                    .args(["check", "-B"])
                    .arg(image.join("bootstrap"))
                    .output()
                    .unwrap();
                assert!(
                    checked.status.success(),
                    "{}: {}",
                    image.display(),
                    String::from_utf8_lossy(&checked.stderr)
                );
            }
        }
    }
}

/// What rafsdump.py has to say against an image of which `fixture` has the expected tree.
fn assert_verified(shared: &Path, image: &Path, fixture: &str, ignore: &[&str]) {
    let mut verify = Command::new("python3");
    verify.arg(shared.join("formats/rafsdump.py")).arg("verify");
    verify.args([image.join("bootstrap"), image.join("blobs")]);
    verify
        .arg(shared.join("fixtures/rafs").join(fixture).join("expected.json"))
        .args(ignore);
    let checked = verify.env("PYTHONDONTWRITEBYTECODE", "1").output().unwrap();
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success(), "{fixture}: {said}");
    let mut faults = Vec::new();
    let reader = rafsd_rafs::reader::Reader::open(&image.join("bootstrap")).unwrap();
    reader.check(&mut |path, fault| faults.push(format!("{}: {fault}", String::from_utf8_lossy(path))));
    assert_eq!(faults, Vec::<String>::new(), "{fixture}");
}

/// Builds the first tree and keeps its bootstrap as `base`, for the second one to be built upon.
fn build_upon(
    first: &Path,
    second: &Path,
    image: &Path,
    options: &Options,
    upon: impl FnOnce(&mut Options, PathBuf),
) -> Report {
    build(first, image, options);
    let base = image.join("base");
    fs::rename(image.join("bootstrap"), &base).unwrap();
    let mut options = options.clone();
    upon(&mut options, base);
    build(second, image, &options)
}

#[test]
fn layers_and_dictionaries_give_the_trees_of_upstream() {
    for (fixture, upper, whiteouts, dictionary) in [
        ("v5-layered-oci", "upper-oci", None, false),
        ("v6-layered-oci", "upper-oci", None, false),
        (
            "v6-layered-overlayfs",
            "upper-ovl",
            Some(Whiteouts::Overlayfs),
            false,
        ),
        ("v6-chunkdict", "upper-oci", Some(Whiteouts::Oci), true),
    ] {
        let directory = TempDir::new().unwrap();
        let (below, above) = (directory.path().join("below"), directory.path().join("above"));
        for path in [&below, &above] {
            fs::create_dir(path).unwrap();
        }
        let Some((shared, lower)) = fixture_tree("lower", &below) else {
            return;
        };
        let Some((_, upper)) = fixture_tree(upper, &above) else {
            return;
        };
        let version = if fixture.starts_with("v5") {
            FsVersion::V5
        } else {
            FsVersion::V6
        };
        let options = Options {
            version,
            chunk_size: 0x1000,
            whiteouts,
            ..Options::default()
        };
        let image = directory.path().join("image");
        let report = build_upon(&lower, &upper, &image, &options, |options, base| {
            *(if dictionary {
                &mut options.chunk_dictionary
            } else {
                &mut options.parent
            }) = Some(base);
        });
        let expected = fixture_chunks(&shared, fixture);
        assert_eq!(
            report.blob.unwrap().chunk_count,
            expected,
            "{fixture}: only what is new is stored"
        );
        assert_verified(&shared, &image, fixture, &[]);
    }
}

/// Chunks of the last blob of a fixture.
fn fixture_chunks(shared: &Path, fixture: &str) -> u32 {
    let path = shared.join("fixtures/rafs").join(fixture).join("bootstrap");
    let reader = rafsd_rafs::reader::Reader::open(&path).unwrap();
    reader
        .superblock()
        .blobs
        .iter()
        .map(|blob| blob.chunk_count)
        .min()
        .unwrap()
}

#[test]
fn a_layer_without_new_data_has_no_blob_of_its_own() {
    let directory = TempDir::new().unwrap();
    let (lower, upper) = (directory.path().join("lower"), directory.path().join("upper"));
    make_tree(&lower);
    fs::create_dir(&upper).unwrap();
    fs::copy(lower.join("text"), upper.join("again")).unwrap();
    fs::write(upper.join(".wh.noise"), "").unwrap();
    for version in [FsVersion::V5, FsVersion::V6] {
        let image = directory.path().join(format!("{version:?}"));
        let options = Options {
            version,
            ..Options::default()
        };
        let report = build_upon(&lower, &upper, &image, &options, |options, base| {
            options.parent = Some(base)
        });
        assert_eq!(report.blob, None);
        assert_eq!(fs::read_dir(image.join("blobs")).unwrap().count(), 1);
        let reader = rafsd_rafs::reader::Reader::open(&report.bootstrap).unwrap();
        assert!(reader.at_path(b"/noise").unwrap().is_none() && reader.at_path(b"/again").unwrap().is_some());
        let link = reader.at_path(b"/copy/hardlink").unwrap().unwrap();
        assert_eq!(link.nlink, 1, "its other name is gone");
    }
}

#[test]
fn an_image_of_another_kind_is_nothing_to_build_upon() {
    let directory = TempDir::new().unwrap();
    let (source, base) = (directory.path().join("source"), directory.path().join("base"));
    make_tree(&source);
    build(&source, &base, &Options::default());
    for (options, reason) in [
        (
            Options {
                version: FsVersion::V5,
                ..Options::default()
            },
            "RAFS V6",
        ),
        (
            Options {
                chunk_size: 0x1000,
                ..Options::default()
            },
            "1048576 bytes",
        ),
        (
            Options {
                digester: Digester::Sha256,
                ..Options::default()
            },
            "Blake3",
        ),
    ] {
        let options = Options {
            parent: Some(base.join("bootstrap")),
            ..options
        };
        let error = build_directory(&source, &directory.path().join("image"), &options, &()).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn prefetched_files_come_first_in_the_blob() {
    let directory = TempDir::new().unwrap();
    let source = directory.path().join("source");
    make_tree(&source);
    for version in [FsVersion::V5, FsVersion::V6] {
        let prefetch = ["/text", "/missing", "many", "/many/x", "/names"]
            .map(PathBuf::from)
            .to_vec();
        let options = Options {
            version,
            chunk_size: 0x1000,
            prefetch,
            ..Options::default()
        };
        let image = directory.path().join(format!("{version:?}"));
        let report = build(&source, &image, &options);
        let reader = rafsd_rafs::reader::Reader::open(&report.bootstrap).unwrap();
        let id = |path: &str| reader.at_path(path.as_bytes()).unwrap().unwrap().id;
        assert_eq!(
            reader.prefetch_table().unwrap(),
            [id("/text"), id("/many"), id("/names")]
        );
        let first_chunk = |path: &str| {
            let inode = reader.at_path(path.as_bytes()).unwrap().unwrap();
            reader.chunks(&inode).unwrap()[0].index
        };
        assert_eq!(first_chunk("/text"), 0);
        let many = first_chunk("/many/0000000000000000000000000000000000000000");
        let names = first_chunk("/names/ space");
        assert!(many < names && names < first_chunk("/noise"), "{many} {names}");
    }
}

#[test]
fn archives_give_the_trees_of_upstream() {
    for (fixture, tree, members) in [
        ("v6-tar", "main-tar", "0"),
        ("v5-tar", "main-tar", "0"),
        ("v6-targz", "mini", "3"),
    ] {
        let directory = TempDir::new().unwrap();
        let Some((shared, source)) = fixture_tree(tree, directory.path()) else {
            return;
        };
        let archive = directory
            .path()
            .join(if members == "0" { "x.tar" } else { "x.tar.gz" });
        let mut make = Command::new("python3");
        make.env("PYTHONDONTWRITEBYTECODE", "1")
            .arg(shared.join("fixtures/make_tree.py"))
            .arg("tar");
        make.arg(&source).arg(&archive);
        if members != "0" {
            make.arg(members);
        }
        assert!(make.status().unwrap().success());
        let version = if fixture.starts_with("v5") {
            FsVersion::V5
        } else {
            FsVersion::V6
        };
        let options = Options {
            version,
            chunk_size: 0x1000,
            ..Options::default()
        };
        let image = directory.path().join("image");
        let mut stream = fs::File::open(&archive).unwrap();
        let input = Input::Archive {
            name: "x.tar",
            stream: &mut stream,
        };
        rafsd_rafs::build::build(input, &image, &options, &()).unwrap();
        // Upstream drops fractions of seconds; here they are kept.
        assert_verified(&shared, &image, fixture, &["--ignore", "mtime_ns"]);
    }
}

#[test]
fn a_cut_archive_is_named_and_leaves_no_image() {
    let directory = TempDir::new().unwrap();
    let mut archive = rafsd_rafs::tar::Writer::new(Vec::new());
    let member = rafsd_rafs::tar::Member {
        path: b"file".to_vec(),
        kind: rafsd_rafs::tar::Kind::Regular,
        link: Vec::new(),
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: 0,
        mtime_nsec: 0,
        size: 100_000,
        device: (0, 0),
        xattrs: Vec::new(),
    };
    archive.member(&member).unwrap();
    archive.data(&[1; 100_000]).unwrap();
    let archive = archive.finish().unwrap();
    let compressed = zstd::encode_all(archive.as_slice(), 3).unwrap();
    for (name, bytes) in [
        ("a.tar", &archive[..60_000]),
        ("b.tar.zst", &compressed[..compressed.len() / 2]),
    ] {
        let image = directory.path().join(name);
        let mut stream = bytes;
        let input = Input::Archive {
            name,
            stream: &mut stream,
        };
        let error = rafsd_rafs::build::build(input, &image, &Options::default(), &()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(
            contents(&image),
            [],
            "neither bootstrap nor blob nor temporary file"
        );
    }
}

/// Every attribute and every byte, by a reader that shares nothing with this crate.
#[test]
fn an_independent_reader_finds_the_whole_tree() {
    for (fixture, tree, chunk_size, compression, digester) in [
        (
            "v6-lz4-blake3",
            "main",
            0x1000,
            Compression::Lz4Block,
            Digester::Blake3,
        ),
        (
            "v6-zstd-64k",
            "main",
            0x1_0000,
            Compression::Zstd,
            Digester::Sha256,
        ),
        (
            "v6-big-lz4",
            "big",
            0x10_0000,
            Compression::Lz4Block,
            Digester::Sha256,
        ),
    ] {
        let directory = TempDir::new().unwrap();
        let Some((shared, source)) = fixture_tree(tree, directory.path()) else {
            return;
        };
        let image = directory.path().join("image");
        build(
            &source,
            &image,
            &Options {
                chunk_size,
                compression,
                digester,
                ..Options::default()
            },
        );
        assert_verified(&shared, &image, fixture, &[]);
    }
}
