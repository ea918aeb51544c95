//! An image becomes files of the host.
//!
//! The image is not trusted: everything is made relative to a descriptor of its directory, which is opened without
//! following a link, and nothing that exists is opened or replaced. Directories are made first; file data are written
//! by workers on all cores; hard links and the attributes of directories come last, when nothing changes them any more.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use parking_lot::Mutex;
use rafs::inode::{Inode, Kind};
use rafs::reader::Step;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::super::blobs::Reader;
use super::super::inspect::{major, minor};
use super::super::progress::Bar;
use super::{Faults, Source, UnpackError};

/// Longest relative path that is given to one `openat2`.
const MAX_STEP: usize = 3072;
/// Zeros of this size and alignment become holes.
const HOLE: usize = 4096;

/// A file whose data are to be written.
struct Job {
    path: Vec<u8>,
    inode: Inode,
}

/// Unpacks into `output`; the number of faults of the image.
pub(super) fn unpack(source: &Source<'_>, output: &Path, owners: bool) -> Result<u64, UnpackError> {
    let target = Target {
        root: create_root(output)?,
        output: output.to_owned(),
        owners,
    };
    let faults = Mutex::new(Faults::default());
    let bar = Bar::bytes("unpacking");
    bar.expect(source.bytes());
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    let (sender, jobs) = crossbeam_channel::bounded::<Job>(4 * workers);

    let (directories, links) = thread::scope(|scope| {
        let workers: Vec<_> = (0..workers)
            .map(|_| {
                let (jobs, target, faults, bar) = (jobs.clone(), &target, &faults, &bar);
                scope.spawn(move || write_files(source, target, &jobs, faults, bar))
            })
            .collect();
        drop(jobs);
        let walked = make_tree(source, &target, &faults, &sender);
        drop(sender);
        for worker in workers {
            match worker.join() {
                Ok(written) => written?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        walked
    })?;
    for link in links {
        target.link(&link)?;
    }
    for Job { path, inode } in directories.into_iter().rev() {
        let directory = target.open_directory(&path)?;
        target
            .finish(source, &path, &directory, c".", &inode)
            .or_else(|e| tolerate(e, &faults))?;
    }
    Ok(faults.into_inner().count)
}

fn tolerate(error: UnpackError, faults: &Mutex<Faults>) -> Result<(), UnpackError> {
    if error.is_damage() {
        faults.lock().add(&error);
        return Ok(());
    }
    Err(error)
}

/// The output directory: made, or found empty.
fn create_root(output: &Path) -> Result<OwnedFd, UnpackError> {
    let io = |action| {
        move |source| UnpackError::Io {
            action,
            path: output.to_owned(),
            source,
        }
    };
    std::fs::create_dir_all(output).map_err(io("create directory"))?;
    if std::fs::read_dir(output).map_err(io("list"))?.next().is_some() {
        return Err(UnpackError::NotEmpty {
            path: output.to_owned(),
        });
    }
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
    rustix::fs::open(output, flags, Mode::empty()).map_err(|e| io("open")(e.into()))
}

/// A hard link that is to be made: its path, and the first path of its inode.
struct Link {
    path: Vec<u8>,
    first: Vec<u8>,
}

type Later = (Vec<Job>, Vec<Link>);

/// Makes everything but file data; gives directories and links that are to be finished later.
fn make_tree(
    source: &Source<'_>,
    target: &Target,
    faults: &Mutex<Faults>,
    jobs: &crossbeam_channel::Sender<Job>,
) -> Result<Later, UnpackError> {
    let (mut directories, mut links) = (Vec::new(), Vec::new());
    let mut first_names: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut parent: Option<(Vec<u8>, OwnedFd)> = None;
    source
        .image
        .walk(&mut |step: Step<'_>| -> Result<(), UnpackError> {
            let path = step.path.to_vec();
            let inode = match step.inode {
                Ok(inode) => *inode,
                Err(source) => return tolerate(UnpackError::Damaged { path, source }, faults),
            };
            if path == b"/" {
                directories.push(Job { path, inode });
                return Ok(());
            }
            if inode.kind == Kind::File {
                if inode.is_hardlinked()
                    && let Some(first) = first_names.get(&inode.id)
                {
                    links.push(Link {
                        path,
                        first: first.clone(),
                    });
                    return Ok(());
                }
                first_names.extend(inode.is_hardlinked().then(|| (inode.id, path.clone())));
                return jobs.send(Job { path, inode }).map_err(|_| UnpackError::GivenUp);
            }
            let (above, name) = split(&path);
            if parent.as_ref().is_none_or(|(known, _)| known != above) {
                parent = Some((above.to_vec(), target.open_directory(above)?));
            }
            let Some((_, directory)) = &parent else {
                return Err(UnpackError::GivenUp);
            };
            target
                .make(source, &path, directory, name, &inode)
                .or_else(|e| tolerate(e, faults))?;
            if inode.kind == Kind::Directory {
                directories.push(Job { path, inode });
            }
            Ok(())
        })?;
    Ok((directories, links))
}

/// Parent and name of a path that is not the root.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let slash = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let (above, name) = path.split_at(slash);
    (above, name.strip_prefix(b"/").unwrap_or(name))
}

fn write_files(
    source: &Source<'_>,
    target: &Target,
    jobs: &crossbeam_channel::Receiver<Job>,
    faults: &Mutex<Faults>,
    bar: &Bar,
) -> Result<(), UnpackError> {
    let mut reader = source.reader();
    for job in jobs {
        target
            .write_file(source, &job, &mut reader, bar)
            .or_else(|e| tolerate(e, faults))?;
    }
    Ok(())
}

/// Where to.
struct Target {
    root: OwnedFd,
    output: PathBuf,
    /// Whether owners are restored.
    owners: bool,
}

impl Target {
    fn shown(&self, path: &[u8]) -> PathBuf {
        self.output
            .join(OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path)))
    }

    fn error(&self, action: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> UnpackError {
        let path = self.shown(path);
        move |source| UnpackError::Io {
            action,
            path,
            source: source.into(),
        }
    }

    /// A directory that was made before, by its path; no link is followed.
    fn open_directory(&self, path: &[u8]) -> Result<OwnedFd, UnpackError> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let open = |at: BorrowedFd<'_>, step: &[u8]| {
            rustix::fs::openat2(at, step, flags, Mode::empty(), resolve).map_err(self.error("open", path))
        };
        let mut at = open(self.root.as_fd(), b".")?;
        let mut step: Vec<u8> = Vec::new();
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            if step.len() > MAX_STEP {
                at = open(at.as_fd(), &step)?;
                step.clear();
            }
            if !step.is_empty() {
                step.push(b'/');
            }
            step.extend_from_slice(name);
        }
        if step.is_empty() {
            Ok(at)
        } else {
            open(at.as_fd(), &step)
        }
    }

    /// Makes anything but a regular file; of a directory the attributes come later.
    fn make(
        &self,
        source: &Source<'_>,
        path: &[u8],
        directory: &OwnedFd,
        name: &[u8],
        inode: &Inode,
    ) -> Result<(), UnpackError> {
        let kind = match inode.kind {
            Kind::Directory => {
                return rustix::fs::mkdirat(directory, name, Mode::RWXU)
                    .map_err(self.error("create directory", path));
            }
            Kind::Symlink => {
                let damaged = |source| UnpackError::Damaged {
                    path: path.to_vec(),
                    source,
                };
                let to = source.image.symlink_target(inode).map_err(damaged)?;
                rustix::fs::symlinkat(to, directory, name)
                    .map_err(self.error("create symbolic link", path))?;
                return self.finish(source, path, directory, name, inode);
            }
            Kind::Char => FileType::CharacterDevice,
            Kind::Block => FileType::BlockDevice,
            Kind::Fifo => FileType::Fifo,
            Kind::Socket => FileType::Socket,
            Kind::File => FileType::RegularFile,
        };
        let device = rustix::fs::makedev(major(inode.rdev), minor(inode.rdev));
        rustix::fs::mknodat(directory, name, kind, Mode::RUSR | Mode::WUSR, device)
            .map_err(self.error("create node", path))?;
        self.finish(source, path, directory, name, inode)
    }

    fn write_file(
        &self,
        source: &Source<'_>,
        Job { path, inode }: &Job,
        reader: &mut Reader,
        bar: &Bar,
    ) -> Result<(), UnpackError> {
        let (above, name) = split(path);
        let directory = self.open_directory(above)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
        let file: File = rustix::fs::openat(&directory, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(self.error("create", path))?
            .into();
        rustix::fs::ftruncate(&file, inode.size).map_err(self.error("write", path))?;
        let written = source.data(path, inode, reader, &mut |offset, data| {
            bar.add(data.len() as u64);
            write_sparse(&file, offset, data).map_err(|source| UnpackError::Io {
                action: "write",
                path: self.shown(path),
                source,
            })
        });
        if let Err(e) = written {
            // Half a file is worse than none.
            let _ = rustix::fs::unlinkat(&directory, name, AtFlags::empty());
            return Err(e);
        }
        self.finish(source, path, &directory, name, inode)
    }

    fn link(&self, link: &Link) -> Result<(), UnpackError> {
        let (from, to) = (split(&link.first), split(&link.path));
        let (from_directory, to_directory) = (self.open_directory(from.0)?, self.open_directory(to.0)?);
        match rustix::fs::linkat(&from_directory, from.1, &to_directory, to.1, AtFlags::empty()) {
            // The first name could not be unpacked; that was told.
            Err(Errno::NOENT) => Ok(()),
            linked => linked.map_err(self.error("create hard link", &link.path)),
        }
    }

    /// Owner, mode, attributes and time, in the order in which they do not undo each other.
    fn finish<'n>(
        &self,
        source: &Source<'_>,
        path: &[u8],
        directory: &OwnedFd,
        name: impl Into<Name<'n>>,
        inode: &Inode,
    ) -> Result<(), UnpackError> {
        let name = name.into().0;
        if self.owners {
            let owner = (Uid::from_raw(inode.uid), Gid::from_raw(inode.gid));
            rustix::fs::chownat(
                directory,
                name,
                Some(owner.0),
                Some(owner.1),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(self.error("change the owner of", path))?;
        }
        if inode.kind != Kind::Symlink {
            rustix::fs::chmodat(
                directory,
                name,
                Mode::from_raw_mode(inode.mode & 0o7777),
                AtFlags::empty(),
            )
            .map_err(self.error("change the mode of", path))?;
        }
        let damaged = |source| UnpackError::Damaged {
            path: path.to_vec(),
            source,
        };
        // There is no `*at` form of this call before Linux 6.13.
        let mut own = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
        own.extend_from_slice(name);
        for (key, value) in source.image.xattrs(inode).map_err(damaged)? {
            rustix::fs::lsetxattr(own.as_slice(), key, &value, XattrFlags::empty())
                .map_err(self.error("set extended attributes of", path))?;
        }
        let time = Timespec {
            tv_sec: inode.mtime,
            tv_nsec: inode.mtime_nsec.into(),
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(directory, name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(self.error("set the time of", path))
    }
}

/// A name in a directory, `.` for the directory itself.
struct Name<'n>(&'n [u8]);

impl<'n> From<&'n [u8]> for Name<'n> {
    fn from(name: &'n [u8]) -> Self {
        Self(name)
    }
}

impl<'n> From<&'n std::ffi::CStr> for Name<'n> {
    fn from(name: &'n std::ffi::CStr) -> Self {
        Self(name.to_bytes())
    }
}

/// Writes what is not zero; the file has its size already.
fn write_sparse(file: &File, offset: u64, data: &[u8]) -> std::io::Result<()> {
    let is_hole = |block: &&[u8]| **block == [0; HOLE];
    let mut rest = data;
    let mut at = offset;
    while !rest.is_empty() {
        let holes = rest.chunks(HOLE).take_while(is_hole).count() * HOLE;
        let (_, after) = rest.split_at(holes);
        let full = after
            .chunks(HOLE)
            .take_while(|block| !is_hole(block))
            .map(<[u8]>::len)
            .sum();
        let (bytes, next) = after.split_at(full);
        file.write_all_at(bytes, at + holes as u64)?;
        at += (holes + full) as u64;
        rest = next;
    }
    Ok(())
}
