//! Record locks and flock, between owners of one guest, between guests, and with processes of the host.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::*;
use fuse_backend_rs::abi::fuse_abi::{FsOptions, LK_FLOCK};
use fuse_backend_rs::api::filesystem::{FileLock, FileSystem};
use rafsd_passthrough::{FdBudget, LockWait, Options, PassthroughFs};
use rustix::fs::FlockOperation;

const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;
const UNLOCK: u32 = libc::F_UNLCK as u32;
const END: u64 = i64::MAX as u64;

fn range(lock_type: u32, start: u64, end: u64) -> FileLock {
    FileLock {
        start,
        end,
        lock_type,
        pid: 0,
    }
}

struct Locked {
    share: Share,
    inode: u64,
    handle: u64,
}

impl Locked {
    fn new() -> Self {
        let share = Share::new();
        let (inode, handle) = share.create(ROOT, c"file");
        Locked { share, inode, handle }
    }

    fn set(&self, owner: u64, lock: FileLock) -> std::io::Result<()> {
        self.share
            .fs
            .setlk(&root(), self.inode, self.handle, owner, lock, 0)
    }

    fn get(&self, owner: u64, lock: FileLock) -> (u32, u64, u64, u32) {
        let found = self
            .share
            .fs
            .getlk(&root(), self.inode, self.handle, owner, lock, 0)
            .unwrap();
        (found.lock_type, found.start, found.end, found.pid)
    }

    fn later(
        &self,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> (Option<LockWait>, Receiver<std::io::Result<()>>) {
        let (send, receive) = channel();
        let done = Box::new(move |outcome| send.send(outcome).unwrap());
        (
            self.share
                .fs
                .set_lock_later(self.inode, handle, owner, lock, flags, done),
            receive,
        )
    }

    /// What a process of the host that asks for the lock would be told.
    fn host_may(&self, kind: i32, start: i64, len: i64) -> bool {
        let file = File::options()
            .read(true)
            .write(true)
            .open(self.share.path("file"))
            .unwrap();
        // SAFETY: the struct consists of integers only.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_start, lock.l_len) = (kind as i16, start, len);
        // SAFETY: the command reads and writes one flock, which is ours.
        let result = unsafe {
            libc::fcntl(
                std::os::fd::AsRawFd::as_raw_fd(&file),
                libc::F_OFD_GETLK,
                &mut lock,
            )
        };
        assert_eq!(result, 0);
        i32::from(lock.l_type) == libc::F_UNLCK
    }
}

fn soon<T>(receive: &Receiver<T>) -> T {
    receive.recv_timeout(Duration::from_secs(10)).expect("an outcome")
}

fn not_yet<T>(receive: &Receiver<T>) {
    assert!(
        receive.recv_timeout(Duration::from_millis(60)).is_err(),
        "decided too early"
    );
}

#[test]
fn owners_conflict_with_each_other_and_with_the_host() {
    let locked = Locked::new();
    locked.set(1, range(WRITE, 10, 19)).unwrap();
    assert_eq!(code(locked.set(2, range(READ, 19, 30))), libc::EAGAIN);
    locked.set(2, range(WRITE, 20, 29)).unwrap();
    locked.set(1, range(READ, 15, 19)).unwrap();
    locked.set(2, range(READ, 15, 19)).unwrap();
    assert!(!locked.host_may(libc::F_WRLCK, 15, 1) && locked.host_may(libc::F_RDLCK, 15, 1));
    assert!(!locked.host_may(libc::F_RDLCK, 10, 1));
    assert!(locked.host_may(libc::F_WRLCK, 30, 0));
    locked.set(1, range(UNLOCK, 0, END)).unwrap();
    assert!(locked.host_may(libc::F_WRLCK, 0, 15));
    locked.set(3, range(WRITE, 100, END)).unwrap();
    assert!(!locked.host_may(libc::F_WRLCK, 1 << 50, 1));
}

#[test]
fn whoever_holds_a_lock_is_told() {
    let locked = Locked::new();
    let lock = FileLock {
        pid: 42,
        ..range(WRITE, 10, 19)
    };
    locked.set(1, lock).unwrap();
    locked
        .set(
            2,
            FileLock {
                pid: 43,
                ..range(READ, 30, END)
            },
        )
        .unwrap();
    assert_eq!(locked.get(3, range(READ, 0, END)), (WRITE, 10, 19, 42));
    assert_eq!(locked.get(3, range(WRITE, 25, 50)), (READ, 30, END, 43));
    assert_eq!(locked.get(3, range(READ, 25, 50)).0, UNLOCK);
    assert_eq!(locked.get(1, range(WRITE, 0, 20)).0, UNLOCK);
    assert_eq!(locked.get(2, range(WRITE, 0, 20)), (WRITE, 10, 19, 42));
    let foreign = File::options()
        .write(true)
        .open(locked.share.path("file"))
        .unwrap();
    // SAFETY: the struct consists of integers only.
    let mut host: libc::flock = unsafe { std::mem::zeroed() };
    (host.l_type, host.l_start, host.l_len) = (libc::F_WRLCK as i16, 0, 5);
    // SAFETY: the command reads one flock, which is ours.
    let result = unsafe {
        libc::fcntl(
            std::os::fd::AsRawFd::as_raw_fd(&foreign),
            libc::F_OFD_SETLK,
            &mut host,
        )
    };
    assert_eq!(result, 0);
    assert_eq!(locked.get(1, range(READ, 0, 9)), (WRITE, 0, 4, 0));
    assert_eq!(code(locked.set(1, range(READ, 4, 4))), libc::EAGAIN);
}

#[test]
fn locks_end_with_flush_release_and_session() {
    let locked = Locked::new();
    let free = || locked.host_may(libc::F_WRLCK, 0, 0);
    let other = locked.share.open(locked.inode, libc::O_RDWR).unwrap();

    // Closing any descriptor of the file ends the locks of the process, and no others.
    locked.set(1, range(WRITE, 0, 9)).unwrap();
    locked.share.fs.flush(&root(), locked.inode, other, 2).unwrap();
    assert!(!free());
    locked.share.fs.flush(&root(), locked.inode, other, 1).unwrap();
    assert!(free());

    // The locks of an open file (OFD) end with it, without a FLUSH that names their owner.
    locked
        .share
        .fs
        .setlk(&root(), locked.inode, other, 7, range(WRITE, 0, 9), 0)
        .unwrap();
    locked.share.release(locked.inode, other);
    assert!(free());

    locked.set(1, range(WRITE, 0, 9)).unwrap();
    locked.share.fs.destroy();
    assert!(free());
}

#[test]
fn nonsense_is_refused() {
    let locked = Locked::new();
    assert_eq!(code(locked.set(1, range(WRITE, 10, 9))), libc::EINVAL);
    assert_eq!(
        code(locked.set(1, range(WRITE, u64::MAX, u64::MAX))),
        libc::EINVAL
    );
    assert_eq!(code(locked.set(1, range(9, 0, 1))), libc::EINVAL);
    locked.set(1, range(UNLOCK, 0, END)).unwrap();
    locked.set(1, range(WRITE, END, END)).unwrap();
    locked.set(1, range(WRITE, 0, u64::MAX)).unwrap();
    let stale = locked
        .share
        .fs
        .setlk(&root(), locked.inode, 999, 1, range(WRITE, 0, 1), 0);
    assert_eq!(code(stale), libc::EBADF);
    let (wait, outcome) = locked.later(999, 1, range(WRITE, 0, 1), 0);
    assert!(wait.is_none());
    assert_eq!(code(soon(&outcome)), libc::EBADF);
}

#[test]
fn a_waiting_lock_is_taken_when_it_is_given_up() {
    let locked = Locked::new();
    let (wait, outcome) = locked.later(locked.handle, 1, range(WRITE, 0, 9), 0);
    assert!(wait.is_none(), "nothing is in the way");
    soon(&outcome).unwrap();
    let (wait, second) = locked.later(locked.handle, 2, range(WRITE, 0, 9), 0);
    assert!(wait.is_some());
    let (_, third) = locked.later(locked.handle, 3, range(WRITE, 5, 20), 0);
    not_yet(&second);
    locked.set(1, range(UNLOCK, 0, END)).unwrap();
    soon(&second).unwrap();
    not_yet(&third);
    locked
        .share
        .fs
        .flush(&root(), locked.inode, locked.handle, 2)
        .unwrap();
    soon(&third).unwrap();
    assert!(!locked.host_may(libc::F_WRLCK, 20, 1));
    wait.unwrap().cancel();
    assert_eq!(
        code(locked.set(4, range(WRITE, 5, 20))),
        libc::EAGAIN,
        "a wait that is over cannot be cancelled"
    );
}

#[test]
fn a_lock_of_the_host_is_waited_for() {
    let locked = Locked::new();
    let foreign = File::options()
        .write(true)
        .open(locked.share.path("file"))
        .unwrap();
    rustix::fs::flock(&foreign, FlockOperation::LockExclusive).unwrap();
    let (wait, outcome) = locked.later(locked.handle, 1, range(WRITE, 0, END), LK_FLOCK);
    assert!(wait.is_some());
    not_yet(&outcome);
    rustix::fs::flock(&foreign, FlockOperation::Unlock).unwrap();
    soon(&outcome).unwrap();
    assert!(rustix::fs::flock(&foreign, FlockOperation::NonBlockingLockShared).is_err());
}

#[test]
fn a_wait_can_be_cancelled() {
    let locked = Locked::new();
    locked.set(1, range(WRITE, 0, 9)).unwrap();
    let (wait, outcome) = locked.later(locked.handle, 2, range(WRITE, 0, 9), 0);
    wait.as_ref().unwrap().cancel();
    assert_eq!(code(outcome.try_recv().unwrap()), libc::EINTR);
    wait.unwrap().cancel();
    // Given up by the first owner, the lock is free: nobody waits for it any more.
    locked.set(1, range(UNLOCK, 0, END)).unwrap();
    assert!(locked.host_may(libc::F_WRLCK, 0, 0));

    locked.set(1, range(WRITE, 0, 9)).unwrap();
    let other = locked.share.open(locked.inode, libc::O_RDWR).unwrap();
    let (_, released) = locked.later(other, 2, range(WRITE, 0, 9), 0);
    locked.share.release(locked.inode, other);
    assert_eq!(code(soon(&released)), libc::EINTR);
    let (_, destroyed) = locked.later(locked.handle, 2, range(WRITE, 0, 9), 0);
    locked.share.fs.destroy();
    assert_eq!(code(soon(&destroyed)), libc::EINTR);
}

#[test]
fn a_mount_that_goes_ends_all_waits() {
    let locked = Locked::new();
    locked.set(1, range(WRITE, 0, 9)).unwrap();
    let (_, outcome) = locked.later(locked.handle, 2, range(WRITE, 0, 9), 0);
    drop(locked);
    assert_eq!(code(soon(&outcome)), libc::EINTR);
}

#[test]
fn flock_belongs_to_the_open_file() {
    let locked = Locked::new();
    let other = locked.share.open(locked.inode, libc::O_RDWR).unwrap();
    let flock = |handle, kind| {
        locked
            .share
            .fs
            .setlk(&root(), locked.inode, handle, 1, range(kind, 0, END), LK_FLOCK)
    };
    flock(locked.handle, READ).unwrap();
    flock(other, READ).unwrap();
    assert_eq!(code(flock(other, WRITE)), libc::EAGAIN);
    let (wait, outcome) = locked.later(other, 1, range(WRITE, 0, END), LK_FLOCK);
    assert!(wait.is_some());
    not_yet(&outcome);
    locked.share.release(locked.inode, locked.handle);
    soon(&outcome).unwrap();
    let host = File::open(locked.share.path("file")).unwrap();
    assert!(rustix::fs::flock(&host, FlockOperation::NonBlockingLockShared).is_err());
    flock(other, UNLOCK).unwrap();
    rustix::fs::flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert_eq!(code(flock(other, 9)), libc::EINVAL);
}

#[test]
fn the_trait_waits_in_place() {
    let locked = Locked::new();
    locked.set(1, range(WRITE, 0, 9)).unwrap();
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            locked.set(1, range(UNLOCK, 0, END)).unwrap();
        });
        locked
            .share
            .fs
            .setlkw(&root(), locked.inode, locked.handle, 2, range(WRITE, 0, 9), 0)
            .unwrap();
    });
    assert!(started.elapsed() >= Duration::from_millis(100));
}

#[test]
fn owners_are_bounded_and_given_back() {
    let share = Share::with(|options| options.budget = Some(FdBudget::new(16)));
    let (inode, handle) = share.create(ROOT, c"file");
    let set = |owner, kind| {
        share
            .fs
            .setlk(&root(), inode, handle, owner, range(kind, owner, owner), 0)
    };
    let refused = (1..100).find_map(|owner| set(owner, WRITE).err()).unwrap();
    assert_eq!(refused.raw_os_error(), Some(libc::ENOLCK));
    let before = share.fs.budget().used();
    for owner in 1..100 {
        share.fs.flush(&root(), inode, handle, owner).ok();
    }
    assert!(share.fs.budget().used() < before - 8);
}

#[test]
fn too_many_waits_are_refused() {
    let locked = Locked::new();
    locked.set(1, range(WRITE, 0, 9)).unwrap();
    let waits: Vec<_> = (0..1024)
        .map(|i| locked.later(locked.handle, i + 2, range(WRITE, 0, 9), 0))
        .collect();
    assert!(waits.iter().all(|(wait, _)| wait.is_some()));
    let (wait, outcome) = locked.later(locked.handle, 5000, range(WRITE, 0, 9), 0);
    assert!(wait.is_none());
    assert_eq!(code(soon(&outcome)), libc::ENOLCK);
    for (wait, outcome) in waits {
        wait.unwrap().cancel();
        assert_eq!(code(soon(&outcome)), libc::EINTR);
    }
}

#[test]
fn locks_can_be_switched_off() {
    let share = Share::with(|options| options.locks = false);
    let (inode, handle) = share.create(ROOT, c"file");
    let set = share.fs.setlk(&root(), inode, handle, 1, range(WRITE, 0, 9), 0);
    assert_eq!(code(set), libc::EOPNOTSUPP);
}

#[test]
fn a_read_only_mount_still_locks_for_reading() {
    let share = Share::with(|options| options.read_only = true);
    std::fs::write(share.path("file"), b"x").unwrap();
    let inode = share.lookup(ROOT, c"file").unwrap().inode;
    let handle = share.open(inode, libc::O_RDONLY).unwrap();
    share
        .fs
        .setlk(&root(), inode, handle, 1, range(READ, 0, 9), 0)
        .unwrap();
    assert_eq!(
        code(share.fs.setlk(&root(), inode, handle, 1, range(WRITE, 0, 9), 0)),
        libc::EBADF
    );
}

#[test]
fn a_mount_may_end_with_its_last_waiting_request() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, b"x").unwrap();
    let fs = Arc::new(PassthroughFs::new(Options::new(dir.path())).unwrap());
    fs.init(FsOptions::all()).unwrap();
    let inode = fs.lookup(&root(), ROOT, c"file").unwrap().inode;
    let handle = fs
        .open(&root(), inode, libc::O_RDWR as u32, 0)
        .unwrap()
        .0
        .unwrap();
    let host = File::open(&path).unwrap();
    rustix::fs::flock(&host, FlockOperation::LockExclusive).unwrap();
    let (send, receive) = channel();
    let kept = Arc::clone(&fs);
    // Called by the thread that the mount waits for when it ends.
    let done = Box::new(move |outcome: std::io::Result<()>| {
        drop(kept);
        send.send(outcome).unwrap();
    });
    let wait = fs.set_lock_later(inode, handle, 1, range(WRITE, 0, END), LK_FLOCK, done);
    assert!(wait.is_some());
    drop(fs);
    rustix::fs::flock(&host, FlockOperation::Unlock).unwrap();
    soon(&receive).unwrap();
}

#[test]
fn owners_that_wait_for_each_other_are_told_of_the_deadlock() {
    let locked = Locked::new();
    for (owner, at) in [(1, 10), (2, 20), (3, 30)] {
        locked.set(owner, range(WRITE, at, at + 9)).unwrap();
    }
    // A circle of three: the one that would close it is told, nobody else.
    let (_, first) = locked.later(locked.handle, 1, range(READ, 25, 25), 0);
    let (_, second) = locked.later(locked.handle, 2, range(WRITE, 30, END), 0);
    not_yet(&first);
    let (wait, third) = locked.later(locked.handle, 3, range(WRITE, 15, 15), 0);
    assert!(wait.is_none());
    assert_eq!(code(soon(&third)), libc::EDEADLK);
    // It still holds its lock, and may wait for somebody outside of the circle.
    assert_eq!(code(locked.set(4, range(READ, 30, 30))), libc::EAGAIN);
    locked.set(5, range(WRITE, 50, 50)).unwrap();
    let (wait, fourth) = locked.later(locked.handle, 3, range(WRITE, 50, 50), 0);
    assert!(wait.is_some());
    // When it gives way, those that wait get what they want, in turn.
    locked.set(3, range(UNLOCK, 0, 49)).unwrap();
    not_yet(&second);
    locked.set(5, range(UNLOCK, 0, END)).unwrap();
    soon(&second).unwrap();
    not_yet(&fourth);
    locked.set(2, range(UNLOCK, 0, END)).unwrap();
    soon(&first).unwrap();
    soon(&fourth).unwrap();
}

#[test]
fn a_lock_that_is_made_stronger_by_two_is_a_deadlock() {
    let locked = Locked::new();
    locked.set(1, range(READ, 0, 9)).unwrap();
    locked.set(2, range(READ, 0, 9)).unwrap();
    let (wait, first) = locked.later(locked.handle, 1, range(WRITE, 0, 9), 0);
    assert!(wait.is_some());
    let (_, second) = locked.later(locked.handle, 2, range(WRITE, 5, 5), 0);
    assert_eq!(code(soon(&second)), libc::EDEADLK);
    locked.set(2, range(UNLOCK, 0, 9)).unwrap();
    soon(&first).unwrap();
}

#[test]
fn locks_are_bounded() {
    let locked = Locked::new();
    let refused = (0..8193).find_map(|at| locked.set(1, range(WRITE, at * 2, at * 2)).err());
    assert_eq!(refused.unwrap().raw_os_error(), Some(libc::ENOLCK));
    // What makes no more of them goes on, what would split one does not.
    locked.set(1, range(UNLOCK, 2, 2)).unwrap();
    locked.set(1, range(WRITE, 90_000, 90_009)).unwrap();
    assert_eq!(code(locked.set(1, range(UNLOCK, 90_005, 90_005))), libc::ENOLCK);
    locked.set(1, range(UNLOCK, 0, END)).unwrap();
    locked.set(2, range(WRITE, 0, END)).unwrap();
}
