//! Messages that no Linux sends.

use super::{Victim, options};
use crate::support::{CONTAINERS, RAFSD, containers, message, open, passthrough_with, readable, writable};
use rafsd_frontend::Guest;
use rafsd_frontend::abi::{init, opcode};
use rafsd_frontend::daemon::Builder;
use rafsd_frontend::memory::PAGE;
use rafsd_frontend::ops::{self, Request};
use rafsd_frontend::random::Random;
use rafsd_frontend::vring::Descriptor;

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
