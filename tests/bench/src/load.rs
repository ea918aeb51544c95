//! A load generator on the virtqueues that costs little itself.
//!
//! Each slot has its descriptor chain laid out once, in a table of its own as Linux does: header, argument, data
//! pages of a WRITE; reply header, reply body or data pages of a READ. A request is then a few bytes written into the
//! slot and one head pushed. All completions that one look at the used ring finds are handled before the device is
//! kicked again.

use std::time::{Duration, Instant};

use rafsd_frontend::abi::{IN_HEADER, InHeader, OUT_HEADER};
use rafsd_frontend::memory::{PAGE, Slice};
use rafsd_frontend::vring::{Descriptor, INDIRECT, NEXT, WRITE};
use rafsd_frontend::{Error, Guest, Result};

/// What one chain of requests does next.
pub trait Work {
    /// Writes the next request of a slot into `request`, given the reply to the one before (`None` at the start).
    fn next(&mut self, slot: usize, reply: Option<&Slot>, request: &mut Next);
}

/// A request to be sent.
#[derive(Default)]
pub struct Next {
    /// Opcode.
    pub opcode: u32,
    /// Node.
    pub nodeid: u64,
    /// Argument; kept from the request before if untouched.
    pub argument: Vec<u8>,
    /// Bytes of data that follow the argument (WRITE).
    pub write: u32,
    /// Bytes of room behind the reply header.
    pub room: u32,
    /// The request before was the last of an operation.
    pub finished: bool,
}

/// Room for one request in flight.
pub struct Slot {
    memory: Slice,
    head: u16,
    sent: Instant,
}

const ARGUMENT: usize = IN_HEADER;
const REPLY: usize = PAGE as usize;
const BODY: usize = REPLY + OUT_HEADER;
const TABLE: usize = 2 * PAGE as usize;
const DATA: usize = 12 * PAGE as usize;

impl Slot {
    fn word(&self, offset: usize) -> u32 {
        self.memory.read_u32(offset)
    }

    /// Error number of the reply, 0 or negative.
    pub fn error(&self) -> i32 {
        self.word(REPLY + 4) as i32
    }

    /// A u64 of the reply's body.
    pub fn body_u64(&self, offset: usize) -> u64 {
        u64::from(self.word(BODY + offset)) | u64::from(self.word(BODY + offset + 4)) << 32
    }

    /// Bytes of the reply, with its header.
    pub fn length(&self) -> u32 {
        self.word(REPLY)
    }

    fn lay(&self, table: &mut Vec<u8>, request: &Next, unique: u64) -> u32 {
        let argument = request.argument.len() as u32;
        let header = InHeader {
            len: IN_HEADER as u32 + argument + request.write,
            opcode: request.opcode,
            unique,
            nodeid: request.nodeid,
            pid: 1,
            ..InHeader::default()
        };
        self.memory.write(0, &header.bytes());
        self.memory.write(ARGUMENT, &request.argument);
        let at = |offset: usize| self.memory.address + offset as u64;
        table.clear();
        let mut count = 0u16;
        let mut put = |address: u64, len: u32, write: u16| {
            count += 1;
            let descriptor = Descriptor {
                address,
                len,
                flags: write | NEXT,
                next: count,
            };
            table.extend_from_slice(&descriptor.bytes());
        };
        put(at(0), IN_HEADER as u32, 0);
        if argument > 0 {
            put(at(ARGUMENT), argument, 0);
        }
        let page = PAGE as u32;
        for offset in (0..request.write).step_by(PAGE as usize) {
            put(at(DATA + offset as usize), (request.write - offset).min(page), 0);
        }
        put(at(REPLY), OUT_HEADER as u32, WRITE);
        if request.room > 0 && request.room <= 2048 {
            put(at(BODY), request.room, WRITE);
        } else {
            for offset in (0..request.room).step_by(PAGE as usize) {
                put(
                    at(DATA + offset as usize),
                    (request.room - offset).min(page),
                    WRITE,
                );
            }
        }
        // The last one has no next.
        let last = table.len() - 4;
        table[last] &= !(NEXT as u8);
        self.memory.write(TABLE, table);
        table.len() as u32
    }
}

/// Slots of one queue.
pub struct Load<'a> {
    guest: &'a Guest,
    queue: usize,
    slots: Vec<Slot>,
    by_head: Vec<Option<usize>>,
    table: Vec<u8>,
    next: Vec<Next>,
    unique: u64,
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        for slot in &self.slots {
            self.guest.memory.release(slot.memory.address, slot.memory.len());
            self.guest.lane(self.queue).queue.give_back(&[slot.head]);
        }
    }
}

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Operations finished.
    pub operations: u64,
    /// Requests finished.
    pub requests: u64,
    /// Time.
    pub elapsed: Duration,
    /// Signals of the device.
    pub calls: u64,
    /// Time of each request, in nanoseconds; only at depth 1.
    pub latencies: Vec<u64>,
}

impl Outcome {
    /// What queues that ran side by side did together.
    pub fn sum(outcomes: Vec<Outcome>) -> Outcome {
        outcomes
            .into_iter()
            .reduce(|mut all, one| {
                all.operations += one.operations;
                all.requests += one.requests;
                all.elapsed = all.elapsed.max(one.elapsed);
                all.calls += one.calls;
                all.latencies.extend(one.latencies);
                all
            })
            .unwrap_or_default()
    }

    /// Operations per second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }
}

impl<'a> Load<'a> {
    /// `depth` slots on a queue, each with room for `data` bytes.
    pub fn new(guest: &'a Guest, queue: usize, depth: usize, data: usize) -> Result<Self> {
        let size = usize::from(guest.options.queue_size);
        let mut load = Self {
            guest,
            queue,
            slots: Vec::new(),
            by_head: vec![None; size],
            table: Vec::new(),
            next: Vec::new(),
            unique: 2,
        };
        for slot in 0..depth {
            let len = DATA + data;
            let address = guest.memory.allocate(len, PAGE)?;
            let memory = guest.memory.slice(address, len)?;
            memory.fill(0x6b);
            let head = guest.lane(queue).queue.take(1)?[0];
            load.by_head[usize::from(head)] = Some(slot);
            load.slots.push(Slot {
                memory,
                head,
                sent: Instant::now(),
            });
            load.next.push(Next::default());
        }
        Ok(load)
    }

    /// Runs `work` for `time`, and waits for what is then in flight.
    pub fn run(&mut self, work: &mut dyn Work, time: Duration) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut lane = self.guest.lane(self.queue);
        let queue = &mut lane.queue;
        let mut in_flight = self.slots.len();
        for slot in 0..self.slots.len() {
            work.next(slot, None, &mut self.next[slot]);
            send(
                &mut self.slots[slot],
                &self.next[slot],
                &mut self.table,
                &mut self.unique,
                queue,
            );
        }
        queue.publish();
        let start = Instant::now();
        let mut idle = 0;
        let single = self.slots.len() == 1;
        queue.take_calls();
        let before = queue.counts.calls;
        while in_flight > 0 {
            let mut found = 0;
            let now = Instant::now();
            let over = now - start >= time;
            while let Some((head, _)) = queue.pop_raw() {
                found += 1;
                let slot = self.by_head.get(head as usize).copied().flatten();
                let slot = slot.ok_or_else(|| Error::Device(format!("head {head} was never given")))?;
                outcome.requests += 1;
                let place = &self.slots[slot];
                if single {
                    outcome.latencies.push((now - place.sent).as_nanos() as u64);
                }
                let next = &mut self.next[slot];
                work.next(slot, Some(place), next);
                outcome.operations += u64::from(next.finished);
                if over {
                    in_flight -= 1;
                } else {
                    send(
                        &mut self.slots[slot],
                        next,
                        &mut self.table,
                        &mut self.unique,
                        queue,
                    );
                }
            }
            if over && outcome.elapsed.is_zero() {
                outcome.elapsed = now - start;
                queue.take_calls();
                outcome.calls = queue.counts.calls - before;
            }
            if found > 0 {
                queue.publish();
                idle = 0;
                continue;
            }
            // A guest's driver sleeps until its interrupt; a short look before that stands for its way to sleep.
            idle += 1;
            if idle > 50 && !queue.arm() {
                if !queue.call.wait(Duration::from_secs(30)) {
                    return Err(Error::Timeout {
                        what: "completion".into(),
                        waited: Duration::from_secs(30),
                    });
                }
                queue.take_calls();
            }
        }
        Ok(outcome)
    }
}

fn send(
    slot: &mut Slot,
    request: &Next,
    table: &mut Vec<u8>,
    unique: &mut u64,
    queue: &mut rafsd_frontend::vring::Queue,
) {
    *unique += 2;
    let len = slot.lay(table, request, *unique);
    let descriptor = Descriptor {
        address: slot.memory.address + TABLE as u64,
        len,
        flags: INDIRECT,
        next: 0,
    };
    queue.set(slot.head, descriptor);
    slot.sent = Instant::now();
    queue.push(slot.head);
}
