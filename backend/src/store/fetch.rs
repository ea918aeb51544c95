//! From absent chunks to resident ones.
//!
//! A fetch becomes a `Waiter` and a job for a decode thread, which describes the chunks, looks whether an earlier run or another process left
//! them in the cache, and joins or starts a `Flight` for each that is really absent. Flights that are neighbours
//! in the blob travel as one request, unless another process has them on their way (`share`). A request is a task of the network runtime: it waits for admission, reads, hands each unit to a
//! decode thread as soon as its last byte is there, and keeps trying while somebody waits. A decode thread decompresses and verifies
//! in private memory, writes to the cache file, marks the chunk resident, and lands the flight.
//!
//! Who tells the waiters, whatever happens: a `Claim` is the duty to land a flight, and its `Drop` does it; a waiter
//! that is dropped says so; and a timer ends each at its deadline.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::budget::Ticket;
use super::flight::{Claim, Flight, Unit};
use super::plan::{Group, merge};
use super::request::{Assembly, request};
use super::waiter::{Arrival, Waiter};
use super::{Blob, Engine, FetchError, Priority};
use crate::cache::Acquired;
use crate::chunk::Chunk;
use crate::codec::{self, Decoder};
use crate::error::CodecError;

/// Most bytes of one request, unless a single unit or the configured amplification is larger.
pub(super) const MAX_REQUEST: u64 = 4 << 20;

/// A fetch, before it is planned.
pub(super) struct Plan {
    pub(super) chunks: Vec<u32>,
    pub(super) priority: Priority,
    /// Whether to bring neighbours along.
    pub(super) extend: bool,
    pub(super) waiter: Arc<Waiter>,
}

/// The priority of planning what is fetched with this one: while what has come in the background waits to be decoded, the next may
/// be on its way.
pub(super) fn planning(fetch: Priority) -> Priority {
    fetch.min(Priority::Hinted)
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
            .push(planning(plan.priority), Box::new(move |_| blob.run_plan(plan)));
    }

    pub(super) fn run_plan(self: Arc<Self>, plan: Plan) {
        if plan.chunks.is_empty() {
            plan.waiter.arrived(0, Arrival::Resident(0));
            return;
        }
        let Some(plan) = self.with_index(plan) else { return };
        let mut chunks = Vec::with_capacity(plan.chunks.len());
        for &index in &plan.chunks {
            let version = self.version(index);
            if version != 0 {
                plan.waiter.arrived(index, Arrival::Resident(version));
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
        self.submit_with_others(units, &ticket);
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
        let mut forward = Vec::new();
        let mut flights = self.shared.flights.lock();
        for (key, chunk) in keyed {
            // Landing marks the chunk resident first and removes the flight then: no chunk is missed in between.
            let version = self.version(key.0);
            if version != 0 {
                arrived.push((key.0, version));
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
                if priority < flight.priority {
                    flight.priority = priority;
                    forward.extend(flight.queued.upgrade());
                }
                continue;
            }
            // What nobody asked for is decoded after what somebody waits for.
            let urgency = match waiter {
                Some(_) => priority,
                None => ticket.priority().max(Priority::Hinted),
            };
            let mut flight = Flight::new(ticket, urgency);
            flight.waiters.extend(waiters);
            flights.insert(key, flight);
            claims.push((
                chunk,
                Claim {
                    blob: Arc::clone(self),
                    key,
                    landed: false,
                    filling: None,
                },
            ));
        }
        drop(flights);
        for job in forward {
            self.engine().pool.queue(priority, job);
        }
        if let Some(waiter) = waiter {
            for (index, version) in arrived {
                waiter.arrived(index, Arrival::Resident(version));
            }
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
        if let Some(version) = files.recall(chunk.index, &claim.key.1) {
            self.shared.counters.recalled.fetch_add(1, Ordering::Relaxed);
            claim.resident(version);
            return None;
        }
        if files.rumoured(chunk.index)
            && self.verifiable(chunk)
            && let Some(Acquired::Mine(filling)) = files.acquire(chunk.index)
            && let Ok(data) = files.read(&filling, chunk)
            && codec::verify(&self.description, chunk, &data).is_ok()
            && let Some(version) = files.confirm(filling, chunk, &data, claim.key.1)
        {
            self.shared.counters.recalled.fetch_add(1, Ordering::Relaxed);
            claim.resident(version);
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

    /// Read amplification: adds absent neighbours, first a few before each unit, then what fits behind it. How many, `ahead` says.
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
                let origin = &self.shared.origin;
                let (waiting, lists) = (origin.waiting(), origin.source.ranges_per_request() > 1);
                let window = self.shared.ahead.window(range.start, amplify, waiting, lists);
                let before = (0..first).rev();
                let behind = last.saturating_add(1)..self.description.chunk_count;
                self.extend_one(&mut members, &mut range, before, window / 4, ticket);
                self.extend_one(&mut members, &mut range, behind, window, ticket);
                self.shared.ahead.fetched(&range, window);
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
    pub(super) fn submit(self: &Arc<Self>, units: Vec<Unit>, ticket: &Arc<Ticket>) {
        self.send(self.assemble(units, ticket.priority()), ticket);
    }

    pub(super) fn send(self: &Arc<Self>, assemblies: Vec<Assembly>, ticket: &Arc<Ticket>) {
        for assembly in assemblies {
            let task = request(Arc::clone(self), assembly, Arc::clone(ticket));
            self.engine().runtime().spawn(task);
        }
    }

    /// Makes requests of units: of neighbours one each. Of what is only hinted at one for many ranges, if the source knows lists: nobody
    /// waits for the first of them.
    pub(super) fn assemble(&self, units: Vec<Unit>, priority: Priority) -> Vec<Assembly> {
        let limit = u64::from(self.amplify).max(MAX_REQUEST);
        let most = match priority {
            Priority::Hinted => self.shared.origin.source.ranges_per_request(),
            Priority::Demand | Priority::Background => 1,
        };
        self.assemble_lists(units, most, limit)
    }

    /// Makes requests of units: of neighbours one each, and one of up to `most` such ranges that have `list_limit` bytes together.
    pub(super) fn assemble_lists(&self, units: Vec<Unit>, most: usize, list_limit: u64) -> Vec<Assembly> {
        let limit = u64::from(self.amplify).max(MAX_REQUEST);
        let mut requests: Vec<(u64, Vec<Group<Unit>>)> = Vec::new();
        for group in merge(units, limit) {
            let size = group.range.end - group.range.start;
            match requests.last_mut() {
                Some((sum, groups)) if groups.len() < most && *sum + size <= list_limit => {
                    *sum += size;
                    groups.push(group);
                }
                _ => requests.push((size, vec![group])),
            }
        }
        requests
            .into_iter()
            .map(|(_, groups)| Assembly::new(groups))
            .collect()
    }

    /// Decodes and verifies a unit, and lands its flights.
    pub(super) fn settle(
        self: &Arc<Self>,
        decoder: &mut Decoder,
        unit: Unit,
        stored: Bytes,
        ticket: &Arc<Ticket>,
    ) {
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
                Ok(data) => self.keep_chunk(&chunk, claim, &data, ticket.priority()),
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
        self.shared.origin.source.distrust();
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
    fn keep_chunk(&self, chunk: &Chunk, mut claim: Claim, data: &Bytes, priority: Priority) {
        let shared = &self.shared;
        let stored = match claim.filling.take() {
            // What is only hinted at takes free room, and never that of what was asked for.
            Some(filling) => {
                shared
                    .files
                    .store(filling, chunk, data, claim.key.1, priority == Priority::Demand)
            }
            None => Err(ErrorKind::ReadOnlyFilesystem.into()),
        };
        let lost = || io::Error::new(ErrorKind::ResourceBusy, "another process fills the chunk");
        match stored.and_then(|version| version.ok_or_else(lost)) {
            Ok(version) => {
                shared.uncached.store(false, Ordering::Relaxed);
                shared.counters.fetched.fetch_add(1, Ordering::Relaxed);
                shared
                    .counters
                    .fetched_bytes
                    .fetch_add(data.len() as u64, Ordering::Relaxed);
                claim.resident(version);
            }
            Err(error) => {
                let lasting = error.kind() != ErrorKind::ResourceBusy;
                if lasting && !shared.uncached.swap(true, Ordering::Relaxed) {
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
