//! Reading directories.
//!
//! Positions are the host's own (`d_off`), so they survive anything that they would survive on the host: seeking back,
//! entries removed meanwhile, and a handle that is used again much later. What the host returned in one call and the
//! guest's buffer could not take is kept for the guest's next call, which usually continues there.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::OpenOptions;
use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::fs::SeekFrom;

use super::PassthroughFs;
use super::lookup::Seen;
use crate::handle::Handle;
use crate::inode::{Inode, ROOT};
use crate::name::Name;
use crate::sys::{errno, getdents64};

/// Bytes of directory records taken from the host at once.
const BATCH: usize = 16 * 1024;
/// Offset of the name in `struct linux_dirent64`: d_ino, d_off, d_reclen, d_type come before it.
const NAME_OFFSET: usize = 19;

/// Where reading an open directory has got to.
#[derive(Debug, Default)]
pub(crate) struct DirStream {
    /// Records from the host; allocated by the first read, freed at the end of the directory.
    records: Vec<u8>,
    /// The part of `records` that has not been handed on.
    next: usize,
    end: usize,
    /// Position of the first record that has not been handed on.
    position: u64,
}

/// One record of a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record<'a> {
    ino: u64,
    /// Position after this record.
    pub(crate) next: u64,
    kind: u8,
    pub(crate) name: &'a CStr,
    /// Bytes of the record.
    pub(crate) length: usize,
}

impl<'a> Record<'a> {
    /// The first record in `bytes`; `None` if the host sent none, or half of one.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let length = usize::from(u16::from_ne_bytes(*bytes.get(16..)?.first_chunk()?));
        Some(Record {
            ino: u64::from_ne_bytes(*bytes.first_chunk()?),
            next: u64::from_ne_bytes(*bytes.get(8..)?.first_chunk()?),
            kind: *bytes.get(18)?,
            name: CStr::from_bytes_until_nul(bytes.get(NAME_OFFSET..length)?).ok()?,
            length,
        })
    }

    pub(crate) fn is_dot_or_dot_dot(&self) -> bool {
        matches!(self.name.to_bytes(), b"." | b"..")
    }
}

impl DirStream {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Makes `offset` the position to read at.
    fn seek(&mut self, directory: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        // Position 0 is always sought: a rewound directory shows what has been added since.
        if offset == self.position && offset != 0 {
            return Ok(());
        }
        if i64::try_from(offset).is_err() {
            return Err(errno(libc::EINVAL));
        }
        (self.next, self.end) = (0, 0);
        rustix::fs::seek(directory, SeekFrom::Start(offset))?;
        self.position = offset;
        Ok(())
    }

    /// Hands records from `offset` on to `take` until that says false, fails, or the directory ends. The record for
    /// which it did not say true is the next one to be read.
    fn read(
        &mut self,
        directory: BorrowedFd<'_>,
        offset: u64,
        take: &mut dyn FnMut(Record<'_>) -> io::Result<bool>,
    ) -> io::Result<()> {
        self.seek(directory, offset)?;
        loop {
            if self.next == self.end {
                self.records.resize(BATCH, 0);
                (self.next, self.end) = (0, getdents64(directory, &mut self.records)?);
                if self.end == 0 {
                    self.records = Vec::new();
                    return Ok(());
                }
            }
            let record = self
                .records
                .get(self.next..self.end)
                .and_then(Record::parse)
                .ok_or_else(|| errno(libc::EIO))?;
            let (length, position) = (record.length, record.next);
            if !take(record)? {
                return Ok(());
            }
            self.next += length;
            self.position = position;
        }
    }
}

impl PassthroughFs {
    /// OPENDIR.
    pub(super) fn open_directory_node(&self, inode: u64) -> io::Result<(u64, OpenOptions)> {
        let node = self.inode(inode)?;
        if !node.is_directory() {
            return Err(errno(libc::ENOTDIR));
        }
        let permit = self.budget.take()?;
        let directory = self.open_directory(node.fd()?.as_fd())?;
        let charge = self.charge_of(&node, directory.as_fd())?;
        let options = if self.options.cache.keeps_data() {
            OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE
        } else {
            OpenOptions::empty()
        };
        Ok((
            self.handles
                .insert(Handle::directory(inode, directory, permit, charge)),
            options,
        ))
    }

    /// READDIR: names, types and inode numbers, `.` and `..` included.
    pub(super) fn read_directory(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        add: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (node, handle) = self.directory_being_read(inode, handle)?;
        let mut added = false;
        let result = handle.stream.lock().read(handle.as_fd(), offset, &mut |record| {
            let entry = self.describe(&node, &record);
            let fits = add(entry)? != 0;
            added |= fits;
            Ok(fits)
        });
        partial(added, result)
    }

    /// READDIRPLUS: entries as READDIR gives them, each looked up. `.`, `..` and names that cannot be looked up carry
    /// no node, which a guest takes as "look it up yourself".
    pub(super) fn read_directory_plus(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        add: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (node, handle) = self.directory_being_read(inode, handle)?;
        let mut added = false;
        let result = handle.stream.lock().read(handle.as_fd(), offset, &mut |record| {
            let mut described = self.describe(&node, &record);
            let entry = match self.look_up_record(&node, &record) {
                Ok(entry) => entry,
                // Removed since the host listed it.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(true),
                Err(_) => Entry::default(),
            };
            if entry.inode != 0 {
                // What is mounted on a directory has another number than the directory that the host lists.
                described.ino = entry.attr.st_ino;
                described.type_ = (entry.attr.st_mode & libc::S_IFMT) >> 12;
            }
            let fits = add(described, entry);
            if entry.inode != 0 && !matches!(fits, Ok(1..)) {
                self.forget_node(entry.inode, 1);
            }
            added |= matches!(fits, Ok(1..));
            Ok(fits? != 0)
        });
        partial(added, result)
    }

    fn directory_being_read(&self, inode: u64, handle: u64) -> io::Result<(Arc<Inode>, Arc<Handle>)> {
        let handle = self.handles.get_directory(handle, inode)?;
        Ok((self.inode(inode)?, handle))
    }

    fn look_up_record(&self, node: &Arc<Inode>, record: &Record<'_>) -> io::Result<Entry> {
        if record.is_dot_or_dot_dot() {
            return Ok(Entry::default());
        }
        let (inode, seen) = self.find_child(node.fd()?.as_fd(), Name::new(record.name)?)?;
        Ok(self.entry(Some(node), &inode, &seen))
    }

    /// A record as the guest sees it.
    fn describe<'a>(&self, node: &Arc<Inode>, record: &Record<'a>) -> DirEntry<'a> {
        let key = node.key();
        // What lies above the root is not the guest's to know.
        let ino = if node.id() == ROOT && record.name == c".." {
            key.ino
        } else {
            record.ino
        };
        let kind = match record.kind {
            libc::DT_UNKNOWN => self.kind_of(node, record).unwrap_or(libc::DT_UNKNOWN),
            kind => kind,
        };
        DirEntry {
            ino: self.numbers.fold(key.device, ino),
            offset: record.next,
            type_: u32::from(kind),
            name: record.name.to_bytes(),
        }
    }

    /// The type of an entry of a file system that does not list types; overlay in the guest needs it.
    fn kind_of(&self, node: &Arc<Inode>, record: &Record<'_>) -> Option<u8> {
        if record.is_dot_or_dot_dot() {
            return Some(libc::DT_DIR);
        }
        let seen = Seen::at(node.fd().ok()?.as_fd(), Name::new(record.name).ok()?).ok()?;
        u8::try_from(seen.file_type() >> 12).ok()
    }
}

/// A reply that holds entries is complete; what stopped it is met again by the next request.
fn partial(added: bool, result: io::Result<()>) -> io::Result<()> {
    if added { Ok(()) } else { result }
}
