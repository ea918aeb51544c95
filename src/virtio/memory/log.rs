//! Which pages of guest memory were written, for a front-end that moves the guest elsewhere.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use parking_lot::RwLock;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The front-end's record of pages written: one bit per 4 KiB of guest address space (vhost-user, "Migration").
///
/// The front-end may replace the record at any time and must find no bit set in the old one afterwards, so marks
/// are set under the read side of a lock. Without a record nothing but one flag is looked at.
#[derive(Default)]
pub struct DirtyLog {
    active: AtomicBool,
    state: RwLock<LogState>,
}

#[derive(Default)]
struct LogState {
    wanted: bool,
    map: Option<LogMap>,
}

struct LogMap {
    host: usize,
    length: usize,
}

impl Drop for LogMap {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `DirtyLog::set_map`, is unmapped only here, and references into it
        // live only inside `DirtyLog::mark`, which holds the lock around the owner of this value.
        // A failure leaves a mapping behind, which harms nobody.
        let _ = unsafe { munmap(self.host as *mut std::ffi::c_void, self.length) };
    }
}

impl DirtyLog {
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Whether VHOST_F_LOG_ALL is negotiated.
    pub fn set_wanted(&self, wanted: bool) {
        let mut state = self.state.write();
        state.wanted = wanted;
        self.active.store(wanted && state.map.is_some(), Ordering::SeqCst);
    }

    /// Marks pages in `length` bytes at `offset` of `file` from now on, and nowhere else.
    pub fn set_map(&self, file: OwnedFd, offset: u64, length: u64) -> io::Result<()> {
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let size = rustix::fs::fstat(&file)?.st_size;
        let end = offset
            .checked_add(length as u64)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if length == 0 || end > u64::try_from(size).unwrap_or(0) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new shared mapping at an address that the kernel chooses; it aliases no memory of ours.
        let host = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                file.as_fd(),
                offset,
            )
        }?;
        let mut state = self.state.write();
        state.map = Some(LogMap {
            host: host as usize,
            length,
        });
        self.active.store(state.wanted, Ordering::SeqCst);
        Ok(())
    }

    /// Stops marking and forgets the record.
    pub fn clear(&self) {
        let mut state = self.state.write();
        *state = LogState::default();
        self.active.store(false, Ordering::SeqCst);
    }

    pub(super) fn mark(&self, address: u64, length: usize) {
        let state = self.state.read();
        let Some(map) = state.map.as_ref().filter(|_| state.wanted) else {
            return;
        };
        let last = address.saturating_add(length as u64 - 1) >> 12;
        for page in (address >> 12)..=last {
            let byte = (page >> 3) as usize;
            if byte >= map.length {
                return;
            }
            // SAFETY: the byte lies inside the mapping, which the held lock keeps; the front-end reads and clears
            // it atomically too.
            let cell = unsafe { AtomicU8::from_ptr((map.host + byte) as *mut u8) };
            cell.fetch_or(1 << (page & 7), Ordering::Release);
        }
    }
}
