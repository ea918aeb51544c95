//! What giving a range of a file a place on the disk will take.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::SeekFrom;

use crate::sys::{self, Extent};

/// Extents asked for at a time.
const BATCH: usize = 32;

/// How much of a range there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fit {
    /// Bytes of the range, from its first on.
    pub(super) length: u64,
    /// Bytes of the disk that they will take.
    pub(super) growth: u64,
}

/// How much of the `length` bytes of `file` from `offset` on can be given a place in `room` bytes of the disk, in blocks
/// of `block` bytes.
///
/// # Errors
///
/// What the host says when asked where the file has space.
pub(super) fn fitting(
    file: BorrowedFd<'_>,
    offset: u64,
    length: u64,
    block: u64,
    room: u64,
) -> io::Result<Fit> {
    let end = offset.saturating_add(length);
    let first = offset - offset % block;
    let last = end.checked_next_multiple_of(block).unwrap_or(u64::MAX);
    let mut walk = Walk {
        at: first,
        growth: 0,
        room,
        block,
    };
    let mut full = false;
    allocated(file, (first, last), block, &mut |start, until| {
        full = !walk.hole_until(start.min(last));
        walk.at = walk.at.max(until);
        full || walk.at >= last
    })?;
    if !full && walk.hole_until(last) {
        walk.at = last;
    }
    Ok(Fit {
        length: walk.at.min(end).saturating_sub(offset),
        growth: walk.growth,
    })
}

struct Walk {
    /// What lies before has a place, or fits.
    at: u64,
    growth: u64,
    room: u64,
    block: u64,
}

impl Walk {
    /// Fills what there is no space for up to `end`; false if it does not fit.
    fn hole_until(&mut self, end: u64) -> bool {
        let hole = end.saturating_sub(self.at);
        let left = self.room - self.growth;
        let taken = hole.min(left - left % self.block);
        self.growth += taken;
        self.at += taken;
        taken == hole
    }
}

/// Tells `found` where `file` has space between `from` and `to`, in order, until that says true.
fn allocated(
    file: BorrowedFd<'_>,
    (from, to): (u64, u64),
    block: u64,
    found: &mut dyn FnMut(u64, u64) -> bool,
) -> io::Result<()> {
    match by_extents(file, from, to, found) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => {
            by_seeking(file, (from, to), block, found)
        }
        other => other,
    }
}

/// Asks for extents, which include what was allocated ahead of its data.
fn by_extents(
    file: BorrowedFd<'_>,
    from: u64,
    to: u64,
    found: &mut dyn FnMut(u64, u64) -> bool,
) -> io::Result<()> {
    let mut at = from;
    let mut extents = [Extent::default(); BATCH];
    while at < to {
        let count = sys::extents(file, at, to - at, &mut extents)?;
        let batch = extents.get(..count).unwrap_or(&[]);
        for extent in batch {
            let end = extent.start.saturating_add(extent.length);
            if !extent.may_grow && found(extent.start, end) {
                return Ok(());
            }
            at = at.max(end);
        }
        if count < BATCH || batch.last().is_some_and(|extent| extent.last) {
            return Ok(());
        }
    }
    Ok(())
}

/// Asks for data. What was allocated ahead of it is taken for a hole.
fn by_seeking(
    file: BorrowedFd<'_>,
    (from, to): (u64, u64),
    block: u64,
    found: &mut dyn FnMut(u64, u64) -> bool,
) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?;
        // The last block of a file is data to its end.
        let size = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
        let until = match hole.checked_next_multiple_of(block) {
            Some(end) if hole >= size => end,
            _ => hole,
        };
        if found(data, until) {
            return Ok(());
        }
        at = hole.max(at + 1);
    }
    Ok(())
}
