//! Reads of absent data: fetched by the store, then executed again.

use std::sync::{Arc, Weak};
use std::time::Instant;

use backend::store::FetchError;
use rafs::fs::{Absent, HeldChunks, ReadOutcome};

use super::Deferred;
use super::entry::{Answer, Entry, ImageRead, Wait};
use crate::fuse::errno::Errno;
use crate::mounts::{Instance, Mount};
use crate::virtio::request::{Parked, Request};

/// A read whose data was evicted between arrival and use is fetched again so many times.
const ATTEMPTS: u32 = 16;

impl Deferred {
    /// Puts a read aside until `absent` has arrived or the mount's deadline has passed.
    pub fn park_read(&self, request: Request<'_>, mount: &Arc<Mount>, read: ImageRead, absent: Absent) {
        let deadline = Instant::now() + mount.read_deadline;
        let wait = Wait {
            mount: Some(Arc::clone(mount)),
            read: Some(read),
            deadline: Some(deadline),
            ..Wait::on(Some(mount))
        };
        if let Some(id) = self.put_aside(request, Some(mount), wait) {
            self.metrics.parked();
            self.fetch(id, mount, absent, deadline);
        }
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

    /// Puts back a read of which something is absent again.
    pub(super) fn fetch_again(&self, id: u64, entry: Entry, absent: Absent) {
        let deadline = entry.wait.deadline.filter(|deadline| Instant::now() < *deadline);
        let (Some(mount), Some(deadline)) = (entry.wait.mount.clone(), deadline) else {
            return self.answer(id, entry, Answer::Errno(Errno::IO));
        };
        if entry.wait.attempts > ATTEMPTS {
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
}

/// Executes a read whose data has arrived. Gives the request back if something is absent again.
pub(super) fn read_again(
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
