//! The bytes of a bootstrap, and the only way to them: bounds-checked.
//!
//! A bootstrap of up to [`COPY_LIMIT`] bytes is copied into private memory when it is opened. That covers nearly
//! every image in the field, costs less than a millisecond, and nothing that happens to the file afterwards can
//! reach a running mount. Larger ones are mapped: a copy could not be reclaimed under memory pressure and would not
//! be shared with the other sandboxes of the host. Such a file must not be truncated while it is mounted (SIGBUS);
//! replacing it by a new file under the same name is fine.

mod locate;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use memmap2::Mmap;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::error::{Damaged, Refused};

/// Largest bootstrap that is copied instead of mapped, in bytes.
pub const COPY_LIMIT: u64 = 8 << 20;

/// Which format a bootstrap has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// RAFS v5.
    V5,
    /// RAFS v6.
    V6,
}

/// Where the bytes are.
enum Memory {
    Copied(Box<[u8]>),
    Mapped(Mmap),
}

/// A bootstrap in memory.
pub struct Bootstrap {
    memory: Memory,
    version: Version,
    inlined: bool,
}

impl Bootstrap {
    /// Opens the bootstrap at `path`, or the one inside the blob at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, Refused> {
        // Not to wait for a writer if it is a FIFO.
        let flags = libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Refused::NotRafs("it is not a regular file"));
        }
        locate::locate(&file, metadata.len())
    }

    /// Copies or maps `size` bytes at `offset` of `file`.
    fn load(file: &File, offset: u64, size: u64, version: Version, inlined: bool) -> io::Result<Self> {
        let length = usize::try_from(size).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let memory = if size <= COPY_LIMIT {
            let mut bytes = vec![0; length];
            std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, offset)?;
            Memory::Copied(bytes.into_boxed_slice())
        } else {
            Memory::Mapped(crate::sys::map(file, offset, length)?)
        };
        Ok(Self {
            memory,
            version,
            inlined,
        })
    }

    /// The format.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Whether it was found inside a blob.
    pub fn inlined(&self) -> bool {
        self.inlined
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Copied(bytes) => bytes,
            Memory::Mapped(map) => map,
        }
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.bytes().len() as u64
    }

    /// `size` bytes at `offset`.
    pub(crate) fn slice(&self, what: &'static str, offset: u64, size: u64) -> Result<&[u8], Damaged> {
        let end = offset.checked_add(size).and_then(|end| usize::try_from(end).ok());
        let start = usize::try_from(offset).ok();
        start
            .zip(end)
            .and_then(|(start, end)| self.bytes().get(start..end))
            .ok_or_else(|| Damaged::new(what, offset, "beyond the end of the bootstrap"))
    }

    /// The structure at `offset`.
    pub(crate) fn get<T>(&self, what: &'static str, offset: u64) -> Result<&T, Damaged>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let bytes = self.slice(what, offset, size_of::<T>() as u64)?;
        T::ref_from_bytes(bytes).map_err(|_| Damaged::new(what, offset, "beyond the end of the bootstrap"))
    }

    /// `count` structures at `offset`.
    pub(crate) fn array<T>(&self, what: &'static str, offset: u64, count: u64) -> Result<&[T], Damaged>
    where
        T: FromBytes + Immutable + Unaligned,
    {
        let size = count
            .checked_mul(size_of::<T>() as u64)
            .ok_or_else(|| Damaged::new(what, offset, "beyond the end of the bootstrap"))?;
        <[T]>::ref_from_bytes(self.slice(what, offset, size)?)
            .map_err(|_| Damaged::new(what, offset, "beyond the end of the bootstrap"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::little_endian::U32;

    fn bootstrap(size: usize) -> Bootstrap {
        Bootstrap {
            memory: Memory::Copied(vec![7; size].into_boxed_slice()),
            version: Version::V6,
            inlined: false,
        }
    }

    #[test]
    fn nothing_outside_can_be_borrowed() {
        let bootstrap = bootstrap(16);
        assert_eq!(bootstrap.get::<U32>("x", 12).unwrap().get(), 0x0707_0707);
        assert!(bootstrap.get::<U32>("x", 13).is_err());
        assert!(bootstrap.get::<U32>("x", u64::MAX).is_err());
        assert!(bootstrap.slice("x", 16, 0).is_ok());
        assert!(bootstrap.slice("x", 17, 0).is_err());
        assert!(bootstrap.slice("x", 8, u64::MAX - 4).is_err());
        assert_eq!(bootstrap.array::<U32>("x", 0, 4).unwrap().len(), 4);
        assert!(bootstrap.array::<U32>("x", 0, 5).is_err());
        assert!(bootstrap.array::<U32>("x", 0, u64::MAX / 2).is_err());
    }

    #[test]
    fn a_large_file_is_mapped_and_reads_the_same() {
        use std::io::{Seek, SeekFrom, Write};
        let mut file = tempfile::tempfile().unwrap();
        file.seek(SeekFrom::Start(COPY_LIMIT + 4090)).unwrap();
        file.write_all(b"abcdef").unwrap();
        let mapped = Bootstrap::load(&file, 100, COPY_LIMIT + 3996, Version::V6, true).unwrap();
        assert!(matches!(mapped.memory, Memory::Mapped(_)));
        assert_eq!(mapped.slice("x", COPY_LIMIT + 3990, 6).unwrap(), b"abcdef");
        assert!(mapped.slice("x", COPY_LIMIT + 3991, 6).is_err());
    }
}
