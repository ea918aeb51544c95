//! Attributes stored under other names, and file capabilities that the host does not know of.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::ffi::CStr;
use std::os::unix::fs::chown;
use std::sync::Arc;

use common::*;
use fuse_backend_rs::abi::fuse_abi::SetattrValid;
use fuse_backend_rs::api::filesystem::{FileSystem, GetxattrReply, ListxattrReply};
use rafsd_passthrough::XattrRules;

const STORED: &CStr = c"user.virtiofs.security.capability";
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn share(rules: XattrRules) -> Share {
    Share::with(|options| options.xattr_rules = Some(Arc::new(rules)))
}

fn host_attribute(share: &Share, file: &str, name: &CStr) -> Option<Vec<u8>> {
    let mut value = [0; 256];
    let length = rustix::fs::lgetxattr(share.path(file), name, value.as_mut_slice()).ok()?;
    Some(value[..length].to_vec())
}

fn names(share: &Share, inode: u64) -> Vec<String> {
    let ListxattrReply::Names(names) = share.fs.listxattr(&root(), inode, 65_536).unwrap() else {
        panic!()
    };
    let ListxattrReply::Count(count) = share.fs.listxattr(&root(), inode, 0).unwrap() else {
        panic!()
    };
    assert_eq!(count as usize, names.len());
    if !names.is_empty() {
        assert_eq!(code(share.fs.listxattr(&root(), inode, count - 1)), libc::ERANGE);
    }
    let mut names: Vec<String> = names
        .split(|b| *b == 0)
        .filter(|n| !n.is_empty())
        .map(|n| String::from_utf8(n.to_vec()).unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn attributes_are_stored_under_other_names() {
    let share = share(XattrRules::built_in());
    let (inode, _) = share.create(ROOT, c"file");
    let set = |name: &CStr, value: &[u8]| share.fs.setxattr(&root(), inode, name, value, 0);
    set(c"trusted.overlay.opaque", b"y").unwrap();
    set(c"security.capability", b"anything: the host does not look at it").unwrap();
    set(c"user.plain", b"plain").unwrap();
    assert_eq!(
        code(set(c"user.virtiofs.trusted.overlay.opaque", b"n")),
        libc::EPERM
    );
    assert_eq!(
        host_attribute(&share, "file", c"user.virtiofs.trusted.overlay.opaque").unwrap(),
        b"y"
    );
    assert!(host_attribute(&share, "file", STORED).is_some());
    assert_eq!(host_attribute(&share, "file", c"user.plain").unwrap(), b"plain");
    assert_eq!(
        names(&share, inode),
        ["security.capability", "trusted.overlay.opaque", "user.plain"]
    );
    let value = share
        .fs
        .getxattr(&root(), inode, c"trusted.overlay.opaque", 9)
        .unwrap();
    assert!(matches!(value, GetxattrReply::Value(value) if value == b"y"));
    share
        .fs
        .removexattr(&root(), inode, c"trusted.overlay.opaque")
        .unwrap();
    assert_eq!(
        host_attribute(&share, "file", c"user.virtiofs.trusted.overlay.opaque"),
        None
    );
    let gone = share.fs.getxattr(&root(), inode, c"trusted.overlay.opaque", 0);
    assert_eq!(code(gone), libc::ENODATA);
}

#[test]
fn what_the_host_has_of_its_own_is_hidden() {
    if !privileged("what_the_host_has_of_its_own_is_hidden") {
        return;
    }
    let share = share(XattrRules::built_in());
    let (inode, _) = share.create(ROOT, c"file");
    let none = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(share.path("file"), c"trusted.host", b"secret", none).unwrap();
    rustix::fs::setxattr(share.path("file"), c"security.host", b"secret", none).unwrap();
    assert_eq!(names(&share, inode), [""; 0]);
    assert_eq!(
        code(share.fs.getxattr(&root(), inode, c"trusted.host", 99)),
        libc::ENODATA
    );
}

#[test]
fn names_can_be_refused() {
    let rules = ":unsupported:all:system.posix_acl:system.posix_acl::bad:all:trusted.:trusted.::ok:all:::";
    let share = share(rules.parse().unwrap());
    let (inode, _) = share.create(ROOT, c"file");
    let set = |name: &CStr| share.fs.setxattr(&root(), inode, name, b"x", 0);
    let get = |name: &CStr| share.fs.getxattr(&root(), inode, name, 9);
    let remove = |name: &CStr| share.fs.removexattr(&root(), inode, name);
    for (name, refusal) in [
        (c"system.posix_acl_access", libc::EOPNOTSUPP),
        (c"trusted.x", libc::EPERM),
    ] {
        assert_eq!(code(set(name)), refusal, "set {name:?}");
        assert_eq!(code(get(name)), refusal, "get {name:?}");
        assert_eq!(code(remove(name)), refusal, "remove {name:?}");
    }
    set(c"user.x").unwrap();
    if privileged("the list of names_can_be_refused") {
        let none = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(share.path("file"), c"trusted.x", b"of the host", none).unwrap();
    }
    assert_eq!(names(&share, inode), ["user.x"]);
    remove(c"user.x").unwrap();
}

#[test]
fn stored_capabilities_end_with_every_change() {
    let changes: [Change; 8] = [
        ("write", |share, inode, handle| {
            drop(share.write(inode, handle, b"x", 0).map(drop))
        }),
        ("truncate", |share, inode, _| resize(share, inode, None)),
        ("truncate an open file", |share, inode, handle| {
            resize(share, inode, Some(handle))
        }),
        ("open with O_TRUNC", |share, inode, _| {
            drop(share.open(inode, libc::O_RDWR | libc::O_TRUNC).map(drop))
        }),
        ("fallocate", |share, inode, handle| {
            share.fs.fallocate(&root(), inode, handle, 0, 0, 4096).unwrap()
        }),
        ("copy", |share, inode, handle| {
            let (from, source) = share.create(ROOT, c"source");
            share.write(from, source, b"data", 0).unwrap();
            share
                .fs
                .copy_file_range(&root(), (from, source, 0), (inode, handle, 0), 4, 0)
                .unwrap();
        }),
        ("change of owner", |share, inode, _| {
            let attr = share.stat(inode).unwrap();
            share
                .fs
                .setattr(&root(), inode, attr, None, SetattrValid::UID)
                .unwrap();
        }),
        ("create", |share, _, _| {
            let flags = (libc::O_RDWR | libc::O_TRUNC) as u32;
            let args = fuse_backend_rs::abi::fuse_abi::CreateIn {
                flags,
                mode: 0o600,
                umask: 0,
                fuse_flags: 0,
            };
            share.fs.create(&root(), ROOT, c"file", args).unwrap();
        }),
    ];
    for (what, change) in changes {
        let share = share(XattrRules::built_in());
        let (inode, handle) = share.create(ROOT, c"file");
        share.write(inode, handle, b"0123456789", 0).unwrap();
        share
            .fs
            .setxattr(&root(), inode, c"security.capability", &CAPABILITY, 0)
            .unwrap();
        assert!(host_attribute(&share, "file", STORED).is_some());
        share.read(inode, handle, 5, 0).unwrap();
        assert!(
            host_attribute(&share, "file", STORED).is_some(),
            "reading changes nothing"
        );
        change(&share, inode, handle);
        assert_eq!(host_attribute(&share, "file", STORED), None, "{what}");
    }
}

/// One change of a file: what it is, and how to make it on a node with a handle.
type Change = (&'static str, fn(&Share, u64, u64));

fn resize(share: &Share, inode: u64, handle: Option<u64>) {
    let mut attr = share.stat(inode).unwrap();
    attr.st_size = 3;
    share
        .fs
        .setattr(&root(), inode, attr, handle, SetattrValid::SIZE)
        .unwrap();
}

#[test]
fn capabilities_of_the_host_are_the_kernels_to_end() {
    if !privileged("capabilities_of_the_host_are_the_kernels_to_end") {
        return;
    }
    let share = share(":map:trusted.:user.virtiofs.:".parse().unwrap());
    let (inode, handle) = share.create(ROOT, c"file");
    chown(share.path("file"), Some(1000), Some(1000)).unwrap();
    share
        .fs
        .setxattr(&root(), inode, c"security.capability", &CAPABILITY, 0)
        .unwrap();
    assert!(host_attribute(&share, "file", c"security.capability").is_some());
    share.write(inode, handle, b"x", 0).unwrap();
    assert_eq!(host_attribute(&share, "file", c"security.capability"), None);
}
