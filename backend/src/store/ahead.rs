//! How much to bring along with what is asked for.
//!
//! Whoever reads one thing after the other pays a round trip for each, and is helped by neighbours, needed or not. Many who wait at the
//! same time hide each other's round trips, and all that neighbours cost them is the link. So half of the configured amplification is
//! shared by those who wait, and a third if the source takes lists of ranges: there one round trip is for all of them, and a neighbour
//! rarely saves a request. Who goes on where an earlier fetch ended gets twice as much as there, since it reads in order.

use std::collections::VecDeque;
use std::ops::Range;

use parking_lot::Mutex;

/// Ends of fetches that are remembered.
const MEMORY: usize = 32;

/// Where the fetches of a blob ended lately.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    ends: Mutex<VecDeque<End>>,
}

#[derive(Clone, Copy, Debug)]
struct End {
    /// Behind the last byte that was fetched.
    at: u64,
    window: u64,
}

impl Ahead {
    /// Bytes that a fetch which begins at `start` may have with its neighbours, `most` at most, while so many wait for the source,
    /// which takes `lists` of ranges or does not.
    pub(super) fn window(&self, start: u64, most: u64, waiting: usize, lists: bool) -> u64 {
        let share = match waiting {
            0 | 1 => most,
            many if lists => most / 3 / many as u64,
            many => most / 2 / many as u64,
        };
        let mut ends = self.ends.lock();
        let continued = ends
            .iter()
            .position(|end| (end.at..=end.at.saturating_add(end.window)).contains(&start));
        match continued.and_then(|position| ends.remove(position)) {
            Some(end) => end.window.saturating_mul(2).clamp(share, most),
            None => share,
        }
    }

    /// A fetch with this window takes `range`.
    pub(super) fn fetched(&self, range: &Range<u64>, window: u64) {
        let mut ends = self.ends.lock();
        ends.push_back(End {
            at: range.end,
            window,
        });
        if ends.len() > MEMORY {
            ends.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_reader_gets_all_and_many_share() {
        let ahead = Ahead::default();
        for lists in [false, true] {
            assert_eq!(ahead.window(0, 1 << 20, 0, lists), 1 << 20);
            assert_eq!(ahead.window(0, 1 << 20, 1, lists), 1 << 20);
            assert_eq!(ahead.window(0, 0, 8, lists), 0);
        }
        assert_eq!(ahead.window(0, 1 << 20, 8, false), 64 << 10);
        assert_eq!(ahead.window(0, 768 << 10, 8, true), 32 << 10);
    }

    #[test]
    fn who_reads_in_order_gets_more_each_time() {
        let ahead = Ahead::default();
        let (mut at, mut windows) = (5000, Vec::new());
        for _ in 0..6 {
            let window = ahead.window(at, 1 << 20, 8, false);
            ahead.fetched(&(at..at + window), window);
            // What comes next was not far behind what was fetched.
            at += window + 100;
            windows.push(window >> 10);
        }
        assert_eq!(windows, [64, 128, 256, 512, 1024, 1024]);
        assert_eq!(
            ahead.window(1 << 30, 1 << 20, 8, false),
            64 << 10,
            "somewhere else"
        );
    }
}
