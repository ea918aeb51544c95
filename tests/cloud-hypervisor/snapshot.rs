//! A paused machine is saved: rings are stopped, their bases noted. The same machine goes on from there, or another one is
//! made of what was saved, on a new connection, and goes on with the session that the daemon kept.

use std::time::Duration;

use rafsd_frontend::vmm::Restart;

use crate::machine::Machine;
use crate::twins::{self, Work};

#[test]
fn twin() {
    let (daemon, _) = twins::daemon();
    let guest = twins::boot(&daemon);
    let mut work = Work::new(&guest, "file");
    for round in 0..6 {
        let tickets = work.start(&guest);
        guest.pause().unwrap();
        let bases = guest.stop().unwrap();
        guest.check_drained(&bases).unwrap();
        let saved = guest.snapshot();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(
            guest.changed_pages(&saved),
            Vec::<u64>::new(),
            "memory changed while it was saved"
        );
        if round % 2 == 0 {
            // The snapshot is done, the machine resumes: a full set-up at the saved bases, on the same connection.
            guest.start(&bases).unwrap();
        } else {
            // The machine ends; another one has its memory and its bases.
            twins::until(|| guest.reconnect(Restart::Used));
        }
        work.finish(&guest, tickets);
    }
    twins::assert_idle(&guest);
}

#[test]
fn real() {
    let Some(mut machine) = Machine::start("snapshot") else {
        return;
    };
    let job = machine.begin(
        "for i in $(seq 60); do dd if=/dev/urandom of=/mnt/shared/data bs=64k count=8 conv=fsync 2>/dev/null || exit 1
         usleep 50000; done; echo done",
    );
    machine.ask("pause", "");
    let directory = machine.snapshot();
    machine.ask("resume", "");
    assert_eq!(machine.finish(job), "done\n");
    // Restored beside the same daemon, from a moment when nothing was in flight.
    machine.ask("pause", "");
    let again = machine.snapshot();
    machine.restore(&again);
    assert_eq!(machine.run("echo restored"), "restored\n");
    machine.end();
    drop(directory);
}
