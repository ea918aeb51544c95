//! File data of a directory of the host, into the pipeline.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::error::BuildError;
use super::pipeline::Feeder;
use super::scan;
use super::tree::{Attributes, Content, Tree, Visit};

/// Opens every regular file of the tree once and feeds it: first what is at or below each path of `first`, then the
/// rest, in the order of the tree.
pub(super) fn feed(
    source: &Path,
    tree: &Tree,
    first: &[Vec<&[u8]>],
    feeder: &mut Feeder<'_>,
) -> Result<(), BuildError> {
    let root = rustix::fs::open(source, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(BuildError::errno("open", source))?;
    let mut files = Files {
        source,
        root,
        tree,
        fed: vec![false; tree.inode_count()],
    };
    for path in first {
        files.feed(path, feeder)?;
    }
    files.feed(&[], feeder)
}

struct Files<'t> {
    source: &'t Path,
    root: OwnedFd,
    tree: &'t Tree,
    fed: Vec<bool>,
}

impl Files<'_> {
    /// What is at or below `path` and was not fed yet.
    fn feed(&mut self, path: &[&[u8]], feeder: &mut Feeder<'_>) -> Result<(), BuildError> {
        let tree = self.tree;
        for visit in tree.directories() {
            let whole = visit.path.starts_with(path);
            // The directory that holds `path` itself, if that is no directory.
            let holds = path
                .split_last()
                .filter(|(_, above)| visit.path == *above)
                .map(|(name, _)| *name);
            if whole || holds.is_some() {
                self.feed_directory(&visit, holds.filter(|_| !whole), feeder)?;
            }
        }
        Ok(())
    }

    /// Files of one directory, or the one called `only`.
    fn feed_directory(
        &mut self,
        visit: &Visit<'_>,
        only: Option<&[u8]>,
        feeder: &mut Feeder<'_>,
    ) -> Result<(), BuildError> {
        let here = scan::shown(self.source, &visit.path);
        let mut directory = None;
        for entry in self.tree.inode(visit.inode).entries() {
            let inode = self.tree.inode(entry.inode);
            let Content::Regular { size } = inode.content else {
                continue;
            };
            let Some(fed) = self.fed.get_mut(entry.inode.position()) else {
                continue;
            };
            if only.is_some_and(|only| entry.name != only) || size == 0 || std::mem::replace(fed, true) {
                continue;
            }
            let directory = match &mut directory {
                Some(directory) => directory,
                none => none.insert(
                    scan::open_directory(self.root.as_fd(), &visit.path)
                        .map_err(BuildError::errno("open directory", &here))?,
                ),
            };
            let path = here.join(OsStr::from_bytes(&entry.name));
            let flags =
                OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let file: File =
                rustix::fs::openat2(&directory, entry.name.as_slice(), flags, Mode::empty(), resolve)
                    .map_err(BuildError::errno("open", &path))?
                    .into();
            feeder.file(entry.inode, size, &path, &file)?;
            check_unchanged(&file, &path, size, &inode.attributes)?;
        }
        Ok(())
    }
}

/// A file whose size or time is not what the scan saw has no single content that the image could hold.
fn check_unchanged(file: &File, path: &Path, size: u64, seen: &Attributes) -> Result<(), BuildError> {
    let stat = rustix::fs::fstat(file).map_err(BuildError::errno("stat", path))?;
    let changed = |reason: String| {
        Err(BuildError::Changed {
            path: path.to_path_buf(),
            reason,
        })
    };
    if stat.st_size as u64 != size {
        return changed(format!("it had {size} bytes, it has {}", stat.st_size));
    }
    if (stat.st_mtime, stat.st_mtime_nsec as u32) != (seen.mtime, seen.mtime_nsec) {
        return changed("its modification time is another".into());
    }
    Ok(())
}
