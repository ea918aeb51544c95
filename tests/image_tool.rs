//! `rafs` as its users run it: build, inspect, check, unpack.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

fn rafs(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rafs"))
        .args(arguments.iter().map(|a| a.as_ref()))
        .output()
        .unwrap()
}

fn ok(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let output = rafs(arguments);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.stderr.is_empty(),
        "quiet when not on a terminal: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A tree that an ordinary user can make.
fn make_tree(root: &Path) {
    let file = |name: &[u8], data: &[u8]| {
        let path = root.join(std::ffi::OsStr::from_bytes(name));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    };
    file(b"etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n");
    file(b"empty", b"");
    file(b"odd/ \xff\n", b"odd name");
    file(b"text", &b"some text that repeats itself\n".repeat(20_000));
    fs::create_dir(root.join("empty-directory")).unwrap();
    fs::hard_link(root.join("text"), root.join("odd/hard link")).unwrap();
    symlink("../etc/passwd", root.join("odd/symlink")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("odd/fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(30 << 20).unwrap();
    sparse.write_all_at(b"island", 17 << 20).unwrap();
    fs::set_permissions(root.join("text"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(root.join("empty-directory"), fs::Permissions::from_mode(0o1711)).unwrap();
}

/// All that should survive, by path; the root's time does not.
fn listing(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut links: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut pending = vec![root.to_path_buf()];
    while let Some(path) = pending.pop() {
        let metadata = path.symlink_metadata().unwrap();
        let name = path.strip_prefix(root).unwrap().to_path_buf();
        let mut line = format!("{:o} {}:{}", metadata.mode(), metadata.uid(), metadata.gid());
        if path != root {
            line += &format!(" {}.{}", metadata.mtime(), metadata.mtime_nsec());
        }
        if metadata.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).collect();
            names.sort();
            pending.extend(names.into_iter().rev());
        } else if metadata.is_symlink() {
            line += &format!(" -> {:?}", fs::read_link(&path).unwrap());
        } else if metadata.is_file() {
            let digest = <sha2::Sha256 as sha2::Digest>::digest(fs::read(&path).unwrap());
            line += &format!(
                " {} links, {} bytes {}",
                metadata.nlink(),
                metadata.len(),
                hex::encode(digest)
            );
            if metadata.nlink() > 1 {
                line += &format!(
                    " same as {:?}",
                    links.entry(metadata.ino()).or_insert(name.clone())
                );
            }
        }
        found.insert(name, line);
    }
    found
}

struct Built {
    directory: TempDir,
    source: PathBuf,
    image: PathBuf,
}

impl Built {
    fn new(options: &[&str]) -> Self {
        let directory = TempDir::new().unwrap();
        let (source, image) = (directory.path().join("source"), directory.path().join("image"));
        make_tree(&source);
        let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"build", &source, &"--output", &image];
        arguments.extend(options.iter().map(|option| option as &dyn AsRef<std::ffi::OsStr>));
        ok(&arguments);
        Self {
            directory,
            source,
            image,
        }
    }

    fn bootstrap(&self) -> PathBuf {
        self.image.join("bootstrap")
    }

    fn blobs(&self) -> PathBuf {
        self.image.join("blobs")
    }

    fn blob(&self) -> PathBuf {
        fs::read_dir(self.blobs())
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path()
    }

    fn unpacked(&self) -> PathBuf {
        self.directory.path().join("unpacked")
    }
}

#[test]
fn what_was_built_is_unpacked_as_it_was() {
    for options in [
        &["--fs-version", "6"] as &[&str],
        &[
            "--fs-version",
            "6",
            "--compressor",
            "lz4_block",
            "--digester",
            "sha256",
            "--chunk-size",
            "4k",
        ],
        &[
            "--fs-version",
            "6",
            "--compressor",
            "none",
            "--chunk-size",
            "16MiB",
        ],
        &["--fs-version", "5"],
        &[
            "--fs-version",
            "5",
            "--compressor",
            "lz4_block",
            "--digester",
            "sha256",
            "--chunk-size",
            "0x10000",
        ],
    ] {
        let built = Built::new(options);
        ok(&[
            &"unpack",
            &built.bootstrap(),
            &"--blobs",
            &built.blobs(),
            &"--output",
            &built.unpacked(),
        ]);
        let (before, after) = (listing(&built.source), listing(&built.unpacked()));
        assert_eq!(
            before.keys().collect::<Vec<_>>(),
            after.keys().collect::<Vec<_>>()
        );
        for (path, line) in &before {
            assert_eq!(line, &after[path], "{}", path.display());
        }
        let sparse = fs::metadata(built.unpacked().join("sparse")).unwrap();
        assert!(
            sparse.blocks() * 512 < 1 << 20,
            "holes are holes again: {} blocks",
            sparse.blocks()
        );
    }
}

/// Unpacks a tar as its users do.
fn extract(tar: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    let output = Command::new("tar")
        .args([
            "--extract",
            "--preserve-permissions",
            "--xattrs",
            "--xattrs-include=*",
        ])
        .arg("--file")
        .arg(tar)
        .arg("--directory")
        .arg(to)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_tar_of_an_image_is_what_tar_makes_of_it() {
    for version in ["5", "6"] {
        let built = Built::new(&["--fs-version", version]);
        let tar = built.directory.path().join("image.tar");
        let unpack: [&dyn AsRef<std::ffi::OsStr>; 6] = [
            &"unpack",
            &built.bootstrap(),
            &"--blobs",
            &built.blobs(),
            &"--output",
            &tar,
        ];
        ok(&unpack);
        extract(&tar, &built.unpacked());
        assert_eq!(listing(&built.source), listing(&built.unpacked()));
        // The same to a pipe.
        let piped = rafs(&[
            &"unpack",
            &built.bootstrap(),
            &"--blobs",
            &built.blobs(),
            &"--output",
            &"-",
        ]);
        assert!(piped.status.success() && piped.stdout == fs::read(&tar).unwrap());
    }
}

#[test]
fn a_second_unpacking_into_the_same_place_is_refused() {
    let built = Built::new(&[]);
    fs::create_dir(built.unpacked()).unwrap();
    fs::write(built.unpacked().join("something"), "there").unwrap();
    let output = rafs(&[
        &"unpack",
        &built.bootstrap(),
        &"--blobs",
        &built.blobs(),
        &"-o",
        &built.unpacked(),
    ]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not empty"));
    assert_eq!(fs::read_dir(built.unpacked()).unwrap().count(), 1);
}

#[test]
fn a_sound_image_passes_and_a_flipped_bit_is_found_by_path() {
    for version in ["5", "6"] {
        let built = Built::new(&["--fs-version", version, "--compressor", "none"]);
        let said = ok(&[&"check", &built.bootstrap(), &"--blobs", &built.blobs()]);
        assert!(said.contains(" 0 faults"), "{said}");

        let blob = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(built.blob())
            .unwrap();
        let data = fs::read(built.blob()).unwrap();
        let at = data.windows(4).position(|w| w == b"odd ").unwrap() as u64;
        blob.write_all_at(b"Odd ", at).unwrap();
        let output = rafs(&[&"check", &built.bootstrap(), &"--blobs", &built.blobs()]);
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("/odd/ \\xff\\n: ") && said.contains("digest differs"),
            "{said}"
        );
        assert!(said.contains(" 1 faults"), "{said}");

        let output = rafs(&[
            &"unpack",
            &built.bootstrap(),
            &"--blobs",
            &built.blobs(),
            &"-o",
            &built.unpacked(),
        ]);
        assert_eq!(output.status.code(), Some(1));
        let (before, mut after) = (listing(&built.source), listing(&built.unpacked()));
        let damaged = Path::new(std::ffi::OsStr::from_bytes(b"odd/ \xff\n"));
        assert!(!after.contains_key(damaged), "no file rather than a wrong one");
        after.insert(damaged.to_owned(), before[damaged].clone());
        assert_eq!(before, after, "everything else is there");
    }
}

#[test]
fn a_missing_blob_is_a_fault_of_every_file_in_it() {
    let built = Built::new(&[]);
    fs::remove_file(built.blob()).unwrap();
    assert!(
        ok(&[&"check", &built.bootstrap()]).contains(" 0 faults"),
        "the metadata are all right"
    );
    let output = rafs(&[
        &"check",
        &built.bootstrap(),
        &"--blobs",
        &built.blobs(),
        &"--max-faults",
        &"2",
    ]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(said.matches("cannot open").count(), 2, "{said}");
    assert!(said.contains("only counted"), "{said}");
}

#[test]
fn inspect_shows_superblock_tree_and_chunks() {
    let built = Built::new(&["--chunk-size", "64KiB"]);
    let shown = ok(&[&"inspect", &built.bootstrap()]);
    let blob = built.blob().file_name().unwrap().to_str().unwrap().to_owned();
    for part in ["RAFS v6", "64.00 KiB", "COMPRESSION_ZSTD", &blob] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    let image: serde_json::Value =
        serde_json::from_str(&ok(&[&"inspect", &built.bootstrap(), &"--json"])).unwrap();
    assert_eq!(image["version"], 6);
    assert_eq!(image["chunk_size"], 65536);
    assert_eq!(image["blobs"][0]["id"], blob);

    let file: serde_json::Value =
        serde_json::from_str(&ok(&[&"inspect", &built.bootstrap(), &"/text", &"--json"])).unwrap();
    assert_eq!(
        (&file["mode"], &file["nlink"], &file["size"]),
        (&"4755".into(), &2.into(), &600_000.into())
    );
    let chunks = file["chunks"].as_array().unwrap();
    assert_eq!(chunks.len(), 10);
    assert_eq!(chunks[9]["offset"], 9 * 65536);

    let tree = ok(&[&"inspect", &built.bootstrap(), &"/odd", &"--recursive"]);
    assert!(
        tree.contains("/odd/ \\xff\\n") && tree.contains("/odd/symlink -> ../etc/passwd"),
        "{tree}"
    );
    assert!(
        !tree.contains(" /etc") && !tree.contains(" /text"),
        "only what is below: {tree}"
    );
    let lines = ok(&[&"inspect", &built.bootstrap(), &"/", &"-r", &"--json"]);
    let paths: Vec<serde_json::Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(paths.len(), 12);

    let missing = rafs(&[&"inspect", &built.bootstrap(), &"/not/there"]);
    assert_eq!(missing.status.code(), Some(1));
}

#[test]
fn a_wrong_command_line_is_status_2_and_a_file_that_is_no_image_is_named() {
    assert_eq!(rafs(&[&"build"]).status.code(), Some(2));
    assert_eq!(
        rafs(&[&"build", &"x", &"-o", &"y", &"--chunk-size", &"5000"])
            .status
            .code(),
        Some(2)
    );
    let output = rafs(&[&"inspect", &"/etc/passwd"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.starts_with("rafs: ") && said.contains("/etc/passwd"),
        "{said}"
    );
    assert!(ok(&[&"--version"]).starts_with("rafs "));
}

/// Directory with images made by upstream; `None`, with a reason printed, where they are not.
fn fixtures() -> Option<PathBuf> {
    let shared = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/fixtures"));
    if !shared.join("check_tree.py").exists() {
        eprintln!("SKIPPED: images of upstream are not at {}", shared.display());
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: owners and device nodes need root");
        return None;
    }
    Some(shared.to_path_buf())
}

/// The file of a fixture that has the bootstrap: of its own, or the blob that ends with one.
fn bootstrap_of(fixture: &Path) -> PathBuf {
    let own = fixture.join("bootstrap");
    if own.exists() {
        return own;
    }
    let has_bootstrap = |path: &PathBuf| {
        let bytes = fs::read(path).unwrap();
        let tail = &bytes[bytes.len() - 512..];
        [b"image.boot".as_slice(), b"rafs.blob.toc"]
            .iter()
            .any(|name| tail.starts_with(name))
    };
    fs::read_dir(fixture.join("blobs"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(has_bootstrap)
        .unwrap()
}

/// Compares a tree with what is known of a fixture.
fn check_tree(shared: &Path, tree: &Path, fixture: &Path) {
    let compared = Command::new("python3")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg(shared.join("check_tree.py"))
        .arg(tree)
        .arg(fixture.join("expected.json"))
        .output()
        .unwrap();
    assert!(
        compared.status.success(),
        "{}: {}",
        fixture.display(),
        String::from_utf8_lossy(&compared.stdout)
    );
}

#[test]
fn tars_of_upstreams_images_have_their_attributes() {
    let Some(shared) = fixtures() else { return };
    // Owners, device nodes and extended attributes; made of tars, so that there are no sockets.
    for name in ["v5-tar", "v6-tar", "v6-encrypt-batch"] {
        let fixture = shared.join("rafs").join(name);
        let directory = TempDir::new().unwrap();
        let (tar, tree) = (directory.path().join("image.tar"), directory.path().join("tree"));
        ok(&[
            &"unpack",
            &bootstrap_of(&fixture),
            &"--blobs",
            &fixture.join("blobs"),
            &"--output",
            &tar,
        ]);
        extract(&tar, &tree);
        check_tree(&shared, &tree, &fixture);
    }
}

/// A program of the incumbent, if it is installed; says so if it is not.
fn peer(name: &str) -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/peers/bin")
        .join(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .chain([installed])
        .find(|path| path.exists());
    if found.is_none() {
        eprintln!("SKIPPED: no {name} in PATH or target/peers/bin (make peers)");
    }
    found
}

#[test]
fn the_upstream_checker_accepts_what_was_built() {
    let Some(checker) = peer("nydus-image") else {
        return;
    };
    for options in [
        &["--fs-version", "6"] as &[&str],
        &[
            "--fs-version",
            "6",
            "--compressor",
            "lz4_block",
            "--chunk-size",
            "4k",
        ],
        &[
            "--fs-version",
            "6",
            "--compressor",
            "none",
            "--digester",
            "sha256",
        ],
        &["--fs-version", "5"],
        &[
            "--fs-version",
            "5",
            "--compressor",
            "lz4_block",
            "--chunk-size",
            "4k",
        ],
        &[
            "--fs-version",
            "5",
            "--compressor",
            "none",
            "--digester",
            "sha256",
        ],
    ] {
        let built = Built::new(options);
        let checked = Command::new(&checker)
            .args(["check", "--bootstrap"])
            .arg(built.bootstrap())
            .output()
            .unwrap();
        let said = [checked.stdout, checked.stderr].concat();
        assert!(
            checked.status.success(),
            "{options:?}: {}",
            String::from_utf8_lossy(&said)
        );
        assert!(
            String::from_utf8_lossy(&said).contains("RAFS filesystem metadata is valid"),
            "{}",
            String::from_utf8_lossy(&said)
        );
    }
}

#[test]
fn images_of_upstream_are_unpacked_to_the_trees_that_they_were_made_of() {
    let Some(shared) = fixtures() else { return };
    let mut names: Vec<PathBuf> = fs::read_dir(shared.join("rafs"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    names.sort();
    assert_eq!(names.len(), 48);
    for fixture in names {
        let name = fixture.file_name().unwrap().to_str().unwrap();
        let directory = TempDir::new().unwrap();
        let output = directory.path().join("tree");
        let unpacked = rafs(&[
            &"unpack",
            &bootstrap_of(&fixture),
            &"--blobs",
            &fixture.join("blobs"),
            &"--output",
            &output,
        ]);
        let said = String::from_utf8_lossy(&unpacked.stderr);
        assert!(unpacked.status.success(), "{name}: {said}");
        if name.ends_with("-huge") {
            // Its 4 GiB of zeros take minutes to hash there.
            let huge = fs::File::open(output.join("huge")).unwrap();
            let end = 5 + (4 << 30) + 12345;
            assert_eq!(huge.metadata().unwrap().len(), end + 3 + 1000);
            assert!(huge.metadata().unwrap().blocks() < 64, "the rest are holes");
            for (at, text) in [(0, b"start".as_slice()), (end, b"end")] {
                let mut bytes = vec![0; text.len()];
                huge.read_exact_at(&mut bytes, at).unwrap();
                assert_eq!(bytes, text);
            }
            continue;
        }
        check_tree(&shared, &output, &fixture);
    }
}
