//! Descriptors and rings that no driver makes.

use super::{BORDER, HOLE, Victim, options, with};
use crate::support::{passthrough_with, readable, writable};
use rafsd_frontend::memory::PAGE;
use rafsd_frontend::ops;
use rafsd_frontend::vring::{Descriptor, INDIRECT, NEXT, WRITE};

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
