//! How the daemon keeps hold of a host file.
//!
//! A node is kept as a file handle where the host allows it: some bytes with which the host's file system finds the
//! file again, whatever its name is by then, and says ESTALE once it is gone. That costs no descriptor and does not keep
//! the mount busy. Nodes in use have a descriptor all the same, within the [budget](super::FdBudget), so that a request
//! costs no more than it would with descriptors alone.
//!
//! While a node has a descriptor, its file exists, and so its inode number names no other file. Without one the number
//! may have been given to a new file, which only the handle tells apart.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{MappedRwLockReadGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::budget::Permit;
use super::mount::Mount;
use super::{GaveUp, Inode};
use crate::sys;

/// The bytes of handles up to this length need no allocation: those of ext4, XFS, tmpfs and Btrfs.
const INLINE: usize = 22;

/// What a file system needs to find a file again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileHandle {
    kind: i32,
    bytes: HandleBytes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum HandleBytes {
    Inline { len: u8, bytes: [u8; INLINE] },
    Boxed(Box<[u8]>),
}

impl FileHandle {
    fn new(kind: i32, from: &[u8]) -> Self {
        let mut bytes = [0; INLINE];
        let bytes = match bytes.get_mut(..from.len()) {
            Some(to) => {
                to.copy_from_slice(from);
                HandleBytes::Inline {
                    len: from.len() as u8,
                    bytes,
                }
            }
            None => HandleBytes::Boxed(from.into()),
        };
        FileHandle { kind, bytes }
    }

    /// The handle of the file behind `fd`, and the (reusable) id of the mount that `fd` was found on.
    ///
    /// EOPNOTSUPP: the file system has none.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<(Self, i32)> {
        sys::name_to_handle(fd, |mount, kind, bytes| (Self::new(kind, bytes), mount))
    }

    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            HandleBytes::Inline { len, bytes } => bytes.get(..usize::from(*len)).unwrap_or(&[]),
            HandleBytes::Boxed(bytes) => bytes,
        }
    }

    /// Opens the file through `mount`, a descriptor on its mount, as one that only stands for it.
    pub(super) fn open(&self, mount: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        sys::open_by_handle(mount, self.kind, self.bytes(), libc::O_PATH)
    }
}

/// How a node keeps hold of its file.
#[derive(Debug)]
pub(crate) enum InodeFile {
    /// By an O_PATH descriptor: the root, and files of file systems without handles.
    Fd {
        /// The descriptor.
        fd: OwnedFd,
        /// Its place in the budget; the root needs none.
        _permit: Option<Permit>,
    },
    /// By a handle, with a descriptor in times of use.
    Handle(HandleFile),
}

/// A file handle and, perhaps, a descriptor.
#[derive(Debug)]
pub(crate) struct HandleFile {
    handle: FileHandle,
    mount: Arc<Mount>,
    /// An O_PATH descriptor, counted in the budget of `mount`.
    descriptor: RwLock<Option<OwnedFd>>,
    /// Used since the clock hand last passed.
    used: AtomicBool,
    /// The descriptor must stay: the file has no name left, so it would be gone with it.
    pinned: AtomicBool,
}

impl HandleFile {
    /// The file behind `fd`, which is kept if the budget has room.
    pub(super) fn new(handle: FileHandle, mount: Arc<Mount>, fd: OwnedFd) -> Self {
        let descriptor = mount.budget().reserve().then_some(fd);
        HandleFile {
            handle,
            mount,
            descriptor: RwLock::new(descriptor),
            used: AtomicBool::new(true),
            pinned: AtomicBool::new(false),
        }
    }

    fn mark_used(&self) {
        // Most requests find it set and leave the cache line alone.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for HandleFile {
    fn drop(&mut self) {
        if self.descriptor.get_mut().take().is_some() {
            self.mount.budget().release_kept();
        }
    }
}

/// A descriptor of a node for the length of a request.
#[derive(Debug)]
pub(crate) enum InodeFd<'a> {
    /// The node's own.
    Own(BorrowedFd<'a>),
    /// One that the node keeps and cannot give up meanwhile.
    Kept(MappedRwLockReadGuard<'a, OwnedFd>),
    /// Opened for this request, since the budget is used up.
    Opened(OwnedFd),
}

impl AsFd for InodeFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            InodeFd::Own(fd) => fd.as_fd(),
            InodeFd::Kept(fd) => fd.as_fd(),
            InodeFd::Opened(fd) => fd.as_fd(),
        }
    }
}

impl Inode {
    /// A descriptor that stands for the file.
    ///
    /// ESTALE: the file, or the mount it was found on, is gone.
    pub(crate) fn fd(self: &Arc<Self>) -> io::Result<InodeFd<'_>> {
        let file = match &self.file {
            InodeFile::Fd { fd, .. } => return Ok(InodeFd::Own(fd.as_fd())),
            InodeFile::Handle(file) => file,
        };
        file.mark_used();
        if let Ok(kept) = RwLockReadGuard::try_map(file.descriptor.read_recursive(), Option::as_ref) {
            return Ok(InodeFd::Kept(kept));
        }
        let opened = file.mount.with_fd(|mount| file.handle.open(mount))?;
        self.settle(file, opened)
    }

    /// Keeps `opened` for the requests to come, if there is room and nobody was quicker.
    fn settle<'a>(self: &'a Arc<Self>, file: &'a HandleFile, opened: OwnedFd) -> io::Result<InodeFd<'a>> {
        let budget = file.mount.budget();
        // May close descriptors of other nodes, so no lock is held yet.
        if !budget.reserve() {
            return Ok(InodeFd::Opened(opened));
        }
        // Nobody waits for this lock, since a thread that holds it for reading may come here for another node.
        let slot = file.descriptor.try_write();
        let Some(mut slot) = slot.filter(|slot| slot.is_none() && file.mount.is_attached()) else {
            budget.release();
            return Ok(InodeFd::Opened(opened));
        };
        *slot = Some(opened);
        let slot = RwLockWriteGuard::downgrade(slot);
        if !file.pinned.load(Ordering::Relaxed) {
            budget.keep(self);
        }
        let kept = RwLockReadGuard::try_map(slot, Option::as_ref);
        kept.map(InodeFd::Kept).map_err(|_| sys::errno(libc::EBADF))
    }

    /// Gives a node that is known already the use of a descriptor that was opened to look it up.
    pub(super) fn offer(self: &Arc<Self>, fd: OwnedFd) {
        if let InodeFile::Handle(file) = &self.file {
            file.mark_used();
            drop(self.settle(file, fd));
        }
    }

    /// The descriptor that the node has right now, if it has one. Opens nothing, and does not wait.
    pub(crate) fn fd_at_hand(&self) -> Option<InodeFd<'_>> {
        match &self.file {
            InodeFile::Fd { fd, .. } => Some(InodeFd::Own(fd.as_fd())),
            InodeFile::Handle(file) => {
                let slot = file.descriptor.try_read_recursive()?;
                RwLockReadGuard::try_map(slot, Option::as_ref)
                    .map(InodeFd::Kept)
                    .ok()
            }
        }
    }

    /// Whether a descriptor holds the file right now, so that its inode number can mean no other.
    pub(super) fn holds_file(&self) -> bool {
        match &self.file {
            InodeFile::Fd { .. } => true,
            InodeFile::Handle(file) => file
                .descriptor
                .try_read_recursive()
                .is_some_and(|slot| slot.is_some()),
        }
    }

    /// Whether this node, whose key is that of the file with the handle `handle`, is that file.
    pub(super) fn is_file_of(&self, handle: Option<&FileHandle>) -> bool {
        match &self.file {
            InodeFile::Fd { .. } => true,
            InodeFile::Handle(file) => file.mount.is_attached() && Some(&file.handle) == handle,
        }
    }

    /// Whether this node, whose key is that of `file`, is the same file.
    pub(super) fn is_same_file(&self, file: &InodeFile) -> bool {
        match file {
            InodeFile::Fd { .. } => self.is_file_of(None),
            InodeFile::Handle(file) => self.is_file_of(Some(&file.handle)),
        }
    }

    /// Gives a new node, which may have come with a descriptor, its place on the clock.
    pub(super) fn join_clock(self: &Arc<Self>) {
        if let InodeFile::Handle(file) = &self.file
            && self.holds_file()
        {
            file.mount.budget().keep(self);
        }
    }

    /// Makes the file outlast its last name, as it does on a disk for whoever knows it. Returns whether this call did
    /// it; without room in the budget, the file goes with its name.
    pub(crate) fn pin(self: &Arc<Self>) -> bool {
        let InodeFile::Handle(file) = &self.file else {
            return false;
        };
        if file.pinned.swap(true, Ordering::Relaxed) {
            return false;
        }
        let held = matches!(self.fd(), Ok(InodeFd::Kept(_)));
        if !held {
            file.pinned.store(false, Ordering::Relaxed);
        }
        held
    }

    /// Takes a [`Self::pin`] back: the name is still there.
    pub(crate) fn unpin(self: &Arc<Self>) {
        if let InodeFile::Handle(file) = &self.file {
            file.pinned.store(false, Ordering::Relaxed);
            file.mount.budget().keep(self);
        }
    }

    /// Closes the descriptor if the node can do without and has not been used lately.
    pub(super) fn give_up_descriptor(&self) -> GaveUp {
        let InodeFile::Handle(file) = &self.file else {
            return GaveUp::HadNone;
        };
        if file.pinned.load(Ordering::Relaxed) {
            return GaveUp::HadNone;
        }
        if file.used.swap(false, Ordering::Relaxed) {
            return GaveUp::InUse;
        }
        let Some(mut slot) = file.descriptor.try_write() else {
            return GaveUp::InUse;
        };
        match slot.take() {
            Some(_) => {
                file.mount.budget().release();
                GaveUp::Closed
            }
            None => GaveUp::HadNone,
        }
    }

    /// Closes the descriptor, whoever wants it: the host has unmounted what it is on.
    pub(super) fn abandon_descriptor(&self) {
        if let InodeFile::Handle(file) = &self.file
            && file.descriptor.write().take().is_some()
        {
            file.mount.budget().release();
        }
    }

    /// Whether the node has a place on the clock.
    pub(super) fn keeps_descriptor(&self) -> bool {
        match &self.file {
            InodeFile::Fd { .. } => false,
            InodeFile::Handle(file) => {
                !file.pinned.load(Ordering::Relaxed)
                    && file
                        .descriptor
                        .try_read_recursive()
                        .is_none_or(|slot| slot.is_some())
            }
        }
    }
}
