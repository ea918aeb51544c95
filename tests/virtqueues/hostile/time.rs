//! What takes time: memory that changes under our feet, storms and floods.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{HOLE, Victim, with};
use crate::support::{LOWER, RAFSD, Served, containers, message, open, readable, writable};
use rafsd_frontend::Options;
use rafsd_frontend::abi::{Writer, opcode};
use rafsd_frontend::daemon::Builder;
use rafsd_frontend::memory::PAGE;
use rafsd_frontend::ops::{self, Request};
use rafsd_frontend::random::Random;
use rafsd_frontend::vring::{INDIRECT, NEXT, WRITE};

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
