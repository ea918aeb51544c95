//! Requests that are answered later: reads of absent data, jobs of the workers, and locks that others hold.
//!
//! A request is in the table from the moment it is put aside until somebody takes it out to answer it: the one
//! who brings the result, the timer at its deadline, an INTERRUPT, an unmount, or the control thread that stops
//! its ring. Taking it out is what decides the race between them, so each is answered once. For a lock that is not
//! enough, for it may just have been taken: whoever wants the wait to end says so to the one who keeps the locks, and
//! it is his word that takes the request out.
//!
//! While a ring is disabled its requests cannot be answered. They keep their answer until it is enabled again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Instant;

use backend::store::FetchError;
use parking_lot::{Condvar, Mutex};
use passthrough::LockDone;
use rafs::fs::{Absent, HeldChunks, ReadOutcome};

use super::request::{Parked, Request};
use super::ring::Ring;
use super::worker::Workers;
use crate::fuse::abi::Opcode;
use crate::fuse::errno::Errno;
use crate::metrics::{Executing, Metrics, MountMetrics};
use crate::mounts::{CancelLock, CloseListener, Instance, Mount, MountId, local_of};
use crate::sandbox::{Role, Sandbox};

/// Requests in the table at most; further ones are answered ENOMEM. A driver has at most a queue's size in
/// flight per queue, so that only a device with many large queues comes here.
const LIMIT: usize = 4096;
/// Of the descriptors of a ring, the part that may wait for locks: one in so many. Were it all of them, the driver
/// could not ask for the unlocking that they wait for.
const LOCK_SHARE: usize = 4;
/// An INTERRUPT may overtake its request on another queue; so many are remembered.
const EARLY: usize = 64;
/// A read whose data was evicted between arrival and use is fetched again so many times.
const ATTEMPTS: u32 = 16;

/// What a request that waited is answered with.
pub enum Answer {
    /// A body.
    Body(Vec<u8>),
    /// An error number.
    Errno(Errno),
    /// Read again: what was absent has arrived.
    Read(HeldChunks),
}

/// A read of an image.
#[derive(Clone, Copy, Debug)]
pub struct ImageRead {
    /// Local id.
    pub inode: u64,
    /// Where to start, in bytes.
    pub offset: u64,
    /// Bytes wanted.
    pub size: u32,
}

struct Entry {
    parked: Box<Parked>,
    since: Instant,
    /// Where its file is mounted; empty for the pseudo tree.
    place: String,
    /// Where its latency is counted.
    meter: Option<Arc<MountMetrics>>,
    /// None once the answer is known.
    mount: Option<Arc<Mount>>,
    read: Option<ImageRead>,
    /// Of a lock that is waited for.
    lock: Option<LockWait>,
    attempts: u32,
    /// None for locks, and for jobs of a worker, which are as long as they are.
    deadline: Option<Instant>,
    /// Known, but the ring does not run.
    ready: Option<Answer>,
}

impl Entry {
    /// Whether an INTERRUPT ends it.
    fn can_give_up(&self) -> bool {
        self.ready.is_none() && (self.read.is_some() || self.lock.is_some())
    }
}

/// How a wait for a lock is ended.
#[derive(Default)]
struct LockWait {
    /// None until the keeper of the locks has said how.
    cancel: Option<CancelLock>,
    /// What it ends with if the lock was not taken; the keeper's error if nobody else ended it.
    end: Option<LockEnd>,
}

#[derive(Clone, Copy)]
enum LockEnd {
    Fail(Errno),
    /// There is nobody to tell.
    Abandon,
}

/// A request that waits, for people.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// The driver's number of the request.
    pub unique: u64,
    /// FUSE opcode.
    pub opcode: u32,
    /// Its name in the protocol.
    pub operation: &'static str,
    /// The nodeid that it names.
    pub nodeid: u64,
    /// The local id in it.
    pub local: u64,
    /// Where its file is mounted; empty for the pseudo tree.
    pub mountpoint: String,
    /// Of a read of an image, the range.
    pub read: Option<ImageRead>,
    /// When it was put aside, or its execution began.
    pub since: Instant,
    /// When it will be answered whatever happens; only what waits for data has such a time.
    pub deadline: Option<Instant>,
    /// What it waits for.
    pub stage: Stage,
}

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Data of an image that is not local.
    Data,
    /// A lock that somebody else holds.
    Lock,
    /// A worker, or the host's disk behind it.
    Worker,
    /// The queue thread that executes it, and what of the host holds that up.
    Thread,
    /// The driver: the answer is known, and the queue is stopped.
    Driver,
}

impl Waiting {
    fn of(entry: &Entry) -> Self {
        let about = entry.parked.about();
        Waiting {
            unique: entry.parked.unique(),
            opcode: about.opcode,
            operation: Opcode::from_wire(about.opcode).name(),
            nodeid: about.nodeid,
            local: local_of(about.nodeid),
            mountpoint: entry.place.clone(),
            read: entry.read,
            since: entry.since,
            deadline: entry.deadline,
            stage: match entry {
                Entry { ready: Some(_), .. } => Stage::Driver,
                Entry { read: Some(_), .. } => Stage::Data,
                Entry { lock: Some(_), .. } => Stage::Lock,
                _ => Stage::Worker,
            },
        }
    }

    /// A request that its queue thread still executes.
    pub(super) fn executing(request: &Executing, mount: Option<&Mount>) -> Self {
        Waiting {
            unique: request.unique,
            opcode: request.opcode,
            operation: Opcode::from_wire(request.opcode).name(),
            nodeid: request.nodeid,
            local: local_of(request.nodeid),
            mountpoint: mount.map(|mount| mount.path.clone()).unwrap_or_default(),
            read: None,
            since: request.began,
            deadline: None,
            stage: Stage::Thread,
        }
    }
}

#[derive(Default)]
struct State {
    entries: HashMap<u64, Entry>,
    next: u64,
    /// When the timer will look again; none if it sleeps until told.
    alarm: Option<Instant>,
    stopped: bool,
    /// Requests that were interrupted and are not here (yet), oldest first.
    early: VecDeque<u64>,
}

/// The table, its timer and its workers.
pub struct Deferred {
    state: Mutex<State>,
    changed: Condvar,
    workers: Workers,
    metrics: Arc<Metrics>,
    this: Weak<Deferred>,
}

impl Deferred {
    /// An empty table with a running timer.
    pub fn start(metrics: Arc<Metrics>, sandbox: &Sandbox) -> std::io::Result<Arc<Self>> {
        let workers = Workers::start(sandbox.clone())?;
        let deferred = Arc::new_cyclic(|this| Deferred {
            state: Mutex::default(),
            changed: Condvar::new(),
            workers,
            metrics,
            this: Weak::clone(this),
        });
        let (timer, sandbox) = (Arc::clone(&deferred), sandbox.clone());
        std::thread::Builder::new()
            .name("deadlines".to_owned())
            .spawn(move || {
                sandbox.enter(Role::Deadlines);
                timer.watch();
            })?;
        Ok(deferred)
    }

    /// Ends the timer. Requests still in the table belong to rings that are gone.
    pub fn stop(&self) {
        self.state.lock().stopped = true;
        self.changed.notify_all();
        for entry in self.take_where(|_| true) {
            entry.parked.abandon();
        }
    }

    /// Puts a read aside until `absent` has arrived or the mount's deadline has passed.
    pub fn park_read(&self, request: Request<'_>, mount: &Arc<Mount>, read: ImageRead, absent: Absent) {
        let deadline = Instant::now() + mount.read_deadline;
        let entry = |parked| Entry {
            parked,
            mount: Some(Arc::clone(mount)),
            read: Some(read),
            lock: None,
            since: Instant::now(),
            place: mount.path.clone(),
            meter: Some(Arc::clone(&mount.metrics)),
            attempts: 0,
            deadline: Some(deadline),
            ready: None,
        };
        if let Some(id) = self.put_aside(request, Some(mount), entry) {
            self.metrics.parked();
            self.fetch(id, mount, absent, deadline);
        }
    }

    /// Has a worker do `job`, which gives the body of the reply. Requests for a mount that is gone are refused.
    pub fn run<J>(&self, request: Request<'_>, mount: Option<&Arc<Mount>>, job: J)
    where
        J: FnOnce() -> Result<Vec<u8>, Errno> + Send + 'static,
    {
        let entry = |parked| Entry {
            parked,
            mount: None,
            read: None,
            lock: None,
            since: Instant::now(),
            place: mount.map(|mount| mount.path.clone()).unwrap_or_default(),
            meter: mount.map(|mount| Arc::clone(&mount.metrics)),
            attempts: 0,
            deadline: None,
            ready: None,
        };
        let Some(id) = self.put_aside(request, mount, entry) else {
            return;
        };
        self.metrics.deferred();
        let this = Weak::clone(&self.this);
        self.workers.run(move || {
            let answer = match job() {
                Ok(body) => Answer::Body(body),
                Err(errno) => Answer::Errno(errno),
            };
            if let Some(this) = this.upgrade() {
                this.finish(id, answer);
            }
        });
    }

    /// Puts a request for a lock aside. `start` begins to wait: it is given what to call once with the outcome, and
    /// returns how to end the wait early if there is one.
    pub fn park_lock<S>(&self, request: Request<'_>, mount: &Arc<Mount>, start: S)
    where
        S: FnOnce(LockDone) -> Option<CancelLock>,
    {
        if self.lock_waits(request.ring()) >= usize::from(request.ring().size()) / LOCK_SHARE {
            return request.fail(libc::ENOLCK);
        }
        let entry = |parked| Entry {
            parked,
            mount: Some(Arc::clone(mount)),
            read: None,
            lock: Some(LockWait::default()),
            since: Instant::now(),
            place: mount.path.clone(),
            // How long a lock is held by others says nothing about the mount.
            meter: None,
            attempts: 0,
            deadline: None,
            ready: None,
        };
        let Some(id) = self.put_aside(request, Some(mount), entry) else {
            return;
        };
        self.metrics.parked();
        let this = Weak::clone(&self.this);
        let cancel = start(Box::new(move |outcome| {
            if let Some(this) = this.upgrade() {
                this.lock_decided(id, outcome);
            }
        }));
        let Some(cancel) = cancel else { return };
        let ended = {
            let mut state = self.state.lock();
            let lock = state.entries.get_mut(&id).and_then(|entry| entry.lock.as_mut());
            lock.is_some_and(|lock| {
                lock.cancel = Some(Arc::clone(&cancel));
                lock.end.is_some()
            })
        };
        if ended {
            cancel();
        }
    }

    fn lock_waits(&self, ring: &Arc<Ring>) -> usize {
        let state = self.state.lock();
        let waits = |entry: &&Entry| entry.lock.is_some() && Arc::ptr_eq(entry.parked.ring(), ring);
        state.entries.values().filter(waits).count()
    }

    /// The keeper of the locks has decided on request `id`.
    fn lock_decided(&self, id: u64, outcome: std::io::Result<()>) {
        let entry = self.state.lock().entries.remove(&id);
        let Some(mut entry) = entry else { return };
        let end = entry.lock.take().and_then(|lock| lock.end);
        match (outcome, end) {
            (_, Some(LockEnd::Abandon)) => entry.parked.abandon(),
            (Ok(()), _) => self.answer(id, entry, Answer::Body(Vec::new())),
            (Err(_), Some(LockEnd::Fail(errno))) => self.answer(id, entry, Answer::Errno(errno)),
            (Err(error), None) => self.answer(id, entry, Answer::Errno(error.into())),
        }
    }

    /// Ends the waits for locks that are `wanted`; each is taken out when the keeper of the locks says so.
    fn end_lock_waits(&self, wanted: impl Fn(&Entry) -> bool, end: LockEnd) {
        let mut state = self.state.lock();
        let cancels: Vec<CancelLock> = state
            .entries
            .values_mut()
            .filter(|entry| wanted(entry))
            .filter_map(|entry| entry.lock.as_mut())
            .filter_map(|lock| {
                lock.end = Some(end);
                lock.cancel.clone()
            })
            .collect();
        drop(state);
        for cancel in cancels {
            cancel();
        }
    }

    /// What waits at this moment, oldest first.
    pub fn list(&self) -> Vec<Waiting> {
        let state = self.state.lock();
        let mut waiting: Vec<_> = state.entries.values().map(Waiting::of).collect();
        drop(state);
        waiting.sort_by_key(|waiting| waiting.since);
        waiting
    }

    fn put_aside(
        &self,
        request: Request<'_>,
        mount: Option<&Arc<Mount>>,
        entry: impl FnOnce(Box<Parked>) -> Entry,
    ) -> Option<u64> {
        let mut state = self.state.lock();
        // Closing a mount sets its mark first and then empties the table under this lock.
        if mount.is_some_and(|mount| mount.is_closed()) {
            drop(state);
            request.fail(libc::ESTALE);
            return None;
        }
        if state.entries.len() >= LIMIT {
            drop(state);
            request.fail(libc::ENOMEM);
            return None;
        }
        let id = state.next;
        state.next += 1;
        let entry = entry(request.park());
        let early = entry
            .deadline
            .is_some_and(|deadline| state.alarm.is_none_or(|alarm| deadline < alarm));
        let unique = entry.parked.unique();
        let interrupted = entry.can_give_up() && state.early.contains(&unique);
        state.entries.insert(id, entry);
        if interrupted {
            state.early.retain(|early| *early != unique);
            drop(state);
            self.finish(id, Answer::Errno(Errno::INTR));
            return None;
        }
        drop(state);
        if early {
            self.changed.notify_all();
        }
        Some(id)
    }

    fn fetch(&self, id: u64, mount: &Mount, absent: Absent, deadline: Instant) {
        let Instance::Rafs(image) = &mount.instance else {
            return self.finish(id, Answer::Errno(Errno::IO));
        };
        let this = Weak::clone(&self.this);
        image.fetch_absent(
            absent,
            deadline,
            Box::new(move |result| {
                // This thread belongs to the store: it may have sockets and must not touch guest memory.
                if let Some(this) = this.upgrade() {
                    let table = Arc::clone(&this);
                    this.workers.run(move || table.fetched(id, result));
                }
            }),
        );
    }

    fn fetched(&self, id: u64, result: Result<HeldChunks, FetchError>) {
        match result {
            Ok(held) => self.finish(id, Answer::Read(held)),
            Err(error) => {
                tracing::warn!(%error, "a read fails because its data could not be fetched");
                if error.timed_out {
                    self.metrics.expired();
                }
                self.finish(id, Answer::Errno(Errno::IO));
            }
        }
    }

    /// Answers request `id`, unless somebody has done so.
    fn finish(&self, id: u64, answer: Answer) {
        let entry = self.state.lock().entries.remove(&id);
        if let Some(entry) = entry {
            self.answer(id, entry, answer);
        }
    }

    fn answer(&self, id: u64, entry: Entry, answer: Answer) {
        let Entry {
            parked,
            mount,
            read,
            attempts,
            deadline,
            since,
            place,
            meter,
            ..
        } = entry;
        let opcode = Opcode::from_wire(parked.about().opcode);
        let mut active = match parked.resume() {
            Ok(active) => active,
            Err(parked) => {
                let ready = Some(answer);
                return self.keep(
                    id,
                    Entry {
                        parked,
                        since,
                        place,
                        meter,
                        mount,
                        read,
                        lock: None,
                        attempts,
                        deadline,
                        ready,
                    },
                );
            }
        };
        let request = active.request(&self.metrics);
        match (answer, mount, read) {
            (Answer::Body(body), ..) => request.reply_bytes(&body),
            (Answer::Errno(errno), ..) => request.fail(errno.get()),
            (Answer::Read(held), Some(mount), Some(read)) => {
                if let Some((parked, absent)) = read_again(request, &mount, read, &held) {
                    drop(active);
                    let (mount, read, attempts) = (Some(mount), Some(read), attempts + 1);
                    let entry = Entry {
                        parked,
                        since,
                        place,
                        meter,
                        mount,
                        read,
                        lock: None,
                        attempts,
                        deadline,
                        ready: None,
                    };
                    return self.fetch_again(id, entry, absent);
                }
            }
            (Answer::Read(_), ..) => request.fail(libc::EIO),
        }
        if let Some(meter) = meter {
            meter.answered(opcode, since.elapsed());
        }
    }

    /// Puts back a request whose answer is known but whose ring does not run.
    fn keep(&self, id: u64, mut entry: Entry) {
        if !matches!(entry.ready, Some(Answer::Read(_))) {
            entry.mount = None;
        }
        let ring = Arc::clone(entry.parked.ring());
        let mut state = self.state.lock();
        if entry.mount.as_ref().is_some_and(|mount| mount.is_closed()) {
            (entry.mount, entry.ready) = (None, Some(Answer::Errno(Errno::STALE)));
        }
        state.entries.insert(id, entry);
        drop(state);
        // The ring may have been enabled before the entry was back in the table.
        if ring.can_complete() {
            self.resume(&ring);
        }
    }

    /// Puts back a read of which something is absent again.
    fn fetch_again(&self, id: u64, entry: Entry, absent: Absent) {
        let deadline = entry.deadline.filter(|deadline| Instant::now() < *deadline);
        let (Some(mount), Some(deadline)) = (entry.mount.clone(), deadline) else {
            return self.answer(id, entry, Answer::Errno(Errno::IO));
        };
        if entry.attempts > ATTEMPTS {
            return self.answer(id, entry, Answer::Errno(Errno::IO));
        }
        let mut state = self.state.lock();
        if mount.is_closed() {
            drop((state, mount));
            return self.answer(id, entry, Answer::Errno(Errno::STALE));
        }
        state.entries.insert(id, entry);
        drop(state);
        self.fetch(id, &mount, absent, deadline);
    }

    /// Answers what became ready while `ring` was disabled.
    pub fn resume(&self, ring: &Arc<Ring>) {
        let mut state = self.state.lock();
        let ready = |entry: &Entry| entry.ready.is_some() && Arc::ptr_eq(entry.parked.ring(), ring);
        let ids: Vec<u64> = state
            .entries
            .iter()
            .filter(|(_, entry)| ready(entry))
            .map(|(id, _)| *id)
            .collect();
        let entries: Vec<(u64, Entry)> = ids
            .into_iter()
            .filter_map(|id| Some((id, state.entries.remove(&id)?)))
            .collect();
        drop(state);
        for (id, mut entry) in entries {
            if let Some(answer) = entry.ready.take() {
                self.answer(id, entry, answer);
            }
        }
    }

    /// Answers `EIO` to what waits for locks on `ring`, which is being stopped: they may be held for ever.
    pub fn fail_locks(&self, ring: &Arc<Ring>) {
        let of_ring = |entry: &Entry| Arc::ptr_eq(entry.parked.ring(), ring);
        self.end_lock_waits(of_ring, LockEnd::Fail(Errno::IO));
    }

    /// Answers `EIO` to everything that waits for `ring`, which is being stopped.
    pub fn fail_all(&self, ring: &Arc<Ring>) {
        self.fail_locks(ring);
        let of_ring = |entry: &Entry| Arc::ptr_eq(entry.parked.ring(), ring);
        for entry in self.take_where(|entry| entry.lock.is_none() && of_ring(entry)) {
            // If it cannot be answered, dropping it settles it.
            if let Ok(mut active) = entry.parked.resume() {
                active.request(&self.metrics).fail(libc::EIO);
            }
        }
    }

    /// Forgets everything that waits for `ring`: its front-end is gone.
    pub fn abandon_all(&self, ring: &Arc<Ring>) {
        let of_ring = |entry: &Entry| Arc::ptr_eq(entry.parked.ring(), ring);
        self.end_lock_waits(of_ring, LockEnd::Abandon);
        for entry in self.take_where(|entry| entry.lock.is_none() && of_ring(entry)) {
            entry.parked.abandon();
        }
    }

    /// INTERRUPT: the driver does not want to wait for `unique` any more. Reads and locks give up, also those that
    /// come later; what a worker does cannot be taken back.
    pub fn interrupt(&self, unique: u64) {
        let mut state = self.state.lock();
        let wanted = |entry: &Entry| entry.can_give_up() && entry.parked.unique() == unique;
        let found = state.entries.iter().find(|(_, entry)| wanted(entry));
        let Some((id, waits_for_lock)) = found.map(|(id, entry)| (*id, entry.lock.is_some())) else {
            if state.early.len() == EARLY {
                state.early.pop_front();
            }
            return state.early.push_back(unique);
        };
        drop(state);
        if waits_for_lock {
            let this_one = |entry: &Entry| entry.parked.unique() == unique;
            self.end_lock_waits(this_one, LockEnd::Fail(Errno::INTR));
        } else {
            self.finish(id, Answer::Errno(Errno::INTR));
        }
    }

    /// A new session numbers its requests anew.
    pub fn forget_interrupts(&self) {
        self.state.lock().early.clear();
    }

    /// Requests in the table.
    pub fn len(&self) -> usize {
        self.state.lock().entries.len()
    }

    fn take_where(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        let mut state = self.state.lock();
        state
            .entries
            .extract_if(|_, entry| wanted(entry))
            .map(|(_, entry)| entry)
            .collect()
    }

    fn take_ids_where(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<(u64, Entry)> {
        self.state
            .lock()
            .entries
            .extract_if(|_, entry| wanted(entry))
            .collect()
    }

    /// The timer thread.
    fn watch(&self) {
        let mut state = self.state.lock();
        while !state.stopped {
            let waiting = state.entries.values().filter(|entry| entry.ready.is_none());
            state.alarm = waiting.filter_map(|entry| entry.deadline).min();
            match state.alarm {
                None => self.changed.wait(&mut state),
                Some(alarm) if alarm > Instant::now() => {
                    self.changed.wait_until(&mut state, alarm);
                }
                Some(_) => {
                    drop(state);
                    self.expire();
                    state = self.state.lock();
                }
            }
        }
    }

    fn expire(&self) {
        let now = Instant::now();
        let expired =
            |entry: &Entry| entry.ready.is_none() && entry.deadline.is_some_and(|deadline| deadline <= now);
        for (id, entry) in self.take_ids_where(expired) {
            self.metrics.expired();
            self.answer(id, entry, Answer::Errno(Errno::IO));
        }
    }
}

impl CloseListener for Deferred {
    fn mount_closed(&self, id: MountId) {
        let of_mount = |entry: &Entry| entry.mount.as_ref().is_some_and(|mount| mount.id == id);
        self.end_lock_waits(of_mount, LockEnd::Fail(Errno::STALE));
        for (id, mut entry) in self.take_ids_where(|entry| entry.lock.is_none() && of_mount(entry)) {
            entry.mount = None;
            self.answer(id, entry, Answer::Errno(Errno::STALE));
        }
    }
}

/// Executes a read whose data has arrived. Gives the request back if something is absent again.
fn read_again(
    mut request: Request<'_>,
    mount: &Mount,
    read: ImageRead,
    held: &HeldChunks,
) -> Option<(Box<Parked>, Absent)> {
    let Instance::Rafs(image) = &mount.instance else {
        request.fail(libc::EIO);
        return None;
    };
    let mut writer = request.data(read.size as usize);
    match image.read_resident(read.inode, read.offset, read.size, held, &mut writer) {
        Ok(ReadOutcome::Done(_)) => {
            let written = writer.written();
            request.reply_written(written);
            None
        }
        Ok(ReadOutcome::Absent(absent)) => Some((request.park(), absent)),
        Err(error) => {
            request.fail(Errno::from(error).get());
            None
        }
    }
}
