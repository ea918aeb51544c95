//! What of a body a request asks for (RFC 9110, section 14).

use std::ops::Range;

/// Outer `None`: the header is not of a kind that is understood, and ignored. Inner `None`:
/// the range cannot be satisfied.
pub(super) fn parse_range(header: &str, size: u64) -> Option<Option<Range<u64>>> {
    let (unit, spec) = header.split_once('=')?;
    let (first, last) = spec.split_once('-')?;
    if unit.trim() != "bytes" || spec.contains(',') {
        return None;
    }
    let (first, last) = (first.trim(), last.trim());
    if first.is_empty() {
        let suffix: u64 = last.parse().ok()?;
        return Some((suffix > 0 && size > 0).then(|| size.saturating_sub(suffix)..size));
    }
    let first: u64 = first.parse().ok()?;
    let last = if last.is_empty() {
        u64::MAX
    } else {
        last.parse().ok()?
    };
    if last < first {
        return None;
    }
    Some((first < size).then(|| first..last.saturating_add(1).min(size)))
}

/// Longest list of ranges, and most bytes of one, that are answered as such.
const MAX_RANGES: usize = 1024;
const MAX_LIST: u64 = 64 << 20;

/// A list of ranges, none of which lies beyond the end. Any other list is answered with the whole blob.
pub(super) fn parse_list(header: &str, size: u64) -> Option<Vec<Range<u64>>> {
    let ranges: Vec<Range<u64>> = header
        .strip_prefix("bytes=")?
        .split(',')
        .take(MAX_RANGES + 1)
        .map(|range| parse_range(&format!("bytes={range}"), size).flatten())
        .collect::<Option<_>>()?;
    let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    ((2..=MAX_RANGES).contains(&ranges.len()) && total <= MAX_LIST.min(size)).then_some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_ranges_are_taken_whole_or_not_at_all() {
        assert_eq!(parse_list("bytes=0-9,20-29", 100), Some(vec![0..10, 20..30]));
        assert_eq!(parse_list("bytes=0-9, -5", 100), Some(vec![0..10, 95..100]));
        for ignored in [
            "bytes=0-9",
            "bytes=0-9,100-",
            "bytes=0-9,x",
            "bytes=0-,0-",
            "lines=0-1,2-3",
        ] {
            assert_eq!(parse_list(ignored, 100), None, "{ignored}");
        }
    }

    #[test]
    fn ranges_follow_the_specification() {
        assert_eq!(parse_range("bytes=0-9", 100), Some(Some(0..10)));
        assert_eq!(parse_range("bytes=90-", 100), Some(Some(90..100)));
        assert_eq!(parse_range("bytes=-10", 100), Some(Some(90..100)));
        assert_eq!(parse_range("bytes=-1000", 100), Some(Some(0..100)));
        assert_eq!(parse_range("bytes=50-1000", 100), Some(Some(50..100)));
        assert_eq!(
            parse_range("bytes=0-18446744073709551615", 100),
            Some(Some(0..100))
        );
        assert_eq!(parse_range("bytes=100-", 100), Some(None), "not satisfiable");
        assert_eq!(parse_range("bytes=-0", 100), Some(None));
        assert_eq!(parse_range("bytes=0-", 0), Some(None));
        for ignored in [
            "bytes=9-0",
            "bytes=0-1,5-6",
            "lines=0-1",
            "bytes",
            "bytes=a-b",
            "bytes=-",
        ] {
            assert_eq!(parse_range(ignored, 100), None, "{ignored}");
        }
    }
}
