//! Which operation goes where.
//!
//! A request names a nodeid; the mount table says whether that is a pseudo directory, a file of an image or a
//! file of the host. What each kind answers to each operation is written down in `docs/fuse.md`. Two rules
//! stand above the rest: what would change a read-only mount is refused before anything else happens, and no
//! mount ever answers `ENOSYS` to something that another could do, because the guest's kernel remembers that
//! for the whole connection.
//!
//! Most operations are executed at once. Those that may block for long are handed to a worker, and reads of
//! absent data are parked; both are answered later (see [`crate::virtio::parked`]).

mod attributes;
mod data;
mod directories;
mod entries;
mod locks;
mod xattrs;

use std::cell::Cell;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use fuse_backend_rs::api::filesystem::Context;
use parking_lot::Mutex;
use zerocopy::{Immutable, IntoBytes};

use super::abi::{self, BatchForgetIn, ForgetIn, ForgetOne, InHeader, InterruptIn, Opcode};
use super::decode::{self, Arguments, Malformed};
use super::errno::Errno;
use super::init::{Greeting, Session};
use super::locks::GuestLocks;
use crate::metrics::{Executing, Metrics, Running};
use crate::mounts::{HostFs, Instance, Mount, Mounts, Table, Target};
use crate::virtio::chain::ChainError;
use crate::virtio::memory::Buffers;
use crate::virtio::parked::Deferred;
use crate::virtio::request::{About, Request};
use crate::virtio::ring::{Head, Ring};

/// A thread's private memory for requests: kept between them, so that serving one allocates nothing.
#[derive(Default)]
pub struct Scratch {
    arguments: Vec<u8>,
    reply: Vec<u8>,
    /// What the thread does, for others to see; from its first request on.
    running: Option<Arc<Running>>,
    /// When the thread had executed the last request, if it has done nothing since: the next one begins then, and one
    /// reading of the clock does for both.
    ended: Option<Instant>,
}

impl Scratch {
    /// The thread does something else between two requests.
    pub fn pause(&mut self) {
        self.ended = None;
    }
}

/// A popped chain, not looked at yet.
pub struct Chain<'a> {
    /// Where it came from.
    pub ring: &'a Arc<Ring>,
    /// Its buffers.
    pub buffers: &'a mut Buffers,
    /// Its first descriptor.
    pub head: Head,
    /// Whether it is well formed.
    pub valid: Result<(), ChainError>,
}

/// Everything that requests need, shared by all threads.
pub struct Server {
    mounts: Arc<Mounts>,
    session: Arc<Session>,
    deferred: Arc<Deferred>,
    locks: Arc<GuestLocks>,
    /// The last handle given out for a file that needs one only to tell its locks apart.
    last_handle: AtomicU64,
    metrics: Arc<Metrics>,
    /// What each thread does.
    running: Mutex<Vec<Weak<Running>>>,
}

/// A decoded request, without the means to answer it.
struct Call<'a> {
    table: &'a Table,
    header: InHeader,
    context: Context,
    arguments: Arguments<'a>,
}

impl<'a> Call<'a> {
    /// What the request's nodeid stands for.
    fn target(&self) -> Result<Target<'a>, Errno> {
        self.resolve(self.header.nodeid)
    }

    fn resolve(&self, nodeid: u64) -> Result<Target<'a>, Errno> {
        self.table.resolve(nodeid).ok_or(Errno::STALE)
    }

    /// The host tree that a change of `nodeid` goes to. Everything else is read-only.
    fn writable(&self, nodeid: u64) -> Result<(&'a Arc<Mount>, &'a dyn HostFs, u64), Errno> {
        match self.resolve(nodeid)? {
            Target::Mount(mount, local) if !mount.read_only => match &mount.instance {
                Instance::Passthrough(host) => Ok((mount, host.as_ref(), local)),
                Instance::Rafs(_) => Err(Errno::ROFS),
            },
            _ => Err(Errno::ROFS),
        }
    }
}

fn answer<T: IntoBytes + Immutable>(request: Request<'_>, opcode: Opcode, result: Result<T, Errno>) {
    match result {
        Ok(body) => request.reply(&body),
        Err(errno) => fail(request, opcode, errno),
    }
}

fn fail(request: Request<'_>, opcode: Opcode, errno: Errno) {
    request.fail(public(opcode, errno).get());
}

/// The error that the guest is told: `ENOSYS` only for what no mount can do.
fn public(opcode: Opcode, errno: Errno) -> Errno {
    match opcode {
        Opcode::Unknown | Opcode::Bmap | Opcode::Poll | Opcode::Setupmapping | Opcode::Removemapping => errno,
        _ if errno == Errno::NOSYS => Errno::NOTSUP,
        _ => errno,
    }
}

impl Server {
    /// A server of `mounts`.
    pub fn new(
        mounts: Arc<Mounts>,
        session: Arc<Session>,
        deferred: Arc<Deferred>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Server {
            mounts,
            session,
            deferred,
            locks: Arc::default(),
            last_handle: AtomicU64::new(0),
            metrics,
            running: Mutex::default(),
        }
    }

    /// Requests that a queue thread has been executing for at least so long.
    pub fn executing(&self, limit: Duration) -> Vec<(Executing, Option<Arc<Mount>>)> {
        let table = self.mounts.snapshot();
        let threads = self.running.lock();
        let found = threads
            .iter()
            .filter_map(|running| running.upgrade()?.longer_than(limit));
        found
            .map(|executing| (executing, table.mount_of(executing.nodeid).cloned()))
            .collect()
    }

    /// A place where a thread says what it does.
    fn announce(&self) -> Arc<Running> {
        let running = Arc::new(Running::default());
        let mut threads = self.running.lock();
        threads.retain(|running| running.strong_count() > 0);
        threads.push(Arc::downgrade(&running));
        running
    }

    /// Requests that wait for data or for a worker.
    pub fn deferred(&self) -> &Arc<Deferred> {
        &self.deferred
    }

    /// The device's counters.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The front-end is gone: what its guest had locked is free. Nodes and handles stay, for it may connect again.
    pub fn release_locks(&self) {
        self.locks.clear();
        self.mounts.release_locks();
    }

    /// Serves one chain: answers it, or puts it aside. Either way the caller is done with it.
    pub fn serve(&self, chain: Chain<'_>, scratch: &mut Scratch) {
        let Chain {
            ring,
            buffers,
            head,
            valid,
        } = chain;
        let Scratch {
            arguments,
            reply,
            running,
            ended,
        } = scratch;
        let fetched = match valid {
            Ok(()) => decode::fetch(buffers, arguments),
            Err(error) => {
                tracing::debug!(%error, "bad descriptor chain");
                Err(Malformed::NoHeader)
            }
        };
        let unique = match &fetched {
            Ok(header) => header.unique,
            Err(Malformed::BadLength { unique, .. }) => *unique,
            Err(Malformed::NoHeader) => 0,
        };
        let put_aside = Cell::new(false);
        let mut request = Request::new(ring, buffers, &self.metrics, head, unique);
        let header = match fetched {
            Ok(header) => header,
            Err(Malformed::BadLength { opcode, .. }) if Opcode::from_wire(opcode).is_answered() => {
                self.metrics.malformed();
                return request.fail(libc::EIO);
            }
            Err(_) => return self.refuse(request),
        };
        let opcode = Opcode::from_wire(header.opcode);
        self.metrics.request(opcode);
        request.is_about(About {
            opcode: header.opcode,
            nodeid: header.nodeid,
        });
        request.tells(&put_aside);
        let running = running.get_or_insert_with(|| self.announce());
        let begun = ended.take().unwrap_or_else(Instant::now);
        running.begin(&header, begun);
        let table = self.mounts.snapshot();
        let call = Call {
            table: &table,
            header,
            context: Context {
                uid: header.uid,
                gid: header.gid,
                pid: header.pid as i32,
            },
            arguments: Arguments::new(arguments),
        };
        self.dispatch(opcode, call, request, reply);
        running.end();
        let now = Instant::now();
        *ended = Some(now);
        if !put_aside.get()
            && let Some(mount) = table.mount_of(header.nodeid)
        {
            mount
                .metrics
                .answered(opcode, now.saturating_duration_since(begun));
        }
    }

    /// Returns a chain in which there is nothing to answer.
    pub fn refuse(&self, request: Request<'_>) {
        self.metrics.malformed();
        request.finish_silently();
    }

    fn dispatch(&self, opcode: Opcode, call: Call<'_>, request: Request<'_>, reply: &mut Vec<u8>) {
        match opcode {
            Opcode::Init => return self.init(&call, request),
            Opcode::Forget | Opcode::BatchForget => {
                forget(opcode, &call);
                return request.finish_silently();
            }
            Opcode::Interrupt => {
                let mut arguments = call.arguments;
                if let Ok(interrupt) = arguments.take::<InterruptIn>() {
                    self.deferred.interrupt(interrupt.unique);
                }
                return request.finish_silently();
            }
            _ if !self.session.is_initialised() => return request.fail(libc::EIO),
            Opcode::Destroy => {
                self.session.end();
                self.locks.clear();
                self.mounts.end_session();
                return request.reply_empty();
            }
            _ => {}
        }
        match opcode {
            Opcode::Lookup => answer(request, opcode, entries::lookup(&call)),
            Opcode::Getattr => answer(request, opcode, attributes::getattr(&call)),
            Opcode::Setattr => answer(request, opcode, attributes::setattr(&call)),
            Opcode::Statx => answer(request, opcode, attributes::statx(&call)),
            Opcode::Statfs => answer(request, opcode, attributes::statfs(&call)),
            Opcode::Access => answer(request, opcode, attributes::access(&call)),
            Opcode::Readlink => match entries::readlink(&call) {
                Ok(target) => request.reply_bytes(&target),
                Err(errno) => fail(request, opcode, errno),
            },
            Opcode::Symlink => answer(request, opcode, entries::symlink(&call)),
            Opcode::Mknod => answer(request, opcode, entries::mknod(&call)),
            Opcode::Mkdir => answer(request, opcode, entries::mkdir(&call)),
            Opcode::Unlink => answer(request, opcode, entries::unlink(&call)),
            Opcode::Rmdir => answer(request, opcode, entries::rmdir(&call)),
            Opcode::Rename | Opcode::Rename2 => answer(request, opcode, entries::rename(opcode, &call)),
            Opcode::Link => answer(request, opcode, entries::link(&call)),
            Opcode::Create => match entries::create(&call) {
                Ok((entry, open)) => request.reply_parts(entry.as_bytes(), open.as_bytes()),
                Err(errno) => fail(request, opcode, errno),
            },
            Opcode::Tmpfile => match entries::tmpfile(&call) {
                Ok((entry, open)) => request.reply_parts(entry.as_bytes(), open.as_bytes()),
                Err(errno) => fail(request, opcode, errno),
            },
            Opcode::Open => answer(request, opcode, data::open(self, &call)),
            Opcode::Read => data::read(self, &call, request),
            Opcode::Write => data::write(&call, request),
            Opcode::Flush => answer(request, opcode, data::flush(self, &call)),
            Opcode::Release => answer(request, opcode, data::release(self, &call)),
            Opcode::Lseek => answer(request, opcode, data::lseek(&call)),
            Opcode::Ioctl => data::ioctl(&call, request),
            Opcode::Fsync | Opcode::Fsyncdir => data::fsync(self, opcode, &call, request),
            Opcode::Syncfs => data::syncfs(self, &call, request),
            Opcode::Fallocate => data::fallocate(self, &call, request),
            Opcode::CopyFileRange => data::copy_file_range(self, &call, request),
            Opcode::Getlk => answer(request, opcode, locks::getlk(self, &call)),
            Opcode::Setlk | Opcode::Setlkw => locks::setlk(self, opcode, &call, request),
            Opcode::Opendir => answer(request, opcode, directories::opendir(&call)),
            Opcode::Releasedir => answer(request, opcode, directories::releasedir(&call)),
            Opcode::Readdir | Opcode::Readdirplus => {
                let room = request.room();
                match directories::readdir(opcode, &call, room, reply) {
                    Ok(()) => request.reply_bytes(reply),
                    Err(errno) => fail(request, opcode, errno),
                }
            }
            Opcode::Getxattr => xattrs::getxattr(&call, request, &self.session),
            Opcode::Listxattr => xattrs::listxattr(&call, request),
            Opcode::Setxattr => answer(request, opcode, xattrs::setxattr(&call, &self.session)),
            Opcode::Removexattr => answer(request, opcode, xattrs::removexattr(&call)),
            Opcode::Init
            | Opcode::Destroy
            | Opcode::Forget
            | Opcode::BatchForget
            | Opcode::Interrupt
            | Opcode::Bmap
            | Opcode::Poll
            | Opcode::Setupmapping
            | Opcode::Removemapping
            | Opcode::Unknown => request.fail(libc::ENOSYS),
        }
    }

    fn init(&self, call: &Call<'_>, request: Request<'_>) {
        let settle = |offered, always| {
            self.locks.clear();
            self.deferred.forget_interrupts();
            self.mounts.start_session(offered, always)
        };
        match self.session.init(call.arguments, settle) {
            Ok(Greeting::Agreed(reply) | Greeting::TryOlder(reply)) => request.reply(&reply),
            Err(errno) => request.fail(errno.get()),
        }
    }
}

/// FORGET and BATCH_FORGET have no reply; what is wrong in them is left out.
fn forget(opcode: Opcode, call: &Call<'_>) {
    let mut arguments = call.arguments;
    let forget_one = |nodeid: u64, count: u64| {
        // The roots of mounts are not looked up in their instance.
        if let Some(Target::Mount(mount, local)) = call.table.resolve(nodeid)
            && local != mount.root
        {
            mount.fs().forget(&call.context, local, count);
        }
    };
    if opcode == Opcode::Forget {
        if let Ok(forget) = arguments.take::<ForgetIn>() {
            forget_one(call.header.nodeid, forget.nlookup);
        }
    } else if let Ok(batch) = arguments.take::<BatchForgetIn>() {
        for _ in 0..batch.count {
            let Ok(one) = arguments.take::<ForgetOne>() else {
                break;
            };
            forget_one(one.nodeid, one.nlookup);
        }
    }
}

/// The handle of a request that may carry one.
fn handle(flags: u32, fh: u64) -> Option<u64> {
    (flags & abi::GETATTR_FH != 0).then_some(fh)
}
