//! From units to requests: which byte ranges to ask the source for. Pure.

use std::ops::Range;

/// Something that is stored in one range of the blob.
pub(crate) trait Stored {
    /// The range.
    fn range(&self) -> Range<u64>;
}

/// One range request and the units that its answer holds, by where they start.
#[derive(Debug)]
pub(crate) struct Group<U> {
    /// What to ask for. Covers the units and nothing else.
    pub(crate) range: Range<u64>,
    /// The units, ascending; slices of a gzip stream may overlap.
    pub(crate) units: Vec<U>,
}

/// Joins units that touch or overlap into requests of at most `limit` bytes (a single unit may be larger).
pub(crate) fn merge<U: Stored>(mut units: Vec<U>, limit: u64) -> Vec<Group<U>> {
    units.sort_by_key(|unit| (unit.range().start, unit.range().end));
    let mut groups: Vec<Group<U>> = Vec::new();
    for unit in units {
        let range = unit.range();
        match groups.last_mut() {
            Some(group)
                if range.start <= group.range.end
                    && range.end.max(group.range.end) - group.range.start <= limit =>
            {
                group.range.end = group.range.end.max(range.end);
                group.units.push(unit);
            }
            _ => groups.push(Group {
                range,
                units: vec![unit],
            }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Stored for Range<u64> {
        fn range(&self) -> Range<u64> {
            self.clone()
        }
    }

    #[test]
    fn neighbours_become_one_request_and_strangers_do_not() {
        let groups = merge(vec![20..30, 0..10, 10..15, 40..50], 100);
        let ranges: Vec<_> = groups.iter().map(|group| group.range.clone()).collect();
        assert_eq!(ranges, [0..15, 20..30, 40..50]);
    }

    proptest! {
        #[test]
        fn every_unit_is_asked_for_once_and_nothing_else(
            units in prop::collection::vec((0u64..2000, 1u64..100).prop_map(|(a, n)| a..a + n), 0..60),
            limit in 1u64..500,
        ) {
            let groups = merge(units.clone(), limit);
            let mut seen: Vec<_> = groups.iter().flat_map(|group| group.units.clone()).collect();
            let mut expected = units;
            seen.sort_by_key(|r| (r.start, r.end));
            expected.sort_by_key(|r| (r.start, r.end));
            prop_assert_eq!(&seen, &expected);
            for group in &groups {
                let start = group.units.iter().map(|r| r.start).min();
                let end = group.units.iter().map(|r| r.end).max();
                prop_assert_eq!(Some(group.range.start), start);
                prop_assert_eq!(Some(group.range.end), end);
                prop_assert!(group.units.len() == 1 || group.range.end - group.range.start <= limit);
                for byte in group.range.clone() {
                    prop_assert!(group.units.iter().any(|r| r.contains(&byte)));
                }
            }
        }

        #[test]
        fn touching_units_within_the_limit_are_one_request(sizes in prop::collection::vec(1u64..50, 1..40)) {
            let mut at = 7;
            let units: Vec<_> = sizes.iter().map(|n| { at += n; at - n..at }).collect();
            prop_assert_eq!(merge(units, u64::MAX).len(), 1);
        }
    }
}
