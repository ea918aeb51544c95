//! Record locks of one file in memory: who holds what, what is in whose way, and who waits in a circle.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Waits that are followed in search of a circle; a guest that makes longer ones waits on.
const STEPS: usize = 256;

/// A record lock, held or wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLock {
    /// The guest's number of the owner.
    pub owner: u64,
    /// The handle that it was made through.
    pub handle: u64,
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
    /// For writing, not for reading.
    pub exclusive: bool,
    /// The guest's process.
    pub pid: u32,
}

impl RangeLock {
    /// Whether both have a byte in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    /// Whether both cannot be held at a time.
    pub fn conflicts(&self, other: &Self) -> bool {
        self.owner != other.owner && (self.exclusive || other.exclusive) && self.overlaps(other)
    }
}

/// The locks of one file, which do not conflict with each other.
#[derive(Clone, Debug, Default)]
pub struct RangeLocks {
    /// By owner and by first byte. Those of one owner have no byte in common.
    owners: HashMap<u64, BTreeMap<u64, RangeLock>>,
    count: usize,
}

impl RangeLocks {
    /// Number of locks.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &RangeLock> {
        self.owners.values().flat_map(BTreeMap::values)
    }

    /// Those that keep `wanted` from being taken.
    pub fn in_the_way_of(&self, wanted: RangeLock) -> impl Iterator<Item = &RangeLock> {
        let near = self.owners.values().flat_map(move |of_one| {
            let ends = of_one.range(..=wanted.end).rev().map(|(_, held)| held);
            ends.take_while(move |held| held.end >= wanted.start)
        });
        near.filter(move |held| held.conflicts(&wanted))
    }

    /// Adds `new`, in the place of what its owner held of the range, and joins it with what touches it and is the same
    /// otherwise. Nothing must be in its way.
    pub fn take(&mut self, mut new: RangeLock) {
        self.give_up(new.owner, new.start, new.end);
        let of_one = self.owners.entry(new.owner).or_default();
        let before = of_one.len();
        let joins = |new: &RangeLock, held: &RangeLock| {
            *new == RangeLock {
                start: new.start,
                end: new.end,
                ..*held
            }
        };
        let left = of_one.range(..new.start).next_back().map(|(_, held)| *held);
        if let Some(left) = left.filter(|left| left.end + 1 == new.start && joins(&new, left)) {
            of_one.remove(&left.start);
            new.start = left.start;
        }
        let right = new.end.checked_add(1).and_then(|next| of_one.get(&next).copied());
        if let Some(right) = right.filter(|right| joins(&new, right)) {
            of_one.remove(&right.start);
            new.end = right.end;
        }
        of_one.insert(new.start, new);
        self.count = self.count + of_one.len() - before;
    }

    /// Takes what `owner` holds between the bytes `start` and `end` away; what lies outside stays.
    pub fn give_up(&mut self, owner: u64, start: u64, end: u64) {
        let Some(of_one) = self.owners.get_mut(&owner) else {
            return;
        };
        let before = of_one.len();
        let ends = of_one.range(..=end).rev().map(|(_, held)| *held);
        let inside: Vec<RangeLock> = ends.take_while(|held| held.end >= start).collect();
        for held in inside {
            of_one.remove(&held.start);
            if held.start < start {
                let end = start - 1;
                of_one.insert(held.start, RangeLock { end, ..held });
            }
            if held.end > end {
                let start = end + 1;
                of_one.insert(start, RangeLock { start, ..held });
            }
        }
        self.count = self.count + of_one.len() - before;
        if of_one.is_empty() {
            self.owners.remove(&owner);
        }
    }

    /// Takes all away that `stays` is false for.
    pub fn retain(&mut self, mut stays: impl FnMut(&RangeLock) -> bool) {
        self.owners.retain(|_, of_one| {
            of_one.retain(|_, held| stays(held));
            !of_one.is_empty()
        });
        self.count = self.owners.values().map(BTreeMap::len).sum();
    }
}

/// Whether a wait of `owner` for `holders` would never end: one of them waits for a lock of `owner`, directly or by way
/// of others. `waited_for` adds whom an owner waits for to a set, and tells how many of its requests wait. A set, because an
/// owner may be in the way many times over.
pub fn is_circular(
    owner: u64,
    holders: BTreeSet<u64>,
    mut waited_for: impl FnMut(u64, &mut BTreeSet<u64>) -> usize,
) -> bool {
    let (mut left, mut seen, mut steps) = (holders, HashSet::new(), 0);
    while let Some(holder) = left.pop_first() {
        if holder == owner {
            return true;
        }
        if steps >= STEPS {
            return false;
        }
        if seen.insert(holder) {
            steps += waited_for(holder, &mut left);
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(owner: u64, start: u64, end: u64) -> RangeLock {
        RangeLock {
            owner,
            handle: 0,
            start,
            end,
            exclusive: true,
            pid: 0,
        }
    }

    fn spans(locks: &RangeLocks) -> Vec<(u64, u64)> {
        let mut spans: Vec<_> = locks.iter().map(|held| (held.start, held.end)).collect();
        spans.sort_unstable();
        spans
    }

    #[test]
    fn a_range_is_split_joined_and_replaced() {
        let mut locks = RangeLocks::default();
        locks.take(lock(1, 0, 99));
        locks.give_up(1, 40, 49);
        assert_eq!(spans(&locks), [(0, 39), (50, 99)]);
        locks.give_up(2, 0, u64::MAX);
        locks.take(lock(1, 40, 49));
        assert_eq!(spans(&locks), [(0, 99)]);
        locks.take(RangeLock {
            exclusive: false,
            ..lock(1, 10, 19)
        });
        assert_eq!(spans(&locks), [(0, 9), (10, 19), (20, 99)]);
        assert_eq!(locks.in_the_way_of(lock(2, 15, 25)).count(), 2);
        let reading = RangeLock {
            exclusive: false,
            ..lock(2, 12, 25)
        };
        assert_eq!(locks.in_the_way_of(reading).count(), 1);
        locks.give_up(1, 0, u64::MAX);
        assert!(locks.is_empty());
        locks.take(lock(1, 5, u64::MAX));
        locks.take(lock(1, 0, 4));
        assert_eq!(spans(&locks), [(0, u64::MAX)]);
    }

    #[test]
    fn circles_are_found_and_long_ways_given_up() {
        let chain = |length: u64| {
            move |owner: u64, left: &mut BTreeSet<u64>| {
                left.insert((owner + 1) % length);
                1
            }
        };
        assert!(is_circular(0, [1].into(), chain(2)));
        assert!(is_circular(0, [1].into(), chain(100)));
        assert!(!is_circular(0, [1].into(), chain(10_000)));
        assert!(!is_circular(0, [1, 2].into(), |_, _| 0));
        // Others may wait for each other; that is not this one's concern.
        assert!(!is_circular(0, [1].into(), |owner, left| {
            left.insert(3 - owner);
            1
        }));
    }
}
