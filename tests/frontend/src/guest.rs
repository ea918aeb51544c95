//! A FUSE client on the virtqueues.
//!
//! Any number of requests may be in flight on each queue and come back in any order: [`Guest::submit`]
//! gives a [`Ticket`], [`Guest::wait`] redeems it. The methods named after operations do both.
//! Every answer is checked: head in flight, `unique`, length within the room, used length. A device that
//! answers without a signal is caught, too: a lone waiter sleeps on the call event alone.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::abi::{IN_HEADER, InHeader, OUT_HEADER};
use crate::memory::{DirtyLog, GuestMemory, PAGE, Place};
use crate::ops::{self, Request};
use crate::vmm::{Options, Order, Restart, Vmm};
use crate::vring::{Counts, Descriptor, Queue, Segment, Used};
use crate::{Error, Result};

mod layout;
mod typed;

use layout::Laid;
pub use layout::Layout;

/// The high priority queue.
pub const URGENT: usize = 0;

/// A request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// The queue it went to.
    pub queue: usize,
    /// Its `unique`.
    pub unique: u64,
    number: u64,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// 0, or a positive errno.
    pub errno: i32,
    /// What follows the reply header.
    pub body: Vec<u8>,
    /// Bytes that the used ring says were written.
    pub used: u32,
    /// Time from submission until the answer was seen.
    pub took: Duration,
}

impl Reply {
    /// The body, or the errno.
    pub fn ok(self) -> Result<Vec<u8>> {
        if self.errno == 0 {
            Ok(self.body)
        } else {
            Err(Error::Errno(self.errno))
        }
    }
}

struct Pending {
    number: u64,
    unique: u64,
    laid: Laid,
    sent: Instant,
}

/// One queue with what is in flight on it.
pub struct Lane {
    /// The queue itself.
    pub queue: Queue,
    pending: HashMap<u16, Pending>,
    done: HashMap<u64, Result<Reply>>,
    /// Returned chains that were not submitted as requests.
    pub raw: Vec<Used>,
    waiters: usize,
    /// One of them believes that it is alone, and sleeps long.
    sole: bool,
    strict_length: bool,
}

impl Lane {
    /// Wakes the waiter that sleeps long, if there is one, to see that it is no longer alone.
    fn wake_sole(&mut self) {
        if self.sole {
            self.queue.nudge();
        }
    }

    /// Takes all chains that the device has returned. How many there were.
    pub fn drain(&mut self) -> Result<usize> {
        let mut count = 0;
        while let Some(used) = self.queue.pop()? {
            count += 1;
            let Some(pending) = self.pending.remove(&used.head) else {
                self.raw.push(used);
                continue;
            };
            let reply = self.reply(&pending, used.len);
            if pending.laid.answered() {
                self.done.insert(pending.number, reply);
            } else if used.len != 0 && self.strict_length {
                return Err(Error::Device(format!(
                    "{} bytes written where there is no room",
                    used.len
                )));
            }
        }
        Ok(count)
    }

    fn reply(&self, pending: &Pending, used: u32) -> Result<Reply> {
        let laid = &pending.laid;
        let device = |what: String| Err(Error::Device(format!("answer to {}: {what}", pending.unique)));
        let room: usize = laid.writable.iter().map(|segment| segment.len as usize).sum();
        if room < OUT_HEADER {
            return Ok(Reply {
                errno: 0,
                body: Vec::new(),
                used,
                took: pending.sent.elapsed(),
            });
        }
        let header = laid.gather(0, OUT_HEADER);
        let mut reader = crate::abi::Reader::new(&header);
        let (len, error, unique) = (reader.u32(), reader.u32() as i32, reader.u64());
        if unique != pending.unique {
            return device(format!("unique is {unique}"));
        }
        if (len as usize) < OUT_HEADER || len as usize > room {
            return device(format!("length {len}, room {room}"));
        }
        if self.strict_length && len != used {
            return device(format!("length {len}, but {used} in the used ring"));
        }
        if !(-4095..=0).contains(&error) || (error != 0 && len as usize != OUT_HEADER) {
            return device(format!("error {error}, length {len}"));
        }
        let body = laid.gather(OUT_HEADER, len as usize - OUT_HEADER);
        Ok(Reply {
            errno: -error,
            body,
            used,
            took: pending.sent.elapsed(),
        })
    }
}

/// A machine with a guest in it.
pub struct Guest {
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// What it was made with.
    pub options: Options,
    vmm: Mutex<Vmm>,
    lanes: Vec<Mutex<Lane>>,
    unique: AtomicU64,
    layout: Mutex<Layout>,
    /// INIT flags in force.
    session: AtomicU64,
}

impl Guest {
    /// Connects to the device at `path` and starts its queues. No INIT yet.
    pub fn connect(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        let vmm = Vmm::connect(path.as_ref(), &options)?;
        let (memory, queues) = crate::vmm::build(&options, vmm.features)?;
        let lanes = queues
            .into_iter()
            .map(|queue| {
                Mutex::new(Lane {
                    queue,
                    pending: HashMap::new(),
                    done: HashMap::new(),
                    raw: Vec::new(),
                    waiters: 0,
                    sole: false,
                    strict_length: options.strict_length,
                })
            })
            .collect();
        let guest = Self {
            memory,
            vmm: Mutex::new(vmm),
            lanes,
            unique: AtomicU64::new(2),
            layout: Mutex::new(Layout::Linux),
            session: AtomicU64::new(0),
            options,
        };
        guest.start(&vec![0; guest.lanes.len()])?;
        Ok(guest)
    }

    /// Connects and sends INIT with what Linux offers.
    pub fn boot(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        let guest = Self::connect(path, options)?;
        guest.init(&ops::Init::default())?;
        Ok(guest)
    }

    /// The connection's side.
    pub fn vmm(&self) -> MutexGuard<'_, Vmm> {
        self.vmm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One queue.
    pub fn lane(&self, queue: usize) -> MutexGuard<'_, Lane> {
        self.lanes[queue].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of queues, with the high priority queue.
    pub fn queues(&self) -> usize {
        self.lanes.len()
    }

    /// How requests are cut into descriptors from now on.
    pub fn set_layout(&self, layout: Layout) {
        *self.layout.lock().unwrap_or_else(PoisonError::into_inner) = layout;
    }

    /// Sum over all queues.
    pub fn counts(&self) -> Counts {
        (0..self.queues())
            .map(|index| self.lane(index).queue.counts)
            .fold(Counts::default(), |sum, one| Counts {
                added: sum.added + one.added,
                used: sum.used + one.used,
                kicks: sum.kicks + one.kicks,
                calls: sum.calls + one.calls,
            })
    }

    // --- requests ---

    /// Sends a request, to the high priority queue or to the first request queue.
    pub fn submit(&self, request: &Request) -> Result<Ticket> {
        self.submit_on(if request.is_urgent() { URGENT } else { 1 }, request)
    }

    /// Sends a request to a queue; waits for room if the queue is full.
    pub fn submit_on(&self, queue: usize, request: &Request) -> Result<Ticket> {
        self.submit_all(queue, std::slice::from_ref(request))
            .map(|tickets| tickets[0])
    }

    /// Sends requests with one kick; waits for room if the queue is full.
    pub fn submit_all(&self, queue: usize, requests: &[Request]) -> Result<Vec<Ticket>> {
        let deadline = Instant::now() + self.options.timeout;
        let mut tickets = Vec::with_capacity(requests.len());
        while tickets.len() < requests.len() {
            let mut lane = self.lane(queue);
            let result = requests[tickets.len()..]
                .iter()
                .try_for_each(|request| self.add(&mut lane, request).map(|ticket| tickets.push(ticket)));
            lane.queue.publish();
            match result {
                Ok(()) => {}
                Err(Error::QueueFull(_)) => {
                    if lane.drain()? == 0 {
                        let seen = lane.queue.counts.used;
                        drop(lane);
                        self.await_signal(queue, seen, deadline, "room in the queue")?;
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(tickets)
    }

    fn add(&self, lane: &mut Lane, request: &Request) -> Result<Ticket> {
        let number = self.unique.fetch_add(2, Ordering::Relaxed);
        let unique = request.unique.unwrap_or(number);
        let len = IN_HEADER + request.args.iter().map(Vec::len).sum::<usize>();
        let header = InHeader {
            len: len as u32,
            opcode: request.opcode,
            unique,
            nodeid: request.nodeid,
            uid: request.caller.0,
            gid: request.caller.1,
            pid: request.caller.2,
            total_extlen: (request.extension / 8) as u16,
        };
        let layout = *self.layout.lock().unwrap_or_else(PoisonError::into_inner);
        let laid = layout.lay(
            &self.memory,
            &header.bytes(),
            request,
            number,
            lane.queue.shape.size,
        )?;
        let count = laid.readable.len() + laid.writable.len();
        let indirect = self.vmm_has_indirect() && count > 1;
        let head = lane.queue.add(&laid.readable, &laid.writable, indirect)?;
        let pending = Pending {
            number,
            unique,
            laid,
            sent: Instant::now(),
        };
        lane.pending.insert(head, pending);
        Ok(Ticket {
            queue: lane.queue.index,
            unique,
            number,
        })
    }

    fn vmm_has_indirect(&self) -> bool {
        self.options.indirect
    }

    /// The answer, if it is there.
    pub fn poll(&self, ticket: Ticket) -> Result<Option<Reply>> {
        let mut lane = self.lane(ticket.queue);
        lane.drain()?;
        lane.done.remove(&ticket.number).transpose()
    }

    /// Waits for the answer.
    pub fn wait(&self, ticket: Ticket) -> Result<Reply> {
        self.wait_for(ticket, self.options.timeout)
    }

    /// Waits for the answer at most `timeout`.
    pub fn wait_for(&self, ticket: Ticket, timeout: Duration) -> Result<Reply> {
        let deadline = Instant::now() + timeout;
        loop {
            let seen = {
                let mut lane = self.lane(ticket.queue);
                lane.drain()?;
                if let Some(reply) = lane.done.remove(&ticket.number) {
                    return reply;
                }
                lane.queue.counts.used
            };
            self.await_signal(ticket.queue, seen, deadline, "answer")
                .map_err(|e| match e {
                    Error::Timeout { what, .. } => Error::Timeout {
                        what,
                        waited: timeout,
                    },
                    other => other,
                })?;
        }
    }

    /// Sleeps until the device may have returned more than the `seen` chains that the caller knows of.
    fn await_signal(&self, queue: usize, seen: u64, deadline: Instant, what: &str) -> Result<()> {
        let (call, alone) = {
            let mut lane = self.lane(queue);
            // Another thread may have taken what this one is about to wait for.
            if lane.queue.counts.used != seen || lane.queue.arm() {
                return Ok(());
            }
            lane.waiters += 1;
            lane.wake_sole();
            let alone = lane.waiters == 1;
            lane.sole |= alone;
            (lane.queue.call.clone(), alone)
        };
        let left = deadline.saturating_duration_since(Instant::now());
        // With several waiters one of them may take the signal of the others.
        let signalled = call.wait(if alone {
            left
        } else {
            left.min(Duration::from_millis(5))
        });
        let mut lane = self.lane(queue);
        lane.waiters -= 1;
        lane.queue.take_calls();
        if alone {
            lane.sole = false;
        } else {
            // What was taken may have been meant for it.
            lane.wake_sole();
        }
        if signalled || Instant::now() < deadline {
            return Ok(());
        }
        if alone && lane.waiters == 0 && lane.drain()? > 0 {
            return Err(Error::Device(format!(
                "queue {queue} returned a chain without a signal"
            )));
        }
        Err(Error::Timeout {
            what: format!("{what} on queue {queue}: {}", lane.queue.standing()),
            waited: Duration::ZERO,
        })
    }

    /// Waits until the device has returned everything on a queue, raw chains too.
    pub fn wait_idle(&self, queue: usize) -> Result<()> {
        let deadline = Instant::now() + self.options.timeout;
        loop {
            let seen = {
                let mut lane = self.lane(queue);
                lane.drain()?;
                if lane.queue.pending() == 0 {
                    return Ok(());
                }
                lane.queue.counts.used
            };
            self.await_signal(queue, seen, deadline, "idle queue")?;
        }
    }

    /// Sends a request and waits for the body of its answer.
    pub fn call(&self, request: &Request) -> Result<Vec<u8>> {
        self.wait(self.submit(request)?)?.ok()
    }

    /// Sends a request and returns the errno of its answer, 0 if it went well.
    pub fn errno(&self, request: &Request) -> Result<i32> {
        Ok(self.wait(self.submit(request)?)?.errno)
    }

    // --- what no driver sends ---

    /// Makes bytes available as a request, with room for `room` bytes of answer. Nothing is checked; when
    /// the device returns the chain it lands in [`Lane::raw`]. The answer's address.
    pub fn submit_bytes(&self, queue: usize, bytes: &[u8], room: usize) -> Result<u64> {
        let address = self.memory.allocate(bytes.len().max(1) + room, 16)?;
        self.memory.write(address, bytes);
        let answer = address + bytes.len() as u64;
        let mut lane = self.lane(queue);
        let readable = [Segment {
            address,
            len: bytes.len() as u32,
        }];
        let writable = [Segment {
            address: answer,
            len: room as u32,
        }];
        let cut = |segments: &'_ [Segment; 1]| -> Vec<Segment> {
            segments
                .iter()
                .filter(|segment| segment.len > 0)
                .copied()
                .collect()
        };
        lane.queue.add(&cut(&readable), &cut(&writable), false)?;
        lane.queue.publish();
        Ok(answer)
    }

    /// Makes a chain of these descriptors available. A `next` below their number is relative to them, any
    /// other goes into the table as it is. When the device returns the chain it lands in [`Lane::raw`].
    pub fn submit_descriptors(&self, queue: usize, descriptors: &[Descriptor]) -> Result<u16> {
        let mut lane = self.lane(queue);
        let taken = lane.queue.take(descriptors.len())?;
        for (at, descriptor) in descriptors.iter().enumerate() {
            let next = taken
                .get(usize::from(descriptor.next))
                .copied()
                .unwrap_or(descriptor.next);
            lane.queue.set(taken[at], Descriptor { next, ..*descriptor });
        }
        let head = lane.queue.add_taken(taken);
        lane.queue.publish();
        Ok(head)
    }

    // --- life cycle ---

    fn with_queues<T>(&self, f: impl FnOnce(&mut Vmm, &mut [&mut Queue]) -> Result<T>) -> Result<T> {
        let mut vmm = self.vmm();
        let mut lanes: Vec<_> = (0..self.queues()).map(|index| self.lane(index)).collect();
        let mut queues: Vec<_> = lanes.iter_mut().map(|lane| &mut lane.queue).collect();
        f(&mut vmm, &mut queues)
    }

    /// Starts all queues at `bases`.
    pub fn start(&self, bases: &[u16]) -> Result<()> {
        self.with_queues(|vmm, queues| vmm.activate(&self.memory, queues, bases))
    }

    /// Stops all queues; their bases. What the device has not popped stays in the rings.
    pub fn stop(&self) -> Result<Vec<u16>> {
        self.with_queues(|vmm, queues| {
            let bases = vmm.stop(queues)?;
            vmm.forget_memory(&self.memory)?;
            Ok(bases)
        })
    }

    /// Checks that everything a stopped device popped was returned.
    pub fn check_drained(&self, bases: &[u16]) -> Result<()> {
        for (index, base) in bases.iter().enumerate() {
            let used = self.lane(index).queue.used_index();
            if used != *base {
                return Err(Error::Device(format!(
                    "queue {index} stopped at {base}, returned up to {used}"
                )));
            }
        }
        Ok(())
    }

    /// Disables all queues, as Cloud Hypervisor pauses a machine.
    pub fn pause(&self) -> Result<()> {
        self.with_queues(|vmm, queues| vmm.enable(queues, false))
    }

    /// Enables all queues.
    pub fn resume(&self) -> Result<()> {
        self.with_queues(|vmm, queues| vmm.enable(queues, true))
    }

    /// Stops, empties the rings and starts anew, as a rebooting guest does. What was in flight is
    /// forgotten.
    pub fn reboot(&self) -> Result<()> {
        self.stop()?;
        self.reset_rings();
        self.start(&vec![0; self.queues()])
    }

    /// Forgets all requests and empties the rings; for a device that is stopped.
    pub fn reset_rings(&self) {
        for index in 0..self.queues() {
            let mut lane = self.lane(index);
            lane.queue.reset();
            lane.pending.clear();
            lane.done.clear();
        }
    }

    /// Loses the connection and makes another one.
    pub fn reconnect(&self, restart: Restart) -> Result<()> {
        self.with_queues(|vmm, queues| {
            vmm.reconnect()?;
            let bases: Vec<u16> = queues
                .iter()
                .map(|queue| match restart {
                    Restart::Available => queue.available_index(),
                    Restart::Used => queue.used_index(),
                })
                .collect();
            vmm.activate(&self.memory, queues, &bases)
        })
    }

    /// Adds memory while queues run. Later requests may use it.
    pub fn add_memory(&self, place: Place) -> Result<()> {
        let region = self.memory.add(place)?;
        self.vmm().add_memory(&self.memory, &region)
    }

    /// Removes memory while queues run; nothing in flight may use it.
    pub fn remove_memory(&self, address: u64) -> Result<()> {
        let region = self.memory.remove(address)?;
        self.vmm().remove_memory(&self.memory, &region)
    }

    /// Gives a running queue another call event.
    pub fn replace_call(&self, queue: usize) -> Result<()> {
        let vmm = self.vmm();
        vmm.replace_call(&mut self.lane(queue).queue)
    }

    /// Starts to log dirty pages, or swaps the log; the log before.
    pub fn log(&self) -> Result<Option<DirtyLog>> {
        self.with_queues(|vmm, queues| vmm.log(&self.memory, queues))
    }

    /// Ends logging; the log.
    pub fn stop_log(&self) -> Result<Option<DirtyLog>> {
        self.with_queues(|vmm, queues| vmm.stop_log(queues))
    }

    /// Every page of guest memory with its contents, to compare later.
    pub fn snapshot(&self) -> Vec<(Place, Vec<u8>)> {
        self.memory
            .regions()
            .iter()
            .map(|region| {
                (
                    region.place,
                    self.memory.copy(region.place.address, region.place.size as usize),
                )
            })
            .collect()
    }

    /// Addresses of the pages that differ from `before`.
    pub fn changed_pages(&self, before: &[(Place, Vec<u8>)]) -> Vec<u64> {
        let mut changed = Vec::new();
        for (place, bytes) in before {
            for (number, old) in bytes.chunks(PAGE as usize).enumerate() {
                let address = place.address + number as u64 * PAGE;
                if self.memory.copy(address, old.len()) != old {
                    changed.push(address);
                }
            }
        }
        changed
    }

    /// Whose messages are sent.
    pub fn order(&self) -> Order {
        self.options.order
    }
}

/// Segments of one page at most, the first one up to the next page border.
pub(crate) fn pages(address: u64, len: usize) -> Vec<Segment> {
    let mut segments = Vec::new();
    let (mut at, end) = (address, address + len as u64);
    while at < end {
        let next = (at / PAGE + 1) * PAGE;
        segments.push(Segment {
            address: at,
            len: (next.min(end) - at) as u32,
        });
        at = next;
    }
    segments
}
