//! Locks of the guest's processes, held on the host's files.
//!
//! A record lock (POSIX or OFD) belongs to an owner, a number that the guest chooses; on the host it is an OFD lock of
//! an open file that exists for this owner alone, so that owners conflict with each other and with the host's processes
//! as they would on a disk, and closing that open file drops all that the owner holds. A guest says when: FLUSH comes
//! with the owner whose record locks on the file end, RELEASE ends those that were made through the handle. A flock
//! lock belongs to the guest's open file, which is our handle.
//!
//! Waiting costs no thread per lock. A request that must wait is put on a list; one thread tries the list again, in
//! order, whenever this guest gives a lock up, and every few milliseconds while locks of others may be in the way: the
//! host has no call that waits for a lock and can be told to stop. Owners of record locks that would wait for each
//! other are told of the deadlock, for which what each holds is kept in memory as well: the host does not know who waits,
//! nor does it tell whose an OFD lock is.

pub mod ranges;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::LK_FLOCK;
use fuse_backend_rs::api::filesystem::FileLock;
use parking_lot::{Condvar, Mutex};
use rustix::fs::{FlockOperation, OFlags};

use crate::config::ThreadStart;
use crate::handle::Handle;
use crate::inode::{FdBudget, Permit};
use crate::proc::ProcFd;
use crate::sys::{self, errno};
use ranges::{RangeLock, RangeLocks, is_circular};

/// How often a waiting lock is tried that somebody outside this mount may hold.
const RETRY: Duration = Duration::from_millis(10);
/// Requests that may wait at a time; a further one is answered ENOLCK.
const WAITING_MAX: usize = 1024;
/// Record locks at a time; what would make more is answered ENOLCK. The host goes through all of a file for each new one.
const RANGES_MAX: usize = 8192;

/// Called exactly once with the outcome of a lock request.
pub type LockDone = Box<dyn FnOnce(io::Result<()>) + Send>;

/// What a lock request asks for, and for whom.
#[derive(Clone)]
pub(crate) struct LockRequest {
    /// Node, and the handle on it that the request came with.
    pub(crate) inode: u64,
    pub(crate) handle_id: u64,
    pub(crate) handle: Arc<Handle>,
    /// The guest's number for whoever owns record locks.
    pub(crate) owner: u64,
    pub(crate) lock: FileLock,
    pub(crate) flags: u32,
}

impl LockRequest {
    /// The range in the host's terms. EINVAL: it has no bytes, or starts beyond the largest file.
    fn range(&self) -> io::Result<libc::flock64> {
        let invalid = || errno(libc::EINVAL);
        let start = i64::try_from(self.lock.start).map_err(|_| invalid())?;
        // The guest's largest offset means "to the end, however far that moves"; length 0 does on the host.
        let last = i64::try_from(self.lock.end).unwrap_or(i64::MAX);
        let length = match last {
            i64::MAX => 0,
            last if last >= start => last - start + 1,
            _ => return Err(invalid()),
        };
        match i32::try_from(self.lock.lock_type) {
            Ok(kind @ (libc::F_RDLCK | libc::F_WRLCK | libc::F_UNLCK)) => {
                Ok(sys::range_lock(kind, start, length))
            }
            _ => Err(invalid()),
        }
    }

    /// The range as it is kept in memory.
    fn held(&self) -> RangeLock {
        RangeLock {
            owner: self.owner,
            handle: self.handle_id,
            start: self.lock.start,
            end: self.lock.end.min(i64::MAX as u64),
            exclusive: self.lock.lock_type == libc::F_WRLCK as u32,
            pid: self.lock.pid,
        }
    }

    fn is_flock(&self) -> bool {
        self.flags & LK_FLOCK != 0
    }

    fn unlocks(&self) -> bool {
        self.lock.lock_type == libc::F_UNLCK as u32
    }
}

/// The open file of one owner of record locks on one node.
#[derive(Debug)]
struct Owner {
    id: u64,
    file: OwnedFd,
    _permit: Permit,
    /// The handle that the owner's first lock was made through.
    through: u64,
}

/// The record locks of one node.
#[derive(Debug, Default)]
struct NodeLocks {
    owners: Vec<Owner>,
    held: RangeLocks,
}

impl NodeLocks {
    fn owner(&self, id: u64) -> Option<&Owner> {
        self.owners.iter().find(|owner| owner.id == id)
    }
}

/// Record locks, by node, and how many there are.
#[derive(Debug, Default)]
struct Records {
    nodes: HashMap<u64, NodeLocks>,
    count: usize,
}

impl Records {
    /// Keeps in mind what the host has granted or taken back.
    fn enter(&mut self, request: &LockRequest) {
        let Some(node) = self.nodes.get_mut(&request.inode) else {
            return;
        };
        let before = node.held.len();
        apply(&mut node.held, request);
        self.count = self.count + node.held.len() - before;
    }

    /// Whether there is room for what `request` would leave.
    fn has_room(&self, request: &LockRequest) -> bool {
        if self.count < RANGES_MAX {
            return true;
        }
        let Some(node) = self.nodes.get(&request.inode) else {
            return false;
        };
        let mut after = node.held.clone();
        apply(&mut after, request);
        after.len() <= node.held.len()
    }

    /// Adds the owners who hold what `request` waits for to `holders`.
    fn in_the_way_of(&self, request: &LockRequest, holders: &mut BTreeSet<u64>) {
        if let Some(node) = self.nodes.get(&request.inode) {
            let held = node.held.in_the_way_of(request.held());
            holders.extend(held.map(|held| held.owner));
        }
    }

    /// Whether `request` would wait for its own owner, given those that wait already.
    fn is_deadlock(&self, request: &LockRequest, waiting: &[Waiter]) -> bool {
        if request.is_flock() {
            return false;
        }
        let mut holders = BTreeSet::new();
        self.in_the_way_of(request, &mut holders);
        is_circular(request.owner, holders, |owner, holders| {
            let of_owner = |waiter: &&Waiter| waiter.request.owner == owner && !waiter.request.is_flock();
            let waits = waiting.iter().filter(of_owner);
            waits
                .map(|waiter| self.in_the_way_of(&waiter.request, holders))
                .count()
        })
    }
}

fn apply(held: &mut RangeLocks, request: &LockRequest) {
    let lock = request.held();
    match request.unlocks() {
        true => held.give_up(lock.owner, lock.start, lock.end),
        false => held.take(lock),
    }
}

/// A request that waits.
struct Waiter {
    id: u64,
    request: LockRequest,
    done: LockDone,
}

#[derive(Default)]
struct Waiting {
    list: Vec<Waiter>,
    /// Something was given up since the list was last tried.
    retry: bool,
    stop: bool,
}

/// The locks of one mount.
pub(crate) struct Locks {
    records: Mutex<Records>,
    /// Number of owners, so that a FLUSH where nobody locks anything costs nothing.
    owner_count: AtomicUsize,
    waiting: Mutex<Waiting>,
    /// Number of waiters, for the same reason. A waiter that is missed here is tried again soon enough.
    waiter_count: AtomicUsize,
    changed: Condvar,
    next_waiter: AtomicU64,
    /// A flock lock was taken since they were given up last.
    flocked: AtomicBool,
    proc: Arc<ProcFd>,
    budget: Arc<FdBudget>,
    /// Lock files need not be writable.
    read_only: bool,
}

impl std::fmt::Debug for Locks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Locks").finish_non_exhaustive()
    }
}

impl Locks {
    pub(crate) fn new(proc: Arc<ProcFd>, budget: Arc<FdBudget>, read_only: bool) -> Self {
        Locks {
            records: Mutex::default(),
            owner_count: AtomicUsize::new(0),
            waiting: Mutex::default(),
            waiter_count: AtomicUsize::new(0),
            changed: Condvar::new(),
            next_waiter: AtomicU64::new(1),
            flocked: AtomicBool::new(false),
            proc,
            budget,
            read_only,
        }
    }

    /// Takes, changes or gives up a lock without waiting. EAGAIN: somebody else holds it.
    pub(crate) fn set(&self, request: &LockRequest) -> io::Result<()> {
        if request.is_flock() {
            self.set_flock(request)?
        } else {
            self.set_range(request)?
        }
        if request.lock.lock_type != libc::F_WRLCK as u32 {
            // Given up, or perhaps changed from exclusive to shared.
            self.wake();
        }
        Ok(())
    }

    fn set_flock(&self, request: &LockRequest) -> io::Result<()> {
        let operation = match i32::try_from(request.lock.lock_type) {
            Ok(libc::F_RDLCK) => FlockOperation::NonBlockingLockShared,
            Ok(libc::F_WRLCK) => FlockOperation::NonBlockingLockExclusive,
            Ok(libc::F_UNLCK) => FlockOperation::NonBlockingUnlock,
            _ => return Err(errno(libc::EINVAL)),
        };
        if !request.unlocks() {
            self.flocked.store(true, Ordering::SeqCst);
        }
        Ok(rustix::fs::flock(request.handle.as_fd(), operation)?)
    }

    /// Gives up the flock locks of all open files, if any may hold one.
    pub(crate) fn clear_flocks(&self, open: impl FnOnce() -> Vec<Arc<Handle>>) {
        if !self.flocked.swap(false, Ordering::SeqCst) {
            return;
        }
        for handle in open() {
            // Directories have none, which is no harm.
            let _ = rustix::fs::flock(handle.as_fd(), FlockOperation::NonBlockingUnlock);
        }
    }

    fn set_range(&self, request: &LockRequest) -> io::Result<()> {
        let mut range = request.range()?;
        let mut records = self.records.lock();
        let known = records.nodes.get(&request.inode);
        let known = known.and_then(|node| node.owner(request.owner));
        if known.is_none() && request.unlocks() {
            return Ok(());
        }
        if !records.has_room(request) {
            return Err(errno(libc::ENOLCK));
        }
        if let Some(owner) = known {
            sys::ofd_lock(owner.file.as_fd(), libc::F_OFD_SETLK, &mut range)?;
        } else {
            let owner = self.new_owner(request)?;
            sys::ofd_lock(owner.file.as_fd(), libc::F_OFD_SETLK, &mut range)?;
            records.nodes.entry(request.inode).or_default().owners.push(owner);
            self.owner_count.fetch_add(1, Ordering::Relaxed);
        }
        records.enter(request);
        Ok(())
    }

    fn new_owner(&self, request: &LockRequest) -> io::Result<Owner> {
        let permit = self.budget.take().map_err(|_| errno(libc::ENOLCK))?;
        let handle = request.handle.as_fd();
        let reading = OFlags::RDONLY | OFlags::NONBLOCK;
        // A lock for writing takes a file that is open for writing, whatever the guest's handle is open for: the owner
        // may come with another one. Where the host refuses, locks for reading are left.
        let file = if self.read_only {
            self.proc.reopen(handle, reading)?
        } else {
            let writing = self.proc.reopen(handle, OFlags::RDWR | OFlags::NONBLOCK);
            writing.or_else(|_| self.proc.reopen(handle, reading))?
        };
        Ok(Owner {
            id: request.owner,
            file,
            _permit: permit,
            through: request.handle_id,
        })
    }

    /// F_GETLK: what keeps the lock from being taken, or type F_UNLCK if nothing does.
    pub(crate) fn get(&self, request: &LockRequest) -> io::Result<FileLock> {
        let mut range = request.range()?;
        let records = self.records.lock();
        let node = records.nodes.get(&request.inode);
        match node.and_then(|node| node.owner(request.owner)) {
            Some(owner) => sys::ofd_lock(owner.file.as_fd(), libc::F_OFD_GETLK, &mut range)?,
            None => {
                let file = self
                    .proc
                    .reopen(request.handle.as_fd(), OFlags::RDONLY | OFlags::NONBLOCK)?;
                sys::ofd_lock(file.as_fd(), libc::F_OFD_GETLK, &mut range)?;
            }
        }
        if i32::from(range.l_type) == libc::F_UNLCK {
            return Ok(FileLock {
                lock_type: libc::F_UNLCK as u32,
                ..request.lock
            });
        }
        let end = if range.l_len == 0 {
            i64::MAX
        } else {
            range.l_start.saturating_add(range.l_len - 1)
        };
        let found = FileLock {
            start: range.l_start as u64,
            end: end as u64,
            lock_type: range.l_type as u32,
            // The host knows its own processes only; 0 is "somebody".
            pid: 0,
        };
        let held = RangeLock {
            start: found.start,
            end: found.end,
            ..request.held()
        };
        let holder = node.and_then(|node| node.held.in_the_way_of(held).next());
        Ok(FileLock {
            pid: holder.map_or(0, |held| held.pid),
            ..found
        })
    }

    /// FLUSH: the owner's record locks on the node end.
    pub(crate) fn drop_owner(&self, inode: u64, owner: u64) {
        self.drop_owners(inode, |one| one.id == owner);
    }

    /// RELEASE: record locks made through the handle end, and requests that came with it wait no longer. Its flock lock
    /// ends with the handle itself.
    pub(crate) fn drop_handle(&self, inode: u64, handle_id: u64) {
        self.drop_owners(inode, |one| one.through == handle_id);
        self.cancel_all(|waiter| waiter.request.inode == inode && waiter.request.handle_id == handle_id);
    }

    /// A handle was closed: a flock lock may have ended.
    pub(crate) fn handle_closed(&self) {
        self.wake();
    }

    fn drop_owners(&self, inode: u64, ends: impl Fn(&Owner) -> bool) {
        if self.owner_count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut guard = self.records.lock();
        let records = &mut *guard;
        let Some(node) = records.nodes.get_mut(&inode) else {
            return;
        };
        let before = (node.owners.len(), node.held.len());
        node.owners.retain(|one| !ends(one));
        let owners = &node.owners;
        node.held
            .retain(|held| owners.iter().any(|owner| owner.id == held.owner));
        let dropped = before.0 - node.owners.len();
        records.count -= before.1 - node.held.len();
        if node.owners.is_empty() {
            records.nodes.remove(&inode);
        }
        drop(guard);
        if dropped > 0 {
            self.owner_count.fetch_sub(dropped, Ordering::Relaxed);
            self.wake();
        }
    }

    /// The guest is gone: no lock is left and nobody waits.
    pub(crate) fn clear(&self) {
        self.cancel_all(|_| true);
        let mut records = self.records.lock();
        let dropped = records.nodes.values().map(|node| node.owners.len()).sum();
        *records = Records::default();
        self.owner_count.fetch_sub(dropped, Ordering::Relaxed);
    }

    /// Takes a lock now or later and says so by `done`, from any thread. Returns the number to [cancel](Self::cancel)
    /// by, if it is to be later.
    pub(crate) fn set_or_wait(&self, request: LockRequest, done: LockDone) -> Option<u64> {
        match self.set(&request) {
            Err(error) if would_wait(&error) => {}
            decided => {
                done(decided);
                return None;
            }
        }
        let id = self.next_waiter.fetch_add(1, Ordering::Relaxed);
        let mut waiting = self.waiting.lock();
        let refusal = if waiting.list.len() >= WAITING_MAX || waiting.stop {
            Some(libc::ENOLCK)
        } else if self.records.lock().is_deadlock(&request, &waiting.list) {
            Some(libc::EDEADLK)
        } else {
            None
        };
        if let Some(code) = refusal {
            drop(waiting);
            done(Err(errno(code)));
            return None;
        }
        waiting.list.push(Waiter { id, request, done });
        self.waiter_count.store(waiting.list.len(), Ordering::SeqCst);
        // The lock may have been given up since it was tried.
        waiting.retry = true;
        self.changed.notify_one();
        Some(id)
    }

    /// Ends the wait of a request with EINTR, unless it is over already.
    pub(crate) fn cancel(&self, id: u64) {
        self.cancel_all(|waiter| waiter.id == id);
    }

    fn cancel_all(&self, ends: impl Fn(&Waiter) -> bool) {
        if self.waiter_count.load(Ordering::SeqCst) == 0 {
            return;
        }
        let cancelled: Vec<Waiter> = {
            let mut waiting = self.waiting.lock();
            let cancelled = waiting.list.extract_if(.., |waiter| ends(waiter)).collect();
            self.waiter_count.store(waiting.list.len(), Ordering::SeqCst);
            cancelled
        };
        for waiter in cancelled {
            (waiter.done)(Err(errno(libc::EINTR)));
        }
    }

    fn wake(&self) {
        if self.waiter_count.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut waiting = self.waiting.lock();
        if !waiting.list.is_empty() {
            waiting.retry = true;
            self.changed.notify_one();
        }
    }

    /// Tries the list again whenever there is reason to, until told to stop.
    fn serve_waiters(&self) {
        let mut waiting = self.waiting.lock();
        while !waiting.stop {
            if waiting.list.is_empty() {
                self.changed.wait(&mut waiting);
                continue;
            }
            if !waiting.retry {
                self.changed.wait_for(&mut waiting, RETRY);
            }
            waiting.retry = false;
            // Trying takes no other lock than that of the records, which is never held while this one is taken.
            let decided: Vec<(Waiter, io::Result<()>)> = {
                let mut decided = Vec::new();
                let mut left = Vec::with_capacity(waiting.list.len());
                for waiter in waiting.list.drain(..) {
                    match self.try_again(&waiter.request) {
                        Err(error) if would_wait(&error) => left.push(waiter),
                        outcome => decided.push((waiter, outcome)),
                    }
                }
                waiting.list = left;
                self.waiter_count.store(waiting.list.len(), Ordering::SeqCst);
                decided
            };
            parking_lot::MutexGuard::unlocked(&mut waiting, || {
                for (waiter, outcome) in decided {
                    (waiter.done)(outcome);
                }
            });
        }
    }

    fn try_again(&self, request: &LockRequest) -> io::Result<()> {
        if request.is_flock() {
            self.set_flock(request)
        } else {
            self.set_range(request)
        }
    }

    fn stop(&self) {
        self.cancel_all(|_| true);
        self.waiting.lock().stop = true;
        self.changed.notify_one();
    }
}

fn would_wait(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// The thread that tries waiting locks again; ends when this is dropped.
#[derive(Debug)]
pub(crate) struct LockThread {
    locks: Arc<Locks>,
    thread: Option<JoinHandle<()>>,
}

impl LockThread {
    pub(crate) fn start(locks: Arc<Locks>, start: &ThreadStart) -> io::Result<Self> {
        let (served, start) = (locks.clone(), start.clone());
        let thread = std::thread::Builder::new()
            .name("lock-wait".into())
            .spawn(move || {
                (start.0)();
                served.serve_waiters();
            })?;
        Ok(LockThread {
            locks,
            thread: Some(thread),
        })
    }
}

impl Drop for LockThread {
    fn drop(&mut self) {
        self.locks.stop();
        // The last request to be decided may be all that kept the mount: then this is the thread itself, which ends next.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // The thread has no panic to report that it has not printed.
            thread.join().ok();
        }
    }
}

/// A lock request that waits.
#[derive(Clone, Debug)]
pub struct LockWait {
    locks: Arc<Locks>,
    id: u64,
}

impl LockWait {
    pub(crate) fn new(locks: Arc<Locks>, id: u64) -> Self {
        LockWait { locks, id }
    }

    /// Ends the wait, if it is not over: the request's `done` is called with EINTR, by the calling thread.
    pub fn cancel(&self) {
        self.locks.cancel(self.id);
    }
}
