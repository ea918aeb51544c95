//! What the host has mounted below a served tree: announced as a file system of its own, whenever it was mounted.

use std::path::Path;
use std::process::Command;

use crate::support::{CONTAINERS, RAFSD};
use rafsd_frontend::Options;
use rafsd_frontend::abi::init;
use rafsd_frontend::daemon::Builder;
use rafsd_frontend::ops::{self, Init};
use rustix::thread::UnshareFlags;

/// `FUSE_ATTR_SUBMOUNT`.
const SUBMOUNT: u32 = 1;

fn run(program: &str, arguments: &[&str], path: &Path) {
    let status = Command::new(program).args(arguments).arg(path).status().unwrap();
    assert!(status.success(), "{program} {arguments:?} {}", path.display());
}

/// Mounts made from now on are seen by this thread and by the processes that it starts.
fn own_mounts() {
    assert!(
        rustix::process::geteuid().is_root(),
        "mounting takes root; `make test` runs tests as root"
    );
    // SAFETY: the thread gets a mount table and a working directory of its own; descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    run("mount", &["--make-rprivate"], Path::new("/"));
    // A daemon that has a mount table of its own is told of later mounts.
    run("mount", &["--make-rshared"], Path::new("/"));
}

#[test]
fn what_the_host_mounts_is_announced() {
    own_mounts();
    let builder = Builder::new(RAFSD).unwrap();
    let shared = builder.directory().join("shared");
    for name in ["before", "after", "plain"] {
        std::fs::create_dir_all(shared.join(name)).unwrap();
    }
    run("mount", &["-t", "tmpfs", "one"], &shared.join("before"));
    std::fs::create_dir(shared.join("before/below")).unwrap();
    let daemon = builder.start().unwrap();
    daemon.mount_passthrough(CONTAINERS, &shared).unwrap();
    let guest = daemon.guest(Options::default()).unwrap();
    assert_ne!(guest.init(&Init::default()).unwrap().flags & init::SUBMOUNTS, 0);

    let top = guest.resolve(CONTAINERS).unwrap().nodeid;
    let flags = |parent, name: &str| guest.lookup(parent, name).unwrap().attr.flags;
    assert_eq!(flags(top, "before"), SUBMOUNT);
    assert_eq!((flags(top, "after"), flags(top, "plain")), (0, 0));
    let before = guest.lookup(top, "before").unwrap();
    assert_eq!(
        flags(before.nodeid, "below"),
        0,
        "the mark is on the border alone"
    );

    run("mount", &["-t", "tmpfs", "two"], &shared.join("after"));
    std::fs::write(shared.join("after/file"), b"inside").unwrap();
    assert_eq!(flags(top, "after"), SUBMOUNT);
    let fh = guest.opendir(top).unwrap();
    let marked: Vec<_> = guest
        .readdirplus(top, fh, 0, 8192)
        .unwrap()
        .into_iter()
        .filter(|entry| {
            entry
                .entry
                .as_ref()
                .is_some_and(|found| found.attr.flags & SUBMOUNT != 0)
        })
        .map(|entry| String::from_utf8(entry.name).unwrap())
        .collect();
    assert_eq!(marked.len(), 2, "READDIRPLUS marks them too: {marked:?}");
    assert_eq!(
        guest.read_file(format!("{CONTAINERS}/after/file")).unwrap(),
        b"inside"
    );
    // All inode numbers differ although the guest may show one device: both roots have the number 1 on the host.
    let after = guest.lookup(top, "after").unwrap();
    assert_ne!(before.attr.ino, after.attr.ino);
    assert_eq!(
        guest
            .errno(&ops::rename(before.nodeid, "below", after.nodeid, "below"))
            .unwrap(),
        libc::EXDEV
    );

    // A guest that does not know submounts is not told, and served all the same.
    let offer = Init {
        flags: Init::default().flags & !init::SUBMOUNTS,
        ..Init::default()
    };
    assert_eq!(guest.init(&offer).unwrap().flags & init::SUBMOUNTS, 0);
    let top = guest.resolve(CONTAINERS).unwrap().nodeid;
    assert_eq!(guest.lookup(top, "after").unwrap().attr.flags, 0);
}

#[test]
fn a_tree_may_keep_its_submounts_to_itself() {
    own_mounts();
    let builder = Builder::new(RAFSD).unwrap().arg("--no-announce-submounts");
    let shared = builder.directory().join("shared");
    std::fs::create_dir_all(shared.join("sub")).unwrap();
    run("mount", &["-t", "tmpfs", "sub"], &shared.join("sub"));
    let daemon = builder.start().unwrap();
    daemon.mount_passthrough(CONTAINERS, &shared).unwrap();
    let guest = daemon.guest(Options::default()).unwrap();
    let top = guest.resolve(CONTAINERS).unwrap().nodeid;
    assert_eq!(guest.lookup(top, "sub").unwrap().attr.flags, 0);
}
