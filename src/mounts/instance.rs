//! What can be mounted, and the operations that go beyond the `FileSystem` trait.

use std::ffi::CStr;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backend::store::FetchError;
use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions};
use fuse_backend_rs::api::filesystem::{Context, Entry, FileLock, FileSystem, FsOptions, ZeroCopyWriter};
use passthrough::{CreateExtras, IoctlReply, LockDone, PassthroughFs, Statx};
use rafs::fs::{Absent, HeldChunks, RafsFs, ReadOutcome};

/// A file system whose local ids fit 40 bits and are not 0.
pub(crate) type LocalFs = dyn FileSystem<Inode = u64, Handle = u64> + Send + Sync;

/// Called once, from any thread, with the outcome of a fetch.
pub type Fetched = Box<dyn FnOnce(Result<HeldChunks, FetchError>) + Send>;

/// An image: metadata in memory, data that may be absent.
pub trait ImageFs: FileSystem<Inode = u64, Handle = u64> + Send + Sync {
    /// Local id of the root directory.
    fn root(&self) -> u64;

    /// Reads what is resident, or says what is absent. Never waits.
    ///
    /// # Errors
    ///
    /// EISDIR, EINVAL, and EIO for damaged metadata.
    fn read_resident(
        &self,
        inode: u64,
        offset: u64,
        size: u32,
        held: &HeldChunks,
        w: &mut dyn ZeroCopyWriter,
    ) -> io::Result<ReadOutcome>;

    /// Starts fetching; `done` is called once, from any thread.
    fn fetch_absent(&self, absent: Absent, deadline: Instant, done: Fetched);
}

impl ImageFs for RafsFs {
    fn root(&self) -> u64 {
        RafsFs::root(self)
    }

    fn read_resident(
        &self,
        inode: u64,
        offset: u64,
        size: u32,
        held: &HeldChunks,
        w: &mut dyn ZeroCopyWriter,
    ) -> io::Result<ReadOutcome> {
        RafsFs::read(self, inode, offset, size, held, w)
    }

    fn fetch_absent(&self, absent: Absent, deadline: Instant, done: Fetched) {
        RafsFs::fetch(self, absent, deadline, done);
    }
}

/// Gives up waiting for a lock, if it is still waited for: the request's `done` is called with EINTR.
pub type CancelLock = Arc<dyn Fn() + Send + Sync>;

/// One end of a copy between two files: local id, handle, offset in bytes.
pub type CopyEnd = (u64, u64, u64);

/// A tree of the host, whose root has the local id 1. The defaults are what a file system without the feature
/// answers; their errors are those of the system calls of the same names.
#[allow(
    missing_docs,
    reason = "the operations are those of the protocol, with all of its arguments"
)]
pub trait HostFs: FileSystem<Inode = u64, Handle = u64> + Send + Sync {
    fn symlink_with(
        &self,
        ctx: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
        _extras: &CreateExtras<'_>,
    ) -> io::Result<Entry> {
        self.symlink(ctx, target, parent, name)
    }

    #[allow(clippy::too_many_arguments, reason = "the protocol's")]
    fn mknod_with(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        _extras: &CreateExtras<'_>,
    ) -> io::Result<Entry> {
        self.mknod(ctx, parent, name, mode, rdev, umask)
    }

    fn mkdir_with(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        _extras: &CreateExtras<'_>,
    ) -> io::Result<Entry> {
        self.mkdir(ctx, parent, name, mode, umask)
    }

    fn create_with(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: &CreateIn,
        _extras: &CreateExtras<'_>,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        let (entry, handle, options, _) = self.create(ctx, parent, name, *args)?;
        Ok((entry, handle.unwrap_or(0), options))
    }

    fn tmpfile(
        &self,
        _ctx: &Context,
        _parent: u64,
        _args: &CreateIn,
        _extras: &CreateExtras<'_>,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        Err(unsupported())
    }

    fn setxattr_with(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        _kill_setgid: bool,
    ) -> io::Result<()> {
        self.setxattr(ctx, inode, name, value, flags)
    }

    fn syncfs(&self, _inode: u64) -> io::Result<()> {
        Ok(())
    }

    fn copy_file_range(
        &self,
        _ctx: &Context,
        _from: CopyEnd,
        _to: CopyEnd,
        _length: u64,
        _flags: u64,
    ) -> io::Result<usize> {
        Err(unsupported())
    }

    fn statx(&self, _ctx: &Context, _inode: u64, _handle: Option<u64>) -> io::Result<(Statx, Duration)> {
        Err(unsupported())
    }

    fn ioctl_inline(
        &self,
        _ctx: &Context,
        _inode: u64,
        _handle: u64,
        _command: u32,
        _input: &[u8],
        _out_size: u32,
    ) -> io::Result<IoctlReply> {
        Err(io::Error::from_raw_os_error(libc::ENOTTY))
    }

    /// Whether locks are kept on the host, by `getlk`, `setlk` and [`HostFs::set_lock_later`]. If not, the device keeps
    /// them among the guest's processes.
    fn has_locks(&self) -> bool {
        false
    }

    /// Takes a lock as soon as nobody else holds it. `done` is called once: before this returns, which a missing return
    /// value says, or later from any thread.
    fn set_lock_later(
        &self,
        _inode: u64,
        _handle: u64,
        _owner: u64,
        _lock: FileLock,
        _flags: u32,
        done: LockDone,
    ) -> Option<CancelLock> {
        done(Err(unsupported()));
        None
    }

    /// The guest is gone, perhaps to come back: nobody holds a lock any more.
    fn release_locks(&self) {}

    /// Where the file is below the root at this moment, for people, as far as that is known without asking the disk.
    fn path_of(&self, _inode: u64) -> Option<PathBuf> {
        None
    }
}

fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(libc::EOPNOTSUPP)
}

impl HostFs for PassthroughFs {
    fn symlink_with(
        &self,
        ctx: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
        extras: &CreateExtras<'_>,
    ) -> io::Result<Entry> {
        PassthroughFs::symlink_with(self, ctx, target, parent, name, extras)
    }

    fn mknod_with(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extras: &CreateExtras<'_>,
    ) -> io::Result<Entry> {
        PassthroughFs::mknod_with(self, ctx, parent, name, mode, rdev, umask, extras)
    }

    fn mkdir_with(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extras: &CreateExtras<'_>,
    ) -> io::Result<Entry> {
        PassthroughFs::mkdir_with(self, ctx, parent, name, mode, umask, extras)
    }

    fn create_with(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: &CreateIn,
        extras: &CreateExtras<'_>,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        PassthroughFs::create_with(self, ctx, parent, name, args, extras)
    }

    fn tmpfile(
        &self,
        ctx: &Context,
        parent: u64,
        args: &CreateIn,
        extras: &CreateExtras<'_>,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        PassthroughFs::tmpfile(self, ctx, parent, args.flags, args.mode, args.umask, extras)
    }

    fn setxattr_with(
        &self,
        _ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_setgid: bool,
    ) -> io::Result<()> {
        PassthroughFs::setxattr_with(self, inode, name, value, flags, kill_setgid)
    }

    fn syncfs(&self, inode: u64) -> io::Result<()> {
        PassthroughFs::syncfs(self, inode)
    }

    fn copy_file_range(
        &self,
        ctx: &Context,
        from: CopyEnd,
        to: CopyEnd,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        PassthroughFs::copy_file_range(self, ctx, from, to, length, flags)
    }

    fn statx(&self, ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(Statx, Duration)> {
        PassthroughFs::statx(self, ctx, inode, handle)
    }

    fn ioctl_inline(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        command: u32,
        input: &[u8],
        out_size: u32,
    ) -> io::Result<IoctlReply> {
        PassthroughFs::ioctl_inline(self, ctx, inode, handle, command, input, out_size)
    }

    fn has_locks(&self) -> bool {
        self.options().locks
    }

    fn set_lock_later(
        &self,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
        done: LockDone,
    ) -> Option<CancelLock> {
        let wait = PassthroughFs::set_lock_later(self, inode, handle, owner, lock, flags, done)?;
        Some(Arc::new(move || wait.cancel()))
    }

    fn release_locks(&self) {
        PassthroughFs::release_locks(self);
    }

    fn path_of(&self, inode: u64) -> Option<PathBuf> {
        PassthroughFs::path_of(self, inode)
    }
}

/// The file system behind a mount.
#[derive(Clone)]
pub enum Instance {
    /// A lazily loaded image.
    Rafs(Arc<dyn ImageFs>),
    /// A tree of the host.
    Passthrough(Arc<dyn HostFs>),
}

impl Instance {
    /// Local id of the root.
    pub(super) fn root(&self) -> u64 {
        match self {
            Instance::Rafs(image) => image.root(),
            Instance::Passthrough(_) => super::ROOT,
        }
    }

    /// The flags of `offered` that the instance wants for the whole connection.
    pub(super) fn negotiate(&self, offered: FsOptions) -> Option<FsOptions> {
        match self {
            Instance::Rafs(_) => None,
            // A file system that cannot say wants nothing.
            Instance::Passthrough(host) => Some(host.init(offered).unwrap_or_else(|_| FsOptions::empty())),
        }
    }
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Instance::Rafs(_) => "rafs",
            Instance::Passthrough(_) => "passthrough",
        })
    }
}
