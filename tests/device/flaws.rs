//! Published flaws of daemons of this kind, tried on the device through its queues.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use passthrough::{FdBudget, PassthroughFs, XattrRules};
use rafsd::mounts::{Instance, MountOptions};
use rafsd_frontend::Guest;
use rafsd_frontend::ops::{self, Change};

use crate::setup::Setup;

const RDWR: u32 = libc::O_RDWR as u32;

fn served(change: impl FnOnce(&mut passthrough::Options)) -> (Setup, Guest, PathBuf) {
    let setup = Setup::new();
    let root = setup.directory.path().join("share");
    std::fs::create_dir(&root).unwrap();
    let mut options = passthrough::Options::new(&root);
    change(&mut options);
    let fs = PassthroughFs::new(options).unwrap();
    let instance = Instance::Passthrough(Arc::new(fs));
    setup
        .mounts
        .mount("/", instance, MountOptions::default())
        .unwrap();
    let guest = setup.guest();
    (setup, guest, root)
}

fn as_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED {test}: device nodes and other users take root");
    }
    root
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = [0; 256];
    let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).ok()?;
    Some(value[..length].to_vec())
}

/// A guest made a device node in the share and had the daemon open it, and so the host's device.
#[test]
fn cve_2020_35517_special_files_are_made_and_never_opened() {
    if !as_root("cve_2020_35517_special_files_are_made_and_never_opened") {
        return;
    }
    let (_setup, guest, root) = served(|_| {});
    let kinds = [
        ("zero", libc::S_IFCHR, 0x105),
        ("disk", libc::S_IFBLK, 0x700),
        ("pipe", libc::S_IFIFO, 0),
        ("socket", libc::S_IFSOCK, 0),
    ];
    for (name, kind, number) in kinds {
        let made = guest.mknod(ops::ROOT, name, kind | 0o666, number).unwrap();
        let there = std::fs::symlink_metadata(root.join(name)).unwrap();
        assert!(!there.file_type().is_file() && !there.file_type().is_dir());
        assert_eq!(there.mode() & libc::S_IFMT, kind);
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR,
            libc::O_RDWR | libc::O_TRUNC,
        ] {
            let errno = guest.errno(&ops::open(made.nodeid, flags as u32)).unwrap();
            assert_eq!(errno, libc::ENXIO, "open of {name} with {flags:#o}");
            // Nor by a name, or as if it were to be made.
            let errno = guest
                .errno(&ops::create(
                    ops::ROOT,
                    name,
                    0o666,
                    flags as u32 | libc::O_CREAT as u32,
                ))
                .unwrap();
            assert_ne!(errno, 0, "create over {name} with {flags:#o}");
        }
        assert_ne!(guest.errno(&ops::opendir(made.nodeid)).unwrap(), 0);
        for fh in 0..8 {
            assert_ne!(
                guest.errno(&ops::read(made.nodeid, fh, 0, 16)).unwrap(),
                0,
                "{name}"
            );
            assert_ne!(
                guest.errno(&ops::write(made.nodeid, fh, 0, b"x")).unwrap(),
                0,
                "{name}"
            );
            assert_ne!(
                guest.errno(&ops::ioctl(made.nodeid, fh, 0x1260, 8)).unwrap(),
                0,
                "{name}"
            );
        }
        let size = Change {
            size: Some(0),
            ..Change::default()
        };
        assert_ne!(
            guest.errno(&ops::setattr(made.nodeid, &size)).unwrap(),
            0,
            "{name}"
        );
    }
    // One that the host has put there.
    assert!(
        std::fs::symlink_metadata(root.join("zero"))
            .unwrap()
            .file_type()
            .is_char_device()
    );
    let zero = guest.lookup(ops::ROOT, "zero").unwrap();
    assert!(guest.open(zero.nodeid, 0).is_err());
}

/// A guest opened files until the host had no descriptors left.
#[test]
fn cve_2020_10717_open_files_are_budgeted() {
    let (_setup, guest, root) = served(|options| options.budget = Some(FdBudget::new(200)));
    std::fs::write(root.join("file"), b"x").unwrap();
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let node = guest.lookup(ops::ROOT, "file").unwrap().nodeid;
    let mut handles = Vec::new();
    let mut refused = 0;
    for _ in 0..1000 {
        let reply = guest.wait(guest.submit(&ops::open(node, 0)).unwrap()).unwrap();
        match reply.errno {
            0 => handles.push(ops::read_open(&reply.body).unwrap().0),
            libc::ENFILE => refused += 1,
            errno => panic!("{errno}"),
        }
    }
    assert!(refused > 0 && handles.len() <= 200, "{} open", handles.len());
    let during = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(during <= before + 210, "{during} descriptors, {before} before");
    // What needs no descriptor of its own is served on, and so is everything once some are given back.
    assert_eq!(guest.getattr(node).unwrap().size, 1);
    guest.mkdir(ops::ROOT, "dir", 0o755).unwrap();
    for fh in handles {
        guest.release(node, fh).unwrap();
    }
    let fh = guest.open(node, 0).unwrap();
    assert_eq!(guest.read(node, fh, 0, 10).unwrap(), b"x");
}

/// File capabilities that were stored under another name survived writes to the file.
#[test]
fn cve_2021_20263_a_write_ends_remapped_capabilities() {
    const STORED: &str = "user.virtiofs.security.capability";
    const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let rules = Arc::new(XattrRules::built_in());
    let (_setup, guest, root) = served(|options| options.xattr_rules = Some(rules));
    let path = root.join("file");
    let (file, fh) = guest.create(ops::ROOT, "file", 0o755, RDWR).unwrap();
    let node = file.nodeid;
    let changes: [(&str, &dyn Fn()); 5] = [
        ("write", &|| {
            guest.write(node, fh, 0, b"new").unwrap();
        }),
        ("truncation", &|| {
            let size = Change {
                size: Some(1),
                ..Change::default()
            };
            guest.setattr(node, &size).unwrap();
        }),
        ("allocation", &|| guest.fallocate(node, fh, 0, 0, 4096).unwrap()),
        ("new owner", &|| {
            let owner = Change {
                uid: Some(0),
                ..Change::default()
            };
            guest.setattr(node, &owner).unwrap();
        }),
        ("opening to truncate", &|| {
            let fh = guest.open(node, RDWR | libc::O_TRUNC as u32).unwrap();
            guest.release(node, fh).unwrap();
        }),
    ];
    for (what, change) in changes {
        guest
            .setxattr(node, "security.capability", CAPABILITY, 0)
            .unwrap();
        assert_eq!(attribute(&path, STORED).as_deref(), Some(CAPABILITY));
        change();
        assert_eq!(attribute(&path, STORED), None, "{what} leaves the capabilities");
        assert!(guest.getxattr(node, "security.capability").is_err(), "{what}");
    }
}

/// A user of the guest made a set-group-id program of a group that the daemon, not the user, was a member of.
#[test]
fn cve_2022_0358_the_daemons_groups_are_not_the_users() {
    if !as_root("cve_2022_0358_the_daemons_groups_are_not_the_users") {
        return;
    }
    let (_setup, guest, root) = served(|_| {});
    // 0 is the group of the daemon itself, 4711 one that nobody is in.
    for group in [0, 4711] {
        let directory = root.join(format!("of-{group}"));
        std::fs::create_dir(&directory).unwrap();
        std::os::unix::fs::chown(&directory, Some(0), Some(group)).unwrap();
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o2777)).unwrap();
        let node = guest.lookup(ops::ROOT, format!("of-{group}")).unwrap().nodeid;
        for (name, request) in [
            (
                "created",
                ops::create(node, "created", 0o2755, RDWR | libc::O_CREAT as u32),
            ),
            ("made", ops::mknod(node, "made", libc::S_IFREG | 0o2755, 0)),
        ] {
            guest.call(&request.by(1000, 1000)).unwrap();
            let there = std::fs::metadata(directory.join(name)).unwrap();
            assert_eq!((there.uid(), there.gid()), (1000, group), "{name}");
            assert_eq!(
                there.mode() & 0o7777,
                0o755,
                "{name} in a directory of group {group}"
            );
        }
    }
}

/// The name of a new symbolic link was a path of the host, and the link was made there, by root.
#[test]
fn cve_2026_47243_a_symbolic_link_is_made_in_its_directory_alone() {
    let (setup, guest, root) = served(|_| {});
    let outside = setup.directory.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::create_dir(root.join("dir")).unwrap();
    let dir = guest.lookup(ops::ROOT, "dir").unwrap().nodeid;
    let absolute = outside.join("planted").into_os_string().into_encoded_bytes();
    let names: [&[u8]; 7] = [
        &absolute,
        b"../outside/planted",
        b"../../outside/planted",
        b"dir/../../outside/planted",
        b"./planted",
        b"/planted",
        b"..",
    ];
    for name in names {
        for parent in [ops::ROOT, dir] {
            for target in [&b"/etc/passwd"[..], b"../outside", b"x"] {
                let errno = guest.errno(&ops::symlink(parent, name, target)).unwrap();
                assert_eq!(errno, libc::EINVAL, "{}", String::from_utf8_lossy(name));
            }
        }
    }
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(root.join("dir")).unwrap().count(), 0);
    assert!(std::fs::symlink_metadata("/planted").is_err());
    // The target is the guest's own business: it is kept as it is, and followed by the guest.
    guest.symlink(dir, "link", "/etc/passwd").unwrap();
    assert_eq!(
        std::fs::read_link(root.join("dir/link")).unwrap(),
        Path::new("/etc/passwd")
    );
}
