//! The operations of a writable layer, each compared with what the host shows afterwards.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::ffi::CStr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::time::Duration;

use common::*;
use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions, SetattrValid};
use fuse_backend_rs::api::filesystem::{FileSystem, GetxattrReply, ListxattrReply};
use rafsd_passthrough::{CachePolicy, CreateExtras};

#[test]
fn a_written_file_reads_back_and_lies_on_the_host() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    let data: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
    assert_eq!(share.write(inode, handle, &data, 5).unwrap(), data.len());
    assert_eq!(share.read(inode, handle, 400_000, 5).unwrap(), data);
    assert_eq!(share.read(inode, handle, 10, 300_000).unwrap(), &data[299_995..]);
    assert_eq!(share.read(inode, handle, 10, 1 << 40).unwrap(), b"");
    share.fs.flush(&root(), inode, handle, 0).unwrap();
    share.fs.fsync(&root(), inode, false, handle).unwrap();
    share.fs.fsync(&root(), inode, true, handle).unwrap();
    share.release(inode, handle);
    assert_eq!(&std::fs::read(share.path("file")).unwrap()[5..], data);
    assert_eq!(code(share.read(inode, handle, 1, 0)), libc::EBADF);
}

#[test]
fn offsets_that_no_file_has_are_refused() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    assert_eq!(code(share.read(inode, handle, 1, u64::MAX)), libc::EINVAL);
    assert_eq!(code(share.write(inode, handle, b"x", 1 << 63)), libc::EINVAL);
    assert_eq!(
        code(
            share
                .fs
                .lseek(&root(), inode, handle, u64::MAX, libc::SEEK_DATA as u32)
        ),
        libc::ENXIO
    );
    assert_eq!(
        code(share.fs.lseek(&root(), inode, handle, 0, libc::SEEK_CUR as u32)),
        libc::EINVAL
    );
    assert_eq!(code(share.fs.lseek(&root(), inode, handle, 0, 99)), libc::EINVAL);
}

#[test]
fn appending_is_decided_write_by_write() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"log");
    share.write(inode, handle, b"one", 0).unwrap();
    // The guest's idea of the end is stale, the host's is not.
    share
        .write_flags(inode, handle, b"two", 0, libc::O_APPEND, 0)
        .unwrap();
    share.write(inode, handle, b"O", 0).unwrap();
    let appending = share.open(inode, libc::O_WRONLY | libc::O_APPEND).unwrap();
    share
        .write_flags(inode, appending, b"three", 1, libc::O_APPEND, 0)
        .unwrap();
    share.write_flags(inode, appending, b"N", 1, 0, 0).unwrap();
    assert_eq!(std::fs::read(share.path("log")).unwrap(), b"ONetwothree");
}

#[test]
fn opening_keeps_to_its_access_mode_and_truncates_when_asked() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    share.write(inode, handle, b"content", 0).unwrap();
    let reading = share.open(inode, libc::O_RDONLY).unwrap();
    assert_eq!(code(share.write(inode, reading, b"x", 0)), libc::EBADF);
    let writing = share.open(inode, libc::O_WRONLY).unwrap();
    assert_eq!(code(share.read(inode, writing, 1, 0)), libc::EBADF);
    share.open(inode, libc::O_RDWR | libc::O_TRUNC).unwrap();
    assert_eq!(share.stat(inode).unwrap().st_size, 0);
}

#[test]
fn create_opens_what_exists_unless_it_is_exclusive() {
    let share = Share::new();
    std::fs::write(share.path("file"), b"old").unwrap();
    let args = |flags: i32| CreateIn {
        flags: flags as u32,
        mode: 0o600,
        umask: 0,
        fuse_flags: 0,
    };
    let (entry, handle, ..) = share
        .fs
        .create(&root(), ROOT, c"file", args(libc::O_RDWR))
        .unwrap();
    assert_eq!(share.read(entry.inode, handle.unwrap(), 9, 0).unwrap(), b"old");
    let exclusive = share
        .fs
        .create(&root(), ROOT, c"file", args(libc::O_RDWR | libc::O_EXCL));
    assert_eq!(code(exclusive), libc::EEXIST);
    share
        .fs
        .create(&root(), ROOT, c"file", args(libc::O_RDWR | libc::O_TRUNC))
        .unwrap();
    assert_eq!(std::fs::metadata(share.path("file")).unwrap().len(), 0);
    // A name that leads away is neither followed nor opened.
    std::os::unix::fs::symlink(share.outside("secret"), share.path("away")).unwrap();
    assert_eq!(
        code(share.fs.create(&root(), ROOT, c"away", args(libc::O_RDWR))),
        libc::ELOOP
    );
    assert!(!exists(&share.outside("secret")));
}

#[test]
fn every_kind_of_node_can_be_made() {
    if !privileged("every_kind_of_node_can_be_made") {
        return;
    }
    let share = Share::new();
    let make =
        |name: &CStr, mode: u32, rdev: u32| share.fs.mknod(&root(), ROOT, name, mode | 0o640, rdev, 0o022);
    let host = |name: &str| std::fs::symlink_metadata(share.path(name)).unwrap();
    make(c"plain", libc::S_IFREG, 0).unwrap();
    make(c"untyped", 0, 0).unwrap();
    make(c"fifo", libc::S_IFIFO, 0).unwrap();
    make(c"socket", libc::S_IFSOCK, 0).unwrap();
    let whiteout = make(c"whiteout", libc::S_IFCHR, 0).unwrap();
    // Large numbers use the upper bits of the kernel's 32-bit encoding.
    let rdev = libc::makedev(259, 0x12345);
    let device = make(c"device", libc::S_IFBLK, rdev as u32).unwrap();
    assert!(host("plain").is_file() && host("untyped").is_file());
    assert!(host("fifo").file_type().is_fifo() && host("socket").file_type().is_socket());
    assert!(host("whiteout").file_type().is_char_device());
    assert_eq!((host("whiteout").rdev(), whiteout.attr.st_rdev), (0, 0));
    assert_eq!((host("device").rdev(), device.attr.st_rdev), (rdev, rdev));
    assert_eq!(host("plain").permissions().mode() & 0o7777, 0o640);
    assert_eq!(code(make(c"directory", libc::S_IFDIR, 0)), libc::EINVAL);
    assert_eq!(code(make(c"plain", libc::S_IFREG, 0)), libc::EEXIST);
}

#[test]
fn links_and_removal() {
    let share = Share::new();
    let (inode, _) = share.create(ROOT, c"file");
    let dir = share.mkdir(ROOT, c"dir");
    let linked = share.fs.link(&root(), inode, dir, c"again").unwrap();
    assert_eq!((linked.inode, linked.attr.st_nlink), (inode, 2));
    let link = share.fs.symlink(&root(), c"../nowhere", ROOT, c"link").unwrap();
    assert_eq!(share.fs.readlink(&root(), link.inode).unwrap(), b"../nowhere");
    assert_eq!(code(share.fs.readlink(&root(), inode)), libc::EINVAL);
    // A hard link to the symbolic link itself, which leads nowhere.
    let copy = share.fs.link(&root(), link.inode, ROOT, c"link2").unwrap();
    assert_eq!(copy.inode, link.inode);
    assert_eq!(
        std::fs::read_link(share.path("link2")).unwrap().to_str(),
        Some("../nowhere")
    );

    assert_eq!(code(share.fs.unlink(&root(), ROOT, c"dir")), libc::EISDIR);
    assert_eq!(code(share.fs.rmdir(&root(), ROOT, c"file")), libc::ENOTDIR);
    assert_eq!(code(share.fs.rmdir(&root(), ROOT, c"dir")), libc::ENOTEMPTY);
    share.fs.unlink(&root(), dir, c"again").unwrap();
    share.fs.rmdir(&root(), ROOT, c"dir").unwrap();
    assert_eq!(code(share.lookup(ROOT, c"dir")), libc::ENOENT);
    assert_eq!(share.names(ROOT), [".", "..", "file", "link", "link2"]);
}

#[test]
fn an_unlinked_file_lives_while_it_is_known() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    share.write(inode, handle, b"still here", 0).unwrap();
    share.release(inode, handle);
    share.fs.unlink(&root(), ROOT, c"file").unwrap();
    assert_eq!(share.stat(inode).unwrap().st_nlink, 0);
    let handle = share.open(inode, libc::O_RDONLY).unwrap();
    assert_eq!(share.read(inode, handle, 99, 0).unwrap(), b"still here");
    let dir = share.mkdir(ROOT, c"dir");
    share.fs.rmdir(&root(), ROOT, c"dir").unwrap();
    assert_eq!(share.stat(dir).unwrap().st_nlink, 0);
    assert_eq!(
        code(share.fs.mkdir(&root(), dir, c"child", 0o755, 0)),
        libc::ENOENT
    );
}

#[test]
fn rename_with_each_flag() {
    let share = Share::new();
    for name in ["a", "b", "c"] {
        std::fs::write(share.path(name), name).unwrap();
    }
    let rename = |from: &CStr, to: &CStr, flags: u32| share.fs.rename(&root(), ROOT, from, ROOT, to, flags);
    let content = |name: &str| std::fs::read_to_string(share.path(name)).unwrap();
    assert_eq!(code(rename(c"a", c"b", libc::RENAME_NOREPLACE)), libc::EEXIST);
    rename(c"a", c"b", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((content("a"), content("b")), ("b".into(), "a".into()));
    rename(c"a", c"b", 0).unwrap();
    assert_eq!(content("b"), "b");
    rename(c"b", c"d", libc::RENAME_NOREPLACE).unwrap();
    assert_eq!(code(rename(c"c", c"d", 0x80)), libc::EINVAL);
    assert_eq!(
        code(rename(c"c", c"d", libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE)),
        libc::EINVAL
    );
    if privileged("rename_with_each_flag (whiteout)") {
        rename(c"c", c"e", libc::RENAME_WHITEOUT).unwrap();
        let left = std::fs::symlink_metadata(share.path("c")).unwrap();
        assert!(left.file_type().is_char_device() && left.rdev() == 0);
        assert_eq!(content("e"), "c");
    }
}

#[test]
fn attributes_change_as_asked_and_no_others() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    share.write(inode, handle, b"0123456789", 0).unwrap();
    let mut attr = share.stat(inode).unwrap();
    let set = |attr, handle, valid| {
        share
            .fs
            .setattr(&root(), inode, attr, handle, valid)
            .map(|(stat, _)| stat)
    };

    attr.st_mode = libc::S_IFREG | 0o4751;
    attr.st_size = 4;
    assert_eq!(
        set(attr, None, SetattrValid::MODE).unwrap().st_mode,
        libc::S_IFREG | 0o4751
    );
    assert_eq!(share.stat(inode).unwrap().st_size, 10);
    assert_eq!(set(attr, None, SetattrValid::SIZE).unwrap().st_size, 4);
    attr.st_size = 7;
    assert_eq!(set(attr, Some(handle), SetattrValid::SIZE).unwrap().st_size, 7);
    attr.st_size = -1;
    assert_eq!(code(set(attr, None, SetattrValid::SIZE)), libc::EINVAL);

    (attr.st_atime, attr.st_atime_nsec) = (0, 1);
    (attr.st_mtime, attr.st_mtime_nsec) = (-5, 999_999_999);
    let stat = set(attr, None, SetattrValid::MTIME).unwrap();
    assert_eq!((stat.st_mtime, stat.st_mtime_nsec), (-5, 999_999_999));
    assert_ne!(stat.st_atime, 0);
    let stat = set(attr, None, SetattrValid::ATIME).unwrap();
    assert_eq!((stat.st_atime, stat.st_atime_nsec, stat.st_mtime), (0, 1, -5));
    let now = set(attr, None, SetattrValid::MTIME | SetattrValid::MTIME_NOW).unwrap();
    assert!(now.st_mtime > 1_600_000_000 && now.st_atime == 0);
    // The numbers that tell the host "now" and "leave alone" are no times.
    for special in [libc::UTIME_NOW, libc::UTIME_OMIT, -1, 1_000_000_000] {
        attr.st_mtime_nsec = special;
        assert_eq!(code(set(attr, None, SetattrValid::MTIME)), libc::EINVAL);
    }
    attr.st_uid = u32::MAX;
    assert_eq!(code(set(attr, None, SetattrValid::UID)), libc::EINVAL);
    if privileged("attributes_change_as_asked_and_no_others (owner)") {
        (attr.st_uid, attr.st_gid) = (1234, 4321);
        let stat = set(attr, None, SetattrValid::GID).unwrap();
        assert_eq!((stat.st_uid, stat.st_gid), (0, 4321));
        // As on the host, whoever owns it anew does not inherit the right to run as the owner.
        assert_eq!(stat.st_mode & 0o7000, 0);
        assert_eq!(set(attr, None, SetattrValid::UID).unwrap().st_uid, 1234);
    }
    let link = share.fs.symlink(&root(), c"file", ROOT, c"link").unwrap();
    attr.st_mtime = 77;
    attr.st_mtime_nsec = 0;
    assert_eq!(
        code(
            share
                .fs
                .setattr(&root(), link.inode, attr, None, SetattrValid::MODE)
        ),
        libc::EOPNOTSUPP
    );
    let (stat, _) = share
        .fs
        .setattr(&root(), link.inode, attr, None, SetattrValid::MTIME)
        .unwrap();
    assert_eq!((stat.st_mtime, stat.st_mode & libc::S_IFMT), (77, libc::S_IFLNK));
    assert_ne!(share.stat(inode).unwrap().st_mtime, 77);
}

#[test]
fn space_is_allocated_punched_and_found() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    let allocate = |mode: i32, offset, length| {
        share
            .fs
            .fallocate(&root(), inode, handle, mode as u32, offset, length)
    };
    allocate(0, 0, 1 << 20).unwrap();
    assert_eq!(share.stat(inode).unwrap().st_size, 1 << 20);
    allocate(libc::FALLOC_FL_KEEP_SIZE, 1 << 20, 1 << 20).unwrap();
    assert_eq!(share.stat(inode).unwrap().st_size, 1 << 20);
    share.write(inode, handle, &vec![7; 1 << 20], 0).unwrap();
    allocate(
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        65_536,
        65_536,
    )
    .unwrap();
    allocate(libc::FALLOC_FL_ZERO_RANGE, 0, 10).unwrap();
    assert_eq!(
        share.read(inode, handle, 11, 0).unwrap(),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]
    );
    assert_eq!(share.read(inode, handle, 2, 131_071).unwrap(), [0, 7]);
    let seek = |offset, whence: i32| share.fs.lseek(&root(), inode, handle, offset, whence as u32);
    assert_eq!(seek(0, libc::SEEK_HOLE).unwrap(), 65_536);
    assert_eq!(seek(70_000, libc::SEEK_DATA).unwrap(), 131_072);
    assert_eq!(code(seek(1 << 30, libc::SEEK_DATA)), libc::ENXIO);
    assert_eq!(code(allocate(0x4000, 0, 1)), libc::EOPNOTSUPP);
}

#[test]
fn ranges_are_copied_on_the_host() {
    let share = Share::new();
    let (from, from_handle) = share.create(ROOT, c"from");
    let (to, to_handle) = share.create(ROOT, c"to");
    share.write(from, from_handle, b"0123456789", 0).unwrap();
    let copy = |length, flags| {
        share
            .fs
            .copy_file_range(&root(), (from, from_handle, 2), (to, to_handle, 3), length, flags)
    };
    assert_eq!(copy(u64::MAX, 0).unwrap(), 8);
    assert_eq!(share.read(to, to_handle, 99, 0).unwrap(), b"\0\0\x0023456789");
    assert_eq!(code(copy(1, 1)), libc::EINVAL);
    let crossed = share
        .fs
        .copy_file_range(&root(), (to, from_handle, 0), (to, to_handle, 0), 1, 0);
    assert_eq!(code(crossed), libc::EBADF);
}

#[test]
fn files_without_a_name_can_be_given_one() {
    let share = Share::new();
    let dir = share.mkdir(ROOT, c"dir");
    let make = |flags: i32| {
        let flags = (libc::O_RDWR | flags) as u32;
        share
            .fs
            .tmpfile(&root(), dir, flags, 0o666, 0o022, &CreateExtras::default())
    };
    let (entry, handle, _) = make(0).unwrap();
    assert_eq!((entry.attr.st_nlink, entry.attr.st_mode & 0o777), (0, 0o644));
    share.write(entry.inode, handle, b"data", 0).unwrap();
    assert_eq!(share.names(dir), [".", ".."]);
    let linked = share.fs.link(&root(), entry.inode, dir, c"named").unwrap();
    assert_eq!((linked.inode, linked.attr.st_nlink), (entry.inode, 1));
    assert_eq!(std::fs::read(share.path("dir/named")).unwrap(), b"data");
    let (unlinkable, ..) = make(libc::O_EXCL).unwrap();
    assert_eq!(
        code(share.fs.link(&root(), unlinkable.inode, dir, c"never")),
        libc::ENOENT
    );
}

#[test]
fn birth_time_and_attributes_are_told() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    let (statx, timeout) = share.fs.statx(&root(), inode, None).unwrap();
    assert_eq!(timeout, Duration::from_secs(1));
    assert_ne!(statx.mask & libc::STATX_BTIME, 0);
    assert_eq!(statx.mask & libc::STATX_MNT_ID, 0);
    assert_eq!(statx.ino, share.stat(inode).unwrap().st_ino);
    assert_eq!(
        statx.btime.seconds,
        std::fs::metadata(share.path("file")).unwrap().ctime()
    );
    assert_eq!(share.fs.statx(&root(), inode, Some(handle)).unwrap().0, statx);
    let (root_statx, _) = share.fs.statx(&root(), ROOT, None).unwrap();
    assert_eq!(
        root_statx.attributes & 0x2000,
        0,
        "STATX_ATTR_MOUNT_ROOT is the host's business"
    );
}

#[test]
fn file_systems_are_described_and_flushed() {
    let share = Share::new();
    let dir = share.mkdir(ROOT, c"dir");
    let stat = share.fs.statfs(&root(), ROOT).unwrap();
    assert!(stat.f_blocks > 0 && stat.f_namemax == 255 && stat.f_bsize > 0);
    share.fs.syncfs(ROOT).unwrap();
    share.fs.syncfs(dir).unwrap();
    assert_eq!(code(share.fs.syncfs(999)), libc::ESTALE);
    let handle = share.fs.opendir(&root(), dir, 0).unwrap().0.unwrap();
    share.fs.fsyncdir(&root(), dir, false, handle).unwrap();
}

#[test]
fn inode_flags_travel_by_ioctl() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    let ioctl =
        |command, input: &[u8], out| share.fs.ioctl_inline(&root(), inode, handle, command, input, out);
    const GET: u32 = 0x8008_6601;
    const SET: u32 = 0x4008_6602;
    const NODUMP: u32 = 0x40;
    let flags = u32::from_ne_bytes(ioctl(GET, &[], 8).unwrap().data().try_into().unwrap());
    ioctl(SET, &(flags | NODUMP).to_ne_bytes(), 0).unwrap();
    let changed = u32::from_ne_bytes(ioctl(GET, &[], 4).unwrap().data().try_into().unwrap());
    assert_eq!(changed, flags | NODUMP);
    assert_eq!(ioctl(0x801c_581f, &[], 28).unwrap().data().len(), 28);
    assert_eq!(code(ioctl(GET, &[], 3)), libc::EINVAL);
    // The project that the host counts the file for is the host's.
    assert_eq!(
        code(ioctl(SET, &(flags | 0x2000_0000).to_ne_bytes(), 0)),
        libc::EPERM
    );
    let extended = ioctl(0x801c_581f, &[], 28).unwrap().data().to_vec();
    ioctl(0x401c_5820, &extended, 0).unwrap();
    for (at, bit) in [(1, 2), (12, 1)] {
        let mut changed = extended.clone();
        changed[at] ^= bit;
        assert_eq!(code(ioctl(0x401c_5820, &changed, 0)), libc::EPERM);
    }
    assert_eq!(code(ioctl(SET, &[0, 0], 0)), libc::EINVAL);
    assert_eq!(code(ioctl(0x5401, &[0; 64], 64)), libc::ENOTTY);
}

#[test]
fn extended_attributes_of_an_overlay_work() {
    if !privileged("extended_attributes_of_an_overlay_work") {
        return;
    }
    let share = Share::new();
    let dir = share.mkdir(ROOT, c"dir");
    let link = share
        .fs
        .symlink(&root(), c"nowhere", ROOT, c"link")
        .unwrap()
        .inode;
    let fifo = share
        .fs
        .mknod(&root(), ROOT, c"fifo", libc::S_IFIFO | 0o600, 0, 0)
        .unwrap()
        .inode;
    for inode in [dir, link, fifo] {
        let set = |flags: i32| {
            share
                .fs
                .setxattr(&root(), inode, c"trusted.overlay.opaque", b"y", flags as u32)
        };
        assert_eq!(code(set(libc::XATTR_REPLACE)), libc::ENODATA);
        set(libc::XATTR_CREATE).unwrap();
        assert_eq!(code(set(libc::XATTR_CREATE)), libc::EEXIST);
        share
            .fs
            .setxattr(&root(), inode, c"security.test", b"label", 0)
            .unwrap();
        let get = |size| share.fs.getxattr(&root(), inode, c"trusted.overlay.opaque", size);
        assert!(matches!(get(0).unwrap(), GetxattrReply::Count(1)));
        assert!(matches!(get(64).unwrap(), GetxattrReply::Value(value) if value == b"y"));
        let get = |size| share.fs.getxattr(&root(), inode, c"security.test", size);
        assert_eq!(code(get(4)), libc::ERANGE);
        let list = |size| share.fs.listxattr(&root(), inode, size);
        let ListxattrReply::Names(names) = list(4096).unwrap() else {
            panic!("no names")
        };
        assert!(
            names
                .windows(23)
                .any(|window| window == b"trusted.overlay.opaque\0")
        );
        assert!(matches!(list(0).unwrap(), ListxattrReply::Count(count) if count as usize == names.len()));
        assert_eq!(code(list(3)), libc::ERANGE);
        share
            .fs
            .removexattr(&root(), inode, c"trusted.overlay.opaque")
            .unwrap();
        assert_eq!(
            code(share.fs.removexattr(&root(), inode, c"trusted.overlay.opaque")),
            libc::ENODATA
        );
    }
}

#[test]
fn extended_attributes_can_be_switched_off_without_enosys() {
    let share = Share::with(|options| options.xattr = false);
    assert_eq!(
        code(share.fs.getxattr(&root(), ROOT, c"user.a", 0)),
        libc::EOPNOTSUPP
    );
    assert_eq!(
        code(share.fs.setxattr(&root(), ROOT, c"user.a", b"", 0)),
        libc::EOPNOTSUPP
    );
    assert_eq!(code(share.fs.listxattr(&root(), ROOT, 0)), libc::EOPNOTSUPP);
    assert_eq!(
        code(share.fs.removexattr(&root(), ROOT, c"user.a")),
        libc::EOPNOTSUPP
    );
}

#[test]
fn cache_policies_become_timeouts_and_open_flags() {
    let seen = |cache: CachePolicy| {
        let share = Share::with(|options| options.cache = cache);
        let (inode, _) = share.create(ROOT, c"file");
        let entry = share.lookup(ROOT, c"file").unwrap();
        let (_, file, _) = share.fs.open(&root(), inode, 0, 0).unwrap();
        let (_, directory) = share.fs.opendir(&root(), ROOT, 0).unwrap();
        (
            entry.entry_timeout.as_millis(),
            entry.attr_timeout.as_millis(),
            file,
            directory,
        )
    };
    const DAY: u128 = 86_400_000;
    let none = OpenOptions::empty();
    let kept = OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR;
    assert_eq!(seen(CachePolicy::Never), (0, 0, OpenOptions::DIRECT_IO, none));
    assert_eq!(
        seen(CachePolicy::Metadata),
        (DAY, DAY, OpenOptions::DIRECT_IO, none)
    );
    let timeout = Duration::from_millis(2500);
    assert_eq!(seen(CachePolicy::Auto { timeout }), (2500, 2500, none, none));
    assert_eq!(seen(CachePolicy::default()), (1000, 1000, none, none));
    assert_eq!(
        seen(CachePolicy::Always),
        (DAY, DAY, OpenOptions::KEEP_CACHE, kept)
    );
}

#[test]
fn direct_io_is_an_option() {
    const O_DIRECT: u32 = libc::O_DIRECT as u32;
    // Of the three descriptors that the daemon has on the file, one is open for reading alone.
    let host_flags = |share: &Share| {
        let (inode, _) = share.create(ROOT, c"file");
        let (_, options, _) = share.fs.open(&root(), inode, O_DIRECT, 0).unwrap();
        let flags = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| to == share.path("file")))
            .map(|entry| {
                std::fs::read_to_string(format!("/proc/self/fdinfo/{}", entry.file_name().display())).unwrap()
            })
            .map(|info| {
                info.lines()
                    .find_map(|l| l.strip_prefix("flags:"))
                    .unwrap()
                    .trim()
                    .to_owned()
            })
            .map(|flags| u32::from_str_radix(&flags, 8).unwrap())
            .find(|flags| flags & (libc::O_ACCMODE | libc::O_PATH) as u32 == libc::O_RDONLY as u32)
            .expect("an open file");
        (flags & O_DIRECT != 0, options.contains(OpenOptions::DIRECT_IO))
    };
    assert_eq!(host_flags(&Share::new()), (false, false));
    assert_eq!(
        host_flags(&Share::with(|options| options.allow_direct_io = true)),
        (true, true)
    );
}

#[test]
fn the_place_of_a_node_can_be_told() {
    let share = Share::new();
    let directory = share.mkdir(ROOT, c"dir");
    let (file, handle) = share.create(directory, c"file");
    let told = |inode| {
        share
            .fs
            .path_of(inode)
            .map(|path| path.to_str().unwrap().to_owned())
    };
    assert_eq!(told(ROOT).as_deref(), Some("/"));
    assert_eq!(told(file).as_deref(), Some("/dir/file"));
    // It goes where the file goes, whoever moves it.
    std::fs::rename(share.path("dir"), share.path("moved")).unwrap();
    assert_eq!(told(file).as_deref(), Some("/moved/file"));
    share.fs.unlink(&root(), directory, c"file").unwrap();
    assert_eq!(told(file).as_deref(), Some("/moved/file (deleted)"));
    share.release(file, handle);
    share.fs.forget(&root(), file, 1);
    assert_eq!(told(file), None);
    // What has left the tree is told nowhere.
    std::fs::rename(share.path("moved"), share.outside("moved")).unwrap();
    assert_eq!(told(directory), None);
}
