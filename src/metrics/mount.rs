//! What is counted of one mount: requests by operation, and how long they took.
//!
//! A thread counts in a shard of its own, made when it first counts something, so that counting is a few additions to
//! memory that no other thread touches.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::{SHARDS, Shard};
use crate::fuse::abi::Opcode;

/// Classes of latencies: up to 1, 2, 4, ... microseconds, and for the last one above.
pub const LATENCY_CLASSES: usize = 26;

/// What a request does, as far as its latency is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// Anything else.
    Metadata,
}

impl Work {
    /// All of them.
    pub const ALL: [Work; 3] = [Work::Read, Work::Write, Work::Metadata];

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Work::Read => "read",
            Work::Write => "write",
            Work::Metadata => "metadata",
        }
    }

    fn of(opcode: Opcode) -> Self {
        match opcode {
            Opcode::Read => Work::Read,
            Opcode::Write => Work::Write,
            _ => Work::Metadata,
        }
    }
}

#[repr(align(128))]
struct Counters {
    requests: [AtomicU64; Opcode::COUNT],
    latencies: [[AtomicU64; LATENCY_CLASSES]; 3],
    nanoseconds: [AtomicU64; 3],
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            requests: [const { AtomicU64::new(0) }; Opcode::COUNT],
            latencies: [const { [const { AtomicU64::new(0) }; LATENCY_CLASSES] }; 3],
            nanoseconds: Default::default(),
        }
    }
}

/// The counters of one mount.
#[derive(Default)]
pub struct MountMetrics {
    shards: [OnceLock<Box<Counters>>; SHARDS],
}

impl std::fmt::Debug for MountMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.snapshot().fmt(f)
    }
}

/// How long requests took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    /// Requests by class: class `n` took up to `2^n` microseconds and longer than the class before; the last one has no
    /// bound.
    pub classes: [u64; LATENCY_CLASSES],
    /// Their time, summed up.
    pub total: Duration,
}

impl Latencies {
    /// Upper bound of a class, microseconds; none for the last one.
    pub fn bound(class: usize) -> Option<u64> {
        (class + 1 < LATENCY_CLASSES).then(|| 1 << class)
    }

    /// How many requests there were.
    pub fn count(&self) -> u64 {
        self.classes.iter().sum()
    }

    /// A time that the fraction `part` of the requests did not exceed: the upper bound of the class that it lies in.
    pub fn quantile(&self, part: f64) -> Duration {
        let wanted = (self.count() as f64 * part).ceil() as u64;
        let mut seen = 0;
        for (class, count) in self.classes.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return Duration::from_micros(1 << class);
            }
        }
        Duration::ZERO
    }
}

/// The counters of a mount at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountSnapshot {
    /// Requests by operation; those that never came are left out.
    pub requests: Vec<(&'static str, u64)>,
    /// Latencies, in the order of [`Work::ALL`]. A request that waited for data or for a worker counts with its wait.
    pub latencies: [Latencies; 3],
}

impl MountMetrics {
    /// A request was answered after `took`.
    pub(crate) fn answered(&self, opcode: Opcode, took: Duration) {
        let mine = Shard::mine();
        let Some(shard) = self.shards.get(mine.index()) else {
            return;
        };
        let shard = shard.get_or_init(Box::default);
        let work = Work::of(opcode) as usize;
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = shard.requests.get(opcode.index()) {
            mine.add(count, 1);
        }
        if let Some(count) = shard
            .latencies
            .get(work)
            .and_then(|classes| classes.get(class(nanoseconds)))
        {
            mine.add(count, 1);
        }
        if let Some(sum) = shard.nanoseconds.get(work) {
            mine.add(sum, nanoseconds);
        }
    }

    /// All shards, added up.
    pub fn snapshot(&self) -> MountSnapshot {
        let shards = || self.shards.iter().filter_map(OnceLock::get);
        let requests = Opcode::all().filter_map(|opcode| {
            let counts = shards().filter_map(|shard| shard.requests.get(opcode.index()));
            let count: u64 = counts.map(|count| count.load(Relaxed)).sum();
            (count > 0).then_some((opcode.name(), count))
        });
        let mut snapshot = MountSnapshot {
            requests: requests.collect(),
            ..MountSnapshot::default()
        };
        for shard in shards() {
            let sums = shard.latencies.iter().zip(&shard.nanoseconds);
            for (latencies, (classes, nanoseconds)) in snapshot.latencies.iter_mut().zip(sums) {
                for (sum, count) in latencies.classes.iter_mut().zip(classes) {
                    *sum += count.load(Relaxed);
                }
                latencies.total += Duration::from_nanos(nanoseconds.load(Relaxed));
            }
        }
        snapshot
    }
}

/// The class of a latency: the smallest `n` with `2^n` microseconds at least as long.
fn class(nanoseconds: u64) -> usize {
    let micros = nanoseconds.div_ceil(1000).max(1);
    let class = u64::BITS - (micros - 1).leading_zeros();
    (class as usize).min(LATENCY_CLASSES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_end_where_they_say() {
        let micros = |micros: u64| class(micros * 1000);
        assert_eq!(
            [class(0), class(1), micros(1), class(1001), micros(2)],
            [0, 0, 0, 1, 1]
        );
        assert_eq!([micros(3), micros(4), micros(5), micros(1 << 24)], [2, 2, 3, 24]);
        assert_eq!([micros((1 << 24) + 1), class(u64::MAX)], [25, 25]);
        assert_eq!(
            (Latencies::bound(0), Latencies::bound(24), Latencies::bound(25)),
            (Some(1), Some(1 << 24), None)
        );
    }

    #[test]
    fn threads_are_added_up() {
        let metrics = MountMetrics::default();
        std::thread::scope(|scope| {
            for _ in 0..SHARDS * 2 {
                scope.spawn(|| {
                    metrics.answered(Opcode::Read, Duration::from_micros(3));
                    metrics.answered(Opcode::Lookup, Duration::from_micros(1));
                });
            }
        });
        let seen = metrics.snapshot();
        let threads = SHARDS as u64 * 2;
        assert_eq!(seen.requests, [("Lookup", threads), ("Read", threads)]);
        let [read, write, metadata] = seen.latencies;
        assert_eq!(
            (read.count(), read.classes[2], read.total),
            (threads, threads, Duration::from_micros(3 * threads))
        );
        assert_eq!((write.count(), metadata.count()), (0, threads));
        assert_eq!(
            (read.quantile(0.5), write.quantile(0.99)),
            (Duration::from_micros(4), Duration::ZERO)
        );
    }
}
