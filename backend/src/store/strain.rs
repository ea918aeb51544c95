//! Whether a source has enough to do with what somebody waits for: judged by how fast it answers reads of guests, and by its failures.

use std::time::{Duration, Instant};

/// What is known holds for so long; then the source gets another chance.
const MEMORY: Duration = Duration::from_secs(5);
/// Weight of an answer in the recent and in the usual mean.
const RECENT: f64 = 1.0 / 4.0;
const USUAL: f64 = 1.0 / 32.0;
/// Slow is more than so many times as long as usual, and so much on top.
const FACTOR: f64 = 2.0;
const MARGIN: f64 = 0.02;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Strain {
    /// Mean times until the first byte of an answer, seconds.
    recent: f64,
    usual: f64,
    answered: Option<Instant>,
    /// The last request failed, then.
    failed: Option<Instant>,
}

impl Strain {
    /// A read of a guest began to be answered after `took`.
    pub(super) fn answered(&mut self, took: Duration, now: Instant) {
        let took = took.as_secs_f64();
        if self.answered.replace(now).is_none() {
            (self.recent, self.usual) = (took, took);
        }
        self.recent += (took - self.recent) * RECENT;
        self.usual += (took - self.usual) * USUAL;
    }

    /// The usual time until an answer begins; nothing if there was none yet.
    pub(super) fn usual(&self) -> Duration {
        Duration::try_from_secs_f64(self.usual).unwrap_or_default()
    }

    /// A request has ended.
    pub(super) fn ended(&mut self, failed: bool, now: Instant) {
        self.failed = failed.then_some(now);
    }

    pub(super) fn is_strained(&self, now: Instant) -> bool {
        let lately = |at: Option<Instant>| at.is_some_and(|at| now.saturating_duration_since(at) < MEMORY);
        let slow = self.recent > self.usual * FACTOR + MARGIN;
        lately(self.failed) || slow && lately(self.answered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn answers_that_become_slow_strain_for_as_long_as_they_are() {
        let (mut strain, mut now) = (Strain::default(), Instant::now());
        let answers = |strain: &mut Strain, now: &mut Instant, count: u32, took: Duration| {
            for _ in 0..count {
                *now += took;
                strain.answered(took, *now);
            }
            strain.is_strained(*now)
        };
        assert!(
            !answers(&mut strain, &mut now, 1, 200 * MS),
            "slow, but always was"
        );
        assert!(!answers(&mut strain, &mut now, 100, 20 * MS));
        assert!(!answers(&mut strain, &mut now, 4, 50 * MS), "a little");
        assert!(answers(&mut strain, &mut now, 4, 200 * MS));
        assert!(!strain.is_strained(now + MEMORY), "nobody asks any more");
        assert!(!answers(&mut strain, &mut now, 10, 20 * MS), "as before");
        assert!(!answers(&mut strain, &mut now, 200, 300 * MS), "the new usual");
    }

    #[test]
    fn a_failure_strains_until_something_goes_well_or_is_long_ago() {
        let (mut strain, now) = (Strain::default(), Instant::now());
        strain.ended(true, now);
        assert!(strain.is_strained(now + 4 * MS));
        assert!(!strain.is_strained(now + MEMORY));
        strain.ended(true, now);
        strain.ended(false, now);
        assert!(!strain.is_strained(now));
    }
}
