//! Chunks in parallel, in order.
//!
//! ```text
//! feeder ── reads files, cuts chunks ──► workers ── digest, compress ──► sequencer ── stores, in feeding order
//!    ▲                                                                       │
//!    └───────────────────── slots (the memory of the pipeline) ◄─────────────┘
//! ```
//!
//! Memory is the fixed number of [`Slot`]s that go round: the feeder waits for a free one. The outcome does not
//! depend on the number of workers or on their timing: the sequencer takes chunks by ticket and alone decides
//! which of several equal chunks is stored, always the first. Workers only save themselves the compression of a
//! chunk that somebody with an earlier ticket has claimed already.

mod feed;
mod sequence;
mod work;

use std::num::NonZero;
use std::thread;

use backend::chunk::{Compression, Digester};

use super::Progress;
use super::error::BuildError;
use super::tree::InodeId;
pub(super) use feed::Feeder;
use sequence::sequence;
use work::{Shared, work};

/// Bytes that all slots together should not exceed.
const MEMORY: usize = 192 << 20;

/// Digest and size: two chunks for which both are equal are stored once.
pub(super) type Key = ([u8; 32], u32);

/// How chunks are made.
#[derive(Clone, Copy)]
pub(super) struct Settings {
    pub(super) compression: Compression,
    pub(super) level: i32,
    pub(super) digester: Digester,
    pub(super) chunk_size: u32,
    /// Number of workers; 0 for one per available core.
    pub(super) threads: usize,
}

/// Memory of one chunk on its way.
#[derive(Default)]
struct Slot {
    data: Vec<u8>,
    packed: Vec<u8>,
}

/// What a worker is given.
struct Job {
    ticket: u64,
    owner: InodeId,
    slot: Slot,
    /// The chunk is so many zeros, and the slot's data are not filled.
    zeros: Option<u32>,
}

/// What it makes of it.
struct Done {
    ticket: u64,
    owner: InodeId,
    slot: Slot,
    key: Key,
    crc32c: u32,
    stored: Stored,
}

enum Stored {
    /// Somebody with an earlier ticket has the same bytes.
    Elsewhere,
    Plain,
    Packed,
}

/// A chunk as the sequencer hands it on.
pub(super) struct Chunk<'s> {
    /// File that it is the next chunk of.
    pub(super) owner: InodeId,
    pub(super) key: Key,
    pub(super) crc32c: u32,
    /// Bytes to store and whether they are compressed; `None` if a chunk with this key came before, or was known.
    pub(super) stored: Option<(&'s [u8], bool)>,
}

/// Runs `feed` beside the workers and gives every chunk to `store` on the calling thread, in feeding order.
/// `known` are keys that `store` has a place for already.
pub(super) fn run<T: Send>(
    settings: Settings,
    known: impl Iterator<Item = Key>,
    progress: &dyn Progress,
    feed: impl FnOnce(&mut Feeder<'_>) -> Result<T, BuildError> + Send,
    mut store: impl FnMut(Chunk<'_>) -> Result<(), BuildError>,
) -> Result<T, BuildError> {
    let workers = match settings.threads {
        0 => thread::available_parallelism().map_or(1, NonZero::get),
        threads => threads,
    };
    let slots = (MEMORY / (2 * settings.chunk_size as usize)).clamp(2, 4 * workers + 4);
    let (free_sender, free) = crossbeam_channel::bounded(slots);
    for _ in 0..slots {
        // The channel has room for all of them.
        let _ = free_sender.send(Slot::default());
    }
    let (job_sender, jobs) = crossbeam_channel::bounded(slots);
    let (done_sender, done) = crossbeam_channel::bounded(slots);
    let shared = Shared::new(settings, known);

    thread::scope(|scope| {
        for _ in 0..workers {
            let (jobs, done, shared) = (jobs.clone(), done_sender.clone(), &shared);
            scope.spawn(move || work(shared, &jobs, &done));
        }
        drop((jobs, done_sender));
        let feeder =
            scope.spawn(move || feed(&mut Feeder::new(settings.chunk_size, free, job_sender, progress)));
        let sequenced = sequence(done, free_sender, &mut store);
        let fed = match feeder.join() {
            Ok(fed) => fed,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        match (sequenced, fed) {
            (Ok(()), fed) => fed,
            // A pipeline that was given up tells the feeder so; the reason is the sequencer's.
            (Err(e), _) => Err(e),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;

    use super::*;

    fn settings(threads: usize) -> Settings {
        Settings {
            compression: Compression::Zstd,
            level: 3,
            digester: Digester::Blake3,
            chunk_size: 0x1000,
            threads,
        }
    }

    /// Every third chunk repeats an earlier one.
    fn input() -> Vec<u8> {
        (0..300_u32)
            .flat_map(|chunk| {
                let seed = if chunk % 3 == 2 { chunk / 6 } else { chunk };
                (0..0x1000_u32).map(move |i| (i.wrapping_mul(seed).wrapping_add(i >> 3)) as u8)
            })
            .collect()
    }

    type Stored = Option<(Vec<u8>, bool)>;

    fn collect(threads: usize) -> Vec<(Key, Stored)> {
        let data = input();
        let mut chunks = Vec::new();
        let mut seen = std::collections::HashSet::new();
        run(
            settings(threads),
            std::iter::empty(),
            &(),
            |feeder| {
                feeder.stream(
                    InodeId::ROOT,
                    data.len() as u64,
                    Path::new("x"),
                    &mut data.as_slice(),
                )
            },
            |chunk| {
                let first = seen.insert(chunk.key);
                assert!(
                    !first || chunk.stored.is_some(),
                    "the first of its kind comes with its bytes"
                );
                let stored = chunk
                    .stored
                    .filter(|_| first)
                    .map(|(bytes, packed)| (bytes.to_vec(), packed));
                chunks.push((chunk.key, stored));
                Ok(())
            },
        )
        .unwrap();
        chunks
    }

    #[test]
    fn the_outcome_does_not_depend_on_the_number_of_workers() {
        let alone = collect(1);
        assert_eq!(alone.len(), 300);
        for threads in [2, 3, 8] {
            assert_eq!(collect(threads), alone);
        }
    }

    #[test]
    fn an_error_of_the_store_ends_the_feeder_too() {
        let data = input();
        let mut stored = 0;
        let error = run(
            settings(2),
            std::iter::empty(),
            &(),
            |feeder| {
                feeder.stream(
                    InodeId::ROOT,
                    data.len() as u64,
                    Path::new("x"),
                    &mut data.as_slice(),
                )
            },
            |_| {
                stored += 1;
                if stored == 5 {
                    Err(BuildError::Options("disk full".into()))
                } else {
                    Ok(())
                }
            },
        )
        .unwrap_err();
        assert_eq!(error.to_string(), "disk full");
    }

    #[test]
    fn a_stream_that_ends_early_is_named() {
        let error = run(
            settings(2),
            std::iter::empty(),
            &(),
            |feeder| {
                feeder.stream(
                    InodeId::ROOT,
                    10,
                    Path::new("short/file"),
                    &mut [1_u8; 7].as_slice(),
                )
            },
            |_| Ok(()),
        )
        .unwrap_err();
        assert!(error.to_string().contains("short/file"), "{error}");
    }

    #[test]
    fn holes_are_zeros_without_being_read_and_data_around_them_survive() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(b"head", 0).unwrap();
        file.write_all_at(b"middle", (1 << 25) + 0x800).unwrap();
        file.set_len(1 << 26).unwrap();
        let mut image = Vec::new();
        let mut contents = HashMap::new();
        run(
            Settings {
                compression: Compression::None,
                ..settings(2)
            },
            std::iter::empty(),
            &(),
            |feeder| feeder.file(InodeId::ROOT, 1 << 26, Path::new("sparse"), &file),
            |chunk| {
                if let Some((bytes, _)) = chunk.stored {
                    contents.entry(chunk.key).or_insert_with(|| bytes.to_vec());
                }
                image.extend_from_slice(&contents[&chunk.key]);
                Ok(())
            },
        )
        .unwrap();
        let mut expected = vec![0; 1 << 26];
        file.read_exact_at(&mut expected, 0).unwrap();
        assert_eq!(contents.len(), 3, "head, middle, zeros");
        assert!(image == expected);
    }
}
