//! What is left to whoever takes the daemon over.
//!
//! Mounts of any path of the host arrive over the API while the daemon runs, so it cannot be locked into one directory.
//! What it can do without is taken from it in layers, each of which holds when another one fails:
//!
//! * [`namespace`]: a mount table of our own that receives what the host mounts, with `/proc` and `/sys` read-only and
//!   without the processes of others;
//! * [`capabilities`]: those that serving needs, fewer in threads that serve no files;
//! * `no_new_privs`, for the whole process;
//! * [`landlock`]: what no file mode and no capability would refuse: listening on TCP, signals to others, devices;
//! * [`seccomp`]: for each kind of thread the system calls that it makes.
//!
//! [`Sandbox::of_process`] puts on what concerns the process, before there is a second thread. Each thread then calls
//! [`Sandbox::enter`] with its [`Role`] before its first piece of work. A thread made by another one keeps all that
//! its maker had: roles that make threads may do what those may do.
//!
//! A host that lacks a layer is served without it, and the log has one line for it. `docs/security.md` tells
//! operators what each layer is worth.

mod calls;
mod capabilities;
mod landlock;
mod namespace;
mod seccomp;

use std::fmt;
use std::sync::Arc;

pub use capabilities::CapabilityChanges;
use clap::ValueEnum;
use rustix::thread::CapabilitySet;

/// What becomes of the daemon's view of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Namespaces of its own, and Landlock.
    #[default]
    Namespace,
    /// Landlock alone: mounts arrive later, and no changed root could hold them.
    Chroot,
    /// Neither.
    None,
}

/// What a system call costs that no thread of its kind makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SystemCalls {
    /// The process.
    #[default]
    Kill,
    /// A signal that ends the process unless a debugger takes it.
    Trap,
    /// A line in the host's audit log.
    Log,
    /// Nothing: there is no filter.
    None,
}

/// What to put on.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Namespaces and Landlock.
    pub mode: Mode,
    /// System call filters.
    pub system_calls: SystemCalls,
    /// Departures from the usual capabilities.
    pub capabilities: CapabilityChanges,
    /// The process mounts for the host to see: it keeps the host's mount table, and the right to unmount.
    pub mounts_on_host: bool,
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Waits for signals and for the end.
    Main,
    /// Speaks vhost-user and starts queue threads.
    Control,
    /// Serves a virtqueue.
    Queue,
    /// Serves what may take long.
    Worker,
    /// Starts workers when they are needed.
    WorkerStarter,
    /// Ends requests whose time is over.
    Deadlines,
    /// Answers the API, mounts, and starts the threads of the store.
    Api,
    /// Tells its counters to whoever asks over TCP.
    Metrics,
    /// Talks to sources.
    Net,
    /// Decompresses, verifies and fills the cache.
    Decode,
    /// Tries waiting locks; watches the mount table; counts what trees take.
    Helper,
    /// Moves requests between the kernel's FUSE device and ours.
    Lane,
    /// Takes a FUSE mount away at the end.
    Unmount,
    /// Writes the log.
    Log,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 14] = [
        Role::Main,
        Role::Control,
        Role::Queue,
        Role::Worker,
        Role::WorkerStarter,
        Role::Deadlines,
        Role::Api,
        Role::Metrics,
        Role::Net,
        Role::Decode,
        Role::Helper,
        Role::Lane,
        Role::Unmount,
        Role::Log,
    ];

    /// Whether such threads act on host directories in the name of guests.
    fn serves_files(self) -> bool {
        matches!(self, Role::Queue | Role::Worker)
    }

    /// Whether such threads, or those that they start, need the capabilities of the process.
    fn keeps_capabilities(self) -> bool {
        !matches!(
            self,
            Role::Deadlines
                | Role::Metrics
                | Role::Net
                | Role::Decode
                | Role::Helper
                | Role::Lane
                | Role::Log
        )
    }
}

/// A layer could not be put on although the host has it, or a setting makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("sandbox: {layer}: {reason}")]
pub struct Failure {
    layer: &'static str,
    reason: String,
}

impl Failure {
    fn new(layer: &'static str, reason: impl fmt::Display) -> Self {
        Self {
            layer,
            reason: reason.to_string(),
        }
    }
}

/// Something to tell the operator once there is a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A layer that was asked to be left out.
    Weakened(String),
    /// A layer that this host does not give.
    Missing(String),
}

impl Notice {
    /// Writes it to the log.
    pub fn log(&self) {
        match self {
            Self::Weakened(what) => tracing::warn!("SANDBOX WEAKENED: {what}"),
            Self::Missing(what) => tracing::warn!("sandbox: {what}"),
        }
    }
}

/// What threads put on. Cheap to clone; the default puts on nothing.
#[derive(Clone, Default)]
pub struct Sandbox(Option<Arc<Layers>>);

struct Layers {
    /// Of threads that serve files.
    capabilities: CapabilitySet,
    landlock: bool,
    filters: Option<seccomp::Filters>,
}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Sandbox(on)"
        } else {
            "Sandbox(off)"
        })
    }
}

impl Sandbox {
    /// Confines the process, which must have one thread, and says what its threads will put on.
    ///
    /// What must be reached under an identity or in a namespace that is given up here (sockets to be bound, descriptors
    /// that were inherited) is to be opened before.
    ///
    /// # Errors
    ///
    /// A layer that the host has could not be put on. Layers that the host lacks are [`Notice::Missing`].
    pub fn of_process(settings: &Settings) -> Result<(Self, Vec<Notice>), Failure> {
        let mut notices = Vec::new();
        match settings.mode {
            Mode::Namespace if settings.mounts_on_host => {
                notices.extend(
                    namespace::enter_all_but_mounts()?
                        .into_iter()
                        .map(Notice::Missing),
                );
            }
            Mode::Namespace => notices.extend(namespace::enter()?.into_iter().map(Notice::Missing)),
            Mode::Chroot => notices.push(Notice::Weakened(
                "--sandbox chroot: mounts arrive later, so no root is changed; there are no namespaces"
                    .into(),
            )),
            Mode::None => notices.push(Notice::Weakened(
                "--sandbox none: neither namespaces nor Landlock".into(),
            )),
        }
        let mut changes = settings.capabilities;
        if settings.mounts_on_host {
            changes = changes.with_trusted();
        }
        let capabilities = capabilities::reduce_process(&changes)?;
        rustix::thread::set_no_new_privs(true).map_err(|error| Failure::new("no_new_privs", error))?;
        let landlock = settings.mode != Mode::None;
        if landlock {
            notices.extend(landlock::restrict_process()?.map(Notice::Missing));
        }
        let filters = match settings.system_calls {
            SystemCalls::None => {
                notices.push(Notice::Weakened(
                    "--seccomp none: every system call is allowed".into(),
                ));
                None
            }
            action => {
                if action == SystemCalls::Log {
                    notices.push(Notice::Weakened(
                        "--seccomp log: forbidden system calls are logged and made".into(),
                    ));
                }
                seccomp::Filters::install(action, &mut notices)?
            }
        };
        let layers = Layers {
            capabilities,
            landlock,
            filters,
        };
        Ok((Self(Some(Arc::new(layers))), notices))
    }

    /// Confines the calling thread, for good, to what `role` needs.
    ///
    /// A thread that should be confined and cannot ends the process: it would serve guests with rights that nobody
    /// expects it to have. It cannot happen for want of memory only, since [`Sandbox::of_process`] has put on one of each.
    pub fn enter(&self, role: Role) {
        let Some(layers) = &self.0 else { return };
        if let Err(failure) = layers.enter(role) {
            tracing::error!("{failure}: a thread ({role:?}) cannot be confined");
            std::process::abort()
        }
    }

    /// Runs `make` in a thread confined as `role`, so that threads which it makes are confined as well.
    pub fn within<T: Send>(&self, role: Role, make: impl FnOnce() -> T + Send) -> std::io::Result<T> {
        if self.0.is_none() {
            return Ok(make());
        }
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, || {
                self.enter(role);
                make()
            })?;
            thread
                .join()
                .map_err(|_| std::io::Error::other("a thread panicked while it started others"))
        })
    }
}

impl Layers {
    fn enter(&self, role: Role) -> Result<(), Failure> {
        if role.serves_files() {
            passthrough::prepare_thread().map_err(|error| Failure::new("identity of the thread", error))?;
        }
        if !role.keeps_capabilities() {
            capabilities::reduce_thread(self.capabilities)?;
        }
        if self.landlock {
            landlock::restrict_thread(role)?;
        }
        match &self.filters {
            Some(filters) => filters.enter(role),
            None => Ok(()),
        }
    }
}
