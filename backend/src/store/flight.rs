//! Flights: chunks on their way, who waits for them, and whose duty it is to land them.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;

use super::ahead::Ahead;
use super::budget::Ticket;
use super::origin::Origin;
use super::plan::Stored;
use super::pool::{Job, Queued, QueuedRef};
use super::waiter::{Arrival, Waiter};
use super::{Blob, Engine, FetchError, Priority};
use crate::cache::{CacheFiles, Filling};
use crate::chunk::{BlobDescription, Chunk};
use crate::config::CacheConfig;
use crate::metrics::BlobCounters;

/// Bytes of chunks that could not be cached, kept per blob for those who read them piece by piece.
const MAX_RECENT: usize = 8 << 20;

/// What views of the same blob from the same source and cache directory share.
pub(crate) struct Shared {
    pub(super) engine: Arc<Engine>,
    pub(super) files: CacheFiles,
    pub(super) origin: Arc<Origin>,
    pub(super) counters: BlobCounters,
    pub(super) id: String,
    pub(super) size: (u64, u32),
    pub(super) flights: Mutex<HashMap<FlightKey, Flight>>,
    pub(super) recent: Mutex<VecDeque<(FlightKey, Arc<[u8]>)>>,
    pub(super) ahead: Ahead,
    /// The last chunk could not be written: fetch no more than what is asked for.
    pub(super) uncached: AtomicBool,
}

/// Chunk index and stamp. Views that mean different bytes by one index do not share a flight.
pub(super) type FlightKey = (u32, [u8; 32]);

/// A chunk on its way.
pub(super) struct Flight {
    pub(super) waiters: Vec<(Arc<Waiter>, Arc<Blob>)>,
    pub(super) ticket: Arc<Ticket>,
    /// Of this chunk alone: its request may be more urgent for the sake of another one.
    pub(super) priority: Priority,
    /// Its bytes are there, and wait for a decode thread.
    pub(super) queued: QueuedRef,
}

impl Flight {
    pub(super) fn new(ticket: &Arc<Ticket>, priority: Priority) -> Self {
        Self {
            waiters: Vec::new(),
            ticket: Arc::clone(ticket),
            priority,
            queued: QueuedRef::new(),
        }
    }
}

impl Shared {
    pub(super) fn new(
        engine: Arc<Engine>,
        files: CacheFiles,
        origin: Arc<Origin>,
        blob: &BlobDescription,
    ) -> Self {
        Self {
            engine,
            files,
            origin,
            counters: BlobCounters::default(),
            id: blob.id.clone(),
            size: (blob.uncompressed_size, blob.chunk_count),
            flights: Mutex::default(),
            recent: Mutex::default(),
            ahead: Ahead::default(),
            uncached: AtomicBool::new(false),
        }
    }

    /// Whether a view with this description can share the files.
    pub(super) fn fits(&self, blob: &BlobDescription, cache: &CacheConfig) -> bool {
        self.size == (blob.uncompressed_size, blob.chunk_count) && self.files.fits(cache)
    }

    /// Hands `job`, which lands the flights of `keys`, to the decode threads.
    pub(super) fn decode(&self, keys: &[FlightKey], job: Job) {
        let job = Queued::new(job);
        let mut priority = Priority::Background;
        let mut flights = self.flights.lock();
        for key in keys {
            if let Some(flight) = flights.get_mut(key) {
                flight.queued = Arc::downgrade(&job);
                priority = priority.min(flight.priority);
            }
        }
        drop(flights);
        // Who joins from now on queues it once more.
        self.engine.pool.queue(priority, job);
    }

    /// Removes a flight and returns who waits for it.
    pub(super) fn land(&self, key: &FlightKey) -> Vec<(Arc<Waiter>, Arc<Blob>)> {
        self.flights
            .lock()
            .remove(key)
            .map(|flight| flight.waiters)
            .unwrap_or_default()
    }

    /// Keeps a chunk that could not be cached, for a while.
    pub(super) fn keep(&self, key: FlightKey, data: Arc<[u8]>) {
        let mut recent = self.recent.lock();
        recent.push_back((key, data));
        let mut total: usize = recent.iter().map(|(_, data)| data.len()).sum();
        while total > MAX_RECENT && recent.len() > 1 {
            total -= recent.pop_front().map_or(0, |(_, data)| data.len());
        }
    }

    pub(super) fn kept(&self, key: &FlightKey) -> Option<Arc<[u8]>> {
        let recent = self.recent.lock();
        recent
            .iter()
            .find(|(kept, _)| kept == key)
            .map(|(_, data)| Arc::clone(data))
    }
}

/// The duty to land a flight.
pub(super) struct Claim {
    pub(super) blob: Arc<Blob>,
    pub(super) key: FlightKey,
    pub(super) landed: bool,
    /// The right to fill the chunk, among all processes; asked for when its request is sent.
    pub(super) filling: Option<Filling>,
}

impl Claim {
    /// The chunk is resident.
    pub(super) fn resident(mut self, version: u32) {
        self.landed = true;
        self.blob.residency.insert(self.key.0, version);
        for (waiter, blob) in self.blob.shared.land(&self.key) {
            blob.residency.insert(self.key.0, version);
            waiter.arrived(self.key.0, Arrival::Resident(version));
        }
    }

    /// The chunk is good, but could not be cached.
    pub(super) fn held(mut self, data: &Arc<[u8]>) {
        self.landed = true;
        for (waiter, _) in self.blob.shared.land(&self.key) {
            waiter.arrived(self.key.0, Arrival::Held(Arc::clone(data)));
        }
    }

    pub(super) fn fail(mut self, reason: impl std::fmt::Display) {
        self.landed = true;
        let error = FetchError::new(&self.blob.shared.id, format!("chunk {}: {reason}", self.key.0));
        for (waiter, _) in self.blob.shared.land(&self.key) {
            waiter.fail(error.clone());
        }
    }

    /// Lands the flight if nobody waits for it any more.
    pub(super) fn abandoned(&mut self) -> bool {
        let mut flights = self.blob.shared.flights.lock();
        let Some(flight) = flights.get_mut(&self.key) else {
            return true;
        };
        flight.waiters.retain(|(waiter, _)| waiter.live());
        if flight.waiters.is_empty() {
            self.landed = true;
            flights.remove(&self.key);
        }
        self.landed
    }

    pub(super) fn wanted(&self) -> bool {
        let flights = self.blob.shared.flights.lock();
        flights
            .get(&self.key)
            .is_some_and(|flight| flight.waiters.iter().any(|(waiter, _)| waiter.live()))
    }

    pub(super) fn note(&self, error: &str) {
        if let Some(flight) = self.blob.shared.flights.lock().get(&self.key) {
            flight.waiters.iter().for_each(|(waiter, _)| waiter.note(error));
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.landed {
            let error = FetchError::new(&self.blob.shared.id, format!("chunk {}: given up", self.key.0));
            for (waiter, _) in self.blob.shared.land(&self.key) {
                waiter.fail(error.clone());
            }
        }
    }
}

/// What is stored as one piece, with the chunks in it that are to be made resident; never empty.
pub(super) struct Unit {
    pub(super) chunks: Vec<(Chunk, Claim)>,
    pub(super) range: Range<u64>,
    /// It was already fetched once and found to be damaged.
    pub(super) damaged: bool,
}

impl Stored for Unit {
    fn range(&self) -> Range<u64> {
        self.range.clone()
    }
}

impl Unit {
    pub(super) fn new(chunk: Chunk, claim: Claim) -> Self {
        let range = chunk.compressed_offset..chunk.compressed_offset + u64::from(chunk.compressed_size);
        Self {
            chunks: vec![(chunk, claim)],
            range,
            damaged: false,
        }
    }

    pub(super) fn decoded_size(&self) -> u64 {
        self.chunks
            .iter()
            .map(|(chunk, _)| u64::from(chunk.uncompressed_size))
            .sum()
    }

    pub(super) fn wanted(&self) -> bool {
        self.chunks.iter().any(|(_, claim)| claim.wanted())
    }

    /// Ends the right to fill the chunks.
    pub(super) fn release(&mut self) {
        self.chunks.iter_mut().for_each(|(_, claim)| claim.filling = None);
    }

    /// Lands all flights if nobody waits for any of them.
    pub(super) fn abandoned(&mut self) -> bool {
        if self.wanted() {
            return false;
        }
        self.chunks.retain_mut(|(_, claim)| !claim.abandoned());
        self.chunks.is_empty()
    }
}
