//! Data of requests: between guest buffers and files, without a copy of ours.

use std::io;

use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

use super::buffers::{Cursor, Segments};
use super::{GuestMemory, copy_from, copy_to};

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
        let done = self
            .segments
            .with_vector(self.cursor, count, |slices| match slices {
                [] => Ok(0),
                [one] => f.write_at_volatile(*one, off),
                many => f.write_vectored_at_volatile(many, off),
            })?;
        let done = done.min(count);
        self.advance(done);
        Ok(done)
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
        let done = self
            .segments
            .with_vector(self.cursor, count, |slices| match slices {
                [] => Ok(0),
                [one] => f.read_at_volatile(*one, off),
                many => f.read_vectored_at_volatile(many, off),
            })?;
        let done = done.min(count);
        self.advance(done);
        Ok(done)
    }

    fn available_bytes(&self) -> usize {
        self.left
    }
}
