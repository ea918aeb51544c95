//! Writes the archive format that the kernel takes as an initial RAM disk ("newc", `initramfs buffer format` in the
//! kernel's documentation). Made here, so that building one needs no root and no `cpio` program.

use std::io::{self, Write};

/// Type bits of `st_mode`.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written.
pub struct Archive<W> {
    out: W,
    members: u32,
}

impl<W: Write> Archive<W> {
    /// Starts an archive on `out`.
    pub fn new(out: W) -> Self {
        Self { out, members: 0 }
    }

    /// Adds a directory.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.member(name, DIRECTORY | 0o755, (0, 0), b"")
    }

    /// Adds a regular file with the permission bits `mode`.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.member(name, REGULAR | mode, (0, 0), content)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.member(name, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.member(name, CHARACTER | 0o600, (major, minor), b"")
    }

    /// Ends the archive and returns what it was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.member("TRAILER!!!", 0, (0, 0), b"")?;
        Ok(self.out)
    }

    fn member(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name_size = u32::try_from(name.len())
            .map_err(io::Error::other)?
            .saturating_add(1);
        self.members += 1;
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        // ino, mode, uid, gid, nlink, mtime, size, dev (2), rdev (2), length of the name with its NUL, checksum (unused)
        let fields = [
            self.members,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ]
        .map(|f| format!("{f:08x}"));
        let header = format!("070701{}{name}\0", fields.concat());
        self.padded(header.as_bytes())?;
        self.padded(content)
    }

    /// Writes `bytes` and zeroes up to the next multiple of four; every part of an archive starts on one.
    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.out.write_all(bytes)?;
        self.out.write_all([0; 3].get(..padding).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_the_archive_ends_with_its_trailer() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("a").unwrap();
        archive.file("a/b", 0o755, b"12345").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<usize> = (0..bytes.len())
            .filter(|&at| bytes[at..].starts_with(b"070701"))
            .collect();
        assert_eq!(starts.len(), 3);
        assert!(starts.iter().all(|at| at % 4 == 0));
        assert_eq!(&bytes[starts[1] + 110..starts[1] + 114], b"a/b\0");
        assert_eq!(&bytes[starts[1] + 14..starts[1] + 22], b"000081ed");
    }
}
