//! Requests at random.

use super::{HOLE, Victim, with};
use crate::support::{CONTAINERS, containers, message, open};
use rafsd_frontend::abi::opcode;
use rafsd_frontend::memory::PAGE;
use rafsd_frontend::ops;
use rafsd_frontend::random::Random;
use rafsd_frontend::vring::{Descriptor, WRITE};

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
