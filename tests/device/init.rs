//! The table of INIT flags in `docs/fuse.md` against what is negotiated.

use std::sync::Arc;

use passthrough::PassthroughFs;
use rafsd::mounts::{Instance, MountOptions};
use rafsd::virtio::DeviceOptions;
use rafsd_frontend::Guest;
use rafsd_frontend::abi::init;
use rafsd_frontend::ops::{self, Init};

use crate::setup::Setup;

fn bit(name: &str) -> u64 {
    match name {
        "ASYNC_READ" => init::ASYNC_READ,
        "ATOMIC_O_TRUNC" => init::ATOMIC_O_TRUNC,
        "BIG_WRITES" => init::BIG_WRITES,
        "HAS_IOCTL_DIR" => init::HAS_IOCTL_DIR,
        "AUTO_INVAL_DATA" => init::AUTO_INVAL_DATA,
        "DO_READDIRPLUS" => init::DO_READDIRPLUS,
        "READDIRPLUS_AUTO" => init::READDIRPLUS_AUTO,
        "ASYNC_DIO" => init::ASYNC_DIO,
        "PARALLEL_DIROPS" => init::PARALLEL_DIROPS,
        "ABORT_ERROR" => init::ABORT_ERROR,
        "MAX_PAGES" => init::MAX_PAGES,
        "CACHE_SYMLINKS" => init::CACHE_SYMLINKS,
        "SUBMOUNTS" => init::SUBMOUNTS,
        "HANDLE_KILLPRIV_V2" => init::HANDLE_KILLPRIV_V2,
        "SETXATTR_EXT" => init::SETXATTR_EXT,
        "INIT_EXT" => init::INIT_EXT,
        "CREATE_SUPP_GROUP" => init::CREATE_SUPP_GROUP,
        "POSIX_ACL" => init::POSIX_ACL,
        "DONT_MASK" => init::DONT_MASK,
        "WRITEBACK_CACHE" => init::WRITEBACK_CACHE,
        "POSIX_LOCKS" => init::POSIX_LOCKS,
        "FLOCK_LOCKS" => init::FLOCK_LOCKS,
        "SECURITY_CTX" => init::SECURITY_CTX,
        "EXPORT_SUPPORT" => init::EXPORT_SUPPORT,
        "NO_OPEN_SUPPORT" => init::NO_OPEN_SUPPORT,
        "HANDLE_KILLPRIV" => init::HANDLE_KILLPRIV,
        "NO_OPENDIR_SUPPORT" => init::NO_OPENDIR_SUPPORT,
        "EXPLICIT_INVAL_DATA" => init::EXPLICIT_INVAL_DATA,
        "MAP_ALIGNMENT" => init::MAP_ALIGNMENT,
        "HAS_INODE_DAX" => init::HAS_INODE_DAX,
        "HAS_EXPIRE_ONLY" => init::HAS_EXPIRE_ONLY,
        "DIRECT_IO_ALLOW_MMAP" => init::DIRECT_IO_ALLOW_MMAP,
        "PASSTHROUGH" => init::PASSTHROUGH,
        "NO_EXPORT_SUPPORT" => init::NO_EXPORT_SUPPORT,
        "HAS_RESEND" => init::HAS_RESEND,
        "ALLOW_IDMAP" => init::ALLOW_IDMAP,
        other => panic!("docs/fuse.md has a flag {other} that this test does not know"),
    }
}

/// The bits whose condition is one of `conditions`.
fn documented(conditions: &[&str]) -> u64 {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/fuse.md")).unwrap();
    let rows: Vec<(String, String)> = text
        .lines()
        .skip_while(|line| !line.starts_with("| flag"))
        .skip(2)
        .take_while(|line| line.starts_with("| "))
        .map(|line| {
            let mut cells = line
                .trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned());
            (cells.next().unwrap(), cells.next().unwrap())
        })
        .collect();
    let all = rows.iter().fold(0, |all, (name, _)| {
        assert_eq!(all & bit(name), 0, "{name} twice");
        all | bit(name)
    });
    assert_eq!(
        init::LINUX_6_12 & !all,
        0,
        "a flag that Linux offers is not in the table"
    );
    rows.iter()
        .filter(|(_, condition)| conditions.contains(&condition.as_str()))
        .fold(0, |bits, (name, _)| bits | bit(name))
}

fn offer(guest: &Guest, minor: u32, flags: u64) -> u64 {
    let offer = Init {
        version: (7, minor),
        flags,
        short: false,
    };
    let answer = guest.init(&offer).unwrap();
    assert_eq!(answer.minor, minor.min(41));
    assert_eq!(answer.flags & !flags, 0, "a flag that was not offered");
    answer.flags
}

fn tree(setup: &Setup, path: &str, wants: bool) {
    let root = setup.directory.path().join(path.trim_start_matches('/'));
    std::fs::create_dir(&root).unwrap();
    let options = passthrough::Options {
        posix_acl: wants,
        writeback: wants,
        locks: wants,
        ..passthrough::Options::new(root)
    };
    let fs = PassthroughFs::new(options).unwrap();
    let instance = Instance::Passthrough(Arc::new(fs));
    setup
        .mounts
        .mount(path, instance, MountOptions::default())
        .unwrap();
}

#[test]
fn flags_are_agreed_to_as_documented() {
    const ALWAYS: &str = "always";
    const SINCE: &str = "since 7.38";
    const ALL: &str = "all trees";
    const ONE: &str = "one tree, or started so";
    const STARTED: &str = "started so";
    let setup = Setup::new();
    let guest = setup.guest();
    assert_eq!(
        offer(&guest, 41, u64::MAX),
        documented(&[ALWAYS, SINCE]),
        "nothing is mounted"
    );
    assert_eq!(offer(&guest, 37, u64::MAX), documented(&[ALWAYS]));
    assert_eq!(offer(&guest, 31, 0), 0);
    // Without INIT_EXT there is no upper half.
    let low = offer(&guest, 41, !init::INIT_EXT);
    assert_eq!(low, documented(&[ALWAYS]) & !init::INIT_EXT);
    tree(&setup, "/wants", true);
    assert_eq!(
        offer(&guest, 41, u64::MAX),
        documented(&[ALWAYS, SINCE, ALL, ONE])
    );
    tree(&setup, "/does-not", false);
    assert_eq!(offer(&guest, 41, u64::MAX), documented(&[ALWAYS, SINCE, ONE]));
    setup.mounts.umount("/wants").unwrap();
    assert_eq!(offer(&guest, 41, u64::MAX), documented(&[ALWAYS, SINCE]));

    let setup = Setup::with(DeviceOptions {
        request_queues: 1,
        locks: true,
        security_labels: true,
        killpriv: true,
        posix_acl: true,
        ..DeviceOptions::default()
    });
    let guest = setup.guest();
    assert_eq!(
        offer(&guest, 41, u64::MAX),
        documented(&[ALWAYS, SINCE, ONE, STARTED])
    );
    // Labels come in an extension that is counted in the header since then.
    assert_eq!(
        offer(&guest, 37, u64::MAX),
        documented(&[ALWAYS, ONE]) | init::HANDLE_KILLPRIV_V2
    );
}

#[test]
fn acls_of_one_tree_take_nothing_from_the_others() {
    let setup = Setup::new();
    tree(&setup, "/wants", true);
    tree(&setup, "/does-not", false);
    let guest = setup.guest();
    assert_ne!(offer(&guest, 41, u64::MAX) & init::POSIX_ACL, 0);
    // One that is mounted later is told.
    tree(&setup, "/later", false);
    // u::rw-,u:1000:r--,g::r--,m::r--,o::---, as `struct posix_acl_xattr_entry`s behind the version.
    let entries = [
        (1u16, 6u16, u32::MAX),
        (2, 4, 1000),
        (4, 4, u32::MAX),
        (0x10, 4, u32::MAX),
        (0x20, 0, u32::MAX),
    ];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        acl.extend(id.to_le_bytes());
    }
    const NAME: &str = "system.posix_acl_access";
    for (top, serves) in [("/wants", true), ("/does-not", false), ("/later", false)] {
        let root = guest.resolve(top).unwrap().nodeid;
        let file = guest.write_file(root, "file", b"x").unwrap().nodeid;
        // A guest that keeps ACLs refuses access for every other error.
        assert_eq!(
            guest.errno(&ops::getxattr(file, NAME, 0)).unwrap(),
            libc::ENODATA,
            "{top}"
        );
        let set = guest.errno(&ops::setxattr(file, NAME, &acl, 0, true)).unwrap();
        let get = guest.errno(&ops::getxattr(file, NAME, 0)).unwrap();
        match serves {
            true => assert_eq!((set, get), (0, 0), "{top}"),
            false => assert_eq!((set, get), (libc::EOPNOTSUPP, libc::ENODATA), "{top}"),
        }
    }
}
