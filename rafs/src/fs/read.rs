//! Reading file data: what is resident goes from the cache file to the guest, the rest is named.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Instant;

use backend::store::{Blob, FetchError, Held, Priority};
use fuse_backend_rs::api::filesystem::ZeroCopyWriter;

use super::{Absent, HeldChunks, RafsFs, ReadOutcome};
use crate::error::Damaged;
use crate::inode::Kind;
use crate::plan::{Piece, Plan, Segment};
use crate::sys::CacheFile;

/// Neighbouring ranges of one cache file, read at once.
struct Run<'a> {
    blob: &'a Blob,
    /// Position of the blob in the blob table.
    position: usize,
    /// The blob's generation before residency was looked up.
    generation: u64,
    offset: u64,
    size: usize,
}

impl Run<'_> {
    fn is_continued_by(&self, segment: &Segment) -> bool {
        self.position == segment.blob && self.offset + self.size as u64 == segment.offset
    }

    /// Writes the run. Notes if chunks of the blob were evicted meanwhile, so that what was written may be holes.
    fn write(self, sink: &mut dyn Sink, seen: &mut Seen) -> io::Result<()> {
        let mut done = 0;
        while done < self.size {
            match sink.copy(self.blob.file(), self.size - done, self.offset + done as u64) {
                // Resident chunks are complete, and the caller's buffers are large enough.
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EIO)),
                Ok(written) => done += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        seen.changed |= self.blob.generation() != self.generation;
        Ok(())
    }
}

/// What a read relied on.
#[derive(Default)]
struct Seen {
    /// Sum of the versions of the chunks read from cache files. Versions of a chunk only grow, so that an equal sum means equal versions.
    versions: u64,
    /// Chunks of one of the blobs were evicted while it was read; perhaps others.
    changed: bool,
}

/// Where data go.
trait Sink {
    /// Bytes that it can still take.
    fn space(&self) -> usize;

    /// Takes at most `count` bytes at `offset` of `file`; tells how many.
    fn copy(&mut self, file: BorrowedFd<'_>, count: usize, offset: u64) -> io::Result<usize>;

    /// Takes all of `bytes`.
    fn take(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// A reply to a guest.
struct Reply<'a>(&'a mut dyn ZeroCopyWriter);

impl Sink for Reply<'_> {
    fn space(&self) -> usize {
        self.0.available_bytes()
    }

    fn copy(&mut self, file: BorrowedFd<'_>, count: usize, offset: u64) -> io::Result<usize> {
        self.0.write_from(&mut CacheFile(file), count, offset)
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }
}

/// Memory of our own: what is not filled yet.
impl Sink for &mut [u8] {
    fn space(&self) -> usize {
        self.len()
    }

    fn copy(&mut self, file: BorrowedFd<'_>, count: usize, offset: u64) -> io::Result<usize> {
        let (here, _) = self.split_at_mut(count.min(self.len()));
        let read = rustix::io::pread(file, here, offset)?;
        *self = std::mem::take(self).split_at_mut(read).1;
        Ok(read)
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(self, bytes)
    }
}

impl RafsFs {
    /// Reads `size` bytes at `offset` of `inode` into `w`. Memory and page cache only; no allocation when all is
    /// resident, which is checked before the first byte is written. `held` is what the last fetch gave.
    ///
    /// Errors: EISDIR, EINVAL for what is no regular file, EIO for damaged metadata and for a cache
    /// file that cannot be read.
    pub fn read(
        &self,
        inode: u64,
        offset: u64,
        size: u32,
        held: &HeldChunks,
        w: &mut dyn ZeroCopyWriter,
    ) -> io::Result<ReadOutcome> {
        self.read_to(inode, offset, size.into(), held, &mut Reply(w))
    }

    /// Reads into `buffer` as much as there is, and waits for what is absent until `deadline`. For tools: a thread
    /// that answers guests must not wait.
    ///
    /// Errors: as [`RafsFs::read`], and one with the reason if chunks cannot be fetched.
    pub fn read_waiting(
        &self,
        inode: u64,
        offset: u64,
        buffer: &mut [u8],
        deadline: Instant,
    ) -> io::Result<usize> {
        let mut held = HeldChunks::default();
        loop {
            let mut rest = &mut *buffer;
            let size = rest.len() as u64;
            match self.read_to(inode, offset, size, &held, &mut rest)? {
                ReadOutcome::Done(count) => return Ok(count),
                ReadOutcome::Absent(_) if Instant::now() >= deadline => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                ReadOutcome::Absent(absent) => {
                    let (sender, receiver) = mpsc::channel();
                    // The receiver waits for the one answer.
                    self.fetch(
                        absent,
                        deadline,
                        Box::new(move |result| drop(sender.send(result))),
                    );
                    held = receiver
                        .recv()
                        .map_err(io::Error::other)?
                        .map_err(io::Error::other)?;
                }
            }
        }
    }

    fn read_to(
        &self,
        inode: u64,
        offset: u64,
        size: u64,
        held: &HeldChunks,
        sink: &mut dyn Sink,
    ) -> io::Result<ReadOutcome> {
        let inode = self
            .image()
            .inode(inode)
            .map_err(|damaged| self.report(damaged))?;
        match inode.kind {
            Kind::File => {}
            Kind::Directory => return Err(io::Error::from_raw_os_error(libc::EISDIR)),
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
        let size = size.min(sink.space() as u64);
        let plan = |map| Plan::new(self.image(), map, &inode, offset, size).map_err(|d| self.report(d));
        let total = plan(None)?.remaining();
        if total == 0 {
            return Ok(ReadOutcome::Done(0));
        }
        if self.recorder.active() {
            let data = plan(None)?.filter_map(|piece| match piece {
                Ok(Piece::Data(segment)) => Some((segment.blob, segment.chunk)),
                _ => None,
            });
            self.recorder.touch(data);
        }
        let Some(map) = self.indexed().map() else {
            // Built by the fetch, then the addresses can be checked.
            let absent = self.collect(plan(None)?, |_| true).map_err(|d| self.report(d))?;
            if !absent.chunks.is_empty() {
                return Ok(ReadOutcome::Absent(absent));
            }
            // Nothing but holes.
            self.write(plan(None)?, held, sink)?;
            return Ok(ReadOutcome::Done(total as usize));
        };
        let map = map.map_err(|damaged| self.report(damaged))?;
        for piece in plan(Some(map))? {
            let piece = piece.map_err(|d| self.report(d))?;
            if let Piece::Data(segment) = &piece
                && !self.is_available(segment, held)
            {
                return self.absent(plan(Some(map))?, |segment| !self.is_available(segment, held));
            }
        }
        let seen = self.write(plan(Some(map))?, held, sink)?;
        let sound = match &seen {
            Some(seen) => !seen.changed || self.versions(plan(Some(map))?, held)? == seen.versions,
            None => false,
        };
        if sound {
            Ok(ReadOutcome::Done(total as usize))
        } else {
            self.absent(plan(Some(map))?, |_| true)
        }
    }

    /// Sum of the versions of the chunks of `plan`, as [`Seen::versions`].
    fn versions(&self, plan: Plan<'_>, held: &HeldChunks) -> io::Result<u64> {
        let mut sum = 0;
        for piece in plan {
            if let Piece::Data(segment) = piece.map_err(|d| self.report(d))?
                && let Some(blob) = self.blobs.get(segment.blob)
                && held_bytes(blob, &segment, held).is_none()
            {
                sum += u64::from(blob.version(segment.chunk));
            }
        }
        Ok(sum)
    }

    fn is_available(&self, segment: &Segment, held: &HeldChunks) -> bool {
        self.blobs
            .get(segment.blob)
            .is_some_and(|blob| blob.is_resident(segment.chunk) || held_bytes(blob, segment, held).is_some())
    }

    /// Writes all of `plan`. `None` if a chunk turned out to be absent.
    fn write(&self, plan: Plan<'_>, held: &HeldChunks, sink: &mut dyn Sink) -> io::Result<Option<Seen>> {
        let mut seen = Seen::default();
        let mut run: Option<Run<'_>> = None;
        for piece in plan {
            let segment = match piece.map_err(|d| self.report(d))? {
                Piece::Data(segment) => segment,
                Piece::Hole(size) => {
                    if let Some(run) = run.take() {
                        run.write(sink, &mut seen)?;
                    }
                    zeros(sink, size)?;
                    continue;
                }
            };
            let Some(blob) = self.blobs.get(segment.blob) else {
                return Ok(None);
            };
            if let Some(bytes) = held_bytes(blob, &segment, held) {
                if let Some(run) = run.take() {
                    run.write(sink, &mut seen)?;
                }
                sink.take(bytes)?;
                continue;
            }
            let generation = blob.generation();
            let version = blob.version(segment.chunk);
            if version == 0 {
                return Ok(None);
            }
            seen.versions += u64::from(version);
            if let Some(run) = run.as_mut().filter(|run| run.is_continued_by(&segment)) {
                run.size += segment.size as usize;
                continue;
            }
            if let Some(run) = run.replace(Run {
                blob,
                position: segment.blob,
                generation,
                offset: segment.offset,
                size: segment.size as usize,
            }) {
                run.write(sink, &mut seen)?;
            }
        }
        if let Some(run) = run {
            run.write(sink, &mut seen)?;
        }
        Ok(Some(seen))
    }

    /// Collects the chunks of `plan` that are `wanted`.
    fn absent(&self, plan: Plan<'_>, wanted: impl Fn(&Segment) -> bool) -> io::Result<ReadOutcome> {
        self.collect(plan, wanted)
            .map(ReadOutcome::Absent)
            .map_err(|d| self.report(d))
    }

    fn collect(&self, plan: Plan<'_>, wanted: impl Fn(&Segment) -> bool) -> Result<Absent, Damaged> {
        let mut found: Vec<(usize, u32)> = Vec::new();
        for piece in plan {
            if let Piece::Data(segment) = piece?
                && wanted(&segment)
            {
                found.push((segment.blob, segment.chunk));
            }
        }
        found.sort_unstable();
        found.dedup();
        let chunks = found
            .chunk_by(|(a, _), (b, _)| a == b)
            .filter_map(|group| {
                let (blob, _) = group.first()?;
                Some((
                    self.blobs.get(*blob)?.clone(),
                    group.iter().map(|(_, chunk)| *chunk).collect(),
                ))
            })
            .collect();
        Ok(Absent { chunks })
    }

    /// All chunks of a file, resident or not: what a prefetch of it has to fetch. None for other types.
    pub fn chunks_of(&self, inode: u64) -> io::Result<Absent> {
        let inode = self.image().inode(inode).map_err(|d| self.report(d))?;
        if inode.kind != Kind::File {
            return Ok(Absent { chunks: Vec::new() });
        }
        let map = self.indexed().map().transpose().map_err(|d| self.report(d))?;
        Plan::new(self.image(), map, &inode, 0, inode.size)
            .and_then(|plan| self.collect(plan, |_| true))
            .map_err(|d| self.report(d))
    }

    /// Builds what the first fetch would build otherwise. Takes up to some tens of milliseconds for a large image: for
    /// the thread that mounts, never for one that answers a guest.
    pub fn prepare(&self) -> io::Result<()> {
        self.indexed().build_map().map(|_| ()).map_err(|d| self.report(d))
    }

    /// Starts fetching what a read found absent; `done` is called once, from a thread of the store (from the
    /// caller's if nothing is absent).
    pub fn fetch(
        &self,
        absent: Absent,
        deadline: Instant,
        done: Box<dyn FnOnce(Result<HeldChunks, FetchError>) + Send>,
    ) {
        if absent.chunks.is_empty() {
            done(Ok(HeldChunks::default()));
            return;
        }
        let join = Arc::new(Mutex::new(Join {
            remaining: absent.chunks.len(),
            held: HeldChunks::default(),
            done: Some(done),
        }));
        for (blob, chunks) in absent.chunks {
            let (join, indexed) = (join.clone(), self.reader.indexed.clone());
            let id = blob.description().id.clone();
            let arrived = Box::new(move |result| {
                // On a thread of the store, so that no read has to. The read reports an error.
                let _ = indexed.build_map();
                let finished = join
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .arrive(id, result);
                if let Some((done, result)) = finished {
                    done(result);
                }
            });
            blob.fetch(&chunks, Priority::Demand, deadline, arrived);
        }
    }
}

/// Writes `size` zeros.
fn zeros(sink: &mut dyn Sink, mut size: u64) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    while size > 0 {
        let some = ZEROS.get(..size as usize).unwrap_or(&ZEROS);
        sink.take(some)?;
        size -= some.len() as u64;
    }
    Ok(())
}

/// The bytes of `segment`, if its chunk is held in memory.
fn held_bytes<'a>(blob: &Blob, segment: &Segment, held: &'a HeldChunks) -> Option<&'a [u8]> {
    if held.blobs.is_empty() {
        return None;
    }
    let id = &blob.description().id;
    let start = segment.in_chunk as usize;
    held.blobs
        .iter()
        .filter(|(held, _)| held == id)
        .flat_map(|(_, held)| &held.chunks)
        .find(|(chunk, _)| *chunk == segment.chunk)
        .and_then(|(_, bytes)| bytes.get(start..start + segment.size as usize))
}

type Done = Box<dyn FnOnce(Result<HeldChunks, FetchError>) + Send>;

/// Waits for the fetches of several blobs.
struct Join {
    remaining: usize,
    held: HeldChunks,
    done: Option<Done>,
}

impl Join {
    /// Takes the result of one blob; gives what is to be called when it was the last one, or the first failure.
    fn arrive(
        &mut self,
        id: String,
        result: Result<Held, FetchError>,
    ) -> Option<(Done, Result<HeldChunks, FetchError>)> {
        self.remaining = self.remaining.saturating_sub(1);
        match result {
            Err(error) => self.done.take().map(|done| (done, Err(error))),
            Ok(held) => {
                if !held.chunks.is_empty() || held.lease.is_some() {
                    self.held.blobs.push((id, held));
                }
                if self.remaining != 0 {
                    return None;
                }
                let held = std::mem::take(&mut self.held);
                self.done.take().map(|done| (done, Ok(held)))
            }
        }
    }
}
