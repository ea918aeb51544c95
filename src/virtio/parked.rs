//! Requests that are answered later: reads of absent data, jobs of the workers, and locks that others hold.
//!
//! A request is in the table from the moment it is put aside until somebody takes it out to answer it: the one
//! who brings the result, the timer at its deadline, an INTERRUPT, an unmount, or the control thread that stops
//! its ring. Taking it out is what decides the race between them, so each is answered once; only with locks it is not that
//! simple.
//!
//! While a ring is disabled its requests cannot be answered. They keep their answer until it is enabled again.
//!
//! * [`entry`]: what is known about a request that waits; [`waiting`]: what people are shown of it
//! * [`reads`]: of absent data; [`locks`]: that others hold

mod entry;
mod locks;
mod reads;
mod waiting;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::request::Request;
use super::ring::Ring;
use super::worker::Workers;
use crate::fuse::abi::Opcode;
use crate::fuse::errno::Errno;
use crate::metrics::Metrics;
use crate::mounts::{CloseListener, Mount, MountId};
use crate::sandbox::{Role, Sandbox};
pub use entry::ImageRead;
use entry::{Answer, Entry, LockEnd, Wait};
use reads::read_again;
pub use waiting::{Stage, Waiting};

/// Requests in the table at most; further ones are answered ENOMEM. A driver has at most a queue's size in
/// flight per queue, so that only a device with many large queues comes here.
const LIMIT: usize = 4096;
/// An INTERRUPT may overtake its request on another queue; so many are remembered.
const EARLY: usize = 64;

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

    /// Has a worker do `job`, which gives the body of the reply. Requests for a mount that is gone are refused.
    pub fn run<J>(&self, request: Request<'_>, mount: Option<&Arc<Mount>>, job: J)
    where
        J: FnOnce() -> Result<Vec<u8>, Errno> + Send + 'static,
    {
        let Some(id) = self.put_aside(request, mount, Wait::on(mount.map(Arc::as_ref))) else {
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

    /// What waits at this moment, oldest first.
    pub fn list(&self) -> Vec<Waiting> {
        let state = self.state.lock();
        let mut waiting: Vec<_> = state.entries.values().map(Waiting::of).collect();
        drop(state);
        waiting.sort_by_key(|waiting| waiting.since);
        waiting
    }

    /// Puts a request into the table; its number there. None if it has been answered instead.
    fn put_aside(&self, request: Request<'_>, mount: Option<&Arc<Mount>>, wait: Wait) -> Option<u64> {
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
        let early = wait
            .deadline
            .is_some_and(|deadline| state.alarm.is_none_or(|alarm| deadline < alarm));
        let parked = request.park();
        let unique = parked.unique();
        let interrupted = wait.can_give_up() && state.early.contains(&unique);
        state.entries.insert(id, Entry { parked, wait });
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

    /// Answers request `id`, unless somebody has done so.
    fn finish(&self, id: u64, answer: Answer) {
        let entry = self.state.lock().entries.remove(&id);
        if let Some(entry) = entry {
            self.answer(id, entry, answer);
        }
    }

    fn answer(&self, id: u64, entry: Entry, answer: Answer) {
        let Entry { parked, mut wait } = entry;
        let opcode = Opcode::from_wire(parked.about().opcode);
        let mut active = match parked.resume() {
            Ok(active) => active,
            Err(parked) => {
                wait.ready = Some(answer);
                return self.keep(id, Entry { parked, wait });
            }
        };
        let request = active.request(&self.metrics);
        match (answer, &wait.mount, wait.read) {
            (Answer::Body(body), ..) => request.reply_bytes(&body),
            (Answer::Errno(errno), ..) => request.fail(errno.get()),
            (Answer::Read(held), Some(mount), Some(read)) => {
                if let Some((parked, absent)) = read_again(request, mount, read, &held) {
                    drop(active);
                    wait.attempts += 1;
                    return self.fetch_again(id, Entry { parked, wait }, absent);
                }
            }
            (Answer::Read(_), ..) => request.fail(libc::EIO),
        }
        if let Some(meter) = &wait.meter {
            meter.answered(opcode, wait.since.elapsed());
        }
    }

    /// Puts back a request whose answer is known but whose ring does not run.
    fn keep(&self, id: u64, mut entry: Entry) {
        entry.wait.lock = None;
        if !matches!(entry.wait.ready, Some(Answer::Read(_))) {
            entry.wait.mount = None;
        }
        let ring = Arc::clone(entry.parked.ring());
        let mut state = self.state.lock();
        if entry.wait.mount.as_ref().is_some_and(|mount| mount.is_closed()) {
            (entry.wait.mount, entry.wait.ready) = (None, Some(Answer::Errno(Errno::STALE)));
        }
        state.entries.insert(id, entry);
        drop(state);
        // The ring may have been enabled before the entry was back in the table.
        if ring.can_complete() {
            self.resume(&ring);
        }
    }

    /// Answers what became ready while `ring` was disabled.
    pub fn resume(&self, ring: &Arc<Ring>) {
        let ready = |entry: &Entry| entry.wait.ready.is_some() && Arc::ptr_eq(entry.parked.ring(), ring);
        for (id, mut entry) in self.take_ids_where(ready) {
            if let Some(answer) = entry.wait.ready.take() {
                self.answer(id, entry, answer);
            }
        }
    }

    /// Answers `EIO` to everything that waits for `ring`, which is being stopped.
    pub fn fail_all(&self, ring: &Arc<Ring>) {
        self.fail_locks(ring);
        let of_ring = |entry: &Entry| Arc::ptr_eq(entry.parked.ring(), ring);
        for entry in self.take_where(|entry| entry.wait.lock.is_none() && of_ring(entry)) {
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
        for entry in self.take_where(|entry| entry.wait.lock.is_none() && of_ring(entry)) {
            entry.parked.abandon();
        }
    }

    /// INTERRUPT: the driver does not want to wait for `unique` any more. Reads and locks give up, also those that
    /// come later; what a worker does cannot be taken back.
    pub fn interrupt(&self, unique: u64) {
        let mut state = self.state.lock();
        let wanted = |entry: &Entry| entry.wait.can_give_up() && entry.parked.unique() == unique;
        let found = state.entries.iter().find(|(_, entry)| wanted(entry));
        let Some((id, waits_for_lock)) = found.map(|(id, entry)| (*id, entry.wait.lock.is_some())) else {
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
            let waiting = state.entries.values().filter(|entry| entry.wait.ready.is_none());
            state.alarm = waiting.filter_map(|entry| entry.wait.deadline).min();
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
        let expired = |entry: &Entry| {
            entry.wait.ready.is_none() && entry.wait.deadline.is_some_and(|deadline| deadline <= now)
        };
        for (id, entry) in self.take_ids_where(expired) {
            self.metrics.expired();
            self.answer(id, entry, Answer::Errno(Errno::IO));
        }
    }
}

impl CloseListener for Deferred {
    fn mount_closed(&self, id: MountId) {
        let of_mount = |entry: &Entry| entry.wait.mount.as_ref().is_some_and(|mount| mount.id == id);
        self.end_lock_waits(of_mount, LockEnd::Fail(Errno::STALE));
        for (id, mut entry) in self.take_ids_where(|entry| entry.wait.lock.is_none() && of_mount(entry)) {
            entry.wait.mount = None;
            self.answer(id, entry, Answer::Errno(Errno::STALE));
        }
    }
}
