//! A directory of the host → [`Tree`].
//!
//! Nothing is followed: every object is reached through a descriptor of its directory, which itself is opened
//! name by name without following symbolic links. So neither links in the tree nor paths longer than
//! `PATH_MAX` lead astray. File data is not read here.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::Progress;
use super::error::BuildError;
use super::tree::{Attributes, Content, Entry, Inode, InodeId, Tree, Xattr};
use super::xattr;

/// Longest relative path that is given to one `openat`.
const MAX_STEP: usize = 3072;

/// Directory `path` (names) below `root`, without following a symbolic link anywhere.
pub(super) fn open_directory(root: BorrowedFd<'_>, path: &[&[u8]]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let mut at = rustix::fs::openat(root, c".", flags, Mode::empty())?;
    let mut step: Vec<u8> = Vec::new();
    let mut names = path.iter().peekable();
    while let Some(name) = names.next() {
        if !step.is_empty() {
            step.push(b'/');
        }
        step.extend_from_slice(name);
        if step.len() > MAX_STEP || names.peek().is_none() {
            at = rustix::fs::openat2(
                &at,
                step.as_slice(),
                flags,
                Mode::empty(),
                rustix::fs::ResolveFlags::BENEATH | rustix::fs::ResolveFlags::NO_SYMLINKS,
            )?;
            step.clear();
        }
    }
    Ok(at)
}

/// The path shown in messages: `source` with `names` appended.
pub(super) fn shown(source: &Path, names: &[&[u8]]) -> PathBuf {
    let mut path = source.to_path_buf();
    path.extend(names.iter().map(|name| OsStr::from_bytes(name)));
    path
}

/// Reads names, attributes, targets and extended attributes of all that is below `source`.
///
/// The root's modification time is dropped (set to 0), as the format wants it for images made from a
/// directory: merely unpacking a tree twice must not give two images.
pub(super) fn scan(source: &Path, progress: &dyn Progress) -> Result<Tree, BuildError> {
    let root = rustix::fs::open(
        source,
        OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY,
        Mode::empty(),
    )
    .map_err(BuildError::errno("open", source))?;
    let stat = rustix::fs::fstat(&root).map_err(BuildError::errno("stat", source))?;
    let mut tree = Tree::new(Attributes {
        mtime: 0,
        mtime_nsec: 0,
        ..attributes(&stat)
    });
    tree.inode_mut(InodeId::ROOT).xattrs = read_xattrs(root.as_fd(), c".", source)?;

    let mut links: HashMap<(u64, u64), InodeId> = HashMap::new();
    let mut pending: Vec<(InodeId, Vec<Vec<u8>>)> = vec![(InodeId::ROOT, Vec::new())];
    while let Some((directory, path)) = pending.pop() {
        let names: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
        let here = shown(source, &names);
        let fd = open_directory(root.as_fd(), &names).map_err(BuildError::errno("open directory", &here))?;
        let mut entries = Vec::new();
        for name in list(&fd, &here)? {
            let shown = here.join(OsStr::from_bytes(name.to_bytes()));
            let stat = rustix::fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(BuildError::errno("stat", &shown))?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            let shared = kind == FileType::RegularFile && stat.st_nlink > 1;
            let key = (stat.st_dev, stat.st_ino);
            let inode = match links.get(&key).filter(|_| shared) {
                Some(known) => *known,
                None => {
                    let inode = read_inode(&fd, &name, &stat, kind, &shown)?;
                    let id = tree.add(inode).ok_or_else(BuildError::too_many_inodes)?;
                    if shared {
                        links.insert(key, id);
                    }
                    progress.scanned(if kind == FileType::RegularFile {
                        stat.st_size.max(0) as u64
                    } else {
                        0
                    });
                    id
                }
            };
            if kind == FileType::Directory {
                let mut below = path.clone();
                below.push(name.to_bytes().to_vec());
                pending.push((inode, below));
            }
            entries.push(Entry {
                name: name.into_bytes(),
                inode,
            });
        }
        tree.inode_mut(directory).content = Content::Directory(entries);
    }
    tree.sort();
    Ok(tree)
}

fn list(fd: &OwnedFd, shown: &Path) -> Result<Vec<CString>, BuildError> {
    let mut names = Vec::new();
    for entry in Dir::read_from(fd).map_err(BuildError::errno("list", shown))? {
        let entry = entry.map_err(BuildError::errno("list", shown))?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn attributes(stat: &Stat) -> Attributes {
    Attributes {
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        mtime_nsec: stat.st_mtime_nsec as u32,
    }
}

fn read_inode(
    fd: &OwnedFd,
    name: &CStr,
    stat: &Stat,
    kind: FileType,
    shown: &Path,
) -> Result<Inode, BuildError> {
    let content = match kind {
        FileType::RegularFile => Content::Regular {
            size: stat.st_size.max(0) as u64,
        },
        FileType::Directory => Content::Directory(Vec::new()),
        FileType::Symlink => Content::Symlink(
            rustix::fs::readlinkat(fd, name, Vec::new())
                .map_err(BuildError::errno("read link", shown))?
                .into_bytes(),
        ),
        FileType::CharacterDevice | FileType::BlockDevice => Content::Device {
            rdev: encode_rdev(
                rustix::fs::major(stat.st_rdev),
                rustix::fs::minor(stat.st_rdev),
                shown,
            )?,
        },
        FileType::Fifo | FileType::Socket => Content::Special,
        FileType::Unknown => {
            return Err(BuildError::Unsupported {
                path: shown.to_path_buf(),
                reason: format!("unknown file type, mode {:o}", stat.st_mode),
            });
        }
    };
    Ok(Inode {
        attributes: attributes(stat),
        xattrs: read_xattrs(fd.as_fd(), name, shown)?,
        content,
    })
}

/// The 32 bits that RAFS has for a device number (v5 section 9).
pub(super) fn encode_rdev(major: u32, minor: u32, shown: &Path) -> Result<u32, BuildError> {
    if major > 0xfff || minor > 0xf_ffff {
        return Err(BuildError::Unsupported {
            path: shown.to_path_buf(),
            reason: format!("device number {major}:{minor} needs more than 12:20 bits"),
        });
    }
    Ok((minor & 0xff) | (major << 8) | ((minor & 0xf_ff00) << 12))
}

/// All extended attributes of `name` in `directory`, sorted by name.
///
/// There is no `*at` form of these calls before Linux 6.13: the directory is named through `/proc/self/fd`.
fn read_xattrs(directory: BorrowedFd<'_>, name: &CStr, shown: &Path) -> Result<Vec<Xattr>, BuildError> {
    let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    let path = Path::new(OsStr::from_bytes(&path));
    let list = match read_growing(|buffer| rustix::fs::llistxattr(path, buffer)) {
        Ok(list) => list,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(e) => return Err(BuildError::errno("list extended attributes of", shown)(e)),
    };
    let mut xattrs = Vec::new();
    for name in list.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        xattr::check_name(name).map_err(|reason| BuildError::Unsupported {
            path: shown.to_path_buf(),
            reason,
        })?;
        let value = read_growing(|buffer| rustix::fs::lgetxattr(path, name, buffer))
            .map_err(BuildError::errno("read extended attributes of", shown))?;
        xattrs.push((name.to_vec(), value));
    }
    xattrs.sort_unstable();
    Ok(xattrs)
}

/// Calls `read` with a larger buffer until the value fits.
fn read_growing(mut read: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 256];
    loop {
        match read(&mut buffer) {
            Ok(size) => {
                buffer.truncate(size);
                return Ok(buffer);
            }
            // The kernel's own limit for names and for values is 64 KiB.
            Err(Errno::RANGE) if buffer.len() < 128 * 1024 => buffer.resize(buffer.len() * 4, 0),
            Err(e) => return Err(e),
        }
    }
}
