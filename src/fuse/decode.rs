//! From guest memory to checked arguments.
//!
//! The header and the arguments of a request are copied once and never read again from guest memory, where the
//! guest could change them between a check and its use. Only the data of a WRITE stay where they are.

use std::ffi::CStr;

use zerocopy::{FromBytes, IntoBytes};

use super::abi::{InHeader, Opcode, WriteIn};
use super::errno::Errno;
use crate::virtio::memory::Buffers;

/// Bytes of a file name at most, as Linux has it.
const NAME_MAX: usize = 255;
/// Bytes of a symbolic link's target at most.
const PATH_MAX: usize = 4096;
/// Bytes of a request without the data of a WRITE at most: the largest are BATCH_FORGETs of what a driver can
/// put into one message.
const MAX_ARGUMENTS: usize = 1 << 20;
/// Where the data of a WRITE start.
pub const WRITE_DATA: usize = size_of::<InHeader>() + size_of::<WriteIn>();

/// A chain without a request in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// No whole header.
    NoHeader,
    /// The header's length does not fit the chain. What the header says otherwise may be used to answer.
    BadLength {
        /// The driver's number of the request.
        unique: u64,
        /// FUSE opcode.
        opcode: u32,
    },
}

/// Copies the request in `buffers` into `arguments`, without the header, and returns the header.
pub fn fetch(buffers: &Buffers, arguments: &mut Vec<u8>) -> Result<InHeader, Malformed> {
    arguments.clear();
    let mut header = InHeader::default();
    if buffers.copy_start(header.as_mut_bytes()) < size_of::<InHeader>() {
        return Err(Malformed::NoHeader);
    }
    let bad_length = Malformed::BadLength {
        unique: header.unique,
        opcode: header.opcode,
    };
    let length = header.len as usize;
    if length < size_of::<InHeader>() || length > buffers.readable() {
        return Err(bad_length);
    }
    let wanted = match Opcode::from_wire(header.opcode) {
        Opcode::Write => length.min(WRITE_DATA),
        _ => length,
    };
    if wanted > MAX_ARGUMENTS {
        return Err(bad_length);
    }
    buffers.copy_in(size_of::<InHeader>(), wanted - size_of::<InHeader>(), arguments);
    Ok(header)
}

/// The arguments of a request, taken from the front.
#[derive(Clone, Copy)]
pub struct Arguments<'a> {
    rest: &'a [u8],
}

impl<'a> Arguments<'a> {
    /// Arguments as they came.
    pub fn new(bytes: &'a [u8]) -> Self {
        Arguments { rest: bytes }
    }

    /// The next struct.
    pub fn take<T: FromBytes>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.rest).map_err(|_| Errno::INVAL)?;
        self.rest = rest;
        Ok(value)
    }

    /// The name of an entry of a directory: neither `.` nor `..`, without `/`, of 1 to 255 bytes.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string(NAME_MAX)?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }

    /// The name of an extended attribute, of 1 to 255 bytes.
    pub fn attribute(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string(NAME_MAX).map_err(|error| match error {
            Errno::NAMETOOLONG => Errno::RANGE,
            error => error,
        })?;
        if name.is_empty() {
            Err(Errno::RANGE)
        } else {
            Ok(name)
        }
    }

    /// The target of a symbolic link, of 1 to 4095 bytes.
    pub fn target(&mut self) -> Result<&'a CStr, Errno> {
        let target = self.string(PATH_MAX - 1)?;
        if target.is_empty() {
            Err(Errno::NOENT)
        } else {
            Ok(target)
        }
    }

    fn string(&mut self, limit: usize) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.rest).map_err(|_| Errno::INVAL)?;
        self.rest = self.rest.get(string.count_bytes() + 1..).unwrap_or_default();
        if string.count_bytes() > limit {
            Err(Errno::NAMETOOLONG)
        } else {
            Ok(string)
        }
    }

    /// The next `length` bytes.
    pub fn bytes(&mut self, length: u32) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.rest.split_at_checked(length as usize).ok_or(Errno::INVAL)?;
        self.rest = rest;
        Ok(bytes)
    }
}

/// What a request that creates something carries behind its arguments (`fuse_ext_header`, since 7.38).
#[derive(Default)]
pub struct Extensions<'a> {
    /// The directory's group, if it is among the caller's supplementary groups.
    pub group: Option<u32>,
    /// Names and values of security labels for the new file.
    pub labels: Vec<(&'a CStr, &'a [u8])>,
}

/// Extension types below this are the number of labels in a `fuse_secctx_header`.
const MAX_LABELS: u32 = 32;
/// `FUSE_EXT_GROUPS`.
const GROUPS: u32 = 32;

impl<'a> Extensions<'a> {
    /// Takes the extensions of a request with this header from the end of its arguments.
    pub fn take(header: &InHeader, arguments: &mut Arguments<'a>) -> Result<Self, Errno> {
        let length = usize::from(header.total_extlen) * 8;
        if length == 0 {
            return Ok(Extensions::default());
        }
        let start = arguments.rest.len().checked_sub(length).ok_or(Errno::INVAL)?;
        let (rest, tail) = arguments.rest.split_at_checked(start).ok_or(Errno::INVAL)?;
        arguments.rest = rest;
        let mut found = Extensions::default();
        let mut tail = Arguments::new(tail);
        while !tail.rest.is_empty() {
            let [size, kind]: [u32; 2] = tail.take()?;
            let size = size.checked_sub(8).ok_or(Errno::INVAL)?.next_multiple_of(8);
            let mut body = Arguments::new(tail.bytes(size)?);
            match kind {
                GROUPS => found.group = body.groups()?,
                count if count < MAX_LABELS => found.labels = body.labels(count)?,
                // To come after our time; they change nothing of what is asked for.
                _ => {}
            }
        }
        Ok(found)
    }
}

impl<'a> Arguments<'a> {
    fn groups(&mut self) -> Result<Option<u32>, Errno> {
        match self.take::<u32>()? {
            0 => Ok(None),
            // Linux sends the one that counts.
            _ => Ok(Some(self.take()?)),
        }
    }

    fn labels(&mut self, count: u32) -> Result<Vec<(&'a CStr, &'a [u8])>, Errno> {
        let mut labels = Vec::new();
        for _ in 0..count {
            let [size, _padding]: [u32; 2] = self.take()?;
            let before = self.rest.len();
            let label = (self.attribute()?, self.bytes(size)?);
            labels.push(label);
            let taken = before - self.rest.len();
            let padding = (taken.next_multiple_of(8) - taken).min(self.rest.len());
            self.bytes(padding as u32)?;
        }
        Ok(labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(bytes: &[u8]) -> Result<Vec<u8>, Errno> {
        Arguments::new(bytes).name().map(|name| name.to_bytes().to_vec())
    }

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        assert_eq!(name(b"ok\0"), Ok(b"ok".to_vec()));
        assert_eq!(name(b"..x\0"), Ok(b"..x".to_vec()));
        for bad in [
            &b"\0"[..],
            b".\0",
            b"..\0",
            b"a/b\0",
            b"/\0",
            b"unterminated",
            b"",
        ] {
            assert_eq!(name(bad), Err(Errno::INVAL), "{bad:?}");
        }
        let mut long = vec![b'x'; 255];
        long.push(0);
        assert_eq!(name(&long), Ok(vec![b'x'; 255]));
        long.insert(0, b'x');
        assert_eq!(name(&long), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn arguments_are_taken_one_after_the_other() {
        let mut arguments = Arguments::new(b"\x07\0\0\0\0\0\0\0old\0new\0value");
        assert_eq!(arguments.take::<u64>().unwrap(), 7);
        assert_eq!(arguments.name().unwrap(), c"old");
        assert_eq!(arguments.attribute().unwrap(), c"new");
        assert_eq!(arguments.bytes(5).unwrap(), b"value");
        assert_eq!(arguments.bytes(1), Err(Errno::INVAL));
        assert!(arguments.take::<u32>().is_err());
    }

    /// Supplementary group, labels, and the bytes in front of the extensions.
    type Found = (Option<u32>, Vec<(Vec<u8>, Vec<u8>)>, Vec<u8>);

    fn extensions(bytes: &[u8], units: u16) -> Result<Found, Errno> {
        let header = InHeader {
            total_extlen: units,
            ..InHeader::default()
        };
        let mut arguments = Arguments::new(bytes);
        let found = Extensions::take(&header, &mut arguments)?;
        let labels = found
            .labels
            .iter()
            .map(|(name, value)| (name.to_bytes().to_vec(), value.to_vec()));
        Ok((found.group, labels.collect(), arguments.rest.to_vec()))
    }

    #[test]
    fn extensions_are_taken_from_the_end() {
        let mut bytes = b"name\0".to_vec();
        let words = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_ne_bytes()).collect() };
        // One label: header, size and padding, name, value, padding to 8 bytes.
        let mut label = [words(&[3, 0]), b"security.x\0abc".to_vec()].concat();
        label.resize(label.len().next_multiple_of(8), 0);
        bytes.extend([words(&[8 + label.len() as u32, 1]), label.clone()].concat());
        bytes.extend(words(&[16, 32, 1, 1000]));
        let units = (8 + label.len() + 16) / 8;
        let (group, labels, rest) = extensions(&bytes, units as u16).unwrap();
        assert_eq!(group, Some(1000));
        assert_eq!(labels, [(b"security.x".to_vec(), b"abc".to_vec())]);
        assert_eq!(rest, b"name\0");
        assert_eq!(extensions(&bytes, 0).unwrap().2, bytes);
        assert!(extensions(&bytes, 100).is_err());
        assert!(extensions(&words(&[4, 32]), 1).is_err());
        assert!(extensions(&words(&[400, 32]), 1).is_err());
        assert!(extensions(&words(&[8, 5]), 1).is_err(), "five labels in no bytes");
    }

    proptest::proptest! {
        #[test]
        fn no_extension_harms(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), units in 0u16..30) {
            let _ = extensions(&bytes, units);
        }

        #[test]
        fn no_bytes_make_a_bad_name_pass(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600)) {
            if let Ok(name) = name(&bytes) {
                assert!(!name.is_empty() && name.len() <= 255);
                assert!(!name.contains(&b'/') && !name.contains(&0));
                assert!(name != b"." && name != b"..");
                assert!(bytes.starts_with(&name));
            }
        }
    }
}
