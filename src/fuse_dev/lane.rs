//! One queue of the driver. A thread reads requests from the kernel and makes them available; another waits for used
//! ones and writes the replies. A request that waits for data holds a slot and no thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::io::Errno;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::fuse::init::MAX_WRITE;
use crate::sandbox::{Role, Sandbox};

/// Requests under way at a time.
const SLOTS: u16 = 128;
/// Descriptors: two a slot, one for the request and one for the reply.
pub const QUEUE: u16 = SLOTS * 2;
/// Bytes of a request or a reply: the largest data, and what stands before it.
const BUFFER: u64 = MAX_WRITE as u64 + 4096;
/// Offset of the available ring, behind the descriptors.
pub const AVAILABLE: u64 = QUEUE as u64 * 16;
/// Offset of the used ring.
pub const USED: u64 = AVAILABLE + 4096;
/// Offset of the buffers.
const BUFFERS: u64 = USED + 4096;
/// Bytes of memory of a lane. Only what was used is backed by pages.
pub const LANE: u64 = (BUFFERS + SLOTS as u64 * 2 * BUFFER).next_multiple_of(1 << 21);

/// How the two sides of a queue wake each other.
pub struct Events {
    /// Something was made available.
    pub kick: EventFd,
    /// Something was used.
    pub call: EventFd,
}

impl Events {
    /// A pair of events.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            kick: EventFd::new(EFD_CLOEXEC)?,
            call: EventFd::new(EFD_CLOEXEC)?,
        })
    }
}

struct Shared {
    device: Arc<OwnedFd>,
    memory: Arc<GuestMemoryMmap>,
    base: u64,
    events: Events,
    stopped: AtomicBool,
}

/// A running lane. Its threads end when the file system was unmounted and [`Lane::stop`] was called.
pub struct Lane {
    shared: Arc<Shared>,
}

impl Lane {
    /// Starts the threads.
    pub fn start(
        device: Arc<OwnedFd>,
        memory: Arc<GuestMemoryMmap>,
        base: u64,
        events: Events,
        sandbox: &Sandbox,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            device,
            memory,
            base,
            events,
            stopped: AtomicBool::new(false),
        });
        let (give, take) = unbounded();
        for slot in (0..SLOTS).rev() {
            // The channel lives as long as the threads.
            let _ = give.send(slot);
        }
        let start = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let sandbox = sandbox.clone();
            std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                sandbox.enter(Role::Lane);
                work();
            })
        };
        let (reader, writer) = (Arc::clone(&shared), Arc::clone(&shared));
        start("fuse-requests", Box::new(move || reader.read_requests(&take)))?;
        start("fuse-replies", Box::new(move || writer.write_replies(&give)))?;
        Ok(Self { shared })
    }

    /// Ends the thread that waits for the device.
    pub fn stop(&self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        let _ = self.shared.events.call.write(1);
    }
}

impl Shared {
    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.base + offset)
    }

    fn request(slot: u16) -> u64 {
        BUFFERS + u64::from(slot) * 2 * BUFFER
    }

    fn read_requests(&self, slots: &Receiver<u16>) {
        let mut request = vec![0; BUFFER as usize];
        let mut next = 0u16;
        while let Ok(slot) = slots.recv() {
            let length = loop {
                match rustix::io::read(&*self.device, request.as_mut_slice()) {
                    Ok(length) => break length,
                    // Interrupted, or the request was taken back.
                    Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
                    Err(Errno::NODEV) => return,
                    Err(error) => return tracing::error!("/dev/fuse: {error}"),
                }
            };
            let bytes = request.get(..length).unwrap_or_default();
            if let Err(error) = self.make_available(slot, bytes, &mut next) {
                return tracing::error!("FUSE queue: {error}");
            }
        }
    }

    fn make_available(&self, slot: u16, request: &[u8], next: &mut u16) -> Result<(), GuestMemoryError> {
        let (first, place) = (slot * 2, Self::request(slot));
        self.memory.write_slice(request, self.at(place))?;
        let length = request.len() as u32;
        self.describe(first, place, length, VRING_DESC_F_NEXT as u16, first + 1)?;
        self.describe(
            first + 1,
            place + BUFFER,
            BUFFER as u32,
            VRING_DESC_F_WRITE as u16,
            0,
        )?;
        let entry = AVAILABLE + 4 + u64::from(*next % QUEUE) * 2;
        self.memory.write_obj(first, self.at(entry))?;
        *next = next.wrapping_add(1);
        self.memory
            .store(*next, self.at(AVAILABLE + 2), Ordering::Release)?;
        // Full only after 2^64 kicks.
        let _ = self.events.kick.write(1);
        Ok(())
    }

    /// Writes a descriptor: address, length, flags, next.
    fn describe(
        &self,
        index: u16,
        place: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) -> Result<(), GuestMemoryError> {
        let at = u64::from(index) * 16;
        self.memory.write_obj(self.base + place, self.at(at))?;
        self.memory.write_obj(length, self.at(at + 8))?;
        self.memory.write_obj(flags, self.at(at + 12))?;
        self.memory.write_obj(next, self.at(at + 14))
    }

    fn write_replies(&self, slots: &Sender<u16>) {
        let mut reply = vec![0; BUFFER as usize];
        let mut last = 0u16;
        loop {
            match self.replies(&mut last, &mut reply, slots) {
                Ok(()) => {}
                Err(error) => return tracing::error!("FUSE queue: {error}"),
            }
            if self.stopped.load(Ordering::SeqCst) || self.events.call.read().is_err() {
                return;
            }
        }
    }

    /// Writes all replies that are there.
    fn replies(&self, last: &mut u16, reply: &mut [u8], slots: &Sender<u16>) -> Result<(), GuestMemoryError> {
        while *last != self.memory.load::<u16>(self.at(USED + 2), Ordering::Acquire)? {
            let entry = USED + 4 + u64::from(*last % QUEUE) * 8;
            let head: u32 = self.memory.read_obj(self.at(entry))?;
            let length: u32 = self.memory.read_obj(self.at(entry + 4))?;
            *last = last.wrapping_add(1);
            let slot = (head / 2) as u16;
            // What has no reply is used with a length of 0.
            if let Some(bytes) = reply.get_mut(..length as usize).filter(|bytes| !bytes.is_empty()) {
                self.memory
                    .read_slice(bytes, self.at(Self::request(slot) + BUFFER))?;
                match rustix::io::write(&*self.device, bytes) {
                    // The caller was killed meanwhile, or the file system is gone.
                    Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
                    Err(error) => tracing::warn!("/dev/fuse: a reply was refused: {error}"),
                }
            }
            let _ = slots.send(slot);
        }
        Ok(())
    }
}
