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

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::num::NonZero;
use std::path::Path;
use std::thread;

use backend::chunk::{Compression, Digester};
use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use super::Progress;
use super::codec::{Packer, digest};
use super::error::BuildError;
use super::tree::InodeId;

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
    let shared = Shared {
        settings,
        claims: Mutex::new(known.map(|key| (key, 0)).collect()),
        zeros: Mutex::default(),
    };

    thread::scope(|scope| {
        for _ in 0..workers {
            let (jobs, done, shared) = (jobs.clone(), done_sender.clone(), &shared);
            scope.spawn(move || work(shared, &jobs, &done));
        }
        drop((jobs, done_sender));
        let feeder = scope.spawn(move || {
            feed(&mut Feeder {
                chunk_size: settings.chunk_size,
                free,
                jobs: job_sender,
                ticket: 0,
                progress,
            })
        });
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

/// Takes finished chunks in the order of their tickets. Returns early with an error; dropping the channels ends
/// the workers and the feeder.
fn sequence(
    done: Receiver<Result<Done, BuildError>>,
    free: Sender<Slot>,
    store: &mut dyn FnMut(Chunk<'_>) -> Result<(), BuildError>,
) -> Result<(), BuildError> {
    let mut early = BTreeMap::new();
    let mut next = 1;
    for finished in done {
        let finished = finished?;
        early.insert(finished.ticket, finished);
        while let Some(Done {
            owner,
            slot,
            key,
            crc32c,
            stored,
            ..
        }) = early.remove(&next)
        {
            let stored = match stored {
                Stored::Elsewhere => None,
                Stored::Plain => Some((slot.data.as_slice(), false)),
                Stored::Packed => Some((slot.packed.as_slice(), true)),
            };
            store(Chunk {
                owner,
                key,
                crc32c,
                stored,
            })?;
            next += 1;
            // Nobody takes it when the feeder is through.
            let _ = free.send(slot);
        }
    }
    Ok(())
}

struct Shared {
    settings: Settings,
    /// Lowest ticket that was seen with a key.
    claims: Mutex<HashMap<Key, u64>>,
    /// Digest and CRC of runs of zeros, by length.
    zeros: Mutex<HashMap<u32, ([u8; 32], u32)>>,
}

impl Shared {
    /// Whether the holder of `ticket` has to provide the bytes for `key`.
    fn claim(&self, key: Key, ticket: u64) -> bool {
        let mut claims = self.claims.lock();
        let first = claims.entry(key).or_insert(ticket);
        if *first < ticket {
            return false;
        }
        *first = ticket;
        true
    }
}

fn work(shared: &Shared, jobs: &Receiver<Job>, done: &Sender<Result<Done, BuildError>>) {
    let mut packer = match Packer::new(shared.settings.compression, shared.settings.level) {
        Ok(packer) => packer,
        Err(e) => {
            let _ = done.send(Err(e));
            return;
        }
    };
    for job in jobs {
        if done.send(process(shared, &mut packer, job)).is_err() {
            return; // given up
        }
    }
}

fn process(shared: &Shared, packer: &mut Packer, job: Job) -> Result<Done, BuildError> {
    let Job {
        ticket,
        owner,
        mut slot,
        zeros,
    } = job;
    let fill = |slot: &mut Slot, size: u32| {
        slot.data.clear();
        slot.data.resize(size as usize, 0);
    };
    let sum = |data: &[u8]| (digest(shared.settings.digester, data), crc32c::crc32c(data));
    let (size, (digest, crc32c)) = match zeros {
        Some(size) => {
            let known = shared.zeros.lock().get(&size).copied();
            let sums = known.unwrap_or_else(|| {
                fill(&mut slot, size);
                let sums = sum(&slot.data);
                shared.zeros.lock().insert(size, sums);
                sums
            });
            (size, sums)
        }
        None => (slot.data.len() as u32, sum(&slot.data)),
    };
    let key = (digest, size);
    let stored = if !shared.claim(key, ticket) {
        Stored::Elsewhere
    } else {
        if zeros.is_some() {
            fill(&mut slot, size);
        }
        if packer.pack(&slot.data, &mut slot.packed)? {
            Stored::Packed
        } else {
            Stored::Plain
        }
    };
    Ok(Done {
        ticket,
        owner,
        slot,
        key,
        crc32c,
        stored,
    })
}

/// The entrance of the pipeline.
pub(super) struct Feeder<'p> {
    chunk_size: u32,
    free: Receiver<Slot>,
    jobs: Sender<Job>,
    ticket: u64,
    progress: &'p dyn Progress,
}

impl Feeder<'_> {
    /// Cuts `size` bytes of `data` into the chunks of file `owner`. `path` is for messages.
    pub(super) fn stream(
        &mut self,
        owner: InodeId,
        size: u64,
        path: &Path,
        data: &mut dyn Read,
    ) -> Result<(), BuildError> {
        let mut left = size;
        while left > 0 {
            let want = left.min(u64::from(self.chunk_size)) as u32;
            self.chunk(
                owner,
                want,
                |buffer| read_full(data, buffer).map_err(BuildError::io("read", path)),
                path,
            )?;
            left -= u64::from(want);
        }
        Ok(())
    }

    /// The same for an open file of the host; chunks that lie in a hole are not read.
    pub(super) fn file(
        &mut self,
        owner: InodeId,
        size: u64,
        path: &Path,
        file: &std::fs::File,
    ) -> Result<(), BuildError> {
        use rustix::fs::{SeekFrom, seek};
        // Everything before this offset is known to be data.
        let mut hole_search_from = 0;
        // The hole found last.
        let mut hole = 0..0;
        let mut offset = 0;
        while offset < size {
            let want = (size - offset).min(u64::from(self.chunk_size)) as u32;
            let end = offset + u64::from(want);
            // One chunk is read faster than asked about.
            if size > u64::from(self.chunk_size) && offset >= hole_search_from {
                let data = match seek(file, SeekFrom::Data(offset)) {
                    Ok(data) => data,
                    Err(rustix::io::Errno::NXIO) => size,
                    Err(_) => offset, // the file system cannot tell
                };
                hole = offset..data;
                hole_search_from = match seek(file, SeekFrom::Hole(data.min(size.saturating_sub(1)))) {
                    Ok(next) if data < size => next.max(end),
                    _ => end.max(data),
                };
            }
            if hole.start <= offset && end <= hole.end {
                self.zeros(owner, want)?;
            } else {
                self.chunk(
                    owner,
                    want,
                    |buffer| read_full_at(file, buffer, offset, path),
                    path,
                )?;
            }
            offset = end;
        }
        Ok(())
    }

    fn chunk(
        &mut self,
        owner: InodeId,
        size: u32,
        read: impl FnOnce(&mut [u8]) -> Result<usize, BuildError>,
        path: &Path,
    ) -> Result<(), BuildError> {
        let mut slot = self.slot()?;
        slot.data.resize(size as usize, 0);
        let got = read(&mut slot.data)?;
        if got != size as usize {
            return Err(BuildError::Changed {
                path: path.to_path_buf(),
                reason: format!("it ends {} bytes before its size", size as usize - got),
            });
        }
        self.send(owner, slot, None, size)
    }

    fn zeros(&mut self, owner: InodeId, size: u32) -> Result<(), BuildError> {
        let slot = self.slot()?;
        self.send(owner, slot, Some(size), size)
    }

    fn slot(&self) -> Result<Slot, BuildError> {
        self.free.recv().map_err(|_| BuildError::GivenUp)
    }

    fn send(&mut self, owner: InodeId, slot: Slot, zeros: Option<u32>, size: u32) -> Result<(), BuildError> {
        self.ticket += 1;
        self.jobs
            .send(Job {
                ticket: self.ticket,
                owner,
                slot,
                zeros,
            })
            .map_err(|_| BuildError::GivenUp)?;
        self.progress.read(u64::from(size));
        Ok(())
    }
}

/// Reads until `buffer` is full or the data end; the number of bytes read.
fn read_full(data: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match data.read(rest) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

fn read_full_at(
    file: &std::fs::File,
    buffer: &mut [u8],
    offset: u64,
    path: &Path,
) -> Result<usize, BuildError> {
    use std::os::unix::fs::FileExt;
    let mut got = 0;
    while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(BuildError::io("read", path)(e)),
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
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
