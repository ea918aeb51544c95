//! What can be mounted, and the operations that go beyond the `FileSystem` trait.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use backend::store::FetchError;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem, ZeroCopyWriter};
use rafs::fs::{Absent, HeldChunks, ReadOutcome};

/// A file system whose root has the local id 1 and whose local ids fit 40 bits.
pub(crate) type LocalFs = dyn FileSystem<Inode = u64, Handle = u64> + Send + Sync;

/// Called once, from any thread, with the outcome of a fetch.
pub type Fetched = Box<dyn FnOnce(Result<HeldChunks, FetchError>) + Send>;

/// An image: metadata in memory, data that may be absent.
pub trait ImageFs: FileSystem<Inode = u64, Handle = u64> + Send + Sync {
    /// Reads what is resident, or says what is absent. Never waits.
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

/// A tree of the host. The defaults are what a local file system without the feature answers.
pub trait HostFs: FileSystem<Inode = u64, Handle = u64> + Send + Sync {
    /// Makes an unnamed file in the directory `parent`; answers like `create`.
    fn tmpfile(
        &self,
        _ctx: &Context,
        _parent: u64,
        _args: fuse_backend_rs::abi::fuse_abi::CreateIn,
    ) -> io::Result<(Entry, Option<u64>, fuse_backend_rs::abi::fuse_abi::OpenOptions)> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Writes back the file system that holds `inode`.
    fn syncfs(&self, _ctx: &Context, _inode: u64) -> io::Result<()> {
        Ok(())
    }

    /// Copies up to `range.length` bytes between two open files of this instance.
    fn copy_file_range(&self, _ctx: &Context, _range: CopyRange) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// The attributes of `inode` as `statx` gives them.
    fn statx(
        &self,
        _ctx: &Context,
        _inode: u64,
        _handle: Option<u64>,
        _mask: u32,
    ) -> io::Result<libc::statx> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Forgets all lookups and closes all handles: the guest that had them is gone.
    fn reset(&self) {
        self.destroy();
    }
}

/// What a COPY_FILE_RANGE asks for.
#[derive(Clone, Copy, Debug)]
pub struct CopyRange {
    /// Local id and handle of the file to read.
    pub from: (u64, u64),
    /// Where to start reading, in bytes.
    pub from_offset: u64,
    /// Local id and handle of the file to write.
    pub to: (u64, u64),
    /// Where to start writing, in bytes.
    pub to_offset: u64,
    /// Bytes at most.
    pub length: u64,
    /// As of `copy_file_range(2)`.
    pub flags: u64,
}

/// The file system behind a mount.
#[derive(Clone)]
pub enum Instance {
    /// A lazily loaded image.
    Rafs(Arc<dyn ImageFs>),
    /// A tree of the host.
    Passthrough(Arc<dyn HostFs>),
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Instance::Rafs(_) => "rafs",
            Instance::Passthrough(_) => "passthrough",
        })
    }
}
