//! How long a queue thread that has run out of requests looks for more before it sleeps.
//!
//! A sleep is dear: the driver has to kick, the scheduler to find the thread, and in a virtual machine the processor
//! to be woken by the hypervisor. That costs more than many a request, in time and in processor time. So a thread
//! looks on for about as long as a sleep and a wake-up would cost it: if a request comes within that time both are
//! saved, and the driver its kick; if none comes, at most as much again is lost as the sleep costs anyway.
//!
//! It is lost seldom: after each look in vain twice as many sleeps as before go without one. A queue whose driver comes
//! back late, or an idle one, therefore sleeps at once almost always, and a busy one almost never.

use std::time::{Duration, Instant};

/// A look lasts no longer.
const LOOK: Duration = Duration::from_micros(20);
/// So many sleeps in a row, as a power of two, go without a look.
const MOST_SKIPPED: u32 = 6;
/// Looks between two readings of the clock, which costs more than a look.
const LOOKS_PER_READING: u32 = 16;

/// What the last looks of one thread have taught it.
#[derive(Debug, Default)]
pub struct Patience {
    /// Looks in vain since the last that was not, up to [`MOST_SKIPPED`].
    in_vain: u32,
    /// Sleeps to come without a look.
    skip: u32,
}

impl Patience {
    /// Calls `found` until it says so or has been called for long enough, or not at all. Returns what it said last.
    pub fn look(&mut self, found: impl Fn() -> bool) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        let found = look(found);
        self.learn(found);
        found
    }

    fn learn(&mut self, found: bool) {
        self.in_vain = match found {
            true => 0,
            false => MOST_SKIPPED.min(self.in_vain + 1),
        };
        self.skip = (1 << self.in_vain) - 1;
    }
}

fn look(found: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS_PER_READING {
            if found() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > LOOK {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_there_is_found() {
        let looks = Cell::new(0);
        let third = || looks.replace(looks.get() + 1) == 2;
        assert!(Patience::default().look(third));
        assert_eq!(looks.get(), 3);
    }

    #[test]
    fn looking_in_vain_becomes_rare_and_one_success_makes_up_for_it() {
        let mut patience = Patience::default();
        let looks = Cell::new(0);
        let sleeps = |patience: &mut Patience, count: usize| {
            looks.set(0);
            (0..count)
                .filter(|_| {
                    let before = looks.get();
                    patience.look(|| {
                        looks.set(looks.get() + 1);
                        false
                    });
                    looks.get() > before
                })
                .count()
        };
        // After the first, one sleep goes without; after the second, three; and so on.
        assert_eq!(sleeps(&mut patience, 1 + 1 + 1 + 3 + 1), 3);
        sleeps(&mut patience, 1000);
        let most = 1 << MOST_SKIPPED;
        assert!(sleeps(&mut patience, 10 * most) <= 10);
        while !patience.look(|| true) {}
        assert!(patience.look(|| true));
        assert_eq!(sleeps(&mut patience, 1), 1);
    }
}
