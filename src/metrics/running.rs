//! What a queue thread does at this moment: four stores a request, to memory that nobody else writes.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::fuse::abi::InHeader;

/// The request that one thread executes.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Running {
    /// Nanoseconds of [`since_start`], plus one; 0: nothing runs.
    began: AtomicU64,
    unique: AtomicU64,
    opcode: AtomicU64,
    nodeid: AtomicU64,
}

/// A request that is being executed, as somebody else sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Executing {
    pub began: Instant,
    pub unique: u64,
    pub opcode: u32,
    pub nodeid: u64,
}

fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

impl Running {
    /// The thread executes this request from `now` on.
    pub fn begin(&self, header: &InHeader, now: Instant) {
        self.unique.store(header.unique, Relaxed);
        self.opcode.store(header.opcode.into(), Relaxed);
        self.nodeid.store(header.nodeid, Relaxed);
        let began = now.saturating_duration_since(start()).as_nanos() as u64;
        self.began.store(began + 1, Relaxed);
    }

    /// The thread has executed it.
    pub fn end(&self) {
        self.began.store(0, Relaxed);
    }

    /// What runs, if it has run for so long. The parts of a shorter one could belong to different requests.
    pub fn longer_than(&self, limit: Duration) -> Option<Executing> {
        let began = self.began.load(Relaxed).checked_sub(1)?;
        let began = start().checked_add(Duration::from_nanos(began))?;
        (began.elapsed() >= limit).then(|| Executing {
            began,
            unique: self.unique.load(Relaxed),
            opcode: self.opcode.load(Relaxed) as u32,
            nodeid: self.nodeid.load(Relaxed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_takes_long_is_shown() {
        let running = Running::default();
        assert_eq!(running.longer_than(Duration::ZERO), None);
        let header = InHeader {
            unique: 7,
            opcode: 15,
            nodeid: 9,
            ..InHeader::default()
        };
        let now = Instant::now();
        running.begin(&header, now);
        assert_eq!(running.longer_than(Duration::from_secs(3600)), None);
        let seen = running.longer_than(Duration::ZERO).unwrap();
        assert_eq!((seen.unique, seen.opcode, seen.nodeid), (7, 15, 9));
        running.end();
        assert_eq!(running.longer_than(Duration::ZERO), None);
    }
}
