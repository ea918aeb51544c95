//! The body of an answer to a list of ranges: `multipart/byteranges` (RFC 9110, section 14.6), as it arrives.

use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};

use super::Sink;

/// Longest head of a part.
const MAX_HEAD: usize = 4 << 10;

/// Takes a body apart. The parts must be the ranges asked for, in their order.
pub(super) struct Parts<'a> {
    delimiter: String,
    ranges: &'a [Range<u64>],
    /// Bytes of the current part that are still to come.
    left: u64,
    /// The beginning of a head whose end is still to come.
    buffer: BytesMut,
}

/// The boundary that a `Content-Type` names, if it is that of such a body.
pub(super) fn boundary(content_type: &str) -> Option<&str> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/byteranges") {
        return None;
    }
    parameters.split(';').find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        let value = value.trim().trim_matches('"');
        (name.trim().eq_ignore_ascii_case("boundary") && !value.is_empty() && value.len() <= 70)
            .then_some(value)
    })
}

impl<'a> Parts<'a> {
    pub(super) fn new(boundary: &str, ranges: &'a [Range<u64>]) -> Self {
        Self {
            delimiter: format!("--{boundary}\r\n"),
            ranges,
            left: 0,
            buffer: BytesMut::new(),
        }
    }

    /// Whether all ranges are there.
    pub(super) fn complete(&self) -> bool {
        self.left == 0 && self.ranges.is_empty()
    }

    /// Takes the next piece of the body. An error says what is wrong with it.
    pub(super) fn push(&mut self, piece: Bytes, sink: Sink<'_>) -> Result<(), String> {
        let mut piece = if self.buffer.is_empty() {
            piece
        } else {
            self.buffer.extend_from_slice(&piece);
            self.buffer.split().freeze()
        };
        while !self.complete() {
            if self.left > 0 {
                let size = self.left.min(piece.len() as u64) as usize;
                if size == 0 {
                    return Ok(());
                }
                sink(piece.split_to(size));
                self.left -= size as u64;
                continue;
            }
            let Some(end) = piece.windows(4).position(|window| window == b"\r\n\r\n") else {
                if piece.len() > MAX_HEAD {
                    return Err("a part without a head".to_owned());
                }
                self.buffer.extend_from_slice(&piece);
                return Ok(());
            };
            let head = String::from_utf8_lossy(piece.get(..end).unwrap_or_default()).into_owned();
            piece.advance(end + 4);
            self.begin(&head)?;
        }
        Ok(())
    }

    fn begin(&mut self, head: &str) -> Result<(), String> {
        // After a part its line ends; before the first one there may be nothing, or such an end.
        let head = head.trim_start_matches("\r\n");
        let fields = head
            .strip_prefix(self.delimiter.as_str())
            .ok_or("a part does not begin where the one before ends")?;
        let range = fields.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-range").then(|| value.trim())
        });
        let Some((expected, rest)) = self.ranges.split_first() else {
            return Err("more parts than ranges".to_owned());
        };
        let wanted = format!("bytes {}-{}", expected.start, expected.end.saturating_sub(1));
        let given = range
            .and_then(|range| range.rsplit_once('/'))
            .map(|(range, _)| range);
        if given != Some(wanted.as_str()) {
            return Err(format!(
                "asked for {wanted}, got {}",
                range.unwrap_or("no Content-Range")
            ));
        }
        self.left = expected.end - expected.start;
        self.ranges = rest;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn body(ranges: &[Range<u64>], data: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        for range in ranges {
            let head = format!(
                "\r\n--xyz\r\nContent-Type: text/plain\r\nContent-Range: bytes {}-{}/{}\r\n\r\n",
                range.start,
                range.end - 1,
                data.len()
            );
            body.extend(head.into_bytes());
            body.extend(&data[range.start as usize..range.end as usize]);
        }
        body.extend(b"\r\n--xyz--\r\n");
        body
    }

    fn take_apart(body: &[u8], ranges: &[Range<u64>], size: usize) -> Result<(Vec<u8>, bool), String> {
        let mut parts = Parts::new("xyz", ranges);
        let mut taken = Vec::new();
        for piece in body.chunks(size) {
            parts.push(Bytes::copy_from_slice(piece), &mut |bytes| {
                taken.extend_from_slice(&bytes)
            })?;
        }
        Ok((taken, parts.complete()))
    }

    #[test]
    fn boundaries_are_found() {
        assert_eq!(boundary("multipart/byteranges; boundary=xyz"), Some("xyz"));
        assert_eq!(
            boundary("Multipart/ByteRanges;charset=x; Boundary=\"a b\""),
            Some("a b")
        );
        for other in [
            "text/plain; boundary=x",
            "multipart/byteranges",
            "multipart/byteranges; boundary=",
        ] {
            assert_eq!(boundary(other), None, "{other}");
        }
    }

    #[test]
    fn other_ranges_than_asked_for_are_refused() {
        let data: Vec<u8> = (0..100).collect();
        let body = body(&[0..10, 20..30], &data);
        assert!(take_apart(&body, &[0..10, 20..31], 1000).is_err());
        assert!(take_apart(&body, std::slice::from_ref(&(0..10)), 1000).unwrap().1);
        assert!(!take_apart(&body, &[0..10, 20..30, 40..50], 3).is_ok_and(|(_, complete)| complete));
        assert!(take_apart(&[b'x'; 9000], &[0..10, 20..30], 1000).is_err());
    }

    proptest! {
        #[test]
        fn a_body_is_taken_apart_however_it_arrives(
            gaps in prop::collection::vec((1u64..20, 1u64..20), 1..12),
            size in 1usize..60,
        ) {
            let mut at = 0;
            let ranges: Vec<_> = gaps.into_iter().map(|(gap, length)| {
                let start = at + gap;
                at = start + length;
                start..at
            }).collect();
            let data: Vec<u8> = (0..at).map(|byte| (byte % 7 * 13) as u8).collect();
            let (taken, complete) = take_apart(&body(&ranges, &data), &ranges, size).unwrap();
            let expected: Vec<u8> = ranges.iter().flat_map(|r| data[r.start as usize..r.end as usize].to_vec()).collect();
            prop_assert!(complete);
            prop_assert_eq!(taken, expected);
        }

        #[test]
        fn no_body_hangs_or_panics(body in prop::collection::vec(any::<u8>(), 0..300), size in 1usize..50) {
            let _ = take_apart(&body, &[0..5, 9..12], size);
        }
    }
}
