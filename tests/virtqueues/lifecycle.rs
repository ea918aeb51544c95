//! Front-ends come and go, rings stop and start, daemons end when told to.

use std::time::{Duration, Instant};

use crate::support::{
    CONTAINERS, LOWER, RAFSD, Served, containers, noise, open, passthrough, passthrough_with,
};
use rafsd_frontend::daemon::{Builder, Daemon, ended_well};
use rafsd_frontend::memory::Place;
use rafsd_frontend::ops::{self, Init};
use rafsd_frontend::vmm::Restart;
use rafsd_frontend::{Guest, Options, Order, Ticket};

const ORDERS: [Order; 2] = [Order::Qemu, Order::CloudHypervisor];

/// Small enough to compare all of it often.
fn small(order: Order) -> Options {
    Options {
        order,
        queue_size: 256,
        regions: vec![
            Place {
                address: 0,
                size: 4 << 20,
            },
            Place {
                address: 4 << 20,
                size: 4 << 20,
            },
            Place {
                address: 1 << 32,
                size: 4 << 20,
            },
        ],
        ..Options::default()
    }
}

fn assert_ends(daemon: &mut Daemon) {
    let (status, took) = daemon.terminate(Duration::from_secs(60)).unwrap();
    assert!(ended_well(status), "{status}\n{}", daemon.log());
    // A second, and more where the machine is busy.
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(!daemon.socket.exists(), "the vhost-user socket is left behind");
    assert!(!daemon.api.exists(), "the API socket is left behind");
}

// --- the end ---

#[test]
fn sigterm_ends_a_daemon_that_nobody_connected_to() {
    assert_ends(&mut Builder::new(RAFSD).unwrap().start().unwrap());
}

#[test]
fn sigterm_ends_a_daemon_with_a_guest() {
    for order in ORDERS {
        let (mut daemon, guest, _) = passthrough_with(small(order));
        guest.getattr(ops::ROOT).unwrap();
        assert_ends(&mut daemon);
    }
}

#[test]
fn sigterm_ends_a_daemon_under_load_and_with_reads_parked() {
    let served = Served::new(&[]);
    let (mut daemon, guest) = served.start();
    let cold = open(&guest, &format!("{LOWER}/z-cold"));
    served.registry.set(|fault| fault.stalled = true);
    for offset in 0..8u64 {
        guest
            .submit(&ops::read(cold.node, cold.fh, offset << 21, 4096))
            .unwrap();
    }
    let upper = containers(&guest);
    for _ in 0..100 {
        guest.submit(&ops::getattr(upper, None)).unwrap();
    }
    assert_ends(&mut daemon);
}

#[test]
fn sigterm_ends_a_daemon_whose_guest_has_gone() {
    let (mut daemon, guest, _) = passthrough();
    drop(guest);
    std::thread::sleep(Duration::from_millis(100));
    assert_ends(&mut daemon);
}

// --- one front-end after the other ---

#[test]
fn front_ends_come_and_go() {
    let (daemon, guest, shared) = passthrough();
    std::fs::write(shared.join("file"), "contents").unwrap();
    drop(guest);
    let mut descriptors = Vec::new();
    for round in 0..20 {
        let options = small(ORDERS[round % 2]);
        let start = Instant::now();
        let guest = loop {
            // The end of the connection before may not have been seen yet.
            match Guest::boot(&daemon.socket, options.clone()) {
                Ok(guest) => break guest,
                Err(e) => assert!(start.elapsed() < Duration::from_secs(60), "round {round}: {e}"),
            }
        };
        assert_eq!(
            guest.read_file(format!("{CONTAINERS}/file")).unwrap(),
            b"contents"
        );
        descriptors.push(daemon.descriptors().unwrap());
    }
    assert!(
        descriptors[19] <= descriptors[3],
        "descriptors leak: {descriptors:?}"
    );
}

#[test]
fn a_front_end_that_vanishes_under_load_harms_nobody() {
    let (daemon, guest, _) = passthrough();
    let upper = containers(&guest);
    let (file, fh) = guest.create(upper, "file", 0o644, 2).unwrap();
    let data = noise(3, 65536);
    for number in 0..40 {
        guest
            .submit(&ops::write(file.nodeid, fh, number * 65536, &data))
            .unwrap();
    }
    drop(guest);
    let guest = daemon.guest(small(Order::Qemu)).unwrap();
    guest.read_file(format!("{CONTAINERS}/file")).unwrap();
}

#[test]
fn a_guest_lives_on_over_a_lost_connection() {
    let (_daemon, guest, _) = passthrough_with(small(Order::CloudHypervisor));
    let upper = containers(&guest);
    let (file, fh) = guest.create(upper, "file", 0o644, 2).unwrap();
    for round in 0..5u64 {
        guest.write(file.nodeid, fh, round * 4, b"abcd").unwrap();
        let start = Instant::now();
        while let Err(e) = guest.reconnect(Restart::Available) {
            assert!(start.elapsed() < Duration::from_secs(60), "{e}");
        }
        // No INIT: nodes and handles are those of before.
        assert_eq!(guest.getattr(file.nodeid).unwrap().size, (round + 1) * 4);
        assert_eq!(guest.read(file.nodeid, fh, round * 4, 100).unwrap(), b"abcd");
    }
}

// --- sessions ---

#[test]
fn a_second_init_starts_afresh() {
    let (daemon, guest, shared) = passthrough();
    for number in 0..200 {
        std::fs::write(shared.join(number.to_string()), "x").unwrap();
    }
    let before = daemon.descriptors().unwrap();
    let upper = containers(&guest);
    let handles: Vec<(u64, u64)> = (0..200)
        .map(|number| {
            let node = guest.lookup(upper, number.to_string()).unwrap().nodeid;
            (node, guest.open(node, 0).unwrap())
        })
        .collect();
    assert!(daemon.descriptors().unwrap() >= before + 200);
    guest.init(&Init::default()).unwrap();
    for (node, fh) in handles {
        let errno = guest.read(node, fh, 0, 10).unwrap_err().errno();
        assert!(matches!(errno, Some(libc::EBADF | libc::ESTALE)), "{errno:?}");
    }
    assert!(
        daemon.descriptors().unwrap() < before + 20,
        "handles outlive their session"
    );
    assert_eq!(guest.read_file(format!("{CONTAINERS}/7")).unwrap(), b"x");
}

#[test]
fn destroy_ends_a_session_and_init_starts_another() {
    let (_daemon, guest, shared) = passthrough();
    std::fs::write(shared.join("file"), "x").unwrap();
    let file = open(&guest, &format!("{CONTAINERS}/file"));
    guest.destroy().unwrap();
    assert!(guest.read(file.node, file.fh, 0, 1).is_err());
    guest.init(&Init::default()).unwrap();
    assert!(guest.read(file.node, file.fh, 0, 1).is_err());
    assert_eq!(guest.read_file(format!("{CONTAINERS}/file")).unwrap(), b"x");
}

#[test]
fn a_guest_reboots() {
    for order in ORDERS {
        let (_daemon, guest, _) = passthrough_with(small(order));
        for round in 0..5 {
            let upper = containers(&guest);
            guest.write_file(upper, format!("{round}"), b"before").unwrap();
            for _ in 0..50 {
                guest.submit(&ops::getattr(upper, None)).unwrap();
            }
            guest.reboot().unwrap();
            guest.init(&Init::default()).unwrap();
            assert_eq!(
                guest.read_file(format!("{CONTAINERS}/{round}")).unwrap(),
                b"before"
            );
        }
    }
}

// --- rings ---

/// Writes and reads that take a while, in flight.
fn load(guest: &Guest, node: u64, fh: u64, count: u64) -> Vec<Ticket> {
    let data = noise(5, 20_000);
    let requests: Vec<_> = (0..count)
        .map(|number| match number % 3 {
            0 => ops::write(node, fh, number * 10_000, &data),
            1 => ops::read(node, fh, number * 5_000, 20_000),
            _ => ops::getattr(node, None),
        })
        .collect();
    guest.submit_all(1, &requests).unwrap()
}

#[test]
fn rings_stop_and_start_with_requests_in_flight() {
    for order in ORDERS {
        let (_daemon, guest, _) = passthrough_with(small(order));
        let upper = containers(&guest);
        let (file, fh) = guest.create(upper, "file", 0o644, 2).unwrap();
        for _ in 0..20 {
            let tickets = load(&guest, file.nodeid, fh, 40);
            let bases = guest.stop().unwrap();
            guest.check_drained(&bases).unwrap();
            let before = guest.snapshot();
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(
                guest.changed_pages(&before),
                Vec::<u64>::new(),
                "memory changed after a stop"
            );
            guest.start(&bases).unwrap();
            for ticket in tickets {
                guest.wait(ticket).unwrap().ok().unwrap();
            }
        }
        guest.wait_idle(0).unwrap();
        let counts = guest.counts();
        assert_eq!(counts.added, counts.used);
    }
}

#[test]
fn a_stop_answers_what_is_parked() {
    for order in ORDERS {
        let served = Served::new(&[]);
        let daemon = Builder::new(RAFSD).unwrap().start().unwrap();
        served.mount(&daemon, 0);
        let guest = daemon.guest(small(order)).unwrap();
        let cold = open(&guest, &format!("{LOWER}/z-cold"));
        served.registry.set(|fault| fault.stalled = true);
        let tickets: Vec<_> = (0..7u64)
            .map(|number| {
                guest
                    .submit(&ops::read(cold.node, cold.fh, number << 21, 4096))
                    .unwrap()
            })
            .collect();
        std::thread::sleep(Duration::from_millis(100));
        let start = Instant::now();
        let bases = guest.stop().unwrap();
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
        guest.check_drained(&bases).unwrap();
        let before = guest.snapshot();
        served.registry.set(|fault| fault.stalled = false);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(
            guest.changed_pages(&before),
            Vec::<u64>::new(),
            "a fetch wrote after a stop"
        );
        guest.start(&bases).unwrap();
        for (ticket, number) in tickets.into_iter().zip(0..) {
            let reply = guest.wait(ticket).unwrap();
            let at = (number as usize) << 21;
            assert!(reply.errno != 0 || reply.body == served.cold[at..at + 4096]);
        }
        let bytes = guest.read(cold.node, cold.fh, 0, 4096).unwrap();
        assert!(bytes == served.cold[..4096]);
    }
}

#[test]
fn a_pause_holds_still_and_loses_no_kick() {
    for order in ORDERS {
        let (_daemon, guest, _) = passthrough_with(small(order));
        let upper = containers(&guest);
        let (file, fh) = guest.create(upper, "file", 0o644, 2).unwrap();
        for round in 0..100 {
            let mut tickets = if round % 2 == 0 {
                load(&guest, file.nodeid, fh, 30)
            } else {
                Vec::new()
            };
            guest.pause().unwrap();
            let before = guest.snapshot();
            tickets.extend(load(&guest, file.nodeid, fh, 3));
            let used = guest.lane(1).queue.used_index();
            if round % 10 == 0 {
                std::thread::sleep(Duration::from_millis(10));
                assert_eq!(guest.lane(1).queue.used_index(), used, "a paused queue goes on");
                let rings = guest.lane(1).queue.used.address;
                let changed: Vec<u64> = guest
                    .changed_pages(&before)
                    .into_iter()
                    .filter(|page| *page == rings & !4095)
                    .collect();
                assert_eq!(
                    changed,
                    Vec::<u64>::new(),
                    "a paused queue wrote to its used ring"
                );
            }
            guest.resume().unwrap();
            for ticket in tickets {
                guest.wait(ticket).unwrap().ok().unwrap();
            }
        }
    }
}

#[test]
fn call_events_may_be_replaced_at_any_time() {
    let (_daemon, guest, _) = passthrough_with(small(Order::Qemu));
    let upper = containers(&guest);
    for _ in 0..100 {
        let tickets: Vec<_> = (0..10)
            .map(|_| guest.submit(&ops::getattr(upper, None)).unwrap())
            .collect();
        guest.replace_call(1).unwrap();
        for ticket in tickets {
            guest.wait(ticket).unwrap().ok().unwrap();
        }
    }
}

// --- memory ---

#[test]
fn memory_comes_and_goes_while_queues_run() {
    for (order, slots) in [
        (Order::Qemu, true),
        (Order::Qemu, false),
        (Order::CloudHypervisor, true),
    ] {
        let refuse = if slots {
            0
        } else {
            rafsd_frontend::message::protocol::CONFIGURE_MEM_SLOTS
        };
        let (_daemon, guest, _) = passthrough_with(Options {
            refuse_protocol: refuse,
            ..small(order)
        });
        let upper = containers(&guest);
        let (file, fh) = guest.create(upper, "file", 0o644, 2).unwrap();
        for round in 0..20u64 {
            let tickets = load(&guest, file.nodeid, fh, 20);
            let address = (2 + round) << 32;
            guest
                .add_memory(Place {
                    address,
                    size: 2 << 20,
                })
                .unwrap();
            // A reply into the new region.
            let buffer = address + 4096;
            let request = getattr_bytes(upper);
            guest.memory.write(buffer, &request);
            let chain = [
                crate::support::readable(buffer, request.len() as u32, 1),
                crate::support::writable(buffer + 4096, 120),
            ];
            guest.submit_descriptors(1, &chain).unwrap();
            for ticket in tickets {
                guest.wait(ticket).unwrap().ok().unwrap();
            }
            guest.wait_idle(1).unwrap();
            let reply = guest.memory.copy(buffer + 4096, 16);
            assert_eq!(reply[..4], 120u32.to_le_bytes(), "the reply is in the new region");
            guest.remove_memory(address).unwrap();
        }
    }
}

fn getattr_bytes(node: u64) -> Vec<u8> {
    crate::support::message(rafsd_frontend::abi::opcode::GETATTR, node, &[0; 16])
}

#[test]
fn the_dirty_log_is_exactly_what_changed() {
    for order in ORDERS {
        let served = Served::new(&[]);
        let daemon = Builder::new(RAFSD).unwrap().start().unwrap();
        served.mount(&daemon, 0);
        let guest = daemon.guest(small(order)).unwrap();
        if !guest
            .vmm()
            .has_protocol(rafsd_frontend::message::protocol::LOG_SHMFD)
        {
            panic!("LOG_SHMFD is not offered");
        }
        let cold = open(&guest, &format!("{LOWER}/z-cold"));
        let upper = containers(&guest);
        let (file, fh) = guest.create(upper, "file", 0o644, 2).unwrap();
        guest.write(file.nodeid, fh, 0, &noise(9, 200_000)).unwrap();
        guest.wait_idle(0).unwrap();
        guest.log().unwrap();
        for round in 0..6u64 {
            // Buffers whose old contents differ from the answers, so that every write is a change.
            let old = guest.memory.allocate(4096, 4096).unwrap();
            guest.memory.release(old, 4096);
            guest.vmm().dirty_pages();
            let mut wanted = std::collections::BTreeSet::new();
            let mut chains = Vec::new();
            for (number, request) in [
                ops::read(cold.node, cold.fh, round << 20, 70_000),
                ops::read(file.nodeid, fh, round * 1000, 30_000),
                ops::getattr(upper, None),
            ]
            .iter()
            .enumerate()
            {
                let bytes = crate::support::message(request.opcode, request.nodeid, &request.args.concat());
                let room = 16 + request.room.unwrap();
                let address = guest.memory.allocate(bytes.len() + 4096 + room, 4096).unwrap();
                let answer = address + 4000 + number as u64 * 16;
                guest.memory.write(address, &bytes);
                guest.memory.fill(answer, room, 0xa5);
                chains.push((address, bytes.len() + 4096 + room, answer, room));
                let chain = [
                    crate::support::readable(address, bytes.len() as u32, 1),
                    crate::support::writable(answer, room as u32),
                ];
                guest.submit_descriptors(1, &chain).unwrap();
            }
            guest.wait_idle(1).unwrap();
            for (_, _, answer, room) in &chains {
                let len = guest.memory.copy(*answer, 4);
                let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as u64;
                assert_eq!(len, *room as u64);
                wanted.extend((answer / 4096..=(answer + len - 1) / 4096).map(|page| page * 4096));
            }
            let used = guest.lane(1).queue.used.clone();
            let rings = used.address..used.address + used.len() as u64;
            // The ring's page changes with every reply, and so may its notification fields.
            let logged: std::collections::BTreeSet<u64> = guest.vmm().dirty_pages().into_iter().collect();
            assert!(
                logged.iter().any(|page| rings.contains(page)),
                "the used ring is not logged"
            );
            let data: std::collections::BTreeSet<u64> =
                logged.into_iter().filter(|page| !rings.contains(page)).collect();
            assert_eq!(data, wanted, "round {round}");
            for (address, len, _, _) in chains {
                guest.memory.release(address, len);
            }
            if round == 3 {
                // The log is swapped; nothing goes to the old one any more.
                let before = guest.log().unwrap().unwrap();
                before.take();
                guest.getattr(upper).unwrap();
                assert_eq!(before.take(), Vec::<u64>::new());
            }
        }
        guest.stop_log().unwrap();
        guest.getattr(upper).unwrap();
    }
}

#[test]
fn a_reset_device_can_be_set_up_again() {
    let (_daemon, guest, _) = passthrough_with(small(Order::Qemu));
    if !guest
        .vmm()
        .has_protocol(rafsd_frontend::message::protocol::RESET_DEVICE)
    {
        panic!("RESET_DEVICE is not offered");
    }
    for _ in 0..5 {
        let upper = containers(&guest);
        for _ in 0..20 {
            guest.submit(&ops::getattr(upper, None)).unwrap();
        }
        guest.stop().unwrap();
        guest.vmm().reset_device().unwrap();
        guest.reset_rings();
        guest.start(&[0, 0]).unwrap();
        guest.init(&Init::default()).unwrap();
    }
}

// --- sockets ---

#[test]
fn sockets_of_a_dead_daemon_are_replaced() {
    let (mut daemon, _guest, _) = passthrough();
    daemon.kill().unwrap();
    assert!(daemon.socket.exists() && daemon.api.exists());
    let daemon = daemon.restart(RAFSD).unwrap();
    daemon
        .guest(Options::default())
        .unwrap()
        .getattr(ops::ROOT)
        .unwrap();
}

#[test]
fn sockets_of_a_living_daemon_are_not_stolen() {
    let (daemon, guest, _) = passthrough();
    let mut second = std::process::Command::new(RAFSD)
        .args(["virtiofs", "--sock"])
        .arg(&daemon.socket)
        .arg("--apisock")
        .arg(daemon.directory().join("other.sock"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = second.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(60) {
            second.kill().unwrap();
            second.wait().unwrap();
            panic!("a second daemon runs on the same socket");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(1));
    guest.getattr(ops::ROOT).unwrap();
    drop(guest);
    daemon.guest(Options::default()).unwrap();
}

#[test]
fn a_file_in_the_place_of_a_socket_is_left_alone() {
    let builder = Builder::new(RAFSD).unwrap();
    let path = builder.directory().join("vhost.sock");
    std::fs::write(&path, "precious").unwrap();
    let mut daemon = builder.spawn().unwrap();
    let status = daemon.wait_end(Duration::from_secs(60)).unwrap();
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    assert_eq!(std::fs::read_to_string(path).unwrap(), "precious");
}
