//! What is prepared once and kept: kernel, initrd, container trees.
//!
//! Every entry is built under a temporary name and renamed when it is complete, under a lock of its own. So a build
//! that was interrupted is started again, tests that run side by side wait for one build, and what has the final name
//! is whole.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, XattrFlags, flock, removexattr, setxattr};

/// A directory of prepared things, by default `target/guest/` of this workspace.
#[derive(Clone, Debug)]
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// Opens the cache of this workspace. `RAFSD_GUEST_CACHE` names another directory.
    pub fn open() -> Result<Self> {
        let directory = match std::env::var_os("RAFSD_GUEST_CACHE") {
            Some(directory) => PathBuf::from(directory),
            None => workspace().join("target/guest"),
        };
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// The directory itself.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The path of entry `name`, built by `build` if it is not there yet.
    ///
    /// `build` gets a path that does not exist and leaves a file or a directory there. It runs while no other process
    /// builds the same entry.
    pub fn entry(&self, name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.directory.join(name);
        let _lock = self.lock(name)?;
        if path.exists() {
            return Ok(path);
        }
        let unfinished = self.directory.join(format!("{name}.unfinished"));
        remove(&unfinished)?;
        build(&unfinished).with_context(|| format!("prepare {}", path.display()))?;
        fs::rename(&unfinished, &path).with_context(|| format!("rename to {}", path.display()))?;
        Ok(path)
    }

    /// Waits until no other process holds the lock `name`; the lock ends with the returned file.
    pub fn lock(&self, name: &str) -> Result<File> {
        let path = self.directory.join(format!(".{name}.lock"));
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive).with_context(|| format!("lock {}", path.display()))?;
        Ok(file)
    }
}

/// Removes a file or a directory with all it holds; nothing there is fine too.
pub fn remove(path: &Path) -> Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("stat {}", path.display())),
    };
    if found.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
    .with_context(|| format!("remove {}", path.display()))
}

/// The root of this workspace.
#[must_use]
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

/// The entries of a directory, sorted by name.
pub fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))? {
        found.push(entry?.path());
    }
    found.sort();
    Ok(found)
}

/// Whether the last component of `path` ends with `end`.
#[must_use]
pub fn name_ends_with(path: &Path, end: &str) -> bool {
    path.file_name()
        .and_then(OsStr::to_str)
        .is_some_and(|name| name.ends_with(end))
}

/// A directory for files of one run, removed when it is dropped, on a file system that can hold the writable layer of
/// a guest's container: one that takes `trusted.overlay.*` attributes, which needs root and refuses an overlay.
pub fn scratch(cache: &Cache) -> Result<tempfile::TempDir> {
    let mut refusals = String::new();
    for parent in [cache.directory(), &std::env::temp_dir(), Path::new("/dev/shm")] {
        let directory = tempfile::Builder::new().prefix("run-").tempdir_in(parent)?;
        match setxattr(
            directory.path(),
            "trusted.overlay.opaque",
            b"y",
            XattrFlags::empty(),
        ) {
            Ok(()) => {
                removexattr(directory.path(), "trusted.overlay.opaque")?;
                return Ok(directory);
            }
            Err(error) => refusals.push_str(&format!("\n{}: {error}", parent.display())),
        }
    }
    bail!(
        "nowhere to put a container's writable layer, trusted.overlay.* attributes are refused (root?):{refusals}"
    )
}
