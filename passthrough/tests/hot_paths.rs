//! The requests that a guest sends most take no memory from the allocator.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{self, Read, Write};

use common::*;
use fuse_backend_rs::api::filesystem::{FileSystem, ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use rafsd_passthrough::InodeFiles;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts what each thread allocates.
struct Counting;

// SAFETY: everything is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are the ones asked for here.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the ones asked for here.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Guest memory that exists already.
struct Memory([u8; 4096]);

impl Memory {
    fn slices(&mut self) -> [FileVolatileSlice<'_>; 1] {
        // SAFETY: the slice lives as long as the borrow, and nothing else uses the memory meanwhile.
        [unsafe { FileVolatileSlice::from_mut_slice(&mut self.0) }]
    }
}

impl Write for Memory {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        panic!("a read is not copied")
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Memory {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        panic!("a write is not copied")
    }
}

impl ZeroCopyWriter for Memory {
    fn write_from(&mut self, f: &mut dyn FileReadWriteVolatile, _: usize, off: u64) -> io::Result<usize> {
        f.read_vectored_at_volatile(&self.slices(), off)
    }

    fn available_bytes(&self) -> usize {
        self.0.len()
    }
}

impl ZeroCopyReader for Memory {
    fn read_to(&mut self, f: &mut dyn FileReadWriteVolatile, _: usize, off: u64) -> io::Result<usize> {
        f.write_vectored_at_volatile(&self.slices(), off)
    }
}

/// Allocations that `operation` makes once it has been done before.
fn allocations(mut operation: impl FnMut()) -> usize {
    operation();
    let before = ALLOCATIONS.get();
    operation();
    ALLOCATIONS.get() - before
}

#[test]
fn hot_requests_do_not_allocate() {
    for files in [InodeFiles::Handles, InodeFiles::Descriptors] {
        let share = Share::with(|options| options.inode_files = files);
        let ctx = root();
        let (inode, handle) = share.create(ROOT, c"file");
        let mut memory = Memory([7; 4096]);
        let count = allocations(|| {
            let written = share
                .fs
                .write(&ctx, inode, handle, &mut memory, 4096, 0, None, false, 0, 0)
                .unwrap();
            assert_eq!(written, 4096);
        });
        assert_eq!(count, 0, "write, {files:?}");
        let count = allocations(|| {
            let read = share
                .fs
                .read(&ctx, inode, handle, &mut memory, 4096, 0, None, 0)
                .unwrap();
            assert_eq!(read, 4096);
        });
        assert_eq!(count, 0, "read, {files:?}");
        let count = allocations(|| assert!(share.fs.getattr(&ctx, inode, None).is_ok()));
        assert_eq!(count, 0, "getattr, {files:?}");
        let count = allocations(|| assert!(share.fs.getattr(&ctx, inode, Some(handle)).is_ok()));
        assert_eq!(count, 0, "getattr of an open file, {files:?}");
        let count = allocations(|| assert!(share.fs.lookup(&ctx, ROOT, c"file").is_ok()));
        assert_eq!(count, 0, "lookup, {files:?}");
        let count = allocations(|| share.fs.forget(&ctx, inode, 1));
        assert_eq!(count, 0, "forget, {files:?}");
        let count = allocations(|| assert!(share.fs.lookup(&ctx, ROOT, c"missing").is_err()));
        assert_eq!(count, 0, "lookup of what is not there, {files:?}");
        assert!(
            allocations(|| drop(std::hint::black_box(vec![1u8]))) > 0,
            "allocations are counted"
        );
    }
}
