//! Nothing outside of the shared directory is touched, whatever the guest sends and whatever the host does meanwhile.
//!
//! Beside the share lies a directory with files that a guest would like to have. A watcher is told by the kernel of
//! every access to it: of a file that is opened, read, written, renamed, made or removed, and of changed attributes. The
//! tests know that the watcher works, for it sees their own last access.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::support::{CONTAINERS, RAFSD};
use rafsd_frontend::abi::opcode;
use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::ops::{self, Change, Request};
use rafsd_frontend::random::Random;
use rafsd_frontend::{Guest, Options, Ticket};
use rustix::fs::{CWD, Mode, OFlags, RenameFlags, inotify, openat, renameat_with};

const RDWR: u32 = libc::O_RDWR as u32;
const SECRET: &[u8] = b"what the guest must not see";

/// Tells of every access to what lies below a directory.
struct Watcher {
    events: OwnedFd,
    probe: PathBuf,
}

impl Watcher {
    fn new(top: &Path) -> Self {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).unwrap();
        let mut directories = vec![top.to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                }
            }
            inotify::add_watch(&events, &directory, inotify::WatchFlags::ALL_EVENTS).unwrap();
        }
        let watcher = Watcher {
            events,
            probe: top.join("probe"),
        };
        watcher.seen();
        watcher
    }

    /// What happened since the last time.
    fn seen(&self) -> Vec<String> {
        let mut buffer = [MaybeUninit::uninit(); 64 << 10];
        let mut reader = inotify::Reader::new(&self.events, &mut buffer);
        let mut seen = Vec::new();
        while let Ok(event) = reader.next() {
            seen.push(format!("{:?} {:?}", event.events(), event.file_name()));
        }
        seen
    }

    /// Nothing has been touched, and that would have been seen.
    fn assert_quiet(&self) {
        let seen = self.seen();
        assert!(seen.is_empty(), "outside of the share: {seen:#?}");
        std::fs::write(&self.probe, "seen").unwrap();
        assert!(!self.seen().is_empty(), "the watcher is blind");
        std::fs::remove_file(&self.probe).unwrap();
        self.seen();
    }
}

struct Prison {
    daemon: Daemon,
    guest: Guest,
    share: PathBuf,
    outside: PathBuf,
    top: u64,
    directory: tempfile::TempDir,
}

impl Prison {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (share, outside) = (directory.path().join("share"), directory.path().join("outside"));
        for path in [&share, &outside, &outside.join("dir")] {
            std::fs::create_dir(path).unwrap();
        }
        for name in ["secret", "victim", "dir/secret"] {
            std::fs::write(outside.join(name), SECRET).unwrap();
        }
        let daemon = Builder::new(RAFSD).unwrap().start().unwrap();
        daemon.mount_passthrough(CONTAINERS, &share).unwrap();
        let guest = daemon
            .guest(Options {
                queue_size: 512,
                ..Options::default()
            })
            .unwrap();
        let top = guest.resolve(CONTAINERS).unwrap().nodeid;
        Self {
            daemon,
            guest,
            share,
            outside,
            top,
            directory,
        }
    }

    /// All that is outside, as it was made.
    fn assert_untouched(&mut self) {
        assert!(self.daemon.is_alive());
        let mut names: Vec<_> = std::fs::read_dir(&self.outside)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["dir", "secret", "victim"]);
        for name in ["secret", "victim", "dir/secret"] {
            assert_eq!(std::fs::read(self.outside.join(name)).unwrap(), SECRET);
        }
        let mut beside: Vec<_> = std::fs::read_dir(self.directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        beside.sort();
        assert_eq!(beside, ["outside", "share"]);
    }
}

#[test]
fn no_name_leads_out() {
    let mut prison = Prison::new();
    let (top, guest) = (prison.top, &prison.guest);
    let dir = guest.mkdir(top, "dir", 0o755).unwrap().nodeid;
    let file = guest.write_file(top, "file", b"inside").unwrap().nodeid;
    guest
        .symlink(top, "link", prison.outside.as_os_str().as_bytes())
        .unwrap();
    let watcher = Watcher::new(&prison.outside);
    let outside = prison.outside.display();
    let names: Vec<Vec<u8>> = [
        format!("{outside}/secret"),
        format!("{outside}/new"),
        format!("{outside}"),
        "../outside/secret".into(),
        "../outside/new".into(),
        "../../outside/new".into(),
        "dir/../../outside/new".into(),
        "link/secret".into(),
        "link/new".into(),
        "./../outside/victim".into(),
        "..".into(),
        ".".into(),
        "/".into(),
        "//".into(),
        "".into(),
        "../".into(),
        "dir/".into(),
        "x/".into(),
        "..\0/outside".into(),
        "\0../outside/new".into(),
    ]
    .into_iter()
    .map(String::into_bytes)
    .collect();
    for name in &names {
        for parent in [top, dir] {
            let requests = [
                ops::lookup(parent, name),
                ops::symlink(parent, name, "/etc/passwd"),
                ops::mknod(parent, name, libc::S_IFREG | 0o644, 0),
                ops::mkdir(parent, name, 0o755),
                ops::unlink(parent, name),
                ops::rmdir(parent, name),
                ops::rename(parent, name, top, "taken"),
                ops::rename(top, "file", parent, name),
                ops::rename2(parent, name, top, "taken", 0),
                ops::rename2(parent, name, top, "file", 2),
                ops::rename2(top, "file", parent, name, 1),
                ops::rename2(top, "file", parent, name, 4),
                ops::link(file, parent, name),
                ops::create(parent, name, 0o644, RDWR | libc::O_CREAT as u32),
            ];
            for request in requests {
                let errno = guest.errno(&request).unwrap();
                assert_ne!(
                    errno,
                    0,
                    "opcode {} took {:?}",
                    request.opcode,
                    OsStr::from_bytes(name)
                );
            }
        }
    }
    // TMPFILE has a name that means nothing: it is made in the directory all the same.
    let mut unnamed = ops::tmpfile(top, 0o600, RDWR);
    let last = unnamed.args.len() - 1;
    unnamed.args[last] = format!("{outside}/new\0").into_bytes();
    let errno = guest.errno(&unnamed).unwrap();
    assert!([0, libc::EOPNOTSUPP].contains(&errno), "{errno}");
    // Names of attributes are no paths either.
    for name in ["../secret", "user./../x", "/etc/passwd"] {
        let _ = guest.errno(&ops::setxattr(file, name, b"x", 0, true)).unwrap();
    }
    assert_eq!(guest.read_all(file, 4096).unwrap(), b"inside");
    watcher.assert_quiet();
    prison.assert_untouched();
}

#[test]
fn the_daemon_follows_no_link_and_opens_no_device() {
    let mut prison = Prison::new();
    let (top, guest) = (prison.top, &prison.guest);
    let watcher = Watcher::new(&prison.outside);
    let target = |name: &str| prison.outside.join(name).into_os_string().into_encoded_bytes();
    for (name, to) in [
        ("file", target("secret")),
        ("directory", target("dir")),
        ("upwards", b"../outside".to_vec()),
        ("root", b"/".to_vec()),
        ("process", b"/proc/self/root".to_vec()),
    ] {
        let link = guest.symlink(top, name, &to).unwrap().nodeid;
        assert_eq!(guest.readlink(link).unwrap(), to);
        let size = Change {
            size: Some(0),
            mode: Some(0o777),
            ..Change::default()
        };
        for request in [
            ops::open(link, 0),
            ops::open(link, RDWR | libc::O_TRUNC as u32),
            ops::opendir(link),
            ops::lookup(link, "secret"),
            ops::create(link, "new", 0o644, RDWR),
            ops::create(top, name, 0o644, RDWR | libc::O_CREAT as u32),
            ops::mkdir(link, "new", 0o755),
            ops::unlink(link, "secret"),
            ops::rename2(link, "secret", top, "taken", 0),
            ops::rename2(top, name, link, "new", 0),
            ops::setattr(link, &size),
            ops::statfs(link).room(0),
        ] {
            assert_ne!(
                guest.errno(&request).unwrap(),
                0,
                "opcode {} on {name}",
                request.opcode
            );
        }
        // These act on the link itself, or not at all.
        guest
            .errno(&ops::setxattr(link, "user.x", b"x", 0, true))
            .unwrap();
        guest.errno(&ops::listxattr(link, 100)).unwrap();
        let second = guest.link(link, top, format!("{name}-2")).unwrap();
        assert_eq!(second.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    }
    watcher.assert_quiet();
    prison.assert_untouched();
}

#[test]
fn flags_of_one_request_are_no_flags_of_the_file() {
    let mut prison = Prison::new();
    let (top, guest) = (prison.top, &prison.guest);
    let (file, fh) = guest.create(top, "file", 0o644, RDWR).unwrap();
    let node = file.nodeid;
    guest.write(node, fh, 0, b"0123456789").unwrap();
    let wild = (libc::O_DIRECT | libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_NOATIME) as u32;
    let with_flags = |mut request: Request, flags: u32| {
        request.args[0][32..36].copy_from_slice(&flags.to_le_bytes());
        request
    };
    // Not aligned to anything: with O_DIRECT in force it could not be written.
    let append = with_flags(ops::write(node, fh, 3, b"abc"), wild);
    guest.errno(&append).unwrap();
    guest.errno(&with_flags(ops::read(node, fh, 1, 5), wild)).unwrap();
    guest.write(node, fh, 0, b"X").unwrap();
    assert_eq!(
        guest.read(node, fh, 0, 2).unwrap(),
        b"X1",
        "a write after that goes where it says"
    );
    // The same with every bit that there is, one at a time, in the flags of OPEN.
    for bit in 0..32 {
        let opened = guest.errno(&ops::open(node, 1 << bit)).unwrap();
        let known = [
            0,
            libc::EINVAL,
            libc::EOPNOTSUPP,
            libc::EEXIST,
            libc::ENOTDIR,
            libc::EISDIR,
            libc::EBADF,
        ];
        assert!(known.contains(&opened), "bit {bit}: errno {opened}");
    }
    let strange = (libc::O_TMPFILE | libc::O_CREAT | libc::O_EXCL | libc::O_PATH | libc::O_DIRECTORY) as u32;
    guest.errno(&ops::open(node, strange)).unwrap();
    guest.errno(&ops::create(top, "other", 0o644, strange)).unwrap();
    let mut found = 0;
    let path = prison.share.join("file");
    for entry in std::fs::read_dir(format!("/proc/{}/fd", prison.daemon.pid())).unwrap() {
        let entry = entry.unwrap().path();
        if std::fs::read_link(&entry).is_ok_and(|target| target == path || target.ends_with("share/file")) {
            let number = entry.file_name().unwrap().to_str().unwrap().to_owned();
            let text =
                std::fs::read_to_string(format!("/proc/{}/fdinfo/{number}", prison.daemon.pid())).unwrap();
            let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
            let bad = libc::O_DIRECT | libc::O_APPEND | libc::O_ASYNC;
            assert_eq!(flags & bad, 0, "descriptor {number} has the flags {flags:#o}");
            assert_ne!(flags & libc::O_CLOEXEC, 0);
            found += 1;
        }
    }
    assert!(found > 0, "the file is open");
    prison.assert_untouched();
}

#[test]
fn stale_handles_and_nodes_reach_nothing() {
    let mut prison = Prison::new();
    let (top, guest) = (prison.top, &prison.guest);
    let (one, one_fh) = guest.create(top, "one", 0o644, RDWR).unwrap();
    let (two, two_fh) = guest.create(top, "two", 0o644, RDWR).unwrap();
    guest.write(two.nodeid, two_fh, 0, b"two").unwrap();
    let uses = |node: u64, fh: u64| {
        [
            ops::read(node, fh, 0, 10),
            ops::write(node, fh, 0, b"x"),
            ops::fsync(node, fh, false),
            ops::flush(node, fh),
            ops::lseek(node, fh, 0, 3),
            ops::fallocate(node, fh, 0, 0, 10),
            ops::copy_file_range((node, fh, 0), (one.nodeid, one_fh, 0), 10),
            ops::copy_file_range((one.nodeid, one_fh, 0), (node, fh, 0), 10),
            ops::ioctl(node, fh, 0x8008_6601, 8),
        ]
    };
    // A handle of another node.
    for request in uses(one.nodeid, two_fh).iter().chain(&uses(two.nodeid, one_fh)) {
        assert_eq!(
            guest.errno(request).unwrap(),
            libc::EBADF,
            "opcode {}",
            request.opcode
        );
    }
    // A handle that was released, and numbers around it.
    guest.release(two.nodeid, two_fh).unwrap();
    for fh in [two_fh, two_fh + 1, two_fh + 64, u64::MAX, 0] {
        for request in uses(two.nodeid, fh) {
            let errno = guest.errno(&request).unwrap();
            assert_eq!(errno, libc::EBADF, "opcode {} with handle {fh}", request.opcode);
        }
        assert_ne!(guest.errno(&ops::release(two.nodeid, fh)).unwrap(), 0);
    }
    // A node that was forgotten; its number does not come back for another file.
    guest.forget(two.nodeid, 1).unwrap();
    guest.wait_idle(0).unwrap();
    assert_eq!(
        guest.errno(&ops::getattr(two.nodeid, None)).unwrap(),
        libc::ESTALE
    );
    for number in 0..50 {
        let fresh = guest.mkdir(top, format!("d{number}"), 0o755).unwrap().nodeid;
        assert_ne!(fresh, two.nodeid);
    }
    for request in [
        ops::lookup(two.nodeid, "x"),
        ops::open(two.nodeid, 0),
        ops::unlink(two.nodeid, "x"),
        ops::create(two.nodeid, "x", 0o644, RDWR),
    ] {
        assert_eq!(guest.errno(&request).unwrap(), libc::ESTALE);
    }
    assert_eq!(std::fs::read(prison.share.join("two")).unwrap(), b"two");
    prison.assert_untouched();
}

/// One of everything that a name in a directory can be used for; `node` is what the directory was when it was looked up.
fn attempt(random: &mut Random, top: u64, node: u64, number: u64) -> Request {
    let inner = ["secret", "victim", "new", "dir"][random.below(4)];
    let fresh = format!("new-{}", number % 50);
    match random.below(20) {
        0..=3 => ops::lookup(top, "door"),
        4..=6 => ops::lookup(node, inner),
        7 => ops::create(node, inner, 0o644, RDWR | libc::O_CREAT as u32),
        8 => ops::create(node, fresh, 0o644, RDWR | libc::O_CREAT as u32),
        9 => ops::mkdir(node, fresh, 0o755),
        10 => ops::unlink(node, inner),
        11 => ops::rename2(node, inner, top, "taken", 0),
        12 => ops::rename2(top, "taken", node, inner, 0),
        13 => ops::rename2(top, "mine", node, "victim", 2),
        14 => ops::symlink(node, fresh, "/etc/passwd"),
        15 => ops::open(node, RDWR),
        16 => ops::opendir(node),
        17 => ops::rmdir(node, fresh),
        18 => ops::create(top, "door", 0o644, RDWR | libc::O_CREAT as u32),
        _ => {
            let change = Change {
                mode: Some(0o755),
                size: Some(0),
                ..Change::default()
            };
            ops::setattr(node, &change)
        }
    }
}

/// The guest works on `door` while a thread of the host exchanges it, all the time, for a link that leads out.
fn race(operations: u64) {
    let mut prison = Prison::new();
    for name in ["a", "b"] {
        let inside = prison.share.join(name);
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("secret"), b"decoy").unwrap();
        std::fs::create_dir(inside.join("dir")).unwrap();
    }
    std::fs::write(prison.share.join("mine"), b"mine").unwrap();
    let inside = ["a", "b"].map(|name| {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        openat(CWD, prison.share.join(name), flags, Mode::empty()).unwrap()
    });
    std::fs::rename(prison.share.join("a"), prison.share.join("door")).unwrap();
    std::os::unix::fs::symlink(&prison.outside, prison.share.join("link")).unwrap();
    std::os::unix::fs::symlink("../outside", prison.share.join("relative")).unwrap();
    let watcher = Watcher::new(&prison.outside);
    let (stop, swaps) = (AtomicBool::new(false), AtomicU64::new(0));
    let (share, top, guest) = (&prison.share, prison.top, &prison.guest);
    let (mut found, mut links) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                let other = ["link", "b", "relative"][round % 3];
                // The guest may have taken one of them away.
                let (door, other) = (share.join("door"), share.join(other));
                if renameat_with(CWD, &door, CWD, &other, RenameFlags::EXCHANGE).is_ok() {
                    swaps.fetch_add(1, Ordering::Relaxed);
                }
                round += 1;
                if round % 64 == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let mut random = Random::new(2026);
        let mut nodes = vec![guest.lookup(top, "door").unwrap().nodeid];
        let mut sent = 0;
        while sent < operations {
            let batch: Vec<Request> = (0..64)
                .map(|at| {
                    attempt(
                        &mut random,
                        top,
                        nodes[(sent as usize + at) % nodes.len()],
                        sent + at as u64,
                    )
                })
                .collect();
            sent += batch.len() as u64;
            let tickets: Vec<Ticket> = guest.submit_all(1, &batch).unwrap();
            for (request, ticket) in batch.iter().zip(tickets) {
                let reply = guest.wait(ticket).unwrap();
                assert_ne!(reply.errno, libc::ENOSYS);
                if reply.errno != 0 {
                    continue;
                }
                match request.opcode {
                    opcode::LOOKUP => {
                        let entry = ops::read_entry(&reply.body).unwrap();
                        if request.nodeid == top {
                            links += u64::from(entry.attr.mode & libc::S_IFMT == libc::S_IFLNK);
                            nodes.push(entry.nodeid);
                            if nodes.len() > 8 {
                                nodes.remove(0);
                            }
                        } else {
                            found += 1;
                        }
                    }
                    opcode::OPEN => {
                        let (fh, _) = ops::read_open(&reply.body).unwrap();
                        assert_ne!(guest.read(request.nodeid, fh, 0, 100).unwrap_or_default(), SECRET);
                        guest.release(request.nodeid, fh).unwrap();
                    }
                    opcode::CREATE => {
                        let (entry, fh, _) = ops::read_created(&reply.body).unwrap();
                        let bytes = guest.read(entry.nodeid, fh, 0, 100).unwrap();
                        assert_ne!(bytes, SECRET, "a file outside was opened");
                        guest.release(entry.nodeid, fh).unwrap();
                    }
                    opcode::OPENDIR => {
                        let (fh, _) = ops::read_open(&reply.body).unwrap();
                        guest.releasedir(request.nodeid, fh).unwrap();
                    }
                    _ => {}
                }
            }
            // What the guest took away comes back, so that there is something to find; by descriptor, for this thread
            // must not be led out either.
            for directory in &inside {
                for name in ["secret", "victim", "dir"] {
                    let _ = openat(directory, name, OFlags::CREATE | OFlags::EXCL, Mode::RWXU);
                }
            }
            let _ = std::fs::write(share.join("mine"), b"mine");
        }
        stop.store(true, Ordering::Relaxed);
    });
    let swaps = swaps.load(Ordering::Relaxed);
    println!(
        "{operations} operations, {swaps} exchanges, the door was a link {links} times, {found} names found behind it"
    );
    assert!(swaps > operations / 100, "{swaps} exchanges are no race");
    assert!(
        links > 0 && found > 0,
        "the door was a link {links} times, {found} names were found"
    );
    watcher.assert_quiet();
    prison.assert_untouched();
}

#[test]
fn a_race_with_the_host_leads_nowhere() {
    race(20_000);
}

#[test]
#[ignore = "takes long: a million operations"]
fn a_long_race_with_the_host_leads_nowhere() {
    race(1_000_000);
}
