//! Images that describe one blob in different ways, in one cache directory: one of them is wrong, perhaps on purpose. The others
//! read their own bytes all the same, whoever came first.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rafsd_backend::chunk::{BlobDescription, Compression, Digester};
use rafsd_backend::store::*;
use support::*;

const CHUNKS: u32 = 8;
const SIZE: usize = 40_000;

/// A blob, and one that has its id and geometry but other content.
fn blobs() -> (TestBlob, TestBlob) {
    let good = TestBlob::with(CHUNKS, SIZE, Compression::None, Digester::Blake3);
    let mut evil = TestBlob::with(CHUNKS, SIZE, Compression::None, Digester::Blake3);
    evil.id.clone_from(&good.id);
    for (chunk, plain) in evil.chunks.iter_mut().zip(&mut evil.plain) {
        plain.iter_mut().for_each(|byte| *byte = !*byte);
        chunk.digest = Some(*blake3::hash(plain).as_bytes());
    }
    evil.stored = evil.plain.concat();
    (good, evil)
}

/// A view of `blob` from a store of its own, as another daemon would have.
fn open(blob: &TestBlob, description: BlobDescription, dir: &Path) -> (Store, Arc<Blob>) {
    let store = Store::new(StoreOptions {
        decode_threads: 2,
        ..StoreOptions::default()
    })
    .unwrap();
    let cache = CacheConfig {
        amplify: 0,
        ..CacheConfig::new(dir)
    };
    let source = FaultySource::new(blob);
    let opened = store.open_blob_from(description, source, &cache).unwrap();
    (store, opened)
}

/// Reads a chunk as a guest's read does, and compares it.
fn check(blob: &Arc<Blob>, image: &TestBlob, index: u32) {
    let (chunk, plain) = (&image.chunks[index as usize], &image.plain[index as usize]);
    let mut held = Held::default();
    for _ in 0..1000 {
        let generation = blob.generation();
        let version = blob.version(index);
        if version != 0 {
            let data = read(blob, chunk);
            if blob.generation() == generation || blob.version(index) == version {
                assert!(data == *plain, "chunk {index} is not what its image says");
                return;
            }
        } else if let Some((_, data)) = held.chunks.iter().find(|(number, _)| *number == index) {
            assert!(**data == **plain, "held chunk {index} is not what its image says");
            return;
        }
        held = fetch(blob, &[index]).unwrap();
    }
    panic!("chunk {index} was lost again and again");
}

fn check_all(blob: &Arc<Blob>, image: &TestBlob) {
    (0..CHUNKS).for_each(|index| check(blob, image, index));
}

/// Ways to describe the blob so that chunks lie where another image has others.
fn layouts(good: &TestBlob, evil: &TestBlob) -> Vec<TestBlob> {
    let shifted = |places: &dyn Fn(usize) -> usize| {
        let mut blob = TestBlob {
            id: evil.id.clone(),
            stored: evil.stored.clone(),
            plain: evil.plain.clone(),
            chunks: evil.chunks.clone(),
            compression: evil.compression,
            digester: evil.digester,
        };
        let last = good.description().uncompressed_size;
        for (index, chunk) in blob.chunks.iter_mut().enumerate() {
            let place = good.chunks[places(index) % CHUNKS as usize].uncompressed_offset + index as u64 % 3;
            chunk.uncompressed_offset = place.min(last - u64::from(chunk.uncompressed_size));
        }
        blob
    };
    vec![
        shifted(&|index| index),
        shifted(&|index| index + 1),
        shifted(&|index| CHUNKS as usize - 1 - index),
        shifted(&|_| 3),
    ]
}

#[test]
fn chunks_in_the_place_of_others_change_nothing_for_those() {
    let (good, evil) = blobs();
    for (number, evil) in layouts(&good, &evil).iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let (_one, a) = open(&good, good.description(), dir.path());
        let (_two, b) = open(evil, evil.description(), dir.path());
        // Some of ours, all of theirs, the rest of ours, and what was ours already.
        for index in [0, 3, 4] {
            check(&a, &good, index);
        }
        check_all(&b, evil);
        check_all(&a, &good);
        check_all(&b, evil);
        check_all(&a, &good);
        // They come first, in a new directory; then everything once more by those who open it later.
        let dir = tempfile::tempdir().unwrap();
        let (_three, b) = open(evil, evil.description(), dir.path());
        check_all(&b, evil);
        let (_four, a) = open(&good, good.description(), dir.path());
        check_all(&a, &good);
        drop((a, b));
        let (_five, a) = open(&good, good.description(), dir.path());
        let (_six, b) = open(evil, evil.description(), dir.path());
        check_all(&a, &good);
        check_all(&b, evil);
        check_all(&a, &good);
        assert!(number < 4);
    }
}

#[test]
fn many_who_contradict_each_other_at_once_read_what_is_theirs() {
    let (good, evil) = blobs();
    let layouts = layouts(&good, &evil);
    let dir = tempfile::tempdir().unwrap();
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut run = |image| {
            let (path, end) = (dir.path(), &end);
            scope.spawn(move || {
                let mut state = 7u32;
                while !end.load(Ordering::Relaxed) {
                    let (_store, blob): (Store, Arc<Blob>) = open(image, TestBlob::description(image), path);
                    for _ in 0..40 {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        check(&blob, image, (state >> 16) % CHUNKS);
                    }
                }
            });
        };
        run(&good);
        layouts.iter().for_each(&mut run);
        run(&good);
        std::thread::sleep(Duration::from_secs(2));
        end.store(true, Ordering::Relaxed);
    });
}

#[test]
fn an_image_that_lies_about_the_size_of_a_blob_costs_no_other_image_its_cache() {
    let (good, _) = blobs();
    let honest = good.description();
    let lies = [
        BlobDescription {
            uncompressed_size: honest.uncompressed_size + 1,
            ..honest.clone()
        },
        BlobDescription {
            uncompressed_size: 1 << 40,
            ..honest.clone()
        },
        BlobDescription {
            chunk_count: CHUNKS + 100,
            ..honest.clone()
        },
    ];
    for lie in lies {
        let dir = tempfile::tempdir().unwrap();
        let (_one, b) = open(&good, lie.clone(), dir.path());
        check_all(&b, &good);
        let (_two, a) = open(&good, honest.clone(), dir.path());
        check_all(&a, &good);
        assert_eq!(a.resident(), CHUNKS, "cached, not held");
        // And the other way round, with both open.
        let dir = tempfile::tempdir().unwrap();
        let (_three, a) = open(&good, honest.clone(), dir.path());
        check(&a, &good, 1);
        let (_four, b) = open(&good, lie, dir.path());
        check_all(&b, &good);
        check_all(&a, &good);
        assert_eq!((a.resident(), b.resident()), (CHUNKS, CHUNKS));
        // The next daemon finds its own.
        drop(a);
        let (_five, a) = open(&good, honest.clone(), dir.path());
        let begin = Instant::now();
        while a.resident() < CHUNKS {
            assert!(begin.elapsed() < Duration::from_secs(20), "not recalled");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
