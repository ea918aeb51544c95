//! Two sandboxes on one directory of the host: their locks meet there if the daemons were told so.

use std::time::{Duration, Instant};

use crate::support::{CONTAINERS, RAFSD};
use rafsd_frontend::abi::{init, opcode, open_flags};
use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::ops::{self, Init, Lock};
use rafsd_frontend::{Guest, Options};

const WHOLE: Lock = Lock {
    owner: 1,
    start: 0,
    end: i64::MAX as u64,
    kind: libc::F_WRLCK as u32,
    flock: false,
};

struct Sandbox {
    daemon: Daemon,
    guest: Guest,
    node: u64,
    fh: u64,
}

impl Sandbox {
    fn new(shared: &std::path::Path) -> Self {
        let daemon = Builder::new(RAFSD).unwrap().arg("--host-locks").start().unwrap();
        daemon.mount_passthrough(CONTAINERS, shared).unwrap();
        let guest = daemon.guest(Options::default()).unwrap();
        let node = guest.resolve(format!("{CONTAINERS}/file")).unwrap().nodeid;
        let fh = guest.open(node, open_flags::RDWR).unwrap();
        Self {
            daemon,
            guest,
            node,
            fh,
        }
    }

    fn request(&self, opcode: u32, lock: Lock) -> ops::Request {
        ops::lock(opcode, self.node, self.fh, &lock)
    }

    fn set(&self, lock: Lock) -> i32 {
        self.guest.errno(&self.request(opcode::SETLK, lock)).unwrap()
    }
}

#[test]
fn locks_hold_between_sandboxes() {
    let shared = tempfile::tempdir().unwrap();
    std::fs::write(shared.path().join("file"), b"x").unwrap();
    let (one, two) = (Sandbox::new(shared.path()), Sandbox::new(shared.path()));
    let flock = Lock { flock: true, ..WHOLE };
    for lock in [WHOLE, flock] {
        let threads = one.daemon.threads().unwrap();
        assert_eq!(one.set(lock), 0);
        assert_eq!(two.set(lock), libc::EAGAIN);
        let waits: Vec<_> = (10..30)
            .map(|owner| Lock { owner, ..lock })
            .map(|lock| one.guest.submit(&one.request(opcode::SETLKW, lock)).unwrap())
            .collect();
        let waits_there = two.guest.submit(&two.request(opcode::SETLKW, lock)).unwrap();
        // Neither guest is held up, and no thread was made for those who wait.
        for _ in 0..20 {
            one.guest.getattr(one.node).unwrap();
            two.guest.getattr(two.node).unwrap();
        }
        assert!(one.daemon.threads().unwrap() <= threads + 1);
        assert!(two.guest.poll(waits_there).unwrap().is_none());
        for wait in waits {
            one.guest.submit(&ops::interrupt(wait.unique)).unwrap();
            // Of one open file all flock locks are one.
            let expected = if lock.flock { 0 } else { libc::EINTR };
            assert_eq!(one.guest.wait(wait).unwrap().errno, expected);
        }
        let kind = libc::F_UNLCK as u32;
        assert_eq!(one.set(Lock { kind, ..lock }), 0);
        assert_eq!(two.guest.wait(waits_there).unwrap().errno, 0);
        assert_eq!(one.set(lock), libc::EAGAIN);
        assert_eq!(two.set(Lock { kind, ..lock }), 0);
    }
}

#[test]
fn a_machine_that_vanishes_leaves_no_lock() {
    let shared = tempfile::tempdir().unwrap();
    std::fs::write(shared.path().join("file"), b"x").unwrap();
    let (one, two) = (Sandbox::new(shared.path()), Sandbox::new(shared.path()));
    assert_eq!(one.set(WHOLE), 0);
    let wait = two.guest.submit(&two.request(opcode::SETLKW, WHOLE)).unwrap();
    drop(one.guest);
    assert_eq!(two.guest.wait(wait).unwrap().errno, 0);
    // The next machine on the same daemon is told so.
    let guest = one.daemon.guest(Options::default()).unwrap();
    let node = guest.resolve(format!("{CONTAINERS}/file")).unwrap().nodeid;
    let fh = guest.open(node, open_flags::RDWR).unwrap();
    let try_lock = ops::lock(opcode::SETLK, node, fh, &WHOLE);
    assert_eq!(guest.errno(&try_lock).unwrap(), libc::EAGAIN);
    drop(two.guest);
    let start = Instant::now();
    while guest.errno(&try_lock).unwrap() != 0 {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn guests_keep_their_locks_unless_the_daemon_was_told_otherwise() {
    let (_daemon, guest, _) = crate::support::passthrough();
    let flags = guest.init(&Init::default()).unwrap().flags;
    assert_eq!(flags & (init::POSIX_LOCKS | init::FLOCK_LOCKS), 0);
}

#[test]
fn each_mount_has_its_own_options_under_one_tag() {
    let builder = Builder::new(RAFSD).unwrap();
    let top = builder.directory().join("trees");
    for name in ["plain", "locked", "frozen", "cached"] {
        std::fs::create_dir_all(top.join(name)).unwrap();
        std::fs::write(top.join(name).join("file"), b"x").unwrap();
    }
    let daemon = builder.start().unwrap();
    daemon.mount_passthrough("/plain", &top.join("plain")).unwrap();
    for (name, config) in [
        ("locked", r#"{"locks": true, "cache": "never"}"#),
        ("frozen", r#"{"readonly": true, "unheard-of": 1}"#),
        ("cached", r#"{"cache": "always", "writeback": false}"#),
    ] {
        let tree = top.join(name);
        daemon
            .mount_passthrough_with(&format!("/{name}"), &tree, config)
            .unwrap();
    }
    let wrong = daemon.mount_passthrough_with("/wrong", &top, r#"{"cache": "perhaps"}"#);
    assert!(wrong.unwrap_err().to_string().contains("perhaps"));
    daemon.says("unheard-of").unwrap();

    let guest = daemon.guest(Options::default()).unwrap();
    let flags = guest.init(&Init::default()).unwrap().flags;
    assert_ne!(flags & init::POSIX_LOCKS, 0, "one tree wants them");
    let opened = |name: &str| {
        let entry = guest.resolve(format!("/{name}/file")).unwrap();
        let fh = guest.open(entry.nodeid, 0).unwrap();
        (entry, fh)
    };
    let file = |name: &str| std::fs::File::open(top.join(name).join("file")).unwrap();
    let flock = Lock { flock: true, ..WHOLE };
    for (name, on_host) in [("plain", false), ("locked", true), ("cached", false)] {
        let (entry, fh) = opened(name);
        let request = ops::lock(opcode::SETLK, entry.nodeid, fh, &flock);
        assert_eq!(guest.errno(&request).unwrap(), 0, "{name}");
        let held = rustix::fs::flock(file(name), rustix::fs::FlockOperation::NonBlockingLockShared).is_err();
        assert_eq!(held, on_host, "{name}");
    }
    let seconds = |name: &str| opened(name).0.entry_valid.0;
    assert_eq!((seconds("locked"), seconds("plain")), (0, 1));
    assert!(seconds("cached") > 1000);
    let frozen = guest.resolve("/frozen").unwrap().nodeid;
    assert_eq!(guest.errno(&ops::unlink(frozen, "file")).unwrap(), libc::EROFS);
    assert_eq!(
        guest
            .errno(&ops::open(opened("frozen").0.nodeid, open_flags::RDWR))
            .unwrap(),
        libc::EROFS
    );
}
