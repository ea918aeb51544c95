//! A real guest on a tree of the host that others use, too: locks that hold on the host, and what the host mounts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::image::python_tree;
use rafsd_guest::{Boot, Cache, Daemon, Guest};
use rustix::fs::{FlockOperation, flock};
use rustix::thread::UnshareFlags;

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");

/// Record locks of two processes, waiting for one, OFD locks of two open files, and what closing a file ends.
const RECORD_LOCKS: &str = r#"
import fcntl, os, struct, sys
path = "/mnt/record"
file = open(path, "w+")
fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
ready, go = os.pipe()
child = os.fork()
if child == 0:
    mine = open(path, "r+")
    fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)
    try:
        fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)
        os._exit(1)
    except BlockingIOError:
        pass
    holder = struct.unpack("hhqqi4x", fcntl.fcntl(mine, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 5, 0)))
    if holder[0] != fcntl.F_WRLCK or holder[3] != 10:
        os._exit(2)
    os.write(go, b"x")
    fcntl.lockf(mine, fcntl.LOCK_EX, 10, 0)
    os._exit(0 if open(path).read() == "released" else 3)
os.read(ready, 1)
file.write("released")
file.flush()
# Closing any descriptor of the file ends the process's locks on it.
open(path).close()
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

SETLK = 37 # F_OFD_SETLK
lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
one, two = open(path, "r+"), open(path, "r+")
fcntl.fcntl(one, SETLK, lock)
try:
    fcntl.fcntl(two, SETLK, lock)
    print("two owners")
except BlockingIOError:
    print("excluded")
one.close()
fcntl.fcntl(two, SETLK, lock)
print("inherited")
"#;

fn mount(arguments: &[&str], path: &Path) {
    let status = Command::new("mount").args(arguments).arg(path).status().unwrap();
    assert!(status.success(), "mount {arguments:?} {}", path.display());
}

/// Mounts made from now on are seen by this thread and by the processes that it starts.
fn own_mounts() {
    // SAFETY: the thread gets a mount table and a working directory of its own; descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount(&["--make-rprivate"], Path::new("/"));
    mount(&["--make-rshared"], Path::new("/"));
}

fn in_python(guest: &mut Guest, command: &str) -> String {
    guest.check(&format!("chroot {SHARED}/python {command}")).unwrap()
}

#[test]
fn locks_hold_on_the_host_and_submounts_are_file_systems_of_their_own() {
    own_mounts();
    let cache = Cache::open().unwrap();
    let tree = python_tree(&cache).unwrap();
    let directory = scratch(&cache).unwrap();
    let shared = directory.path().join("shared");
    for name in ["before", "after"] {
        fs::create_dir_all(shared.join(name)).unwrap();
    }
    mount(&["-t", "tmpfs", "one"], &shared.join("before"));
    fs::write(shared.join("before/file"), "mounted before\n").unwrap();

    let daemon = Daemon::start_with(Path::new(RAFSD), &["--host-locks"]).unwrap();
    daemon.mount_passthrough("/python", &tree).unwrap();
    daemon.mount_passthrough("/shared", &shared).unwrap();
    let mut guest = Boot::new(&cache)
        .unwrap()
        .device(&daemon.socket())
        .start()
        .unwrap();
    guest.mount_device().unwrap();
    guest
        .check(&format!("mount -o bind {SHARED}/shared {SHARED}/python/mnt"))
        .unwrap();

    fs::write(shared.join("record.py"), RECORD_LOCKS).unwrap();
    let said = in_python(&mut guest, "python3 -B /mnt/record.py");
    assert_eq!(said, "child 0\nexcluded\ninherited\n");

    // flock(1) against a process of the host: refused, then waiting until the host is done.
    let file = File::create(shared.join("flock")).unwrap();
    flock(file.as_fd(), FlockOperation::LockExclusive).unwrap();
    let refused = guest
        .run(&format!("chroot {SHARED}/python flock -n /mnt/flock echo got it"))
        .unwrap();
    assert_eq!((refused.status, refused.text.as_str()), (1, ""));
    let waits = guest
        .start(
            Duration::from_secs(180),
            &format!("chroot {SHARED}/python flock /mnt/flock sh -c 'echo got it >/mnt/told; echo got it'"),
        )
        .unwrap();
    // Meanwhile the guest works on.
    guest.check(&format!("ls {SHARED}/shared >/dev/null")).unwrap();
    assert!(guest.is_running(&waits));
    assert!(!shared.join("told").exists());
    flock(file.as_fd(), FlockOperation::Unlock).unwrap();
    let got = guest.finish(&waits).unwrap();
    assert_eq!((got.status, got.text.as_str()), (0, "got it\n"));
    flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive).unwrap();

    // Each mount of the host has a device number of its own, whenever it was made.
    let device = |guest: &mut Guest, name: &str| {
        let text = guest
            .check(&format!("stat -c %d {SHARED}/shared/{name}"))
            .unwrap();
        text.trim().parse::<u64>().unwrap()
    };
    let top = device(&mut guest, ".");
    // Entering makes the mount in the guest.
    let text = guest.check(&format!("cat {SHARED}/shared/before/file")).unwrap();
    assert_eq!(text, "mounted before\n");
    let before = device(&mut guest, "before/.");
    assert_ne!(before, top);
    assert_eq!(device(&mut guest, "after/."), top);
    mount(&["-t", "tmpfs", "two"], &shared.join("after"));
    fs::write(shared.join("after/file"), "mounted after\n").unwrap();
    let text = guest
        .check(&format!(
            "until cat {SHARED}/shared/after/file 2>/dev/null; do usleep 100000; done"
        ))
        .unwrap();
    assert_eq!(text, "mounted after\n");
    let after = device(&mut guest, "after/.");
    assert!(after != top && after != before, "{top} {before} {after}");
    let messages = guest.kernel_messages();
    assert!(
        !messages.contains("WARNING") && !messages.contains("BUG"),
        "{messages}"
    );
    guest.power_off().unwrap();
    let (status, _) = daemon.terminate().unwrap();
    assert!(status.success(), "{status}");
}
