//! The same random operations on a served tree and, by plain system calls, on another one: the answers and the trees
//! must be the same.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::*;
use fuse_backend_rs::abi::fuse_abi::{CreateIn, SetattrValid};
use fuse_backend_rs::api::filesystem::{FileSystem, GetxattrReply};
use rafsd_passthrough::{FdBudget, InodeFiles};
use rustix::fs::{AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Uid, XattrFlags};

/// A small generator, so that a failing seed can be run again.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// A directory, as components below the root, and a name in it.
type Place = (Vec<&'static str>, &'static str);

// Sticky directories are not for everybody to write to: there the host has rules for links and existing files that a
// guest's kernel applies by itself.
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

fn place(random: &mut Random) -> Place {
    let depth = random.below(3);
    (
        (0..depth).map(|_| random.pick(&NAMES[..2])).collect(),
        random.pick(&NAMES),
    )
}

#[derive(Debug)]
enum Step {
    Create(Place, i32, u32),
    Mkdir(Place, u32),
    Mknod(Place, u32),
    Symlink(Place),
    Link(Place, Place),
    Unlink(Place),
    Rmdir(Place),
    Rename(Place, Place, u32),
    Chmod(Place, u32),
    Chown(Place, u32, u32),
    Truncate(Place, u64),
    Write(Place, u64, usize, bool),
    Read(Place, u64, usize),
    Allocate(Place, i32, u64, u64),
    SetAttribute(Place, &'static str, u32),
    GetAttribute(Place, &'static str),
    RemoveAttribute(Place, &'static str),
    Times(Place, i64),
    Readlink(Place),
    Seek(Place, u64, i32),
}

fn step(random: &mut Random) -> Step {
    const ATTRIBUTES: [&str; 3] = ["user.one", "trusted.overlay.opaque", "security.two"];
    let at = place(random);
    match random.below(26) {
        0..=3 => Step::Create(
            at,
            random.pick(&[0, libc::O_EXCL, libc::O_TRUNC]),
            random.pick(&[0o644, 0o600, 0o4755]),
        ),
        4..=6 => Step::Mkdir(at, random.pick(&[0o755, 0o700, 0o2775, 0o1755])),
        7 => Step::Mknod(
            at,
            random.pick(&[libc::S_IFIFO, libc::S_IFCHR, libc::S_IFSOCK, libc::S_IFREG]),
        ),
        8 => Step::Symlink(at),
        9 => Step::Link(at, place(random)),
        10 => Step::Unlink(at),
        11 => Step::Rmdir(at),
        12..=14 => Step::Rename(at, place(random), random.pick(&[0, 0, 1, 2, 4, 3, 8])),
        15 => Step::Chmod(at, random.pick(&[0o600, 0o6755, 0o1755, 0])),
        16 => Step::Chown(at, random.pick(&[0, 1000]), random.pick(&[0, 1000])),
        17 => Step::Truncate(at, random.pick(&[0, 1, 5_000, 100_000])),
        18 | 19 => Step::Write(
            at,
            random.below(20_000),
            random.below(9_000) as usize,
            random.below(3) == 0,
        ),
        20 => Step::Read(at, random.below(20_000), random.below(9_000) as usize),
        21 => Step::Allocate(
            at,
            random.pick(&[0, 1, 3, 16, 8]),
            random.below(5) * 4096,
            (random.below(4) + 1) * 4096,
        ),
        22 => Step::SetAttribute(at, random.pick(&ATTRIBUTES), random.pick(&[0, 1, 2])),
        23 => match random.below(2) {
            0 => Step::GetAttribute(at, random.pick(&ATTRIBUTES)),
            _ => Step::RemoveAttribute(at, random.pick(&ATTRIBUTES)),
        },
        24 => Step::Times(at, random.below(1 << 31) as i64),
        _ => match random.below(2) {
            0 => Step::Readlink(at),
            _ => Step::Seek(
                at,
                random.below(30_000),
                random.pick(&[libc::SEEK_DATA, libc::SEEK_HOLE]),
            ),
        },
    }
}

fn c(name: &str) -> CString {
    CString::new(name).unwrap()
}

/// What both sides answer: bytes, or an errno.
type Answer = Result<Vec<u8>, i32>;

fn answer<T>(result: io::Result<T>, bytes: impl FnOnce(T) -> Vec<u8>) -> Answer {
    result
        .map(bytes)
        .map_err(|error| error.raw_os_error().expect("an errno"))
}

fn done<T>(result: io::Result<T>) -> Answer {
    answer(result, |_| Vec::new())
}

/// The served tree.
impl Share {
    /// The node of a directory, with one lookup that is taken back by the caller's `forget` of what it returns.
    fn walk(&self, path: &[&str]) -> io::Result<u64> {
        let mut at = ROOT;
        for name in path {
            let next = self.lookup(at, &c(name));
            self.fs.forget(&root(), at, 1);
            let entry = next?;
            at = entry.inode;
            if entry.attr.st_mode & libc::S_IFMT != libc::S_IFDIR {
                self.fs.forget(&root(), at, 1);
                return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
            }
        }
        Ok(at)
    }

    fn with_node<T>(&self, (path, name): &Place, act: impl FnOnce(u64) -> io::Result<T>) -> io::Result<T> {
        self.with_parent(path, |parent| {
            let node = self.lookup(parent, &c(name))?.inode;
            let result = act(node);
            self.fs.forget(&root(), node, 1);
            result
        })
    }

    fn with_parent<T>(&self, path: &[&str], act: impl FnOnce(u64) -> io::Result<T>) -> io::Result<T> {
        let parent = self.walk(path)?;
        let result = act(parent);
        self.fs.forget(&root(), parent, 1);
        result
    }

    fn with_file<T>(
        &self,
        at: &Place,
        flags: i32,
        act: impl FnOnce(u64, u64) -> io::Result<T>,
    ) -> io::Result<T> {
        self.with_node(at, |node| {
            let handle = self.open(node, flags)?;
            let result = act(node, handle);
            self.release(node, handle);
            result
        })
    }

    fn entry(&self, made: io::Result<fuse_backend_rs::api::filesystem::Entry>) -> io::Result<()> {
        made.map(|entry| self.fs.forget(&root(), entry.inode, 1))
    }

    fn set(&self, at: &Place, valid: SetattrValid, change: impl FnOnce(&mut libc::stat64)) -> io::Result<()> {
        self.with_node(at, |node| {
            let mut attr = self.stat(node)?;
            change(&mut attr);
            self.fs.setattr(&root(), node, attr, None, valid).map(drop)
        })
    }

    fn apply(&self, step: &Step) -> Answer {
        let (fs, ctx) = (&self.fs, &root());
        match step {
            Step::Create((path, name), flags, mode) => done(self.with_parent(path, |parent| {
                let args = CreateIn {
                    flags: (libc::O_RDWR | flags) as u32,
                    mode: *mode,
                    umask: 0o022,
                    fuse_flags: 0,
                };
                let (entry, handle, ..) = fs.create(ctx, parent, &c(name), args)?;
                self.release(entry.inode, handle.unwrap());
                self.entry(Ok(entry))
            })),
            Step::Mkdir((path, name), mode) => done(self.with_parent(path, |parent| {
                self.entry(fs.mkdir(ctx, parent, &c(name), *mode, 0o022))
            })),
            Step::Mknod((path, name), kind) => done(self.with_parent(path, |parent| {
                self.entry(fs.mknod(ctx, parent, &c(name), kind | 0o666, 0, 0o022))
            })),
            Step::Symlink((path, name)) => done(self.with_parent(path, |parent| {
                self.entry(fs.symlink(ctx, c"a/../b", parent, &c(name)))
            })),
            Step::Link(from, (path, name)) => done(self.with_node(from, |node| {
                self.with_parent(path, |parent| self.entry(fs.link(ctx, node, parent, &c(name))))
            })),
            Step::Unlink((path, name)) => {
                done(self.with_parent(path, |parent| fs.unlink(ctx, parent, &c(name))))
            }
            Step::Rmdir((path, name)) => {
                done(self.with_parent(path, |parent| fs.rmdir(ctx, parent, &c(name))))
            }
            Step::Rename((from, old), (to, new), flags) => done(self.with_parent(from, |source| {
                self.with_parent(to, |target| {
                    fs.rename(ctx, source, &c(old), target, &c(new), *flags)
                })
            })),
            Step::Chmod(at, mode) => done(self.set(at, SetattrValid::MODE, |attr| attr.st_mode = *mode)),
            Step::Chown(at, uid, gid) => done(self.set(at, SetattrValid::UID | SetattrValid::GID, |attr| {
                (attr.st_uid, attr.st_gid) = (*uid, *gid);
            })),
            Step::Truncate(at, size) => {
                done(self.set(at, SetattrValid::SIZE, |attr| attr.st_size = *size as i64))
            }
            Step::Times(at, seconds) => {
                done(self.set(at, SetattrValid::MTIME | SetattrValid::ATIME, |attr| {
                    (attr.st_mtime, attr.st_mtime_nsec) = (*seconds, 5);
                    (attr.st_atime, attr.st_atime_nsec) = (*seconds, 6);
                }))
            }
            Step::Write(at, offset, length, append) => {
                let data = vec![*offset as u8; *length];
                let flags = if *append { libc::O_APPEND } else { 0 };
                answer(
                    self.with_file(at, libc::O_WRONLY | flags, |node, handle| {
                        self.write_flags(node, handle, &data, *offset, flags, 0)
                    }),
                    |count| count.to_le_bytes().to_vec(),
                )
            }
            Step::Read(at, offset, length) => answer(
                self.with_file(at, libc::O_RDONLY, |node, handle| {
                    self.read(node, handle, *length as u32, *offset)
                }),
                |data| data,
            ),
            Step::Allocate(at, mode, offset, length) => {
                done(self.with_file(at, libc::O_RDWR, |node, handle| {
                    fs.fallocate(ctx, node, handle, *mode as u32, *offset, *length)
                }))
            }
            Step::SetAttribute(at, name, flags) => {
                done(self.with_node(at, |node| fs.setxattr(ctx, node, &c(name), b"value", *flags)))
            }
            Step::GetAttribute(at, name) => answer(
                self.with_node(at, |node| fs.getxattr(ctx, node, &c(name), 99)),
                |value| match value {
                    GetxattrReply::Value(value) => value,
                    GetxattrReply::Count(_) => panic!("a value was asked for"),
                },
            ),
            Step::RemoveAttribute(at, name) => {
                done(self.with_node(at, |node| fs.removexattr(ctx, node, &c(name))))
            }
            Step::Readlink(at) => answer(self.with_node(at, |node| fs.readlink(ctx, node)), |to| to),
            Step::Seek(at, offset, whence) => answer(
                self.with_file(at, libc::O_RDONLY, |node, handle| {
                    fs.lseek(ctx, node, handle, *offset, *whence as u32)
                }),
                |position| position.to_le_bytes().to_vec(),
            ),
        }
    }
}

/// The other tree, changed by the calls that a program would make.
struct Plain {
    root: OwnedFd,
}

impl Plain {
    fn parent(&self, path: &[&str]) -> io::Result<OwnedFd> {
        let mut at = rustix::io::fcntl_dupfd_cloexec(&self.root, 0)?;
        for name in path {
            at = rustix::fs::openat(
                &at,
                *name,
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY,
                Mode::empty(),
            )?;
        }
        Ok(at)
    }

    fn node(&self, (path, name): &Place) -> io::Result<OwnedFd> {
        Ok(rustix::fs::openat(
            self.parent(path)?,
            *name,
            OFlags::PATH | OFlags::NOFOLLOW,
            Mode::empty(),
        )?)
    }

    /// A file that can be opened without a peer or a device, as a guest's kernel would have made sure.
    fn file(&self, at: &Place, flags: OFlags) -> io::Result<OwnedFd> {
        let node = self.node(at)?;
        match FileType::from_raw_mode(rustix::fs::fstat(&node)?.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(io::Error::from_raw_os_error(libc::EISDIR)),
            FileType::Symlink => return Err(io::Error::from_raw_os_error(libc::ELOOP)),
            _ => return Err(io::Error::from_raw_os_error(libc::ENXIO)),
        }
        Ok(rustix::fs::openat(
            self.parent(&at.0)?,
            at.1,
            flags,
            Mode::empty(),
        )?)
    }

    fn attribute_path(node: &OwnedFd) -> String {
        format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(node))
    }

    fn apply(&self, step: &Step) -> Answer {
        match step {
            Step::Create((path, name), flags, mode) => done(self.parent(path).and_then(|parent| {
                if let Ok(stat) = rustix::fs::statat(&parent, *name, AtFlags::SYMLINK_NOFOLLOW) {
                    let kind = stat.st_mode & libc::S_IFMT;
                    if flags & libc::O_EXCL == 0
                        && !matches!(kind, libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK)
                    {
                        return Err(io::Error::from_raw_os_error(libc::ENXIO));
                    }
                }
                let flags = OFlags::from_bits_retain(*flags as u32)
                    | OFlags::RDWR
                    | OFlags::CREATE
                    | OFlags::NOFOLLOW;
                Ok(rustix::fs::openat(
                    parent,
                    *name,
                    flags,
                    Mode::from_raw_mode(mode & !0o022),
                )?)
            })),
            Step::Mkdir((path, name), mode) => done(self.parent(path).and_then(|parent| {
                Ok(rustix::fs::mkdirat(
                    parent,
                    *name,
                    Mode::from_raw_mode(mode & !0o022),
                )?)
            })),
            Step::Mknod((path, name), kind) => done(self.parent(path).and_then(|parent| {
                let mode = Mode::from_raw_mode(0o644);
                Ok(rustix::fs::mknodat(
                    parent,
                    *name,
                    FileType::from_raw_mode(*kind),
                    mode,
                    0,
                )?)
            })),
            Step::Symlink((path, name)) => done(
                self.parent(path)
                    .and_then(|parent| Ok(rustix::fs::symlinkat("a/../b", parent, *name)?)),
            ),
            Step::Link(from, (path, name)) => done(self.node(from).and_then(|_| {
                let source = self.parent(&from.0)?;
                Ok(rustix::fs::linkat(
                    source,
                    from.1,
                    self.parent(path)?,
                    *name,
                    AtFlags::empty(),
                )?)
            })),
            Step::Unlink((path, name)) => done(
                self.parent(path)
                    .and_then(|parent| Ok(rustix::fs::unlinkat(parent, *name, AtFlags::empty())?)),
            ),
            Step::Rmdir((path, name)) => done(
                self.parent(path)
                    .and_then(|parent| Ok(rustix::fs::unlinkat(parent, *name, AtFlags::REMOVEDIR)?)),
            ),
            Step::Rename((from, old), (to, new), flags) => done(self.parent(from).and_then(|source| {
                let flags = RenameFlags::from_bits_retain(*flags);
                Ok(rustix::fs::renameat_with(
                    source,
                    *old,
                    self.parent(to)?,
                    *new,
                    flags,
                )?)
            })),
            Step::Chmod(at, mode) => done(self.node(at).and_then(|node| {
                if rustix::fs::fstat(&node)?.st_mode & libc::S_IFMT == libc::S_IFLNK {
                    return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
                }
                Ok(rustix::fs::chmod(
                    Self::attribute_path(&node),
                    Mode::from_raw_mode(*mode),
                )?)
            })),
            Step::Chown(at, uid, gid) => done(self.node(at).and_then(|node| {
                let (uid, gid) = (Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid)));
                Ok(rustix::fs::chownat(node, "", uid, gid, AtFlags::EMPTY_PATH)?)
            })),
            Step::Truncate(at, size) => done(
                self.file(at, OFlags::WRONLY)
                    .map_err(as_truncate)
                    .and_then(|file| Ok(rustix::fs::ftruncate(file, *size)?)),
            ),
            Step::Times(at, seconds) => done(self.node(at).and_then(|node| {
                let time = |nanoseconds| rustix::fs::Timespec {
                    tv_sec: *seconds,
                    tv_nsec: nanoseconds,
                };
                let times = rustix::fs::Timestamps {
                    last_access: time(6),
                    last_modification: time(5),
                };
                Ok(rustix::fs::utimensat(node, "", &times, AtFlags::EMPTY_PATH)?)
            })),
            Step::Write(at, offset, length, append) => {
                let data = vec![*offset as u8; *length];
                let flags = if *append { OFlags::APPEND } else { OFlags::empty() };
                answer(
                    self.file(at, OFlags::WRONLY | flags)
                        .and_then(|file| Ok(rustix::io::pwrite(file, &data, *offset)?)),
                    |count| count.to_le_bytes().to_vec(),
                )
            }
            Step::Read(at, offset, length) => answer(
                self.file(at, OFlags::RDONLY).and_then(|file| {
                    let mut data = vec![0; *length];
                    let count = rustix::io::pread(file, &mut data[..], *offset)?;
                    data.truncate(count);
                    Ok(data)
                }),
                |data| data,
            ),
            Step::Allocate(at, mode, offset, length) => done(self.file(at, OFlags::RDWR).and_then(|file| {
                let mode = FallocateFlags::from_bits_retain(*mode as u32);
                Ok(rustix::fs::fallocate(file, mode, *offset, *length)?)
            })),
            Step::SetAttribute(at, name, flags) => done(self.node(at).and_then(|node| {
                let flags = XattrFlags::from_bits_retain(*flags);
                Ok(rustix::fs::setxattr(
                    Self::attribute_path(&node),
                    *name,
                    b"value",
                    flags,
                )?)
            })),
            Step::GetAttribute(at, name) => answer(
                self.node(at).and_then(|node| {
                    let mut value = vec![0u8; 99];
                    let length =
                        rustix::fs::getxattr(Self::attribute_path(&node), *name, value.as_mut_slice())?;
                    value.truncate(length);
                    Ok(value)
                }),
                |value| value,
            ),
            Step::RemoveAttribute(at, name) => done(
                self.node(at)
                    .and_then(|node| Ok(rustix::fs::removexattr(Self::attribute_path(&node), *name)?)),
            ),
            Step::Readlink(at) => answer(
                self.node(at).and_then(|node| {
                    match FileType::from_raw_mode(rustix::fs::fstat(&node)?.st_mode) {
                        FileType::Symlink => Ok(rustix::fs::readlinkat(node, "", Vec::new())?.into_bytes()),
                        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
                    }
                }),
                |to| to,
            ),
            Step::Seek(at, offset, whence) => answer(
                self.file(at, OFlags::RDONLY).and_then(|file| {
                    let to = match *whence {
                        libc::SEEK_DATA => rustix::fs::SeekFrom::Data(*offset),
                        _ => rustix::fs::SeekFrom::Hole(*offset),
                    };
                    Ok(rustix::fs::seek(file, to)?)
                }),
                |position| position.to_le_bytes().to_vec(),
            ),
        }
    }
}

/// A path that cannot be truncated is refused otherwise than one that cannot be opened.
fn as_truncate(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ELOOP | libc::ENXIO) => io::Error::from_raw_os_error(libc::EINVAL),
        _ => error,
    }
}

/// Everything that can be seen of a tree; times only where they were set.
fn describe(root: &Path) -> BTreeMap<String, String> {
    fn visit(root: &Path, at: &Path, links: &mut BTreeMap<u64, usize>, seen: &mut BTreeMap<String, String>) {
        let mut entries: Vec<_> = std::fs::read_dir(at)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        entries.sort();
        for path in entries {
            let meta = std::fs::symlink_metadata(&path).unwrap();
            // Inode numbers differ between the trees; which names are one file does not.
            let next = links.len();
            let file = *links.entry(meta.ino()).or_insert(next);
            let content = match meta.mode() & libc::S_IFMT {
                libc::S_IFREG => format!("{:?}", blake(&std::fs::read(&path).unwrap())),
                libc::S_IFLNK => format!("{:?}", std::fs::read_link(&path).unwrap()),
                _ => String::new(),
            };
            let mut names = [0u8; 4096];
            let length = rustix::fs::llistxattr(&path, names.as_mut_slice()).unwrap();
            let mut attributes: Vec<_> = names[..length].split(|b| *b == 0).map(<[u8]>::to_vec).collect();
            attributes.sort();
            let size = if meta.is_dir() { 0 } else { meta.size() };
            let line = format!(
                "{:o} {}:{} links {} size {size} rdev {} file {file} {attributes:?} {content}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.nlink(),
                meta.rdev(),
            );
            seen.insert(path.strip_prefix(root).unwrap().display().to_string(), line);
            if meta.is_dir() {
                visit(root, &path, links, seen);
            }
        }
    }
    /// Enough of a digest for files of a few pages.
    fn blake(data: &[u8]) -> (usize, u64) {
        let mix = |hash: u64, byte: &u8| {
            (hash ^ u64::from(*byte))
                .wrapping_mul(0x100_0000_01b3)
                .rotate_left(5)
        };
        (data.len(), data.iter().fold(0xcbf2_9ce4_8422_2325, mix))
    }
    let mut seen = BTreeMap::new();
    visit(root, root, &mut BTreeMap::new(), &mut seen);
    seen
}

fn compare(seed: u64, steps: usize, files: InodeFiles) -> usize {
    let share = Share::with(|options| {
        options.inode_files = files;
        options.budget = (files == InodeFiles::Handles).then(|| FdBudget::new(16));
    });
    let other = share.outside("plain");
    std::fs::create_dir(&other).unwrap();
    let plain = Plain {
        root: rustix::fs::open(&other, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap(),
    };
    let mut random = Random(seed);
    let mut succeeded = 0;
    for number in 0..steps {
        let step = step(&mut random);
        let (served, expected) = (share.apply(&step), plain.apply(&step));
        assert_eq!(served, expected, "seed {seed}, step {number}: {step:?}");
        succeeded += usize::from(served.is_ok());
        if number % 250 == 249 {
            assert_eq!(
                describe(&share.path("")),
                describe(&other),
                "seed {seed}, after step {number}"
            );
        }
    }
    assert_eq!(share.fs.inode_count(), 1, "every lookup was taken back");
    succeeded
}

#[test]
fn a_served_tree_answers_as_the_host_does() {
    if !privileged("a_served_tree_answers_as_the_host_does") {
        return;
    }
    // The plain calls take the mode as it is masked already.
    rafsd_passthrough::prepare_thread().unwrap();
    let mut succeeded = 0;
    for seed in 0..8 {
        let files = if seed % 2 == 0 {
            InodeFiles::Handles
        } else {
            InodeFiles::Descriptors
        };
        succeeded += compare(seed, 3_000, files);
    }
    assert!(succeeded > 4_000, "only {succeeded} operations did anything");
}
