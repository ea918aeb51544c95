//! The thread of one queue: wait for a kick, serve everything that is available, tell the driver, look for more.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use super::DeviceOptions;
use super::memory::Buffers;
use super::patience::Patience;
use super::ring::{Popped, Ring};
use crate::fuse::dispatch::{Chain, Scratch, Server};
use crate::sandbox::Role;

/// What an event of a queue's epoll instance is about.
const WAKE: u64 = 0;
const KICK: u64 = 1;
/// A driver waits no longer for its signal than it takes to serve so many bytes, about a fifth of a millisecond...
const BYTES_PER_SIGNAL: usize = 2 << 20;
/// ...or so many requests: at 16 in flight that leaves it a few to wake up by, at less than 0.1 signals per request.
const REQUESTS_PER_SIGNAL: usize = 12;
/// How often the available ring of a queue without a kick descriptor is looked at.
const POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// A queue: its ring and the thread that serves it.
pub struct Queue {
    ring: Arc<Ring>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    epoll: OwnedFd,
    /// Registered edge-triggered and never read: one system call less per wake-up.
    kick: Mutex<Option<OwnedFd>>,
    /// The front-end gave no kick descriptor and wants the ring polled.
    polled: AtomicBool,
    stop: AtomicBool,
}

impl Queue {
    /// Queue number `index` of a device with these `options`, and its thread.
    pub fn start(index: u16, options: &DeviceOptions, server: Arc<Server>) -> std::io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &wake,
            epoll::EventData::new_u64(WAKE),
            epoll::EventFlags::IN,
        )?;
        let ring = Arc::new(Ring::new(
            index,
            options.max_queue_size,
            wake,
            Arc::clone(server.metrics()),
        ));
        let shared = Arc::new(Shared {
            epoll,
            kick: Mutex::new(None),
            polled: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let worker = Worker {
            ring: Arc::clone(&ring),
            shared: Arc::clone(&shared),
            server,
            buffers: None,
            scratch: Scratch::default(),
            patience: Patience::default(),
        };
        let name = if index == 0 {
            "queue-hiprio".to_owned()
        } else {
            format!("queue-{index}")
        };
        let sandbox = options.sandbox.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            sandbox.enter(Role::Queue);
            worker.run();
        })?;
        Ok(Queue {
            ring,
            shared,
            thread: Some(thread),
        })
    }

    /// Its ring.
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    /// Takes kicks from `kick`; without one the ring is polled.
    pub fn set_kick(&self, kick: Option<OwnedFd>) -> std::io::Result<()> {
        self.remove_kick();
        self.shared.polled.store(kick.is_none(), Ordering::SeqCst);
        if let Some(kick) = kick {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&self.shared.epoll, &kick, epoll::EventData::new_u64(KICK), flags)?;
            *self.shared.kick.lock() = Some(kick);
        }
        Ok(())
    }

    /// Takes no more kicks.
    pub fn remove_kick(&self) {
        self.shared.polled.store(false, Ordering::SeqCst);
        if let Some(kick) = self.shared.kick.lock().take() {
            // Others may hold the same descriptor open, so closing ours would leave it registered. It is there.
            let _ = epoll::delete(&self.shared.epoll, &kick);
        }
    }

    /// Asks the thread to end.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.ring.wake();
    }

    /// Waits for the thread's end until `deadline`. A thread that a system call holds up ends by itself later.
    pub fn join(mut self, deadline: Instant) {
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
        if thread.is_finished() {
            // A panic has been printed by its hook.
            let _ = thread.join();
        } else {
            tracing::warn!(
                queue = self.ring.index(),
                "a queue thread is held up by a system call"
            );
        }
    }
}

struct Worker {
    ring: Arc<Ring>,
    shared: Arc<Shared>,
    server: Arc<Server>,
    buffers: Option<Buffers>,
    scratch: Scratch,
    patience: Patience,
}

impl Worker {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::SeqCst) {
            self.serve_available();
            // While it looks, the driver does not kick (see `Ring::mute`); `unmute` makes up for that.
            let found = self.patience.look(|| self.ring.has_available());
            if !found && !self.ring.unmute() {
                self.wait();
            }
        }
    }

    /// Serves what is available, until nothing is.
    ///
    /// When to consider telling the driver, which costs a system call where it sleeps and next to nothing where it is
    /// awake: of the first request at once, so that it wakes up while the others are served; of the others in groups,
    /// so that a driver that goes back to sleep soon is not woken for each; and before there is nothing left to do.
    /// Every used request is considered, so none is left untold.
    fn serve_available(&mut self) {
        self.ring.mute();
        let (mut bytes, mut requests) = (BYTES_PER_SIGNAL, REQUESTS_PER_SIGNAL);
        while let Popped::Chain { head, valid } = self.ring.pop(&mut self.buffers) {
            let Some(buffers) = &mut self.buffers else { break };
            bytes += buffers.readable() + buffers.writable();
            requests += 1;
            let chain = Chain {
                ring: &self.ring,
                buffers,
                head,
                valid,
            };
            self.server.serve(chain, &mut self.scratch);
            if bytes >= BYTES_PER_SIGNAL || requests >= REQUESTS_PER_SIGNAL {
                if self.ring.signal_used() {
                    self.scratch.pause();
                }
                (bytes, requests) = (0, 0);
                if self.shared.stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        }
        self.ring.signal_used();
        self.scratch.pause();
    }

    fn wait(&mut self) {
        let timeout = self.shared.polled.load(Ordering::SeqCst).then_some(&POLL);
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 4];
        let Ok(count) = epoll::wait(&self.shared.epoll, &mut events, timeout) else {
            return;
        };
        self.server.metrics().wakeup();
        for event in events.iter().take(count) {
            let event = *event;
            if event.data.u64() == WAKE {
                drain(self.ring.wake_fd().as_fd());
                // Perhaps the guest's memory has changed: do not keep what is gone.
                self.buffers = None;
            }
        }
    }
}

fn drain(event: BorrowedFd<'_>) {
    let mut count = [0; 8];
    // Not blocking; nothing to read means that somebody was faster.
    let _ = rustix::io::read(event, &mut count);
}
