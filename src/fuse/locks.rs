//! Locks among the processes of one guest, for files whose locks do not go to the host.
//!
//! Linux asks the device for every lock or for none, as INIT settled it. So where one host tree wants its locks on the
//! host, those of images, and of host trees that want none, are kept here: in memory, for the one guest, with the rules
//! of Linux. A record lock (POSIX or OFD) belongs to an owner, a number of the guest; FLUSH ends the locks of its
//! owner on the file, RELEASE those that were made through the handle. A flock lock belongs to an owner, too, who
//! stands for an open file. Owners of record locks that would wait for each other are told of the deadlock.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use fuse_backend_rs::api::filesystem::FileLock;
use parking_lot::Mutex;
use passthrough::LockDone;
use passthrough::ranges::{RangeLock, RangeLocks, is_circular};

use super::errno::Errno;

/// Locks at most; further ones are answered ENOLCK.
const LIMIT: usize = 4096;

/// Who asks for what.
#[derive(Clone, Copy)]
pub struct Wanted {
    /// The file.
    pub nodeid: u64,
    /// The handle that the request came with.
    pub fh: u64,
    /// The guest's number of the owner.
    pub owner: u64,
    /// Range and kind; a flock lock has no range.
    pub lock: FileLock,
    /// A flock lock.
    pub flock: bool,
}

/// The locks of one file. The two kinds do not see each other.
#[derive(Default)]
struct File {
    ranges: RangeLocks,
    flocks: RangeLocks,
}

impl File {
    fn of(&self, flock: bool) -> &RangeLocks {
        match flock {
            true => &self.flocks,
            false => &self.ranges,
        }
    }

    fn of_mut(&mut self, flock: bool) -> &mut RangeLocks {
        match flock {
            true => &mut self.flocks,
            false => &mut self.ranges,
        }
    }

    fn count(&self) -> usize {
        self.ranges.len() + self.flocks.len()
    }
}

struct Waiter {
    id: u64,
    wanted: Wanted,
    done: LockDone,
}

#[derive(Default)]
struct State {
    files: HashMap<u64, File>,
    waiting: Vec<Waiter>,
    next_waiter: u64,
    held: usize,
}

/// Outcomes to be told when no lock of ours is held.
type Decided = Vec<(LockDone, io::Result<()>)>;

/// The table.
#[derive(Default)]
pub struct GuestLocks {
    state: Mutex<State>,
    /// Locks held and waited for, so that closing a file costs nothing where nobody locks anything.
    busy: AtomicUsize,
}

/// What `wanted` asks for: a lock, or none for unlocking.
fn parse(wanted: &Wanted) -> Result<(RangeLock, bool), Errno> {
    let (start, end) = match wanted.flock {
        true => (0, u64::MAX),
        false => (wanted.lock.start, wanted.lock.end),
    };
    if start > end || start > i64::MAX as u64 && !wanted.flock {
        return Err(Errno::INVAL);
    }
    let (exclusive, unlock) = match i32::try_from(wanted.lock.lock_type) {
        Ok(libc::F_RDLCK) => (false, false),
        Ok(libc::F_WRLCK) => (true, false),
        Ok(libc::F_UNLCK) => (false, true),
        _ => return Err(Errno::INVAL),
    };
    let held = RangeLock {
        owner: wanted.owner,
        handle: wanted.fh,
        start,
        end,
        exclusive,
        pid: wanted.lock.pid,
    };
    Ok((held, unlock))
}

impl State {
    fn set(&mut self, wanted: &Wanted) -> Result<(), Errno> {
        let (new, unlock) = parse(wanted)?;
        if unlock && !self.files.contains_key(&wanted.nodeid) {
            return Ok(());
        }
        let file = self.files.entry(wanted.nodeid).or_default();
        let before = file.count();
        let list = file.of_mut(wanted.flock);
        let result = if unlock {
            list.give_up(new.owner, new.start, new.end);
            Ok(())
        } else if list.in_the_way_of(new).next().is_some() {
            Err(Errno::AGAIN)
        } else if self.held >= LIMIT {
            Err(Errno::NOLCK)
        } else {
            list.take(new);
            Ok(())
        };
        self.held = self.held + file.count() - before;
        if file.count() == 0 {
            self.files.remove(&wanted.nodeid);
        }
        result
    }

    /// Takes locks away from a file.
    fn drop_locks(&mut self, nodeid: u64, ends: impl Fn(&RangeLock, bool) -> bool) {
        let Some(file) = self.files.get_mut(&nodeid) else {
            return;
        };
        let before = file.count();
        file.ranges.retain(|held| !ends(held, false));
        file.flocks.retain(|held| !ends(held, true));
        self.held -= before - file.count();
        if file.count() == 0 {
            self.files.remove(&nodeid);
        }
    }

    /// Adds the owners who hold what `wanted` waits for to `holders`.
    fn in_the_way_of(&self, wanted: &Wanted, holders: &mut BTreeSet<u64>) {
        if let (Some(file), Ok((lock, _))) = (self.files.get(&wanted.nodeid), parse(wanted)) {
            holders.extend(file.ranges.in_the_way_of(lock).map(|held| held.owner));
        }
    }

    /// Whether `wanted` would wait for its own owner.
    fn is_deadlock(&self, wanted: &Wanted) -> bool {
        if wanted.flock {
            return false;
        }
        let mut holders = BTreeSet::new();
        self.in_the_way_of(wanted, &mut holders);
        is_circular(wanted.owner, holders, |owner, holders| {
            let all = self.waiting.iter().map(|waiter| &waiter.wanted);
            let of_owner = all.filter(|wanted| wanted.owner == owner && !wanted.flock);
            of_owner.map(|wanted| self.in_the_way_of(wanted, holders)).count()
        })
    }

    /// Grants what has become free of a file, oldest first.
    fn grant(&mut self, nodeid: u64) -> Decided {
        let mut decided = Vec::new();
        for waiter in std::mem::take(&mut self.waiting) {
            if waiter.wanted.nodeid != nodeid {
                self.waiting.push(waiter);
                continue;
            }
            match self.set(&waiter.wanted) {
                Err(Errno::AGAIN) => self.waiting.push(waiter),
                result => decided.push((waiter.done, result.map_err(io_error))),
            }
        }
        decided
    }

    fn cancel(&mut self, ends: impl Fn(&Waiter) -> bool) -> Decided {
        self.waiting
            .extract_if(.., |waiter| ends(waiter))
            .map(|waiter| (waiter.done, Err(io::Error::from_raw_os_error(libc::EINTR))))
            .collect()
    }
}

fn io_error(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno.get())
}

impl GuestLocks {
    /// Does `change` and tells those whom it decided.
    fn with<T>(&self, change: impl FnOnce(&mut State) -> (T, Decided)) -> T {
        let (value, decided) = {
            let mut state = self.state.lock();
            let result = change(&mut state);
            self.busy
                .store(state.held + state.waiting.len(), Ordering::SeqCst);
            result
        };
        for (done, outcome) in decided {
            done(outcome);
        }
        value
    }

    /// GETLK: what is in the way of a lock, or a lock of type F_UNLCK.
    pub fn get(&self, wanted: &Wanted) -> Result<FileLock, Errno> {
        let (new, _) = parse(wanted)?;
        let state = self.state.lock();
        let list = state.files.get(&wanted.nodeid).map(|file| file.of(wanted.flock));
        let in_the_way = list.and_then(|list| list.in_the_way_of(new).next().copied());
        Ok(match in_the_way {
            None => FileLock {
                lock_type: libc::F_UNLCK as u32,
                ..wanted.lock
            },
            Some(held) => FileLock {
                start: held.start,
                end: held.end,
                lock_type: if held.exclusive {
                    libc::F_WRLCK
                } else {
                    libc::F_RDLCK
                } as u32,
                pid: held.pid,
            },
        })
    }

    /// SETLK. EAGAIN: somebody else holds the lock.
    pub fn set(&self, wanted: &Wanted) -> Result<(), Errno> {
        self.with(|state| {
            let result = state.set(wanted);
            // An exclusive lock may have become a shared one.
            (result, state.grant(wanted.nodeid))
        })
    }

    /// SETLKW: takes the lock now or later and says so by `done`. Returns the number to [cancel](Self::cancel) by if it
    /// is to be later.
    pub fn set_later(&self, wanted: &Wanted, done: LockDone) -> Option<u64> {
        self.with(|state| match state.set(wanted) {
            Err(Errno::AGAIN) if state.is_deadlock(wanted) => (
                None,
                vec![(done, Err(io::Error::from_raw_os_error(libc::EDEADLK)))],
            ),
            Err(Errno::AGAIN) => {
                state.next_waiter += 1;
                let id = state.next_waiter;
                state.waiting.push(Waiter {
                    id,
                    wanted: *wanted,
                    done,
                });
                (Some(id), Vec::new())
            }
            result => {
                let mut decided = vec![(done, result.map_err(io_error))];
                decided.extend(state.grant(wanted.nodeid));
                (None, decided)
            }
        })
    }

    /// Ends the wait of a request with EINTR, unless it is over.
    pub fn cancel(&self, id: u64) {
        self.with(|state| ((), state.cancel(|waiter| waiter.id == id)));
    }

    /// FLUSH: the owner's record locks on the file end.
    pub fn flush(&self, nodeid: u64, owner: u64) {
        self.drop_locks(nodeid, |held, flock| !flock && held.owner == owner, |_| false);
    }

    /// RELEASE: what was locked through the handle is free, and nobody waits for it.
    pub fn release(&self, nodeid: u64, fh: u64) {
        self.drop_locks(nodeid, |held, _| held.handle == fh, |wanted| wanted.fh == fh);
    }

    fn drop_locks(
        &self,
        nodeid: u64,
        ends: impl Fn(&RangeLock, bool) -> bool,
        gives_up: impl Fn(&Wanted) -> bool,
    ) {
        if self.busy.load(Ordering::SeqCst) == 0 {
            return;
        }
        self.with(|state| {
            state.drop_locks(nodeid, ends);
            let mut decided =
                state.cancel(|waiter| waiter.wanted.nodeid == nodeid && gives_up(&waiter.wanted));
            decided.extend(state.grant(nodeid));
            ((), decided)
        });
    }

    /// The guest is gone: no lock is left and nobody waits.
    pub fn clear(&self) {
        self.with(|state| {
            state.files.clear();
            state.held = 0;
            ((), state.cancel(|_| true))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const READ: u32 = libc::F_RDLCK as u32;
    const WRITE: u32 = libc::F_WRLCK as u32;
    const UNLOCK: u32 = libc::F_UNLCK as u32;

    fn wanted(owner: u64, lock_type: u32, start: u64, end: u64) -> Wanted {
        let lock = FileLock {
            start,
            end,
            lock_type,
            pid: owner as u32,
        };
        Wanted {
            nodeid: 1,
            fh: owner * 100,
            owner,
            lock,
            flock: false,
        }
    }

    fn later(locks: &GuestLocks, wanted: &Wanted) -> (Option<u64>, Arc<Mutex<Option<i32>>>) {
        let told = Arc::new(Mutex::new(None));
        let tell = Arc::clone(&told);
        let done = Box::new(move |outcome: io::Result<()>| {
            let code = outcome.map_or_else(|e| e.raw_os_error().unwrap(), |()| 0);
            assert_eq!(tell.lock().replace(code), None, "told twice");
        });
        (locks.set_later(wanted, done), told)
    }

    #[test]
    fn owners_exclude_each_other_where_they_overlap() {
        let locks = GuestLocks::default();
        locks.set(&wanted(1, WRITE, 10, 19)).unwrap();
        assert_eq!(locks.set(&wanted(2, READ, 19, 30)), Err(Errno::AGAIN));
        locks.set(&wanted(2, READ, 20, 30)).unwrap();
        locks.set(&wanted(3, READ, 25, 40)).unwrap();
        assert_eq!(locks.set(&wanted(1, WRITE, 30, 30)), Err(Errno::AGAIN));
        let found = locks.get(&wanted(4, WRITE, 0, 12)).unwrap();
        assert_eq!(
            (found.start, found.end, found.lock_type, found.pid),
            (10, 19, WRITE, 1)
        );
        assert_eq!(locks.get(&wanted(1, WRITE, 0, 19)).unwrap().lock_type, UNLOCK);
        assert_eq!(locks.set(&wanted(1, WRITE, 9, 8)), Err(Errno::INVAL));
        assert_eq!(locks.set(&wanted(1, 7, 0, 8)), Err(Errno::INVAL));
    }

    #[test]
    fn a_range_is_split_and_joined() {
        let locks = GuestLocks::default();
        locks.set(&wanted(1, WRITE, 0, 99)).unwrap();
        locks.set(&wanted(1, UNLOCK, 40, 49)).unwrap();
        locks.set(&wanted(2, WRITE, 40, 49)).unwrap();
        assert_eq!(locks.set(&wanted(2, WRITE, 39, 39)), Err(Errno::AGAIN));
        assert_eq!(locks.set(&wanted(2, WRITE, 50, 50)), Err(Errno::AGAIN));
        locks.set(&wanted(2, UNLOCK, 0, u64::MAX)).unwrap();
        locks.set(&wanted(1, WRITE, 40, 49)).unwrap();
        assert_eq!(locks.state.lock().held, 1, "the three parts are one again");
        locks.set(&wanted(1, READ, 0, 99)).unwrap();
        locks.set(&wanted(2, READ, 5, 5)).unwrap();
        locks.flush(1, 1);
        locks.flush(1, 2);
        assert_eq!(locks.state.lock().files.len(), 0);
        assert_eq!(locks.busy.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn flock_and_record_locks_do_not_see_each_other() {
        let locks = GuestLocks::default();
        let flock = |owner, kind| Wanted {
            flock: true,
            ..wanted(owner, kind, 7, 3)
        };
        locks.set(&wanted(1, WRITE, 0, u64::MAX)).unwrap();
        locks.set(&flock(2, WRITE)).unwrap();
        assert_eq!(locks.set(&flock(3, READ)), Err(Errno::AGAIN));
        locks.flush(1, 2);
        assert_eq!(
            locks.set(&flock(3, READ)),
            Err(Errno::AGAIN),
            "FLUSH is about record locks"
        );
        locks.set(&flock(2, READ)).unwrap();
        locks.set(&flock(3, READ)).unwrap();
        locks.release(1, 200);
        locks.set(&flock(3, WRITE)).unwrap();
    }

    #[test]
    fn those_who_wait_are_told_once() {
        let locks = GuestLocks::default();
        locks.set(&wanted(1, WRITE, 0, 9)).unwrap();
        let (id, second) = later(&locks, &wanted(2, READ, 0, 9));
        let (_, third) = later(&locks, &wanted(3, READ, 5, 9));
        let (_, fourth) = later(&locks, &wanted(4, WRITE, 9, 9));
        let (now, at_once) = later(&locks, &wanted(5, WRITE, 10, 10));
        assert!(now.is_none() && *at_once.lock() == Some(0));
        locks.set(&wanted(1, READ, 0, 9)).unwrap();
        assert_eq!(
            (*second.lock(), *third.lock(), *fourth.lock()),
            (Some(0), Some(0), None)
        );
        locks.cancel(id.unwrap());
        locks.release(1, 400);
        assert_eq!(*fourth.lock(), Some(libc::EINTR));
        let (_, fifth) = later(&locks, &wanted(6, WRITE, 0, 0));
        locks.clear();
        assert_eq!(*fifth.lock(), Some(libc::EINTR));
        locks.set(&wanted(7, WRITE, 0, u64::MAX)).unwrap();
    }

    #[test]
    fn owners_that_wait_for_each_other_are_told_of_the_deadlock() {
        let locks = GuestLocks::default();
        locks.set(&wanted(1, WRITE, 0, 9)).unwrap();
        locks.set(&wanted(2, WRITE, 10, 19)).unwrap();
        let (_, first) = later(&locks, &wanted(1, READ, 5, 15));
        let (id, second) = later(&locks, &wanted(2, WRITE, 0, 0));
        assert!(id.is_none() && *second.lock() == Some(libc::EDEADLK));
        // What flock locks wait for is no concern of record locks.
        let flock = |owner, kind| Wanted {
            flock: true,
            ..wanted(owner, kind, 0, 0)
        };
        locks.set(&flock(2, WRITE)).unwrap();
        let (id, third) = later(&locks, &flock(1, WRITE));
        assert!(id.is_some());
        locks.set(&wanted(2, UNLOCK, 0, u64::MAX)).unwrap();
        assert_eq!((*first.lock(), *third.lock()), (Some(0), None));
    }

    #[test]
    fn memory_is_bounded() {
        let locks = GuestLocks::default();
        for number in 0..LIMIT as u64 {
            locks
                .set(&wanted(number % 16, READ, number * 2, number * 2))
                .unwrap();
        }
        assert_eq!(locks.set(&wanted(1 << 40, READ, 0, 0)), Err(Errno::NOLCK));
        locks.set(&wanted(5, UNLOCK, 0, u64::MAX)).unwrap();
        locks.set(&wanted(1 << 40, READ, 0, 0)).unwrap();
    }
}
