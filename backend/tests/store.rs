//! What the store promises, against a source that misbehaves.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rafsd_backend::chunk::{BlobDescription, Compression, Digester, IndexRange};
use rafsd_backend::config::DirConfig;
use rafsd_backend::store::*;
use support::*;

struct Setup {
    dir: tempfile::TempDir,
    blob: TestBlob,
    source: Arc<FaultySource>,
    store: Store,
}

fn setup(count: u32, size: usize) -> Setup {
    let blob = TestBlob::new(count, size);
    let source = FaultySource::new(&blob);
    let store = Store::new(StoreOptions {
        decode_threads: 2,
        ..StoreOptions::default()
    })
    .unwrap();
    Setup {
        dir: tempfile::tempdir().unwrap(),
        blob,
        source,
        store,
    }
}

impl Setup {
    fn cache(&self, amplify: u32) -> CacheConfig {
        CacheConfig {
            amplify,
            ..CacheConfig::new(self.dir.path().join("cache"))
        }
    }

    fn open(&self, amplify: u32) -> Arc<Blob> {
        self.store
            .open_blob_from(self.blob.description(), self.source.clone(), &self.cache(amplify))
            .unwrap()
    }

    fn check(&self, blob: &Blob, index: u32) {
        assert!(blob.is_resident(index), "chunk {index} is absent");
        assert!(
            read(blob, &self.blob.chunks[index as usize]) == self.blob.plain[index as usize],
            "chunk {index}"
        );
    }
}

/// Waits until so many chunks are there, with what came along.
fn until_resident(blob: &Blob, count: u32) {
    let begin = Instant::now();
    while blob.resident() < count {
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "only {} of {count}",
            blob.resident()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_was_asked_for_becomes_resident_and_is_right() {
    let t = setup(20, 50_000);
    let blob = t.open(0);
    assert!(!blob.is_resident(3));
    assert!(fetch(&blob, &[3, 4, 11]).unwrap().chunks.is_empty());
    for index in [3, 4, 11] {
        t.check(&blob, index);
    }
    assert_eq!(blob.resident(), 3);
    let c = &t.blob.chunks;
    let mut requests = t.source.requests();
    requests.sort_by_key(|r| r.start);
    let first = c[3].compressed_offset..c[5].compressed_offset;
    let second = c[11].compressed_offset..c[12].compressed_offset;
    assert_eq!(
        requests,
        [first, second],
        "neighbours in one request, nothing else"
    );
}

#[test]
fn every_codec_and_digest() {
    for compression in [
        Compression::None,
        Compression::Lz4Block,
        Compression::Gzip,
        Compression::Zstd,
    ] {
        for digester in [Digester::Blake3, Digester::Sha256] {
            let mut t = setup(1, 100);
            t.blob = TestBlob::with(5, 300_000, compression, digester);
            t.source = FaultySource::new(&t.blob);
            let blob = t.open(0);
            fetch(&blob, &[0, 1, 2, 3, 4]).unwrap();
            (0..5).for_each(|index| t.check(&blob, index));
        }
    }
}

#[test]
fn amplification_brings_neighbours_in_the_same_request() {
    let t = setup(40, 50_000);
    let blob = t.open(256 << 10);
    fetch(&blob, &[10]).unwrap();
    t.check(&blob, 10);
    assert_eq!(t.source.requests().len(), 1);
    assert!(t.source.fetched() <= 256 << 10);
    // The neighbours come behind the chunk that was asked for: wait for a fetch of all of them.
    let all: Vec<u32> = (0..40).collect();
    let before = t.source.fetched();
    fetch(&blob, &all).unwrap();
    all.iter().for_each(|&index| t.check(&blob, index));
    assert_eq!(t.source.fetched(), t.blob.stored.len() as u64, "no byte twice");
    assert!(before > u64::from(t.blob.chunks[10].compressed_size));
}

#[test]
fn one_flight_for_many_readers_and_views() {
    let t = setup(4, 100_000);
    let source: Arc<FaultySource> = Arc::clone(&t.source);
    source.stalled.store(true, Ordering::SeqCst);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(&t.blob.id), &t.blob.stored).unwrap();
    let blob = t.open(0);
    let waiting: Vec<_> = (0..50)
        .map(|_| start(&blob, &[2, 2, 1], Duration::from_secs(20)))
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    source.stalled.store(false, Ordering::SeqCst);
    for outcome in waiting {
        outcome.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    }
    assert_eq!(source.requests().len(), 1);
    t.check(&blob, 2);
}

#[test]
fn views_of_one_source_and_directory_share_what_is_fetched() {
    let t = setup(4, 100_000);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(&t.blob.id);
    std::fs::write(&file, &t.blob.stored).unwrap();
    let source = SourceConfig::Dir(DirConfig {
        dir: Some(dir.path().into()),
        ..DirConfig::default()
    });
    let a = t
        .store
        .open_blob(t.blob.description(), &source, &t.cache(0))
        .unwrap();
    let b = t
        .store
        .open_blob(t.blob.description(), &source, &t.cache(0))
        .unwrap();
    fetch(&a, &[0, 1, 2, 3]).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(!b.is_resident(1), "a view believes its own check only");
    fetch(&b, &[0, 1, 2, 3]).unwrap();
    (0..4).for_each(|index| t.check(&b, index));
}

#[test]
fn a_view_with_other_digests_is_not_fooled_by_the_first() {
    let t = setup(4, 100_000);
    let a = t.open(0);
    fetch(&a, &[1]).unwrap();
    drop(a);
    let mut other = TestBlob::new(4, 100_000);
    other.id = t.blob.id.clone();
    other.chunks[1].digest = Some([7; 32]);
    let b = t
        .store
        .open_blob_from(other.description(), t.source.clone(), &t.cache(0))
        .unwrap();
    let error = fetch(&b, &[1]).unwrap_err();
    assert!(error.reason.contains("digest"), "{error}");
    assert!(!b.is_resident(1));
}

#[test]
fn a_stalled_source_costs_each_waiter_its_deadline_and_no_more() {
    let t = setup(4, 100_000);
    t.source.stalled.store(true, Ordering::SeqCst);
    let blob = t.open(0);
    let patient = start(&blob, &[1], Duration::from_secs(20));
    let begin = Instant::now();
    let hasty = start(&blob, &[1, 2], Duration::from_millis(200));
    let error = hasty.recv_timeout(Duration::from_secs(15)).unwrap().unwrap_err();
    assert!(
        error.timed_out && begin.elapsed() < Duration::from_secs(15),
        "{error}"
    );
    t.source.stalled.store(false, Ordering::SeqCst);
    patient.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    t.check(&blob, 1);
}

#[test]
fn a_broken_source_is_asked_until_it_heals() {
    let t = setup(4, 100_000);
    t.source.broken.store(true, Ordering::SeqCst);
    let blob = t.open(0);
    let outcome = start(&blob, &[0], Duration::from_secs(20));
    let error = start(&blob, &[0], Duration::from_millis(300))
        .recv()
        .unwrap()
        .unwrap_err();
    assert!(
        error.timed_out && error.reason.contains("broken on purpose"),
        "{error}"
    );
    t.source.broken.store(false, Ordering::SeqCst);
    outcome.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
    assert!(t.source.requests().len() > 2);
    t.check(&blob, 0);
}

#[test]
fn nobody_waiting_nobody_asking() {
    let t = setup(4, 100_000);
    t.source.broken.store(true, Ordering::SeqCst);
    let blob = t.open(1 << 20);
    start(&blob, &[0], Duration::from_millis(100))
        .recv()
        .unwrap()
        .unwrap_err();
    std::thread::sleep(Duration::from_millis(2500));
    let asked = t.source.requests().len();
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(t.source.requests().len(), asked);
    t.source.broken.store(false, Ordering::SeqCst);
    fetch(&blob, &[0]).unwrap();
}

#[test]
fn a_denial_fails_early_and_heals() {
    let t = setup(4, 100_000);
    t.source.denied.store(true, Ordering::SeqCst);
    let blob = t.open(0);
    let begin = Instant::now();
    let error = fetch(&blob, &[0]).unwrap_err();
    assert!(!error.timed_out && error.reason.contains("denied"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(18));
    t.source.denied.store(false, Ordering::SeqCst);
    fetch(&blob, &[0]).unwrap();
    t.check(&blob, 0);
}

#[test]
fn one_damaged_answer_is_asked_for_again() {
    let t = setup(4, 100_000);
    *t.source.corrupt.lock().unwrap() = Some((t.blob.chunks[1].compressed_offset + 20, 1));
    let blob = t.open(0);
    fetch(&blob, &[0, 1, 2]).unwrap();
    (0..3).for_each(|index| t.check(&blob, index));
    assert_eq!(t.source.requests().len(), 2);
}

#[test]
fn a_damaged_chunk_fails_its_readers_only_until_the_source_heals() {
    for compression in [Compression::None, Compression::Lz4Block, Compression::Zstd] {
        let mut t = setup(1, 100);
        t.blob = TestBlob::with(4, 100_000, compression, Digester::Blake3);
        t.source = FaultySource::new(&t.blob);
        *t.source.corrupt.lock().unwrap() = Some((t.blob.chunks[1].compressed_offset + 20, usize::MAX));
        let blob = t.open(0);
        let (good, bad) = (
            start(&blob, &[0, 2], Duration::from_secs(20)),
            start(&blob, &[1, 3], Duration::from_secs(20)),
        );
        good.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
        let error = bad.recv_timeout(Duration::from_secs(10)).unwrap().unwrap_err();
        assert!(error.reason.contains("chunk 1"), "{error}");
        assert!(!blob.is_resident(1));
        *t.source.corrupt.lock().unwrap() = None;
        fetch(&blob, &[1]).unwrap();
        t.check(&blob, 1);
    }
}

#[test]
fn a_connection_that_breaks_again_and_again_still_makes_progress() {
    let t = setup(3, 200_000);
    *t.source.cut.lock().unwrap() = Some(20_000);
    let blob = t.open(0);
    fetch(&blob, &[0, 1, 2]).unwrap();
    (0..3).for_each(|index| t.check(&blob, index));
    for pair in t.source.requests().windows(2) {
        assert_eq!(pair[1].start, pair[0].start + 20_000, "continues where it broke");
    }
}

#[test]
fn residency_survives_the_process_without_the_source() {
    let t = setup(30, 50_000);
    let blob = t.open(0);
    fetch(&blob, &(0..30).collect::<Vec<_>>()).unwrap();
    drop(blob);
    t.source.broken.store(true, Ordering::SeqCst);
    let asked = t.source.requests().len();
    let store = Store::new(StoreOptions::default()).unwrap();
    let blob = store
        .open_blob_from(t.blob.description(), t.source.clone(), &t.cache(0))
        .unwrap();
    fetch(&blob, &[17]).unwrap();
    until_resident(&blob, 30);
    (0..30).for_each(|index| t.check(&blob, index));
    assert_eq!(t.source.requests().len(), asked);
}

#[test]
fn after_a_host_crash_data_are_hashed_before_they_are_believed() {
    let t = setup(10, 50_000);
    let blob = t.open(0);
    fetch(&blob, &(0..10).collect::<Vec<_>>()).unwrap();
    drop(blob);
    // Another boot, and the data of chunk 4 never reached the disk.
    let files = t.dir.path().join("cache");
    let stamps = files.join(format!("{}.blob.data.stamps", t.blob.id));
    let mut bytes = std::fs::read(&stamps).unwrap();
    bytes[16..52].copy_from_slice(b"00000000-0000-0000-0000-000000000000");
    std::fs::write(&stamps, bytes).unwrap();
    let data = files.join(format!("{}.blob.data", t.blob.id));
    let mut bytes = std::fs::read(&data).unwrap();
    let lost = t.blob.chunks[4].uncompressed_offset as usize;
    bytes[lost..lost + 4096].fill(0);
    std::fs::write(&data, bytes).unwrap();
    let asked = t.source.requests().len();
    let store = Store::new(StoreOptions::default()).unwrap();
    let blob = store
        .open_blob_from(t.blob.description(), t.source.clone(), &t.cache(0))
        .unwrap();
    for index in 0..10 {
        fetch(&blob, &[index]).unwrap();
        t.check(&blob, index);
    }
    assert_eq!(
        t.source.requests().len(),
        asked + 1,
        "only the lost chunk is fetched"
    );
}

#[test]
fn a_cache_directory_of_nydusd_is_used_after_verification() {
    let t = setup(9, 50_000);
    let cache = t.dir.path().join("cache");
    std::fs::create_dir(&cache).unwrap();
    let size = t.blob.description().uncompressed_size as usize;
    let mut data = vec![0; size];
    for (chunk, plain) in t
        .blob
        .chunks
        .iter()
        .zip(&t.blob.plain)
        .filter(|(chunk, _)| chunk.index != 8)
    {
        let at = chunk.uncompressed_offset as usize;
        data[at..at + plain.len()].copy_from_slice(plain);
    }
    std::fs::write(cache.join(format!("{}.blob.data", t.blob.id)), data).unwrap();
    let mut map = vec![0u8; 4096 + 2];
    map[..12].copy_from_slice(b"PAMB\x01\0\0\0PAMC");
    map[4096] = 0b1110_1111;
    map[4097] = 0b1000_0000; // a lie: chunk 8 was never written
    std::fs::write(cache.join(format!("{}.blob.data.chunk_map", t.blob.id)), map).unwrap();
    let blob = t.open(0);
    for index in 0..9 {
        fetch(&blob, &[index]).unwrap();
        t.check(&blob, index);
    }
    assert_eq!(t.source.requests().len(), 2, "chunks 3 and 8");
    let map = std::fs::read(cache.join(format!("{}.blob.data.chunk_map", t.blob.id))).unwrap();
    assert_eq!(map[4096..], [0xff, 0x80]);
}

#[test]
fn a_deleted_data_file_takes_its_stamps_with_it() {
    let t = setup(3, 50_000);
    let blob = t.open(0);
    fetch(&blob, &[0, 1, 2]).unwrap();
    drop(blob);
    std::fs::remove_file(
        t.dir
            .path()
            .join("cache")
            .join(format!("{}.blob.data", t.blob.id)),
    )
    .unwrap();
    let store = Store::new(StoreOptions::default()).unwrap();
    let blob = store
        .open_blob_from(t.blob.description(), t.source.clone(), &t.cache(0))
        .unwrap();
    for index in 0..3 {
        fetch(&blob, &[index]).unwrap();
        t.check(&blob, index);
    }
}

#[test]
fn without_a_cache_to_write_chunks_are_held() {
    let t = setup(6, 50_000);
    let full = CacheConfig {
        amplify: 0,
        ..CacheConfig::new("/proc/no-cache-here")
    };
    let blob = t
        .store
        .open_blob_from(t.blob.description(), t.source.clone(), &full)
        .unwrap();
    let held = fetch(&blob, &[1, 4]).unwrap();
    assert_eq!(held.chunks.len(), 2);
    for (index, data) in &held.chunks {
        assert!(**data == *t.blob.plain[*index as usize]);
    }
    assert!(!blob.is_resident(1));
    let asked = t.source.requests().len();
    assert_eq!(fetch(&blob, &[1]).unwrap().chunks.len(), 1);
    assert_eq!(
        t.source.requests().len(),
        asked,
        "kept for those who read piece by piece"
    );
}

#[test]
fn the_chunk_index_is_fetched_once_and_kept() {
    let mut t = setup(4, 50_000);
    let index = pattern(99, 9000);
    let range = IndexRange {
        blob_id: t.blob.id.clone(),
        offset: t.blob.stored.len() as u64,
        size: 9000,
    };
    t.blob.stored.extend_from_slice(&index);
    t.source = FaultySource::new(&t.blob);
    *t.source.corrupt.lock().unwrap() = Some((range.offset + 5, 1));
    let describe = || t.blob.description_with(Some((range.clone(), index.clone())));
    let blob = t
        .store
        .open_blob_from(describe(), t.source.clone(), &t.cache(0))
        .unwrap();
    let waiting: Vec<_> = (0..4)
        .map(|index| start(&blob, &[index], Duration::from_secs(20)))
        .collect();
    waiting
        .iter()
        .for_each(|outcome| drop(outcome.recv_timeout(Duration::from_secs(10)).unwrap().unwrap()));
    let indexes = t
        .source
        .requests()
        .iter()
        .filter(|r| r.start == range.offset)
        .count();
    assert_eq!(indexes, 2, "once damaged, once good");
    t.source.broken.store(true, Ordering::SeqCst);
    let store = Store::new(StoreOptions::default()).unwrap();
    let blob = store
        .open_blob_from(describe(), t.source.clone(), &t.cache(0))
        .unwrap();
    fetch(&blob, &[0, 1, 2, 3]).unwrap();
    (0..4).for_each(|index| t.check(&blob, index));
}

#[test]
fn descriptions_that_make_no_sense_are_refused() {
    let mut t = setup(4, 50_000);
    let size = t.blob.description().uncompressed_size;
    t.blob.chunks[0].uncompressed_size = 17 << 20;
    t.blob.chunks[1].compressed_offset = u64::MAX - 3;
    t.blob.chunks[2].uncompressed_offset = 1 << 40;
    t.blob.chunks[3].digest = None;
    let description = BlobDescription {
        uncompressed_size: size,
        ..t.blob.description()
    };
    let blob = t
        .store
        .open_blob_from(description, t.source.clone(), &t.cache(1 << 20))
        .unwrap();
    for index in 0..5 {
        fetch(&blob, &[index]).unwrap_err();
    }
    assert!(t.source.requests().is_empty());
    let mut description = t.blob.description();
    description.id = "../escape".into();
    assert!(
        t.store
            .open_blob_from(description, t.source.clone(), &t.cache(0))
            .is_err()
    );
}

#[test]
fn a_batch_is_fetched_once_for_all_its_chunks() {
    for compressed in [true, false] {
        let mut t = setup(1, 100);
        t.blob = TestBlob::batched(30, 2000, 10, compressed);
        t.source = FaultySource::new(&t.blob);
        let blob = t.open(0);
        fetch(&blob, &[14]).unwrap();
        until_resident(&blob, 10);
        (10..20).for_each(|index| t.check(&blob, index));
        fetch(&blob, &(0..30).collect::<Vec<_>>()).unwrap();
        (0..30).for_each(|index| t.check(&blob, index));
        assert_eq!(t.source.fetched(), t.blob.stored.len() as u64);
    }
}

#[test]
fn a_damaged_chunk_of_a_batch_leaves_the_others_alone() {
    let mut t = setup(1, 100);
    t.blob = TestBlob::batched(10, 2000, 10, false);
    t.source = FaultySource::new(&t.blob);
    *t.source.corrupt.lock().unwrap() = Some((3 * 2000 + 5, usize::MAX));
    let blob = t.open(0);
    let (good, bad) = (
        start(&blob, &[2], Duration::from_secs(9)),
        start(&blob, &[3], Duration::from_secs(9)),
    );
    good.recv().unwrap().unwrap();
    bad.recv().unwrap().unwrap_err();
    t.check(&blob, 2);
}

#[test]
fn a_slice_of_a_gzip_stream_is_fetched_once_for_all_its_chunks() {
    let mut t = setup(1, 100);
    t.blob = TestBlob::sliced(12, 3000);
    t.source = FaultySource::new(&t.blob);
    let blob = t.open(0);
    fetch(&blob, &[3]).unwrap();
    until_resident(&blob, 12);
    (0..12).for_each(|index| t.check(&blob, index));
    assert_eq!(t.source.requests().len(), 1);
}

#[test]
fn a_fetch_of_nothing_is_done() {
    let t = setup(1, 5000);
    assert!(fetch(&t.open(0), &[]).unwrap().chunks.is_empty());
}
