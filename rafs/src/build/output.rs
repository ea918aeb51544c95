//! Files that appear complete or not at all.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::BuildError;

static NUMBER: AtomicU64 = AtomicU64::new(0);

/// A file under a temporary name in its final directory. Dropped without [`TemporaryFile::publish`], it is
/// removed.
pub struct TemporaryFile {
    file: File,
    path: Option<PathBuf>,
}

impl TemporaryFile {
    /// Creates an empty file in `directory`, which must exist.
    pub fn create_in(directory: &Path) -> Result<Self, BuildError> {
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = directory.join(format!(".rafs-{}-{number}.tmp", std::process::id()));
            match OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)
            {
                Ok(file) => {
                    return Ok(Self {
                        file,
                        path: Some(path),
                    });
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(BuildError::io("create", path)(e)),
            }
        }
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the content durable, then gives the file its name; an older file of that name is replaced.
    pub fn publish(mut self, target: &Path) -> Result<(), BuildError> {
        self.file.sync_all().map_err(BuildError::io("write", target))?;
        if let Some(path) = self.path.take()
            && let Err(e) = std::fs::rename(&path, target)
        {
            self.path = Some(path);
            return Err(BuildError::io("create", target)(e));
        }
        let directory = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)
            .and_then(|d| d.sync_all())
            .map_err(BuildError::io("write", directory))
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            // Nobody is left to tell; the name says what the file is.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_dropped_file_leaves_nothing_and_a_published_one_replaces() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("target");
        std::fs::write(&target, "old").unwrap();
        let unfinished = TemporaryFile::create_in(directory.path()).unwrap();
        unfinished.file().write_all(b"half").unwrap();
        drop(unfinished);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        let finished = TemporaryFile::create_in(directory.path()).unwrap();
        finished.file().write_all(b"new").unwrap();
        finished.publish(&target).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
