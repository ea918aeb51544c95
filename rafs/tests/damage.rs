//! Damaged images: whatever byte of a bootstrap or of a blob is changed, a file gives its right bytes or an error, never
//! wrong ones.
//!
//! For bootstraps the cache is filled from the undamaged image first. That is the harder case: nothing is fetched and
//! verified any more, so a damaged address must not lead to another chunk that is there. Blobs are read with an empty cache.
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
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::thread;

use support::{Expected, Mount, Place, fixture_names, fixtures, image_of};

/// Damages per bootstrap and per blob, evenly spread, the first of them at random. A blob's need a cold cache each.
const SAMPLES: usize = 40;
const BLOB_SAMPLES: usize = 4;
/// The same of images that are large without being different.
const LARGE_SAMPLES: usize = 2;

/// Where every byte of a blob is wanted, so many are changed at a time, as far apart as can be. A chunk's bytes depend on
/// no other chunk; where no file is readable any more, as after damage to chunk information, they are changed one by one.
const TOGETHER: usize = 8;
/// Shares of the work for each processor: a fetch is a relay of several threads.
const SHARES: usize = 4;

/// What a byte is changed by.
const FLIPS: [u8; 4] = [1, 0x80, 0xFF, 0x10];

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
fn is_verified(fixture: &Path) -> bool {
    !fixture.ends_with("v6-tarfs")
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

/// Does `work` with shares of `offsets`.
fn shared(offsets: &[usize], work: impl Fn(&[usize]) -> Tally + Sync) -> Tally {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let share = offsets.len().div_ceil(SHARES * threads).max(SAMPLES / 4);
    thread::scope(|scope| {
        let shares: Vec<_> = offsets
            .chunks(share)
            .map(|offsets| scope.spawn(|| work(offsets)))
            .collect();
        let tallies = shares.into_iter().map(|share| share.join().unwrap());
        tallies.fold(Tally::default(), Tally::add)
    })
}

fn damage_bootstrap(fixture: &Path, offsets: &[usize], expected: &Expected) -> Tally {
    let image = image_of(fixture);
    let bytes = fs::read(&image).unwrap();
    let place = Place::new(&fixture.join("blobs"));
    let mut tally = Tally::default();
    let contents = contents(&place.mount(&image).unwrap(), expected);
    let dir = tempfile::tempdir().unwrap();
    let damaged = dir.path().join(image.file_name().unwrap());
    for at in offsets.iter().copied() {
        let mut copy = bytes.clone();
        copy[at] ^= FLIPS[at % FLIPS.len()];
        fs::write(&damaged, &copy).unwrap();
        tally.damages += 1;
        // Whatever it is, it must not spoil the cache for the images that come after it.
        if let Err(error) = try_image(place.mount(&damaged), &contents, &mut tally) {
            assert!(
                !is_verified(fixture),
                "{}: byte {at:#x} {:#x} -> {:#x}: {error}",
                fixture.display(),
                bytes[at],
                copy[at]
            );
        }
    }
    tally
}

fn damage_blob(fixture: &Path, blob: &Path, offsets: &[usize], contents: &Contents) -> Tally {
    let dir = tempfile::tempdir().unwrap();
    for other in fs::read_dir(fixture.join("blobs")).unwrap() {
        let other = other.unwrap();
        let copy = dir.path().join(other.file_name());
        fs::copy(other.path(), &copy).unwrap();
        fs::set_permissions(copy, fs::Permissions::from_mode(0o644)).unwrap();
    }
    let damaged = dir.path().join(blob.file_name().unwrap());
    let file = fs::OpenOptions::new().write(true).open(&damaged).unwrap();
    let bytes = fs::read(blob).unwrap();
    let image = image_of(fixture);
    let image = if image == blob { &damaged } else { &image };
    let place = Place::new(dir.path());
    let try_damage = |places: &[usize]| {
        let cache = tempfile::tempdir().unwrap();
        for at in places {
            let byte = bytes[*at] ^ FLIPS[at % FLIPS.len()];
            file.write_all_at(&[byte], *at as u64).unwrap();
        }
        let mut tally = Tally {
            damages: places.len(),
            ..Tally::default()
        };
        let mount = place.mount_with_cache(image, cache.path());
        if let Err(error) = try_image(mount, contents, &mut tally) {
            assert!(
                !is_verified(fixture),
                "{}: bytes {places:#x?} of a blob: {error}",
                fixture.display()
            );
        }
        for at in places {
            file.write_all_at(&[bytes[*at]], *at as u64).unwrap();
        }
        tally
    };
    // Files without data are right, whatever happens to a blob.
    let empty = contents.values().filter(|data| data.is_empty()).count();
    let rounds = if offsets.len() < 100 * TOGETHER {
        offsets.len()
    } else {
        offsets.len().div_ceil(TOGETHER)
    };
    let mut tally = Tally::default();
    for round in 0..rounds {
        let places: Vec<usize> = offsets.iter().copied().skip(round).step_by(rounds).collect();
        let mut tried = try_damage(&places);
        if places.len() > 1 && tried.right <= empty {
            let each = places.iter().map(|at| try_damage(&[*at]));
            tried = each.fold(Tally::default(), Tally::add);
        }
        tally = tally.add(tried);
    }
    tally
}

/// An error if an image that could be opened gave wrong bytes.
fn try_image(mount: Result<Mount, String>, contents: &Contents, tally: &mut Tally) -> Result<(), String> {
    let Ok(mount) = mount else {
        tally.refused += 1;
        return Ok(());
    };
    let _ = mount.walk();
    compare(&mount, contents, tally)
}

#[test]
fn a_damaged_byte_never_gives_wrong_bytes() {
    let Some(fixtures) = fixtures() else { return };
    for name in chosen(&fixtures) {
        let fixture = fixtures.join(&name);
        let expected = Expected::of(&fixture);
        let bytes = fs::read(image_of(&fixture)).unwrap();
        let offsets = offsets(&bytes, samples_of(&name, SAMPLES));
        let tally = shared(&offsets, |offsets| damage_bootstrap(&fixture, offsets, &expected));
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
        let contents = contents(
            &Mount::open(&image_of(&fixture), &fixture.join("blobs")).unwrap(),
            &expected,
        );
        let mut tally = Tally::default();
        for blob in fs::read_dir(fixture.join("blobs")).unwrap() {
            let blob = blob.unwrap().path();
            let offsets = offsets(&fs::read(&blob).unwrap(), samples_of(&name, BLOB_SAMPLES));
            tally = tally.add(shared(&offsets, |offsets| {
                damage_blob(&fixture, &blob, offsets, &contents)
            }));
        }
        println!("{name}: {tally:?}");
        assert!(tally.right > 0 && tally.damages > 0);
    }
}
