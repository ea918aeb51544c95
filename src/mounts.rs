//! The one truth about mounts: path ↔ mount id ↔ instance.
//!
//! The guest sees one file system. Its nodeids carry a 24-bit mount id above a 40-bit local id; mount id 0 is
//! the pseudo tree of directories that lead to mountpoints. A mount id is never used twice in a process's
//! life, so a nodeid that outlived its mount can only be answered with `ESTALE`.
//!
//! Readers take a snapshot of the whole table ([`Mounts::snapshot`]): no lock, no shared reference count. A
//! change builds the next table and publishes it in one store, so that a mount happened or left nothing.
//! A mount lives as long as somebody uses it: [`Mounts::umount`] unpublishes, tells those who keep requests for
//! later to give them up, and waits until the last user has let go.

mod instance;
mod table;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use fuse_backend_rs::api::filesystem::FsOptions;
use parking_lot::{Condvar, Mutex};

use crate::metrics::MountMetrics;
pub(crate) use instance::LocalFs;
pub use instance::{CancelLock, CopyEnd, Fetched, HostFs, ImageFs, Instance};
pub(crate) use table::{Child, Node, ROOT, Table, Target, local_of, nodeid};
use table::{PSEUDO_INO, join, split};

/// Settled if one host tree wants it; the others answer such requests, too: locks are kept among the guest's processes, and
/// there are no ACLs. The rest takes all of them.
const BY_ANY: FsOptions = FsOptions::POSIX_LOCKS
    .union(FsOptions::FLOCK_LOCKS)
    .union(FsOptions::POSIX_ACL)
    .union(FsOptions::DONT_MASK);

/// How long [`Mounts::umount`] waits for requests that are being executed.
const DRAIN: Duration = Duration::from_secs(5);

/// Identifies a mount for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MountId(pub(crate) u32);

impl MountId {
    /// The number, between 1 and 2^24 - 2.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// How a mount behaves, whatever its instance.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Requests that would change something are answered `EROFS`. Always so for an image.
    pub read_only: bool,
    /// A read that waits for absent data is answered `EIO` after this time at the latest.
    pub read_deadline: Duration,
}

impl Default for MountOptions {
    fn default() -> Self {
        MountOptions {
            read_only: false,
            read_deadline: Duration::from_secs(30),
        }
    }
}

/// Why the mount table refused a change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// The path cannot be a mountpoint.
    #[error("mountpoint {path:?}: {reason}")]
    BadPath {
        /// The path as given.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Something is mounted there.
    #[error("mountpoint {0:?} is in use")]
    Busy(String),
    /// Nothing is mounted there.
    #[error("nothing is mounted at {0:?}")]
    NotMounted(String),
    /// All mount ids or node ids have been used.
    #[error("no mount id is left")]
    Exhausted,
}

/// One entry of [`Mounts::list`].
#[derive(Clone, Debug)]
pub struct MountInfo {
    /// Its id.
    pub id: MountId,
    /// Its path inside the tag, normalised.
    pub path: String,
    /// What is behind it.
    pub instance: Instance,
    /// Whether changes are refused.
    pub read_only: bool,
    /// What is counted of it.
    pub metrics: Arc<MountMetrics>,
}

/// A mount. Dropped when neither the table nor a request refers to it any more.
pub(crate) struct Mount {
    pub id: MountId,
    pub path: String,
    pub instance: Instance,
    /// Local id of the instance's root.
    pub root: u64,
    pub read_only: bool,
    pub read_deadline: Duration,
    /// XORed into every inode number that the guest sees, so that two mounts do not show the same one.
    pub ino_mask: u64,
    pub metrics: Arc<MountMetrics>,
    closed: AtomicBool,
    /// Declared last: tells that the instance has been dropped.
    _gone: GoneOnDrop,
}

impl Mount {
    /// The file system, whatever kind it is.
    pub fn fs(&self) -> &LocalFs {
        match &self.instance {
            Instance::Rafs(image) => image.as_ref(),
            Instance::Passthrough(host) => host.as_ref(),
        }
    }

    /// Whether it is the root of what the guest sees.
    pub fn is_root(&self) -> bool {
        self.path == "/"
    }

    /// Whether the mount has been unpublished.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
}

#[derive(Default)]
struct Gone {
    happened: Mutex<bool>,
    changed: Condvar,
}

struct GoneOnDrop(Arc<Gone>);

impl Drop for GoneOnDrop {
    fn drop(&mut self) {
        *self.0.happened.lock() = true;
        self.0.changed.notify_all();
    }
}

/// Told when a mount has been unpublished, to answer the requests that are kept for it.
pub(crate) trait CloseListener: Send + Sync {
    /// No new request will find the mount.
    fn mount_closed(&self, id: MountId);
}

struct Writer {
    next_mount: u32,
    next_node: u64,
    /// The INIT flags in force.
    settled: FsOptions,
    listeners: Vec<std::sync::Weak<dyn CloseListener>>,
}

/// The mount table.
pub struct Mounts {
    table: ArcSwap<Table>,
    writer: Mutex<Writer>,
}

impl Default for Mounts {
    fn default() -> Self {
        Self::new()
    }
}

impl Mounts {
    /// An empty table: the guest sees an empty root directory.
    pub fn new() -> Self {
        Mounts {
            table: ArcSwap::from_pointee(Table::new()),
            writer: Mutex::new(Writer {
                next_mount: 1,
                next_node: ROOT + 1,
                settled: FsOptions::empty(),
                listeners: Vec::new(),
            }),
        }
    }

    /// Publishes `instance` at `path`, an absolute path inside the tag; the directories that lead to it are made.
    ///
    /// A mount at `/` hides every other one.
    pub fn mount(
        &self,
        path: &str,
        instance: Instance,
        options: MountOptions,
    ) -> Result<MountId, MountError> {
        let names = split(path)?;
        let mut writer = self.writer.lock();
        let table = self.table.load();
        if table.find(&names).is_some_and(|node| node.mount.is_some()) {
            return Err(MountError::Busy(path.to_owned()));
        }
        let (mount, _) = self.build(&mut writer, &table, &names, instance, options)?;
        let id = mount.id;
        let next = table.with_mount(&names, mount, &mut writer.next_node)?;
        self.table.store(Arc::new(next));
        Ok(id)
    }

    /// Takes away what is mounted at `path`: new requests for it are answered `ESTALE`, those that wait for data
    /// are answered at once, those that run are waited for, then the instance is dropped.
    pub fn umount(&self, path: &str) -> Result<(), MountError> {
        let names = split(path)?;
        let gone = {
            let writer = self.writer.lock();
            let table = self.table.load();
            let Some((next, mount)) = table.without_mount(&names) else {
                return Err(MountError::NotMounted(path.to_owned()));
            };
            drop(table);
            self.table.store(Arc::new(next));
            self.close(&writer, mount)
        };
        wait_until_gone(path, &gone);
        Ok(())
    }

    /// Puts `instance` in the place of what is mounted at `path`. The new mount has a new id: what the guest
    /// still knows of the old one is stale. The inode numbers that it sees stay the same.
    pub fn replace(
        &self,
        path: &str,
        instance: Instance,
        options: MountOptions,
    ) -> Result<MountId, MountError> {
        let names = split(path)?;
        let (id, gone) = {
            let mut writer = self.writer.lock();
            let table = self.table.load();
            let Some((without, old)) = table.without_mount(&names) else {
                return Err(MountError::NotMounted(path.to_owned()));
            };
            let (mut mount, _) = self.build(&mut writer, &without, &names, instance, options)?;
            // The numbers that a guest has seen stay those of the files. Nobody else has the mount yet.
            if let Some(new) = Arc::get_mut(&mut mount) {
                new.ino_mask = old.ino_mask;
            }
            let id = mount.id;
            let next = without.with_mount(&names, mount, &mut writer.next_node)?;
            drop((table, without));
            self.table.store(Arc::new(next));
            (id, self.close(&writer, old))
        };
        wait_until_gone(path, &gone);
        Ok(id)
    }

    /// What is mounted, oldest first.
    pub fn list(&self) -> Vec<MountInfo> {
        let table = self.table.load();
        let info = |mount: &Arc<Mount>| MountInfo {
            id: mount.id,
            path: mount.path.clone(),
            instance: mount.instance.clone(),
            read_only: mount.read_only,
            metrics: Arc::clone(&mount.metrics),
        };
        table.mounts().iter().map(info).collect()
    }

    /// The table as it is now. Hold it for the length of one request.
    pub(crate) fn snapshot(&self) -> arc_swap::Guard<Arc<Table>> {
        self.table.load()
    }

    /// Settles the INIT flags of a new session: `always`, and of the rest of `offered` what the host trees want, all of
    /// them or, for locks and ACLs, one of them. Forgets what the guest of the old session had looked up and opened.
    pub(crate) fn start_session(&self, offered: FsOptions, always: FsOptions) -> FsOptions {
        let mut writer = self.writer.lock();
        let table = self.table.load();
        let instances = || table.mounts().iter().map(|mount| &mount.instance);
        let wishes: Vec<FsOptions> = instances()
            .filter_map(|instance| instance.negotiate(offered))
            .collect();
        let nothing = FsOptions::empty();
        let by_all = wishes.iter().copied().reduce(|a, b| a & b).unwrap_or(nothing);
        let by_any = wishes.iter().fold(nothing, |a, b| a | *b) & BY_ANY;
        let settled = offered & (always | by_all | by_any);
        for instance in instances() {
            instance.negotiate(settled);
        }
        writer.settled = settled;
        self.end_session();
        settled
    }

    /// The guest is gone, and with it what it had looked up and opened.
    pub(crate) fn end_session(&self) {
        for mount in self.table.load().mounts() {
            if let Instance::Passthrough(host) = &mount.instance {
                host.destroy();
            }
        }
    }

    /// The front-end is gone, and what its guest had locked is free.
    pub(crate) fn release_locks(&self) {
        for mount in self.table.load().mounts() {
            if let Instance::Passthrough(host) = &mount.instance {
                host.release_locks();
            }
        }
    }

    /// Registers who must be told of unpublished mounts.
    pub(crate) fn subscribe(&self, listener: std::sync::Weak<dyn CloseListener>) {
        let mut writer = self.writer.lock();
        writer.listeners.retain(|listener| listener.strong_count() > 0);
        writer.listeners.push(listener);
    }

    fn build(
        &self,
        writer: &mut Writer,
        table: &Table,
        names: &[&[u8]],
        instance: Instance,
        options: MountOptions,
    ) -> Result<(Arc<Mount>, Arc<Gone>), MountError> {
        if writer.next_mount >= PSEUDO_INO {
            return Err(MountError::Exhausted);
        }
        let id = MountId(writer.next_mount);
        writer.next_mount += 1;
        instance.negotiate(writer.settled);
        let gone = Arc::new(Gone::default());
        let mount = Arc::new(Mount {
            id,
            path: join(names),
            ino_mask: table.ino_mask(id, &instance),
            read_only: options.read_only || matches!(instance, Instance::Rafs(_)),
            read_deadline: options.read_deadline,
            root: instance.root(),
            instance,
            metrics: Arc::default(),
            closed: AtomicBool::new(false),
            _gone: GoneOnDrop(Arc::clone(&gone)),
        });
        Ok((mount, gone))
    }

    fn close(&self, writer: &Writer, mount: Arc<Mount>) -> Arc<Gone> {
        mount.closed.store(true, Ordering::SeqCst);
        for listener in writer.listeners.iter().filter_map(std::sync::Weak::upgrade) {
            listener.mount_closed(mount.id);
        }
        Arc::clone(&mount._gone.0)
    }
}

fn wait_until_gone(path: &str, gone: &Gone) {
    let deadline = Instant::now() + DRAIN;
    let mut happened = gone.happened.lock();
    while !*happened {
        if gone.changed.wait_until(&mut happened, deadline).timed_out() {
            tracing::warn!(
                path,
                "requests still run on an unmounted instance; it is freed when they end"
            );
            return;
        }
    }
}

#[cfg(test)]
mod tests;
