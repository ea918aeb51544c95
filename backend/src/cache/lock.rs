//! Advisory locks among processes.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A lock on a whole file, held briefly by every process that changes what it stands for.
pub(super) struct FileLock<'a>(&'a File);

impl<'a> FileLock<'a> {
    /// Waits for other processes; `WouldBlock` if one keeps the lock for so long, for then it is stuck.
    pub(super) fn exclusive(file: &'a File, patience: Duration) -> io::Result<Self> {
        let begin = Instant::now();
        let mut pause = Duration::from_micros(200);
        loop {
            match flock(file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(Errno::WOULDBLOCK | Errno::INTR) if begin.elapsed() < patience => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(10));
                }
                Err(Errno::INTR) => return Err(ErrorKind::WouldBlock.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for FileLock<'_> {
    fn drop(&mut self) {
        let _ = flock(self.0, FlockOperation::Unlock);
    }
}
