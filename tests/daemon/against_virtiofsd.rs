//! The same random operations through our device and through virtiofsd, on two copies of a tree: every answer and,
//! again and again, the trees on the host are compared.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rafsd_frontend::abi::Attr;
use rafsd_frontend::daemon::Builder;
use rafsd_frontend::ops::Change;
use rafsd_frontend::random::Random;
use rafsd_frontend::{Error, Guest, Options, ops};

use super::peers;

/// Operations between two comparisons of the trees.
const ROUND: usize = 1000;
/// Operations in one tree, before another is begun: directories move into each other and make a tree ever deeper.
const TREE: usize = 10 * ROUND;
const NAMES: usize = 12;

/// One operation, by paths: node ids are each daemon's own.
#[derive(Clone, Debug)]
enum Deed {
    Mkdir(String, u32),
    Create(String, Vec<u8>),
    Write(String, u64, Vec<u8>),
    Read(String),
    Truncate(String, u64),
    Chmod(String, u32),
    Chown(String, u32, u32),
    Unlink(String),
    Rmdir(String),
    Rename(String, String, u32),
    Link(String, String),
    Symlink(String, String),
    Readlink(String),
    Mknod(String, u32),
    SetXattr(String, &'static str, Vec<u8>),
    GetXattr(String, &'static str),
    RemoveXattr(String, &'static str),
    Allocate(String, u32, u64, u64),
    List(String),
    Stat(String),
}

/// The directory of a tree.
fn tree(number: usize) -> String {
    format!("/t{number}")
}

fn path(random: &mut Random, tree: &str) -> String {
    let depth = 1 + random.below(3);
    let names = (0..depth).map(|_| format!("/n{}", random.below(NAMES)));
    std::iter::once(tree.to_owned()).chain(names).collect()
}

fn deed(random: &mut Random, tree: &str) -> Deed {
    let path = |random: &mut Random| path(random, tree);
    let attributes = ["user.one", "user.two", "user.long-name-of-an-attribute"];
    let attribute = attributes[random.below(attributes.len())];
    let at = path(random);
    match random.below(24) {
        0..=2 => Deed::Mkdir(at, 0o700 + random.below(0o100) as u32),
        3..=5 => {
            let length = random.below(9000);
            Deed::Create(at, random.bytes(length))
        }
        6..=7 => {
            let (offset, length) = (random.below(20_000) as u64, random.below(9000));
            Deed::Write(at, offset, random.bytes(length))
        }
        8 => Deed::Read(at),
        9 => Deed::Truncate(at, random.below(30_000) as u64),
        10 => Deed::Chmod(at, random.below(0o10000) as u32),
        11 => Deed::Chown(at, random.below(3) as u32, random.below(3) as u32),
        12 => Deed::Unlink(at),
        13 => Deed::Rmdir(at),
        14..=15 => {
            let flags = random.below(3) as u32;
            Deed::Rename(at, path(random), flags)
        }
        16 => Deed::Link(at, path(random)),
        17 => Deed::Symlink(at, path(random)),
        18 => Deed::Readlink(at),
        19 => {
            let kinds = [libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK];
            Deed::Mknod(at, kinds[random.below(3)] | 0o640)
        }
        20 => {
            let length = random.below(300);
            Deed::SetXattr(at, attribute, random.bytes(length))
        }
        21 => {
            if random.below(2) == 0 {
                Deed::GetXattr(at, attribute)
            } else {
                Deed::RemoveXattr(at, attribute)
            }
        }
        22 => {
            let modes = [0, 1, 3];
            Deed::Allocate(
                at,
                modes[random.below(3)],
                random.below(20_000) as u64,
                1 + random.below(9000) as u64,
            )
        }
        _ => {
            if random.below(2) == 0 {
                Deed::List(at)
            } else {
                Deed::Stat(at)
            }
        }
    }
}

/// What of the attributes is the same on two copies of a tree. The size of a directory depends on its past.
fn look(attr: &Attr) -> String {
    let size = if attr.mode & libc::S_IFMT == libc::S_IFDIR {
        0
    } else {
        attr.size
    };
    format!(
        "mode {:o} nlink {} owner {}:{} size {size}",
        attr.mode, attr.nlink, attr.uid, attr.gid
    )
}

/// What the guest is told, or the errno.
fn outcome(guest: &Guest, deed: &Deed) -> String {
    match act(guest, deed) {
        Ok(text) => text,
        Err(error) => match error.errno() {
            Some(errno) => format!("errno {errno}"),
            None => panic!("{deed:?}: {error}"),
        },
    }
}

fn act(guest: &Guest, deed: &Deed) -> Result<String, Error> {
    let split = |path: &str| {
        let (directory, name) = path.rsplit_once('/').unwrap();
        guest
            .resolve(directory)
            .map(|entry| (entry.nodeid, name.to_owned()))
    };
    let node = |path: &str| guest.resolve(path).map(|entry| entry.nodeid);
    let nothing = |()| String::new();
    // A guest's kernel opens regular files only.
    let regular = |path: &str| match guest.resolve(path)? {
        entry if entry.attr.mode & libc::S_IFMT == libc::S_IFREG => Ok(entry.nodeid),
        _ => Err(Error::Errno(libc::EISDIR)),
    };
    match deed {
        Deed::Mkdir(path, mode) => split(path)
            .and_then(|(at, name)| guest.mkdir(at, name, *mode))
            .map(|entry| look(&entry.attr)),
        Deed::Create(path, data) => split(path)
            .and_then(|(at, name)| {
                // A guest's kernel looks a name up before it asks for it to be made.
                match guest.lookup(at, &name) {
                    Ok(_) => Err(Error::Errno(libc::EEXIST)),
                    Err(_) => guest.write_file(at, name, data),
                }
            })
            .map(|entry| look(&entry.attr)),
        Deed::Write(path, offset, data) => {
            let node = regular(path)?;
            let handle = guest.open(node, libc::O_RDWR as u32)?;
            let written = guest.write(node, handle, *offset, data);
            guest.release(node, handle)?;
            Ok(format!("{} {}", written?, look(&guest.getattr(node)?)))
        }
        Deed::Read(path) => regular(path)
            .and_then(|node| guest.read_all(node, 4096))
            .map(|data| format!("{data:?}")),
        Deed::Truncate(path, size) => {
            let change = Change {
                size: Some(*size),
                ..Change::default()
            };
            regular(path)
                .and_then(|node| guest.setattr(node, &change))
                .map(|attr| look(&attr))
        }
        Deed::Chmod(path, mode) => {
            let entry = guest.resolve(path)?;
            if entry.attr.mode & libc::S_IFMT == libc::S_IFLNK {
                // Never sent by a guest's kernel.
                return Err(Error::Errno(libc::EOPNOTSUPP));
            }
            let change = Change {
                mode: Some(entry.attr.mode & libc::S_IFMT | mode),
                ..Change::default()
            };
            guest.setattr(entry.nodeid, &change).map(|attr| look(&attr))
        }
        Deed::Chown(path, uid, gid) => {
            let change = Change {
                uid: Some(*uid),
                gid: Some(*gid),
                ..Change::default()
            };
            node(path)
                .and_then(|node| guest.setattr(node, &change))
                .map(|attr| look(&attr))
        }
        Deed::Unlink(path) => split(path)
            .and_then(|(at, name)| guest.unlink(at, name))
            .map(nothing),
        Deed::Rmdir(path) => split(path)
            .and_then(|(at, name)| guest.rmdir(at, name))
            .map(nothing),
        Deed::Rename(from, to, flags) => {
            let ((from, old), (to, new)) = (split(from)?, split(to)?);
            guest.rename2(from, old, to, new, *flags).map(nothing)
        }
        Deed::Link(from, to) => {
            let from = guest.resolve(from)?;
            if from.attr.mode & libc::S_IFMT == libc::S_IFDIR {
                return Err(Error::Errno(libc::EPERM));
            }
            split(to)
                .and_then(|(at, name)| guest.link(from.nodeid, at, name))
                .map(|entry| look(&entry.attr))
        }
        Deed::Symlink(path, target) => split(path)
            .and_then(|(at, name)| guest.symlink(at, name, target))
            .map(|entry| look(&entry.attr)),
        Deed::Readlink(path) => {
            let entry = guest.resolve(path)?;
            if entry.attr.mode & libc::S_IFMT != libc::S_IFLNK {
                return Err(Error::Errno(libc::EINVAL));
            }
            guest
                .readlink(entry.nodeid)
                .map(|target| String::from_utf8(target).unwrap())
        }
        Deed::Mknod(path, mode) => split(path)
            .and_then(|(at, name)| guest.mknod(at, name, *mode, 0))
            .map(|entry| look(&entry.attr)),
        Deed::SetXattr(path, name, value) => node(path)
            .and_then(|node| guest.setxattr(node, name, value, 0))
            .map(nothing),
        Deed::GetXattr(path, name) => node(path)
            .and_then(|node| guest.getxattr(node, name))
            .map(|value| format!("{value:?}")),
        Deed::RemoveXattr(path, name) => node(path)
            .and_then(|node| guest.removexattr(node, name))
            .map(nothing),
        Deed::Allocate(path, mode, offset, length) => {
            let node = regular(path)?;
            let handle = guest.open(node, libc::O_RDWR as u32)?;
            let done = guest.fallocate(node, handle, *mode, *offset, *length);
            guest.release(node, handle)?;
            done.map(nothing)
        }
        Deed::List(path) => {
            let entry = guest.resolve(path)?;
            if entry.attr.mode & libc::S_IFMT != libc::S_IFDIR {
                return Err(Error::Errno(libc::ENOTDIR));
            }
            let mut names: Vec<_> = guest
                .list(entry.nodeid, true, 4096)?
                .into_iter()
                .filter(|entry| entry.name != b"." && entry.name != b"..")
                .map(|entry| format!("{} {}", String::from_utf8_lossy(&entry.name), entry.kind))
                .collect();
            names.sort();
            Ok(names.join(", "))
        }
        Deed::Stat(path) => guest.resolve(path).map(|entry| look(&entry.attr)),
    }
}

fn digest(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    hasher.finish()
}

/// All that the host sees of a tree.
fn snapshot(top: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut left = vec![top.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let seen = fs::symlink_metadata(&path).unwrap();
            let content = match seen.file_type() {
                kind if kind.is_dir() => {
                    left.push(path.clone());
                    String::new()
                }
                kind if kind.is_symlink() => format!("{:?}", fs::read_link(&path).unwrap()),
                kind if kind.is_file() => format!("{:x}", digest(&fs::read(&path).unwrap())),
                _ => String::new(),
            };
            let size = if seen.is_dir() { 0 } else { seen.len() };
            let mut attributes = Vec::new();
            for name in ["user.one", "user.two", "user.long-name-of-an-attribute"] {
                let mut value = [0; 512];
                if let Ok(length) = rustix::fs::lgetxattr(&path, name, &mut value) {
                    attributes.push((name, value[..length].to_vec()));
                }
            }
            let text = format!(
                "{:o} {} {}:{} {size} {attributes:?} {content}",
                seen.permissions().mode(),
                seen.nlink(),
                seen.uid(),
                seen.gid()
            );
            all.insert(path.strip_prefix(top).unwrap().to_str().unwrap().to_owned(), text);
        }
    }
    all
}

fn same_as_virtiofsd(test: &str, operations: usize) {
    let Some(virtiofsd) = peers::virtiofsd(test) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let start = |builder: Builder, option: &str, share: &Path, more: &[&str]| {
        fs::create_dir(share).unwrap();
        let socket = builder.directory().join("vu.sock").to_str().unwrap().to_owned();
        let builder = builder
            .arg(option)
            .arg(socket)
            .arg("--shared-dir")
            .arg(share.to_str().unwrap());
        let builder = more
            .iter()
            .fold(builder, |builder, argument| builder.arg(*argument));
        builder.spawn_plain("vu.sock").unwrap()
    };
    let first = start(
        Builder::new(env!("CARGO_BIN_EXE_rafsd")).unwrap(),
        "--sock",
        &ours,
        &[],
    );
    let others = [
        "--sandbox=none",
        "--seccomp=none",
        "--xattr",
        "--announce-submounts",
    ];
    let second = start(
        Builder::new(virtiofsd).unwrap(),
        "--socket-path",
        &theirs,
        &others,
    );
    let (us, them) = (
        first.guest(Options::default()).unwrap(),
        second.guest(Options::default()).unwrap(),
    );
    let seed = std::env::var("RAFSD_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1);
    let mut random = Random::new(seed);
    let mut done = 0;
    let mut top = String::new();
    for number in 0..operations {
        if number % TREE == 0 {
            top = tree(number / TREE);
            let begun = Deed::Mkdir(top.clone(), 0o755);
            assert_eq!(outcome(&us, &begun), outcome(&them, &begun));
        }
        let deed = deed(&mut random, &top);
        let (here, there) = (outcome(&us, &deed), outcome(&them, &deed));
        assert_eq!(
            here, there,
            "seed {seed}, operation {number}: {deed:?} (ours, virtiofsd's)"
        );
        done += usize::from(!here.starts_with("errno"));
        if (number + 1) % ROUND == 0 {
            let (here, there) = (snapshot(&ours.join(&top[1..])), snapshot(&theirs.join(&top[1..])));
            for (path, text) in &here {
                assert_eq!(Some(text), there.get(path), "seed {seed}, after {number}: {path}");
            }
            assert_eq!(here.len(), there.len(), "seed {seed}, after {number}");
            if (number + 1) % TREE == 0 {
                println!("{} of {operations} operations, {} names", number + 1, here.len());
            }
        }
    }
    println!("{operations} operations, {done} of them without an error: no difference");
    // Most random paths lead nowhere; enough must lead somewhere.
    assert!(done > operations / 8, "{done} of {operations}");
    // Both still answer.
    for guest in [&us, &them] {
        guest.call(&ops::statfs(1)).unwrap();
    }
}

#[test]
fn the_same_operations_have_the_same_results_as_with_virtiofsd() {
    same_as_virtiofsd(
        "the_same_operations_have_the_same_results_as_with_virtiofsd",
        6 * ROUND,
    );
}

#[test]
#[ignore = "takes minutes: make test-many"]
fn very_many_operations_have_the_same_results_as_with_virtiofsd() {
    same_as_virtiofsd(
        "very_many_operations_have_the_same_results_as_with_virtiofsd",
        300 * ROUND,
    );
}
