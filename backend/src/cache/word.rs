//! The state of one chunk, as all processes of the host see it: a word of 64 bits in a shared mapping.
//!
//! | bits | value |
//! |---|---|
//! | 0..2 | state |
//! | 2..30 | time, in ticks: of the last use, of the end of a lease, of the beginning of a fill |
//! | 30..40 | owner: the process that fills it |
//! | 40..64 | version |
//!
//! Each change of state is one compare-and-swap that makes the next version. A reader that remembers the version under which it
//! verified a chunk thus knows by one load whether the bytes are still those. Times change without a new version.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

const TIME_SHIFT: u32 = 2;
const TIME_BITS: u32 = 28;
const OWNER_SHIFT: u32 = TIME_SHIFT + TIME_BITS;
const OWNER_BITS: u32 = 10;
const VERSION_SHIFT: u32 = OWNER_SHIFT + OWNER_BITS;

/// Processes that may share a directory, each with a number below.
pub(crate) const OWNERS: u16 = 1 << OWNER_BITS;
/// Ticks in a second.
const TICKS: u32 = 16;
/// A moment that lies further ahead is one of long ago: ticks wrap.
const AHEAD: u32 = 60 * TICKS;

/// What a chunk's bytes in the data file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing.
    Absent,
    /// Being changed by the owner.
    Filling,
    /// Verified to be what the chunk's record says.
    Present,
    /// Verified before the host was restarted: perhaps they never reached the disk.
    Doubtful,
}

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

/// A moment, the same for all processes of this boot. Wraps after half a year.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tick(u32);

impl Tick {
    pub(crate) fn now() -> Self {
        // Answered without a system call.
        let now = clock_gettime(ClockId::MonotonicCoarse);
        let ticks =
            now.tv_sec as u64 * u64::from(TICKS) + now.tv_nsec as u64 * u64::from(TICKS) / 1_000_000_000;
        Self(ticks as u32 & mask(TIME_BITS))
    }

    /// So many ticks.
    pub(crate) fn duration(ticks: u32) -> Duration {
        Duration::from_secs(ticks.into()) / TICKS
    }

    pub(crate) fn after(self, time: Duration) -> Self {
        let ticks = (time.as_millis() as u32 * TICKS).div_ceil(1000);
        Self(self.0.wrapping_add(ticks) & mask(TIME_BITS))
    }

    /// Ticks since `earlier`; `None` if that is still to come.
    pub(crate) fn since(self, earlier: Self) -> Option<u32> {
        let ahead = earlier.0.wrapping_sub(self.0) & mask(TIME_BITS);
        let ticks = self.0.wrapping_sub(earlier.0) & mask(TIME_BITS);
        (ahead == 0 || ahead > AHEAD).then_some(ticks)
    }
}

impl Word {
    pub(crate) fn state(self) -> State {
        match self.0 & 3 {
            0 => State::Absent,
            1 => State::Filling,
            2 => State::Present,
            _ => State::Doubtful,
        }
    }

    /// Never 0 once the chunk was present.
    pub(crate) fn version(self) -> u32 {
        (self.0 >> VERSION_SHIFT) as u32
    }

    pub(crate) fn owner(self) -> u16 {
        (self.0 >> OWNER_SHIFT) as u16 & (OWNERS - 1)
    }

    pub(crate) fn time(self) -> Tick {
        Tick((self.0 >> TIME_SHIFT) as u32 & mask(TIME_BITS))
    }

    /// The next version.
    pub(crate) fn next(self, state: State, owner: u16, time: Tick) -> Self {
        let version = self.version().wrapping_add(1) & mask(64 - VERSION_SHIFT);
        Self::new(state, owner, time, version.max(1))
    }

    pub(crate) fn new(state: State, owner: u16, time: Tick, version: u32) -> Self {
        Self(
            state as u64
                | u64::from(time.0) << TIME_SHIFT
                | u64::from(owner & (OWNERS - 1)) << OWNER_SHIFT
                | u64::from(version) << VERSION_SHIFT,
        )
    }

    /// The same version at another time.
    pub(crate) fn at(self, time: Tick) -> Self {
        Self::new(self.state(), self.owner(), time, self.version())
    }
}

const fn mask(bits: u32) -> u32 {
    (1 << bits) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_keeps_its_parts_apart() {
        let word = Word(0).next(State::Filling, 1023, Tick(mask(TIME_BITS)));
        assert_eq!(
            (word.state(), word.owner(), word.version()),
            (State::Filling, 1023, 1)
        );
        let later = word.at(Tick(5));
        assert_eq!((later.version(), later.owner(), later.time()), (1, 1023, Tick(5)));
        let last = Word::new(State::Present, 0, Tick(0), mask(24));
        assert_eq!(
            last.next(State::Absent, 0, Tick(0)).version(),
            1,
            "0 is nobody's version"
        );
    }

    #[test]
    fn ticks_wrap() {
        let late = Tick(mask(TIME_BITS));
        let next = late.after(Duration::from_secs(1));
        assert_eq!(next.since(late), Some(TICKS));
        assert_eq!(late.since(next), None);
        let old = Tick(2000 * TICKS);
        assert!(Tick(1).since(old).is_some(), "long ago and not ahead");
    }
}
