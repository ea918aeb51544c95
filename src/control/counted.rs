//! An image whose operations are counted. The device serves it like any other; it does not know.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{OpenOptions, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyWriter,
};
use rafs::fs::{Absent, HeldChunks, RafsFs, ReadOutcome};

use super::counters::{Counters, Operation};
use crate::mounts::{Fetched, ImageFs};

/// An image and its counters.
pub(super) struct Counted {
    image: Arc<RafsFs>,
    counters: Arc<Counters>,
}

impl Counted {
    /// Counts what is done to `image` in `counters`.
    pub fn new(image: Arc<RafsFs>, counters: Arc<Counters>) -> Self {
        Self { image, counters }
    }

    fn count<T>(
        &self,
        operation: Operation,
        inode: u64,
        run: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let before = Instant::now();
        let outcome = run();
        self.counters
            .count(operation, inode, outcome.is_err(), before.elapsed());
        outcome
    }
}

impl ImageFs for Counted {
    fn root(&self) -> u64 {
        ImageFs::root(&*self.image)
    }

    fn read_resident(
        &self,
        inode: u64,
        offset: u64,
        size: u32,
        held: &HeldChunks,
        w: &mut dyn ZeroCopyWriter,
    ) -> io::Result<ReadOutcome> {
        let before = Instant::now();
        let outcome = self.image.read_resident(inode, offset, size, held, w);
        match &outcome {
            Ok(ReadOutcome::Done(read)) => {
                let took = before.elapsed();
                self.counters.count(Operation::Read, inode, false, took);
                self.counters.count_read(inode, size.into(), *read as u64, took);
            }
            Ok(ReadOutcome::Absent(_)) => self.counters.count_absent(),
            Err(_) => self
                .counters
                .count(Operation::Read, inode, true, before.elapsed()),
        }
        outcome
    }

    fn fetch_absent(&self, absent: Absent, deadline: Instant, done: Fetched) {
        let (counters, before) = (Arc::clone(&self.counters), Instant::now());
        let counted = Box::new(move |outcome: Result<HeldChunks, _>| {
            counters.count_wait(outcome.is_ok(), before.elapsed());
            done(outcome);
        });
        self.image.fetch_absent(absent, deadline, counted);
    }
}

impl FileSystem for Counted {
    type Inode = u64;
    type Handle = u64;

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.count(Operation::Lookup, parent, || self.image.lookup(ctx, parent, name))
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        self.image.forget(ctx, inode, count);
        self.counters
            .count(Operation::Forget, inode, false, Duration::ZERO);
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(u64, u64)>) {
        let first = requests.first().map_or(0, |(inode, _)| *inode);
        self.image.batch_forget(ctx, requests);
        self.counters
            .count(Operation::BatchForget, first, false, Duration::ZERO);
    }

    fn getattr(&self, ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        self.count(Operation::Getattr, inode, || {
            self.image.getattr(ctx, inode, handle)
        })
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.count(Operation::Readlink, inode, || self.image.readlink(ctx, inode))
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        self.count(Operation::Open, inode, || {
            self.image.open(ctx, inode, flags, fuse_flags)
        })
    }

    fn opendir(&self, ctx: &Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.count(Operation::Opendir, inode, || {
            self.image.opendir(ctx, inode, flags)
        })
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.count(Operation::Readdir, inode, || {
            self.image.readdir(ctx, inode, handle, size, offset, add_entry)
        })
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.count(Operation::Readdirplus, inode, || {
            self.image
                .readdirplus(ctx, inode, handle, size, offset, add_entry)
        })
    }

    fn getxattr(&self, ctx: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.count(Operation::Getxattr, inode, || {
            self.image.getxattr(ctx, inode, name, size)
        })
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.count(Operation::Listxattr, inode, || {
            self.image.listxattr(ctx, inode, size)
        })
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.count(Operation::Statfs, inode, || self.image.statfs(ctx, inode))
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.count(Operation::Access, inode, || self.image.access(ctx, inode, mask))
    }

    fn lseek(&self, ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.image.lseek(ctx, inode, handle, offset, whence)
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.count(Operation::Read, inode, || {
            self.image
                .read(ctx, inode, handle, w, size, offset, lock_owner, flags)
        })
    }

    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.image.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.image.fsync(ctx, inode, datasync, handle)
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.image.fsyncdir(ctx, inode, datasync, handle)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.count(Operation::Release, inode, || {
            self.image
                .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
        })
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.image.releasedir(ctx, inode, flags, handle)
    }
}
