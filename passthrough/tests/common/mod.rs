//! What the tests of this crate share: a served temporary directory, and buffers that stand in for guest memory.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::ffi::CStr;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, stat64};
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem, ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use rafsd_passthrough::{Options, PassthroughFs};
use rustix::thread::UnshareFlags;
use tempfile::TempDir;

pub const ROOT: u64 = 1;

/// Requests of user 0.
pub fn root() -> Context {
    Context::default()
}

/// Requests of another user.
pub fn user(uid: u32, gid: u32) -> Context {
    Context { uid, gid, pid: 1 }
}

/// A directory on the host, `outside` its share, and the share served.
pub struct Share {
    pub dir: TempDir,
    pub fs: PassthroughFs,
}

impl Share {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// The share is the directory `share` of a temporary directory, beside which tests put what must stay untouched.
    pub fn with(change: impl FnOnce(&mut Options)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        std::fs::create_dir(&share).unwrap();
        let mut options = Options::new(&share);
        change(&mut options);
        let fs = PassthroughFs::new(options).unwrap();
        settle(&fs, FsOptions::all());
        Share { dir, fs }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("share").join(name)
    }

    pub fn outside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn lookup(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.fs.lookup(&root(), parent, name)
    }

    pub fn mkdir(&self, parent: u64, name: &CStr) -> u64 {
        self.fs.mkdir(&root(), parent, name, 0o755, 0).unwrap().inode
    }

    /// Makes and opens a file; returns its node and its handle.
    pub fn create(&self, parent: u64, name: &CStr) -> (u64, u64) {
        self.create_as(&root(), parent, name, 0o644, 0).unwrap()
    }

    pub fn create_as(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<(u64, u64)> {
        let args = CreateIn {
            flags: libc::O_RDWR as u32,
            mode,
            umask,
            fuse_flags: 0,
        };
        let (entry, handle, ..) = self.fs.create(ctx, parent, name, args)?;
        Ok((entry.inode, handle.unwrap()))
    }

    pub fn open(&self, inode: u64, flags: i32) -> io::Result<u64> {
        self.fs
            .open(&root(), inode, flags as u32, 0)
            .map(|(handle, ..)| handle.unwrap())
    }

    pub fn release(&self, inode: u64, handle: u64) {
        self.fs
            .release(&root(), inode, 0, handle, false, false, None)
            .unwrap();
    }

    pub fn read(&self, inode: u64, handle: u64, size: u32, offset: u64) -> io::Result<Vec<u8>> {
        let mut sink = Sink::new(size as usize);
        let count = self
            .fs
            .read(&root(), inode, handle, &mut sink, size, offset, None, 0)?;
        assert_eq!(count, sink.data.len());
        Ok(sink.data)
    }

    pub fn write(&self, inode: u64, handle: u64, data: &[u8], offset: u64) -> io::Result<usize> {
        self.write_flags(inode, handle, data, offset, 0, 0)
    }

    pub fn write_flags(
        &self,
        inode: u64,
        handle: u64,
        data: &[u8],
        offset: u64,
        flags: i32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let mut source = Source::new(data);
        let size = data.len() as u32;
        self.fs.write(
            &root(),
            inode,
            handle,
            &mut source,
            size,
            offset,
            None,
            false,
            flags as u32,
            fuse_flags,
        )
    }

    pub fn stat(&self, inode: u64) -> io::Result<stat64> {
        self.fs.getattr(&root(), inode, None).map(|(stat, _)| stat)
    }

    /// Names of a directory as READDIR tells them, `.` and `..` included.
    pub fn names(&self, inode: u64) -> Vec<String> {
        let handle = self.fs.opendir(&root(), inode, 0).unwrap().0.unwrap();
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let before = names.len();
            self.fs
                .readdir(&root(), inode, handle, 4096, offset, &mut |entry| {
                    names.push(String::from_utf8(entry.name.to_vec()).unwrap());
                    offset = entry.offset;
                    Ok(1)
                })
                .unwrap();
            if names.len() == before {
                break;
            }
        }
        self.fs.releasedir(&root(), inode, 0, handle).unwrap();
        names.sort();
        names
    }
}

/// Negotiates as a device does: the mount says what it wants, and is told what was settled.
pub fn settle(fs: &PassthroughFs, capable: FsOptions) -> FsOptions {
    let wanted = fs.init(capable).unwrap();
    fs.init(wanted).unwrap()
}

/// The errno of a request that must fail.
pub fn code<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("the request succeeded"),
        Err(error) => error.raw_os_error().expect("an error without an errno"),
    }
}

/// Descriptors that this process has open.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Whether the tests run as user 0 with the capabilities that acting for users takes. Says so where they do not.
pub fn privileged(test: &str) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .unwrap();
    let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
    // CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN, CAP_MKNOD.
    let needed = [0, 1, 3, 4, 6, 7, 21, 27];
    let all = needed.iter().all(|bit| effective & (1 << bit) != 0);
    if !all {
        println!("SKIPPED {test}: needs the capabilities of user 0");
    }
    all
}

/// Runs a line of shell; whether it succeeded.
pub fn run(command: &str) -> bool {
    Command::new("sh")
        .args(["-c", command])
        .status()
        .unwrap()
        .success()
}

/// Moves the test's thread to a mount namespace of its own.
pub fn own_mounts(test: &str) -> bool {
    if !privileged(test) {
        return false;
    }
    // SAFETY: descriptors stay shared; the thread only gets a mount table and a working directory of its own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    assert!(run("mount --make-rprivate /"));
    true
}

pub fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

/// Room in a guest's memory for the answer to a READ.
pub struct Sink {
    pub data: Vec<u8>,
    room: usize,
}

impl Sink {
    pub fn new(room: usize) -> Self {
        Sink {
            data: Vec::new(),
            room,
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.data.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ZeroCopyWriter for Sink {
    fn write_from(&mut self, f: &mut dyn FileReadWriteVolatile, count: usize, off: u64) -> io::Result<usize> {
        let mut memory = vec![0u8; count.min(self.room)];
        let (first, second) = memory.split_at_mut(count.min(self.room) / 3);
        // SAFETY: both slices live until the end of the call and nothing else uses them meanwhile.
        let slices = unsafe {
            [
                FileVolatileSlice::from_mut_slice(first),
                FileVolatileSlice::from_mut_slice(second),
            ]
        };
        let count = f.read_vectored_at_volatile(&slices, off)?;
        self.data.extend_from_slice(&memory[..count]);
        Ok(count)
    }

    fn available_bytes(&self) -> usize {
        self.room
    }
}

/// Data of a WRITE in a guest's memory.
pub struct Source {
    data: Vec<u8>,
}

impl Source {
    pub fn new(data: &[u8]) -> Self {
        Source { data: data.to_vec() }
    }
}

impl Read for Source {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        panic!("a write is not copied")
    }
}

impl ZeroCopyReader for Source {
    fn read_to(&mut self, f: &mut dyn FileReadWriteVolatile, count: usize, off: u64) -> io::Result<usize> {
        let count = count.min(self.data.len());
        let (first, second) = self.data[..count].split_at_mut(count / 3);
        // SAFETY: both slices live until the end of the call and nothing else uses them meanwhile.
        let slices = unsafe {
            [
                FileVolatileSlice::from_mut_slice(first),
                FileVolatileSlice::from_mut_slice(second),
            ]
        };
        f.write_vectored_at_volatile(&slices, off)
    }
}
