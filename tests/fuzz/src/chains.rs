//! Descriptor chains: loops, overlaps, holes, tables in tables, all lengths; what lies in them is mostly a good request.

use rafsd_frontend::vring::{Descriptor, INDIRECT, NEXT, WRITE};

use crate::machine::{DATA, Machine, REGION, machine};
use crate::script::Script;

/// Chains in flight at a time.
const CHAINS: usize = 8;
/// Good requests lie here, each in a page of its own.
const REQUESTS: u64 = DATA;
/// Tables of descriptors are made here.
const TABLES: u64 = DATA + REGION / 2;
const TABLE: u64 = 4096;
/// Answers go here.
const ANSWERS: u64 = DATA + REGION + REGION / 2;
/// Where nothing is.
const HOLE: u64 = DATA + 64 * REGION;

/// GETATTR, LOOKUP, READ, WRITE, READDIRPLUS, FORGET, GETXATTR, BATCH_FORGET, OPEN, SETLKW, INIT, STATX.
const OPERATIONS: [u32; 12] = [3, 1, 15, 16, 44, 2, 22, 42, 14, 33, 26, 52];

fn requests(machine: &Machine, script: &mut Script<'_>) {
    for (number, opcode) in OPERATIONS.iter().enumerate() {
        let nodeid = machine.nodes[script.below(machine.nodes.len())];
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&104u32.to_le_bytes());
        bytes.extend_from_slice(&opcode.to_le_bytes());
        bytes.extend_from_slice(&7u64.to_le_bytes());
        bytes.extend_from_slice(&nodeid.to_le_bytes());
        bytes.extend_from_slice(&[0; 16]);
        bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0]);
        bytes.extend_from_slice(&[b'n'; 40]);
        bytes.extend_from_slice(&[0; 64]);
        machine.memory().write(REQUESTS + number as u64 * 4096, &bytes);
    }
}

fn descriptor(machine: &Machine, script: &mut Script<'_>, index: usize) -> Descriptor {
    let kind = script.u8();
    let plain = kind >= 64;
    // Most are as they should be: a request, then room, the last one without a successor.
    let write = if plain { index > 0 } else { kind & 1 != 0 };
    let address = match script.u8() {
        0 => HOLE,
        1 => DATA + REGION - u64::from(script.u8()),
        2 => DATA + 2 * REGION - u64::from(script.u8()),
        3 => script.u64(),
        4 => TABLES + u64::from(script.u16()),
        5 => REQUESTS + u64::from(script.u16()),
        _ if write => ANSWERS + index as u64 * 4096,
        choice => REQUESTS + u64::from(choice) % OPERATIONS.len() as u64 * 4096,
    };
    let len = match script.u8() {
        0 => script.u32(),
        1 => u32::MAX,
        2 => 0,
        choice @ 3..=40 => u32::from(choice),
        41 => u32::from(script.u16()),
        42 => 9 << 20,
        _ if write => 400,
        _ => 104,
    };
    let flags = match kind {
        0..=15 => u16::from(script.u8()) | u16::from(script.u8()) << 8,
        16..=31 => INDIRECT,
        _ => (if write { WRITE } else { 0 }) | (if kind & 2 != 0 { NEXT } else { 0 }),
    };
    let next = match script.u8() {
        0 => script.u16(),
        choice @ 1..=8 => u16::from(choice) - 1,
        _ => index as u16 + 1,
    };
    machine.tamed(Descriptor {
        address,
        len,
        flags,
        next,
    })
}

/// Makes a table of descriptors and returns the descriptor that names it.
fn table(machine: &Machine, script: &mut Script<'_>, number: usize) -> Descriptor {
    let address = TABLES + number as u64 * TABLE;
    let count = 1 + script.below(8);
    for index in 0..count {
        let entry = descriptor(machine, script, index);
        machine
            .memory()
            .write(address + 16 * index as u64, &entry.bytes());
    }
    let len = match script.u8() {
        0 => u32::from(script.u16()),
        1 => u32::MAX,
        _ => 16 * count as u32,
    };
    Descriptor {
        address: address + u64::from(script.u8() == 0) * 8,
        len,
        flags: INDIRECT,
        next: 0,
    }
}

/// Makes the chains available that `input` says; all of them must come back, and the device must serve on.
pub fn run(input: &[u8]) {
    let machine = &*machine();
    let mut script = Script::new(input);
    requests(machine, &mut script);
    let mut sent = 0;
    for number in 0..CHAINS {
        if script.is_empty() {
            break;
        }
        let mut chain = Vec::new();
        let count = 1 + script.below(6);
        while chain.len() < count {
            let indirect = script.u8();
            if indirect < 48 {
                chain.push(table(machine, &mut script, number));
            } else {
                let index = chain.len();
                chain.push(descriptor(machine, &mut script, index));
            }
        }
        let queue = usize::from(script.u8() != 0);
        sent += usize::from(machine.guest.submit_descriptors(queue, &chain).is_ok());
    }
    let back = machine.settle();
    assert_eq!(back.len(), sent);
    for (_, used) in back {
        // A chain has at most 8 MiB in each direction.
        assert!(used.len <= 8 << 20, "{} bytes used", used.len);
    }
    machine.guest.getattr(1).expect("the device serves on");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_and_bad_chains_come_back() {
        run(&[]);
        run(&[0; 400]);
        run(&[0xFF; 400]);
        for seed in 0..200u32 {
            let bytes: Vec<u8> = (0..300u32)
                .map(|at| ((at + 1).wrapping_mul(seed.wrapping_mul(2_654_435_761) | 1) >> 13) as u8)
                .collect();
            run(&bytes);
        }
    }
}
