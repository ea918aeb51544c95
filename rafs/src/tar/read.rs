//! A stream of members.

use std::io::{self, Read};

use zerocopy::FromZeros;
use zerocopy::IntoBytes;

use crate::layout::trim_zeros;

use super::{BLOCK, Header, Kind, Member, XATTR_PREFIX};

/// Largest set of PAX records, or GNU long name, that is accepted: room for many attributes of 64 KiB.
const MAX_RECORDS: u64 = 8 << 20;

/// An archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream failed.
    #[error("cannot read the archive")]
    Io(#[from] io::Error),
    /// It is not what an archive looks like.
    #[error("archive damaged at offset {offset}: {reason}")]
    Damaged {
        /// Where the member's headers start.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
}

/// Reads an archive from a stream.
pub struct Reader<R> {
    stream: R,
    offset: u64,
    /// Data bytes of the current member that were not read yet.
    left: u64,
    /// Zeros after them.
    padding: u64,
    /// PAX records that hold for all members from now on.
    global: Records,
}

/// PAX records: key, value.
type Records = Vec<(Vec<u8>, Vec<u8>)>;

impl<R: Read> Reader<R> {
    /// Reads from the start of an archive.
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            offset: 0,
            left: 0,
            padding: 0,
            global: Vec::new(),
        }
    }

    /// The next member, or `None` at the end. What is left of the data of the one before is skipped.
    pub fn next_member(&mut self) -> Result<Option<Member>, TarError> {
        let skip = self.left + self.padding;
        self.skip(skip)?;
        (self.left, self.padding) = (0, 0);
        let start = self.offset;
        let mut records = Records::new();
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let Some(header) = self.header(start)? else {
                return Ok(None);
            };
            let size = number(&header.size).ok_or_else(|| damaged(start, "size is no number"))?;
            match header.flag {
                b'x' => records.extend(parse_records(&self.extra(size, start)?, start)?),
                b'g' => {
                    let global = parse_records(&self.extra(size, start)?, start)?;
                    self.global.extend(global);
                }
                b'L' => long_name = Some(trim_zeros(&self.extra(size, start)?).to_vec()),
                b'K' => long_link = Some(trim_zeros(&self.extra(size, start)?).to_vec()),
                _ => {
                    let mut all = self.global.clone();
                    all.append(&mut records);
                    let member = member(&header, size, &all, long_name, long_link, start)?;
                    self.left = member.size;
                    self.padding = member.size.next_multiple_of(BLOCK) - member.size;
                    return Ok(Some(member));
                }
            }
        }
    }

    /// The next header; `None` for a block of zeros or the end of the stream.
    fn header(&mut self, start: u64) -> Result<Option<Header>, TarError> {
        let mut header = Header::new_zeroed();
        let bytes = header.as_mut_bytes();
        let mut got = 0;
        while let Some(rest) = bytes.get_mut(got..).filter(|rest| !rest.is_empty()) {
            match self.stream.read(rest) {
                Ok(0) if got == 0 => return Ok(None),
                Ok(0) => return Err(damaged(start, "it ends in the middle of a header")),
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.offset += BLOCK;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let expected = number(&header.checksum).ok_or_else(|| damaged(start, "not a tar header"))?;
        if expected != u64::from(header.sum()) {
            return Err(damaged(start, "not a tar header (its checksum is wrong)"));
        }
        Ok(Some(header))
    }

    /// Data of a header that describes the next one.
    fn extra(&mut self, size: u64, start: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_RECORDS {
            return Err(damaged(start, format!("extended header of {size} bytes")));
        }
        let mut data = vec![0; size as usize];
        self.stream.read_exact(&mut data)?;
        self.offset += size;
        self.skip(size.next_multiple_of(BLOCK) - size)?;
        Ok(data)
    }

    fn skip(&mut self, size: u64) -> Result<(), TarError> {
        let skipped = io::copy(&mut (&mut self.stream).take(size), &mut io::sink())?;
        self.offset += skipped;
        if skipped < size {
            return Err(damaged(self.offset, "it ends in the middle of a member"));
        }
        Ok(())
    }
}

/// The data of the current member.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = (&mut self.stream).take(self.left).read(buffer)?;
        self.left -= n as u64;
        self.offset += n as u64;
        Ok(n)
    }
}

fn damaged(offset: u64, reason: impl Into<String>) -> TarError {
    TarError::Damaged {
        offset,
        reason: reason.into(),
    }
}

/// An octal field, or GNU's binary form. Empty is 0.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((first, rest)) = field.split_first()
        && first & 0x80 != 0
    {
        let start = u64::from(first & 0x3f);
        return rest.iter().try_fold(start, |value, byte| {
            value.checked_mul(256)?.checked_add(u64::from(*byte))
        });
    }
    let digits = field.trim_ascii_start();
    let end = digits
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(digits.len());
    let (digits, rest) = digits.split_at(end);
    if !rest.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = u64::from(digit - b'0');
        if digit < 8 {
            value.checked_mul(8)?.checked_add(digit)
        } else {
            None
        }
    })
}

/// `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record. Values may hold anything.
fn parse_records(mut data: &[u8], start: u64) -> Result<Records, TarError> {
    let mut records = Records::new();
    while !data.is_empty() {
        let record = || -> Option<(&[u8], &[u8], &[u8])> {
            let space = data.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(data.get(..space)?).ok()?.parse().ok()?;
            let text = data.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = text.iter().position(|byte| *byte == b'=')?;
            Some((text.get(..equals)?, text.get(equals + 1..)?, data.get(length..)?))
        }();
        let (key, value, rest) = record.ok_or_else(|| damaged(start, "malformed PAX record"))?;
        records.push((key.to_vec(), value.to_vec()));
        data = rest;
    }
    Ok(records)
}

fn member(
    header: &Header,
    size: u64,
    records: &Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    start: u64,
) -> Result<Member, TarError> {
    let pax = |key: &str| {
        let found = records.iter().rev().find(|(name, _)| name == key.as_bytes());
        found
            .map(|(_, value)| value.as_slice())
            .filter(|value| !value.is_empty())
    };
    let decimal = |key: &str| -> Result<Option<u64>, TarError> {
        pax(key)
            .map(|value| std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()))
            .map(|value| value.ok_or_else(|| damaged(start, format!("PAX record {key} is no number"))))
            .transpose()
    };
    let id = |key: &str, field: &[u8]| -> Result<u32, TarError> {
        let value = match decimal(key)? {
            Some(value) => Some(value),
            None => number(field),
        };
        value
            .and_then(|value| u32::try_from(value).ok())
            .ok_or_else(|| damaged(start, format!("{key} is out of range")))
    };
    if let Some((key, _)) = records.iter().find(|(key, _)| key.starts_with(b"GNU.sparse.")) {
        return Err(damaged(
            start,
            format!("sparse member ({})", String::from_utf8_lossy(key)),
        ));
    }
    let kind = Kind::from_flag(header.flag).ok_or_else(|| {
        damaged(
            start,
            format!("member of unknown type {:?}", char::from(header.flag)),
        )
    })?;
    let path = match (pax("path"), long_name) {
        (Some(path), _) => path.to_vec(),
        (None, Some(name)) => name,
        (None, None) => header_path(header),
    };
    // Before POSIX a directory was a file whose name ends with a slash.
    let kind = if kind == Kind::Regular && path.ends_with(b"/") {
        Kind::Directory
    } else {
        kind
    };
    let link = match (pax("linkpath"), long_link) {
        (Some(link), _) => link.to_vec(),
        (None, Some(link)) => link,
        (None, None) => trim_zeros(&header.link).to_vec(),
    };
    let size = decimal("size")?.unwrap_or(size);
    let (mtime, mtime_nsec) = match pax("mtime") {
        Some(text) => parse_time(text).ok_or_else(|| damaged(start, "PAX record mtime is no time"))?,
        None => (
            number(&header.mtime)
                .and_then(|t| i64::try_from(t).ok())
                .unwrap_or(0),
            0,
        ),
    };
    let device = |key: &str, field: &[u8]| -> Result<u32, TarError> {
        if matches!(kind, Kind::Char | Kind::Block) {
            id(key, field)
        } else {
            Ok(0)
        }
    };
    let mut xattrs: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    for (key, value) in records {
        if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
            xattrs.retain(|(known, _)| known != name);
            xattrs.push((name.to_vec(), value.clone()));
        }
    }
    xattrs.sort_unstable();
    Ok(Member {
        path,
        kind,
        link,
        mode: number(&header.mode).unwrap_or(0) as u32 & 0o7777,
        uid: id("uid", &header.uid)?,
        gid: id("gid", &header.gid)?,
        mtime,
        mtime_nsec,
        size: if kind == Kind::Regular { size } else { 0 },
        device: (
            device("SCHILY.devmajor", &header.major)?,
            device("SCHILY.devminor", &header.minor)?,
        ),
        xattrs,
    })
}

/// Prefix and name of a POSIX header; GNU headers have no prefix there.
fn header_path(header: &Header) -> Vec<u8> {
    let name = trim_zeros(&header.name);
    let prefix = trim_zeros(&header.prefix);
    if header.magic == *b"ustar\0" && !prefix.is_empty() {
        [prefix, b"/", name].concat()
    } else {
        name.to_vec()
    }
}

/// Decimal seconds with a fraction, possibly negative.
fn parse_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::super::Writer;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(number(b"0000755\0"), Some(0o755));
        assert_eq!(number(b"    17 \0"), Some(0o17));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(&[0x80, 0, 0, 0, 1, 0, 0, 0, 0]), Some(1 << 32));
        assert_eq!(number(b"12a\0"), None);
        assert_eq!(number(b"9\0"), None);
        assert_eq!(number(&[0xff; 12]), None);
    }

    #[test]
    fn times_have_fractions_and_signs() {
        assert_eq!(parse_time(b"1600000000"), Some((1_600_000_000, 0)));
        assert_eq!(parse_time(b"1.5"), Some((1, 500_000_000)));
        assert_eq!(parse_time(b"1.0000000019"), Some((1, 1)));
        assert_eq!(parse_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(parse_time(b"soon"), None);
    }

    fn member(path: &[u8], kind: Kind) -> Member {
        Member {
            path: path.to_vec(),
            kind,
            link: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 0,
            mtime_nsec: 0,
            size: 0,
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }

    #[test]
    fn members_come_back_as_they_were_written() {
        let mut members = vec![
            Member {
                mode: 0o755,
                mtime: -5,
                mtime_nsec: 7,
                ..member(b"./", Kind::Directory)
            },
            Member {
                size: 1000,
                uid: 70_000_000,
                gid: u32::MAX,
                ..member(b"file", Kind::Regular)
            },
            Member {
                link: vec![b'l'; 300],
                ..member(&[b'n'; 200], Kind::Symlink)
            },
            Member {
                link: b"file".to_vec(),
                ..member(b"not-utf8-\xff", Kind::HardLink)
            },
            Member {
                device: (0, 0),
                ..member(b"whiteout", Kind::Char)
            },
            Member {
                device: (4095, 1_048_575),
                ..member(b"block", Kind::Block)
            },
            member(b"fifo", Kind::Fifo),
        ];
        members[1].xattrs = vec![
            (b"security.capability".to_vec(), vec![0, 10, b'=', b'\n', 255]),
            (b"user.empty".to_vec(), Vec::new()),
        ];
        let mut writer = Writer::new(Vec::new());
        for member in &members {
            writer.member(member).unwrap();
            writer.data(&vec![9; member.size as usize]).unwrap();
        }
        let archive = writer.finish().unwrap();
        assert_eq!(archive.len() % 512, 0);
        let mut reader = Reader::new(archive.as_slice());
        for expected in &members {
            assert_eq!(&reader.next_member().unwrap().unwrap(), expected);
            if expected.size > 0 {
                let mut some = [0; 10];
                reader.read_exact(&mut some).unwrap();
                assert_eq!(some, [9; 10], "and the rest is skipped");
            }
        }
        assert_eq!(reader.next_member().unwrap(), None);
    }

    #[test]
    fn a_gnu_long_name_and_a_cut_archive() {
        let mut long = Vec::new();
        let mut writer = Writer::new(&mut long);
        writer.member(&member(b"placeholder", Kind::Regular)).unwrap();
        // A GNU header for a name of 150 bytes in front of it.
        let mut header = Header::new_zeroed();
        header.name[..13].copy_from_slice(b"././@LongLink");
        header.size = *b"00000000227\0";
        header.flag = b'L';
        header.magic = *b"ustar ";
        header.checksum = format!("{:06o}\0 ", header.sum())
            .into_bytes()
            .try_into()
            .unwrap();
        let mut archive = header.as_bytes().to_vec();
        archive.extend_from_slice(&[b'g'; 150]);
        archive.resize(1024, 0);
        archive.extend_from_slice(&long);
        let read = Reader::new(archive.as_slice()).next_member().unwrap().unwrap();
        assert_eq!(read.path, [b'g'; 150]);
        let cut = Reader::new(&archive[..700]).next_member();
        assert!(cut.is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic_or_run_on(
            data in proptest::collection::vec(any::<u8>(), 0..4096), flips in proptest::collection::vec((0_usize..4096, any::<u8>()), 0..8),
        ) {
            let mut writer = Writer::new(Vec::new());
            let mut sample = member(&[b'n'; 120], Kind::Regular);
            sample.size = data.len() as u64;
            sample.xattrs = vec![(b"user.a".to_vec(), data.iter().take(64).copied().collect())];
            writer.member(&sample).unwrap();
            writer.data(&data).unwrap();
            let mut archive = writer.finish().unwrap();
            for (at, value) in flips {
                let at = at % archive.len();
                archive[at] = value;
            }
            for bytes in [archive.as_slice(), data.as_slice()] {
                let mut reader = Reader::new(bytes);
                for _ in 0..100 {
                    if !matches!(reader.next_member(), Ok(Some(_))) {
                        break;
                    }
                }
            }
        }
    }
}
