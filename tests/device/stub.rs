//! An image whose data arrives when the test says so, and a host tree whose calls block when it says so.

use std::ffi::CStr;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem, OpenOptions, ZeroCopyWriter};
use rafs::fs::{Absent, HeldChunks, ReadOutcome};
use rafsd::mounts::{Fetched, HostFs, ImageFs};

/// Size of the one file, `file`, in bytes.
pub const SIZE: u64 = 1 << 20;
const ROOT: u64 = 36;
const FILE: u64 = 37;

/// The byte at `offset` of the file.
pub fn byte(offset: u64) -> u8 {
    (offset % 253) as u8
}

#[derive(Default)]
pub struct Image {
    pub resident: AtomicBool,
    pub fetches: AtomicUsize,
    waiting: Mutex<Vec<Fetched>>,
}

fn stat(inode: u64) -> stat64 {
    let mut stat = Entry::default().attr;
    stat.st_ino = inode;
    stat.st_nlink = 1;
    (stat.st_mode, stat.st_size) = match inode {
        ROOT | 1 => (libc::S_IFDIR | 0o755, 4096),
        _ => (libc::S_IFREG | 0o644, SIZE as i64),
    };
    stat
}

fn errno(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

impl Image {
    /// Number of fetches that have not been answered.
    pub fn waiting(&self) -> usize {
        self.waiting.lock().unwrap().len()
    }

    /// Everything has arrived.
    pub fn arrive(&self) {
        self.resident.store(true, Ordering::SeqCst);
        self.answer_fetches();
    }

    /// Answers the fetches, without anything having arrived.
    pub fn answer_fetches(&self) {
        for done in std::mem::take(&mut *self.waiting.lock().unwrap()) {
            done(Ok(HeldChunks::default()));
        }
    }

    pub fn wait_for_fetches(&self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.waiting() < count {
            assert!(Instant::now() < deadline, "{} of {count} fetches", self.waiting());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl FileSystem for Image {
    type Inode = u64;
    type Handle = u64;

    fn lookup(&self, _: &Context, _: u64, name: &CStr) -> io::Result<Entry> {
        if name != c"file" {
            return Err(errno(libc::ENOENT));
        }
        Ok(Entry {
            inode: FILE,
            attr: stat(FILE),
            ..Entry::default()
        })
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        Ok((stat(inode), Duration::ZERO))
    }

    fn open(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        Ok((None, OpenOptions::KEEP_CACHE, None))
    }
}

impl ImageFs for Image {
    fn root(&self) -> u64 {
        ROOT
    }

    fn read_resident(
        &self,
        _: u64,
        offset: u64,
        size: u32,
        _: &HeldChunks,
        w: &mut dyn ZeroCopyWriter,
    ) -> io::Result<ReadOutcome> {
        if !self.resident.load(Ordering::SeqCst) {
            return Ok(ReadOutcome::Absent(Absent { chunks: Vec::new() }));
        }
        let end = (offset + u64::from(size)).min(SIZE);
        let bytes: Vec<u8> = (offset..end).map(byte).collect();
        w.write_all(&bytes)?;
        Ok(ReadOutcome::Done(bytes.len()))
    }

    fn fetch_absent(&self, _: Absent, _: Instant, done: Fetched) {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        self.waiting.lock().unwrap().push(done);
    }
}

/// A host tree whose fsync blocks until released.
#[derive(Default)]
pub struct Slow {
    pub blocked: Mutex<()>,
}

impl FileSystem for Slow {
    type Inode = u64;
    type Handle = u64;

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        Ok((stat(inode), Duration::ZERO))
    }

    fn lookup(&self, _: &Context, _: u64, _: &CStr) -> io::Result<Entry> {
        Ok(Entry {
            inode: FILE,
            attr: stat(FILE),
            ..Entry::default()
        })
    }

    fn fsync(&self, _: &Context, _: u64, _: bool, _: u64) -> io::Result<()> {
        drop(self.blocked.lock().unwrap());
        Ok(())
    }
}

impl HostFs for Slow {}
