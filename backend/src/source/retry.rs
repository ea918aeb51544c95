//! How long to wait before asking again.

use std::time::Duration;

use crate::error::SourceError;

/// First pause after an error; doubled each time.
const FIRST: Duration = Duration::from_millis(50);
/// Longest pause, unless the source asks for more.
const LONGEST: Duration = Duration::from_secs(2);
/// Longest pause that a source can ask for.
pub(crate) const LONGEST_ASKED: Duration = Duration::from_secs(30);

/// Counts the attempts of one request.
#[derive(Debug)]
pub(crate) struct Backoff {
    /// How often an error that looks permanent is given another chance.
    chances: u32,
    attempts: u32,
    step: u32,
    permanent: u32,
}

impl Backoff {
    pub(crate) fn new(chances: u32) -> Self {
        Self {
            chances,
            attempts: 0,
            step: 0,
            permanent: 0,
        }
    }

    /// The pause after `error`, jittered so that requests that failed together do not come back together. `None` if there is no point
    /// in asking again.
    pub(crate) fn after(&mut self, error: &SourceError) -> Option<Duration> {
        self.attempts += 1;
        if !error.kind.transient() {
            self.permanent += 1;
            if self.permanent > self.chances {
                return None;
            }
        }
        let full = FIRST.saturating_mul(1 << self.step.min(10)).min(LONGEST);
        self.step += 1;
        let jittered = full / 2 + full.mul_f64(0.5 * fraction());
        Some(jittered.max(error.retry_after.unwrap_or_default().min(LONGEST_ASKED)))
    }

    /// The source delivered something: begin with short pauses again.
    pub(crate) fn reset(&mut self) {
        self.step = 0;
        self.permanent = 0;
    }

    /// Attempts made.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }
}

/// A random number in 0..1.
fn fraction() -> f64 {
    f64::from(crate::store::random() as u32) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SourceErrorKind;

    fn error(kind: SourceErrorKind) -> SourceError {
        SourceError::new(kind, "h", "d")
    }

    #[test]
    fn transient_errors_are_retried_without_end_with_bounded_pauses() {
        let mut backoff = Backoff::new(2);
        for _ in 0..100 {
            let pause = backoff.after(&error(SourceErrorKind::Unreachable)).unwrap();
            assert!(pause >= FIRST / 2 && pause <= LONGEST);
        }
        assert_eq!(backoff.attempts(), 100);
    }

    #[test]
    fn permanent_errors_get_a_few_chances() {
        let mut backoff = Backoff::new(2);
        let pauses = std::iter::from_fn(|| backoff.after(&error(SourceErrorKind::NotFound))).count();
        assert_eq!(pauses, 2);
    }

    #[test]
    fn the_sources_own_word_is_kept_within_reason() {
        let mut asked = error(SourceErrorKind::Throttled);
        asked.retry_after = Some(Duration::from_secs(7));
        assert_eq!(Backoff::new(2).after(&asked), Some(Duration::from_secs(7)));
        asked.retry_after = Some(Duration::from_secs(70_000));
        assert_eq!(Backoff::new(2).after(&asked), Some(LONGEST_ASKED));
    }
}
