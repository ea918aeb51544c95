//! Mounts of the host below the share: they appear, keep their restrictions, and are let go of.
//!
//! Each test has a mount namespace of its own; what it mounts is seen by its thread alone.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::ffi::CString;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use fuse_backend_rs::abi::fuse_abi::{ATTR_SUBMOUNT, FsOptions};
use fuse_backend_rs::api::filesystem::FileSystem;
use rafsd_passthrough::{FdBudget, MountWatcher, PassthroughFs};

fn mount_tmpfs(share: &Share, name: &str) {
    assert!(run(&format!(
        "mount -t tmpfs none '{}'",
        share.path(name).display()
    )));
}

/// Descriptors of this process on the device `device`.
fn descriptors_on(device: u64) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::metadata(entry.unwrap().path()).ok())
        .filter(|meta| meta.dev() == device)
        .count()
}

#[test]
fn a_mount_made_later_appears_and_is_announced() {
    if !own_mounts("a_mount_made_later_appears_and_is_announced") {
        return;
    }
    let share = Share::new();
    std::fs::create_dir(share.path("dir")).unwrap();
    std::fs::write(share.path("dir/below"), b"").unwrap();
    let covered = share.lookup(ROOT, c"dir").unwrap();
    assert_eq!(covered.attr_flags, 0);
    mount_tmpfs(&share, "dir");
    std::fs::write(share.path("dir/above"), b"").unwrap();
    let mounted = share.lookup(ROOT, c"dir").unwrap();
    assert_ne!(mounted.inode, covered.inode);
    assert_eq!(mounted.attr_flags, ATTR_SUBMOUNT);
    assert_eq!(share.names(mounted.inode), [".", "..", "above"]);
    // Within the mount nothing is announced.
    std::fs::create_dir(share.path("dir/sub")).unwrap();
    assert_eq!(share.lookup(mounted.inode, c"sub").unwrap().attr_flags, 0);
    // A guest that does not know submounts is not told.
    share.fs.init(FsOptions::all() - FsOptions::SUBMOUNTS).unwrap();
    assert_eq!(share.lookup(ROOT, c"dir").unwrap().attr_flags, 0);
    // Names cannot be moved between file systems.
    assert_eq!(
        code(share.fs.rename(&root(), mounted.inode, c"above", ROOT, c"x", 0)),
        libc::EXDEV
    );
    assert!(run(&format!("umount -l '{}'", share.path("dir").display())));
    assert_eq!(share.lookup(ROOT, c"dir").unwrap().inode, covered.inode);
}

#[test]
fn numbers_are_unique_over_devices_and_the_same_everywhere() {
    if !own_mounts("numbers_are_unique_over_devices_and_the_same_everywhere") {
        return;
    }
    let share = Share::new();
    for name in ["a", "b", "c"] {
        std::fs::create_dir(share.path(name)).unwrap();
        mount_tmpfs(&share, name);
        std::fs::write(share.path(name).join("file"), b"").unwrap();
    }
    let mut seen = std::collections::HashSet::new();
    for name in [c"a", c"b", c"c"] {
        let dir = share.lookup(ROOT, name).unwrap();
        let file = share.lookup(dir.inode, c"file").unwrap();
        // Each tmpfs gives its files the same numbers.
        assert!(
            seen.insert(dir.attr.st_ino) && seen.insert(file.attr.st_ino),
            "{name:?}"
        );
        assert_eq!(share.stat(file.inode).unwrap().st_ino, file.attr.st_ino);
        assert_eq!(
            share.fs.statx(&root(), file.inode, None).unwrap().0.ino,
            file.attr.st_ino
        );
        let handle = share.fs.opendir(&root(), dir.inode, 0).unwrap().0.unwrap();
        share
            .fs
            .readdir(&root(), dir.inode, handle, 4096, 0, &mut |entry| {
                match entry.name {
                    b"file" => assert_eq!(entry.ino, file.attr.st_ino),
                    b"." => assert_eq!(entry.ino, dir.attr.st_ino),
                    _ => {}
                }
                Ok(1)
            })
            .unwrap();
    }
    // READDIRPLUS of the directory above tells the numbers of what is mounted.
    let handle = share.fs.opendir(&root(), ROOT, 0).unwrap().0.unwrap();
    share
        .fs
        .readdirplus(&root(), ROOT, handle, 4096, 0, &mut |dirent, entry| {
            if dirent.name != b"." && dirent.name != b".." {
                assert_eq!(dirent.ino, entry.attr.st_ino);
                assert_eq!(entry.attr_flags, ATTR_SUBMOUNT);
            }
            Ok(1)
        })
        .unwrap();
}

#[test]
fn a_read_only_mount_stays_read_only_by_handle() {
    if !own_mounts("a_read_only_mount_stays_read_only_by_handle") {
        return;
    }
    let share = Share::with(|options| options.budget = Some(FdBudget::new(16)));
    std::fs::create_dir(share.path("rw")).unwrap();
    std::fs::create_dir(share.path("ro")).unwrap();
    for i in 0..100 {
        std::fs::write(share.path(&format!("rw/f{i}")), b"data").unwrap();
    }
    let (rw, ro) = (share.path("rw"), share.path("ro"));
    assert!(run(&format!(
        "mount --bind '{0}' '{1}' && mount -o remount,bind,ro '{1}'",
        rw.display(),
        ro.display()
    )));
    let rw = share.lookup(ROOT, c"rw").unwrap();
    let ro = share.lookup(ROOT, c"ro").unwrap();
    assert_eq!((rw.attr.st_ino, ro.attr_flags), (ro.attr.st_ino, ATTR_SUBMOUNT));
    let names: Vec<CString> = (0..100).map(|i| CString::new(format!("f{i}")).unwrap()).collect();
    let files: Vec<(u64, u64)> = names
        .iter()
        .map(|name| {
            (
                share.lookup(rw.inode, name).unwrap().inode,
                share.lookup(ro.inode, name).unwrap().inode,
            )
        })
        .collect();
    // By now most of them have lost their descriptors.
    for (writable, protected) in files {
        assert_ne!(writable, protected, "one file through two mounts is two nodes");
        assert_eq!(code(share.open(protected, libc::O_RDWR)), libc::EROFS);
        assert_eq!(
            code(share.fs.setxattr(&root(), protected, c"user.x", b"", 0)),
            libc::EROFS
        );
        let handle = share.open(protected, libc::O_RDONLY).unwrap();
        assert_eq!(share.read(protected, handle, 9, 0).unwrap(), b"data");
        share.release(protected, handle);
        let handle = share.open(writable, libc::O_RDWR).unwrap();
        share.release(writable, handle);
    }
    assert_eq!(
        code(share.fs.mkdir(&root(), ro.inode, c"new", 0o755, 0)),
        libc::EROFS
    );
}

#[test]
fn what_the_guest_has_forgotten_can_be_unmounted() {
    if !own_mounts("what_the_guest_has_forgotten_can_be_unmounted") {
        return;
    }
    let share = Share::new();
    std::fs::create_dir(share.path("dir")).unwrap();
    mount_tmpfs(&share, "dir");
    let unmount = format!("umount '{}'", share.path("dir").display());
    let dir = share.lookup(ROOT, c"dir").unwrap().inode;
    let (file, handle) = share.create(dir, c"file");
    share.release(file, handle);
    share.fs.forget(&root(), file, 1);
    assert!(!run(&format!("{unmount} 2>/dev/null")), "the directory is in use");
    share.fs.forget(&root(), dir, 1);
    assert!(run(&unmount));
}

#[test]
fn what_the_host_unmounts_is_let_go_of() {
    if !own_mounts("what_the_host_unmounts_is_let_go_of") {
        return;
    }
    let share = Share::new();
    for name in ["gone", "stays"] {
        std::fs::create_dir(share.path(name)).unwrap();
        mount_tmpfs(&share, name);
        std::fs::write(share.path(name).join("file"), b"data").unwrap();
    }
    let device = std::fs::metadata(share.path("gone")).unwrap().dev();
    let gone = share.lookup(ROOT, c"gone").unwrap().inode;
    let gone_file = share.lookup(gone, c"file").unwrap().inode;
    let stays = share.lookup(ROOT, c"stays").unwrap().inode;
    let stays_file = share.lookup(stays, c"file").unwrap().inode;
    let handle = share.open(gone_file, libc::O_RDONLY).unwrap();
    assert_eq!(share.fs.release_unmounted().unwrap(), 0);
    assert!(run(&format!("umount -l '{}'", share.path("gone").display())));
    assert_eq!(
        share.stat(gone_file).unwrap().st_size,
        4,
        "what is known stays usable until then"
    );
    assert_eq!(share.fs.release_unmounted().unwrap(), 1);
    assert_eq!(share.fs.release_unmounted().unwrap(), 0);
    assert_eq!(code(share.stat(gone_file)), libc::ESTALE);
    assert_eq!(code(share.lookup(gone, c"file")), libc::ESTALE);
    assert_eq!(
        share.read(gone_file, handle, 9, 0).unwrap(),
        b"data",
        "open files stay open"
    );
    assert_eq!(descriptors_on(device), 1);
    share.release(gone_file, handle);
    assert_eq!(descriptors_on(device), 0);
    assert_eq!(share.stat(stays_file).unwrap().st_size, 4);
    // The directory below is there again, and so is whatever is mounted next.
    assert_eq!(
        share.names(share.lookup(ROOT, c"gone").unwrap().inode),
        [".", ".."]
    );
    mount_tmpfs(&share, "gone");
    let again = share.lookup(ROOT, c"gone").unwrap();
    assert_eq!(again.attr_flags, ATTR_SUBMOUNT);
    share.create(again.inode, c"new");
}

#[test]
fn the_watcher_notices_by_itself() {
    if !own_mounts("the_watcher_notices_by_itself") {
        return;
    }
    let share = Share::new();
    let fs = Arc::new(PassthroughFs::new(share.fs.options().clone()).unwrap());
    let watcher = MountWatcher::start(rafsd_passthrough::ThreadStart::default()).unwrap();
    watcher.watch(&fs);
    std::fs::create_dir(share.path("dir")).unwrap();
    mount_tmpfs(&share, "dir");
    let device = std::fs::metadata(share.path("dir")).unwrap().dev();
    fs.lookup(&root(), ROOT, c"dir").unwrap();
    assert!(descriptors_on(device) > 0);
    assert!(run(&format!("umount -l '{}'", share.path("dir").display())));
    let until = Instant::now() + Duration::from_secs(60);
    while descriptors_on(device) > 0 {
        assert!(Instant::now() < until, "the file system is still held");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(watcher);
}

#[test]
fn a_file_mounted_on_a_file_is_that_file() {
    if !own_mounts("a_file_mounted_on_a_file_is_that_file") {
        return;
    }
    let share = Share::new();
    std::fs::write(share.path("file"), b"below").unwrap();
    std::fs::write(share.outside("config"), b"mounted").unwrap();
    assert!(run(&format!(
        "mount --bind '{}' '{}'",
        share.outside("config").display(),
        share.path("file").display()
    )));
    let entry = share.lookup(ROOT, c"file").unwrap();
    assert_eq!((entry.attr.st_size, entry.attr_flags), (7, 0));
    let handle = share.open(entry.inode, libc::O_RDWR).unwrap();
    assert_eq!(share.read(entry.inode, handle, 99, 0).unwrap(), b"mounted");
    assert_eq!(code(share.fs.unlink(&root(), ROOT, c"file")), libc::EBUSY);
    assert_eq!(share.stat(entry.inode).unwrap().st_nlink, 1);
    // A device node, mounted the same way, is shown and never opened.
    std::fs::write(share.path("null"), b"").unwrap();
    assert!(run(&format!(
        "mount --bind /dev/null '{}'",
        share.path("null").display()
    )));
    let null = share.lookup(ROOT, c"null").unwrap();
    assert_eq!(null.attr.st_mode & libc::S_IFMT, libc::S_IFCHR);
    assert_eq!(code(share.open(null.inode, libc::O_RDWR)), libc::ENXIO);
}
