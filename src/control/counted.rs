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

/// Operations that are the image's own, each counted as what stands before it; `_` is not counted.
macro_rules! of_the_image {
    ($($operation:tt $name:ident($($argument:ident: $type:ty),*) -> $answer:ty;)*) => {
        $(of_the_image! { @ $operation $name($($argument: $type),*) -> $answer })*
    };
    (@ _ $name:ident($($argument:ident: $type:ty),*) -> $answer:ty) => {
        fn $name(&self, ctx: &Context, inode: u64, $($argument: $type),*) -> io::Result<$answer> {
            self.image.$name(ctx, inode, $($argument),*)
        }
    };
    (@ $operation:ident $name:ident($($argument:ident: $type:ty),*) -> $answer:ty) => {
        fn $name(&self, ctx: &Context, inode: u64, $($argument: $type),*) -> io::Result<$answer> {
            self.count(Operation::$operation, inode, || self.image.$name(ctx, inode, $($argument),*))
        }
    };
}

type Opened = (Option<u64>, OpenOptions);
type AddEntry<'a> = &'a mut dyn FnMut(DirEntry) -> io::Result<usize>;
type AddEntryPlus<'a> = &'a mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>;

impl FileSystem for Counted {
    type Inode = u64;
    type Handle = u64;

    of_the_image! {
        Lookup lookup(name: &CStr) -> Entry;
        Getattr getattr(handle: Option<u64>) -> (stat64, Duration);
        Readlink readlink() -> Vec<u8>;
        Open open(flags: u32, fuse_flags: u32) -> (Option<u64>, OpenOptions, Option<u32>);
        Opendir opendir(flags: u32) -> Opened;
        Readdir readdir(handle: u64, size: u32, offset: u64, add_entry: AddEntry<'_>) -> ();
        Readdirplus readdirplus(handle: u64, size: u32, offset: u64, add_entry: AddEntryPlus<'_>) -> ();
        Getxattr getxattr(name: &CStr, size: u32) -> GetxattrReply;
        Listxattr listxattr(size: u32) -> ListxattrReply;
        Statfs statfs() -> statvfs64;
        Access access(mask: u32) -> ();
        Read read(handle: u64, w: &mut dyn ZeroCopyWriter, size: u32, offset: u64, owner: Option<u64>, flags: u32) -> usize;
        Release release(flags: u32, handle: u64, flush: bool, unlock: bool, owner: Option<u64>) -> ();
        _ releasedir(flags: u32, handle: u64) -> ();
        _ lseek(handle: u64, offset: u64, whence: u32) -> u64;
        _ flush(handle: u64, owner: u64) -> ();
        _ fsync(datasync: bool, handle: u64) -> ();
        _ fsyncdir(datasync: bool, handle: u64) -> ();
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
}
