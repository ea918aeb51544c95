//! When to ask a second time while the first question is still open: after what 19 of 20 answers took, and not often.

use std::time::Duration;

use parking_lot::Mutex;

/// Answers remembered.
const MEMORY: usize = 64;
/// Fewer tell nothing.
const ENOUGH: usize = 20;
/// Sooner it is not worth it.
const SOONEST: Duration = Duration::from_millis(20);
/// Second questions per question.
const SHARE: f64 = 0.05;
/// Second questions that may be saved up.
const BURST: f64 = 3.0;

/// See the module.
#[derive(Default)]
pub(super) struct Hedge {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// A ring.
    latencies: Vec<Duration>,
    next: usize,
    allowance: f64,
}

impl Hedge {
    /// How long to wait for an answer before asking again; `None` for ever.
    pub(super) fn delay(&self) -> Option<Duration> {
        let mut state = self.state.lock();
        state.allowance = (state.allowance + SHARE).min(BURST);
        if state.latencies.len() < ENOUGH || state.allowance < 1.0 {
            return None;
        }
        let mut sorted = state.latencies.clone();
        let rank = sorted.len() * 19 / 20;
        let (_, p95, _) = sorted.select_nth_unstable(rank);
        Some((*p95).max(SOONEST))
    }

    /// A second question is asked.
    pub(super) fn spend(&self) {
        self.state.lock().allowance -= 1.0;
    }

    /// An answer took so long.
    pub(super) fn answered(&self, took: Duration) {
        let mut state = self.state.lock();
        let at = state.next;
        match state.latencies.get_mut(at) {
            Some(slot) => *slot = took,
            None => state.latencies.push(took),
        }
        state.next = (at + 1) % MEMORY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_questions_wait_for_experience_and_are_few() {
        let hedge = Hedge::default();
        for _ in 0..19 {
            assert_eq!(hedge.delay(), None);
            hedge.answered(Duration::from_millis(30));
        }
        hedge.answered(Duration::from_secs(4));
        let mut asked = 0;
        for _ in 0..200 {
            if let Some(delay) = hedge.delay() {
                assert!(delay >= Duration::from_millis(30));
                hedge.spend();
                asked += 1;
            }
            hedge.answered(Duration::from_millis(40));
        }
        assert!((9..=11).contains(&asked), "{asked}");
        hedge.answered(Duration::from_millis(1));
    }
}
