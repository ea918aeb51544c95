//! Reading directories: order, positions, counts.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::unix::fs::MetadataExt;

use common::*;
use fuse_backend_rs::api::filesystem::FileSystem;

/// One listed entry: name, inode number, type, and the position after it.
type Listed = (String, u64, u32, u64);

/// One READDIR whose reply has room for `room` entries.
fn readdir(share: &Share, inode: u64, handle: u64, offset: u64, room: usize) -> Vec<Listed> {
    let mut listed = Vec::new();
    share
        .fs
        .readdir(&root(), inode, handle, 4096, offset, &mut |entry| {
            if listed.len() == room {
                return Ok(0);
            }
            let name = String::from_utf8(entry.name.to_vec()).unwrap();
            listed.push((name, entry.ino, entry.type_, entry.offset));
            Ok(1)
        })
        .unwrap();
    listed
}

fn opendir(share: &Share, inode: u64) -> u64 {
    share.fs.opendir(&root(), inode, 0).unwrap().0.unwrap()
}

#[test]
fn a_directory_of_20_000_entries_lists_each_once_and_seeks() {
    let share = Share::new();
    let names: HashSet<String> = (0..20_000).map(|i| format!("entry-{i}")).collect();
    for name in &names {
        std::fs::File::create(share.path(name)).unwrap();
    }
    let handle = opendir(&share, ROOT);
    let (mut all, mut offset) = (Vec::new(), 0);
    // A room of 37 ends replies in the middle of what the host returns at once.
    loop {
        let part = readdir(&share, ROOT, handle, offset, 37);
        let Some(last) = part.last() else { break };
        offset = last.3;
        all.extend(part);
    }
    let seen: HashSet<&str> = all.iter().map(|entry| entry.0.as_str()).collect();
    assert_eq!((all.len(), seen.len()), (20_002, 20_002));
    assert!(names.iter().all(|name| seen.contains(name.as_str())));

    // Any position that was ever given out continues with the entry after it, on this handle and on a new one.
    let other = opendir(&share, ROOT);
    for at in [19_999, 3, 12_345, 0, 777, 20_000] {
        for handle in [handle, other] {
            assert_eq!(
                readdir(&share, ROOT, handle, all[at].3, 1)[0],
                all[at + 1],
                "after entry {at}"
            );
        }
    }
    assert!(readdir(&share, ROOT, handle, all.last().unwrap().3, 9).is_empty());
}

#[test]
fn positions_survive_removals_and_rewinding_shows_additions() {
    let share = Share::new();
    for i in 0..500 {
        std::fs::File::create(share.path(&format!("f{i}"))).unwrap();
    }
    let handle = opendir(&share, ROOT);
    let mut seen = HashSet::new();
    let mut offset = 0;
    loop {
        let part = readdir(&share, ROOT, handle, offset, 10);
        let Some(last) = part.last() else { break };
        offset = last.3;
        for (name, ..) in &part {
            assert!(seen.insert(name.clone()), "{name} came twice");
            if !name.starts_with('.') {
                std::fs::remove_file(share.path(name)).unwrap();
            }
        }
    }
    assert_eq!(seen.len(), 502);
    std::fs::File::create(share.path("late")).unwrap();
    let names: HashSet<String> = readdir(&share, ROOT, handle, 0, 99)
        .into_iter()
        .map(|entry| entry.0)
        .collect();
    assert_eq!(names, HashSet::from([".".into(), "..".into(), "late".into()]));
}

#[test]
fn types_and_numbers_are_those_of_getattr() {
    let share = Share::new();
    let dir = share.mkdir(ROOT, c"dir");
    share.mkdir(dir, c"sub");
    share.create(dir, c"file");
    share.fs.symlink(&root(), c"x", dir, c"link").unwrap();
    share
        .fs
        .mknod(&root(), dir, c"fifo", libc::S_IFIFO | 0o600, 0, 0)
        .unwrap();
    let handle = opendir(&share, dir);
    let listed: HashMap<String, (u64, u32)> = readdir(&share, dir, handle, 0, 99)
        .into_iter()
        .map(|(name, ino, kind, _)| (name, (ino, kind)))
        .collect();
    for (name, kind) in [
        ("sub", libc::DT_DIR),
        ("file", libc::DT_REG),
        ("link", libc::DT_LNK),
        ("fifo", libc::DT_FIFO),
    ] {
        let entry = share.lookup(dir, &CString::new(name).unwrap()).unwrap();
        assert_eq!(listed[name], (entry.attr.st_ino, u32::from(kind)), "{name}");
        assert_eq!(
            entry.attr.st_ino,
            std::fs::symlink_metadata(share.path("dir").join(name))
                .unwrap()
                .ino()
        );
    }
    assert_eq!(listed["."].0, share.stat(dir).unwrap().st_ino);
    assert_eq!(listed[".."].0, share.stat(ROOT).unwrap().st_ino);
}

#[test]
fn the_parent_of_the_root_is_the_root() {
    let share = Share::new();
    let number = share.stat(ROOT).unwrap().st_ino;
    let handle = opendir(&share, ROOT);
    let listed = readdir(&share, ROOT, handle, 0, 99);
    for name in [".", ".."] {
        assert!(
            listed.iter().any(|entry| entry.0 == name && entry.1 == number),
            "{name}: {listed:?}"
        );
    }
    for name in [c".", c".."] {
        assert_eq!(share.lookup(ROOT, name).unwrap().inode, ROOT);
    }
    let dir = share.mkdir(ROOT, c"dir");
    assert_eq!(share.lookup(dir, c".").unwrap().inode, dir);
    assert_eq!(code(share.lookup(dir, c"..")), libc::EINVAL);
}

#[test]
fn readdirplus_counts_what_fits_and_nothing_else() {
    let share = Share::new();
    for i in 0..10 {
        std::fs::File::create(share.path(&format!("f{i}"))).unwrap();
    }
    let handle = opendir(&share, ROOT);
    let before = share.fs.inode_count();
    let mut taken = Vec::new();
    let mut offset = 0;
    share
        .fs
        .readdirplus(&root(), ROOT, handle, 4096, 0, &mut |dirent, entry| {
            if taken.len() == 4 {
                return Ok(0);
            }
            if entry.inode == 0 {
                assert!(dirent.name == b"." || dirent.name == b"..");
            } else {
                assert_eq!(dirent.ino, entry.attr.st_ino);
                taken.push(entry.inode);
            }
            offset = dirent.offset;
            Ok(1)
        })
        .unwrap();
    assert_eq!(share.fs.inode_count(), before + 4);
    // The entry that did not fit comes next.
    let mut rest = 0;
    let full =
        |_: fuse_backend_rs::api::filesystem::DirEntry, _| Err(std::io::Error::from_raw_os_error(libc::EIO));
    assert_eq!(
        code(
            share
                .fs
                .readdirplus(&root(), ROOT, handle, 4096, offset, &mut { full })
        ),
        libc::EIO
    );
    assert_eq!(
        share.fs.inode_count(),
        before + 4,
        "an entry that could not be encoded is not counted"
    );
    share
        .fs
        .readdirplus(&root(), ROOT, handle, 4096, offset, &mut |_, entry| {
            if entry.inode != 0 {
                rest += 1;
                taken.push(entry.inode);
            }
            Ok(1)
        })
        .unwrap();
    assert_eq!(rest, 6);
    for inode in taken {
        share.fs.forget(&root(), inode, 1);
    }
    assert_eq!(share.fs.inode_count(), before);
}

#[test]
fn handles_of_files_and_directories_are_no_substitutes() {
    let share = Share::new();
    let (file, open) = share.create(ROOT, c"file");
    let handle = opendir(&share, ROOT);
    let dir = share.mkdir(ROOT, c"dir");
    assert_eq!(code(share.read(ROOT, handle, 1, 0)), libc::EBADF);
    let list = |inode, handle| share.fs.readdir(&root(), inode, handle, 4096, 0, &mut |_| Ok(1));
    assert_eq!(code(list(file, open)), libc::EBADF);
    assert_eq!(code(list(dir, handle)), libc::EBADF);
    assert_eq!(code(list(ROOT, 4711)), libc::EBADF);
    assert_eq!(
        code(
            share
                .fs
                .readdir(&root(), ROOT, handle, 9, u64::MAX, &mut |_| Ok(1))
        ),
        libc::EINVAL
    );
    assert_eq!(code(share.fs.opendir(&root(), file, 0)), libc::ENOTDIR);
    assert_eq!(code(share.fs.releasedir(&root(), dir, 0, handle)), libc::EBADF);
    share.fs.releasedir(&root(), ROOT, 0, handle).unwrap();
}
