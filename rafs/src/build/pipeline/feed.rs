//! The entrance: files are cut into chunks, and holes into runs of zeros that nobody reads.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crossbeam_channel::{Receiver, Sender};
use rustix::fs::{SeekFrom, seek};

use super::{Job, Slot};
use crate::build::Progress;
use crate::build::error::BuildError;
use crate::build::tree::InodeId;

/// The entrance of the pipeline.
pub(in crate::build) struct Feeder<'p> {
    chunk_size: u32,
    free: Receiver<Slot>,
    jobs: Sender<Job>,
    ticket: u64,
    progress: &'p dyn Progress,
}

impl<'p> Feeder<'p> {
    pub(super) fn new(
        chunk_size: u32,
        free: Receiver<Slot>,
        jobs: Sender<Job>,
        progress: &'p dyn Progress,
    ) -> Self {
        Self {
            chunk_size,
            free,
            jobs,
            ticket: 0,
            progress,
        }
    }

    /// Cuts `size` bytes of `data` into the chunks of file `owner`. `path` is for messages.
    pub(in crate::build) fn stream(
        &mut self,
        owner: InodeId,
        size: u64,
        path: &Path,
        data: &mut dyn Read,
    ) -> Result<(), BuildError> {
        let mut left = size;
        while left > 0 {
            let want = left.min(u64::from(self.chunk_size)) as u32;
            self.chunk(
                owner,
                want,
                |buffer| read_full(data, buffer).map_err(BuildError::io("read", path)),
                path,
            )?;
            left -= u64::from(want);
        }
        Ok(())
    }

    /// The same for an open file of the host; chunks that lie in a hole are not read.
    pub(in crate::build) fn file(
        &mut self,
        owner: InodeId,
        size: u64,
        path: &Path,
        file: &File,
    ) -> Result<(), BuildError> {
        // Everything before this offset is known to be data.
        let mut hole_search_from = 0;
        // The hole found last.
        let mut hole = 0..0;
        let mut offset = 0;
        while offset < size {
            let want = (size - offset).min(u64::from(self.chunk_size)) as u32;
            let end = offset + u64::from(want);
            // One chunk is read faster than asked about.
            if size > u64::from(self.chunk_size) && offset >= hole_search_from {
                let data = match seek(file, SeekFrom::Data(offset)) {
                    Ok(data) => data,
                    Err(rustix::io::Errno::NXIO) => size,
                    Err(_) => offset, // the file system cannot tell
                };
                hole = offset..data;
                hole_search_from = match seek(file, SeekFrom::Hole(data.min(size.saturating_sub(1)))) {
                    Ok(next) if data < size => next.max(end),
                    _ => end.max(data),
                };
            }
            if hole.start <= offset && end <= hole.end {
                self.zeros(owner, want)?;
            } else {
                self.chunk(
                    owner,
                    want,
                    |buffer| read_full_at(file, buffer, offset, path),
                    path,
                )?;
            }
            offset = end;
        }
        Ok(())
    }

    fn chunk(
        &mut self,
        owner: InodeId,
        size: u32,
        read: impl FnOnce(&mut [u8]) -> Result<usize, BuildError>,
        path: &Path,
    ) -> Result<(), BuildError> {
        let mut slot = self.slot()?;
        slot.data.resize(size as usize, 0);
        let got = read(&mut slot.data)?;
        if got != size as usize {
            return Err(BuildError::Changed {
                path: path.to_path_buf(),
                reason: format!("it ends {} bytes before its size", size as usize - got),
            });
        }
        self.send(owner, slot, None, size)
    }

    fn zeros(&mut self, owner: InodeId, size: u32) -> Result<(), BuildError> {
        let slot = self.slot()?;
        self.send(owner, slot, Some(size), size)
    }

    fn slot(&self) -> Result<Slot, BuildError> {
        self.free.recv().map_err(|_| BuildError::GivenUp)
    }

    fn send(&mut self, owner: InodeId, slot: Slot, zeros: Option<u32>, size: u32) -> Result<(), BuildError> {
        self.ticket += 1;
        self.jobs
            .send(Job {
                ticket: self.ticket,
                owner,
                slot,
                zeros,
            })
            .map_err(|_| BuildError::GivenUp)?;
        self.progress.read(u64::from(size));
        Ok(())
    }
}

/// Reads until `buffer` is full or the data end; the number of bytes read.
fn read_full(data: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match data.read(rest) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

fn read_full_at(file: &File, buffer: &mut [u8], offset: u64, path: &Path) -> Result<usize, BuildError> {
    let mut got = 0;
    while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(BuildError::io("read", path)(e)),
        }
    }
    Ok(got)
}
