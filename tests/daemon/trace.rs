//! The system calls that each kind of thread is seen to make, against the lists of `docs/security.md`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rafsd_frontend::abi::opcode;
use rafsd_frontend::ops::{self, Change, Lock, Request};
use rafsd_frontend::registry::{REPOSITORY, Registry};
use rafsd_frontend::{Guest, Options};
use serde_json::json;

use super::counters::{eventually, mount};
use super::images::Image;
use super::process::{Daemon, wait};

const PAGE: &str = include_str!("../../docs/security.md");
const API: &str = include_str!("../../docs/api.md");

/// What the page says that threads of each role may call.
fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let row = |line: &str| {
        let (name, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
        let words: BTreeSet<String> = rest
            .trim_end_matches([' ', '|'])
            .split(' ')
            .map(str::to_owned)
            .collect();
        Some((name.to_owned(), words))
    };
    let rows: BTreeMap<_, _> = PAGE.lines().filter_map(row).collect();
    let roles = rows
        .iter()
        .filter(|(name, _)| name.starts_with(|first: char| first.is_ascii_uppercase()));
    roles
        .map(|(role, lists)| {
            let mut calls: BTreeSet<String> = lists.iter().flat_map(|list| rows[list].clone()).collect();
            let has = |list: &str| lists.contains(list);
            // Those of which only some kinds are allowed are told in words.
            for (call, may) in [
                ("mmap", true),
                ("mprotect", true),
                ("tgkill", true),
                ("prctl", true),
                ("prlimit64", true),
                ("clone", has("spawn")),
                ("unshare", has("spawn") && has("act-as")),
                ("socket", has("connect")),
                ("ioctl", has("serve") && !has("talk")),
            ] {
                assert!(PAGE.contains(&format!("`{call}`")), "{call} is not on the page");
                if may {
                    calls.insert(call.to_owned());
                }
            }
            (role.clone(), calls)
        })
        .collect()
}

fn role_of(thread: &str) -> Option<&'static str> {
    let roles = [
        ("rafsd", "Main"),
        ("stop-", "Main"),
        ("log", "Log"),
        ("deadlines", "Deadlines"),
        ("vhost-user", "Control"),
        ("queue-", "Queue"),
        ("worker-starter", "WorkerStarter"),
        ("worker", "Worker"),
        ("api", "Api"),
        ("prefetch-plan", "Api"),
        ("scrape", "Metrics"),
        ("net", "Net"),
        ("decode-", "Decode"),
        ("lock-wait", "Helper"),
        ("mount-watch", "Helper"),
        ("quota", "Helper"),
    ];
    let found = roles.iter().find(|(start, _)| thread.starts_with(start));
    found.map(|(_, role)| *role)
}

/// One line of strace: who, and which call was begun or has ended with what.
struct Line<'a> {
    task: u32,
    thread: &'a str,
    call: &'a str,
    begun: bool,
    text: &'a str,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (task, rest) = line.split_once('<')?;
        let (thread, text) = rest.split_once("> ")?;
        let text = text.trim_start();
        let (call, begun) = match text.strip_prefix("<... ") {
            Some(resumed) => (resumed.split_once(" resumed>")?.0, false),
            None => (text.split_once('(')?.0, true),
        };
        let is_name = |name: &str| {
            name.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        is_name(call).then_some(Line {
            task: task.trim().parse().ok()?,
            thread,
            call,
            begun,
            text,
        })
    }

    fn result(&self) -> Option<u32> {
        let result = self.text.rsplit_once(" = ")?.1;
        // The name of a thread follows its number.
        result.split([' ', '<']).next()?.parse().ok()
    }
}

/// The calls that threads of each role were seen to make.
fn seen(trace: &str, present: &BTreeSet<u32>) -> BTreeMap<&'static str, BTreeSet<String>> {
    let lines: Vec<Line> = trace.lines().filter_map(Line::parse).collect();
    let mut makers: HashMap<u32, u32> = HashMap::new();
    let mut names: HashMap<u32, &str> = HashMap::new();
    let mut confined: HashMap<u32, usize> = HashMap::new();
    for (number, line) in lines.iter().enumerate() {
        names.insert(line.task, line.thread);
        if line.call == "clone"
            && let Some(child) = line.result()
        {
            makers.insert(child, line.task);
        }
        // The last filter that a thread puts on is its own.
        if line.call == "seccomp" && line.begun {
            confined.insert(line.task, number);
        }
    }
    let role = |mut task: u32, at: usize| {
        // Before it has confined itself, and if it never does, a thread may do what its maker may.
        while !present.contains(&task) && confined.get(&task).is_none_or(|own| at <= *own) {
            task = *makers.get(&task)?;
        }
        role_of(names.get(&task)?)
    };
    let mut seen: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    for (number, line) in lines.iter().enumerate().filter(|(_, line)| line.begun) {
        let role = role(line.task, number)
            .unwrap_or_else(|| panic!("whose thread is {} ({})?", line.task, line.thread));
        seen.entry(role).or_default().insert(line.call.to_owned());
    }
    seen
}

/// strace, attached to all threads of `pid`.
fn attach(pid: u32, output: &Path) -> Option<Child> {
    let mut strace = Command::new("strace")
        .args(["-f", "-Y", "-qq", "-e", "signal=none", "-o"])
        .arg(output)
        .args(["-p", &pid.to_string()])
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let is_traced = || {
        super::sandbox::threads(pid)
            .iter()
            .all(|(_, fields)| fields["TracerPid"] != "0")
    };
    while !is_traced() {
        if strace.try_wait().unwrap().is_some() {
            return None;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Some(strace)
}

/// Every operation, some by users other than 0. What they are answered is the matter of other tests.
fn operate(guest: &Guest, top: &str) {
    let root = guest.resolve(top).unwrap().nodeid;
    let call = |request: &Request| drop(guest.call(request));
    let (file, fh) = guest.create(root, "file", 0o4755, libc::O_RDWR as u32).unwrap();
    let node = file.nodeid;
    guest.write(node, fh, 0, &vec![1; 300_000]).unwrap();
    guest.read(node, fh, 0, 100_000).unwrap();
    for request in [
        ops::mkdir(root, "dir", 0o755).by(1000, 1000),
        ops::mknod(root, "fifo", libc::S_IFIFO | 0o600, 0).by(1000, 1000),
        ops::mknod(root, "device", libc::S_IFCHR | 0o600, 0),
        ops::symlink(root, "link", "target").by(1000, 1000),
        ops::tmpfile(root, 0o600, libc::O_RDWR as u32).by(1000, 1000),
        ops::link(node, root, "name"),
        ops::rename(root, "name", root, "other"),
        ops::rename2(root, "other", root, "file", 2),
        ops::access(node, 4).by(1000, 1000),
        ops::getattr(node, None),
        ops::getattr(node, Some(fh)),
        ops::statx(node, libc::STATX_BASIC_STATS | libc::STATX_BTIME),
        ops::statfs(node),
        ops::setxattr(node, "user.a", b"value", 0, true),
        ops::setxattr(node, "trusted.a", b"value", 0, true),
        ops::getxattr(node, "user.a", 100),
        ops::getxattr(node, "user.a", 0),
        ops::listxattr(node, 0),
        ops::listxattr(node, 1000),
        ops::removexattr(node, "user.a"),
        ops::fallocate(node, fh, 0, 0, 500_000),
        ops::fallocate(node, fh, 3, 0, 8192),
        ops::lseek(node, fh, 0, libc::SEEK_DATA as u32),
        ops::lseek(node, fh, 0, libc::SEEK_HOLE as u32),
        ops::copy_file_range((node, fh, 0), (node, fh, 1 << 20), 4096),
        ops::ioctl(node, fh, 0x8008_6601, 8),
        ops::fsync(node, fh, false),
        ops::fsync(node, fh, true),
        ops::syncfs(root),
        ops::flush(node, fh),
    ] {
        call(&request);
    }
    let changes = [
        Change {
            mode: Some(0o6755),
            ..Change::default()
        },
        Change {
            uid: Some(1000),
            gid: Some(1000),
            ..Change::default()
        },
        Change {
            size: Some(1000),
            kill_suidgid: true,
            ..Change::default()
        },
        Change {
            size: Some(900),
            fh: Some(fh),
            ..Change::default()
        },
        Change {
            atime: Some((1, 2)),
            mtime_now: true,
            ..Change::default()
        },
    ];
    for change in &changes {
        call(&ops::setattr(node, change));
    }
    let mut lock = Lock {
        owner: 1,
        start: 0,
        end: 9,
        kind: libc::F_WRLCK as u32,
        flock: false,
    };
    call(&ops::lock(opcode::SETLK, node, fh, &lock));
    call(&ops::lock(opcode::GETLK, node, fh, &Lock { owner: 2, ..lock }));
    let waits = guest
        .submit(&ops::lock(opcode::SETLKW, node, fh, &Lock { owner: 2, ..lock }))
        .unwrap();
    lock.kind = libc::F_UNLCK as u32;
    call(&ops::lock(opcode::SETLK, node, fh, &lock));
    guest.wait(waits).unwrap();
    call(&ops::lock(
        opcode::SETLK,
        node,
        fh,
        &Lock {
            flock: true,
            kind: libc::F_WRLCK as u32,
            ..lock
        },
    ));
    guest.list(root, true, 4096).unwrap();
    guest.list(root, false, 4096).unwrap();
    call(&ops::readlink(
        guest.resolve(format!("{top}/link")).unwrap().nodeid,
    ));
    guest.release(node, fh).unwrap();
    // More than the quota of a limited mount.
    let (big, fh) = guest.create(root, "big", 0o644, libc::O_RDWR as u32).unwrap();
    for piece in 0..6u64 {
        call(&ops::write(big.nodeid, fh, piece << 20, &vec![1; 1 << 20]));
    }
    guest.release(big.nodeid, fh).unwrap();
    for request in [
        ops::unlink(root, "big"),
        ops::unlink(root, "link"),
        ops::rmdir(root, "dir"),
        ops::forget(node, 1),
        ops::batch_forget(&[(big.nodeid, 1)]),
    ] {
        let ticket = guest.submit(&request).unwrap();
        if request.room.is_some() {
            guest.wait(ticket).unwrap();
        } else {
            guest.wait_idle(ticket.queue).unwrap();
        }
    }
}

#[test]
fn threads_make_the_system_calls_that_the_page_lists_and_no_others() {
    let (image, scratch) = (Image::build(), tempfile::tempdir().unwrap());
    let registry = Registry::start(&image.blobs()).unwrap();
    let scrape = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut daemon = Daemon::start(&["--host-locks", "--metrics-address", &scrape.to_string()]);
    let pid = daemon.child.id();
    let output = scratch.path().join("trace");
    let Some(mut strace) = attach(pid, &output) else {
        println!(
            "SKIPPED threads_make_the_system_calls_that_the_page_lists_and_no_others: strace is missing or may not attach"
        );
        return;
    };
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let present: BTreeSet<u32> = tasks
        .map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();

    // A name to be resolved, prefetch, a cache with a quota.
    let host = format!("localhost:{}", registry.address.port());
    let config = json!({"version": 2, "id": "r",
        "backend": {"type": "registry", "registry": {"scheme": "http", "host": host, "repo": REPOSITORY}},
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache(), "quota": 1 << 20}},
        "rafs": {"batch_size": 0, "prefetch": {"enable": true, "prefetch_all": true}}});
    mount(&daemon, "/image", &image, &config).nothing();
    for name in ["share", "limited"] {
        std::fs::create_dir(daemon.path(name)).unwrap();
    }
    daemon.mount_directory("/share", &daemon.path("share")).nothing();
    super::quota::mount(&daemon, "/limited", &daemon.path("limited"));
    for round in 0..2 {
        let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
        assert_eq!(guest.read_file("/image/usr/bin/tool").unwrap().len(), 3 << 20);
        if round == 0 {
            operate(&guest, "/share");
            operate(&guest, "/limited");
        }
    }
    for line in API.lines() {
        if let Some((target, _)) = line.strip_prefix("| `GET ").and_then(|line| line.split_once('`')) {
            daemon.ask("GET", target, "");
        }
    }
    for (method, target, body) in [
        ("PUT", "/api/v1/config?id=/image", r#"{"registry_auth":"YTpi"}"#),
        ("PUT", "/api/rafsd/v1/drain", r#"{"timeout_ms": 10}"#),
        ("DELETE", "/api/rafsd/v1/drain", ""),
        ("DELETE", "/api/v1/mount?mountpoint=/share", ""),
        ("DELETE", "/api/v1/mount?mountpoint=/limited", ""),
        ("DELETE", "/api/v1/mount?mountpoint=/image", ""),
    ] {
        daemon.ask(method, target, body);
    }
    let mut scraper = std::net::TcpStream::connect(scrape).unwrap();
    std::io::Write::write_all(
        &mut scraper,
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    .unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut scraper, &mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    daemon.signal("-TERM");
    assert_eq!(wait(&mut daemon.child).code(), Some(0));
    eventually("strace has ended", || {
        !Path::new(&format!("/proc/{pid}")).exists()
    });
    strace.wait().unwrap();

    let trace = String::from_utf8_lossy(&std::fs::read(&output).unwrap()).into_owned();
    let (documented, seen) = (documented(), seen(&trace, &present));
    let mut others = Vec::new();
    for (role, calls) in &seen {
        let may = &documented[*role];
        others.extend(calls.difference(may).map(|call| format!("{role}: {call}")));
        let never: Vec<&str> = may.difference(calls).map(String::as_str).collect();
        println!(
            "{role}: {} of {} listed calls seen; never: {}",
            calls.len(),
            may.len(),
            never.join(" ")
        );
    }
    assert!(others.is_empty(), "not on the page: {others:?}");
    let missing: Vec<&String> = documented
        .keys()
        .filter(|role| !seen.contains_key(role.as_str()))
        // Of FUSE mode.
        .filter(|role| !["Lane", "Unmount"].contains(&role.as_str()))
        .collect();
    assert!(
        missing.is_empty(),
        "no thread of these roles was seen: {missing:?}"
    );
    // The trace is one of a daemon that has done something.
    for (role, call) in [
        ("Queue", "pwritev2"),
        ("Queue", "setresuid"),
        ("Queue", "name_to_handle_at"),
        ("Worker", "fsync"),
        ("Worker", "copy_file_range"),
        ("Net", "connect"),
        ("Decode", "pwrite64"),
        ("Control", "recvmsg"),
        ("Metrics", "accept4"),
        ("Helper", "getdents64"),
        ("Log", "write"),
    ] {
        assert!(
            seen[role].contains(call),
            "{role} was not seen to call {call}: {:?}",
            seen[role]
        );
    }
}
