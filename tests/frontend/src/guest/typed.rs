//! One method for each operation: send, wait, decode.

use std::sync::atomic::Ordering;

use super::Guest;
use crate::Result;
use crate::abi::{Attr, Dirent, Entry, InitOut, Statfs, Statx, init, open_flags};
use crate::ops::{self, Change, Init, Position, ROOT};

#[allow(missing_docs)] // Each is the operation it is named after; see `ops`.
impl Guest {
    pub fn init(&self, offer: &Init) -> Result<InitOut> {
        let answer = ops::read_init(&self.call(&ops::init(offer))?)?;
        self.session.store(answer.flags & offer.flags, Ordering::Relaxed);
        Ok(answer)
    }

    pub fn destroy(&self) -> Result<()> {
        self.call(&ops::destroy()).map(drop)
    }

    pub fn lookup(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<Entry> {
        ops::read_entry(&self.call(&ops::lookup(parent, name))?)
    }

    pub fn forget(&self, nodeid: u64, count: u64) -> Result<()> {
        self.submit(&ops::forget(nodeid, count)).map(drop)
    }

    pub fn batch_forget(&self, nodes: &[(u64, u64)]) -> Result<()> {
        self.submit(&ops::batch_forget(nodes)).map(drop)
    }

    pub fn getattr(&self, nodeid: u64) -> Result<Attr> {
        Ok(ops::read_attr(&self.call(&ops::getattr(nodeid, None))?)?.1)
    }

    pub fn statx(&self, nodeid: u64, mask: u32) -> Result<Statx> {
        ops::read_statx(&self.call(&ops::statx(nodeid, mask))?)
    }

    pub fn setattr(&self, nodeid: u64, change: &Change) -> Result<Attr> {
        Ok(ops::read_attr(&self.call(&ops::setattr(nodeid, change))?)?.1)
    }

    pub fn readlink(&self, nodeid: u64) -> Result<Vec<u8>> {
        self.call(&ops::readlink(nodeid))
    }

    pub fn symlink(&self, parent: u64, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Result<Entry> {
        ops::read_entry(&self.call(&ops::symlink(parent, name, target))?)
    }

    pub fn mknod(&self, parent: u64, name: impl AsRef<[u8]>, mode: u32, rdev: u32) -> Result<Entry> {
        ops::read_entry(&self.call(&ops::mknod(parent, name, mode, rdev))?)
    }

    pub fn mkdir(&self, parent: u64, name: impl AsRef<[u8]>, mode: u32) -> Result<Entry> {
        ops::read_entry(&self.call(&ops::mkdir(parent, name, mode))?)
    }

    pub fn unlink(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<()> {
        self.call(&ops::unlink(parent, name)).map(drop)
    }

    pub fn rmdir(&self, parent: u64, name: impl AsRef<[u8]>) -> Result<()> {
        self.call(&ops::rmdir(parent, name)).map(drop)
    }

    pub fn rename2(
        &self,
        parent: u64,
        name: impl AsRef<[u8]>,
        to: u64,
        new: impl AsRef<[u8]>,
        flags: u32,
    ) -> Result<()> {
        self.call(&ops::rename2(parent, name, to, new, flags)).map(drop)
    }

    pub fn link(&self, nodeid: u64, parent: u64, name: impl AsRef<[u8]>) -> Result<Entry> {
        ops::read_entry(&self.call(&ops::link(nodeid, parent, name))?)
    }

    pub fn open(&self, nodeid: u64, flags: u32) -> Result<u64> {
        Ok(ops::read_open(&self.call(&ops::open(nodeid, flags))?)?.0)
    }

    pub fn opendir(&self, nodeid: u64) -> Result<u64> {
        Ok(ops::read_open(&self.call(&ops::opendir(nodeid))?)?.0)
    }

    pub fn create(&self, parent: u64, name: impl AsRef<[u8]>, mode: u32, flags: u32) -> Result<(Entry, u64)> {
        let (entry, fh, _) =
            ops::read_created(&self.call(&ops::create(parent, name, mode, flags | open_flags::CREAT))?)?;
        Ok((entry, fh))
    }

    pub fn tmpfile(&self, parent: u64, mode: u32, flags: u32) -> Result<(Entry, u64)> {
        let (entry, fh, _) = ops::read_created(&self.call(&ops::tmpfile(parent, mode, flags))?)?;
        Ok((entry, fh))
    }

    pub fn read(&self, nodeid: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>> {
        self.call(&ops::read(nodeid, fh, offset, size))
    }

    pub fn write(&self, nodeid: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32> {
        ops::read_written(&self.call(&ops::write(nodeid, fh, offset, data))?)
    }

    pub fn readdir(&self, nodeid: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<Dirent>> {
        ops::read_dirents(&self.call(&ops::readdir(nodeid, fh, offset, size))?, false)
    }

    pub fn readdirplus(&self, nodeid: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<Dirent>> {
        ops::read_dirents(&self.call(&ops::readdirplus(nodeid, fh, offset, size))?, true)
    }

    pub fn release(&self, nodeid: u64, fh: u64) -> Result<()> {
        self.call(&ops::release(nodeid, fh)).map(drop)
    }

    pub fn releasedir(&self, nodeid: u64, fh: u64) -> Result<()> {
        self.call(&ops::releasedir(nodeid, fh)).map(drop)
    }

    pub fn flush(&self, nodeid: u64, fh: u64) -> Result<()> {
        self.call(&ops::flush(nodeid, fh)).map(drop)
    }

    pub fn fsync(&self, nodeid: u64, fh: u64) -> Result<()> {
        self.call(&ops::fsync(nodeid, fh, false)).map(drop)
    }

    pub fn statfs(&self, nodeid: u64) -> Result<Statfs> {
        ops::read_statfs(&self.call(&ops::statfs(nodeid))?)
    }

    pub fn setxattr(&self, nodeid: u64, name: impl AsRef<[u8]>, value: &[u8], flags: u32) -> Result<()> {
        let long = self.session.load(Ordering::Relaxed) & init::SETXATTR_EXT != 0;
        self.call(&ops::setxattr(nodeid, name, value, flags, long))
            .map(drop)
    }

    /// The value, in one request with room for 64 KiB.
    pub fn getxattr(&self, nodeid: u64, name: impl AsRef<[u8]>) -> Result<Vec<u8>> {
        self.call(&ops::getxattr(nodeid, name, 65536))
    }

    /// The names, in one request with room for 64 KiB.
    pub fn listxattr(&self, nodeid: u64) -> Result<Vec<Vec<u8>>> {
        let list = self.call(&ops::listxattr(nodeid, 65536))?;
        Ok(list
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .map(<[u8]>::to_vec)
            .collect())
    }

    pub fn removexattr(&self, nodeid: u64, name: impl AsRef<[u8]>) -> Result<()> {
        self.call(&ops::removexattr(nodeid, name)).map(drop)
    }

    pub fn access(&self, nodeid: u64, mask: u32) -> Result<()> {
        self.call(&ops::access(nodeid, mask)).map(drop)
    }

    pub fn fallocate(&self, nodeid: u64, fh: u64, mode: u32, offset: u64, len: u64) -> Result<()> {
        self.call(&ops::fallocate(nodeid, fh, mode, offset, len))
            .map(drop)
    }

    pub fn lseek(&self, nodeid: u64, fh: u64, offset: u64, whence: u32) -> Result<u64> {
        ops::read_offset(&self.call(&ops::lseek(nodeid, fh, offset, whence))?)
    }

    pub fn copy_file_range(&self, from: Position, to: Position, len: u64) -> Result<u32> {
        ops::read_written(&self.call(&ops::copy_file_range(from, to, len))?)
    }

    // --- several operations in one ---

    /// Looks a path up from the root, component by component.
    pub fn resolve(&self, path: impl AsRef<[u8]>) -> Result<Entry> {
        let mut entry = Entry {
            nodeid: ROOT,
            ..Entry::default()
        };
        let mut walked = false;
        for name in path
            .as_ref()
            .split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty())
        {
            entry = self.lookup(entry.nodeid, name)?;
            walked = true;
        }
        if !walked {
            entry.attr = self.getattr(ROOT)?;
        }
        Ok(entry)
    }

    /// All of a file, `step` bytes at a time.
    pub fn read_all(&self, nodeid: u64, step: u32) -> Result<Vec<u8>> {
        let fh = self.open(nodeid, open_flags::RDONLY)?;
        let mut bytes = Vec::new();
        loop {
            let read = self.read(nodeid, fh, bytes.len() as u64, step)?;
            let end = read.len() < step as usize;
            bytes.extend(read);
            if end {
                break;
            }
        }
        self.release(nodeid, fh)?;
        Ok(bytes)
    }

    /// All of the file at `path`.
    pub fn read_file(&self, path: impl AsRef<[u8]>) -> Result<Vec<u8>> {
        self.read_all(self.resolve(path)?.nodeid, 128 << 10)
    }

    /// Makes a file and writes `data` to it.
    pub fn write_file(&self, parent: u64, name: impl AsRef<[u8]>, data: &[u8]) -> Result<Entry> {
        let (entry, fh) = self.create(parent, name, 0o644, open_flags::RDWR)?;
        for (number, piece) in data.chunks(128 << 10).enumerate() {
            self.write(entry.nodeid, fh, number as u64 * (128 << 10), piece)?;
        }
        self.release(entry.nodeid, fh)?;
        Ok(entry)
    }

    /// All entries of a directory, `.` and `..` included if the device lists them.
    pub fn list(&self, nodeid: u64, plus: bool, room: u32) -> Result<Vec<Dirent>> {
        let fh = self.opendir(nodeid)?;
        let (mut all, mut offset) = (Vec::new(), 0);
        loop {
            let part = if plus {
                self.readdirplus(nodeid, fh, offset, room)?
            } else {
                self.readdir(nodeid, fh, offset, room)?
            };
            match part.last() {
                Some(last) => offset = last.off,
                None => break,
            }
            all.extend(part);
        }
        self.releasedir(nodeid, fh)?;
        Ok(all)
    }
}
