//! Whose files they become, and what becomes of set-id bits.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, FsOptions, SetattrValid, WRITE_KILL_PRIV,
};
use fuse_backend_rs::api::filesystem::{FileSystem, ListxattrReply};
use rafsd_passthrough::CreateExtras;

const USER_OBJ: u16 = 0x01;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// An access list in the kernel's form, of entries that name nobody: what they are for, and their rights.
fn acl(entries: &[(u16, u16)]) -> Vec<u8> {
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, rights) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(rights.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    acl
}

/// user, group and permission bits of a file of the share.
fn owner(share: &Share, name: &str) -> (u32, u32, u32) {
    let meta = std::fs::symlink_metadata(share.path(name)).unwrap();
    (meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777)
}

fn thread_identity() -> Vec<String> {
    std::fs::read_to_string("/proc/thread-self/status")
        .unwrap()
        .lines()
        .filter(|line| {
            ["Uid:", "Gid:", "CapEff:", "CapPrm:", "Umask:"]
                .iter()
                .any(|key| line.starts_with(key))
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn what_a_user_makes_belongs_to_that_user() {
    if !privileged("what_a_user_makes_belongs_to_that_user") {
        return;
    }
    let share = Share::new();
    rafsd_passthrough::prepare_thread().unwrap();
    let before = thread_identity();
    let ctx = user(1234, 4321);
    share.create_as(&ctx, ROOT, c"file", 0o666, 0o027).unwrap();
    share.fs.mkdir(&ctx, ROOT, c"dir", 0o777, 0o022).unwrap();
    share
        .fs
        .mknod(&ctx, ROOT, c"fifo", libc::S_IFIFO | 0o622, 0, 0)
        .unwrap();
    share
        .fs
        .mknod(
            &ctx,
            ROOT,
            c"null",
            libc::S_IFCHR | 0o666,
            libc::makedev(1, 3) as u32,
            0o077,
        )
        .unwrap();
    share.fs.symlink(&ctx, c"x", ROOT, c"link").unwrap();
    let (tmp, ..) = share
        .fs
        .tmpfile(
            &ctx,
            ROOT,
            libc::O_RDWR as u32,
            0o666,
            0o002,
            &CreateExtras::default(),
        )
        .unwrap();
    assert_eq!(owner(&share, "file"), (1234, 4321, 0o640));
    assert_eq!(owner(&share, "dir"), (1234, 4321, 0o755));
    assert_eq!(owner(&share, "fifo"), (1234, 4321, 0o622));
    assert_eq!(owner(&share, "null"), (1234, 4321, 0o600));
    assert_eq!(
        (tmp.attr.st_uid, tmp.attr.st_gid, tmp.attr.st_mode & 0o7777),
        (1234, 4321, 0o664)
    );
    assert_eq!((owner(&share, "link").0, owner(&share, "link").1), (1234, 4321));
    share.create_as(&user(0, 77), ROOT, c"group", 0o600, 0).unwrap();
    assert_eq!(owner(&share, "group"), (0, 77, 0o600));
    share.create(ROOT, c"root");
    assert_eq!(owner(&share, "root"), (0, 0, 0o644));
    assert_eq!(thread_identity(), before);
}

#[test]
fn identity_and_umask_come_back_after_failures() {
    if !privileged("identity_and_umask_come_back_after_failures") {
        return;
    }
    let share = Share::new();
    rafsd_passthrough::prepare_thread().unwrap();
    let before = thread_identity();
    std::fs::create_dir(share.path("taken")).unwrap();
    let ctx = user(1234, 4321);
    assert_eq!(
        code(share.fs.mkdir(&ctx, ROOT, c"taken", 0o755, 0o077)),
        libc::EEXIST
    );
    // -1 would leave the thread as it is, and the request would run as user 0.
    for ctx in [user(u32::MAX, 1), user(1, u32::MAX)] {
        assert_eq!(
            code(share.fs.mkdir(&ctx, ROOT, c"nobody", 0o755, 0)),
            libc::EINVAL
        );
    }
    assert!(!exists(&share.path("nobody")));
    assert_eq!(thread_identity(), before);
}

#[test]
fn the_umask_of_one_request_does_not_reach_other_threads() {
    let share = Share::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                share.fs.mkdir(&root(), ROOT, c"masked", 0o777, 0o777).unwrap();
                share.fs.rmdir(&root(), ROOT, c"masked").unwrap();
            }
        });
        for _ in 0..2_000 {
            let entry = share.fs.mkdir(&root(), ROOT, c"open", 0o777, 0).unwrap();
            assert_eq!(entry.attr.st_mode & 0o777, 0o777);
            share.fs.rmdir(&root(), ROOT, c"open").unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn set_group_id_directories_pass_their_group_on_but_not_its_powers() {
    if !privileged("set_group_id_directories_pass_their_group_on_but_not_its_powers") {
        return;
    }
    let share = Share::new();
    let dir = share.mkdir(ROOT, c"dir");
    // Group 0, of which the daemon is a member, and one that nobody is in: the user is in neither (CVE-2022-0358).
    for group in [0, 555] {
        chown(share.path("dir"), Some(0), Some(group)).unwrap();
        std::fs::set_permissions(share.path("dir"), std::fs::Permissions::from_mode(0o2777)).unwrap();
        share
            .create_as(&user(1234, 4321), dir, c"file", 0o2755, 0)
            .unwrap();
        assert_eq!(owner(&share, "dir/file"), (1234, group, 0o755), "group {group}");
        std::fs::remove_file(share.path("dir/file")).unwrap();
        share.fs.mkdir(&user(1234, 4321), dir, c"sub", 0o755, 0).unwrap();
        assert_eq!(owner(&share, "dir/sub"), (1234, group, 0o2755));
        std::fs::remove_dir(share.path("dir/sub")).unwrap();
        // A user of the group keeps the bit.
        let extras = CreateExtras {
            group: Some(group),
            ..CreateExtras::default()
        };
        let args = CreateIn {
            flags: libc::O_RDWR as u32,
            mode: 0o2755,
            umask: 0,
            fuse_flags: 0,
        };
        share
            .fs
            .create_with(&user(1234, 4321), dir, c"member", &args, &extras)
            .unwrap();
        assert_eq!(owner(&share, "dir/member"), (1234, group, 0o2755));
        std::fs::remove_file(share.path("dir/member")).unwrap();
    }
}

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    if !privileged("a_default_acl_takes_the_place_of_the_umask") {
        return;
    }
    let share = Share::new();
    let dir = share.mkdir(ROOT, c"dir");
    let acl = acl(&[(USER_OBJ, 7), (GROUP_OBJ, 7), (OTHER, 5)]);
    share
        .fs
        .setxattr(&root(), dir, c"system.posix_acl_default", &acl, 0)
        .unwrap();
    share.create_as(&root(), dir, c"file", 0o666, 0o077).unwrap();
    assert_eq!(owner(&share, "dir/file").2, 0o664);
    share.fs.mkdir(&root(), dir, c"sub", 0o777, 0o077).unwrap();
    assert_eq!(owner(&share, "dir/sub").2, 0o775);
}

#[test]
fn setting_an_acl_drops_set_group_id_when_the_guest_says_so() {
    if !privileged("setting_an_acl_drops_set_group_id_when_the_guest_says_so") {
        return;
    }
    let share = Share::new();
    let (inode, _) = share.create(ROOT, c"file");
    let acl = acl(&[(USER_OBJ, 7), (GROUP_OBJ, 5), (OTHER, 5)]);
    for (kill, left) in [(false, 0o2755), (true, 0o755)] {
        std::fs::set_permissions(share.path("file"), std::fs::Permissions::from_mode(0o2755)).unwrap();
        share
            .fs
            .setxattr_with(inode, c"system.posix_acl_access", &acl, 0, kill)
            .unwrap();
        assert_eq!(owner(&share, "file").2, left);
    }
}

/// Whether set-id bits and file capabilities survive `change` on a file of user 1000.
fn survives(change: impl FnOnce(&Share, u64, u64)) -> (u32, bool) {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    share.write(inode, handle, b"0123456789", 0).unwrap();
    chown(share.path("file"), Some(1000), Some(1000)).unwrap();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    share
        .fs
        .setxattr(&root(), inode, c"security.capability", &capability, 0)
        .unwrap();
    std::fs::set_permissions(share.path("file"), std::fs::Permissions::from_mode(0o6755)).unwrap();
    change(&share, inode, handle);
    let has_capability = share
        .fs
        .getxattr(&root(), inode, c"security.capability", 99)
        .is_ok();
    (owner(&share, "file").2 & 0o7000, has_capability)
}

#[test]
fn set_id_bits_fall_when_the_guest_asks_for_it() {
    if !privileged("set_id_bits_fall_when_the_guest_asks_for_it") {
        return;
    }
    const KILL: u32 = FOPEN_IN_KILL_SUIDGID;
    const TRUNCATE: u32 = (libc::O_RDWR | libc::O_TRUNC) as u32;
    let resize = |share: &Share, inode, handle, valid| {
        let mut attr = share.stat(inode).unwrap();
        attr.st_size = 3;
        share
            .fs
            .setattr(&root(), inode, attr, handle, SetattrValid::SIZE | valid)
            .unwrap();
    };
    assert_eq!(
        survives(|_, _, _| ()),
        (0o6000, true),
        "the file as it is prepared"
    );

    // The caller may keep the bits; file capabilities fall with any change, as on a local file system.
    assert_eq!(
        survives(|s, i, h| {
            s.write(i, h, b"x", 0).unwrap();
        }),
        (0o6000, false)
    );
    assert_eq!(
        survives(|s, i, _| {
            s.fs.open(&root(), i, TRUNCATE, 0).unwrap();
        }),
        (0o6000, false)
    );
    assert_eq!(
        survives(|s, i, _| resize(s, i, None, SetattrValid::empty())),
        (0o6000, false)
    );
    assert_eq!(
        survives(|s, i, h| s.fs.fallocate(&root(), i, h, 0, 0, 4096).unwrap()),
        (0o6000, false)
    );

    // The caller may not.
    let kill = WRITE_KILL_PRIV;
    assert_eq!(
        survives(|s, i, h| {
            s.write_flags(i, h, b"x", 0, 0, kill).unwrap();
        }),
        (0, false)
    );
    assert_eq!(
        survives(|s, i, _| {
            s.fs.open(&root(), i, TRUNCATE, KILL).unwrap();
        }),
        (0, false)
    );
    assert_eq!(
        survives(|s, i, _| resize(s, i, None, SetattrValid::KILL_SUIDGID)),
        (0, false)
    );
    assert_eq!(
        survives(|s, i, h| resize(s, i, Some(h), SetattrValid::KILL_SUIDGID)),
        (0, false)
    );
    assert_eq!(
        survives(|s, i, h| s.fs.fallocate(&user(1000, 1000), i, h, 0, 0, 4096).unwrap()),
        (0, false)
    );
    let create = |share: &Share, _, _| {
        let args = CreateIn {
            flags: TRUNCATE,
            mode: 0o644,
            umask: 0,
            fuse_flags: KILL,
        };
        share.fs.create(&user(1000, 1000), ROOT, c"file", args).unwrap();
    };
    assert_eq!(survives(create), (0, false));

    // A guest that clears the bits itself sends nothing but the open, and does not say who may keep them.
    let opened_by = |uid| {
        survives(move |s, i, _| {
            settle(&s.fs, FsOptions::all() - FsOptions::HANDLE_KILLPRIV_V2);
            s.fs.open(&user(uid, uid), i, TRUNCATE, 0).unwrap();
        })
    };
    assert_eq!(opened_by(1000), (0, false));
    assert_eq!(opened_by(0), (0o6000, false));

    // A new owner never inherits them.
    let give_away = |share: &Share, inode, _| {
        let mut attr = share.stat(inode).unwrap();
        attr.st_uid = 1001;
        share
            .fs
            .setattr(&root(), inode, attr, None, SetattrValid::UID)
            .unwrap();
    };
    assert_eq!(survives(give_away), (0, false));
}

#[test]
fn the_capability_given_up_for_a_write_comes_back() {
    if !privileged("the_capability_given_up_for_a_write_comes_back") {
        return;
    }
    let share = Share::new();
    rafsd_passthrough::prepare_thread().unwrap();
    let before = thread_identity();
    let (inode, handle) = share.create(ROOT, c"file");
    share
        .write_flags(inode, handle, b"x", 0, 0, WRITE_KILL_PRIV)
        .unwrap();
    assert_eq!(
        code(share.write_flags(inode, handle, b"x", u64::MAX, 0, WRITE_KILL_PRIV)),
        libc::EINVAL
    );
    assert_eq!(thread_identity(), before);
}

#[test]
fn labels_are_put_on_what_is_made() {
    if !privileged("labels_are_put_on_what_is_made") {
        return;
    }
    let share = Share::new();
    let labels: &[_] = &[(c"security.test", b"label".as_slice())];
    let extras = CreateExtras {
        labels,
        ..CreateExtras::default()
    };
    let ctx = user(1000, 1000);
    let args = CreateIn {
        flags: libc::O_RDWR as u32,
        mode: 0o600,
        umask: 0,
        fuse_flags: 0,
    };
    let made = [
        share
            .fs
            .create_with(&ctx, ROOT, c"file", &args, &extras)
            .unwrap()
            .0
            .inode,
        share
            .fs
            .mkdir_with(&ctx, ROOT, c"dir", 0o755, 0, &extras)
            .unwrap()
            .inode,
        share
            .fs
            .mknod_with(&ctx, ROOT, c"fifo", libc::S_IFIFO | 0o600, 0, 0, &extras)
            .unwrap()
            .inode,
        share
            .fs
            .symlink_with(&ctx, c"x", ROOT, c"link", &extras)
            .unwrap()
            .inode,
        share
            .fs
            .tmpfile(&ctx, ROOT, libc::O_RDWR as u32, 0o600, 0, &extras)
            .unwrap()
            .0
            .inode,
    ];
    for inode in made {
        let value = share.fs.getxattr(&root(), inode, c"security.test", 99);
        assert!(
            matches!(value, Ok(fuse_backend_rs::api::filesystem::GetxattrReply::Value(value)) if value == b"label")
        );
    }
}

#[test]
fn access_is_judged_as_the_caller() {
    if !privileged("access_is_judged_as_the_caller") {
        return;
    }
    let share = Share::new();
    let (inode, _) = share
        .create_as(&user(1000, 1000), ROOT, c"file", 0o640, 0)
        .unwrap();
    let access = |ctx, mask: i32| share.fs.access(&ctx, inode, mask as u32);
    access(user(1000, 1), libc::R_OK | libc::W_OK).unwrap();
    access(user(1001, 1000), libc::R_OK).unwrap();
    assert_eq!(code(access(user(1001, 1000), libc::W_OK)), libc::EACCES);
    assert_eq!(code(access(user(1001, 1001), libc::R_OK)), libc::EACCES);
    access(root(), libc::R_OK | libc::W_OK).unwrap();
    assert_eq!(code(access(root(), libc::X_OK)), libc::EACCES);
    assert_eq!(code(access(root(), 0x100)), libc::EINVAL);
}

#[test]
fn ids_are_translated_on_the_way_in_and_out() {
    if !privileged("ids_are_translated_on_the_way_in_and_out") {
        return;
    }
    let share = Share::with(|options| {
        options.ids.users = "map:0:100000:1000 forbid-guest:5000:1".parse().unwrap();
        options.ids.groups = "map:0:200000:1000".parse().unwrap();
        options.posix_acl = true;
    });
    let (inode, _) = share.create_as(&user(7, 8), ROOT, c"file", 0o640, 0).unwrap();
    assert_eq!(owner(&share, "file"), (100_007, 200_008, 0o640));
    let stat = share.stat(inode).unwrap();
    assert_eq!((stat.st_uid, stat.st_gid), (7, 8));
    let entry = share.lookup(ROOT, c"file").unwrap();
    assert_eq!((entry.attr.st_uid, entry.attr.st_gid), (7, 8));
    let (statx, _) = share.fs.statx(&root(), inode, None).unwrap();
    assert_eq!((statx.uid, statx.gid), (7, 8));
    share.create(ROOT, c"root");
    assert_eq!(owner(&share, "root"), (100_000, 200_000, 0o644));
    assert_eq!(
        code(share.create_as(&user(5000, 0), ROOT, c"forbidden", 0o600, 0)),
        libc::EPERM
    );
    assert!(!exists(&share.path("forbidden")));
    let mut attr = share.stat(inode).unwrap();
    (attr.st_uid, attr.st_gid) = (1, 2);
    let both = SetattrValid::UID | SetattrValid::GID;
    let (stat, _) = share.fs.setattr(&root(), inode, attr, None, both).unwrap();
    assert_eq!((stat.st_uid, stat.st_gid), (1, 2));
    assert_eq!(owner(&share, "file"), (100_001, 200_002, 0o640));
    attr.st_uid = 5000;
    assert_eq!(
        code(share.fs.setattr(&root(), inode, attr, None, SetattrValid::UID)),
        libc::EPERM
    );
    share
        .fs
        .access(&user(1, 0), inode, (libc::R_OK | libc::W_OK) as u32)
        .unwrap();
    assert_eq!(
        code(share.fs.access(&user(2, 0), inode, libc::R_OK as u32)),
        libc::EACCES
    );
    let wanted = share.fs.init(FsOptions::all()).unwrap();
    assert!(!wanted.contains(FsOptions::POSIX_ACL));
}

/// The guest keeps ACLs because another mount has them; this one has none, whatever the host has on its files.
#[test]
fn acls_of_the_host_are_withheld_from_a_guest_that_keeps_them_elsewhere() {
    let share = Share::new();
    share.fs.init(FsOptions::all()).unwrap();
    let (inode, _) = share.create(ROOT, c"file");
    let acl = acl(&[(USER_OBJ, 6), (GROUP_OBJ, 4), (MASK, 4), (OTHER, 0)]);
    let name = c"system.posix_acl_access";
    rustix::fs::setxattr(share.path("file"), name, &acl, rustix::fs::XattrFlags::empty()).unwrap();
    share.fs.setxattr(&root(), inode, c"user.a", b"1", 0).unwrap();
    assert_eq!(code(share.fs.getxattr(&root(), inode, name, 99)), libc::ENODATA);
    assert_eq!(
        code(share.fs.setxattr(&root(), inode, name, &acl, 0)),
        libc::EOPNOTSUPP
    );
    assert_eq!(code(share.fs.removexattr(&root(), inode, name)), libc::EOPNOTSUPP);
    let listed = share.fs.listxattr(&root(), inode, 99).unwrap();
    assert!(matches!(listed, ListxattrReply::Names(names) if names == b"user.a\0"));
    let length = share.fs.listxattr(&root(), inode, 0).unwrap();
    assert!(matches!(length, ListxattrReply::Count(7)));
    // Where no mount has ACLs, they are attributes like others.
    share.fs.init(FsOptions::all() - FsOptions::POSIX_ACL).unwrap();
    share.fs.getxattr(&root(), inode, name, 99).unwrap();
    share.fs.removexattr(&root(), inode, name).unwrap();
}

/// A daemon without any privilege serves the guest's user 0 as its own user, and nobody else.
#[test]
fn an_unprivileged_daemon_serves_its_own_user_as_root() {
    if !privileged("an_unprivileged_daemon_serves_its_own_user_as_root") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    // This thread becomes another user for good; it ends with the scope.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (uid, gid) = (rustix::fs::Uid::from_raw(4242), rustix::fs::Gid::from_raw(4243));
            rustix::thread::set_thread_groups(&[]).unwrap();
            rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            let fs =
                rafsd_passthrough::PassthroughFs::new(rafsd_passthrough::Options::new(dir.path())).unwrap();
            settle(&fs, FsOptions::all());
            let made = fs.mkdir(&root(), ROOT, c"dir", 0o755, 0).unwrap();
            assert_eq!((made.attr.st_uid, made.attr.st_gid), (0, 0));
            let args = CreateIn {
                flags: libc::O_RDWR as u32,
                mode: 0o600,
                umask: 0,
                fuse_flags: 0,
            };
            let (file, handle, ..) = fs.create(&root(), made.inode, c"file", args).unwrap();
            assert_eq!(file.attr.st_uid, 0);
            fs.release(&root(), file.inode, 0, handle.unwrap(), false, false, None)
                .unwrap();
            assert_eq!(
                code(fs.mkdir(&user(1000, 1000), ROOT, c"other", 0o755, 0)),
                libc::EPERM
            );
            assert_eq!(
                code(fs.mknod(&root(), ROOT, c"disk", libc::S_IFBLK | 0o600, 5, 0)),
                libc::EPERM
            );
            fs.mknod(&root(), ROOT, c"whiteout", libc::S_IFCHR | 0o600, 0, 0)
                .unwrap();
            let attr = made.attr;
            fs.setattr(
                &root(),
                made.inode,
                attr,
                None,
                SetattrValid::UID | SetattrValid::GID,
            )
            .unwrap();
        });
    });
    let meta = std::fs::metadata(dir.path().join("dir/file")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (4242, 4243));
}
