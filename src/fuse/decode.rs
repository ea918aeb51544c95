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
    /// The header's length does not fit the chain; its `unique` may be answered.
    BadLength(InHeaderUnique),
}

/// The `unique` of a request that cannot be decoded.
pub type InHeaderUnique = u64;

/// Copies the request in `buffers` into `arguments`, without the header, and returns the header.
pub fn fetch(buffers: &Buffers, arguments: &mut Vec<u8>) -> Result<InHeader, Malformed> {
    arguments.clear();
    let mut header = InHeader::default();
    if buffers.copy_start(header.as_mut_bytes()) < size_of::<InHeader>() {
        return Err(Malformed::NoHeader);
    }
    let length = header.len as usize;
    if length < size_of::<InHeader>() || length > buffers.readable() {
        return Err(Malformed::BadLength(header.unique));
    }
    let wanted = match Opcode::from_wire(header.opcode) {
        Opcode::Write => length.min(WRITE_DATA),
        _ => length,
    };
    if wanted > MAX_ARGUMENTS {
        return Err(Malformed::BadLength(header.unique));
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

    proptest::proptest! {
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
