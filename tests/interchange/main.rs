//! Cache directories that nydusd wrote: rafsd serves from them without fetching anything again, and believes none of it before it
//! has compared the digest.
//!
//! `nydusd.tar` is a recorded one, so that this is tested everywhere: an image of two files, its blob, and the cache that nydusd 2.2.0
//! left when one of them had been read. Where nydusd is installed, it makes others, of many kinds of images.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rafs::reader::Reader;
use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::image::{Image, fixtures};
use rafsd_frontend::{Error, Guest, Options, Order};

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
/// Where images are mounted.
const LOWER: &str = "/image";

/// Contents of regular files by path, or the error of reading them.
type Contents = BTreeMap<Vec<u8>, Result<Vec<u8>, Option<i32>>>;

/// Mounts an image with a cache directory, and reads files.
struct Served {
    _daemon: Daemon,
    guest: Guest,
}

impl Served {
    /// On a busy machine nydusd may leave the first request of a guest unanswered for good (it was kicked, and asks to be): it is
    /// started again then. Ours is not.
    fn new(program: &Path, image: &Image, cache: &Path) -> Result<Self, String> {
        let ours = program == Path::new(RAFSD);
        let (starts, timeout) = match ours {
            true => (1, Options::default().timeout),
            false => (5, Duration::from_secs(10)),
        };
        for _ in 1..starts {
            match Self::start(ours, program, image, cache, timeout)? {
                Ok(served) => return Ok(served),
                Err(error) => println!("nydusd is started again: {error}"),
            }
        }
        Ok(Self::start(ours, program, image, cache, timeout)?.unwrap())
    }

    /// The inner error is that of the guest's first request.
    fn start(
        ours: bool,
        program: &Path,
        image: &Image,
        cache: &Path,
        timeout: Duration,
    ) -> Result<Result<Self, Error>, String> {
        let mut builder = Builder::new(program).unwrap();
        if !ours {
            // It ends where it may not raise this limit.
            builder = builder.arg("--rlimit-nofile").arg("0");
        }
        let daemon = builder.start().unwrap();
        daemon
            .mount_rafs(LOWER, &image.bootstrap, &image.local(cache))
            .map_err(|e| e.to_string())?;
        let options = Options {
            order: Order::CloudHypervisor,
            strict_length: ours,
            timeout,
            ..Options::default()
        };
        Ok(Guest::boot(&daemon.socket, options).map(|guest| Self {
            _daemon: daemon,
            guest,
        }))
    }

    fn contents(&self) -> Contents {
        let mut found = Contents::new();
        let mut open = vec![(Vec::new(), self.guest.resolve(LOWER).unwrap().nodeid)];
        while let Some((path, directory)) = open.pop() {
            let listed = self.guest.list(directory, true, 32768).unwrap();
            let named = |name: &[u8]| !matches!(name, b"." | b"..");
            for listed in listed.into_iter().filter(|listed| named(&listed.name)) {
                let path = [path.as_slice(), b"/", &listed.name].concat();
                match listed.entry {
                    Some(entry) if entry.attr.mode & libc::S_IFMT == libc::S_IFDIR => {
                        open.push((path, entry.nodeid));
                    }
                    Some(entry) if entry.attr.mode & libc::S_IFMT == libc::S_IFREG => {
                        let read = self.guest.read_all(entry.nodeid, 128 << 10);
                        found.insert(path, read.map_err(|e| e.errno()));
                    }
                    _ => {}
                }
            }
        }
        found
    }
}

fn ours(image: &Image, cache: &Path) -> Contents {
    Served::new(Path::new(RAFSD), image, cache).unwrap().contents()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        fs::copy(entry.path(), &to).unwrap();
        fs::set_permissions(&to, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
}

/// The same image with blobs that have their metadata and nothing else: all chunk data are gone.
fn without_data(image: &Image, to: &Path) -> Image {
    copy(&image.blobs, to);
    for blob in &Reader::open(&image.bootstrap).unwrap().superblock().blobs {
        let path = to.join(&blob.id);
        let size = fs::metadata(&path).unwrap().len();
        let end = match &blob.chunk_info {
            Some(info) if info.blob_id == blob.id => info.offset,
            _ => size.min(blob.data_end.max(1)),
        };
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&vec![0xFF; end as usize], 0).unwrap();
    }
    let inside = image.bootstrap.starts_with(&image.blobs);
    let bootstrap = if inside {
        to.join(image.bootstrap.file_name().unwrap())
    } else {
        image.bootstrap.clone()
    };
    Image {
        bootstrap,
        blobs: to.to_owned(),
    }
}

/// Files of a cache whose names end with `suffix`.
fn files(cache: &Path, suffix: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.to_string_lossy().ends_with(suffix))
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

/// nydusd answers before it has put everything into its cache: waits until nothing comes any more.
fn settle(cache: &Path) {
    let mut before = BTreeMap::new();
    for _ in 0..50 {
        let now = files(cache, "chunk_map");
        if now == before {
            return;
        }
        before = now;
        std::thread::sleep(Duration::from_millis(700));
    }
}

/// Damages each page of the data files that has something in it.
fn damage(cache: &Path) {
    let mut damaged = 0;
    for (path, mut bytes) in files(cache, ".blob.data") {
        for page in bytes.chunks_mut(4096) {
            if let Some(byte) = page.iter_mut().find(|byte| **byte != 0) {
                *byte ^= 0x10;
                damaged += 1;
            }
        }
        fs::write(&path, bytes).unwrap();
    }
    assert!(damaged > 0, "nothing was cached");
}

/// Serves an image from the cache that nydusd left: without a source what was read; with damaged data what is right.
fn check(image: &Image, cache: &Path, read: &dyn Fn(&[u8]) -> bool, what: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let expected = ours(image, &path("fresh"));
    assert!(
        expected
            .values()
            .any(|content| content.as_ref().is_ok_and(|bytes| bytes.len() > 10))
    );

    copy(cache, &path("used"));
    let gone = without_data(image, &path("blobs"));
    let seen = ours(&gone, &path("used"));
    for (name, content) in &expected {
        let shown = String::from_utf8_lossy(name);
        if read(name) {
            assert!(seen[name] == *content, "{what}: {shown} from the cache");
        } else {
            // An empty file needs no data.
            let empty = content.as_ref().is_ok_and(Vec::is_empty);
            assert!(seen[name].is_err() || empty, "{what}: {shown} from nowhere");
        }
    }

    copy(cache, &path("damaged"));
    damage(&path("damaged"));
    assert!(ours(image, &path("damaged")) == expected, "{what}: fetched again");
    // No source and no sound cache: an error, and no byte of either.
    copy(cache, &path("lost"));
    damage(&path("lost"));
    let seen = ours(&gone, &path("lost"));
    for (name, content) in &seen {
        let shown = String::from_utf8_lossy(name);
        assert!(
            content.is_err() || *content == expected[name],
            "{what}: {shown} is wrong"
        );
    }
    assert!(seen.values().any(Result::is_err), "{what}: nothing was lost");
}

#[test]
fn a_recorded_cache_of_nydusd_is_served_and_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interchange/nydusd.tar");
    let unpacked = Command::new("tar")
        .arg("--extract")
        .arg("--file")
        .arg(recorded)
        .arg("--directory")
        .arg(directory.path())
        .status()
        .unwrap();
    assert!(unpacked.success());
    let image = Image {
        bootstrap: directory.path().join("bootstrap"),
        blobs: directory.path().join("blobs"),
    };
    // It fetched all of so small a blob. The second half it shall not have had.
    let cache = directory.path().join("cache");
    let maps = files(&cache, "chunk_map");
    let (map, bytes) = maps.iter().next().unwrap();
    assert_eq!(bytes[4096..], [0b1111_1100]);
    fs::write(map, [&bytes[..4096], &[0b1110_0000]].concat()).unwrap();
    check(&image, &cache, &|path| path == b"/read", "recorded");
}

fn nydusd() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin/nydusd");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join("nydusd"))
        .chain([installed])
        .find(|path| path.exists());
    if found.is_none() {
        eprintln!("SKIPPED: no nydusd in PATH or target/peers/bin (make peers)");
    }
    found
}

#[test]
#[ignore = "makes nydusd.tar anew, with nydusd"]
fn record_a_cache_of_nydusd() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for name in ["read", "unread"] {
        let text: String = (0..1500).map(|n| format!("{name}{} ", n * n)).collect();
        fs::write(tree.join(name), &text[..10_000]).unwrap();
    }
    let options = ["--chunk-size", "4KiB"];
    let image = Image::build(env!("CARGO_BIN_EXE_rafs"), &tree, directory.path(), &options).unwrap();
    let cache = directory.path().join("cache");
    fs::create_dir(&cache).unwrap();
    let served = Served::new(&nydusd().unwrap(), &image, &cache).unwrap();
    assert_eq!(
        served.guest.read_file(format!("{LOWER}/read")).unwrap().len(),
        10_000
    );
    drop(served);
    let packed = Command::new("tar")
        .args([
            "--create",
            "--sparse",
            "--owner=0",
            "--group=0",
            "--mtime=@0",
            "--file",
        ])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interchange/nydusd.tar"))
        .arg("--directory")
        .arg(directory.path())
        .args(["bootstrap", "blobs", "cache"])
        .status()
        .unwrap();
    assert!(packed.success());
}

/// Kinds of images that nydusd caches in different ways.
const FIXTURES: [&str; 12] = [
    "v5-lz4-blake3",
    "v5-aligned",
    "v5-big-zstd",
    "v5-inline",
    "v6-none-sha256",
    "v6-zstd-64k",
    "v6-big-lz4",
    "v6-batch",
    "v6-encrypt-lz4",
    "v6-inline-toc",
    "v6-layered-oci",
    "v6-toc",
];

#[test]
fn caches_of_nydusd_are_served_and_not_believed() {
    let Some(nydusd) = nydusd() else { return };
    let Some(fixtures) = fixtures() else { return };
    let mut checked = 0;
    for name in FIXTURES {
        let image = image_of(&fixtures.join(name));
        let cache = tempfile::tempdir().unwrap();
        let served = Served::new(&nydusd, &image, cache.path());
        match served.as_ref().map(Served::contents) {
            Ok(seen) if seen.values().all(Result::is_ok) => {
                settle(cache.path());
                drop(served);
                check(&image, cache.path(), &|_| true, name);
                checked += 1;
            }
            Ok(_) => println!("{name}: nydusd could not read all of it"),
            Err(error) => println!("{name}: nydusd could not mount it: {error}"),
        }
    }
    assert!(checked >= 8, "{checked} caches");
}

fn image_of(fixture: &Path) -> Image {
    let blobs = fixture.join("blobs");
    let bootstrap = fixture.join("bootstrap");
    let smallest = || -> PathBuf {
        fs::read_dir(&blobs)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .min_by_key(|path| fs::metadata(path).unwrap().len())
            .unwrap()
    };
    Image {
        bootstrap: if bootstrap.exists() { bootstrap } else { smallest() },
        blobs,
    }
}
