//! Locks through the device: on the host, between two guests and with the host's own processes; in memory where a
//! mount wants none of that. A lock that waits is parked, and everything that ends a wait ends it.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use passthrough::PassthroughFs;
use rafsd::mounts::{Instance, MountOptions};
use rafsd_frontend::abi::{init, opcode};
use rafsd_frontend::ops::{self, Init, Lock};
use rafsd_frontend::{Guest, Options, Ticket};
use rustix::fs::{FlockOperation, flock};

use crate::setup::Setup;
use crate::stub::Image;

const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;
const UNLOCK: u32 = libc::F_UNLCK as u32;
const RDWR: u32 = libc::O_RDWR as u32;

fn record(owner: u64, kind: u32, start: u64, end: u64) -> Lock {
    Lock {
        owner,
        start,
        end,
        kind,
        flock: false,
    }
}

fn whole(owner: u64, kind: u32) -> Lock {
    record(owner, kind, 0, i64::MAX as u64)
}

fn flocked(owner: u64, kind: u32) -> Lock {
    Lock {
        flock: true,
        ..whole(owner, kind)
    }
}

/// A file that a guest has open.
struct Open<'a> {
    guest: &'a Guest,
    node: u64,
    fh: u64,
}

impl<'a> Open<'a> {
    fn new(guest: &'a Guest, path: &str, flags: u32) -> Self {
        let node = guest.resolve(path).unwrap().nodeid;
        let fh = guest.open(node, flags).unwrap();
        Open { guest, node, fh }
    }

    fn set(&self, lock: &Lock) -> i32 {
        self.guest
            .errno(&ops::lock(opcode::SETLK, self.node, self.fh, lock))
            .unwrap()
    }

    fn wait_for(&self, lock: &Lock) -> Ticket {
        self.guest
            .submit(&ops::lock(opcode::SETLKW, self.node, self.fh, lock))
            .unwrap()
    }

    fn get(&self, lock: &Lock) -> (u64, u64, u32) {
        let body = self
            .guest
            .call(&ops::lock(opcode::GETLK, self.node, self.fh, lock))
            .unwrap();
        assert_eq!(body.len(), 24);
        let word = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().unwrap());
        (word(0), word(8), word(16) as u32)
    }

    fn flush(&self, owner: u64) {
        let mut request = ops::flush(self.node, self.fh);
        request.args[0][16..24].copy_from_slice(&owner.to_ne_bytes());
        self.guest.call(&request).unwrap();
    }

    fn release(&self) {
        self.guest.release(self.node, self.fh).unwrap();
    }
}

fn errno(guest: &Guest, ticket: Ticket) -> i32 {
    guest.wait(ticket).unwrap().errno
}

/// Waits until so many requests are parked on the device.
fn parked(setup: &Setup, count: usize) {
    let start = Instant::now();
    while setup.device.as_ref().unwrap().parked() != count {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "{} of {count} requests are parked",
            setup.device.as_ref().unwrap().parked()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn without_locks(setup: &Setup, path: &str, root: &Path) {
    let options = passthrough::Options {
        locks: false,
        ..passthrough::Options::new(root)
    };
    let fs = PassthroughFs::new(options).unwrap();
    setup
        .mounts
        .mount(path, Instance::Passthrough(Arc::new(fs)), MountOptions::default())
        .unwrap();
}

fn shared() -> (Setup, Guest) {
    let setup = Setup::new();
    let root = setup.host("/host", "host");
    std::fs::write(root.join("file"), b"contents").unwrap();
    let guest = setup.guest();
    (setup, guest)
}

fn flags(guest: &Guest) -> u64 {
    guest.init(&Init::default()).unwrap().flags
}

#[test]
fn locks_are_negotiated_if_one_mount_wants_them_on_the_host() {
    const LOCKS: u64 = init::POSIX_LOCKS | init::FLOCK_LOCKS;
    let setup = Setup::new();
    let root = setup.directory.path().join("tree");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("file"), b"x").unwrap();
    without_locks(&setup, "/plain", &root);
    let guest = setup.guest();
    assert_eq!(flags(&guest) & LOCKS, 0);
    let file = Open::new(&guest, "/plain/file", RDWR);
    assert_eq!(file.set(&whole(1, WRITE)), libc::EOPNOTSUPP);
    setup.host("/host", "host");
    assert_eq!(flags(&guest) & LOCKS, LOCKS);
    let offer = Init {
        flags: Init::default().flags & !init::FLOCK_LOCKS,
        ..Init::default()
    };
    assert_eq!(guest.init(&offer).unwrap().flags & LOCKS, init::POSIX_LOCKS);
    let file = Open::new(&guest, "/plain/file", RDWR);
    assert_eq!(file.set(&whole(1, WRITE)), 0);
    assert_eq!(file.set(&flocked(1, WRITE)), libc::EOPNOTSUPP);
}

#[test]
fn two_guests_exclude_each_other_and_the_host() {
    let (setup, one) = shared();
    let other = Setup::new();
    other.mount_host("/host", &setup.directory.path().join("host"), false);
    let two = other.guest();
    let (here, there) = (
        Open::new(&one, "/host/file", RDWR),
        Open::new(&two, "/host/file", RDWR),
    );
    assert_eq!(here.set(&record(1, WRITE, 10, 19)), 0);
    assert_eq!(there.set(&record(1, READ, 19, 30)), libc::EAGAIN);
    assert_eq!(there.set(&record(1, WRITE, 20, 30)), 0);
    assert_eq!(there.get(&record(1, WRITE, 0, 15)), (10, 19, WRITE));
    assert_eq!(here.get(&record(1, WRITE, 0, 15)).2, UNLOCK);

    // Another owner of the same guest.
    assert_eq!(here.set(&record(2, READ, 10, 10)), libc::EAGAIN);
    assert_eq!(here.set(&record(1, READ, 10, 19)), 0);
    assert_eq!(here.set(&record(2, READ, 10, 10)), 0);

    let waits = there.wait_for(&record(1, WRITE, 0, 9));
    assert_eq!(errno(&two, waits), 0, "nobody is in the way");
    let waits = there.wait_for(&record(1, WRITE, 10, 19));
    parked(&other, 1);
    assert_eq!(here.set(&record(1, UNLOCK, 0, 100)), 0);
    two.getattr(there.node).unwrap();
    assert!(two.poll(waits).unwrap().is_none(), "owner 2 still holds a byte");
    here.flush(2);
    assert_eq!(errno(&two, waits), 0);
    parked(&other, 0);

    let file = File::open(setup.directory.path().join("host/file")).unwrap();
    assert_eq!(here.set(&flocked(7, WRITE)), 0);
    assert_eq!(there.set(&flocked(8, READ)), libc::EAGAIN);
    assert!(flock(file.as_fd(), FlockOperation::NonBlockingLockShared).is_err());
    here.release();
    flock(file.as_fd(), FlockOperation::NonBlockingLockShared).unwrap();
    assert_eq!(there.set(&flocked(8, READ)), 0);
    let waits = there.wait_for(&flocked(8, WRITE));
    parked(&other, 1);
    drop(file);
    assert_eq!(errno(&two, waits), 0);
}

/// On the host and in memory: what a guest sees is the same.
fn each_kind(test: impl Fn(&Setup, &Guest, &str, bool)) {
    each_kind_with(Options::default(), test);
}

fn each_kind_with(options: Options, test: impl Fn(&Setup, &Guest, &str, bool)) {
    let setup = Setup::new();
    let root = setup.host("/host", "host");
    std::fs::write(root.join("file"), b"contents").unwrap();
    let plain = setup.directory.path().join("plain");
    std::fs::create_dir(&plain).unwrap();
    std::fs::write(plain.join("file"), b"contents").unwrap();
    without_locks(&setup, "/plain", &plain);
    setup
        .mounts
        .mount(
            "/image",
            Instance::Rafs(Arc::new(Image::default())),
            MountOptions::default(),
        )
        .unwrap();
    let guest = setup.guest_with(options);
    for (path, writable) in [
        ("/host/file", true),
        ("/plain/file", true),
        ("/image/file", false),
    ] {
        test(&setup, &guest, path, writable);
    }
}

fn open<'a>(guest: &'a Guest, path: &str, writable: bool) -> Open<'a> {
    Open::new(guest, path, if writable { RDWR } else { 0 })
}

#[test]
fn owners_exclude_each_other_on_every_kind_of_mount() {
    each_kind(|_, guest, path, writable| {
        let (a, b) = (open(guest, path, writable), open(guest, path, writable));
        assert_ne!(a.fh, b.fh, "{path}: handles tell the locks of open files apart");
        assert_eq!(a.set(&record(1, WRITE, 0, 9)), 0, "{path}");
        assert_eq!(b.set(&record(2, WRITE, 9, 12)), libc::EAGAIN, "{path}");
        assert_eq!(b.set(&record(2, READ, 10, 12)), 0, "{path}");
        assert_eq!(b.get(&record(2, READ, 0, 5)), (0, 9, WRITE), "{path}");
        assert_eq!(a.set(&record(1, UNLOCK, 3, 4)), 0, "{path}");
        assert_eq!(b.set(&record(2, WRITE, 3, 4)), 0, "{path}");
        assert_eq!(a.set(&record(1, WRITE, 8, 3)), libc::EINVAL, "{path}");
        assert_eq!(a.set(&record(1, 17, 0, 3)), libc::EINVAL, "{path}");
        assert_eq!(a.set(&flocked(3, WRITE)), 0, "{path}");
        assert_eq!(b.set(&flocked(4, READ)), libc::EAGAIN, "{path}");
        // Closing one descriptor of the file ends all record locks of its process; flock goes with the open file.
        b.flush(1);
        assert_eq!(b.set(&whole(2, WRITE)), 0, "{path}");
        assert_eq!(b.set(&flocked(4, READ)), libc::EAGAIN, "{path}");
        a.release();
        assert_eq!(b.set(&flocked(4, READ)), 0, "{path}");
        b.release();
        // A lock whose owner never sends a FLUSH (OFD) ends with its open file.
        let c = open(guest, path, writable);
        assert_eq!(c.set(&whole(9, WRITE)), 0, "{path}");
    });
}

#[test]
fn a_lock_that_waits_is_parked_and_granted_in_order() {
    each_kind(|setup, guest, path, writable| {
        let (a, b) = (open(guest, path, writable), open(guest, path, writable));
        for (first, lock) in [
            (whole(1, WRITE), record as fn(u64, u32, u64, u64) -> Lock),
            (flocked(1, WRITE), |owner, kind, _, _| flocked(owner, kind)),
        ] {
            assert_eq!(a.set(&first), 0);
            let readers: Vec<_> = (2..6).map(|owner| b.wait_for(&lock(owner, READ, 0, 9))).collect();
            parked(setup, 4);
            for _ in 0..50 {
                guest.getattr(a.node).unwrap();
            }
            assert!(
                readers
                    .iter()
                    .all(|ticket| guest.poll(*ticket).unwrap().is_none())
            );
            assert_eq!(
                a.set(&Lock {
                    kind: UNLOCK,
                    ..first
                }),
                0
            );
            for ticket in readers {
                assert_eq!(errno(guest, ticket), 0, "{path}");
            }
            parked(setup, 0);
            for owner in 2..6 {
                b.flush(owner);
            }
            if first.flock {
                b.release();
            }
        }
        a.release();
    });
}

#[test]
fn everything_that_ends_a_wait_ends_it() {
    each_kind(|setup, guest, path, writable| {
        let (a, b) = (open(guest, path, writable), open(guest, path, writable));
        assert_eq!(a.set(&whole(1, WRITE)), 0);
        // INTERRUPT.
        let waits = b.wait_for(&whole(2, WRITE));
        parked(setup, 1);
        guest.submit(&ops::interrupt(waits.unique + 1000)).unwrap();
        guest.submit(&ops::interrupt(waits.unique)).unwrap();
        assert_eq!(errno(guest, waits), libc::EINTR, "{path}");
        // The end of the file that it was asked through.
        let waits = b.wait_for(&whole(2, READ));
        parked(setup, 1);
        b.release();
        assert_eq!(errno(guest, waits), libc::EINTR, "{path}");
        // A stop of the ring; the lock was not taken and the holder keeps his.
        let b = open(guest, path, writable);
        let waits = b.wait_for(&whole(2, WRITE));
        parked(setup, 1);
        let bases = guest.stop().unwrap();
        guest.check_drained(&bases).unwrap();
        assert_eq!(errno(guest, waits), libc::EIO, "{path}");
        guest.start(&bases).unwrap();
        assert_eq!(b.set(&whole(2, READ)), libc::EAGAIN, "{path}");
        assert_eq!(a.set(&whole(1, UNLOCK)), 0, "{path}");
        assert_eq!(b.set(&whole(2, WRITE)), 0, "{path}");
        assert_eq!(b.set(&whole(2, UNLOCK)), 0, "{path}");
        a.release();
        b.release();
        parked(setup, 0);
    });
}

#[test]
fn an_unmount_ends_waits() {
    let (setup, guest) = shared();
    let (a, b) = (
        Open::new(&guest, "/host/file", RDWR),
        Open::new(&guest, "/host/file", RDWR),
    );
    assert_eq!(a.set(&whole(1, WRITE)), 0);
    let waits = b.wait_for(&whole(2, WRITE));
    parked(&setup, 1);
    let start = Instant::now();
    setup.mounts.umount("/host").unwrap();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(errno(&guest, waits), libc::ESTALE);
    assert_eq!(a.set(&whole(1, UNLOCK)), libc::ESTALE);
}

#[test]
fn a_lock_granted_during_a_pause_is_told_after_it() {
    let (setup, guest) = shared();
    let other = Setup::new();
    other.mount_host("/host", &setup.directory.path().join("host"), false);
    let two = other.guest();
    let (a, b) = (
        Open::new(&two, "/host/file", RDWR),
        Open::new(&guest, "/host/file", RDWR),
    );
    assert_eq!(a.set(&whole(1, WRITE)), 0);
    let waits = b.wait_for(&whole(1, WRITE));
    parked(&setup, 1);
    guest.pause().unwrap();
    let before = guest.snapshot();
    a.release();
    // Somebody has it again as soon as the paused guest's device has taken it.
    let a = Open::new(&two, "/host/file", RDWR);
    let start = Instant::now();
    while a.get(&whole(1, WRITE)).2 == UNLOCK {
        assert!(start.elapsed() < Duration::from_secs(60), "the lock is not taken");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(guest.changed_pages(&before), Vec::<u64>::new());
    guest.resume().unwrap();
    assert_eq!(errno(&guest, waits), 0);
}

#[test]
fn a_front_end_that_leaves_leaves_no_lock() {
    let (setup, guest) = shared();
    let other = Setup::new();
    other.mount_host("/host", &setup.directory.path().join("host"), false);
    let two = other.guest();
    let theirs = Open::new(&two, "/host/file", RDWR);
    {
        let a = Open::new(&guest, "/host/file", RDWR);
        assert_eq!(a.set(&record(1, WRITE, 0, 9)), 0);
        assert_eq!(a.set(&flocked(2, WRITE)), 0);
        // Waits for what the other guest holds, and must not get it when nobody is there any more.
        assert_eq!(theirs.set(&record(1, WRITE, 100, 109)), 0);
        a.wait_for(&record(3, WRITE, 100, 109));
        parked(&setup, 1);
    }
    let (record_lock, flock_lock) = (
        theirs.wait_for(&record(2, WRITE, 0, 9)),
        theirs.wait_for(&flocked(5, WRITE)),
    );
    parked(&other, 2);
    drop(guest);
    assert_eq!(errno(&two, record_lock), 0);
    assert_eq!(errno(&two, flock_lock), 0);
    assert_eq!(theirs.set(&record(1, UNLOCK, 0, 200)), 0);
    assert_eq!(theirs.set(&record(2, UNLOCK, 0, 200)), 0);
    let guest = setup.guest();
    parked(&setup, 0);
    assert_eq!(theirs.get(&record(9, WRITE, 0, 1000)).2, UNLOCK);
    drop(guest);
}

#[test]
fn a_new_session_starts_without_locks() {
    each_kind(|setup, guest, path, writable| {
        let a = open(guest, path, writable);
        assert_eq!(a.set(&whole(1, WRITE)), 0);
        let waits = a.wait_for(&whole(2, WRITE));
        parked(setup, 1);
        guest.init(&Init::default()).unwrap();
        assert_eq!(errno(guest, waits), libc::EINTR, "{path}");
        let b = open(guest, path, writable);
        assert_eq!(b.set(&whole(2, WRITE)), 0, "{path}");
        b.release();
    });
}

#[test]
fn waits_leave_room_in_the_queue_for_the_unlock() {
    let options = Options {
        queue_size: 64,
        ..Options::default()
    };
    each_kind_with(options, |_, guest, path, writable| {
        let (a, b) = (open(guest, path, writable), open(guest, path, writable));
        assert_eq!(a.set(&whole(1, WRITE)), 0);
        let waits: Vec<_> = (2..102).map(|owner| b.wait_for(&whole(owner, READ))).collect();
        assert_eq!(a.set(&whole(1, UNLOCK)), 0, "{path}: the queue is full of waits");
        let outcomes: Vec<i32> = waits.into_iter().map(|ticket| errno(guest, ticket)).collect();
        let granted = outcomes.iter().filter(|errno| **errno == 0).count();
        let refused = outcomes.iter().filter(|errno| **errno == libc::ENOLCK).count();
        assert_eq!((granted, refused), (16, 84), "{path}");
    });
}
