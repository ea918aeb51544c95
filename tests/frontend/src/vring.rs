//! The driver's side of a split virtqueue (VIRTIO 1.3, section 2.7).
//!
//! A [`Queue`] counts what it made available and what came back, and refuses to go on when the device
//! returns a head that it does not have, so that a lost or doubled completion cannot pass unseen.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use crate::memory::{GuestMemory, Slice};
use crate::{Error, Result};

/// The descriptor continues at `next`.
pub const NEXT: u16 = 1;
/// The device writes to the descriptor.
pub const WRITE: u16 = 2;
/// The descriptor points to a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A descriptor as it stands in a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next one.
    pub next: u16,
}

impl Descriptor {
    /// Its 16 bytes.
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A piece of guest memory in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
}

/// An event counter shared with the device.
#[derive(Clone)]
pub struct Event(Arc<OwnedFd>);

impl Event {
    /// A new one, at zero.
    pub fn new() -> Result<Self> {
        rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(|fd| Self(Arc::new(fd)))
            .map_err(|e| Error::io("eventfd", e))
    }

    /// Adds one.
    pub fn signal(&self) {
        // The counter of a queue cannot come near its limit, the only reason for this to fail.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Takes the count, 0 if there is none.
    pub fn take(&self) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(&*self.0, &mut bytes) {
            Ok(8) => u64::from_ne_bytes(bytes),
            _ => 0,
        }
    }

    /// Waits until the count is not zero; false when the time is over.
    pub fn wait(&self, timeout: Duration) -> bool {
        let timeout = Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: timeout.subsec_nanos() as _,
        };
        let mut polled = [PollFd::new(&*self.0, PollFlags::IN)];
        matches!(rustix::event::poll(&mut polled, Some(&timeout)), Ok(1))
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Numbers of one queue since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Chains made available.
    pub added: u64,
    /// Chains returned by the device.
    pub used: u64,
    /// Times the device was kicked.
    pub kicks: u64,
    /// Times the device signalled (writes to the call eventfd).
    pub calls: u64,
}

/// How a queue is set up.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Number of descriptors; a power of two.
    pub size: u16,
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
}

/// One virtqueue.
pub struct Queue {
    /// Its number on the device.
    pub index: usize,
    /// How it is set up.
    pub shape: Shape,
    memory: Arc<GuestMemory>,
    /// The descriptor table.
    pub descriptors: Slice,
    /// The ring of available heads.
    pub available: Slice,
    /// The ring of used heads.
    pub used: Slice,
    /// Kicks the device.
    pub kick: Event,
    /// Signals us.
    pub call: Event,
    free: Vec<u16>,
    /// For every head in flight: its descriptors in the table.
    in_flight: Vec<Option<Chain>>,
    next_available: u16,
    published: u16,
    next_used: u16,
    /// Our own signals that are still in the call event.
    nudges: u64,
    /// What happened so far.
    pub counts: Counts,
}

struct Chain {
    descriptors: Vec<u16>,
    table: Option<(u64, usize)>,
}

/// A chain that the device returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Its head.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

impl Queue {
    /// Lays out an empty queue in guest memory.
    pub fn new(memory: &Arc<GuestMemory>, index: usize, shape: Shape) -> Result<Self> {
        if !shape.size.is_power_of_two() {
            return Err(Error::Usage(format!(
                "queue size {} is not a power of two",
                shape.size
            )));
        }
        let size = usize::from(shape.size);
        let place = |len, align| {
            let address = memory.allocate(len, align)?;
            let slice = memory.slice(address, len)?;
            slice.fill(0);
            Ok::<_, Error>(slice)
        };
        Ok(Self {
            index,
            shape,
            memory: memory.clone(),
            descriptors: place(16 * size, 4096)?,
            available: place(6 + 2 * size, 4096)?,
            used: place(6 + 8 * size, 4096)?,
            kick: Event::new()?,
            call: Event::new()?,
            free: (0..shape.size).rev().collect(),
            in_flight: (0..size).map(|_| None).collect(),
            next_available: 0,
            published: 0,
            next_used: 0,
            nudges: 0,
            counts: Counts::default(),
        })
    }

    fn mask(&self, index: u16) -> usize {
        usize::from(index & (self.shape.size - 1))
    }

    /// Free descriptors.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Chains that the device has not returned.
    pub fn pending(&self) -> usize {
        self.in_flight.iter().flatten().count()
    }

    /// Where driver and device stand, for messages: a chain that the device has not used and did not want to be kicked for
    /// is one that it overlooks.
    pub fn standing(&self) -> String {
        let (available, used) = (self.published, self.used.load_u16(2));
        let kick = if self.shape.event_idx {
            format!(
                "kick wanted for chain {}",
                self.used.load_u16(4 + 8 * usize::from(self.shape.size))
            )
        } else {
            format!("kick wanted: {}", self.used.load_u16(0) & 1 == 0)
        };
        format!(
            "{available} chains made available, {used} used, {kick}, {} kicks sent",
            self.counts.kicks
        )
    }

    /// Index behind the last chain made available.
    pub fn available_index(&self) -> u16 {
        self.published
    }

    /// Index behind the last chain that the device returned, as it stands in memory.
    pub fn used_index(&self) -> u16 {
        self.used.load_u16(2)
    }

    /// Adds a chain: what the device reads, then what it writes. With `indirect` in a table of its own.
    /// Not visible to the device before [`Queue::publish`].
    pub fn add(&mut self, readable: &[Segment], writable: &[Segment], indirect: bool) -> Result<u16> {
        let count = readable.len() + writable.len();
        let flags = |at: usize| {
            let write = if at >= readable.len() { WRITE } else { 0 };
            write | if at + 1 < count { NEXT } else { 0 }
        };
        let segments = readable.iter().chain(writable).enumerate();
        let needed = if indirect { 1 } else { count };
        if count == 0 {
            return Err(Error::Usage("a chain needs a descriptor".into()));
        }
        if self.free.len() < needed {
            return Err(Error::QueueFull(self.index));
        }
        if indirect {
            let bytes = 16 * count;
            let table = self.memory.allocate(bytes, 16)?;
            for (at, segment) in segments {
                let next = if at + 1 < count { at as u16 + 1 } else { 0 };
                let descriptor = Descriptor {
                    address: segment.address,
                    len: segment.len,
                    flags: flags(at),
                    next,
                };
                self.memory.write(table + 16 * at as u64, &descriptor.bytes());
            }
            let head = self.free.split_off(self.free.len() - 1)[0];
            self.set(
                head,
                Descriptor {
                    address: table,
                    len: bytes as u32,
                    flags: INDIRECT,
                    next: 0,
                },
            );
            self.in_flight[usize::from(head)] = Some(Chain {
                descriptors: vec![head],
                table: Some((table, bytes)),
            });
            self.push(head);
            return Ok(head);
        }
        let mut descriptors = self.free.split_off(self.free.len() - count);
        descriptors.reverse();
        for (at, segment) in segments {
            let next = descriptors.get(at + 1).copied().unwrap_or(0);
            let descriptor = Descriptor {
                address: segment.address,
                len: segment.len,
                flags: flags(at),
                next,
            };
            self.set(descriptors[at], descriptor);
        }
        let head = descriptors[0];
        self.in_flight[usize::from(head)] = Some(Chain {
            descriptors,
            table: None,
        });
        self.push(head);
        Ok(head)
    }

    /// Takes descriptors to be written by the caller, who may push the first of them as a head again and again
    /// (load generators), or once and wrongly (hostile chains).
    pub fn take(&mut self, count: usize) -> Result<Vec<u16>> {
        if self.free.len() < count {
            return Err(Error::QueueFull(self.index));
        }
        Ok(self.free.split_off(self.free.len() - count))
    }

    /// Gives taken descriptors back, when the device holds none of them.
    pub fn give_back(&mut self, descriptors: &[u16]) {
        self.free.extend_from_slice(descriptors);
    }

    /// Adds a chain whose descriptors were taken and written by the caller.
    pub fn add_taken(&mut self, descriptors: Vec<u16>) -> u16 {
        let head = descriptors[0];
        self.in_flight[usize::from(head)] = Some(Chain {
            descriptors,
            table: None,
        });
        self.push(head);
        head
    }

    /// Writes a descriptor into the table.
    pub fn set(&self, index: u16, descriptor: Descriptor) {
        self.descriptors
            .write(16 * usize::from(index), &descriptor.bytes());
    }

    /// Puts a head into the ring, whatever it is. Not visible before [`Queue::publish`].
    pub fn push(&mut self, head: u16) {
        self.available
            .write(4 + 2 * self.mask(self.next_available), &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        self.counts.added += 1;
    }

    /// Shows all added chains to the device, and kicks it if it asks for that. Says whether it did.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return false;
        }
        self.available.store_u16(2, new);
        self.published = new;
        fence(Ordering::SeqCst);
        let wanted = if self.shape.event_idx {
            let event = self.used.load_u16(4 + 8 * usize::from(self.shape.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used.load_u16(0) & 1 == 0
        };
        if wanted {
            self.force_kick();
        }
        wanted
    }

    /// Kicks the device, wanted or not.
    pub fn force_kick(&mut self) {
        self.kick.signal();
        self.counts.kicks += 1;
    }

    /// The next chain that the device returned.
    pub fn pop(&mut self) -> Result<Option<Used>> {
        let Some((id, len)) = self.pop_raw() else {
            return Ok(None);
        };
        let chain = u16::try_from(id)
            .ok()
            .and_then(|head| self.in_flight.get_mut(usize::from(head))?.take());
        let Some(chain) = chain else {
            return Err(Error::Device(format!(
                "virtqueue {} returned head {id}, which it did not have",
                self.index
            )));
        };
        self.counts.used += 1;
        self.free.extend_from_slice(&chain.descriptors);
        if let Some((address, len)) = chain.table {
            self.memory.release(address, len);
        }
        Ok(Some(Used { head: id as u16, len }))
    }

    /// The next entry of the used ring, unchecked: (id, length).
    pub fn pop_raw(&mut self) -> Option<(u32, u32)> {
        if self.used.load_u16(2) == self.next_used {
            return None;
        }
        let at = 4 + 8 * self.mask(self.next_used);
        self.next_used = self.next_used.wrapping_add(1);
        Some((self.used.read_u32(at), self.used.read_u32(at + 4)))
    }

    /// Forgets a head that was pushed unchecked (see [`Queue::push`]).
    pub fn counted(&mut self) {
        self.counts.used += 1;
    }

    /// Asks for a signal at the next completion. True if there is one already (do not wait then).
    pub fn arm(&mut self) -> bool {
        if self.shape.event_idx {
            self.available
                .store_u16(4 + 2 * usize::from(self.shape.size), self.next_used);
        } else {
            self.available.store_u16(0, 0);
        }
        fence(Ordering::SeqCst);
        self.used.load_u16(2) != self.next_used
    }

    /// Asks for no signal until `count` more completions, or none at all without EVENT_IDX.
    pub fn disarm(&mut self, count: u16) {
        if self.shape.event_idx {
            let event = self.next_used.wrapping_add(count.saturating_sub(1));
            self.available
                .store_u16(4 + 2 * usize::from(self.shape.size), event);
        } else {
            self.available.store_u16(0, 1);
        }
    }

    /// Takes the signals that came in.
    pub fn take_calls(&mut self) -> u64 {
        let calls = self.call.take().saturating_sub(std::mem::take(&mut self.nudges));
        self.counts.calls += calls;
        calls
    }

    /// Wakes whoever waits for a signal, in place of the device.
    pub fn nudge(&mut self) {
        self.nudges += 1;
        self.call.signal();
    }

    /// Replaces both events, as a VMM does when it starts the queue anew. A kick that the device may not
    /// have seen is repeated.
    pub fn renew_events(&mut self) -> Result<()> {
        self.take_calls();
        self.kick = Event::new()?;
        self.call = Event::new()?;
        Ok(())
    }

    /// Empties the queue, as a driver does after it reset the device. All descriptors are free again.
    pub fn reset(&mut self) {
        for slice in [&self.descriptors, &self.available, &self.used] {
            slice.fill(0);
        }
        for chain in self.in_flight.iter_mut().filter_map(Option::take) {
            if let Some((address, len)) = chain.table {
                self.memory.release(address, len);
            }
        }
        self.free = (0..self.shape.size).rev().collect();
        self.next_available = 0;
        self.published = 0;
        self.next_used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Place;

    /// A device that returns what it is told to.
    struct Device<'a>(&'a Queue, u16);

    impl Device<'_> {
        fn put(&mut self, id: u32, len: u32) {
            let at = 4 + 8 * self.0.mask(self.1);
            self.0.used.write(at, &id.to_le_bytes());
            self.0.used.write(at + 4, &len.to_le_bytes());
            self.1 = self.1.wrapping_add(1);
            self.0.used.store_u16(2, self.1);
        }
    }

    fn queue(event_idx: bool) -> Queue {
        let memory = Arc::new(
            GuestMemory::new(&[Place {
                address: 0,
                size: 1 << 20,
            }])
            .unwrap(),
        );
        Queue::new(&memory, 0, Shape { size: 4, event_idx }).unwrap()
    }

    const A: Segment = Segment {
        address: 0x8000,
        len: 40,
    };
    const B: Segment = Segment {
        address: 0x9000,
        len: 80,
    };

    #[test]
    fn a_chain_is_laid_out_in_order() {
        let mut queue = queue(false);
        let head = queue.add(&[A], &[B, A], false).unwrap();
        assert_eq!(queue.room(), 1);
        let mut table = [0; 64];
        queue.descriptors.read(0, &mut table);
        let at = usize::from(head) * 16;
        assert_eq!(table[at..at + 8], 0x8000u64.to_le_bytes());
        let next = u16::from_le_bytes([table[at + 14], table[at + 15]]);
        let at = usize::from(next) * 16;
        assert_eq!(table[at..at + 8], 0x9000u64.to_le_bytes());
        assert_eq!(u16::from_le_bytes([table[at + 12], table[at + 13]]), WRITE | NEXT);
        assert!(queue.publish());
        assert_eq!(queue.kick.take(), 1);
    }

    #[test]
    fn a_head_that_was_not_given_is_noticed() {
        let mut queue = queue(true);
        let head = u32::from(queue.add(&[A], &[], true).unwrap());
        queue.publish();
        Device(&queue, 0).put(head, 0);
        assert_eq!(queue.pop().unwrap().unwrap().len, 0);
        Device(&queue, 1).put(head, 0);
        assert!(matches!(queue.pop(), Err(Error::Device(_))));
        Device(&queue, 2).put(70_000, 0);
        assert!(matches!(queue.pop(), Err(Error::Device(_))));
    }

    #[test]
    fn kicks_follow_the_wish_of_the_device() {
        let mut queue = queue(true);
        queue.used.store_u16(4 + 8 * 4, 1);
        queue.add(&[A], &[], false).unwrap();
        assert!(!queue.publish());
        queue.add(&[A], &[], false).unwrap();
        assert!(queue.publish());
        let mut queue = self::queue(false);
        queue.used.store_u16(0, 1);
        queue.add(&[A], &[], false).unwrap();
        assert!(!queue.publish());
    }
}
