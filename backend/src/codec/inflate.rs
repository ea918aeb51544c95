//! Inflate: gzip and zlib data, and slices of a gzip stream that are entered in the middle (blob format, section 6).
//!
//! An entry point lies at any bit, and the bits behind it refer to up to 32 KiB of output before it. No decoder is asked to start like that:
//! we write a little deflate data in front, which brings any decoder into exactly that state. A *stored* block with the
//! dictionary makes it the window; empty blocks whose lengths add up to the right number of bits move on to the entry point.
//! The dictionary's bytes are cut from the output.

use bytes::Bytes;
use flate2::{Decompress, FlushDecompress, Status};

use crate::chunk::ZranContext;

/// Why data can not be inflated.
pub(super) type Reason = String;

/// Inflates gzip or zlib data to `size` bytes. What follows them is ignored: old images do not know how long the data are.
pub(super) fn whole(stored: &[u8], size: usize) -> Result<Bytes, Reason> {
    let body = match stored {
        [0x1f, 0x8b, ..] => skip_header(stored)?,
        _ => stored.get(2..).ok_or("no zlib header")?,
    };
    Inflater::new(size).members(body).map(Bytes::from)
}

/// Inflates the slice of a gzip stream that `context` enters.
pub(super) fn slice(stored: &[u8], context: &ZranContext) -> Result<Bytes, Reason> {
    let prefix = prefix(context);
    let window = context.dictionary.len();
    let mut inflater = Inflater::new(window + context.decoded_size as usize);
    inflater.feed(&prefix)?;
    let output = inflater.members(stored)?;
    Ok(Bytes::from(output).slice(window..))
}

struct Inflater {
    raw: Decompress,
    output: Vec<u8>,
    filled: usize,
}

impl Inflater {
    fn new(size: usize) -> Self {
        Self {
            raw: Decompress::new(false),
            output: vec![0; size],
            filled: 0,
        }
    }

    /// Feeds data; returns what was not used, which is something only after the end of a member or of the output.
    fn feed<'a>(&mut self, input: &'a [u8]) -> Result<(&'a [u8], Status), Reason> {
        let mut rest = input;
        loop {
            let output = self.output.get_mut(self.filled..).unwrap_or_default();
            let (read, written) = (self.raw.total_in(), self.raw.total_out());
            let status = self
                .raw
                .decompress(rest, output, FlushDecompress::None)
                .map_err(|error| error.to_string())?;
            let (read, written) = (self.raw.total_in() - read, self.raw.total_out() - written);
            rest = rest.get(read as usize..).unwrap_or_default();
            self.filled += written as usize;
            if status == Status::StreamEnd || rest.is_empty() || (read == 0 && written == 0) {
                return Ok((rest, status));
            }
        }
    }

    /// Inflates until the output is full, from one gzip member to the next.
    fn members(mut self, input: &[u8]) -> Result<Vec<u8>, Reason> {
        let mut rest = input;
        loop {
            let (unused, status) = self.feed(rest)?;
            if self.filled == self.output.len() {
                return Ok(self.output);
            }
            if status != Status::StreamEnd {
                return Err(format!(
                    "ends after {} of {} bytes",
                    self.filled,
                    self.output.len()
                ));
            }
            // CRC-32 and size of the member, then the next one, with an empty window.
            let next = unused.get(8..).ok_or("ends in a trailer")?;
            rest = skip_header(next)?;
            self.raw = Decompress::new(false);
        }
    }
}

/// Skips the header of a gzip member (RFC 1952, section 2.3).
fn skip_header(input: &[u8]) -> Result<&[u8], Reason> {
    const CRC: u8 = 2;
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    let cut = || "ends in a gzip header".to_owned();
    let (fixed, mut rest) = input.split_first_chunk::<10>().ok_or_else(cut)?;
    let [0x1f, 0x8b, 8, flags, ..] = *fixed else {
        return Err("no gzip header".into());
    };
    if flags & EXTRA != 0 {
        let (size, after) = rest.split_first_chunk::<2>().ok_or_else(cut)?;
        rest = after
            .get(usize::from(u16::from_le_bytes(*size))..)
            .ok_or_else(cut)?;
    }
    for text in [NAME, COMMENT] {
        if flags & text != 0 {
            let end = rest.iter().position(|byte| *byte == 0).ok_or_else(cut)?;
            rest = rest.get(end + 1..).ok_or_else(cut)?;
        }
    }
    if flags & CRC != 0 {
        rest = rest.get(2..).ok_or_else(cut)?;
    }
    Ok(rest)
}

/// Deflate data after which a decoder has the dictionary as its window and stands `bits` bits before the end of a byte, with those bits
/// already in it.
fn prefix(context: &ZranContext) -> Vec<u8> {
    let mut bits = Bits::default();
    if !context.dictionary.is_empty() {
        bits.push(0b000, 3); // not final, stored
        bits.align();
        let size = context.dictionary.len() as u16;
        bits.bytes.extend(size.to_le_bytes());
        bits.bytes.extend((!size).to_le_bytes());
        bits.bytes.extend(&context.dictionary);
    }
    let count = u32::from(context.bits);
    let mut filler = (8 - count) % 8;
    if filler % 2 == 1 {
        bits.push_odd_empty_block();
        filler -= 1;
    }
    for _ in 0..filler / 2 {
        bits.push_even_empty_block();
    }
    // Ten bits are two modulo eight, so at most three of those blocks bring us there.
    if count > 0 {
        bits.push(u32::from(context.byte) >> (8 - count), count);
    }
    bits.bytes
}

/// Writes bits, least significant first.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    /// Bits used of the last byte, 0 for all.
    used: u32,
}

impl Bits {
    fn push(&mut self, value: u32, count: u32) {
        for bit in 0..count {
            if self.used == 0 {
                self.bytes.push(0);
            }
            if let Some(last) = self.bytes.last_mut() {
                *last |= ((value >> bit & 1) as u8) << self.used;
            }
            self.used = (self.used + 1) % 8;
        }
    }

    fn align(&mut self) {
        self.used = 0;
    }

    /// A block with the fixed code and nothing but its end: 10 bits.
    fn push_even_empty_block(&mut self) {
        self.push(0b010, 3);
        self.push(0, 7);
    }

    /// A block with a code of its own and nothing but its end: 97 bits, one modulo eight.
    fn push_odd_empty_block(&mut self) {
        self.push(0b100, 3);
        // 257 literal and length codes, 1 distance code, 18 code length codes.
        self.push(0, 5);
        self.push(0, 5);
        self.push(14, 4);
        // Lengths of the codes for 16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1: 18 is `0`, 1 is `10`, 17 is `11`.
        for length in [0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2] {
            self.push(length, 3);
        }
        // 138 + 108 + 10 literals without a code.
        self.push(0, 1);
        self.push(138 - 11, 7);
        self.push(0, 1);
        self.push(108 - 11, 7);
        self.push(0b11, 2);
        self.push(10 - 3, 3);
        // One bit for "end of block", and for the distance that is never used. Codes go most significant bit first.
        self.push(0b01, 2);
        self.push(0b01, 2);
        // End of block.
        self.push(0, 1);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::write::{DeflateEncoder, GzEncoder};
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    fn text(size: usize) -> Vec<u8> {
        (0u32..)
            .flat_map(|n| format!("{} and {}, ", n * n % 977, n % 13).into_bytes())
            .take(size)
            .collect()
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn whole_streams_and_what_follows_them() {
        let plain = text(100_000);
        let mut packed = gzip(&plain);
        assert_eq!(whole(&packed, plain.len()).unwrap(), plain);
        packed.extend_from_slice(b"something else");
        assert_eq!(whole(&packed, plain.len()).unwrap(), plain);
        assert!(whole(&packed[..500], plain.len()).is_err());
        assert!(whole(&packed, plain.len() + 1).is_err());
        assert_eq!(whole(&packed, 10).unwrap(), plain[..10]);
    }

    #[test]
    fn members_follow_each_other() {
        let plain = text(50_000);
        let packed = [
            gzip(&plain[..20_000]),
            gzip(&plain[20_000..20_001]),
            gzip(&plain[20_001..]),
        ]
        .concat();
        assert_eq!(whole(&packed, plain.len()).unwrap(), plain);
    }

    #[test]
    fn the_filler_blocks_are_as_long_as_they_should_be_and_empty() {
        for odd in 0..2 {
            for even in 0..4 {
                let mut bits = Bits::default();
                (0..odd).for_each(|_| bits.push_odd_empty_block());
                (0..even).for_each(|_| bits.push_even_empty_block());
                assert_eq!(bits.used, (odd + 2 * even) % 8);
                // A final stored block with one byte ends the data.
                bits.push(0b001, 3);
                bits.align();
                bits.bytes.extend([1, 0, 0xfe, 0xff, b'x']);
                let mut inflater = Inflater::new(1);
                let (rest, status) = inflater.feed(&bits.bytes).unwrap();
                assert_eq!(
                    (rest, status, inflater.output.as_slice()),
                    (&[][..], Status::StreamEnd, &b"x"[..])
                );
            }
        }
    }

    /// Deflates `parts` into one stream; returns it with the bit at which each part begins. Every part is a block of its own.
    fn blocks(parts: &[&[u8]]) -> (Vec<u8>, Vec<usize>) {
        let mut raw = Compress::new(Compression::default(), false);
        let (mut out, mut starts) = (vec![0; 1 << 20], Vec::new());
        for part in parts {
            let at = raw.total_out() as usize;
            starts.push(at * 8);
            raw.compress(part, &mut out[at..], FlushCompress::Partial)
                .unwrap();
        }
        out.truncate(raw.total_out() as usize);
        (out, starts)
    }

    /// Moves a deflate stream to start `shift` bits later, behind empty blocks of together that many bits modulo 8.
    fn at_bit(shift: u32, stream: &[u8]) -> (Vec<u8>, u32) {
        let mut bits = Bits::default();
        if shift % 2 == 1 {
            bits.push_odd_empty_block();
        }
        (0..shift / 2).for_each(|_| bits.push_even_empty_block());
        let used = bits.used;
        for byte in stream {
            bits.push(u32::from(*byte), 8);
        }
        (bits.bytes, used)
    }

    #[test]
    fn a_stream_is_entered_at_every_bit_with_its_window() {
        let plain = text(120_000);
        let (first, second) = plain.split_at(70_000);
        // The second half refers to the first: compress it with the window as dictionary.
        let window = &first[first.len() - 32_768..];
        let mut raw = Compress::new(Compression::default(), false);
        raw.set_dictionary(window).unwrap();
        let mut packed = vec![0; 1 << 20];
        raw.compress(second, &mut packed, FlushCompress::Finish).unwrap();
        packed.truncate(raw.total_out() as usize);
        for shift in 0..8 {
            // `moved` is a stream whose interesting part begins `used` bits into a byte.
            let (moved, used) = at_bit(shift, &packed);
            let mut empty = Bits::default();
            if shift % 2 == 1 {
                empty.push_odd_empty_block();
            }
            (0..shift / 2).for_each(|_| empty.push_even_empty_block());
            let bytes = empty.bytes.len();
            let bits = if used == 0 { 0 } else { 8 - used as u8 };
            let context = ZranContext {
                number: 0,
                decoded_size: second.len() as u32,
                bits,
                byte: if bytes == 0 { 0xff } else { moved[bytes - 1] },
                dictionary: window.to_vec().into(),
            };
            assert_eq!(slice(&moved[bytes..], &context).unwrap(), second, "shift {shift}");
            let blind = ZranContext {
                dictionary: Bytes::new(),
                ..context.clone()
            };
            assert!(
                slice(&moved[bytes..], &blind).is_err(),
                "without the window it can not be right"
            );
            let shorter = ZranContext {
                decoded_size: 1000,
                ..context
            };
            assert_eq!(
                slice(&moved[bytes..], &shorter).unwrap(),
                second[..1000],
                "ends in the middle of a block"
            );
        }
    }

    #[test]
    fn a_slice_goes_on_into_the_next_member() {
        let plain = text(9000);
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&plain[..4000]).unwrap();
        let mut stored = encoder.finish().unwrap();
        stored.extend([0; 8]);
        stored.extend(gzip(&plain[4000..]));
        let context = ZranContext {
            number: 0,
            decoded_size: 9000,
            bits: 0,
            byte: 0,
            dictionary: Bytes::new(),
        };
        assert_eq!(slice(&stored, &context).unwrap(), plain);
        assert!(slice(&stored[..3000.min(stored.len() / 2)], &context).is_err());
    }

    #[test]
    fn blocks_of_one_stream_are_entered_where_they_begin() {
        let plain = text(30_000);
        let parts: Vec<&[u8]> = plain.chunks(10_000).collect();
        let (stream, _) = blocks(&parts);
        let context = ZranContext {
            number: 0,
            decoded_size: 30_000,
            bits: 0,
            byte: 0,
            dictionary: Bytes::new(),
        };
        assert_eq!(slice(&stream, &context).unwrap(), plain);
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_are_refused_or_decoded_but_nothing_else(
            stored in proptest::collection::vec(proptest::num::u8::ANY, 0..300),
            bits in 0u8..8, byte: u8, window in 0usize..100, size in 1u32..5000,
        ) {
            let context = ZranContext { number: 0, decoded_size: size, bits, byte, dictionary: vec![7; window].into() };
            if let Ok(data) = slice(&stored, &context) {
                proptest::prop_assert_eq!(data.len(), size as usize);
            }
            let _ = whole(&stored, size as usize);
        }
    }
}
