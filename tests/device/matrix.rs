//! `docs/fuse.md` against the device: every operation on every kind of node.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use backend::config::{CacheConfig, DirConfig, SourceConfig, StoreOptions};
use backend::store::Store;
use rafs::fs::RafsFs;
use rafsd::mounts::{Instance, MountOptions};
use rafsd_frontend::Guest;
use rafsd_frontend::abi::opcode;
use rafsd_frontend::image::Image;
use rafsd_frontend::ops::{self, Change, Request};

use crate::setup::Setup;

const GETFLAGS: u32 = 0x8008_6601;

/// Nodes and handles of one kind. For pseudo directories all of them are the same directory.
struct Nodes {
    directory: u64,
    file: u64,
    link: u64,
    open: u64,
    listing: u64,
    pseudo: bool,
}

fn tree(root: &Path) {
    std::fs::create_dir_all(root.join("directory")).unwrap();
    for name in ["file", "victim", "moved", "again"] {
        std::fs::write(root.join(name), vec![b'x'; 5000]).unwrap();
    }
    std::fs::create_dir(root.join("empty")).unwrap();
    std::os::unix::fs::symlink("file", root.join("link")).unwrap();
    rustix::fs::setxattr(
        root.join("file"),
        c"user.known",
        b"value",
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
}

fn mount_image(setup: &Setup, path: &str, tree: &Path) -> Store {
    let output = setup.directory.path().join("image");
    let image = Image::build(env!("CARGO_BIN_EXE_rafs"), tree, &output, &[]).unwrap();
    let store = Store::new(StoreOptions::default()).unwrap();
    let source = SourceConfig::Dir(DirConfig {
        dir: Some(image.blobs.clone()),
        ..DirConfig::default()
    });
    let cache = CacheConfig::new(setup.directory.path().join("cache"));
    let options = rafs::fs::Options {
        xattr: true,
        ..rafs::fs::Options::default()
    };
    let mut open = |description| store.open_blob(description, &source, &cache);
    let fs = RafsFs::open(&image.bootstrap, options, &mut open).unwrap();
    setup
        .mounts
        .mount(path, Instance::Rafs(Arc::new(fs)), MountOptions::default())
        .unwrap();
    store
}

fn nodes(guest: &Guest, top: &str) -> Nodes {
    let node = |name: &str| guest.resolve(format!("{top}/{name}")).unwrap().nodeid;
    let (directory, file) = (guest.resolve(top).unwrap().nodeid, node("file"));
    let flags = if top == "/host" {
        libc::O_RDWR
    } else {
        libc::O_RDONLY
    };
    Nodes {
        directory,
        file,
        link: node("link"),
        open: guest.open(file, flags as u32).unwrap(),
        listing: guest.opendir(directory).unwrap(),
        pseudo: false,
    }
}

/// A request for `operation`; all arguments are good ones.
fn request(operation: &str, on: &Nodes) -> Request {
    let (file, fh, dir) = (on.file, on.open, on.directory);
    let lock = ops::Lock {
        owner: 1,
        start: 0,
        end: 9,
        kind: 0,
        flock: false,
    };
    let known = if on.pseudo { "rafs" } else { "file" };
    let bare = |code| Request::new(code, file).arg(vec![0; 64]).room(64);
    match operation {
        "LOOKUP" => ops::lookup(dir, known),
        "FORGET" => ops::forget(0xdead_0000_0000, 1),
        "BATCH_FORGET" => ops::batch_forget(&[(0xdead_0000_0000, 1)]),
        "INTERRUPT" => ops::interrupt(12345),
        "GETATTR" => ops::getattr(file, None),
        "SETATTR" => ops::setattr(
            file,
            &Change {
                mode: Some(0o600),
                ..Change::default()
            },
        ),
        "READLINK" => ops::readlink(on.link),
        "SYMLINK" => ops::symlink(dir, "new-link", "target"),
        "MKNOD" => ops::mknod(dir, "new-node", libc::S_IFREG | 0o644, 0),
        "MKDIR" => ops::mkdir(dir, "new-directory", 0o755),
        "UNLINK" => ops::unlink(dir, "victim"),
        "RMDIR" => ops::rmdir(dir, "empty"),
        "RENAME" => ops::rename(dir, "moved", dir, "moved-1"),
        "RENAME2" => ops::rename2(dir, "again", dir, "again-1", 1),
        "LINK" => ops::link(file, dir, "new-name"),
        "OPEN" => ops::open(file, libc::O_RDONLY as u32),
        "READ" => ops::read(file, fh, 0, 4096),
        "WRITE" => ops::write(file, fh, 0, b"data"),
        "STATFS" => ops::statfs(file),
        "RELEASE" => ops::release(file, fh),
        "FSYNC" => ops::fsync(file, fh, false),
        "SETXATTR" => ops::setxattr(file, "user.new", b"value", 0, true),
        "GETXATTR" => ops::getxattr(file, "user.known", 64),
        "LISTXATTR" => ops::listxattr(file, 512),
        "REMOVEXATTR" => ops::removexattr(file, "user.known"),
        "FLUSH" => ops::flush(file, fh),
        "OPENDIR" => ops::opendir(dir),
        "READDIR" => ops::readdir(dir, on.listing, 0, 4096),
        "READDIRPLUS" => ops::readdirplus(dir, on.listing, 0, 4096),
        "RELEASEDIR" => ops::releasedir(dir, on.listing),
        "FSYNCDIR" => ops::fsyncdir(dir, on.listing),
        "GETLK" => ops::lock(opcode::GETLK, file, fh, &lock),
        "SETLK" => ops::lock(opcode::SETLK, file, fh, &lock),
        "SETLKW" => ops::lock(opcode::SETLKW, file, fh, &lock),
        "ACCESS" => ops::access(file, libc::R_OK as u32),
        "CREATE" => ops::create(dir, "new-file", 0o644, libc::O_RDWR as u32),
        "BMAP" => bare(opcode::BMAP),
        "POLL" => bare(opcode::POLL),
        "SETUPMAPPING" => bare(opcode::SETUPMAPPING),
        "REMOVEMAPPING" => bare(opcode::REMOVEMAPPING),
        "IOCTL" => ops::ioctl(file, fh, GETFLAGS, 8),
        "FALLOCATE" => ops::fallocate(file, fh, 0, 0, 8192),
        "LSEEK" => ops::lseek(file, fh, 0, libc::SEEK_DATA as u32),
        "COPY_FILE_RANGE" => ops::copy_file_range((file, fh, 0), (file, fh, 4096), 512),
        "SYNCFS" => ops::syncfs(dir),
        "TMPFILE" => ops::tmpfile(dir, 0o600, libc::O_RDWR as u32),
        "STATX" => ops::statx(file, libc::STATX_BASIC_STATS | libc::STATX_BTIME),
        other => panic!("docs/fuse.md has an operation {other} that this test does not know"),
    }
}

fn errno_name(errno: i32) -> String {
    let names = [
        (libc::EROFS, "EROFS"),
        (libc::EINVAL, "EINVAL"),
        (libc::EISDIR, "EISDIR"),
        (libc::ENODATA, "ENODATA"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::ENOSYS, "ENOSYS"),
    ];
    names
        .iter()
        .find(|(number, _)| *number == errno)
        .map_or(errno.to_string(), |(_, name)| (*name).to_owned())
}

fn outcome(guest: &Guest, request: &Request) -> String {
    let ticket = guest.submit(request).unwrap();
    if request.room.is_none() {
        // The front-end takes an answer to such a request for an error.
        guest.wait_idle(ticket.queue).unwrap();
        return "-".to_owned();
    }
    let reply = guest.wait(ticket).unwrap();
    match (reply.used, reply.errno) {
        (0, _) => "-".to_owned(),
        (_, 0) => "ok".to_owned(),
        (_, errno) => errno_name(errno),
    }
}

fn table() -> Vec<[String; 4]> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/fuse.md")).unwrap();
    text.lines()
        .skip_while(|line| !line.starts_with("| operation"))
        .skip(2)
        .take_while(|line| line.starts_with("| "))
        .map(|line| {
            let cells: Vec<String> = line
                .trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect();
            cells.try_into().unwrap()
        })
        .collect()
}

#[test]
fn the_table_of_answers_is_true() {
    let setup = Setup::new();
    let plain = setup.directory.path().join("plain");
    tree(&plain);
    let _store = mount_image(&setup, "/rafs/image", &plain);
    tree(&setup.host("/host", "host"));
    let guest = setup.guest();

    let pseudo = Nodes {
        directory: 1,
        file: 1,
        link: 1,
        open: 0,
        listing: 0,
        pseudo: true,
    };
    let mut seen = BTreeSet::new();
    for [operation, on_pseudo, on_rafs, on_host] in table() {
        for (expected, top) in [
            (on_pseudo, None),
            (on_rafs, Some("/rafs/image")),
            (on_host, Some("/host")),
        ] {
            let fresh = top.map(|top| nodes(&guest, top));
            let nodes = fresh.as_ref().unwrap_or(&pseudo);
            let found = outcome(&guest, &request(&operation, nodes));
            assert_eq!(
                found,
                expected,
                "{operation} on {}",
                top.unwrap_or("the pseudo tree")
            );
        }
        seen.insert(operation);
    }
    assert_eq!(
        seen.len(),
        47,
        "every operation but INIT, DESTROY and NOTIFY_REPLY is in the table once"
    );
    let unknown = Request::new(4711, 1).room(64);
    assert_eq!(guest.errno(&unknown).unwrap(), libc::ENOSYS);
}

#[test]
fn an_overlay_gets_the_flags_of_all_that_it_copies() {
    const FSGETXATTR: u32 = 0x801c_581f;
    let setup = Setup::new();
    let plain = setup.directory.path().join("plain");
    tree(&plain);
    let _store = mount_image(&setup, "/rafs/image", &plain);
    tree(&setup.host("/host", "host"));
    let guest = setup.guest();
    let pseudo = guest.resolve("/rafs").unwrap().nodeid;
    let mut asked = vec![("pseudo", pseudo, guest.opendir(pseudo).unwrap())];
    for top in ["/rafs/image", "/host"] {
        let nodes = nodes(&guest, top);
        asked.push((top, nodes.file, nodes.open));
        asked.push((top, nodes.directory, nodes.listing));
    }
    for (what, node, fh) in asked {
        for (command, size) in [(GETFLAGS, 4), (GETFLAGS, 8), (FSGETXATTR, 28)] {
            let reply = guest
                .wait(guest.submit(&ops::ioctl(node, fh, command, size)).unwrap())
                .unwrap();
            // The host's file system may not have the longer form.
            let lacks = what == "/host" && command == FSGETXATTR && reply.errno == libc::ENOTTY;
            assert!(reply.errno == 0 || lacks, "{what}: {command:#x} {}", reply.errno);
            if what != "/host" {
                assert!(
                    reply.body.len() > 16 && reply.body.iter().all(|byte| *byte == 0),
                    "{what}"
                );
            }
        }
        assert_eq!(
            guest.errno(&ops::ioctl(node, fh, 0x5401, 64)).unwrap(),
            libc::ENOTTY,
            "{what}"
        );
    }
}

#[test]
fn what_holds_between_mounts() {
    let setup = Setup::new();
    let one = setup.host("/one", "one");
    setup.host("/two", "two");
    let frozen = setup.directory.path().join("frozen");
    tree(&frozen);
    setup.mount_host("/frozen", &frozen, true);
    std::fs::write(one.join("file"), b"x").unwrap();
    let guest = setup.guest();
    let node = |path: &str| guest.resolve(path).unwrap().nodeid;
    let (a, b, file) = (node("/one"), node("/two"), node("/one/file"));
    assert_eq!(
        guest.errno(&ops::rename(a, "file", b, "file")).unwrap(),
        libc::EXDEV
    );
    assert_eq!(
        guest.errno(&ops::rename(a, "file", 1, "file")).unwrap(),
        libc::EXDEV
    );
    assert_eq!(guest.errno(&ops::link(file, b, "file")).unwrap(), libc::EXDEV);
    assert!(one.join("file").exists());

    let (top, cold) = (node("/frozen"), node("/frozen/file"));
    assert_eq!(
        guest
            .errno(&ops::create(top, "new", 0o644, libc::O_RDWR as u32))
            .unwrap(),
        libc::EROFS
    );
    assert_eq!(
        guest.errno(&ops::open(cold, libc::O_WRONLY as u32)).unwrap(),
        libc::EROFS
    );
    assert_eq!(
        guest.errno(&ops::open(cold, libc::O_TRUNC as u32)).unwrap(),
        libc::EROFS
    );
    assert_eq!(
        guest.errno(&ops::access(cold, libc::W_OK as u32)).unwrap(),
        libc::EROFS
    );
    assert_eq!(guest.errno(&ops::unlink(top, "file")).unwrap(), libc::EROFS);
    assert_eq!(guest.read_file("/frozen/file").unwrap(), vec![b'x'; 5000]);
    for bad in [&b".."[..], b".", b"a/b", b""] {
        assert_eq!(guest.errno(&ops::lookup(a, bad)).unwrap(), libc::EINVAL);
        assert_eq!(guest.errno(&ops::mkdir(a, bad, 0o755)).unwrap(), libc::EINVAL);
    }
    assert_eq!(
        guest.errno(&ops::lookup(a, [b'x'; 256])).unwrap(),
        libc::ENAMETOOLONG
    );
}

#[test]
fn a_read_only_directory_refuses_every_operation_that_changes_something() {
    let setup = Setup::new();
    let frozen = setup.directory.path().join("frozen");
    tree(&frozen);
    setup.mount_host("/frozen", &frozen, true);
    let guest = setup.guest();
    let on = nodes(&guest, "/frozen");
    for operation in [
        "SETATTR",
        "SYMLINK",
        "MKNOD",
        "MKDIR",
        "UNLINK",
        "RMDIR",
        "RENAME",
        "RENAME2",
        "LINK",
        "WRITE",
        "SETXATTR",
        "REMOVEXATTR",
        "CREATE",
        "FALLOCATE",
        "COPY_FILE_RANGE",
        "TMPFILE",
    ] {
        assert_eq!(outcome(&guest, &request(operation, &on)), "EROFS", "{operation}");
    }
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(outcome(&guest, &ops::open(on.file, flags as u32)), "EROFS");
    }
    for command in [0x4008_6602, 0x401c_5820] {
        let change = ops::ioctl(on.file, on.open, command, 0);
        assert_eq!(outcome(&guest, &change), "EROFS", "{command:#x}");
    }
}

#[test]
fn a_second_init_forgets_the_first_session() {
    let setup = Setup::new();
    let root = setup.host("/", "host");
    std::fs::write(root.join("file"), b"x").unwrap();
    let guest = setup.guest();
    let file = guest.resolve("/file").unwrap().nodeid;
    let fh = guest.open(file, 0).unwrap();
    guest.init(&ops::Init::default()).unwrap();
    assert_eq!(guest.errno(&ops::getattr(file, None)).unwrap(), libc::ESTALE);
    assert_ne!(guest.errno(&ops::read(file, fh, 0, 10)).unwrap(), 0);
    assert_eq!(guest.read_file("/file").unwrap(), b"x");

    guest.destroy().unwrap();
    assert_eq!(guest.errno(&ops::getattr(1, None)).unwrap(), libc::EIO);
    guest.init(&ops::Init::default()).unwrap();
    assert_eq!(guest.read_file("/file").unwrap(), b"x");
}
