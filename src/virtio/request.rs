//! One popped descriptor chain that carries a FUSE request, until it is answered.
//!
//! A [`Request`] is consumed by what answers it; if it is dropped instead, the guest gets `EIO` and a bug is
//! counted. It borrows the queue's buffers, so executing a request on its queue thread allocates nothing. To be
//! answered later it is turned into a [`Parked`], which owns its buffers and keeps their memory mapped.

use std::cell::Cell;
use std::sync::Arc;

use zerocopy::{Immutable, IntoBytes};

use super::memory::{Buffers, GuestReader, GuestWriter};
use super::ring::{Head, Ring};
use crate::fuse::abi::OutHeader;
use crate::metrics::Metrics;

/// Bytes of the header of a reply.
const HEADER: usize = size_of::<OutHeader>();

/// A request that is being executed.
pub struct Request<'a> {
    ring: &'a Arc<Ring>,
    buffers: &'a mut Buffers,
    metrics: &'a Metrics,
    head: Head,
    unique: u64,
    about: About,
    answered: bool,
    /// Set when the request is put aside.
    put_aside: Option<&'a Cell<bool>>,
}

/// What a request is about, as far as people want to know while it waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// FUSE opcode; 0 before it was decoded.
    pub opcode: u32,
    /// The nodeid that it names.
    pub nodeid: u64,
}

impl<'a> Request<'a> {
    /// The active request with the first descriptor `head`.
    pub fn new(
        ring: &'a Arc<Ring>,
        buffers: &'a mut Buffers,
        metrics: &'a Metrics,
        head: Head,
        unique: u64,
    ) -> Self {
        Request {
            ring,
            buffers,
            metrics,
            head,
            unique,
            about: About::default(),
            answered: false,
            put_aside: None,
        }
    }

    /// Notes what the request is about.
    pub fn is_about(&mut self, about: About) {
        self.about = about;
    }

    /// The ring that it came from.
    pub fn ring(&self) -> &Arc<Ring> {
        self.ring
    }

    /// Asks for `put_aside` to be set when the request is put aside instead of being answered.
    pub fn tells(&mut self, put_aside: &'a Cell<bool>) {
        self.put_aside = Some(put_aside);
    }

    /// Room for the body of the reply, in bytes.
    pub fn room(&self) -> usize {
        self.buffers.writable().saturating_sub(HEADER)
    }

    /// The bytes of the request from `offset` on, at most `limit`.
    pub fn payload(&mut self, offset: usize, limit: usize) -> GuestReader<'_> {
        self.buffers.reader(offset, limit)
    }

    /// Room for at most `limit` bytes of data. Finish with [`Request::reply_written`].
    pub fn data(&mut self, limit: usize) -> GuestWriter<'_> {
        self.buffers.writer(HEADER, limit)
    }

    /// Answers with the data that was written through [`Request::data`].
    pub fn reply_written(self, length: usize) {
        self.metrics.read(length as u64);
        self.finish(0, length);
    }

    /// Answers a WRITE.
    pub fn reply_wrote(self, body: &crate::fuse::abi::WriteOut) {
        self.metrics.written(u64::from(body.size));
        self.reply(body);
    }

    /// Answers with an empty body.
    pub fn reply_empty(self) {
        self.finish(0, 0);
    }

    /// Answers with a struct.
    pub fn reply<T: IntoBytes + Immutable>(self, body: &T) {
        self.reply_bytes(body.as_bytes());
    }

    /// Answers with bytes.
    pub fn reply_bytes(self, body: &[u8]) {
        self.reply_parts(body, &[]);
    }

    /// Answers with two pieces of bytes, one after the other.
    pub fn reply_parts(self, first: &[u8], second: &[u8]) {
        let length = first.len() + second.len();
        if length > self.room() {
            // The driver left too little room for what it asked.
            self.metrics.malformed();
            return self.fail(libc::EIO);
        }
        self.buffers.copy_out(HEADER, first);
        if !second.is_empty() {
            self.buffers.copy_out(HEADER + first.len(), second);
        }
        self.finish(0, length);
    }

    /// Answers with an error number.
    pub fn fail(self, errno: i32) {
        self.metrics.error(errno);
        self.finish(-errno, 0);
    }

    /// Returns the chain of a request that has no reply.
    pub fn finish_silently(mut self) {
        self.answered = true;
        self.ring.complete(self.head, 0);
    }

    fn finish(mut self, error: i32, body: usize) {
        self.answered = true;
        self.complete(error, body);
    }

    fn complete(&mut self, error: i32, body: usize) {
        let mut length = 0;
        if self.buffers.writable() >= HEADER {
            length = (HEADER + body) as u32;
            let header = OutHeader {
                len: length,
                error,
                unique: self.unique,
            };
            self.buffers.copy_out(0, header.as_bytes());
        }
        self.ring.complete(self.head, length);
    }

    /// Keeps the request for later: nothing touches its buffers until [`Parked::resume`].
    pub fn park(mut self) -> Box<Parked> {
        self.answered = true;
        if let Some(put_aside) = self.put_aside {
            put_aside.set(true);
        }
        let parked = Box::new(Parked {
            ring: Arc::clone(self.ring),
            buffers: self.buffers.take(),
            head: self.head,
            unique: self.unique,
            about: self.about,
            settled: false,
        });
        parked.ring.park(parked.head);
        parked
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.metrics.bug();
            self.metrics.error(libc::EIO);
            self.complete(-libc::EIO, 0);
        }
    }
}

/// A request that waits for something. Whoever holds it answers it or abandons it.
pub struct Parked {
    ring: Arc<Ring>,
    buffers: Buffers,
    head: Head,
    unique: u64,
    about: About,
    settled: bool,
}

impl Parked {
    /// The ring that it came from.
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    /// The number by which the driver knows the request.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// What the request is about.
    pub fn about(&self) -> About {
        self.about
    }

    /// Makes the request active, or gives it back because its ring does not run now.
    pub fn resume(mut self: Box<Self>) -> Result<Resumed, Box<Parked>> {
        if !self.ring.unpark(self.head) {
            return Err(self);
        }
        self.settled = true;
        Ok(Resumed { parked: self })
    }

    /// Forgets the request: the front-end that could take the answer is gone.
    pub fn abandon(mut self) {
        self.settled = true;
        self.ring.abandon(self.head);
    }
}

/// A request that was parked and is active again. The driver is told when this is dropped.
pub struct Resumed {
    parked: Box<Parked>,
}

impl Resumed {
    /// The request. To be called once.
    pub fn request<'a>(&'a mut self, metrics: &'a Metrics) -> Request<'a> {
        let Parked {
            ring,
            buffers,
            head,
            unique,
            about,
            ..
        } = &mut *self.parked;
        let mut request = Request::new(ring, buffers, metrics, *head, *unique);
        request.is_about(*about);
        request
    }
}

impl Drop for Resumed {
    fn drop(&mut self) {
        self.parked.ring.signal_used();
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        if !self.settled {
            self.ring.metrics().bug();
            if self.ring.unpark(self.head) {
                let metrics = self.ring.metrics();
                Request::new(&self.ring, &mut self.buffers, metrics, self.head, self.unique).fail(libc::EIO);
                self.ring.signal_used();
            } else {
                self.ring.abandon(self.head);
            }
        }
    }
}
