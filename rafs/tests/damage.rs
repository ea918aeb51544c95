//! Damaged bootstraps: whatever byte is changed, a file gives its right bytes or an error, never wrong ones.
//!
//! The cache is filled from the undamaged image first. That is the harder case: nothing is fetched and verified any
//! more, so a damaged address must not lead to another chunk that is there.
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
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use support::{Expected, Mount, Place, fixture_names, fixtures, image_of};

/// Damages per bootstrap and per blob, evenly spread, the first of them at random. A blob's need a cold cache each.
const SAMPLES: usize = 40;
const BLOB_SAMPLES: usize = 4;
/// The same of images that are large without being different.
const LARGE_SAMPLES: usize = 2;

/// Damages of one fixture that are tried at a time.
const THREADS: usize = 24;

/// `RAFS_DAMAGES` asks for more damages per file, up to every offset.
fn samples_of(name: &str, usual: usize) -> usize {
    if let Ok(count) = std::env::var("RAFS_DAMAGES") {
        return count.parse().unwrap();
    }
    let large = ["many", "huge"].iter().any(|part| name.contains(part));
    if large { LARGE_SAMPLES } else { usual }
}

/// The fixtures, or the one that `RAFS_FIXTURE` names.
fn chosen(fixtures: &Path) -> Vec<String> {
    let only = std::env::var("RAFS_FIXTURE").ok();
    let mut names = fixture_names(fixtures);
    names.retain(|name| only.as_ref().is_none_or(|only| name == only));
    names
}

/// Whether chunks have digests. Those of tarfs have none by design: damage may show there, and do nothing worse.
fn is_verified(name: &str) -> bool {
    !name.contains("tarfs")
}

/// Bytes of every file by path.
type Contents = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    damages: usize,
    refused: usize,
    right: usize,
    errors: usize,
    /// Names that are gone, and sizes and types that differ: nothing in v6 covers those.
    changed: usize,
    /// Names that lead to another file of the image, with all of its right bytes: neither format covers names.
    elsewhere: usize,
}

impl Tally {
    fn add(self, other: Self) -> Self {
        Self {
            damages: self.damages + other.damages,
            refused: self.refused + other.refused,
            right: self.right + other.right,
            errors: self.errors + other.errors,
            changed: self.changed + other.changed,
            elsewhere: self.elsewhere + other.elsewhere,
        }
    }
}

fn contents(mount: &Mount, expected: &Expected) -> Contents {
    let files = expected.entries.iter().filter(|entry| entry.kind == "file");
    files
        .map(|entry| {
            let path = entry.path();
            let inode = mount.fs.reader().at_path(&path).unwrap().unwrap();
            let data = mount.read(inode.id, 0, inode.size as usize).unwrap();
            (path, data)
        })
        .collect()
}

fn look(mount: &Mount, path: &[u8]) -> std::io::Result<u64> {
    let mut inode = mount.fs.root();
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        inode = mount.lookup(inode, name)?.inode;
        if inode == 0 {
            return Ok(0);
        }
    }
    Ok(inode)
}

fn compare(mount: &Mount, contents: &Contents, tally: &mut Tally) -> Result<(), String> {
    for (path, expected) in contents {
        let inode = match look(mount, path) {
            Ok(0) => {
                tally.changed += 1;
                continue;
            }
            Ok(inode) => inode,
            Err(_) => {
                tally.errors += 1;
                continue;
            }
        };
        let asked = expected.len() + 5000;
        match mount.read(inode, 0, asked) {
            Err(_) => tally.errors += 1,
            Ok(data) if data == *expected => tally.right += 1,
            Ok(data)
                if contents
                    .values()
                    .any(|other| data == other[..other.len().min(asked)]) =>
            {
                tally.elsewhere += 1;
            }
            Ok(data) => {
                let common = data.len().min(expected.len());
                if data[..common] != expected[..common] {
                    return Err(format!("wrong bytes in {}", String::from_utf8_lossy(path)));
                }
                tally.changed += 1;
            }
        }
    }
    Ok(())
}

/// Offsets worth damaging: everything but long runs of zeros, evenly sampled.
fn offsets(bytes: &[u8], samples: usize) -> Vec<usize> {
    let interesting: Vec<usize> = (0..bytes.len())
        .filter(|at| {
            bytes[at.saturating_sub(8)..(at + 9).min(bytes.len())]
                .iter()
                .any(|byte| *byte != 0)
        })
        .collect();
    let step = interesting.len().div_ceil(samples).max(1);
    let first = RandomState::new().hash_one(0) as usize % step;
    interesting.into_iter().skip(first).step_by(step).collect()
}

fn damage_fixture(fixture: &Path, name: &str) -> Tally {
    let image = image_of(fixture);
    let expected = Expected::of(fixture);
    let bytes = fs::read(&image).unwrap();
    let offsets = offsets(&bytes, samples_of(name, SAMPLES));
    // Most of the time is spent waiting: a place that a source does not have is asked for again.
    let share = offsets.len().div_ceil(THREADS).max(SAMPLES / 4);
    std::thread::scope(|scope| {
        let threads: Vec<_> = offsets
            .chunks(share)
            .map(|offsets| scope.spawn(|| damage_bytes(fixture, &image, &bytes, offsets, &expected)))
            .collect();
        let tallies = threads.into_iter().map(|thread| thread.join().unwrap());
        tallies.fold(Tally::default(), Tally::add)
    })
}

fn damage_bytes(fixture: &Path, image: &Path, bytes: &[u8], offsets: &[usize], expected: &Expected) -> Tally {
    let place = Place::new(&fixture.join("blobs"));
    let mut tally = Tally::default();
    let contents = contents(&place.mount(image).unwrap(), expected);
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join(image.file_name().unwrap());
    for at in offsets.iter().copied() {
        let mut copy = bytes.to_owned();
        copy[at] ^= [1, 0x80, 0xFF, 0x10][at % 4];
        fs::write(&damaged, &copy).unwrap();
        tally.damages += 1;
        // Whatever it is, it must not spoil the cache for the images that come after it.
        match try_image(&place, &damaged, &contents, &mut tally) {
            Err(error) if is_verified(&fixture.display().to_string()) => panic!(
                "{}: byte {at:#x} {:#x} -> {:#x}: {error}",
                fixture.display(),
                bytes[at],
                copy[at]
            ),
            _ => {}
        }
    }
    tally
}

/// Whether the image could be opened; an error if it gave wrong bytes.
fn try_image(
    place: &Arc<Place>,
    image: &Path,
    contents: &Contents,
    tally: &mut Tally,
) -> Result<bool, String> {
    let Ok(mount) = place.mount(image) else {
        tally.refused += 1;
        return Ok(false);
    };
    let _ = mount.walk();
    compare(&mount, contents, tally)?;
    Ok(true)
}

#[test]
fn a_damaged_byte_never_gives_wrong_bytes() {
    let Some(fixtures) = fixtures() else { return };
    for name in chosen(&fixtures) {
        let tally = damage_fixture(&fixtures.join(&name), &name);
        println!("{name}: {tally:?}");
        assert!(tally.right > 0 && tally.damages > 0);
    }
}

#[test]
fn a_damaged_blob_never_gives_wrong_bytes() {
    let Some(fixtures) = fixtures() else { return };
    for name in chosen(&fixtures) {
        // Hardly any data.
        if name.contains("nodata") {
            continue;
        }
        let fixture = fixtures.join(&name);
        let expected = Expected::of(&fixture);
        let image = image_of(&fixture);
        let contents = contents(&Mount::open(&image, &fixture.join("blobs")).unwrap(), &expected);
        let mut tally = Tally::default();
        for blob in fs::read_dir(fixture.join("blobs")).unwrap() {
            let blob = blob.unwrap().path();
            let bytes = fs::read(&blob).unwrap();
            for (round, at) in offsets(&bytes, samples_of(&name, BLOB_SAMPLES))
                .into_iter()
                .enumerate()
            {
                let dir = tempfile::tempdir().unwrap();
                for other in fs::read_dir(fixture.join("blobs")).unwrap() {
                    let other = other.unwrap();
                    fs::copy(other.path(), dir.path().join(other.file_name())).unwrap();
                }
                let mut copy = bytes.clone();
                copy[at] ^= [1, 0x80, 0xFF, 0x10][round % 4];
                let damaged = dir.path().join(blob.file_name().unwrap());
                fs::set_permissions(&damaged, fs::Permissions::from_mode(0o644)).unwrap();
                fs::write(&damaged, &copy).unwrap();
                tally.damages += 1;
                let image = if image == blob { damaged } else { image.clone() };
                let tried = try_image(&Place::new(dir.path()), &image, &contents, &mut tally);
                if let (Err(error), true) = (tried, is_verified(&name)) {
                    panic!("{name}: byte {at:#x} of a blob: {error}");
                }
            }
        }
        println!("{name}: {tally:?}");
        assert!(tally.right > 0 && tally.damages > 0);
    }
}
