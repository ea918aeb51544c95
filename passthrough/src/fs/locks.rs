//! Lock requests: what they are about, checked, and handed to the mount's [`Locks`](crate::lock::Locks).

use std::io;
use std::sync::mpsc;

use fuse_backend_rs::api::filesystem::FileLock;

use super::PassthroughFs;
use crate::lock::{LockDone, LockRequest, LockWait};
use crate::sys::errno;

impl PassthroughFs {
    fn lock_request(
        &self,
        inode: u64,
        handle_id: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<LockRequest> {
        if !self.options.locks {
            return Err(errno(libc::EOPNOTSUPP));
        }
        let handle = self.handles.get_file(handle_id, inode)?;
        Ok(LockRequest {
            inode,
            handle_id,
            handle,
            owner,
            lock,
            flags,
        })
    }

    /// GETLK.
    pub(super) fn get_lock(
        &self,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<FileLock> {
        self.locks
            .get(&self.lock_request(inode, handle, owner, lock, flags)?)
    }

    /// SETLK.
    pub(super) fn set_lock(
        &self,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<()> {
        self.locks
            .set(&self.lock_request(inode, handle, owner, lock, flags)?)
    }

    /// SETLKW as the trait has it: the calling thread waits, and nothing but the end of the session can stop it.
    pub(super) fn set_lock_blocking(
        &self,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<()> {
        let (send, receive) = mpsc::sync_channel(1);
        self.set_lock_later(
            inode,
            handle,
            owner,
            lock,
            flags,
            Box::new(move |outcome| drop(send.send(outcome))),
        );
        receive.recv().unwrap_or_else(|_| Err(errno(libc::EINTR)))
    }

    /// SETLKW: takes a lock as soon as nobody else holds it, and calls `done` exactly once: before this returns if the
    /// matter is decided at once, which a missing return value says, else from a thread of the mount.
    ///
    /// The outcome is EINTR if the wait was cancelled, or ended by RELEASE of the handle or the end of the session;
    /// ENOLCK if too many requests wait; EBADF, EINVAL, EOPNOTSUPP as for SETLK. `done` must not block.
    pub fn set_lock_later(
        &self,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
        done: LockDone,
    ) -> Option<LockWait> {
        match self.lock_request(inode, handle, owner, lock, flags) {
            Ok(request) => {
                let id = self.locks.set_or_wait(request, done)?;
                Some(LockWait::new(self.locks.clone(), id))
            }
            Err(error) => {
                done(Err(error));
                None
            }
        }
    }

    /// Ends all locks that the guest holds or waits for, and leaves its files open: nobody is there any more who could
    /// give them up.
    pub fn release_locks(&self) {
        self.locks.clear();
        self.locks.clear_flocks(|| self.handles.all());
    }
}
