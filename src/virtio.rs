//! The vhost-user device: rings, requests, and their life.
//!
//! * [`backend`]: the vhost-user protocol; the only module that knows the `vhost` crate.
//! * [`queue`]: one thread per queue, with the [`patience`] to look for more before it sleeps; [`ring`]: a split
//!   virtqueue; [`chain`]: its descriptor chains.
//! * [`memory`]: guest memory, and the only `unsafe` code of this crate.
//! * [`request`]: a popped chain until it is answered; [`parked`]: those that are answered later; [`worker`]: the
//!   threads that do so.
//!
//! A device serves one front-end after another. What a front-end brings (rings, memory) goes with it; the FUSE
//! session and the mounts stay, because a driver whose VMM connects again knows nothing of the interruption.

mod backend;
pub(crate) mod chain;
pub(crate) mod memory;
pub(crate) mod parked;
mod patience;
mod queue;
pub(crate) mod request;
pub(crate) mod ring;
mod worker;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::fuse::dispatch::Server;
use crate::fuse::init::Session;
use crate::metrics::{Metrics, Snapshot};
use crate::mounts::{CloseListener, Mounts};
use crate::sandbox::{Role, Sandbox};
use backend::Backend;
use parked::Deferred;
pub use parked::{ImageRead, Stage, Waiting};

/// Request queues at most: the messages number queues in a byte.
const MAX_QUEUES: u16 = 254;
/// Descriptors of a queue at most, as VIRTIO has it.
const MAX_QUEUE_SIZE: u16 = 32768;
/// [`Device::stop`] takes no longer.
const STOP: Duration = Duration::from_millis(900);
/// A request that its queue thread executes for longer is shown among those that wait.
const SLOW: Duration = Duration::from_millis(100);

/// How the device presents itself.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Request queues; one more, for high priority, comes on top. From 1 to 254.
    pub request_queues: u16,
    /// Descriptors of a queue at most; a power of two up to 32768.
    pub max_queue_size: u16,
    /// Let the guest's security module label the files that it creates. Needs extended attributes on every host
    /// tree.
    pub security_labels: bool,
    /// Take it upon the device to clear set-user-id and set-group-id bits of files that are written.
    pub killpriv: bool,
    /// Have guests keep POSIX ACLs even if no host tree that wants them is mounted when they start.
    pub posix_acl: bool,
    /// Have guests ask the device for locks even if no host tree that wants locks is mounted when they start.
    pub locks: bool,
    /// What the device's threads put on.
    pub sandbox: Sandbox,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions {
            request_queues: 8,
            max_queue_size: 1024,
            security_labels: false,
            killpriv: false,
            posix_acl: false,
            locks: false,
            sandbox: Sandbox::default(),
        }
    }
}

/// The device could not be started.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// An option has a value that cannot be.
    #[error("{0}")]
    BadOption(&'static str),
    /// A system call failed.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

/// A view of what a device does.
#[derive(Clone)]
pub struct Requests(Arc<Server>);

impl Requests {
    /// Requests that wait at this moment for data, for a worker, or for long already for their queue thread; oldest first.
    pub fn list(&self) -> Vec<Waiting> {
        let mut waiting = self.0.deferred().list();
        for (request, mount) in self.0.executing(SLOW) {
            waiting.push(Waiting::executing(&request, mount.as_deref()));
        }
        waiting.sort_by_key(|waiting| waiting.since);
        waiting
    }

    /// The device's counters.
    pub fn metrics(&self) -> Snapshot {
        self.0.metrics().snapshot()
    }
}

/// The running device. Serves one front-end after another until it is stopped.
pub struct Device {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

struct Shared {
    server: Arc<Server>,
    options: DeviceOptions,
    /// Wakes the control thread while it waits for a front-end.
    wake: OwnedFd,
    stopped: AtomicBool,
    /// The connected front-end; shutting it down wakes the control thread while it waits for messages.
    connection: Mutex<Option<UnixStream>>,
}

impl Device {
    /// Serves front-ends that connect to `listener`. The socket's path is the caller's business.
    pub fn start(
        listener: UnixListener,
        mounts: Arc<Mounts>,
        options: DeviceOptions,
    ) -> Result<Device, DeviceError> {
        if !(1..=MAX_QUEUES).contains(&options.request_queues) {
            return Err(DeviceError::BadOption("a device has 1 to 254 request queues"));
        }
        if !options.max_queue_size.is_power_of_two() || options.max_queue_size > MAX_QUEUE_SIZE {
            return Err(DeviceError::BadOption(
                "the size of a queue is a power of two up to 32768",
            ));
        }
        let system = |what| move |error: io::Error| DeviceError::System(what, error);
        let metrics = Arc::new(Metrics::default());
        let deferred =
            Deferred::start(Arc::clone(&metrics), &options.sandbox).map_err(system("start a thread"))?;
        let listening: Weak<dyn CloseListener> = Arc::downgrade(&deferred) as Weak<dyn CloseListener>;
        mounts.subscribe(listening);
        let server = Arc::new(Server::new(
            mounts,
            Arc::new(Session::new(&options)),
            deferred,
            metrics,
        ));
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            server,
            options,
            wake: wake.map_err(|error| DeviceError::System("make an eventfd", error.into()))?,
            stopped: AtomicBool::new(false),
            connection: Mutex::new(None),
        });
        // Not blocking, so that a front-end that gave up between poll and accept does not hold us up.
        listener
            .set_nonblocking(true)
            .map_err(system("use the vhost-user socket"))?;
        let control = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("vhost-user".to_owned())
            .spawn(move || {
                control.options.sandbox.enter(Role::Control);
                control.accept_all(&listener);
            })
            .map_err(system("start a thread"))?;
        Ok(Device { shared, thread })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Snapshot {
        self.shared.server.metrics().snapshot()
    }

    /// Requests that are kept for later at this moment.
    pub fn parked(&self) -> usize {
        self.shared.server.deferred().len()
    }

    /// A view of the requests that wait, for as long as somebody wants to look.
    pub fn requests(&self) -> Requests {
        Requests(Arc::clone(&self.shared.server))
    }

    /// Ends the device within a second, whatever state it is in.
    pub fn stop(self) {
        let deadline = Instant::now() + STOP;
        self.shared.stopped.store(true, Ordering::SeqCst);
        ring::notify(&self.shared.wake);
        if let Some(connection) = self.shared.connection.lock().as_ref() {
            // It may be gone already.
            let _ = connection.shutdown(Shutdown::Both);
        }
        while !self.thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.shared.server.deferred().stop();
        if self.thread.is_finished() {
            // A panic has been printed by its hook.
            let _ = self.thread.join();
        } else {
            tracing::warn!("the vhost-user thread is held up by a system call");
        }
    }
}

impl Shared {
    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    fn accept_all(&self, listener: &UnixListener) {
        while !self.is_stopped() {
            let mut events = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
            ];
            // An interrupted poll is tried again.
            let _ = poll(&mut events, None);
            if self.is_stopped() {
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => self.serve(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // Most likely there are no descriptors left: that may pass.
                    tracing::warn!(%error, "cannot accept a front-end");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Serves one front-end until it leaves.
    fn serve(&self, stream: UnixStream) {
        if let Err(error) = self.try_serve(stream) {
            tracing::error!(%error, "cannot serve a front-end");
        }
        *self.connection.lock() = None;
    }

    fn try_serve(&self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        *self.connection.lock() = Some(stream.try_clone()?);
        if self.is_stopped() {
            return Ok(());
        }
        tracing::info!("front-end connected");
        let backend = Backend::start(Arc::clone(&self.server), &self.options)?;
        let backend = Arc::new(std::sync::Mutex::new(backend));
        let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&backend));
        let reason = loop {
            match handler.handle_request() {
                Ok(()) => {}
                Err(error) if is_fatal(&error) => break error,
                // The front-end was told, if it asked to be.
                Err(error) => tracing::warn!(%error, "a vhost-user request failed"),
            }
            if self.is_stopped() {
                break VhostError::Disconnected;
            }
        };
        match reason {
            VhostError::Disconnected | VhostError::SocketBroken(_) => tracing::info!("front-end left"),
            error => tracing::warn!(%error, "front-end dropped"),
        }
        backend
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .close();
        Ok(())
    }
}

/// Whether nothing sensible can come after this error.
fn is_fatal(error: &VhostError) -> bool {
    !matches!(
        error,
        VhostError::InvalidParam
            | VhostError::InvalidOperation(_)
            | VhostError::InactiveFeature(_)
            | VhostError::InactiveOperation(_)
            | VhostError::ReqHandlerError(_)
            | VhostError::SocketRetry(_)
    )
}
