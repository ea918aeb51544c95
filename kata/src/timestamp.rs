//! Points in time as the wire and the log write them: UTC, proleptic Gregorian calendar.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// A point in time, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Utc {
    year: u64,
    month: u64,
    day: u64,
    second_of_day: u64,
    nanosecond: u32,
}

impl Utc {
    /// The present.
    pub fn now() -> Self {
        Self::from(SystemTime::now())
    }

    /// `2026-11-21 21:46:42.629744263 +00:00:00`, as clients parse the time of a mount.
    pub fn for_wire(&self) -> String {
        format!("{self}.{:09} +00:00:00", self.nanosecond)
    }

    /// `2026-11-21 21:46:42.629744 +00:00`, as log lines begin.
    pub fn for_log(&self) -> String {
        format!("{self}.{:06} +00:00", self.nanosecond / 1000)
    }
}

impl Utc {
    /// `2026-11-21T21:46:42.629744Z`, as RFC 3339 has it.
    pub fn for_json(&self) -> String {
        let date_and_time = self.to_string().replace(' ', "T");
        format!("{date_and_time}.{:06}Z", self.nanosecond / 1000)
    }
}

impl fmt::Display for Utc {
    /// Date and time to the second.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hour, rest) = (self.second_of_day / 3600, self.second_of_day % 3600);
        let (minute, second) = (rest / 60, rest % 60);
        write!(
            f,
            "{:04}-{:02}-{:02} {hour:02}:{minute:02}:{second:02}",
            self.year, self.month, self.day
        )
    }
}

impl From<SystemTime> for Utc {
    /// Times before 1970 become 1970.
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        // Years are counted from March, so that the leap day is the last of its year; a cycle of 400 years
        // has 146,097 days. 719,468 days lie between 0000-03-01 and 1970-01-01.
        let days = since.as_secs() / 86_400 + 719_468;
        let (cycle, day_of_cycle) = (days / 146_097, days % 146_097);
        let year_of_cycle =
            (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
        let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        Self {
            year: cycle * 400 + year_of_cycle + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            second_of_day: since.as_secs() % 86_400,
            nanosecond: since.subsec_nanos(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn known_times() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_795_297_602, "2026-11-21 21:46:42"),
            (4_107_542_399, "2100-02-28 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
            (1_735_689_599, "2024-12-31 23:59:59"),
        ] {
            assert_eq!(
                Utc::from(UNIX_EPOCH + Duration::from_secs(seconds)).to_string(),
                text
            );
        }
        let time = Utc::from(UNIX_EPOCH + Duration::new(1_795_297_602, 629_744_263));
        assert_eq!(time.for_wire(), "2026-11-21 21:46:42.629744263 +00:00:00");
        assert_eq!(time.for_log(), "2026-11-21 21:46:42.629744 +00:00");
        assert_eq!(time.for_json(), "2026-11-21T21:46:42.629744Z");
    }
}
