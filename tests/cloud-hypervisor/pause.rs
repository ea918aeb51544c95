//! Pause and resume: the program disables the rings and enables them again, and nothing may be lost in between.

use std::time::Duration;

use rafsd_frontend::ops;

use crate::machine::Machine;
use crate::twins::{self, Work};

#[test]
fn twin() {
    let (daemon, _) = twins::daemon();
    let guest = twins::boot(&daemon);
    let mut work = Work::new(&guest, "file");
    for round in 0..60 {
        let tickets = work.start(&guest);
        guest.pause().unwrap();
        // Kicked while it is paused: the kick must not be lost.
        let late = guest.submit(&ops::getattr(work.node, None)).unwrap();
        if round % 15 == 0 {
            let before = guest.snapshot();
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(
                guest.changed_pages(&before),
                Vec::<u64>::new(),
                "memory of a paused machine changed"
            );
            assert!(guest.poll(late).unwrap().is_none());
        }
        guest.resume().unwrap();
        assert_eq!(guest.wait(late).unwrap().errno, 0);
        work.finish(&guest, tickets);
    }
    twins::assert_idle(&guest);
}

#[test]
fn real() {
    let Some(mut machine) = Machine::start("pause") else {
        return;
    };
    let job = machine.begin(
        "for i in $(seq 100); do dd if=/dev/urandom of=/mnt/shared/data bs=64k count=8 conv=fsync 2>/dev/null || exit 1
         sha256sum /mnt/shared/data >/dev/null || exit 1; done; echo done",
    );
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(100));
        machine.ask("pause", "");
        std::thread::sleep(Duration::from_millis(50));
        machine.ask("resume", "");
    }
    assert_eq!(machine.finish(job), "done\n");
    machine.end();
}
