//! The quota of a cache directory, while it is used: by one store, and by several that know nothing of each other, as different
//! processes do (every store has its own locks and mappings).
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rafsd_backend::chunk::Compression;
use rafsd_backend::chunk::Digester;
use rafsd_backend::store::*;
use rafsd_backend::upkeep;
use support::*;

struct Site {
    dir: tempfile::TempDir,
    blob: TestBlob,
    source: Arc<FaultySource>,
}

fn site(count: u32, size: usize) -> Site {
    let blob = TestBlob::with(count, size, Compression::Lz4Block, Digester::Blake3);
    Site {
        dir: tempfile::tempdir().unwrap(),
        source: FaultySource::new(&blob),
        blob,
    }
}

impl Site {
    fn cache(&self, quota: u64) -> CacheConfig {
        CacheConfig {
            quota,
            amplify: 0,
            ..CacheConfig::new(self.dir.path())
        }
    }

    /// A store of its own, as another process would have.
    fn open(&self, cache: &CacheConfig) -> (Store, Arc<Blob>) {
        open(&self.blob, &self.source, cache)
    }

    fn data_size(&self) -> u64 {
        self.blob.description().uncompressed_size
    }
}

fn open(blob: &TestBlob, source: &Arc<FaultySource>, cache: &CacheConfig) -> (Store, Arc<Blob>) {
    let store = Store::new(StoreOptions {
        decode_threads: 2,
        ..StoreOptions::default()
    })
    .unwrap();
    let blob = store
        .open_blob_from(blob.description(), source.clone(), cache)
        .unwrap();
    (store, blob)
}

fn usage(dir: &Path) -> u64 {
    std::fs::read_dir(dir)
        .unwrap()
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}

/// Reads a chunk as a guest's read does: looks, reads, looks again; fetches what is absent. Tells whether it was there.
fn read_chunk(blob: &Arc<Blob>, image: &TestBlob, index: u32) -> bool {
    let (chunk, plain) = (&image.chunks[index as usize], &image.plain[index as usize]);
    let mut held = Held::default();
    for attempt in 0..50 {
        let generation = blob.generation();
        let version = blob.version(index);
        if version != 0 {
            let data = read(blob, chunk);
            if blob.generation() == generation || blob.version(index) == version {
                assert!(data == *plain, "chunk {index}");
                return attempt == 0;
            }
        }
        if let Some((_, data)) = held.chunks.iter().find(|(number, _)| *number == index) {
            assert!(**data == **plain, "held chunk {index}");
            return false;
        }
        held = fetch(blob, &[index]).unwrap();
    }
    panic!("chunk {index} was evicted 50 times before it was read");
}

/// Three stores, of which two have the same blob, read at random within a quarter of what they read.
fn read_at_random(time: Duration) {
    let first = site(96, 256 << 10);
    let mut second = site(96, 200 << 10);
    second.blob.id = format!("{}2", second.blob.id);
    second.source = FaultySource::new(&second.blob);
    let working_set = first.data_size() + second.data_size();
    let cache = first.cache(working_set / 4);
    // What is being written when the directory is looked at, by two threads of each store; then the ledgers.
    let unit = 3 * 2 * (256 << 10);
    let stores: Vec<_> = [&first, &first, &second]
        .map(|site| (site, open(&site.blob, &site.source, &cache)))
        .into();
    let (reads, hits, most) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let end = Instant::now() + time;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                most.fetch_max(usage(first.dir.path()), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let readers: Vec<_> = (0..6u64)
            .map(|number| {
                let (site, (_, blob)) = &stores[number as usize % stores.len()];
                let (reads, hits) = (&reads, &hits);
                scope.spawn(move || {
                    let mut random = number + 1;
                    while Instant::now() < end {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        // Half of the reads go to an eighth of the chunks.
                        let mut index = (random >> 33) as u32 % site.blob.chunks.len() as u32;
                        if random >> 63 == 0 {
                            index /= 8;
                        }
                        hits.fetch_add(read_chunk(blob, &site.blob, index).into(), Ordering::Relaxed);
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let outcomes: Vec<_> = readers
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        over.store(true, Ordering::Relaxed);
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
    });
    let (reads, hits) = (reads.into_inner(), hits.into_inner());
    let most = most.into_inner();
    eprintln!(
        "{reads} reads in {} s, {:.1} % found in the cache; quota {} KiB, most used {} KiB; {} of {} MiB fetched",
        time.as_secs(),
        100.0 * hits as f64 / reads as f64,
        cache.quota >> 10,
        most >> 10,
        (first.source.fetched() + second.source.fetched()) >> 20,
        working_set >> 20,
    );
    assert!(
        most <= cache.quota + unit,
        "{most} bytes used, allowed are {}",
        cache.quota
    );
    assert!(hits > 0, "nothing was ever found in the cache");
}

#[test]
fn random_reads_stay_within_a_quarter_and_are_right() {
    read_at_random(Duration::from_secs(4));
}

#[test]
#[ignore = "takes ten minutes"]
fn random_reads_stay_within_a_quarter_and_are_right_for_ten_minutes() {
    read_at_random(Duration::from_secs(600));
}

#[test]
fn what_one_process_evicts_is_absent_for_all() {
    let t = site(16, 256 << 10);
    let (_a, here) = t.open(&t.cache(0));
    fetch(&here, &[0, 1, 2, 3]).unwrap();
    let (generation, version) = (here.generation(), here.version(0));
    assert_ne!(version, 0);
    // The other one has a quota, and knows the chunks from the directory alone.
    let (_b, there) = t.open(&t.cache(3 << 20));
    for index in 4..16 {
        read_chunk(&there, &t.blob, index);
    }
    assert_ne!(here.generation(), generation);
    assert_eq!(here.version(0), 0, "least recently used");
    assert!(usage(t.dir.path()) <= 3 << 20);
    let (keeper, evictor) = (here.cache_metrics().unwrap(), there.cache_metrics().unwrap());
    assert_eq!(keeper.evicted_chunks, 0, "counted by the process that does it");
    assert!(evictor.evicted_chunks >= 4, "{evictor:?}");
    // The file system's own blocks come and go with them.
    let about = evictor.evicted_bytes / (256 << 10);
    assert!(about.abs_diff(evictor.evicted_chunks) <= 1, "{evictor:?}");
    assert_eq!((keeper.used, there.cache_quota()), (evictor.used, 3 << 20));
    for index in 0..4 {
        read_chunk(&here, &t.blob, index);
    }
    assert!(
        here.version(0) > version,
        "never the version that a reader has seen"
    );
}

#[test]
fn what_was_used_lately_stays() {
    let t = site(32, 256 << 10);
    let (_store, blob) = t.open(&t.cache(4 << 20));
    for index in 0..32 {
        read_chunk(&blob, &t.blob, index);
        // Times are a sixteenth of a second apart at least.
        std::thread::sleep(Duration::from_millis(70));
        assert!(
            read_chunk(&blob, &t.blob, 0) || index == 0,
            "chunk 0 was evicted after chunk {index}"
        );
    }
}

#[test]
fn what_somebody_is_about_to_read_stays() {
    let t = site(16, 256 << 10);
    let (_store, blob) = t.open(&t.cache(2 << 20));
    let held = fetch(&blob, &[0, 1, 2, 3]).unwrap();
    assert!(held.chunks.is_empty());
    let others: Vec<Held> = (4..16).map(|index| fetch(&blob, &[index]).unwrap()).collect();
    assert!((0..4).all(|index| blob.is_resident(index)));
    assert!(
        others.iter().any(|held| !held.chunks.is_empty()),
        "no room, so in memory"
    );
    assert!(usage(t.dir.path()) <= 2 << 20);
    drop((held, others));
    for index in 0..16 {
        read_chunk(&blob, &t.blob, index);
    }
}

#[test]
fn a_pinned_blob_stays_for_as_long_as_somebody_pins_it() {
    let pinned = site(8, 256 << 10);
    let mut t = site(24, 250 << 10);
    t.blob.id = format!("{}2", t.blob.id);
    t.source = FaultySource::new(&t.blob);
    let quota = CacheConfig {
        quota: 3 << 20,
        ..pinned.cache(0)
    };
    let (store, blob) = pinned.open(&CacheConfig {
        pin: true,
        ..quota.clone()
    });
    fetch(&blob, &(0..8).collect::<Vec<_>>()).unwrap();
    let (_store, other) = open(&t.blob, &t.source, &quota);
    for index in 0..24 {
        read_chunk(&other, &t.blob, index);
    }
    assert_eq!(blob.resident(), 8);
    assert!(other.resident() < 8);
    drop((store, blob));
    for index in 0..24 {
        read_chunk(&other, &t.blob, index);
    }
    assert!(other.resident() >= 8, "now its chunks could go");
}

#[test]
fn a_prefetch_evicts_nothing() {
    let t = site(32, 256 << 10);
    let (store, blob) = t.open(&t.cache(4 << 20));
    fetch(&blob, &[0, 1, 2, 3]).unwrap();
    let prefetch = store.prefetch(
        vec![Wish {
            blob: Arc::clone(&blob),
            wanted: Wanted::Whole,
        }],
        PrefetchOptions::default(),
    );
    let begin = Instant::now();
    while prefetch.progress().ended.is_none() {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{:?}",
            prefetch.progress()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!((0..4).all(|index| blob.is_resident(index)));
    assert!(usage(t.dir.path()) <= 4 << 20);
}

/// A small file system of its own; `None` where none can be mounted.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "rafsd-test"])
            .arg(dir.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(dir));
        }
        eprintln!("SKIPPED: no tmpfs can be mounted here");
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_costs_no_read_its_answer() {
    let Some(disk) = Tmpfs::new("1m") else { return };
    let t = site(16, 256 << 10);
    let (_store, blob) = t.open(&CacheConfig {
        amplify: 0,
        ..CacheConfig::new(disk.0.path())
    });
    for index in (0..16).chain(0..16) {
        read_chunk(&blob, &t.blob, index);
    }
    let resident = blob.resident();
    assert!(
        (1..4).contains(&resident),
        "{resident} chunks found room in a megabyte"
    );
    let late = t.open(&CacheConfig::new(disk.0.path())).1;
    for index in 0..16 {
        read_chunk(&late, &t.blob, index);
    }
}

#[test]
fn a_disk_that_is_full_from_the_start_costs_no_mount() {
    let Some(disk) = Tmpfs::new("64k") else { return };
    let _ = std::fs::write(disk.0.path().join("filler"), vec![1; 1 << 20]);
    let t = site(4, 256 << 10);
    let (_store, blob) = t.open(&CacheConfig::new(disk.0.path()));
    for index in 0..4 {
        read_chunk(&blob, &t.blob, index);
    }
    assert_eq!(blob.resident(), 0);
}

#[test]
fn a_directory_that_can_not_be_written_serves_what_it_has() {
    let Some(disk) = Tmpfs::new("8m") else { return };
    let t = site(8, 256 << 10);
    let cache = CacheConfig {
        amplify: 0,
        ..CacheConfig::new(disk.0.path())
    };
    let (store, blob) = t.open(&cache);
    fetch(&blob, &[0, 1, 2]).unwrap();
    drop((store, blob));
    // The last file closes with the store's threads.
    let begin = Instant::now();
    while !Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(disk.0.path())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
        .success()
    {
        assert!(begin.elapsed() < Duration::from_secs(20), "files stay open");
        std::thread::sleep(Duration::from_millis(50));
    }
    let asked = t.source.requests().len();
    let (_store, blob) = t.open(&cache);
    for index in 0..3 {
        read_chunk(&blob, &t.blob, index);
    }
    assert_eq!(t.source.requests().len(), asked);
    for index in 3..8 {
        read_chunk(&blob, &t.blob, index);
    }
    assert_eq!(blob.resident(), 3);
}

#[test]
fn a_directory_in_use_is_listed_and_made_smaller_from_outside() {
    let t = site(16, 256 << 10);
    let (store, blob) = t.open(&t.cache(0));
    fetch(&blob, &(0..12).collect::<Vec<_>>()).unwrap();
    let [listed] = &upkeep::list(t.dir.path()).unwrap()[..] else {
        panic!("one blob")
    };
    assert_eq!(
        (&listed.name, listed.size),
        (&t.blob.id, blob.description().uncompressed_size)
    );
    let chunks = listed.chunks.unwrap();
    assert_eq!((chunks.total, chunks.present, chunks.doubtful), (16, 12, 0));
    assert!(chunks.idle.unwrap() < Duration::from_secs(60) && !listed.pinned);
    let before = usage(t.dir.path());
    let collected = upkeep::collect(t.dir.path(), Some(1 << 20)).unwrap();
    assert!(
        usage(t.dir.path()) <= 1 << 20 && collected.used <= 1 << 20,
        "{collected:?}"
    );
    assert!(
        collected.chunks > 0 && collected.bytes > 0 && before > 1 << 20,
        "{collected:?}"
    );
    for index in 0..12 {
        read_chunk(&blob, &t.blob, index);
    }
    // As long as somebody has its files open they stay.
    upkeep::collect(t.dir.path(), Some(0)).unwrap();
    assert_eq!(upkeep::list(t.dir.path()).unwrap().len(), 1);
    drop((blob, store));
    let begin = Instant::now();
    // The threads of the store let go of the directory a little later.
    while upkeep::collect(t.dir.path(), Some(0)).unwrap().removed != [t.blob.id.clone()] {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(upkeep::list(t.dir.path()).unwrap().is_empty());
    assert!(
        upkeep::list(tempfile::tempdir().unwrap().path()).is_err(),
        "no cache"
    );
}

#[test]
fn damage_is_found_from_outside_and_fetched_again() {
    let t = site(8, 256 << 10);
    let (_store, blob) = t.open(&t.cache(0));
    fetch(&blob, &[0, 1, 2, 3]).unwrap();
    let good = upkeep::verify(t.dir.path(), false).unwrap();
    assert_eq!((good.good, good.unknown, good.damaged.len()), (4, 0, 0));
    let path = t.dir.path().join(format!("{}.blob.data", t.blob.id));
    let data = std::fs::File::options().write(true).open(path).unwrap();
    let place = t.blob.chunks[2].uncompressed_offset + 1000;
    std::os::unix::fs::FileExt::write_all_at(&data, b"damage", place).unwrap();
    let found = upkeep::verify(t.dir.path(), false).unwrap();
    assert_eq!(
        (found.good, &found.damaged, found.dropped),
        (3, &vec![(t.blob.id.clone(), 2)], 0)
    );
    assert!(blob.is_resident(2), "only looked at");
    assert_eq!(upkeep::verify(t.dir.path(), true).unwrap().dropped, 1);
    assert!(!blob.is_resident(2) && blob.is_resident(3));
    // Compares with what it should be.
    read_chunk(&blob, &t.blob, 2);
    assert_eq!(upkeep::verify(t.dir.path(), true).unwrap().good, 4);
}

#[test]
fn what_only_others_know_of_is_not_collected() {
    let t = site(8, 64 << 10);
    drop(t.open(&t.cache(0)));
    let map = t.dir.path().join(format!("{}.blob.data.chunk_map", t.blob.id));
    let map = std::fs::File::options().write(true).open(map).unwrap();
    let bits = |byte: u8| std::os::unix::fs::FileExt::write_all_at(&map, &[byte], 4096).unwrap();
    // The first chunk, as nydusd notes it.
    bits(0x80);
    let begin = Instant::now();
    let removed = || upkeep::collect(t.dir.path(), None).unwrap().removed;
    // The threads of the store let go of the directory a little later.
    let alone = || {
        let owner = std::fs::File::open(t.dir.path().join("rafsd.owner.0")).unwrap();
        owner.try_lock().is_ok()
    };
    while !alone() {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(removed(), Vec::<String>::new());
    bits(0);
    assert_eq!(removed(), std::slice::from_ref(&t.blob.id));
    assert!(upkeep::list(t.dir.path()).unwrap().is_empty());
}

#[test]
fn a_record_that_cannot_be_true_is_damage_and_goes() {
    let t = site(8, 64 << 10);
    let (_store, blob) = t.open(&t.cache(0));
    fetch(&blob, &[0, 1]).unwrap();
    let stamps = t.dir.path().join(format!("{}.blob.data.stamps", t.blob.id));
    let stamps = std::fs::File::options().write(true).open(stamps).unwrap();
    // The size in the record of chunk 1: behind a page of header and one of words.
    std::os::unix::fs::FileExt::write_all_at(&stamps, &[0xff; 4], 8192 + 48 + 40).unwrap();
    let found = upkeep::verify(t.dir.path(), false).unwrap();
    assert_eq!(
        (found.good, &found.damaged, found.dropped),
        (1, &vec![(t.blob.id.clone(), 1)], 0)
    );
    assert_eq!(upkeep::verify(t.dir.path(), true).unwrap().dropped, 1);
    assert!(blob.is_resident(0) && !blob.is_resident(1));
    read_chunk(&blob, &t.blob, 1);
    assert_eq!(upkeep::verify(t.dir.path(), false).unwrap().good, 2);
}
