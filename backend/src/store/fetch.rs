//! From absent chunks to resident ones.
//!
//! A fetch becomes a [`Waiter`] and a job for a decode thread, which describes the chunks, looks whether an earlier run or another process left
//! them in the cache, and joins or starts a [`Flight`] for each that is really absent. Flights that are neighbours
//! in the blob travel as one request. A request is a task of the network runtime: it waits for admission, reads, hands each unit to a
//! decode thread as soon as its last byte is there, and keeps trying while somebody waits. A decode thread decompresses and verifies
//! in private memory, writes to the cache file, marks the chunk resident, and lands the flight.
//!
//! Who tells the waiters, whatever happens: a [`Claim`] is the duty to land a flight, and its `Drop` does it; a waiter
//! that is dropped says so; and a timer ends each at its deadline.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::budget::{Permit, Ticket};
use super::origin::Origin;
use super::plan::{Group, Stored, merge};
use super::{Blob, Completion, Engine, FetchError, Held, Priority};
use crate::cache::CacheFiles;
use crate::chunk::{BlobDescription, Chunk};
use crate::codec::{self, Decoder};
use crate::error::{CodecError, SourceError};
use crate::metrics::BlobCounters;
use crate::source::retry::Backoff;

/// Most bytes of one request, unless a single unit or the configured amplification is larger.
const MAX_REQUEST: u64 = 4 << 20;
/// Bytes of chunks that could not be cached, kept per blob for those who read them piece by piece.
const MAX_RECENT: usize = 8 << 20;

/// What views of the same blob from the same source and cache directory share.
pub(crate) struct Shared {
    pub(super) engine: Arc<Engine>,
    pub(super) files: CacheFiles,
    pub(super) origin: Arc<Origin>,
    pub(super) counters: BlobCounters,
    pub(super) id: String,
    size: (u64, u32),
    flights: Mutex<HashMap<FlightKey, Flight>>,
    recent: Mutex<VecDeque<(FlightKey, Arc<[u8]>)>>,
    /// The last chunk could not be written: fetch no more than what is asked for.
    uncached: AtomicBool,
}

/// Chunk index and stamp. Views that mean different bytes by one index do not share a flight.
type FlightKey = (u32, [u8; 32]);

/// A chunk on its way.
struct Flight {
    waiters: Vec<(Arc<Waiter>, Arc<Blob>)>,
    ticket: Arc<Ticket>,
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
            uncached: AtomicBool::new(false),
        }
    }

    /// Whether a view with this description can share the files.
    pub(super) fn fits(&self, blob: &BlobDescription) -> bool {
        self.size == (blob.uncompressed_size, blob.chunk_count)
    }

    /// Removes a flight and returns who waits for it.
    fn land(&self, key: &FlightKey) -> Vec<(Arc<Waiter>, Arc<Blob>)> {
        self.flights
            .lock()
            .remove(key)
            .map(|flight| flight.waiters)
            .unwrap_or_default()
    }

    /// Keeps a chunk that could not be cached, for a while.
    fn keep(&self, key: FlightKey, data: Arc<[u8]>) {
        let mut recent = self.recent.lock();
        recent.push_back((key, data));
        let mut total: usize = recent.iter().map(|(_, data)| data.len()).sum();
        while total > MAX_RECENT && recent.len() > 1 {
            total -= recent.pop_front().map_or(0, |(_, data)| data.len());
        }
    }

    fn kept(&self, key: &FlightKey) -> Option<Arc<[u8]>> {
        let recent = self.recent.lock();
        recent
            .iter()
            .find(|(kept, _)| kept == key)
            .map(|(_, data)| Arc::clone(data))
    }
}

/// Somebody who asked for chunks. Told exactly once.
pub(crate) struct Waiter {
    blob_id: String,
    pending: Mutex<Option<Pending>>,
}

struct Pending {
    remaining: usize,
    held: Held,
    last_error: Option<String>,
    timer: Option<AbortHandle>,
    done: Completion,
}

impl Waiter {
    pub(super) fn new(blob_id: &str, remaining: usize, done: Completion) -> Arc<Self> {
        let pending = Pending {
            remaining,
            held: Held::default(),
            last_error: None,
            timer: None,
            done,
        };
        Arc::new(Self {
            blob_id: blob_id.to_owned(),
            pending: Mutex::new(Some(pending)),
        })
    }

    /// Starts the timer that ends the wait at `deadline`.
    pub(super) fn limit(self: &Arc<Self>, runtime: &Handle, deadline: Instant) {
        let waiter = Arc::downgrade(self);
        let started = Instant::now();
        let timer = runtime.spawn(async move {
            tokio::time::sleep_until(deadline.into()).await;
            if let Some(waiter) = waiter.upgrade() {
                waiter.time_out(started.elapsed());
            }
        });
        match &mut *self.pending.lock() {
            Some(pending) => pending.timer = Some(timer.abort_handle()),
            None => timer.abort(),
        }
    }

    pub(super) fn live(&self) -> bool {
        self.pending.lock().is_some()
    }

    /// One of the chunks is there.
    fn arrived(&self, index: u32, held: Option<Arc<[u8]>>) {
        let mut slot = self.pending.lock();
        let Some(pending) = slot.as_mut() else { return };
        if let Some(data) = held {
            pending.held.chunks.push((index, data));
        }
        pending.remaining = pending.remaining.saturating_sub(1);
        if pending.remaining > 0 {
            return;
        }
        let finished = slot.take();
        drop(slot);
        if let Some(mut finished) = finished {
            let held = std::mem::take(&mut finished.held);
            finished.finish(Ok(held));
        }
    }

    /// Remembers why it takes so long.
    pub(super) fn note(&self, error: &str) {
        if let Some(pending) = self.pending.lock().as_mut() {
            pending.last_error = Some(error.to_owned());
        }
    }

    pub(super) fn fail(&self, error: FetchError) {
        let pending = self.pending.lock().take();
        if let Some(pending) = pending {
            pending.finish(Err(error));
        }
    }

    fn time_out(&self, waited: Duration) {
        let pending = self.pending.lock().take();
        if let Some(pending) = pending {
            let last = pending.last_error.as_deref().unwrap_or("no answer yet");
            let reason = format!("not there after {:.1} s: {last}", waited.as_secs_f64());
            let error = FetchError {
                blob_id: self.blob_id.clone(),
                reason,
                timed_out: true,
            };
            pending.finish(Err(error));
        }
    }
}

impl Pending {
    fn finish(self, outcome: Result<Held, FetchError>) {
        if let Some(timer) = &self.timer {
            timer.abort();
        }
        (self.done)(outcome);
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.get_mut().take() {
            pending.finish(Err(FetchError::new(&self.blob_id, "the store gave the fetch up")));
        }
    }
}

/// A fetch, before it is planned.
pub(super) struct Plan {
    pub(super) chunks: Vec<u32>,
    pub(super) priority: Priority,
    /// Whether to bring neighbours along.
    pub(super) extend: bool,
    pub(super) waiter: Arc<Waiter>,
}

/// The duty to land a flight.
struct Claim {
    blob: Arc<Blob>,
    key: FlightKey,
    landed: bool,
}

impl Claim {
    /// The chunk is resident.
    fn resident(mut self) {
        self.landed = true;
        self.blob.residency.insert(self.key.0);
        for (waiter, blob) in self.blob.shared.land(&self.key) {
            blob.residency.insert(self.key.0);
            waiter.arrived(self.key.0, None);
        }
    }

    /// The chunk is good, but could not be cached.
    fn held(mut self, data: &Arc<[u8]>) {
        self.landed = true;
        for (waiter, _) in self.blob.shared.land(&self.key) {
            waiter.arrived(self.key.0, Some(Arc::clone(data)));
        }
    }

    fn fail(mut self, reason: impl std::fmt::Display) {
        self.landed = true;
        let error = FetchError::new(&self.blob.shared.id, format!("chunk {}: {reason}", self.key.0));
        for (waiter, _) in self.blob.shared.land(&self.key) {
            waiter.fail(error.clone());
        }
    }

    /// Lands the flight if nobody waits for it any more.
    fn abandoned(&mut self) -> bool {
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

    fn wanted(&self) -> bool {
        let flights = self.blob.shared.flights.lock();
        flights
            .get(&self.key)
            .is_some_and(|flight| flight.waiters.iter().any(|(waiter, _)| waiter.live()))
    }

    fn note(&self, error: &str) {
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
struct Unit {
    chunks: Vec<(Chunk, Claim)>,
    range: Range<u64>,
    /// It was already fetched once and found to be damaged.
    damaged: bool,
}

impl Stored for Unit {
    fn range(&self) -> Range<u64> {
        self.range.clone()
    }
}

impl Unit {
    fn new(chunk: Chunk, claim: Claim) -> Self {
        let range = chunk.compressed_offset..chunk.compressed_offset + u64::from(chunk.compressed_size);
        Self {
            chunks: vec![(chunk, claim)],
            range,
            damaged: false,
        }
    }

    fn decoded_size(&self) -> u64 {
        self.chunks
            .iter()
            .map(|(chunk, _)| u64::from(chunk.uncompressed_size))
            .sum()
    }

    fn wanted(&self) -> bool {
        self.chunks.iter().any(|(_, claim)| claim.wanted())
    }

    /// Lands all flights if nobody waits for any of them.
    fn abandoned(&mut self) -> bool {
        if self.wanted() {
            return false;
        }
        self.chunks.retain_mut(|(_, claim)| !claim.abandoned());
        self.chunks.is_empty()
    }
}

impl Blob {
    pub(super) fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// Has a decode thread plan a fetch.
    pub(super) fn plan(self: &Arc<Self>, plan: Plan) {
        let blob = Arc::clone(self);
        self.engine()
            .pool
            .push(plan.priority, Box::new(move |_| blob.run_plan(plan)));
    }

    pub(super) fn run_plan(self: Arc<Self>, plan: Plan) {
        if plan.chunks.is_empty() {
            plan.waiter.arrived(0, None);
            return;
        }
        let Some(plan) = self.with_index(plan) else { return };
        let mut chunks = Vec::with_capacity(plan.chunks.len());
        for &index in &plan.chunks {
            if self.is_resident(index) {
                plan.waiter.arrived(index, None);
                continue;
            }
            match self.describe(index) {
                Ok(chunk) => chunks.push(chunk),
                Err(error) => return plan.waiter.fail(error),
            }
        }
        let ticket = Ticket::new(plan.priority);
        let mut units: Vec<Unit> = Vec::new();
        for (chunk, claim) in self.join(chunks, &ticket, plan.priority, Some(&plan.waiter)) {
            if let Some(claim) = self.find_locally(&chunk, claim) {
                self.add_unit(&mut units, chunk, claim, &ticket);
            }
        }
        if plan.extend {
            self.extend(&mut units, &ticket);
        }
        self.submit(units, &ticket);
    }

    /// Describes chunk `index`, and checks the description.
    pub(super) fn describe(&self, index: u32) -> Result<Chunk, FetchError> {
        let id = &self.description.id;
        let refuse = |reason: &dyn std::fmt::Display| FetchError::new(id, format!("chunk {index}: {reason}"));
        if index >= self.description.chunk_count {
            return Err(refuse(&format!("the blob has {}", self.description.chunk_count)));
        }
        let chunk = self
            .description
            .index
            .chunk(index)
            .map_err(|error| refuse(&error.reason))?;
        if chunk.index != index {
            return Err(refuse(&format!("described as chunk {}", chunk.index)));
        }
        codec::check(&self.description, &chunk).map_err(|error| refuse(&error))?;
        Ok(chunk)
    }

    /// Joins the flights of chunks, or starts them, which gives claims. Without a waiter, only starts them. All at once, so that
    /// two who ask for the same chunks do not start half of the flights each.
    fn join(
        self: &Arc<Self>,
        chunks: Vec<Chunk>,
        ticket: &Arc<Ticket>,
        priority: Priority,
        waiter: Option<&Arc<Waiter>>,
    ) -> Vec<(Chunk, Claim)> {
        let keyed: Vec<_> = chunks
            .into_iter()
            .map(|chunk| ((chunk.index, codec::stamp(&self.description, &chunk)), chunk))
            .collect();
        let (mut claims, mut arrived, mut raised) = (Vec::new(), Vec::new(), Vec::new());
        let mut flights = self.shared.flights.lock();
        for (key, chunk) in keyed {
            // Landing marks the chunk resident first and removes the flight then: no chunk is missed in between.
            if self.is_resident(key.0) {
                arrived.push(key.0);
                continue;
            }
            let waiters = waiter.map(|waiter| (Arc::clone(waiter), Arc::clone(self)));
            if let Some(flight) = flights.get_mut(&key) {
                flight.waiters.extend(waiters);
                self.shared
                    .counters
                    .joined
                    .fetch_add(waiter.is_some().into(), Ordering::Relaxed);
                raised.push(Arc::clone(&flight.ticket));
                continue;
            }
            let waiters = waiters.into_iter().collect();
            flights.insert(
                key,
                Flight {
                    waiters,
                    ticket: Arc::clone(ticket),
                },
            );
            claims.push((
                chunk,
                Claim {
                    blob: Arc::clone(self),
                    key,
                    landed: false,
                },
            ));
        }
        drop(flights);
        if let Some(waiter) = waiter {
            arrived.into_iter().for_each(|index| waiter.arrived(index, None));
            let budget = &self.engine().budget;
            raised
                .iter()
                .for_each(|ticket| budget.raise(self.shared.origin.lane, ticket, priority));
        }
        claims
    }

    /// Starts the flight of a chunk that nobody has asked for yet.
    fn start(self: &Arc<Self>, chunk: Chunk, ticket: &Arc<Ticket>) -> Option<(Chunk, Claim)> {
        self.join(vec![chunk], ticket, Priority::Background, None).pop()
    }

    /// Lands the flight of a chunk that is on this host already; gives the claim back if it is not.
    fn find_locally(&self, chunk: &Chunk, claim: Claim) -> Option<Claim> {
        let files = &self.shared.files;
        if let Some(data) = self.shared.kept(&claim.key) {
            claim.held(&data);
            return None;
        }
        if files.stamps(chunk.index, 1).first() == Some(&claim.key.1) {
            self.shared.counters.recalled.fetch_add(1, Ordering::Relaxed);
            claim.resident();
            return None;
        }
        if files.claimed(chunk.index)
            && let Ok(data) = files.read(chunk.uncompressed_offset, chunk.uncompressed_size)
            && self.verifiable(chunk)
            && codec::verify(&self.description, chunk, &data).is_ok()
        {
            self.shared.counters.recalled.fetch_add(1, Ordering::Relaxed);
            files.confirm(chunk.index, &claim.key.1);
            claim.resident();
            return None;
        }
        Some(claim)
    }

    /// Whether a rumour about this chunk can be checked at all.
    fn verifiable(&self, chunk: &Chunk) -> bool {
        chunk.digest.is_some() || chunk.crc32c.is_some()
    }

    /// Adds a chunk to the unit that it is stored in, and the unit's other chunks with it.
    fn add_unit(self: &Arc<Self>, units: &mut Vec<Unit>, chunk: Chunk, claim: Claim, ticket: &Arc<Ticket>) {
        if let Some(unit) = units.iter_mut().find(|unit| {
            unit.chunks
                .iter()
                .any(|(other, _)| codec::same_unit(other, &chunk))
        }) {
            unit.chunks.push((chunk, claim));
            return;
        }
        let siblings = self.siblings(&chunk, ticket);
        let mut unit = Unit::new(chunk, claim);
        unit.chunks.extend(siblings);
        units.push(unit);
    }

    /// The absent chunks that are stored in the same unit; they have neighbouring numbers.
    fn siblings(self: &Arc<Self>, chunk: &Chunk, ticket: &Arc<Ticket>) -> Vec<(Chunk, Claim)> {
        let mut found = Vec::new();
        let below = (0..chunk.index).rev();
        let above = chunk.index.saturating_add(1)..self.description.chunk_count;
        for side in [&mut { below } as &mut dyn Iterator<Item = u32>, &mut { above }] {
            for index in side {
                let Ok(other) = self.describe(index) else { break };
                if !codec::same_unit(chunk, &other) {
                    break;
                }
                found.extend(self.start(other, ticket));
            }
        }
        found
    }

    /// Read amplification: adds absent neighbours, first a few before each unit, then what fits behind it.
    fn extend(self: &Arc<Self>, units: &mut Vec<Unit>, ticket: &Arc<Ticket>) {
        let amplify = u64::from(self.amplify);
        if amplify == 0 || self.shared.uncached.load(Ordering::Relaxed) {
            return;
        }
        let groups = merge(std::mem::take(units), amplify.max(MAX_REQUEST));
        for Group {
            mut range,
            units: mut members,
        } in groups
        {
            let first = members
                .iter()
                .flat_map(|unit| &unit.chunks)
                .map(|(chunk, _)| chunk.index)
                .min();
            let last = members
                .iter()
                .flat_map(|unit| &unit.chunks)
                .map(|(chunk, _)| chunk.index)
                .max();
            if let (Some(first), Some(last)) = (first, last) {
                let before = (0..first).rev();
                let behind = last.saturating_add(1)..self.description.chunk_count;
                self.extend_one(&mut members, &mut range, before, amplify / 4, ticket);
                self.extend_one(&mut members, &mut range, behind, amplify, ticket);
            }
            units.append(&mut members);
        }
    }

    fn extend_one(
        self: &Arc<Self>,
        members: &mut Vec<Unit>,
        range: &mut Range<u64>,
        candidates: impl Iterator<Item = u32>,
        limit: u64,
        ticket: &Arc<Ticket>,
    ) {
        for index in candidates {
            if self.is_resident(index) {
                return;
            }
            let Ok(chunk) = self.describe(index) else { return };
            let (start, end) = (
                chunk.compressed_offset,
                chunk.compressed_offset + u64::from(chunk.compressed_size),
            );
            let joined = range.start.min(start)..range.end.max(end);
            if start > range.end || end < range.start || joined.end - joined.start > limit {
                return;
            }
            let Some((chunk, claim)) = self.start(chunk, ticket) else {
                return;
            };
            let Some(claim) = self.find_locally(&chunk, claim) else {
                return;
            };
            self.add_unit(members, chunk, claim, ticket);
            *range = joined;
        }
    }

    /// Sends units on their way, as few requests as they allow.
    fn submit(self: &Arc<Self>, units: Vec<Unit>, ticket: &Arc<Ticket>) {
        for group in merge(units, u64::from(self.amplify).max(MAX_REQUEST)) {
            let task = request(Arc::clone(self), Assembly::new(group), Arc::clone(ticket));
            self.engine().runtime().spawn(task);
        }
    }

    /// Decodes and verifies a unit, and lands its flights.
    fn settle(self: &Arc<Self>, decoder: &mut Decoder, unit: Unit, stored: Bytes, ticket: &Arc<Ticket>) {
        let Unit {
            chunks,
            range,
            damaged,
        } = unit;
        let Some((lead, _)) = chunks.first() else { return };
        let decoded = decoder.decode(&self.description, lead, stored);
        let mut bad: Vec<(Chunk, Claim)> = Vec::new();
        let mut reason = None;
        for (chunk, claim) in chunks {
            match decoded
                .as_ref()
                .map_err(CodecError::clone)
                .and_then(|decoded| self.verified(&chunk, decoded))
            {
                Ok(data) => self.keep_chunk(&chunk, claim, &data),
                Err(error) => {
                    tracing::warn!(blob = %self.shared.id, chunk = chunk.index, source = self.shared.origin.source.host(), %error, "damaged chunk");
                    self.shared.counters.damaged.fetch_add(1, Ordering::Relaxed);
                    reason = Some(error);
                    bad.push((chunk, claim));
                }
            }
        }
        let Some(reason) = reason else { return };
        let reason = format!("from {}: {reason}", self.shared.origin.source.host());
        if damaged {
            bad.into_iter().for_each(|(_, claim)| claim.fail(&reason));
            return;
        }
        // Once more: perhaps it was the network, or a cache in between.
        bad.iter().for_each(|(_, claim)| claim.note(&reason));
        let mut again = Unit {
            chunks: bad,
            range,
            damaged: true,
        };
        if !again.abandoned() {
            self.submit(vec![again], ticket);
        }
    }

    fn verified(&self, chunk: &Chunk, decoded: &Bytes) -> Result<Bytes, CodecError> {
        let data = codec::slice(chunk, decoded)?;
        codec::verify(&self.description, chunk, &data)?;
        Ok(data)
    }

    /// Writes a verified chunk to the cache, or holds it in memory.
    fn keep_chunk(&self, chunk: &Chunk, claim: Claim, data: &Bytes) {
        let shared = &self.shared;
        match shared
            .files
            .store(chunk.index, chunk.uncompressed_offset, data, &claim.key.1)
        {
            Ok(()) => {
                shared.uncached.store(false, Ordering::Relaxed);
                shared.counters.fetched.fetch_add(1, Ordering::Relaxed);
                shared
                    .counters
                    .fetched_bytes
                    .fetch_add(data.len() as u64, Ordering::Relaxed);
                claim.resident();
            }
            Err(error) => {
                if !shared.uncached.swap(true, Ordering::Relaxed) {
                    tracing::warn!(blob = %shared.id, %error, "cache can not be written, serving uncached");
                }
                shared.counters.held.fetch_add(1, Ordering::Relaxed);
                let data: Arc<[u8]> = data.as_ref().into();
                shared.keep(claim.key, Arc::clone(&data));
                claim.held(&data);
            }
        }
    }
}

/// The answer to a request, on its way in.
struct Assembly {
    segments: VecDeque<Group<Unit>>,
    buffer: BytesMut,
    /// Where in the blob the next byte to arrive lies.
    at: u64,
}

impl Assembly {
    fn new(group: Group<Unit>) -> Self {
        let at = group.range.start;
        // Units that overlap are decoded from one segment, others as soon as they are complete.
        let mut segments: VecDeque<Group<Unit>> = VecDeque::new();
        for unit in group.units {
            let range = unit.range();
            match segments.back_mut() {
                Some(last) if range.start < last.range.end => {
                    last.range.end = last.range.end.max(range.end);
                    last.units.push(unit);
                }
                _ => segments.push_back(Group {
                    range,
                    units: vec![unit],
                }),
            }
        }
        Self {
            segments,
            buffer: BytesMut::new(),
            at,
        }
    }

    /// What is missing.
    fn range(&self) -> Range<u64> {
        self.at..self.segments.back().map_or(self.at, |last| last.range.end)
    }

    /// Memory that it takes from request to cache.
    fn cost(&self) -> u64 {
        let decoded: u64 = self
            .segments
            .iter()
            .flat_map(|segment| &segment.units)
            .map(Unit::decoded_size)
            .sum();
        let range = self.range();
        range.end - range.start + decoded
    }

    /// Takes the next bytes; returns the segments that they complete.
    fn push(&mut self, bytes: &[u8]) -> Vec<(Group<Unit>, Bytes)> {
        let mut complete = Vec::new();
        self.buffer.extend_from_slice(bytes);
        self.at += bytes.len() as u64;
        while let Some(segment) = self.segments.pop_front_if(|segment| segment.range.end <= self.at) {
            let size = (segment.range.end - segment.range.start) as usize;
            let stored = self.buffer.split_to(size.min(self.buffer.len())).freeze();
            complete.push((segment, stored));
        }
        complete
    }

    /// Gives up what nobody waits for any more, at both ends.
    fn shrink(&mut self) {
        let idle = |segment: &mut Group<Unit>| {
            segment.units.retain_mut(|unit| !unit.abandoned());
            segment.units.is_empty()
        };
        let started = self
            .segments
            .front()
            .map_or(self.at, |segment| segment.range.start);
        while self.segments.pop_front_if(idle).is_some() {}
        while self.segments.pop_back_if(idle).is_some() {}
        match self.segments.front() {
            Some(segment) if segment.range.start == started => {}
            front => {
                self.buffer.clear();
                self.at = front.map_or(self.at, |segment| segment.range.start);
            }
        }
    }

    fn units(&self) -> impl Iterator<Item = &Unit> {
        self.segments.iter().flat_map(|segment| &segment.units)
    }

    fn fail(self, reason: &str) {
        for unit in self.segments.into_iter().flat_map(|segment| segment.units) {
            unit.chunks.into_iter().for_each(|(_, claim)| claim.fail(reason));
        }
    }
}

/// Reads what an assembly lacks, as long as somebody waits for it.
async fn request(blob: Arc<Blob>, mut assembly: Assembly, ticket: Arc<Ticket>) {
    let shared = Arc::clone(&blob.shared);
    let mut backoff = Backoff::default();
    let started = Instant::now();
    loop {
        let Some(permit) = shared
            .engine
            .budget
            .enter(shared.origin.lane, &ticket, assembly.cost())
            .await
        else {
            return;
        };
        if !assembly.units().any(Unit::wanted) {
            assembly.shrink();
            if assembly.segments.is_empty() {
                return;
            }
        }
        let before = assembly.at;
        let Err(error) = attempt(&blob, &mut assembly, &ticket, permit, backoff.attempts() > 0).await else {
            return;
        };
        if assembly.at > before {
            backoff.reset();
        }
        let pause = backoff.after(&error);
        let spent = started.elapsed().as_secs_f64();
        let reason = format!("{error} (attempt {}, {spent:.1} s)", backoff.attempts());
        tracing::debug!(blob = %shared.id, %reason, "request failed");
        assembly
            .units()
            .flat_map(|unit| &unit.chunks)
            .for_each(|(_, claim)| claim.note(&reason));
        let Some(pause) = pause else {
            return assembly.fail(&reason);
        };
        assembly.shrink();
        if assembly.segments.is_empty() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

/// One attempt. Segments go to the decode threads as they become complete.
async fn attempt(
    blob: &Arc<Blob>,
    assembly: &mut Assembly,
    ticket: &Arc<Ticket>,
    permit: Permit,
    retry: bool,
) -> Result<(), SourceError> {
    let permit = Arc::new(permit);
    let shared = &blob.shared;
    let range = assembly.range();
    let mut sink = |bytes: Bytes| {
        for (segment, stored) in assembly.push(&bytes) {
            let (blob, ticket, permit) = (Arc::clone(blob), Arc::clone(ticket), Arc::clone(&permit));
            let priority = ticket.priority();
            let job = move |decoder: &mut Decoder| {
                for unit in segment.units {
                    let from = (unit.range.start - segment.range.start) as usize;
                    let to = (unit.range.end - segment.range.start) as usize;
                    blob.settle(decoder, unit, stored.slice(from..to), &ticket);
                }
                drop(permit);
            };
            shared.engine.pool.push(priority, Box::new(job));
        }
    };
    shared.origin.read(&shared.id, range, retry, &mut sink).await
}
