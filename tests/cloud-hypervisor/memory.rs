//! Memory is added to a running machine, region by region, or as a whole table where slots are not negotiated.

use rafsd_frontend::memory::Place;
use rafsd_frontend::message::protocol;
use rafsd_frontend::ops;
use rafsd_frontend::vring::{Descriptor, NEXT, WRITE};
use rafsd_frontend::{Guest, Options};

use crate::machine::Machine;
use crate::twins::{self, Work};

/// A GETATTR of the root whose request and answer lie at `address`.
fn getattr_at(guest: &Guest, address: u64) {
    let request = ops::getattr(ops::ROOT, None);
    let header = rafsd_frontend::abi::InHeader {
        len: 56,
        opcode: request.opcode,
        unique: 9,
        nodeid: ops::ROOT,
        ..Default::default()
    };
    guest
        .memory
        .write(address, &[header.bytes(), vec![0; 16]].concat());
    let chain = [
        Descriptor {
            address,
            len: 56,
            flags: NEXT,
            next: 1,
        },
        Descriptor {
            address: address + 4096,
            len: 120,
            flags: WRITE,
            next: 0,
        },
    ];
    guest.submit_descriptors(1, &chain).unwrap();
    guest.wait_idle(1).unwrap();
    assert_eq!(guest.memory.copy(address + 4096, 8), [120, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn twin() {
    let (daemon, _) = twins::daemon();
    for refused in [0, protocol::CONFIGURE_MEM_SLOTS] {
        let options = Options {
            refuse_protocol: refused,
            ..twins::options()
        };
        let guest = twins::until(|| Guest::boot(&daemon.socket, options.clone()));
        let mut work = Work::new(&guest, &format!("file-{refused}"));
        // More regions than a table without slots had room for.
        for number in 0..12 {
            let tickets = work.start(&guest);
            let address = (2 + number) << 32;
            let size = 2 << 20;
            if refused == 0 || number < 5 {
                guest.add_memory(Place { address, size }).unwrap();
                getattr_at(&guest, address);
                getattr_at(&guest, address + size - 8192);
            }
            work.finish(&guest, tickets);
        }
        twins::assert_idle(&guest);
    }
}

#[test]
fn real() {
    let Some(mut machine) = Machine::start("memory") else {
        return;
    };
    let before: u64 = machine
        .run("awk '/MemTotal/{print $2}' /proc/meminfo")
        .trim()
        .parse()
        .unwrap();
    machine.ask("resize", &format!(r#"{{"desired_ram":{}}}"#, 1024 << 20));
    machine.run(
        "for block in /sys/devices/system/memory/memory*/online; do echo 1 >$block 2>/dev/null; done; true",
    );
    let after: u64 = machine
        .run("awk '/MemTotal/{print $2}' /proc/meminfo")
        .trim()
        .parse()
        .unwrap();
    assert!(after > before + (256 << 10), "{before} KiB, then {after} KiB");
    // More than the old memory has room for, so that the new one is used.
    let text = machine.run(
        "mkdir /big; mount -t tmpfs -o size=90% tmpfs /big; dd if=/dev/urandom of=/big/one bs=1M count=500 2>/dev/null
         cp /big/one /mnt/shared/one; cmp /big/one /mnt/shared/one && echo same",
    );
    assert_eq!(text, "same\n");
    machine.end();
}
