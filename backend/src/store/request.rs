//! A request: a task of the network runtime that reads a range and hands each unit to a decode thread as soon as its last byte is
//! there, and keeps trying while somebody waits.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};

use super::Blob;
use super::budget::{Permit, Ticket};
use super::flight::{FlightKey, Unit};
use super::plan::{Group, Stored};
use crate::codec::Decoder;
use crate::error::SourceError;
use crate::source::retry::Backoff;

/// The answer to a request, on its way in.
pub(super) struct Assembly {
    segments: VecDeque<Group<Unit>>,
    /// The beginning of a segment whose end is still to come.
    buffer: BytesMut,
    /// Where in the blob the next byte to arrive lies.
    at: u64,
}

impl Assembly {
    /// Of groups in ascending order.
    pub(super) fn new(groups: Vec<Group<Unit>>) -> Self {
        let at = groups.first().map_or(0, |group| group.range.start);
        // Units that overlap are decoded from one segment, others as soon as they are complete.
        let mut segments: VecDeque<Group<Unit>> = VecDeque::new();
        for unit in groups.into_iter().flat_map(|group| group.units) {
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

    /// What is missing, the first so many ranges of it.
    fn ranges(&self, most: usize) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for segment in &self.segments {
            let start = segment.range.start.max(self.at);
            let full = ranges.len() == most;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = segment.range.end,
                _ if full => break,
                _ => ranges.push(start..segment.range.end),
            }
        }
        ranges
    }

    /// Memory that it takes from request to cache: what is to come, and of what is decoded as many units as there are threads for it.
    fn cost(&self, threads: usize) -> u64 {
        let largest = self.units().map(Unit::decoded_size).max().unwrap_or(0);
        let decoded: u64 = self.units().take(threads).map(|_| largest).sum();
        let missing = self.ranges(usize::MAX);
        missing.iter().map(|range| range.end - range.start).sum::<u64>() + decoded
    }

    /// Takes the next bytes; returns the segments that they complete. Copies only what came in several pieces.
    fn push(&mut self, mut bytes: Bytes) -> Vec<(Group<Unit>, Bytes)> {
        let mut complete = Vec::new();
        while let Some(segment) = self.segments.front().filter(|_| !bytes.is_empty()) {
            let wanted = segment.range.end.saturating_sub(self.at).min(bytes.len() as u64) as usize;
            let mut stored = bytes.split_to(wanted);
            self.at += wanted as u64;
            let finished = self.segments.pop_front_if(|segment| segment.range.end <= self.at);
            if finished.is_none() || !self.buffer.is_empty() {
                self.buffer.extend_from_slice(&stored);
            }
            let Some(segment) = finished else { continue };
            if !self.buffer.is_empty() {
                stored = self.buffer.split().freeze();
            }
            complete.push((segment, stored));
            // The next one may lie further behind.
            self.at = self.segments.front().map_or(self.at, |next| next.range.start);
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

    /// Ends the right to fill the chunks.
    pub(super) fn release(&mut self) {
        self.units_mut().for_each(Unit::release);
    }

    /// The segments, to be taken apart.
    pub(super) fn into_units(self) -> Vec<Unit> {
        self.segments
            .into_iter()
            .flat_map(|segment| segment.units)
            .collect()
    }

    pub(super) fn units_mut(&mut self) -> impl Iterator<Item = &mut Unit> {
        self.segments.iter_mut().flat_map(|segment| &mut segment.units)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty()
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
pub(super) async fn request(blob: Arc<Blob>, mut assembly: Assembly, ticket: Arc<Ticket>) {
    let shared = Arc::clone(&blob.shared);
    let mut backoff = Backoff::new(shared.origin.source.retry_limit());
    let started = Instant::now();
    loop {
        let Some(permit) = shared
            .engine
            .budget
            .enter(
                shared.origin.lane,
                &ticket,
                assembly.cost(shared.engine.pool.threads()),
            )
            .await
        else {
            return;
        };
        if !assembly.units().any(Unit::wanted) {
            assembly.shrink();
        }
        assembly = match blob.secure(assembly, &ticket) {
            Some(assembly) => assembly,
            None => return,
        };
        let before = assembly.at;
        let outcome = attempt(&blob, &mut assembly, &ticket, permit, backoff.attempts() > 0).await;
        if assembly.at > before {
            backoff.reset();
        }
        let Err(error) = outcome else {
            if assembly.is_empty() {
                return;
            }
            // The source takes fewer ranges at a time.
            continue;
        };
        let pause = backoff.after(&error);
        let spent = started.elapsed().as_secs_f64();
        let reason = format!("{error} (attempt {}, {spent:.1} s)", backoff.attempts());
        tracing::debug!(blob = %shared.id, %reason, "request failed");
        // While we wait, other processes may try.
        assembly.release();
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
    let priority = ticket.priority();
    let ranges = assembly.ranges(shared.origin.source.ranges_per_request().max(1));
    let mut sink = |bytes: Bytes| {
        for (segment, stored) in assembly.push(bytes) {
            let (blob, ticket, permit) = (Arc::clone(blob), Arc::clone(ticket), Arc::clone(&permit));
            let chunks = segment.units.iter().flat_map(|unit| &unit.chunks);
            let keys: Vec<FlightKey> = chunks.map(|(_, claim)| claim.key).collect();
            let job = move |decoder: &mut Decoder| {
                for unit in segment.units {
                    let from = (unit.range.start - segment.range.start) as usize;
                    let to = (unit.range.end - segment.range.start) as usize;
                    blob.settle(decoder, unit, stored.slice(from..to), &ticket);
                }
                drop(permit);
            };
            shared.decode(&keys, Box::new(job));
        }
    };
    shared
        .origin
        .read(&shared.id, &ranges, priority, retry, &mut sink)
        .await
}
