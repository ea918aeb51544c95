//! The power goes at any moment: whatever reached the disk, every byte read afterwards is the origin's.
//!
//! The cache writes without syncing, so that after a power cut any set of pages may be there. A run is recorded as the sequence of pages that it
//! changed; then every prefix of it is put on the disk, with and without losing pages from it, and a store is started on that.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rafsd_backend::store::*;
use support::*;

const PAGE: usize = 4096;

/// The files of a blob, in the order in which a chunk is written to them.
fn files(dir: &Path, id: &str) -> [PathBuf; 3] {
    ["data", "data.stamps", "data.chunk_map"].map(|end| dir.join(format!("{id}.blob.{end}")))
}

/// One page that changed: of which file, where, and what it is now.
type Write = (usize, usize, Vec<u8>);

fn pages(before: &[u8], after: &[u8], file: usize) -> Vec<Write> {
    let old: Vec<_> = before.chunks(PAGE).collect();
    after
        .chunks(PAGE)
        .enumerate()
        .filter(|(at, page)| old.get(*at) != Some(page))
        .map(|(at, page)| (file, at * PAGE, page.to_vec()))
        // Words come before records in the file, and are written after them.
        .rev()
        .collect()
}

struct Recorded {
    dir: tempfile::TempDir,
    image: TestBlob,
    source: Arc<FaultySource>,
    sizes: [u64; 3],
    writes: Vec<Write>,
}

fn record() -> Recorded {
    let image = TestBlob::new(10, 9_000);
    let source = FaultySource::new(&image);
    let dir = tempfile::tempdir().unwrap();
    let paths = files(dir.path(), &image.id);
    let store = Store::new(StoreOptions::default()).unwrap();
    let blob = open(&store, &image, &source, dir.path());
    let mut writes = Vec::new();
    let mut seen: [Vec<u8>; 3] = Default::default();
    for index in [3, 4, 0, 9, 1, 2, 8, 5, 7, 6] {
        fetch(&blob, &[index]).unwrap();
        for (file, path) in paths.iter().enumerate() {
            let now = fs::read(path).unwrap();
            writes.extend(pages(&seen[file], &now, file));
            seen[file] = now;
        }
    }
    Recorded {
        sizes: seen.map(|bytes| bytes.len() as u64),
        dir,
        image,
        source,
        writes,
    }
}

fn open(store: &Store, image: &TestBlob, source: &Arc<FaultySource>, dir: &Path) -> Arc<Blob> {
    let cache = CacheConfig {
        amplify: 0,
        ..CacheConfig::new(dir)
    };
    store
        .open_blob_from(image.description(), source.clone(), &cache)
        .unwrap()
}

impl Recorded {
    /// The disk as it is found; the files themselves are the same ones. `rebooted`: in another boot of the host.
    fn restore<'a>(&self, writes: impl Iterator<Item = &'a Write>, rebooted: bool) {
        let opened: Vec<File> = files(self.dir.path(), &self.image.id)
            .iter()
            .map(|path| {
                OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(path)
                    .unwrap()
            })
            .collect();
        for (file, size) in opened.iter().zip(self.sizes) {
            // Not cut short: a thread of the store before may still have a look.
            file.write_all_at(&vec![0; size as usize], 0).unwrap();
        }
        for (file, at, page) in writes {
            opened[*file].write_all_at(page, *at as u64).unwrap();
            if rebooted && *file == 1 && *at == 0 {
                opened[1]
                    .write_all_at(b"00000000-1111-2222-3333-444444444444", 16)
                    .unwrap();
            }
        }
    }

    /// Starts a store on what is there, and reads everything. Returns how many chunks had to be fetched.
    fn check(&self, what: &str) -> usize {
        let before = self.source.requests().len();
        let store = Store::new(StoreOptions {
            decode_threads: 1,
            ..StoreOptions::default()
        })
        .unwrap();
        let blob = open(&store, &self.image, &self.source, self.dir.path());
        for (chunk, plain) in self.image.chunks.iter().zip(&self.image.plain) {
            let held = fetch(&blob, &[chunk.index]).unwrap();
            assert!(
                held.chunks.is_empty(),
                "{what}: chunk {} is not cached",
                chunk.index
            );
            assert!(read(&blob, chunk) == *plain, "{what}: chunk {}", chunk.index);
        }
        drop((blob, store));
        self.source.requests().len() - before
    }
}

#[test]
fn every_prefix_of_the_writes_with_and_without_losses() {
    let recorded = record();
    let count = recorded.writes.len();
    assert!(count > 40, "{count} pages");
    let mut random = 1u64;
    for cut in 0..=count {
        let prefix = || recorded.writes[..cut].iter();
        recorded.restore(prefix(), true);
        let fetched = recorded.check(&format!("the first {cut} pages"));
        assert!(cut < count || fetched == 0, "what is whole is not fetched again");
        // Some pages of what was written never arrived.
        let kept: Vec<_> = prefix()
            .filter(|_| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                random >> 62 != 0
            })
            .collect();
        recorded.restore(kept.into_iter(), true);
        recorded.check(&format!("three quarters of the first {cut} pages"));
    }
}

#[test]
fn every_prefix_of_the_writes_of_a_daemon_that_was_killed() {
    let recorded = record();
    for cut in 0..=recorded.writes.len() {
        recorded.restore(recorded.writes[..cut].iter(), false);
        recorded.check(&format!("the first {cut} pages, and the host goes on"));
    }
}

#[test]
fn a_daemon_that_is_killed_while_it_changes_a_chunk_leaves_it_to_the_next() {
    let recorded = record();
    recorded.restore(recorded.writes.iter(), false);
    // Chunk 4 is being filled by process 77, which is no more.
    let stamps = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&files(recorded.dir.path(), &recorded.image.id)[1])
        .unwrap();
    let mut word = [0; 8];
    stamps.read_exact_at(&mut word, 4096 + 4 * 8).unwrap();
    let version = (u64::from_le_bytes(word) >> 40) + 1;
    stamps
        .write_all_at(&(1 | 77 << 30 | version << 40).to_le_bytes(), 4096 + 4 * 8)
        .unwrap();
    let data = OpenOptions::new()
        .write(true)
        .open(&files(recorded.dir.path(), &recorded.image.id)[0])
        .unwrap();
    let torn = recorded.image.chunks[4].uncompressed_offset;
    data.write_all_at(&[0x55; 3000], torn).unwrap();
    assert_eq!(recorded.check("one chunk is torn"), 1);
}
