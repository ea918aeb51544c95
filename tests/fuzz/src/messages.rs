//! FUSE messages in well-formed chains: any operation, any arguments, any lengths.

use rafsd_frontend::vring::{Descriptor, NEXT, WRITE};

use crate::machine::{DATA, Machine, REGION, machine};
use crate::script::Script;

/// Requests in flight at a time.
const REQUESTS: usize = 12;
/// Room for one request, and for one answer with a margin that must stay as it is.
const PLACE: u64 = REGION / 16;
const MARGIN: usize = 64;
const UNTOUCHED: u8 = 0xA5;
const IN_HEADER: usize = 40;

/// Operations without an answer: FORGET, INTERRUPT, BATCH_FORGET.
const SILENT: [u32; 3] = [2, 36, 42];
/// DESTROY: ends the session, so that nothing behind it would be looked at.
const DESTROY: u32 = 38;

const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    5,
    4096,
    65_536,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
    666,
];

const NAMES: [&[u8]; 16] = [
    b"file",
    b"a",
    b"none",
    b"absent",
    b"large",
    b"",
    b".",
    b"..",
    b"...",
    b"a/b",
    b"/",
    b"/etc/passwd",
    b"user.a",
    b"security.x",
    &[b'x'; 255],
    &[b'x'; 256],
];

/// One request as it lies in memory, and what the guest expects of its answer.
struct Message {
    opcode: u32,
    unique: u64,
    answer: u64,
    room: u32,
}

fn arguments(machine: &Machine, script: &mut Script<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..24 {
        match script.u8() {
            0 => break,
            kind @ 1..=63 => {
                let number = NUMBERS[usize::from(kind) % NUMBERS.len()];
                bytes.extend_from_slice(&number.to_le_bytes()[..if kind & 32 != 0 { 4 } else { 8 }]);
            }
            kind @ 64..=127 => {
                bytes.extend_from_slice(NAMES[usize::from(kind) % NAMES.len()]);
                // The NUL is sometimes missing.
                bytes.extend_from_slice(&[0][..usize::from(kind != 127)]);
            }
            128..=159 => bytes.extend_from_slice(&script.u32().to_le_bytes()),
            160..=191 => bytes.extend_from_slice(&script.u64().to_le_bytes()),
            192..=223 => {
                let node = machine.nodes[script.below(machine.nodes.len())];
                bytes.extend_from_slice(&node.to_le_bytes());
            }
            224..=239 => bytes.resize(bytes.len() + script.below(9000), script.u8()),
            _ => bytes.push(script.u8()),
        }
    }
    bytes.truncate(PLACE as usize / 2);
    bytes
}

/// Puts `length` bytes at `address` into pieces as the script says.
fn pieces(script: &mut Script<'_>, address: u64, length: u32, flags: u16) -> Vec<Descriptor> {
    let mut list = Vec::new();
    let mut at = 0;
    while at < length && list.len() < 3 && script.flag() {
        let piece = (1 + u32::from(script.u8())).min(length - at);
        list.push((at, piece));
        at += piece;
    }
    if at < length {
        list.push((at, length - at));
    }
    list.iter()
        .map(|(at, len)| Descriptor {
            address: address + u64::from(*at),
            len: *len,
            flags,
            next: 0,
        })
        .collect()
}

fn submit(machine: &Machine, script: &mut Script<'_>, number: usize) -> Option<(usize, u16, Message)> {
    let opcode = match script.u8() {
        kind @ 0..=63 => u32::from(kind),
        kind @ 64..=191 => u32::from(kind % 53),
        _ => script.u32(),
    };
    let opcode = if opcode == DESTROY && number > 2 {
        3
    } else {
        opcode
    };
    let nodeid = machine.nodes[script.below(machine.nodes.len())];
    let unique = 1_000_001 + number as u64;
    let body = arguments(machine, script);
    let length = IN_HEADER + body.len();
    let claimed = match script.u8() {
        0 => script.u32(),
        1 => (length as u32).wrapping_add(1),
        2 => (length as u32).saturating_sub(u32::from(script.u8())),
        _ => length as u32,
    };
    let extension = match script.u8() {
        kind @ 0..=3 => u16::from(kind) * 4,
        4 => script.u16(),
        _ => 0,
    };
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(&claimed.to_le_bytes());
    bytes.extend_from_slice(&opcode.to_le_bytes());
    bytes.extend_from_slice(&unique.to_le_bytes());
    bytes.extend_from_slice(&nodeid.to_le_bytes());
    bytes.extend_from_slice(&[0; 12]);
    bytes.extend_from_slice(&extension.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&body);
    let room = [0, 8, 15, 16, 24, 120, 144, 160, 176, 304, 4096, 20_000][script.below(12)];

    let place = number as u64 * PLACE;
    let answer = DATA + REGION + place;
    // Some requests lie across the border of the two regions.
    let request = match script.u8() {
        0 if number == 0 => DATA + REGION - IN_HEADER as u64 / 2,
        _ => DATA + place,
    };
    let answer = if request + length as u64 > answer {
        answer + PLACE / 2
    } else {
        answer
    };
    machine.memory().write(request, &bytes);
    machine.memory().fill(answer, room as usize + MARGIN, UNTOUCHED);
    let mut chain = pieces(script, request, length as u32, 0);
    chain.extend(pieces(script, answer, room, WRITE));
    let last = chain.len() - 1;
    for (index, descriptor) in chain.iter_mut().enumerate() {
        if index < last {
            descriptor.flags |= NEXT;
            descriptor.next = index as u16 + 1;
        }
    }
    let queue = usize::from(script.u8() != 0);
    let head = machine.guest.submit_descriptors(queue, &chain).ok()?;
    let message = Message {
        opcode,
        unique,
        answer,
        room,
    };
    Some((queue, head, message))
}

fn check(machine: &Machine, message: &Message, used: u32) {
    let Message {
        opcode,
        unique,
        answer,
        room,
    } = *message;
    let behind = machine.memory().copy(answer + u64::from(room), MARGIN);
    assert!(
        behind.iter().all(|byte| *byte == UNTOUCHED),
        "operation {opcode} wrote behind its room of {room}"
    );
    assert!(used <= room, "operation {opcode} used {used} of {room} bytes");
    if used == 0 {
        return;
    }
    assert!(!SILENT.contains(&opcode), "operation {opcode} was answered");
    assert!(used >= 16, "operation {opcode} has an answer of {used} bytes");
    let header = machine.memory().copy(answer, 16);
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    assert_eq!(word(0), used, "operation {opcode}");
    let error = word(4) as i32;
    assert!(
        (-511..=0).contains(&error),
        "operation {opcode} has the error {error}"
    );
    assert!(
        error == 0 || used == 16,
        "operation {opcode} has an error and {used} bytes"
    );
    assert_eq!(u64::from(word(8)) | u64::from(word(12)) << 32, unique);
}

/// Sends what `input` says, and looks at the answers.
pub fn run(input: &[u8]) {
    let machine = &*machine();
    let mut script = Script::new(input);
    let mut sent = Vec::new();
    for number in 0..REQUESTS {
        if script.is_empty() {
            break;
        }
        sent.extend(submit(machine, &mut script, number));
    }
    let back = machine.settle();
    assert_eq!(back.len(), sent.len());
    for (queue, head, message) in sent {
        let found = back
            .iter()
            .find(|(from, used)| (*from, used.head) == (queue, head));
        check(machine, &message, found.expect("a head came back").1.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_answered() {
        for opcode in 0..=63u8 {
            // Node, eight numbers and a name; all else plain.
            run(&[opcode, 2, 1, 3, 5, 2, 34, 33, 1, 64, 64, 0, 9, 9, 11, 9]);
            run(&[opcode, 21, 4, 64, 65, 9, 8, 0, 9, 9, 10, 9]);
        }
        run(&[]);
        run(&[0xFF; 300]);
    }

    /// What the target has found.
    #[test]
    fn findings() {
        // A BATCH_FORGET whose length lies was answered, where the guest expects no answer.
        run(b"*~\xd6\0\0\0\0\0\0\0\0t\0\0\0~");
    }
}
