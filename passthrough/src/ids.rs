//! Users and groups of the guest as users and groups of the host, and back.
//!
//! By default a number means the same on both sides. Rules, in the text form of virtiofsd's `--translate-uid` and
//! `--translate-gid`, change that for ranges of numbers; a number that no rule covers means itself.
//!
//! | rule | guest → host | host → guest |
//! |---|---|---|
//! | `map:GUEST:HOST:COUNT` | shifted | shifted |
//! | `guest:GUEST:HOST:COUNT` | shifted | |
//! | `host:HOST:GUEST:COUNT` | | shifted |
//! | `squash-guest:GUEST:HOST:COUNT` | all become HOST | |
//! | `squash-host:HOST:GUEST:COUNT` | | all become GUEST |
//! | `forbid-guest:GUEST:COUNT` | EPERM | |

use std::io;
use std::str::FromStr;

use crate::sys::errno;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Becomes {
    /// The first number of the range becomes this one, the next the next.
    From(u32),
    /// All become this one.
    One(u32),
    Forbidden,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: u32,
    count: u32,
    becomes: Becomes,
}

impl Range {
    fn covers(&self, id: u32) -> bool {
        id.checked_sub(self.first)
            .is_some_and(|distance| distance < self.count)
    }
}

/// Rules for one kind of numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    to_host: Vec<Range>,
    to_guest: Vec<Range>,
}

/// Why a text is no rule, or cannot join the others.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdRuleError {
    /// The first field is none of the types above.
    #[error("{text:?}: unknown type of rule")]
    Type {
        /// The rule.
        text: String,
    },
    /// Fields are missing, left over, no numbers, or leave the range of ids.
    #[error("{text:?}: the numbers are not what this type of rule takes, or leave the range of ids")]
    Numbers {
        /// The rule.
        text: String,
    },
    /// Some number is covered by an earlier rule of the same direction.
    #[error("{text:?}: a number is covered by an earlier rule")]
    Overlap {
        /// The rule.
        text: String,
    },
}

impl IdMap {
    /// The guest's `guest` is the host's `host`, and the other way round.
    pub fn one(guest: u32, host: u32) -> Self {
        let range = |first, to| {
            vec![Range {
                first,
                count: 1,
                becomes: Becomes::From(to),
            }]
        };
        IdMap {
            to_host: range(guest, host),
            to_guest: range(host, guest),
        }
    }

    /// Whether every number means itself.
    pub fn is_empty(&self) -> bool {
        self.to_host.is_empty() && self.to_guest.is_empty()
    }

    /// Adds a rule.
    ///
    /// # Errors
    ///
    /// See [`IdRuleError`].
    pub fn add(&mut self, rule: &str) -> Result<(), IdRuleError> {
        let text = || rule.to_owned();
        let mut fields = rule.split(':');
        let kind = fields.next().unwrap_or("");
        let numbers: Option<Vec<u32>> = fields.map(|field| field.parse().ok()).collect();
        let numbers = numbers.ok_or_else(|| IdRuleError::Numbers { text: text() })?;
        let (first, target, count) = match (kind, numbers.as_slice()) {
            ("forbid-guest", [first, count]) => (*first, 0, *count),
            ("map" | "guest" | "host" | "squash-guest" | "squash-host", [first, target, count]) => {
                (*first, *target, *count)
            }
            ("map" | "guest" | "host" | "squash-guest" | "squash-host" | "forbid-guest", _) => {
                return Err(IdRuleError::Numbers { text: text() });
            }
            _ => return Err(IdRuleError::Type { text: text() }),
        };
        let shifted = matches!(kind, "map" | "guest" | "host");
        // The largest number means "nobody" in system calls, so a range ends before it.
        let fits = |start: u32, count: u32| start.checked_add(count).is_some();
        if count == 0 || !fits(first, count) || !fits(target, if shifted { count } else { 1 }) {
            return Err(IdRuleError::Numbers { text: text() });
        }
        let range = |first, becomes| Range {
            first,
            count,
            becomes,
        };
        let (to_host, to_guest) = match kind {
            "map" => (
                Some(range(first, Becomes::From(target))),
                Some(range(target, Becomes::From(first))),
            ),
            "guest" => (Some(range(first, Becomes::From(target))), None),
            "host" => (None, Some(range(first, Becomes::From(target)))),
            "squash-guest" => (Some(range(first, Becomes::One(target))), None),
            "squash-host" => (None, Some(range(first, Becomes::One(target)))),
            _ => (Some(range(first, Becomes::Forbidden)), None),
        };
        let overlaps = |ranges: &[Range], new: &Option<Range>| {
            new.is_some_and(|new| {
                ranges
                    .iter()
                    .any(|old| old.covers(new.first) || new.covers(old.first))
            })
        };
        if overlaps(&self.to_host, &to_host) || overlaps(&self.to_guest, &to_guest) {
            return Err(IdRuleError::Overlap { text: text() });
        }
        self.to_host.extend(to_host);
        self.to_guest.extend(to_guest);
        Ok(())
    }

    /// The host's number for the guest's `id`. EPERM: a rule forbids it.
    pub(crate) fn to_host(&self, id: u32) -> io::Result<u32> {
        match translate(&self.to_host, id) {
            Some(id) => Ok(id),
            None => Err(errno(libc::EPERM)),
        }
    }

    /// The guest's number for the host's `id`.
    pub(crate) fn to_guest(&self, id: u32) -> u32 {
        translate(&self.to_guest, id).unwrap_or(id)
    }
}

fn translate(ranges: &[Range], id: u32) -> Option<u32> {
    match ranges.iter().find(|range| range.covers(id)) {
        None => Some(id),
        Some(range) => match range.becomes {
            Becomes::From(start) => Some(start.wrapping_add(id.wrapping_sub(range.first))),
            Becomes::One(one) => Some(one),
            Becomes::Forbidden => None,
        },
    }
}

impl FromStr for IdMap {
    type Err = IdRuleError;

    /// One rule, or several separated by white space.
    fn from_str(text: &str) -> Result<Self, IdRuleError> {
        let mut map = IdMap::default();
        text.split_ascii_whitespace().try_for_each(|rule| map.add(rule))?;
        Ok(map)
    }
}

/// What users and groups of the guest are on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMaps {
    /// Users.
    pub users: IdMap,
    /// Groups.
    pub groups: IdMap,
}

impl IdMaps {
    /// Whether every number means itself.
    pub fn is_empty(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(map: &IdMap, id: u32) -> Option<u32> {
        map.to_host(id).ok()
    }

    #[test]
    fn numbers_without_a_rule_mean_themselves() {
        let map = IdMap::default();
        assert!(map.is_empty());
        for id in [0, 1, 65_534, u32::MAX] {
            assert_eq!((host(&map, id), map.to_guest(id)), (Some(id), id));
        }
    }

    #[test]
    fn ranges_shift_both_ways() {
        let map: IdMap = "map:0:100000:65536".parse().unwrap();
        assert_eq!(
            (host(&map, 0), host(&map, 65_535)),
            (Some(100_000), Some(165_535))
        );
        assert_eq!(host(&map, 65_536), Some(65_536));
        assert_eq!(
            (map.to_guest(100_000), map.to_guest(165_535), map.to_guest(99_999)),
            (0, 65_535, 99_999)
        );
        assert_eq!(IdMap::one(0, 1000), "map:0:1000:1".parse().unwrap());
    }

    #[test]
    fn one_way_squashed_and_forbidden() {
        let map: IdMap =
            "guest:0:500:1 host:7:8:2\nsquash-guest:1000:42:1000 squash-host:2000:9:50 forbid-guest:5000:2"
                .parse()
                .unwrap();
        assert_eq!((host(&map, 0), map.to_guest(500)), (Some(500), 500));
        assert_eq!((host(&map, 7), map.to_guest(7), map.to_guest(8)), (Some(7), 8, 9));
        assert_eq!(
            (host(&map, 1000), host(&map, 1999), host(&map, 2000)),
            (Some(42), Some(42), Some(2000))
        );
        assert_eq!(
            (map.to_guest(2000), map.to_guest(2049), map.to_guest(2050)),
            (9, 9, 2050)
        );
        assert_eq!(
            (host(&map, 5000), host(&map, 5001), host(&map, 5002)),
            (None, None, Some(5002))
        );
    }

    #[test]
    fn broken_rules_are_named() {
        let error = |text: &str| text.parse::<IdMap>().unwrap_err();
        let numbers = |text: &str| assert_eq!(error(text), IdRuleError::Numbers { text: text.into() });
        numbers("map:0:1");
        numbers("map:0:1:2:3");
        numbers("map:0:1:x");
        numbers("map:0:-1:1");
        numbers("map:0:1:0");
        numbers("map:0:4294967295:1");
        numbers("map:4294967290:0:10");
        numbers("forbid-guest:1:2:3");
        assert_eq!(
            error("other:0:1:2"),
            IdRuleError::Type {
                text: "other:0:1:2".into()
            }
        );
        assert_eq!(
            error("map:0:10:5 guest:4:100:1"),
            IdRuleError::Overlap {
                text: "guest:4:100:1".into()
            }
        );
        assert_eq!(
            error("guest:4:100:1 map:0:10:5"),
            IdRuleError::Overlap {
                text: "map:0:10:5".into()
            }
        );
        assert!("guest:0:10:5 host:0:10:5".parse::<IdMap>().is_ok());
    }
}
