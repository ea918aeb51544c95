//! What a guest may try. After each attempt every head has come back, the queue goes on, the daemon lives, and
//! nothing outside the mounts was touched.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::{
    CONTAINERS, LOWER, RAFSD, Served, containers, message, open, passthrough_with, readable, writable,
};
use rafsd_frontend::abi::{Writer, init, opcode};
use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::memory::{PAGE, Place};
use rafsd_frontend::message::{Request as Message, words};
use rafsd_frontend::ops::{self, Request};
use rafsd_frontend::random::Random;
use rafsd_frontend::vring::{Descriptor, INDIRECT, NEXT, WRITE};
use rafsd_frontend::{Guest, Options, Order};

/// The border at which the first two regions touch.
const BORDER: u64 = 8 << 20;
/// A hole in guest memory.
const HOLE: u64 = 1 << 30;

fn options() -> Options {
    Options {
        queue_size: 128,
        regions: vec![
            Place {
                address: 0,
                size: BORDER,
            },
            Place {
                address: BORDER,
                size: 8 << 20,
            },
            Place {
                address: 4 << 30,
                size: 8 << 20,
            },
        ],
        ..Options::default()
    }
}

struct Victim {
    daemon: Daemon,
    guest: Guest,
    shared: PathBuf,
    top: u64,
}

impl Victim {
    fn new() -> Self {
        let (daemon, guest, shared) = passthrough_with(options());
        std::fs::write(shared.join("file"), "contents").unwrap();
        std::fs::create_dir(shared.join("dir")).unwrap();
        let top = containers(&guest);
        Self {
            daemon,
            guest,
            shared,
            top,
        }
    }

    /// All heads are back, and the device still serves.
    fn check(&mut self, what: &str) {
        for queue in 0..self.guest.queues() {
            self.guest
                .wait_idle(queue)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
        }
        assert!(self.daemon.is_alive(), "{what}: the daemon died");
        let counts = self.guest.counts();
        assert_eq!(counts.added, counts.used, "{what}");
        self.guest
            .getattr(self.top)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let listed = std::fs::read_dir(self.shared.parent().unwrap()).unwrap().count();
        assert_eq!(
            listed, 4,
            "{what}: something was made outside of the shared directory"
        );
    }

    /// Memory with a GETATTR in it and room behind it: (request, its length, room for the answer).
    fn request(&self) -> (u64, u32, u64) {
        let bytes = message(opcode::GETATTR, self.top, &[0; 16]);
        let address = self.guest.memory.allocate(3 * PAGE as usize, PAGE).unwrap();
        self.guest.memory.write(address, &bytes);
        (address, bytes.len() as u32, address + PAGE)
    }

    fn chain(&self, descriptors: &[Descriptor]) {
        self.guest.submit_descriptors(1, descriptors).unwrap();
    }
}

fn with(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

// --- descriptors ---

#[test]
fn bad_descriptor_chains_come_back() {
    let mut victim = Victim::new();
    let (request, len, room) = victim.request();
    let body = readable(request, len, 1);
    let far = 0xffff_ffff_ffff_f000;
    let chains: Vec<(&str, Vec<Descriptor>)> = vec![
        ("a loop of one", vec![with(request, len, NEXT, 0)]),
        ("a loop of two", vec![body, with(room, 120, WRITE | NEXT, 0)]),
        (
            "a loop in the writable part",
            vec![body, with(room, 120, WRITE | NEXT, 1)],
        ),
        ("next outside of the table", vec![with(request, len, NEXT, 4096)]),
        (
            "next at the end of the table",
            vec![body, with(room, 120, WRITE | NEXT, 65535)],
        ),
        (
            "a request in a hole",
            vec![readable(HOLE, len, 1), writable(room, 120)],
        ),
        ("an answer in a hole", vec![body, writable(HOLE, 120)]),
        (
            "a request that runs into a hole",
            vec![readable(BORDER * 2 - 8, len, 1), writable(room, 120)],
        ),
        (
            "an answer that runs into a hole",
            vec![body, writable(BORDER * 2 - 20, 120)],
        ),
        (
            "an address that wraps",
            vec![readable(far, 0x2000, 1), writable(room, 120)],
        ),
        ("an answer that wraps", vec![body, writable(far, 0xffff_ffff)]),
        (
            "4 GiB to read",
            vec![readable(request, u32::MAX, 1), writable(room, 120)],
        ),
        ("4 GiB to write", vec![body, writable(room, u32::MAX)]),
        ("nothing to read", vec![writable(room, 120)]),
        ("nothing to write", vec![with(request, len, 0, 0)]),
        (
            "empty descriptors",
            vec![readable(request, 0, 1), writable(room, 0)],
        ),
        ("one empty descriptor", vec![with(request, 0, 0, 0)]),
        (
            "empty ones in between",
            vec![
                readable(request, 0, 1),
                readable(request, len, 2),
                with(room, 0, WRITE | NEXT, 3),
                writable(room, 120),
            ],
        ),
        (
            "to read behind to write",
            vec![with(room, 120, WRITE | NEXT, 1), with(request, len, 0, 0)],
        ),
        (
            "mixed",
            vec![
                body,
                with(room, 16, WRITE | NEXT, 2),
                readable(request, len, 3),
                writable(room, 120),
            ],
        ),
        ("an answer over its request", vec![body, writable(request, 120)]),
        (
            "answers over each other",
            vec![body, with(room, 60, WRITE | NEXT, 2), writable(room, 60)],
        ),
        (
            "unknown flags",
            vec![
                with(request, len, NEXT | 0xfff8, 1),
                with(room, 120, WRITE | 0xfff8, 0),
            ],
        ),
        (
            "an answer over the descriptor table",
            vec![
                body,
                writable(victim.guest.lane(0).queue.descriptors.address, 120),
            ],
        ),
    ];
    for (what, chain) in &chains {
        for _ in 0..3 {
            victim.chain(chain);
        }
        victim.check(what);
    }
}

#[test]
fn bad_tables_of_descriptors_come_back() {
    let mut victim = Victim::new();
    let (request, len, room) = victim.request();
    let table = victim.guest.memory.allocate(1 << 20, PAGE).unwrap();
    let good = [readable(request, len, 1), writable(room, 120)];
    let put = |at: u64, descriptors: &[Descriptor]| {
        for (index, descriptor) in descriptors.iter().enumerate() {
            victim
                .guest
                .memory
                .write(at + 16 * index as u64, &descriptor.bytes());
        }
    };
    put(table, &good);
    put(table + 0x1000, &[with(table, 32, INDIRECT, 0)]);
    put(table + 0x2000, &[with(request, len, NEXT, 0)]);
    put(
        table + 0x3000,
        &[with(request, len, NEXT, 3), with(room, 120, WRITE, 0)],
    );
    let long: Vec<Descriptor> = (0..5000)
        .map(|at| {
            with(
                request,
                if at == 0 { len } else { 0 },
                if at < 4999 { NEXT } else { 0 },
                at + 1,
            )
        })
        .collect();
    put(table + 0x8000, &long);
    let chains: Vec<(&str, Vec<Descriptor>)> = vec![
        ("a good table", vec![with(table, 32, INDIRECT, 0)]),
        ("half a descriptor", vec![with(table, 24, INDIRECT, 0)]),
        ("an empty table", vec![with(table, 0, INDIRECT, 0)]),
        ("a table of 4 GiB", vec![with(table, 0xffff_fff0, INDIRECT, 0)]),
        ("a table in a hole", vec![with(HOLE, 32, INDIRECT, 0)]),
        (
            "a table that runs into a hole",
            vec![with(BORDER * 2 - 16, 32, INDIRECT, 0)],
        ),
        ("an unaligned table", vec![with(table + 4, 32, INDIRECT, 0)]),
        ("a table in a table", vec![with(table + 0x1000, 16, INDIRECT, 0)]),
        ("a table that loops", vec![with(table + 0x2000, 16, INDIRECT, 0)]),
        (
            "next outside of the table",
            vec![with(table + 0x3000, 32, INDIRECT, 0)],
        ),
        (
            "a table longer than the queue",
            vec![with(table + 0x8000, 5000 * 16, INDIRECT, 0)],
        ),
        (
            "a table that the device may write",
            vec![with(table, 32, INDIRECT | WRITE, 0)],
        ),
        (
            "a table with a next",
            vec![with(table, 32, INDIRECT | NEXT, 1), writable(room, 120)],
        ),
        (
            "a table behind a descriptor",
            vec![readable(request, len, 1), with(table, 32, INDIRECT, 0)],
        ),
    ];
    let chains = chains.clone();
    for (what, chain) in &chains {
        victim.guest.submit_descriptors(1, chain).unwrap();
        victim.check(what);
    }
}

#[test]
fn an_answer_stays_within_its_room() {
    let mut victim = Victim::new();
    let (request, len, room) = victim.request();
    for size in [1u32, 8, 15, 16, 17, 100, 119, 120, 121] {
        victim.guest.memory.fill(room, PAGE as usize, 0x5a);
        victim.chain(&[readable(request, len, 1), writable(room, size)]);
        victim.check("a small room");
        let behind = victim.guest.memory.copy(room + u64::from(size), 256);
        assert!(
            behind.iter().all(|byte| *byte == 0x5a),
            "room of {size}: bytes behind it changed"
        );
        let used = victim.guest.lane(1).raw.pop().unwrap();
        assert!(used.len <= size, "{} bytes used of {size}", used.len);
    }
}

#[test]
fn heads_outside_of_the_queue_harm_nobody_else() {
    let (mut daemon, guest, _) = passthrough_with(options());
    {
        let mut lane = guest.lane(1);
        for head in [128, 129, 4096, 65535] {
            lane.queue.push(head);
        }
        lane.queue.publish();
        lane.queue.force_kick();
    }
    // The other queue, and the next front-end, are served.
    guest.forget(12345, 1).unwrap();
    guest.wait_idle(0).unwrap();
    drop(guest);
    let guest = daemon.guest(options()).unwrap();
    guest.getattr(ops::ROOT).unwrap();
    assert!(daemon.is_alive());
}

#[test]
fn a_ring_index_that_jumps_harms_nobody_else() {
    let (mut daemon, guest, _) = passthrough_with(options());
    {
        let lane = guest.lane(1);
        let ahead = lane.queue.available_index().wrapping_add(5000);
        lane.queue.available.store_u16(2, ahead);
        lane.queue.kick.signal();
    }
    guest.forget(12345, 1).unwrap();
    guest.wait_idle(0).unwrap();
    assert!(guest.stop().is_ok(), "a broken ring can be stopped");
    guest.reset_rings();
    guest.start(&[0, 0]).unwrap();
    guest.init(&ops::Init::default()).unwrap();
    assert!(daemon.is_alive());
}

// --- messages ---

#[test]
fn lengths_that_lie_are_refused() {
    let mut victim = Victim::new();
    for code in 0..=60u32 {
        for (claimed, sent) in [
            (0, 40),
            (39, 40),
            (40, 40),
            (41, 40),
            (4096, 40),
            (u32::MAX, 60),
            (48, 60),
            (40, 10),
            (40, 39),
        ] {
            let mut bytes = message(code, victim.top, &[0xff; 64]);
            bytes[..4].copy_from_slice(&claimed.to_le_bytes());
            bytes.truncate(sent);
            victim.guest.submit_bytes(1, &bytes, 4096).unwrap();
        }
        victim
            .guest
            .wait_idle(1)
            .unwrap_or_else(|e| panic!("opcode {code}: {e}"));
    }
    // One of them was a DESTROY.
    victim.guest.init(&ops::Init::default()).unwrap();
    victim.top = containers(&victim.guest);
    victim.check("lengths that lie");
}

#[test]
fn what_has_no_answer_has_none_even_if_it_is_malformed() {
    let mut victim = Victim::new();
    for code in [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT] {
        for claimed in [0u32, 39, 4096, u32::MAX] {
            let mut bytes = message(code, victim.top, &[1; 16]);
            bytes[..4].copy_from_slice(&claimed.to_le_bytes());
            victim.guest.submit_bytes(1, &bytes, 200).unwrap();
            victim.guest.wait_idle(1).unwrap();
            let used = victim.guest.lane(1).raw.pop().unwrap();
            assert_eq!(used.len, 0, "opcode {code} of {claimed} bytes");
        }
    }
    victim.check("operations without an answer");
}

#[test]
fn every_operation_survives_every_length() {
    let mut victim = Victim::new();
    let mut random = Random::new(3);
    for code in (1..=60u32).filter(|code| *code != opcode::INIT && *code != opcode::DESTROY) {
        for len in 0..=120 {
            let body = if len % 2 == 0 {
                vec![0; len]
            } else {
                random.bytes(len)
            };
            let nodeid = [0, 1, victim.top, u64::MAX, random.word()][len % 5];
            victim
                .guest
                .submit_bytes(
                    1,
                    &message(code, nodeid, &body),
                    if len % 7 == 0 { 0 } else { 300 },
                )
                .unwrap();
            if len % 20 == 0 {
                victim
                    .guest
                    .wait_idle(1)
                    .unwrap_or_else(|e| panic!("opcode {code}, {len} bytes: {e}"));
            }
        }
        victim.check(&format!("opcode {code}"));
    }
}

#[test]
fn oversized_messages_are_refused_and_take_no_memory() {
    let mut victim = Victim::new();
    let before = victim.daemon.memory_kib("VmHWM").unwrap();
    let guest = &victim.guest;
    // As large as guest memory allows; the limit for arguments is 1 MiB, for all of a chain 8 MiB.
    let address = guest.memory.allocate(7 << 20, PAGE).unwrap();
    let room = guest.memory.allocate(PAGE as usize, PAGE).unwrap();
    for code in (1..=60u32).filter(|code| *code != opcode::INIT && *code != opcode::DESTROY) {
        for (length, repeated) in [(1 << 20, 1), ((1 << 20) + 1, 1), (6 << 20, 1), (6 << 20, 4)] {
            let total = length * repeated;
            let mut head = message(code, victim.top, &[b'x'; 60]);
            head[..4].copy_from_slice(&(total as u32).to_le_bytes());
            guest.memory.write(address, &head);
            let mut chain: Vec<Descriptor> = (0..repeated)
                .map(|at| readable(address, length as u32, at as u16 + 1))
                .collect();
            chain.push(writable(room, 200));
            guest.memory.fill(room, 16, 0);
            guest.submit_descriptors(1, &chain).unwrap();
            guest.wait_idle(1).unwrap();
            let used = guest.lane(1).raw.pop().unwrap().len;
            let answer = guest.memory.copy(room + 4, 4);
            let refused = used == 0 || i32::from_le_bytes(answer.try_into().unwrap()) < 0;
            // Some operations have no arguments, or take the first and leave the rest.
            let fits = total <= 1 << 20 || code == opcode::WRITE;
            assert!(refused || fits, "opcode {code} took a message of {total} bytes");
        }
    }
    guest.memory.release(address, 7 << 20);
    let grown = victim.daemon.memory_kib("VmHWM").unwrap() - before;
    assert!(grown < 40 << 10, "{grown} KiB for oversized messages");
    victim.guest.init(&ops::Init::default()).unwrap();
    victim.top = containers(&victim.guest);
    victim.check("oversized messages");
}

#[test]
fn unknown_operations_do_not_exist() {
    let mut victim = Victim::new();
    for code in [0, 7, 19, 53, 54, 100, 4096, 4097, 1 << 16, u32::MAX] {
        let errno = victim
            .guest
            .errno(&Request::new(code, victim.top).arg([0; 64]).room(256))
            .unwrap();
        assert_eq!(errno, libc::ENOSYS, "opcode {code}");
    }
    victim.check("unknown operations");
}

#[test]
fn nothing_is_served_before_init() {
    let (mut daemon, guest, _) = passthrough_with(options());
    drop(guest);
    let mut daemon_two = Builder::new(RAFSD).unwrap().start().unwrap();
    let guest = Guest::connect(&daemon_two.socket, options()).unwrap();
    for code in (1..=60u32).filter(|code| *code != opcode::INIT) {
        guest.submit_bytes(1, &message(code, 1, &[0; 80]), 4096).unwrap();
        guest
            .wait_idle(1)
            .unwrap_or_else(|e| panic!("opcode {code}: {e}"));
    }
    guest.init(&ops::Init::default()).unwrap();
    guest.getattr(ops::ROOT).unwrap();
    assert!(daemon.is_alive() && daemon_two.is_alive());
}

#[test]
fn strange_inits_are_answered() {
    let mut victim = Victim::new();
    for body in [
        vec![],
        vec![0; 8],
        vec![0xff; 16],
        vec![0xff; 64],
        vec![7, 0, 0, 0],
        vec![0; 300],
    ] {
        victim
            .guest
            .submit_bytes(1, &message(opcode::INIT, 0, &body), 200)
            .unwrap();
    }
    victim.guest.wait_idle(1).unwrap();
    let offer = |version, flags, short| ops::Init {
        version,
        flags,
        short,
    };
    let newer = victim.guest.init(&offer((8, 0), 0, false)).unwrap();
    assert_eq!(newer.major, 7, "a newer driver is told our version");
    assert!(
        victim.guest.init(&offer((6, 9), 0, true)).is_err(),
        "an older one cannot be served"
    );
    let plain = victim
        .guest
        .init(&offer((7, 31), init::ASYNC_READ | init::MAX_PAGES, true))
        .unwrap();
    assert_eq!(
        plain.flags & !(init::ASYNC_READ | init::MAX_PAGES),
        0,
        "a flag that was not offered"
    );
    victim.guest.init(&ops::Init::default()).unwrap();
    victim.top = containers(&victim.guest);
    victim.check("strange INITs");
}

#[test]
fn names_lead_nowhere_else() {
    let mut victim = Victim::new();
    let secret = victim.shared.parent().unwrap().join("log");
    assert!(secret.exists());
    let (top, guest) = (victim.top, &victim.guest);
    let dir = guest.lookup(top, "dir").unwrap().nodeid;
    let file = guest.lookup(top, "file").unwrap().nodeid;
    let names: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b".".to_vec(),
        b"..".to_vec(),
        b"/".to_vec(),
        b"../log".to_vec(),
        b"dir/../file".to_vec(),
        b"/etc/passwd".to_vec(),
        b"file/".to_vec(),
        vec![b'x'; 256],
        vec![b'x'; 4096],
        vec![b'x'; 70_000],
    ];
    for name in &names {
        let requests = [
            ops::lookup(top, name),
            ops::unlink(top, name),
            ops::rmdir(top, name),
            ops::mkdir(top, name, 0o755),
            ops::mknod(top, name, 0o100644, 0),
            ops::create(top, name, 0o644, 0o102),
            ops::symlink(top, name, "target"),
            ops::link(file, top, name),
            ops::rename(top, name, dir, "new"),
            ops::rename(top, "file", dir, name),
            ops::rename2(top, name, dir, "new", 1),
            ops::rename2(top, "file", dir, name, 1),
        ];
        for request in requests {
            let errno = guest.errno(&request).unwrap();
            let shown = String::from_utf8_lossy(&name[..name.len().min(20)]).into_owned();
            assert_ne!(
                errno,
                0,
                "opcode {} took the name {shown:?} of {} bytes",
                request.opcode,
                name.len()
            );
        }
    }
    // Without a NUL at the end there is no name at all.
    for code in [opcode::LOOKUP, opcode::UNLINK, opcode::RMDIR, opcode::REMOVEXATTR] {
        assert_ne!(
            guest
                .errno(&Request::new(code, top).arg("file").room(128))
                .unwrap(),
            0,
            "opcode {code}"
        );
    }
    assert_ne!(
        guest
            .errno(&Request::new(opcode::SYMLINK, top).arg("a\0b").room(128))
            .unwrap(),
        0
    );
    let empty_target = Request::new(opcode::SYMLINK, top).arg("a\0\0").room(128);
    assert_ne!(guest.errno(&empty_target).unwrap(), 0);
    assert_eq!(
        std::fs::read_to_string(victim.shared.join("file")).unwrap(),
        "contents"
    );
    victim.check("names");
}

#[test]
fn symlinks_are_not_followed_out() {
    let mut victim = Victim::new();
    let (top, guest) = (victim.top, &victim.guest);
    for (name, target) in [("up", ".."), ("etc", "/etc"), ("passwd", "/etc/passwd")] {
        let link = guest.symlink(top, name, target).unwrap();
        assert_eq!(link.attr.mode & 0o170000, 0o120000);
        assert!(guest.lookup(link.nodeid, "passwd").is_err());
        assert!(guest.open(link.nodeid, 0).is_err(), "a symlink was opened");
        assert!(guest.opendir(link.nodeid).is_err());
        assert!(guest.create(link.nodeid, "x", 0o644, 2).is_err());
    }
    victim.check("symlinks");
}

#[test]
fn huge_sizes_and_offsets_are_answered() {
    let mut victim = Victim::new();
    let (top, guest) = (victim.top, &victim.guest);
    std::fs::write(victim.shared.join("small"), "small").unwrap();
    let file = open(guest, &format!("{CONTAINERS}/file"));
    let rw = guest.open(file.node, 2).unwrap();
    // Not the file that is written to: its length would be real work.
    let small = open(guest, &format!("{CONTAINERS}/small"));
    let dir = guest.opendir(top).unwrap();
    let edges = [
        0,
        1,
        1 << 31,
        1 << 32,
        i64::MAX as u64 - 1,
        i64::MAX as u64,
        1 << 63,
        u64::MAX,
    ];
    for offset in edges {
        for size in [0, 1, 1 << 20, 1 << 31, u32::MAX] {
            for room in [0, 100, 8192] {
                guest
                    .submit(&ops::read(file.node, file.fh, offset, size).room(room))
                    .unwrap();
                guest
                    .submit(&ops::readdir(top, dir, offset, size).room(room))
                    .unwrap();
                guest
                    .submit(&ops::readdirplus(top, dir, offset, size).room(room))
                    .unwrap();
            }
            let mut write = ops::write(file.node, rw, offset, b"data");
            write.args[0][16..20].copy_from_slice(&size.to_le_bytes());
            guest.submit(&write).unwrap();
        }
        for other in edges {
            // Nothing that would fill the host's disk.
            guest
                .submit(&ops::fallocate(file.node, rw, 3, offset, other))
                .unwrap();
            guest
                .submit(&ops::copy_file_range(
                    (small.node, small.fh, offset),
                    (file.node, rw, other),
                    u64::MAX,
                ))
                .unwrap();
        }
        for whence in [0, 1, 2, 3, 4, u32::MAX] {
            guest.submit(&ops::lseek(file.node, rw, offset, whence)).unwrap();
        }
    }
    for size in [1, 1 << 16, (1 << 16) + 1, u32::MAX] {
        for room in [0, 8, 100] {
            guest
                .submit(&ops::getxattr(file.node, "user.none", size).room(room))
                .unwrap();
            guest.submit(&ops::listxattr(file.node, size).room(room)).unwrap();
        }
        let mut set = ops::setxattr(file.node, "user.x", b"v", 0, true);
        set.args[0][..4].copy_from_slice(&size.to_le_bytes());
        guest.submit(&set).unwrap();
    }
    guest
        .submit(&ops::setxattr(file.node, vec![b'n'; 300], b"v", 0, true))
        .unwrap();
    guest
        .submit(&ops::symlink(top, "long", vec![b't'; 5000]))
        .unwrap();
    guest
        .submit(&ops::ioctl(file.node, rw, 0x8008_6601, u32::MAX))
        .unwrap_err();
    victim.guest.wait_idle(1).unwrap();
    assert!(std::fs::metadata(victim.shared.join("file")).unwrap().len() <= i64::MAX as u64);
    assert!(
        victim.daemon.memory_kib("VmRSS").unwrap() < 200 << 10,
        "memory grew with the sizes asked for"
    );
    victim.check("huge sizes");
}

#[test]
fn nodes_and_handles_that_are_not_there_are_errors() {
    let mut victim = Victim::new();
    let guest = &victim.guest;
    let image = 5u64 << 40;
    for node in [0, 77_777, 1 << 39, image, image + 77, 1 << 63, u64::MAX] {
        for request in [
            ops::getattr(node, None),
            ops::getattr(node, Some(3)),
            ops::lookup(node, "file"),
            ops::open(node, 0),
            ops::opendir(node),
            ops::read(node, 1, 0, 100),
            ops::write(node, 1, 0, b"x"),
            ops::readlink(node),
            ops::setattr(
                node,
                &ops::Change {
                    mode: Some(0),
                    ..ops::Change::default()
                },
            ),
            ops::create(node, "x", 0o644, 2),
            ops::rename2(node, "a", victim.top, "b", 0),
            ops::rename2(victim.top, "file", node, "b", 0),
            ops::link(node, victim.top, "l"),
            ops::getxattr(node, "user.x", 100),
            ops::readdirplus(node, 1, 0, 4096),
            ops::fsync(node, 9, false),
            ops::copy_file_range((node, 1, 0), (victim.top, 2, 0), 10),
        ] {
            let errno = guest.errno(&request).unwrap();
            assert_ne!(errno, 0, "opcode {} on node {node:#x}", request.opcode);
            assert_ne!(
                errno,
                libc::ENOSYS,
                "opcode {}: Linux would never ask again",
                request.opcode
            );
        }
    }
    let file = guest.lookup(victim.top, "file").unwrap().nodeid;
    for fh in [0xdead, u64::MAX, 1 << 40] {
        for request in [
            ops::read(file, fh, 0, 10),
            ops::write(file, fh, 0, b"x"),
            ops::fsync(file, fh, true),
        ] {
            assert_ne!(
                guest.errno(&request).unwrap(),
                0,
                "opcode {} with handle {fh:#x}",
                request.opcode
            );
        }
        guest.errno(&ops::release(file, fh)).unwrap();
        guest.errno(&ops::releasedir(victim.top, fh)).unwrap();
    }
    victim.check("nodes and handles");
}

// --- time ---

#[test]
fn memory_may_change_under_our_feet() {
    let mut victim = Victim::new();
    let stop = AtomicBool::new(false);
    let (request, _, room) = victim.request();
    let table = victim.guest.memory.allocate(PAGE as usize, PAGE).unwrap();
    let memory = victim.guest.memory.clone();
    let names = [&b"file\0"[..], b"..\0\0\0", b"a/b\0\0", b"dir\0\0", b"x\0\0\0\0"];
    let (stop_ref, top) = (&stop, victim.top);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut random = Random::new(17);
            while !stop_ref.load(Ordering::Relaxed) {
                let code = [1u32, 3, 14, 10, 22, 2, 26, 53, 44][random.below(9)];
                let len = [45u32, 40, 56, 0, u32::MAX, 100][random.below(6)];
                let nodeid = [top, 0, 1, u64::MAX][random.below(4)];
                let header = Writer::new().u32(len).u32(code).u64(7).u64(nodeid).0;
                memory.write(request, &header);
                memory.write(request + 40, names[random.below(5)]);
                let target = [request, HOLE, room, table][random.below(4)];
                let size = [45u32, 0, 16, u32::MAX, 200][random.below(5)];
                let flags = [NEXT, 0, NEXT | WRITE, NEXT | INDIRECT][random.below(4)];
                memory.write(table, &with(target, size, flags, 1).bytes());
                memory.write(
                    table + 16,
                    &with(room, 200, WRITE, random.below(3) as u16).bytes(),
                );
            }
        });
        let start = Instant::now();
        let mut count = 0;
        while start.elapsed() < Duration::from_secs(3) {
            for _ in 0..16 {
                let chain = if count % 2 == 0 {
                    vec![readable(request, 45, 1), writable(room, 200)]
                } else {
                    vec![with(table, 32, INDIRECT, 0)]
                };
                victim.guest.submit_descriptors(1, &chain).unwrap();
                count += 1;
            }
            victim.guest.wait_idle(1).unwrap();
            victim.guest.lane(1).raw.clear();
        }
        stop.store(true, Ordering::Relaxed);
        assert!(count > 1000, "{count} requests");
    });
    // A stray INIT may have ended the session.
    victim.guest.init(&ops::Init::default()).unwrap();
    victim.top = containers(&victim.guest);
    assert_eq!(
        std::fs::read_dir(victim.shared.parent().unwrap())
            .unwrap()
            .count(),
        4
    );
    victim.check("changing memory");
}

#[test]
fn storms_of_forgets_pass() {
    let mut victim = Victim::new();
    for round in 0..50u64 {
        let requests: Vec<Request> = (0..1000)
            .map(|number| {
                ops::forget(
                    [1, victim.top, number, u64::MAX - number][number as usize % 4],
                    u64::MAX - round,
                )
            })
            .collect();
        victim.guest.submit_all(0, &requests).unwrap();
        let all: Vec<(u64, u64)> = (0..1000).map(|number| (number * round, u64::MAX)).collect();
        victim.guest.batch_forget(&all).unwrap();
        victim.guest.batch_forget(&[]).unwrap();
        // The count says more than there is.
        let mut lying = ops::batch_forget(&[(victim.top, 1)]);
        lying.args[0][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        victim.guest.submit(&lying).unwrap();
        // On a request queue, with room for an answer that must not come.
        victim
            .guest
            .submit_bytes(1, &message(opcode::FORGET, 1, &[1; 8]), 100)
            .unwrap();
        for number in 0..20 {
            victim.guest.submit(&ops::interrupt(number)).unwrap();
        }
    }
    victim.guest.wait_idle(0).unwrap();
    victim.guest.wait_idle(1).unwrap();
    victim.top = containers(&victim.guest);
    victim.check("FORGET storms");
}

#[test]
fn a_flood_of_parked_requests_is_bounded_and_ends() {
    let served = Served::new(&["--chunk-size", "64KiB"]);
    let mut daemon = Builder::new(RAFSD).unwrap().start().unwrap();
    served.mount(&daemon, 0);
    let guest = daemon
        .guest(Options {
            queue_size: 1024,
            request_queues: 4,
            ..Options::default()
        })
        .unwrap();
    let cold = open(&guest, &format!("{LOWER}/z-cold"));
    let before = daemon.memory_kib("VmRSS").unwrap();
    served.registry.set(|fault| fault.stalled = true);
    let mut tickets = Vec::new();
    for queue in 1..=4 {
        let requests: Vec<Request> = (0..250u64)
            .map(|number| {
                ops::read(
                    cold.node,
                    cold.fh,
                    (number * 65_536 + queue as u64 * 999) % (16 << 20),
                    8192,
                )
            })
            .collect();
        tickets.extend(guest.submit_all(queue, &requests).unwrap());
    }
    std::thread::sleep(Duration::from_millis(500));
    let grown = daemon.memory_kib("VmRSS").unwrap().saturating_sub(before);
    assert!(grown < 64 << 10, "a thousand parked requests took {grown} KiB");
    assert!(daemon.descriptors().unwrap() < 500);
    let top = containers(&guest);
    for _ in 0..100 {
        guest.getattr(top).unwrap();
    }
    served.registry.set(|fault| fault.stalled = false);
    for ticket in tickets {
        let reply = guest.wait_for(ticket, Duration::from_secs(60)).unwrap();
        assert!(
            reply.errno == 0 || reply.errno == libc::EIO || reply.errno == libc::EAGAIN,
            "{}",
            reply.errno
        );
    }
    for queue in 0..guest.queues() {
        guest.wait_idle(queue).unwrap();
    }
    let counts = guest.counts();
    assert_eq!(counts.added, counts.used);
    assert!(daemon.is_alive());
}

// --- at random ---

/// Requests that are half right: real nodes and handles, random fields, random descriptors.
fn random_requests(victim: &mut Victim, count: u64, seed: u64) {
    let mut random = Random::new(seed);
    let guest = &victim.guest;
    let file = open(guest, &format!("{CONTAINERS}/file"));
    let nodes = [1, victim.top, file.node, 0, u64::MAX];
    for number in 0..count {
        let code = match random.below(60) as u32 {
            opcode::INIT | opcode::DESTROY | opcode::SETLKW => opcode::GETATTR,
            code => code,
        };
        let nodeid = nodes[random.below(nodes.len())];
        let len = [0, 8, 16, 24, 32, 40, 48, 64, 88, 200][random.below(10)];
        let mut body = random.bytes(len);
        if len >= 8 && random.below(2) == 0 {
            body[..8].copy_from_slice(&file.fh.to_le_bytes());
        }
        if len >= 40 && random.below(2) == 0 {
            body[8..24].copy_from_slice(&[0; 16]);
            body[9] = 16;
        }
        // No file grows beyond what a test may write.
        if code == opcode::FALLOCATE || code == opcode::SETATTR {
            body.truncate(8);
        }
        let body = if random.below(3) == 0 {
            [body, b"name\0other\0".to_vec()].concat()
        } else {
            body
        };
        let room = [0, 16, 100, 144, 160, 4096][random.below(6)];
        if random.below(8) == 0 {
            let address = guest.memory.allocate(PAGE as usize, PAGE).unwrap();
            guest.memory.write(address, &message(code, nodeid, &body));
            let chain: Vec<Descriptor> = (0..1 + random.below(4))
                .map(|_| {
                    with(
                        [address, address + 40, HOLE, random.word()][random.below(4)],
                        [40, 60, 0, 4096, random.word() as u32][random.below(5)],
                        (random.word() & 7) as u16,
                        random.below(6) as u16,
                    )
                })
                // Nothing may be written to where rings lie.
                .map(|descriptor| match descriptor.flags & WRITE {
                    0 => descriptor,
                    _ => Descriptor {
                        address,
                        len: descriptor.len % 4096,
                        ..descriptor
                    },
                })
                .collect();
            guest.submit_descriptors(1, &chain).unwrap();
            guest
                .wait_idle(1)
                .unwrap_or_else(|e| panic!("request {number} of seed {seed}: {e}"));
            guest.memory.release(address, PAGE as usize);
        } else {
            let bytes = message(code, nodeid, &body);
            let size = bytes.len() + room;
            let answer = guest.submit_bytes(1, &bytes, room).unwrap();
            if number % 16 == 0 || guest.lane(1).queue.room() < 8 {
                guest
                    .wait_idle(1)
                    .unwrap_or_else(|e| panic!("request {number} of seed {seed}: {e}"));
            }
            if number % 16 != 0 {
                guest
                    .wait_idle(1)
                    .unwrap_or_else(|e| panic!("request {number} of seed {seed}: {e}"));
            }
            guest.memory.release(answer - bytes.len() as u64, size);
        }
        guest.lane(1).raw.clear();
    }
}

#[test]
fn random_requests_come_back() {
    let mut victim = Victim::new();
    random_requests(&mut victim, 30_000, 1);
    // Nodes and names may have gone; the daemon and its queues have not.
    victim.guest.init(&ops::Init::default()).unwrap();
    victim.top = containers(&victim.guest);
    victim.check("random requests");
}

#[test]
#[ignore = "takes long: ten million requests"]
fn ten_million_random_requests_come_back() {
    let mut victim = Victim::new();
    for seed in 0..1000 {
        random_requests(&mut victim, 10_000, seed + 100);
        victim.guest.init(&ops::Init::default()).unwrap();
        std::fs::write(victim.shared.join("file"), "contents").unwrap();
        victim.top = containers(&victim.guest);
    }
    victim.check("ten million random requests");
    assert!(victim.guest.counts().used >= 10_000_000);
}

// --- the socket ---

#[test]
fn malformed_vhost_user_messages_end_a_connection_at_most() {
    let (mut daemon, guest, _) = passthrough_with(options());
    drop(guest);
    let fresh = || {
        let start = Instant::now();
        loop {
            match Guest::boot(
                &daemon.socket,
                Options {
                    order: Order::Qemu,
                    ..options()
                },
            ) {
                Ok(guest) => return guest,
                Err(e) => assert!(start.elapsed() < Duration::from_secs(3), "{e}"),
            }
        }
    };
    let junk = vec![0xff; 4096];
    for request in (0..60).chain([255, 1 << 16, u32::MAX]) {
        for (flags, size, payload) in [
            (1, 0, &junk[..0]),
            (1, 8, &junk[..8]),
            (1, 12, &junk[..12]),
            (1, 40, &junk[..40]),
            (9, 8, &[0; 8][..]),
            (1, 4096, &junk[..]),
            (1, u32::MAX, &junk[..8]),
            (5, 8, &junk[..8]),
            (2, 8, &junk[..8]),
        ] {
            let guest = fresh();
            let vmm = guest.vmm();
            if vmm
                .connection
                .send_raw(request, flags, size, payload, &[])
                .is_ok()
            {
                // Whatever the device makes of it, it does not wait for ever.
                let _ = vmm.connection.send(Message::GetFeatures, &[], &[]);
            }
        }
    }
    let guest = fresh();
    guest.getattr(ops::ROOT).unwrap();
    drop(guest);
    assert!(daemon.is_alive());
}

#[test]
fn rings_in_impossible_places_are_refused() {
    let (mut daemon, guest, _) = passthrough_with(options());
    drop(guest);
    let user = |guest: &Guest| guest.lane(1).queue.descriptors.user_address();
    for attempt in 0..8 {
        let start = Instant::now();
        let guest = loop {
            match Guest::boot(&daemon.socket, options()) {
                Ok(guest) => break guest,
                Err(e) => assert!(start.elapsed() < Duration::from_secs(3), "{e}"),
            }
        };
        guest.stop().unwrap();
        let at = user(&guest);
        let vmm = guest.vmm();
        let address = |table: u64, used: u64, available: u64| {
            [
                1u32.to_le_bytes().to_vec(),
                vec![0; 4],
                words(&[table, used, available, 0]),
            ]
            .concat()
        };
        let send = |request, payload: &[u8]| vmm.connection.send_acked(request, payload, &[]);
        let outcome = match attempt {
            0 => send(Message::SetVringAddr, &address(0, 0, 0)),
            1 => send(Message::SetVringAddr, &address(at + 1, at + 0x3002, at + 0x1001)),
            2 => send(Message::SetVringAddr, &address(u64::MAX - 15, at, at)),
            3 => send(Message::SetVringNum, &words(&[1 | 3 << 32])),
            4 => send(Message::SetVringNum, &words(&[1])),
            5 => send(Message::SetVringNum, &words(&[1 | 65_536 << 32])),
            6 => send(Message::SetVringBase, &words(&[200 | 5 << 32])),
            _ => send(Message::SetVringEnable, &words(&[77 | 1 << 32])),
        };
        assert!(outcome.is_err(), "attempt {attempt} was accepted");
    }
    drop(daemon.guest(options()));
    assert!(daemon.is_alive());
}
