//! Images against other readers: a guest on `rafsd`, the kernel's own EROFS driver, the upstream checker.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rafsd_guest::cache::{entries, scratch, workspace};
use rafsd_guest::guest::SHARED;
use rafsd_guest::image::{Manifest, python_tree};
use rafsd_guest::{Boot, Cache, Container, Image, Sandbox, config};

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const RAFS: &str = env!("CARGO_BIN_EXE_rafs");

#[test]
fn a_debian_image_is_its_tree_through_the_device_and_through_the_kernels_erofs_driver() {
    let cache = Cache::open().unwrap();
    let directory = scratch(&cache).unwrap();
    let tree = python_tree(&cache).unwrap();
    let expected = Manifest::of_host(&cache, &tree).unwrap();
    assert!(expected.len() > 5_000, "{} lines only", expected.len());
    let store = directory.path().join("store");
    let image = Image::build(Path::new(RAFS), &tree, &store).unwrap();
    let work = directory.path().join("cache");

    let mut sandbox = Sandbox::prepare(Path::new(RAFSD), directory.path()).unwrap();
    let container = Container::named("debian");
    sandbox
        .mount_image(&container, &image, &config::of_directory(&image.directory, &work))
        .unwrap();
    sandbox.boot(&Boot::new(&cache).unwrap()).unwrap();
    let lower = format!("{SHARED}{}", container.mountpoint());
    let seen = Manifest::of_guest(sandbox.guest().unwrap(), &lower).unwrap();
    assert_eq!(seen, expected, "{}", expected.difference(&seen));
    sandbox.end().unwrap();

    // All of it has been read, so the cache holds the blob as the bootstrap addresses it: a second device for EROFS.
    let data = cached_data(&work);
    let mut guest = Boot::new(&cache)
        .unwrap()
        .disk(&image.bootstrap)
        .disk(&data)
        .start()
        .unwrap();
    guest
        .check("load virtio_blk; load erofs; mkdir /mnt/image")
        .unwrap();
    guest
        .check("mount -t erofs -o ro,device=/dev/vdb /dev/vda /mnt/image")
        .unwrap();
    let seen = Manifest::of_guest(&mut guest, "/mnt/image").unwrap();
    assert_eq!(seen, expected, "{}", expected.difference(&seen));
    guest.power_off().unwrap();
}

/// The largest file of a cache that has held one image: the data of its blob.
fn cached_data(cache: &Path) -> PathBuf {
    let mut files = Vec::new();
    let mut directories = vec![cache.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for path in entries(&directory).unwrap() {
            if path.is_dir() {
                directories.push(path)
            } else {
                files.push(path)
            }
        }
    }
    files
        .into_iter()
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .expect("an empty cache")
}

#[test]
fn the_upstream_checker_accepts_a_built_image() {
    let installed = workspace().join("target/peers/bin/nydus-image");
    let checker = std::env::var_os("NYDUS_IMAGE").map_or(installed, PathBuf::from);
    if !checker.exists() {
        eprintln!(
            "SKIPPED the_upstream_checker_accepts_a_built_image: no {} (make peers)",
            checker.display()
        );
        return;
    }
    let cache = Cache::open().unwrap();
    let directory = scratch(&cache).unwrap();
    let tree = python_tree(&cache).unwrap();
    let image = Image::build(Path::new(RAFS), &tree, directory.path()).unwrap();
    let checked = Command::new(checker)
        .args(["check", "--bootstrap"])
        .arg(&image.bootstrap)
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&checked.stdout),
        String::from_utf8_lossy(&checked.stderr)
    );
    assert!(checked.status.success(), "{said}");
}
