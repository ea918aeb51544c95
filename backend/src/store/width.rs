//! How many requests for what nobody waits for a source may have at a time: as many as its link carries without being noticed.
//!
//! A container that starts reads all the time, and what is fetched beside its reads saves it round trips, if the link has room. So a few such
//! requests go beside reads from the beginning, one more for each that was carried quickly, and half as many after one that was
//! not. Over a link that is slow even with a single one, they wait until nobody reads.

use std::time::Duration;

/// Requests at a time to begin with, and at most.
const FIRST: usize = 4;
pub(super) const MOST: usize = 8;
/// Together they bring so many bytes per second over a link that has room for reads beside them.
const QUICK: f64 = (32 << 20) as f64;
/// Shorter bodies tell nothing.
const TELLING: u64 = 256 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Width(usize);

impl Default for Width {
    fn default() -> Self {
        Self(FIRST)
    }
}

impl Width {
    /// Requests that may be under way.
    pub(super) fn get(&self) -> usize {
        self.0
    }

    /// Not even one leaves room for reads.
    pub(super) fn is_narrow(&self) -> bool {
        self.0 == 1
    }

    /// A request's body of so many bytes took so long, while so many such requests were under way.
    pub(super) fn carried(&mut self, bytes: u64, took: Duration, together: usize) {
        if bytes < TELLING {
            return;
        }
        let all = bytes.saturating_mul(together.max(1) as u64);
        self.0 = if all as f64 >= took.as_secs_f64() * QUICK {
            (self.0 + 1).min(MOST)
        } else {
            (self.0 / 2).max(1)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_while_bodies_come_quickly_and_shrinks_when_they_do_not() {
        let mut width = Width::default();
        let (size, quick, slow) = (4 << 20, Duration::from_millis(100), Duration::from_secs(2));
        (0..9).for_each(|_| width.carried(size, quick, 1));
        assert_eq!(width.get(), MOST);
        width.carried(size, quick * 8, 8);
        assert_eq!(width.get(), MOST, "the others had most of the link");
        width.carried(1 << 10, slow, 1);
        assert_eq!(width.get(), MOST, "too little to tell");
        (0..3).for_each(|_| width.carried(size, slow, 1));
        assert!(width.is_narrow());
        width.carried(size, slow, 1);
        assert_eq!(width.get(), 1);
        width.carried(size, quick, 1);
        assert!(!width.is_narrow());
    }
}
