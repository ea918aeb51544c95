//! Noticing that the host unmounts something below a share.
//!
//! A container's directory is a mount of its own, which the host unmounts when the container is gone. The guest may not
//! have forgotten its files by then, and what the daemon keeps for them would hold the mount, and the device below it,
//! for good.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::config::ThreadStart;
use crate::fs::PassthroughFs;
use crate::inode::MOUNT_TABLE;

/// A thread that waits for changes of the mount table and has the mounts it watches over let go of what is unmounted.
///
/// The thread sleeps in `poll`; it ends when this is dropped.
#[derive(Debug)]
pub struct MountWatcher {
    watched: Arc<Mutex<Vec<Weak<PassthroughFs>>>>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl MountWatcher {
    /// Starts the thread, which calls `start` first. It watches the mount namespace that the caller is in now.
    ///
    /// # Errors
    ///
    /// If the mount table cannot be opened or the thread not be started.
    pub fn start(start: ThreadStart) -> io::Result<Self> {
        let table = File::open(MOUNT_TABLE)?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let watched = Arc::new(Mutex::new(Vec::new()));
        let (stopped, list) = (stop.clone(), watched.clone());
        let thread = std::thread::Builder::new()
            .name("mount-watch".into())
            .spawn(move || {
                (start.0)();
                watch(&table, &stopped, &list);
            })?;
        Ok(MountWatcher {
            watched,
            stop,
            thread: Some(thread),
        })
    }

    /// Watches over `fs` for as long as it exists.
    pub fn watch(&self, fs: &Arc<PassthroughFs>) {
        let mut watched = self.watched.lock();
        watched.retain(|fs| fs.strong_count() > 0);
        watched.push(Arc::downgrade(fs));
    }
}

impl Drop for MountWatcher {
    fn drop(&mut self) {
        let woken = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            // The thread has no panic to report that it has not printed.
            thread.join().ok();
        }
    }
}

fn watch(table: &File, stop: &OwnedFd, watched: &Mutex<Vec<Weak<PassthroughFs>>>) {
    loop {
        let mut events = [
            PollFd::new(table, PollFlags::PRI),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut events, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "the mount table is no longer watched");
                return;
            }
        }
        let [table, stop] = events;
        if !stop.revents().is_empty() {
            return;
        }
        if table.revents().is_empty() {
            continue;
        }
        let mounts: Vec<Arc<PassthroughFs>> = watched.lock().iter().filter_map(Weak::upgrade).collect();
        for fs in mounts {
            match fs.release_unmounted() {
                Ok(0) => {}
                Ok(count) => {
                    tracing::debug!(root = ?fs.options().root, count, "let go of unmounted file systems")
                }
                Err(error) => tracing::warn!(%error, "cannot read the mount table"),
            }
        }
    }
}
