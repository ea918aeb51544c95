//! Data of requests: between guest buffers and files, without a copy of ours.

use std::io;

use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

use super::buffers::{Cursor, MAX_VECTOR, Segments};
use super::{GuestMemory, copy_from, copy_to};

/// What one system call has moved.
struct Moved {
    bytes: usize,
    /// There were more buffers than it takes.
    cut: bool,
}

impl Moved {
    fn by(slices: &[FileVolatileSlice<'_>], bytes: usize, most: usize) -> Self {
        Moved {
            bytes: bytes.min(most),
            cut: slices.len() == MAX_VECTOR,
        }
    }
}

/// Moves `count` bytes with one call of `step` after the other, which is told how many have been moved.
///
/// A system call takes so many buffers and no more. If we answered what the first one moved, the driver would take it
/// for the end of the file. Everything else that comes short does so for a reason of the file's own.
fn in_vectors(count: usize, mut step: impl FnMut(usize) -> io::Result<Moved>) -> io::Result<usize> {
    let mut done = 0;
    loop {
        match step(done) {
            Ok(moved) => {
                done += moved.bytes;
                if !moved.cut || moved.bytes == 0 || done == count {
                    return Ok(done);
                }
            }
            Err(_) if done > 0 => return Ok(done),
            Err(error) => return Err(error),
        }
    }
}

/// Guest bytes as the payload of a write.
pub struct GuestReader<'a> {
    pub(super) segments: &'a mut Segments,
    pub(super) cursor: Cursor,
    pub(super) left: usize,
}

impl GuestReader<'_> {
    fn advance(&mut self, by: usize) {
        self.cursor = self.cursor.advanced(&self.segments.slices, by);
        self.left -= by;
    }
}

impl io::Read for GuestReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.left);
        let mut done = 0;
        self.segments.with_vector(self.cursor, count, |slices| {
            for slice in slices {
                if let Some(part) = buffer.get_mut(done..done + slice.len()) {
                    copy_from(slice.as_ptr() as usize, part);
                    done += slice.len();
                }
            }
        });
        self.advance(done);
        Ok(done)
    }
}

impl ZeroCopyReader for GuestReader<'_> {
    fn read_to(&mut self, f: &mut dyn FileReadWriteVolatile, count: usize, off: u64) -> io::Result<usize> {
        let count = count.min(self.left);
        in_vectors(count, |done| {
            let moved = self.segments.with_vector(self.cursor, count - done, |slices| {
                let moved = match slices {
                    [] => Ok(0),
                    [one] => f.write_at_volatile(*one, off + done as u64),
                    many => f.write_vectored_at_volatile(many, off + done as u64),
                };
                moved.map(|bytes| Moved::by(slices, bytes, count - done))
            })?;
            self.advance(moved.bytes);
            Ok(moved)
        })
    }
}

/// Guest room for the data of a read.
pub struct GuestWriter<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) segments: &'a mut Segments,
    pub(super) cursor: Cursor,
    pub(super) left: usize,
    pub(super) written: usize,
}

impl GuestWriter<'_> {
    /// Bytes written so far.
    pub fn written(&self) -> usize {
        self.written
    }

    fn advance(&mut self, by: usize) {
        if self.memory.log.is_active() {
            let memory = self.memory;
            self.segments.with_vector(self.cursor, by, |slices| {
                for slice in slices {
                    memory.mark_host(slice.as_ptr() as usize, slice.len());
                }
            });
        }
        self.cursor = self.cursor.advanced(&self.segments.slices, by);
        self.left -= by;
        self.written += by;
    }
}

impl io::Write for GuestWriter<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.left);
        let mut done = 0;
        self.segments.with_vector(self.cursor, count, |slices| {
            for slice in slices {
                if let Some(part) = buffer.get(done..done + slice.len()) {
                    copy_to(slice.as_ptr() as usize, part);
                    done += slice.len();
                }
            }
        });
        self.advance(done);
        Ok(done)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ZeroCopyWriter for GuestWriter<'_> {
    fn write_from(&mut self, f: &mut dyn FileReadWriteVolatile, count: usize, off: u64) -> io::Result<usize> {
        let count = count.min(self.left);
        in_vectors(count, |done| {
            let moved = self.segments.with_vector(self.cursor, count - done, |slices| {
                let moved = match slices {
                    [] => Ok(0),
                    [one] => f.read_at_volatile(*one, off + done as u64),
                    many => f.read_vectored_at_volatile(many, off + done as u64),
                };
                moved.map(|bytes| Moved::by(slices, bytes, count - done))
            })?;
            self.advance(moved.bytes);
            Ok(moved)
        })
    }

    fn available_bytes(&self) -> usize {
        self.left
    }
}
