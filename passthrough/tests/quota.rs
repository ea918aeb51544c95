//! What a mount may take of the host's disk: counted as `du` counts it, and never exceeded.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::*;
use fuse_backend_rs::abi::fuse_abi::{FsOptions, SetattrValid, stat64};
use fuse_backend_rs::api::filesystem::FileSystem;
use proptest::prelude::*;
use rafsd_passthrough::{CreateExtras, Options, PassthroughFs, Quota, QuotaUsage};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

fn limited(bytes: u64, inodes: u64) -> Share {
    Share::with(|options| {
        options.quota = Quota {
            bytes: Some(bytes),
            inodes: Some(inodes),
        };
    })
}

fn usage(share: &Share) -> QuotaUsage {
    share.fs.quota_usage().unwrap()
}

/// What `du` says of a tree: an own walk, each inode once.
fn du(root: &Path) -> QuotaUsage {
    fn walk(path: &Path, seen: &mut HashSet<u64>, sum: &mut QuotaUsage) {
        let meta = std::fs::symlink_metadata(path).unwrap();
        if !seen.insert(meta.ino()) {
            return;
        }
        sum.bytes += meta.blocks() * 512;
        sum.inodes += 1;
        if meta.is_dir() {
            for entry in std::fs::read_dir(path).unwrap() {
                walk(&entry.unwrap().path(), seen, sum);
            }
        }
    }
    let mut sum = QuotaUsage::default();
    walk(root, &mut HashSet::new(), &mut sum);
    sum
}

fn du_of(share: &Share) -> QuotaUsage {
    du(&share.path(""))
}

fn fallocate(
    share: &Share,
    (inode, handle): (u64, u64),
    mode: i32,
    offset: u64,
    length: u64,
) -> std::io::Result<()> {
    share
        .fs
        .fallocate(&root(), inode, handle, mode as u32, offset, length)
}

fn truncate(share: &Share, inode: u64, size: i64) {
    // SAFETY: the struct consists of integers only.
    let mut attr: stat64 = unsafe { std::mem::zeroed() };
    attr.st_size = size;
    share
        .fs
        .setattr(&root(), inode, attr, None, SetattrValid::SIZE)
        .unwrap();
}

/// Writes `piece` after `piece` from `offset` on until there is no room; returns where it ended.
fn fill(share: &Share, (inode, handle): (u64, u64), mut offset: u64, piece: usize) -> u64 {
    let data = vec![7; piece];
    loop {
        match share.write(inode, handle, &data, offset) {
            Ok(0) => panic!("a write of nothing"),
            Ok(written) => offset += written as u64,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                return offset;
            }
        }
    }
}

fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_full_mount_refuses_what_grows_and_nothing_else() {
    let share = limited(MIB, 1000);
    let file = share.create(ROOT, c"f");
    let ahead = share.create(ROOT, c"ahead");
    fallocate(&share, ahead, 0, 0, 64 * KIB).unwrap();
    let end = fill(&share, file, 0, 100_000);
    // To the last block, as on a disk.
    assert!(
        usage(&share).bytes <= MIB && usage(&share).bytes > MIB - 4 * KIB,
        "{:?}",
        usage(&share)
    );
    assert!(end > 900 * KIB, "{end}");
    let shown = share.fs.statfs(&root(), ROOT).unwrap();
    assert_eq!(shown.f_blocks * shown.f_frsize, MIB);
    assert!(shown.f_bavail * shown.f_frsize < 4 * KIB && shown.f_bfree == shown.f_bavail);

    // What has its place may be written again, also what was allocated and never written.
    assert_eq!(share.write(file.0, file.1, &[1; 5000], 4000).unwrap(), 5000);
    assert_eq!(
        share.write(ahead.0, ahead.1, &vec![2; 64 * 1024], 0).unwrap(),
        64 * 1024
    );
    let appended = share.write_flags(file.0, file.1, &[3; 8192], 0, libc::O_APPEND, 0);
    assert!(appended.is_err() || appended.unwrap() < 4096);
    truncate(&share, file.0, 1 << 40);
    truncate(&share, file.0, end as i64);
    share
        .fs
        .rename(&root(), ROOT, c"ahead", ROOT, c"away", 0)
        .unwrap();
    assert_eq!(code(fallocate(&share, file, 0, 1 << 30, MIB)), libc::ENOSPC);
    assert_eq!(code(share.fs.mkdir(&root(), ROOT, c"d", 0o755, 0)), libc::ENOSPC);
    assert_eq!(
        code(share.create_as(&root(), ROOT, c"new", 0o644, 0)),
        libc::ENOSPC
    );
    // Opening what is there takes no room.
    let (again, handle) = share.create_as(&root(), ROOT, c"away", 0o644, 0).unwrap();
    share.release(again, handle);

    // Space comes back by every way that gives it back.
    let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fallocate(&share, file, hole, 0, 128 * KIB).unwrap();
    let directory = share.mkdir(ROOT, c"d");
    share.fs.rmdir(&root(), ROOT, c"d").unwrap();
    share.fs.forget(&root(), directory, 1);
    assert_eq!(
        fill(&share, file, 0, 8192),
        end,
        "the hole is filled, the rest is written again"
    );
    truncate(&share, file.0, 0);
    assert!(usage(&share).bytes < 128 * KIB);
    share.release(file.0, file.1);
    share.release(ahead.0, ahead.1);
    assert_eq!(usage(&share), du_of(&share));
}

#[test]
fn inodes_are_limited_whatever_makes_them() {
    let share = limited(64 * MIB, 6);
    share.mkdir(ROOT, c"d");
    share.create(ROOT, c"f");
    share.fs.symlink(&root(), c"f", ROOT, c"l").unwrap();
    share
        .fs
        .mknod(&root(), ROOT, c"p", libc::S_IFIFO | 0o600, 0, 0)
        .unwrap();
    let shown = share.fs.statfs(&root(), ROOT).unwrap();
    assert_eq!((shown.f_files, shown.f_ffree, shown.f_favail), (6, 1, 1));
    // A name is not an inode.
    let file = share.lookup(ROOT, c"f").unwrap().inode;
    share.fs.link(&root(), file, ROOT, c"f2").unwrap();
    assert_eq!(usage(&share).inodes, 5);
    let (temporary, handle, _) = share
        .fs
        .tmpfile(
            &root(),
            ROOT,
            libc::O_RDWR as u32,
            0o600,
            0,
            &CreateExtras::default(),
        )
        .unwrap();
    for result in [
        share.fs.mkdir(&root(), ROOT, c"x", 0o755, 0),
        share.fs.symlink(&root(), c"f", ROOT, c"x"),
        share.fs.mknod(&root(), ROOT, c"x", libc::S_IFREG | 0o600, 0, 0),
    ] {
        assert_eq!(code(result), libc::ENOSPC);
    }
    assert_eq!(code(share.create_as(&root(), ROOT, c"x", 0o600, 0)), libc::ENOSPC);
    if privileged("the whiteout of inodes_are_limited_whatever_makes_them") {
        let whiteout = share
            .fs
            .rename(&root(), ROOT, c"f2", ROOT, c"f3", libc::RENAME_WHITEOUT);
        assert_eq!(code(whiteout), libc::ENOSPC);
    }
    // A file without a name counts until the guest has let go of it, and for good if it gets one.
    share.release(temporary.inode, handle);
    assert_eq!(usage(&share).inodes, 6);
    share.fs.forget(&root(), temporary.inode, 1);
    assert_eq!(usage(&share).inodes, 5);
    let (temporary, handle, _) = share
        .fs
        .tmpfile(
            &root(),
            ROOT,
            libc::O_RDWR as u32,
            0o600,
            0,
            &CreateExtras::default(),
        )
        .unwrap();
    share.fs.link(&root(), temporary.inode, ROOT, c"named").unwrap();
    share.release(temporary.inode, handle);
    share.fs.forget(&root(), temporary.inode, 2);
    assert_eq!(usage(&share), du_of(&share));
    assert_eq!(usage(&share).inodes, 6);
    share.fs.unlink(&root(), ROOT, c"named").unwrap();
    if privileged("the whiteout of inodes_are_limited_whatever_makes_them") {
        share
            .fs
            .rename(&root(), ROOT, c"f2", ROOT, c"f3", libc::RENAME_WHITEOUT)
            .unwrap();
        assert_eq!(usage(&share).inodes, 6);
        assert_eq!(usage(&share), du_of(&share));
    }
}

#[test]
fn an_unlinked_file_counts_until_nobody_can_reach_it() {
    let share = limited(4 * MIB, 100);
    let (inode, handle) = share.create(ROOT, c"f");
    share.write(inode, handle, &vec![1; 3 << 20], 0).unwrap();
    let open = share.open(inode, libc::O_RDONLY).unwrap();
    share.fs.unlink(&root(), ROOT, c"f").unwrap();
    share.release(inode, handle);
    share.fs.forget(&root(), inode, 1);
    // A guest that forgets what it has open gains nothing.
    assert!(usage(&share).bytes >= 3 * MIB);
    let (other, writing) = share.create(ROOT, c"g");
    let end = fill(&share, (other, writing), 0, 1 << 20);
    assert!(end <= MIB, "{end}");
    share.release(inode, open);
    assert!(usage(&share).bytes < 2 * MIB);
    // Nor does one that closes what it goes on to know.
    share.release(other, writing);
    share.fs.rename(&root(), ROOT, c"g", ROOT, c"h", 0).unwrap();
    share.create(ROOT, c"g");
    share.fs.rename(&root(), ROOT, c"g", ROOT, c"h", 0).unwrap();
    assert!(usage(&share).bytes >= end);
    let reopened = share.open(other, libc::O_RDONLY).unwrap();
    share.release(other, reopened);
    share.fs.forget(&root(), other, 1);
    assert!(usage(&share).bytes < end);
    assert_eq!(usage(&share), du_of(&share));
}

#[test]
fn a_directory_without_a_name_counts_while_it_is_open() {
    let share = limited(4 * MIB, 100);
    let inode = share.mkdir(ROOT, c"d");
    let open = share.fs.opendir(&root(), inode, 0).unwrap().0.unwrap();
    let before = usage(&share);
    share.fs.rmdir(&root(), ROOT, c"d").unwrap();
    share.fs.forget(&root(), inode, 1);
    assert_eq!(usage(&share).inodes, before.inodes);
    share.fs.releasedir(&root(), inode, 0, open).unwrap();
    assert_eq!(usage(&share), du_of(&share));
}

#[test]
fn copies_and_attributes_are_counted() {
    // Not even numbers: some file systems take no space for directories.
    let share = limited(2 * MIB - 32 * KIB, 100);
    let from = share.create(ROOT, c"from");
    share.write(from.0, from.1, &vec![1; 1 << 20], 0).unwrap();
    let to = share.create(ROOT, c"to");
    let copy = |at: u64, length: u64| {
        share
            .fs
            .copy_file_range(&root(), (from.0, from.1, at), (to.0, to.1, at), length, 0)
    };
    let copied = copy(0, 1 << 30).unwrap() as u64;
    assert_eq!(share.stat(to.0).unwrap().st_size as u64, copied);
    assert!(usage(&share).bytes <= 2 * MIB - 32 * KIB);
    assert!((MIB - 96 * KIB..=MIB - 32 * KIB).contains(&copied), "{copied}");
    assert_eq!(code(copy(copied, MIB - copied)), libc::ENOSPC);
    let set = share.fs.setxattr(&root(), from.0, c"user.big", &[1; 3000], 0);
    assert_eq!(code(set), libc::ENOSPC);
    truncate(&share, to.0, 0);
    share
        .fs
        .setxattr(&root(), from.0, c"user.big", &[1; 3000], 0)
        .unwrap();
    assert_eq!(usage(&share), du_of(&share));
    share.fs.removexattr(&root(), from.0, c"user.big").unwrap();
    assert_eq!(usage(&share), du_of(&share));
}

#[test]
fn writers_of_many_queues_share_what_there_is() {
    const WRITERS: usize = 4;
    let share = limited(16 * MIB, 1000);
    let start = Barrier::new(WRITERS);
    let written = AtomicU64::new(0);
    let highest = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..WRITERS {
            let (share, start, written, highest) = (&share, &start, &written, &highest);
            scope.spawn(move || {
                let name = CString::new(format!("f{number}")).unwrap();
                let (inode, handle) = share.create(ROOT, &name);
                // Two writers for each file.
                let inode = match number % 2 {
                    0 => inode,
                    _ => share.lookup(ROOT, &name).unwrap().inode,
                };
                start.wait();
                let data = vec![number as u8; 50_000];
                let (mut offset, mut refused) = (0, 0);
                while refused < 3 {
                    match share.write(inode, handle, &data, offset) {
                        Ok(count) => {
                            offset += count as u64;
                            written.fetch_add(count as u64, Ordering::Relaxed);
                        }
                        Err(error) => {
                            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                            refused += 1;
                        }
                    }
                    highest.fetch_max(usage(share).bytes, Ordering::Relaxed);
                    // Some of it is given back and taken again.
                    if offset % 7 == 0 {
                        fallocate(
                            share,
                            (inode, handle),
                            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                            0,
                            8192,
                        )
                        .unwrap();
                    }
                }
                share.release(inode, handle);
            });
        }
    });
    assert!(
        highest.into_inner() <= 16 * MIB + 512 * KIB,
        "what the host shows twice aside"
    );
    assert!(written.into_inner() > 15 * MIB, "what there is can be used");
    share.fs.syncfs(ROOT).unwrap();
    let (used, real) = (usage(&share), du_of(&share));
    assert_eq!(used.inodes, real.inodes);
    assert!(used.bytes.abs_diff(real.bytes) <= 64 * KIB, "{used:?} {real:?}");
}

#[test]
fn names_made_and_taken_by_many_queues_leave_no_trace() {
    let share = limited(64 * MIB, 200);
    std::thread::scope(|scope| {
        for number in 0..4u64 {
            let share = &share;
            scope.spawn(move || {
                for round in 0..300u64 {
                    // The names are shared, so threads get in each other's way.
                    let name = CString::new(format!("n{}", (round * 7 + number) % 11)).unwrap();
                    if let Ok((inode, handle)) = share.create_as(&root(), ROOT, &name, 0o644, 0) {
                        share.write(inode, handle, &[1; 9000], 0).unwrap();
                        share.release(inode, handle);
                        share.fs.forget(&root(), inode, 1);
                    }
                    let other = CString::new(format!("n{}", (round * 3 + number) % 11)).unwrap();
                    let _ = share.fs.rename(&root(), ROOT, &name, ROOT, &other, 0);
                    let _ = share.fs.unlink(&root(), ROOT, &other);
                    if round % 16 == 0 {
                        let inode = share.fs.mkdir(
                            &root(),
                            ROOT,
                            &CString::new(format!("d{number}")).unwrap(),
                            0o755,
                            0,
                        );
                        if let Ok(entry) = inode {
                            share.fs.forget(&root(), entry.inode, 1);
                        }
                        let _ = share
                            .fs
                            .rmdir(&root(), ROOT, &CString::new(format!("d{number}")).unwrap());
                    }
                }
            });
        }
    });
    // Names that are swapped at the very moment may be counted twice, never less than once; a count sets that right.
    let (used, real) = (usage(&share), du_of(&share));
    assert!(
        used.inodes >= real.inodes && used.bytes >= real.bytes,
        "{used:?} {real:?}"
    );
    let (inode, handle) = share.create(ROOT, c"f");
    fill(&share, (inode, handle), 0, 1 << 20);
    truncate(&share, inode, 0);
    until("a count after a refusal", || usage(&share) == du_of(&share));
}

#[test]
fn a_restart_counts_what_is_there() {
    let share = limited(8 * MIB, 100);
    let (inode, handle) = share.create(ROOT, c"f");
    share.write(inode, handle, &vec![1; 1 << 20], 0).unwrap();
    share.fs.link(&root(), inode, ROOT, c"f2").unwrap();
    share.mkdir(ROOT, c"d");
    share.release(inode, handle);
    let before = usage(&share);
    let mut options = Options::new(share.path(""));
    options.quota = Quota {
        bytes: None,
        inodes: Some(10),
    };
    let again = PassthroughFs::new(options).unwrap();
    assert_eq!(again.quota_usage(), Some(before));
    assert_eq!(before, du_of(&share));
    let unlimited = PassthroughFs::new(Options::new(share.path(""))).unwrap();
    assert_eq!(unlimited.quota_usage(), None);
}

#[test]
fn what_the_host_removes_can_be_used_soon() {
    let share = limited(4 * MIB, 100);
    std::fs::write(share.path("of-the-host"), vec![1; 3 << 20]).unwrap();
    let again = PassthroughFs::new(share.fs.options().clone()).unwrap();
    let share = Share {
        dir: share.dir,
        fs: again,
    };
    let file = share.create(ROOT, c"f");
    assert!(fill(&share, file, 0, 1 << 20) <= MIB);
    std::fs::remove_file(share.path("of-the-host")).unwrap();
    until("room that the host has made", || {
        share.write(file.0, file.1, &vec![1; 1 << 20], 2 << 20).is_ok()
    });
    until("an exact count", || usage(&share) == du_of(&share));
}

#[test]
fn deep_trees_and_files_of_many_names_are_counted_with_few_descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("share");
    std::fs::create_dir(&top).unwrap();
    std::fs::write(top.join("f"), vec![1; 10_000]).unwrap();
    for number in 0..500 {
        std::fs::hard_link(top.join("f"), top.join(format!("name-of-some-length-{number}"))).unwrap();
    }
    let mut at = File::open(&top).unwrap();
    for _ in 0..1500 {
        rustix::fs::mkdirat(&at, "deeper", rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
        std::fs::write(format!("/proc/self/fd/{}/f", at.as_raw_fd()), b"x").unwrap_or(());
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
        at = rustix::fs::openat(&at, "deeper", flags, rustix::fs::Mode::empty())
            .unwrap()
            .into();
    }
    let mut options = Options::new(&top);
    options.quota.inodes = Some(1 << 20);
    let before = open_descriptors();
    let fs = PassthroughFs::new(options).unwrap();
    assert!(open_descriptors() < before + 20);
    // The root, 1,500 directories with a file in each but the last; the first one's is the one of many names.
    assert_eq!(fs.quota_usage().unwrap().inodes, 1 + 1500 + 1500);
    let said = std::process::Command::new("du")
        .args(["-s", "-B1"])
        .arg(&top)
        .output()
        .unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    let bytes: u64 = said.split_whitespace().next().unwrap().parse().unwrap();
    assert_eq!(fs.quota_usage().unwrap().bytes, bytes);
}

/// What a guest does, on names `f0` to `f4`.
#[derive(Clone, Debug)]
enum Step {
    Write {
        file: u8,
        offset: u64,
        length: usize,
    },
    Append {
        file: u8,
        length: usize,
    },
    Truncate {
        file: u8,
        size: i64,
    },
    Allocate {
        file: u8,
        mode: u8,
        offset: u64,
        length: u64,
    },
    Copy {
        from: u8,
        to: u8,
        offset: u64,
        length: u64,
    },
    Unlink {
        file: u8,
    },
    Rename {
        from: u8,
        to: u8,
        exchange: bool,
    },
    Link {
        from: u8,
        to: u8,
    },
    Directory {
        name: u8,
    },
    Symlink {
        name: u8,
        length: usize,
    },
    Attribute {
        file: u8,
        length: usize,
    },
    Close {
        file: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let file = 0..5u8;
    let offset = 0..2_000_000u64;
    prop_oneof![
        4 => (file.clone(), offset.clone(), 1..200_000usize).prop_map(|(file, offset, length)| Step::Write { file, offset, length }),
        2 => (file.clone(), 1..100_000usize).prop_map(|(file, length)| Step::Append { file, length }),
        1 => (file.clone(), 0..2_000_000i64).prop_map(|(file, size)| Step::Truncate { file, size }),
        2 => (file.clone(), 0..4u8, offset.clone(), 1..500_000u64)
            .prop_map(|(file, mode, offset, length)| Step::Allocate { file, mode, offset, length }),
        1 => (file.clone(), file.clone(), offset, 1..500_000u64)
            .prop_map(|(from, to, offset, length)| Step::Copy { from, to, offset, length }),
        2 => file.clone().prop_map(|file| Step::Unlink { file }),
        2 => (file.clone(), file.clone(), any::<bool>()).prop_map(|(from, to, exchange)| Step::Rename { from, to, exchange }),
        1 => (file.clone(), file.clone()).prop_map(|(from, to)| Step::Link { from, to }),
        1 => file.clone().prop_map(|name| Step::Directory { name }),
        1 => (file.clone(), 1..2000usize).prop_map(|(name, length)| Step::Symlink { name, length }),
        1 => (file.clone(), 1..3500usize).prop_map(|(file, length)| Step::Attribute { file, length }),
        1 => file.prop_map(|file| Step::Close { file }),
    ]
}

/// A guest that has up to five files open, by number.
#[derive(Default)]
struct Guest {
    open: [Option<(u64, u64)>; 5],
}

impl Guest {
    fn file(&mut self, share: &Share, number: u8) -> Option<(u64, u64)> {
        let name = CString::new(format!("f{number}")).unwrap();
        let slot = &mut self.open[usize::from(number)];
        if slot.is_none() {
            *slot = share.create_as(&root(), ROOT, &name, 0o644, 0).ok();
        }
        *slot
    }

    fn close(&mut self, share: &Share, number: u8) {
        if let Some((inode, handle)) = self.open[usize::from(number)].take() {
            share.release(inode, handle);
            share.fs.forget(&root(), inode, 1);
        }
    }

    /// Errors are the guest's business here.
    fn take(&mut self, share: &Share, step: &Step) {
        let name = |number: u8| CString::new(format!("f{number}")).unwrap();
        let fs = &share.fs;
        match *step {
            Step::Write { file, offset, length } => {
                if let Some((inode, handle)) = self.file(share, file) {
                    let _ = share.write(inode, handle, &vec![1; length], offset);
                }
            }
            Step::Append { file, length } => {
                if let Some((inode, handle)) = self.file(share, file) {
                    let _ = share.write_flags(inode, handle, &vec![1; length], 0, libc::O_APPEND, 0);
                }
            }
            Step::Truncate { file, size } => {
                if let Some((inode, _)) = self.file(share, file) {
                    truncate(share, inode, size);
                }
            }
            Step::Allocate {
                file,
                mode,
                offset,
                length,
            } => {
                let mode = [
                    0,
                    libc::FALLOC_FL_KEEP_SIZE,
                    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    libc::FALLOC_FL_ZERO_RANGE,
                ][usize::from(mode)];
                if let Some(file) = self.file(share, file) {
                    let _ = fallocate(share, file, mode, offset, length);
                }
            }
            Step::Copy {
                from,
                to,
                offset,
                length,
            } => {
                if let (Some(from), Some(to)) = (self.file(share, from), self.file(share, to)) {
                    let _ = fs.copy_file_range(&root(), (from.0, from.1, 0), (to.0, to.1, offset), length, 0);
                }
            }
            Step::Unlink { file } => {
                let _ = fs.unlink(&root(), ROOT, &name(file));
                let _ = fs.rmdir(&root(), ROOT, &name(file));
            }
            Step::Rename { from, to, exchange } => {
                let flags = if exchange { libc::RENAME_EXCHANGE } else { 0 };
                let _ = fs.rename(&root(), ROOT, &name(from), ROOT, &name(to), flags);
            }
            Step::Link { from, to } => {
                if let Some((inode, _)) = self.open[usize::from(from)]
                    && fs.link(&root(), inode, ROOT, &name(to)).is_ok()
                {
                    fs.forget(&root(), inode, 1);
                }
            }
            Step::Directory { name: number } => {
                if let Ok(made) = fs.mkdir(&root(), ROOT, &name(number), 0o755, 0) {
                    fs.forget(&root(), made.inode, 1);
                }
            }
            Step::Symlink { name: number, length } => {
                let target = CString::new(vec![b'x'; length]).unwrap();
                if let Ok(made) = fs.symlink(&root(), &target, ROOT, &name(number)) {
                    fs.forget(&root(), made.inode, 1);
                }
            }
            Step::Attribute { file, length } => {
                if let Some((inode, _)) = self.file(share, file) {
                    let _ = fs.setxattr(&root(), inode, c"user.a", &vec![1; length], 0);
                }
            }
            Step::Close { file } => self.close(share, file),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_count_is_that_of_du_whatever_the_guest_does(steps in prop::collection::vec(step(), 1..80)) {
        let (share, mut guest) = (limited(3 * MIB, 8), Guest::default());
        for step in &steps {
            guest.take(&share, step);
            let (used, real) = (usage(&share), du_of(&share));
            // The host's file system may take blocks for extents after it was looked at, and shows data twice for a
            // moment while it writes it out.
            prop_assert!(used.bytes <= 3 * MIB + 512 * KIB, "{:?}: {:?}", step, used);
            prop_assert!(used.inodes <= 8, "{:?}: {:?}", step, used);
            prop_assert!(used.bytes + 512 * KIB >= real.bytes, "{:?}: {:?} {:?}", step, used, real);
            prop_assert!(used.inodes >= real.inodes, "{:?}: {:?} {:?}", step, used, real);
        }
        share.fs.syncfs(ROOT).unwrap();
        for number in 0..5 {
            guest.close(&share, number);
        }
        let (used, real) = (usage(&share), du_of(&share));
        prop_assert_eq!(used.inodes, real.inodes);
        prop_assert!(real.bytes <= 3 * MIB + 64 * KIB, "{:?}", real);
        prop_assert!(used.bytes.abs_diff(real.bytes) <= 32 * KIB, "{:?} {:?}", used, real);
    }
}

/// A file system of another kind, in a file, mounted for the test's thread and its children.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// `None`, and a word about it, where the host cannot make or mount one.
    fn mount(test: &str, kind: &str) -> Option<Self> {
        if !own_mounts(test) {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let (image, top) = (dir.path().join("image"), dir.path().join("top"));
        File::create(&image).unwrap().set_len(512 * MIB).unwrap();
        std::fs::create_dir(&top).unwrap();
        for command in [
            format!("PATH=$PATH:/usr/sbin:/sbin mkfs.{kind} -q {}", image.display()),
            format!("mount -t {kind} -o loop {} {}", image.display(), top.display()),
        ] {
            if !run(&command) {
                println!("SKIPPED {test}: this host cannot {command}");
                return None;
            }
        }
        Some(Disk { dir })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(&format!("umount {}", self.dir.path().join("top").display()));
    }
}

/// Runs the tests above on a file system of another kind.
fn all_on(test: &str, kind: &str) {
    let Some(disk) = Disk::mount(test, kind) else {
        return;
    };
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--skip", "quotas_are_kept_on", "--test-threads", "1"])
        .env("TMPDIR", disk.dir.path().join("top"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!said.contains(" 0 passed"), "{said}");
}

#[test]
fn quotas_are_kept_on_xfs() {
    all_on("quotas_are_kept_on_xfs", "xfs");
}

#[test]
fn quotas_are_kept_on_btrfs() {
    all_on("quotas_are_kept_on_btrfs", "btrfs");
}

#[test]
fn quotas_are_kept_on_ext4() {
    all_on("quotas_are_kept_on_ext4", "ext4");
}

#[test]
fn quotas_are_kept_on_a_host_that_runs_ahead() {
    let Some(disk) = Disk::mount("quotas_are_kept_on_a_host_that_runs_ahead", "xfs") else {
        return;
    };
    let top = disk.dir.path().join("top/share");
    std::fs::create_dir(&top).unwrap();
    let mut options = Options::new(&top);
    options.quota.bytes = Some(64 * MIB);
    let fs = PassthroughFs::new(options).unwrap();
    settle(&fs, FsOptions::all());
    let share = Share {
        dir: tempfile::tempdir().unwrap(),
        fs,
    };
    // Three files that stay open, each filled in pieces: while there is plenty, XFS may run ahead of them, and what it
    // has given one is not there for others.
    let mut data = 0;
    for name in [c"one", c"two", c"three"] {
        let (inode, handle) = share.create(ROOT, name);
        for piece in 0..40 {
            match share.write(inode, handle, &vec![1; 512 * 1024], piece * 512 * KIB) {
                Ok(written) => data += written as u64,
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOSPC)),
            }
            let used = usage(&share).bytes;
            assert!(used <= 64 * MIB && used == du(&top).bytes, "{used}");
        }
    }
    assert!(data > 56 * MIB, "seven eighths can be used: {data}");
}
