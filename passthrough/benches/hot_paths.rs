//! What a request costs beyond the system call it comes down to: `cargo bench -p rafsd-passthrough`.
//!
//! Each line compares a request with the bare call, in turns in one run; medians of 21 rounds, in nanoseconds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::Instant;

use common::{ROOT, Share, root};
use fuse_backend_rs::api::filesystem::FileSystem;
use rafsd_passthrough::InodeFiles;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

const ROUNDS: usize = 21;
const REPEATS: u32 = 20_000;

fn nanoseconds(operation: &mut dyn FnMut()) -> u128 {
    let started = Instant::now();
    for _ in 0..REPEATS {
        operation();
    }
    started.elapsed().as_nanos() / u128::from(REPEATS)
}

fn compare(name: &str, mut request: impl FnMut(), mut call: impl FnMut()) {
    let (mut requests, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        requests.push(nanoseconds(&mut request));
        calls.push(nanoseconds(&mut call));
    }
    requests.sort_unstable();
    calls.sort_unstable();
    println!("{name:40} {:>8} {:>8}", requests[ROUNDS / 2], calls[ROUNDS / 2]);
}

/// Ends a result's life without a look at it.
fn discard<T>(_: T) {}

fn main() {
    println!("{:40} {:>8} {:>8}", "", "request", "call");
    for files in [InodeFiles::Handles, InodeFiles::Descriptors] {
        let share = Share::with(|options| options.inode_files = files);
        let (inode, handle) = share.create(ROOT, c"file");
        share.write(inode, handle, &[7; 4096], 0).unwrap();
        let file = rustix::fs::open(share.path("file"), OFlags::RDWR, Mode::empty()).unwrap();
        let path = rustix::fs::open(share.path("file"), OFlags::PATH, Mode::empty()).unwrap();
        let directory = rustix::fs::open(share.path(""), OFlags::PATH, Mode::empty()).unwrap();
        let (fs, ctx) = (&share.fs, root());
        let line = |name: &str| format!("{name}, {files:?}");
        compare(
            &line("getattr"),
            || discard(black_box(fs.getattr(&ctx, inode, None))),
            || discard(black_box(rustix::fs::fstat(&path))),
        );
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
        compare(
            &line("lookup of a known name"),
            || discard(black_box(fs.lookup(&ctx, ROOT, c"file"))),
            || {
                discard(black_box(rustix::fs::statx(
                    &directory,
                    c"file",
                    AtFlags::SYMLINK_NOFOLLOW,
                    mask,
                )))
            },
        );
        let mut sink = vec![0; 4096];
        compare(
            &line("read of 4 KiB"),
            || discard(black_box(share.read(inode, handle, 4096, 0))),
            || discard(black_box(rustix::io::pread(&file, &mut sink, 0))),
        );
        compare(
            &line("open and release"),
            || {
                let handle = share.open(inode, libc::O_RDONLY).unwrap();
                share.release(inode, handle);
            },
            || {
                discard(black_box(rustix::fs::openat(
                    &directory,
                    c"file",
                    OFlags::RDONLY,
                    Mode::empty(),
                )))
            },
        );
    }
}
