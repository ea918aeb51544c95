//! A source that stalls delays the readers of what it holds, and nobody else.

use std::time::{Duration, Instant};

use crate::support::{CONTAINERS, LOWER, Served, containers, open};
use rafsd_frontend::ops;

/// Far from anything that is fetched along with other chunks.
const FAR: u64 = 12 << 20;
/// Time that a parked READ may take.
const DEADLINE: Duration = Duration::from_secs(30);
const SIZE: u32 = 128 << 10;

fn until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_stalled_registry_delays_only_who_needs_it() {
    let served = Served::new(&[]);
    let (_daemon, guest) = served.start();
    assert_eq!(guest.read_file(format!("{LOWER}/a-warm")).unwrap(), served.warm);
    let warm = open(&guest, &format!("{LOWER}/a-warm"));
    let cold = open(&guest, &format!("{LOWER}/z-cold"));
    let top = guest.resolve(LOWER).unwrap().nodeid;
    let upper = containers(&guest);
    let (file, fh) = guest.create(upper, "log", 0o644, 2).unwrap();

    served.registry.set(|fault| fault.stalled = true);
    let before = served.registry.requests();
    let parked = guest.submit(&ops::read(cold.node, cold.fh, FAR, SIZE)).unwrap();
    until("the daemon asks the registry", || {
        served.registry.requests() > before
    });

    let mut rounds = 0;
    while rounds < 60 {
        let round = Instant::now();
        assert_eq!(guest.write(file.nodeid, fh, rounds * 5, b"line\n").unwrap(), 5);
        guest.lookup(top, "z-cold").unwrap();
        let missing = guest.lookup(top, format!("missing-{rounds}"));
        assert!(missing.map_or_else(|e| e.errno() == Some(libc::ENOENT), |entry| entry.nodeid == 0));
        assert_eq!(guest.read(warm.node, warm.fh, 0, 65536).unwrap(), served.warm);
        assert!(round.elapsed() < Duration::from_secs(5), "{:?}", round.elapsed());
        assert!(guest.poll(parked).unwrap().is_none());
        rounds += 1;
        std::thread::sleep(Duration::from_millis(20));
    }

    served.registry.set(|fault| fault.stalled = false);
    let bytes = guest
        .wait_for(parked, Duration::from_secs(60))
        .unwrap()
        .ok()
        .unwrap();
    assert!(
        bytes == served.cold[FAR as usize..][..SIZE as usize],
        "the parked READ gave other bytes"
    );
}

#[test]
fn many_parked_reads_complete_out_of_order_and_once() {
    let served = Served::new(&["--chunk-size", "64KiB"]);
    let (_daemon, guest) = served.start();
    let cold = open(&guest, &format!("{LOWER}/z-cold"));
    served.registry.set(|fault| fault.stalled = true);
    let offsets: Vec<u64> = (0..64).map(|number| number * (200 << 10) + 1000).collect();
    let tickets: Vec<_> = offsets
        .iter()
        .map(|offset| {
            guest
                .submit(&ops::read(cold.node, cold.fh, *offset, 70_000))
                .unwrap()
        })
        .collect();
    let top = guest.resolve(CONTAINERS).unwrap().nodeid;
    for _ in 0..200 {
        guest.getattr(top).unwrap();
    }
    assert!(
        tickets
            .iter()
            .all(|ticket| guest.poll(*ticket).unwrap().is_none())
    );
    served.registry.set(|fault| fault.stalled = false);
    for (ticket, offset) in tickets.into_iter().zip(offsets) {
        let bytes = guest.wait(ticket).unwrap().ok().unwrap();
        assert!(
            bytes == served.cold[offset as usize..][..70_000],
            "other bytes at {offset}"
        );
    }
}

#[test]
fn a_registry_gone_for_good_is_an_error_by_the_deadline() {
    let served = Served::new(&[]);
    let (_daemon, guest) = served.start();
    assert_eq!(guest.read_file(format!("{LOWER}/a-warm")).unwrap(), served.warm);
    let cold = open(&guest, &format!("{LOWER}/z-cold"));
    served.registry.vanish();
    let start = Instant::now();
    let parked = guest.submit(&ops::read(cold.node, cold.fh, FAR, SIZE)).unwrap();
    let upper = containers(&guest);
    let reply = loop {
        if let Some(reply) = guest.poll(parked).unwrap() {
            break reply;
        }
        assert!(
            start.elapsed() < DEADLINE + Duration::from_secs(30),
            "no answer by the deadline"
        );
        guest.getattr(upper).unwrap();
        assert_eq!(guest.read_file(format!("{LOWER}/a-warm")).unwrap(), served.warm);
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(reply.errno, libc::EIO);
    // What is resident stays readable.
    assert_eq!(guest.read_file(format!("{LOWER}/a-warm")).unwrap(), served.warm);
}
