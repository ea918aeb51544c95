//! A device comes to a running machine and goes again. The daemon stays, for the device may come back.

use rafsd_frontend::ops;

use crate::machine::Machine;
use crate::twins::{self, Work};

#[test]
fn twin() {
    let (mut daemon, shared) = twins::daemon();
    for round in 0..4 {
        // Added: connected, activated by the guest's driver, mounted.
        let guest = twins::boot(&daemon);
        let mut work = Work::new(&guest, &format!("file-{round}"));
        let tickets = work.start(&guest);
        work.finish(&guest, tickets);
        if round % 2 == 0 {
            // Removed in order: the driver lets go, rings are stopped, the connection ends.
            guest.destroy().unwrap();
            let bases = guest.stop().unwrap();
            guest.check_drained(&bases).unwrap();
        } else {
            // Taken away with requests in flight.
            work.start(&guest);
            guest.submit(&ops::getattr(work.node, None)).unwrap();
        }
        drop(guest);
        assert!(daemon.is_alive());
    }
    let guest = twins::boot(&daemon);
    assert_eq!(std::fs::read_dir(&shared).unwrap().count(), 4);
    assert_eq!(guest.list(ops::ROOT, true, 4096).unwrap().len(), 6);
}

#[test]
fn real() {
    let Some(mut machine) = Machine::start("hot_plug") else {
        return;
    };
    let (second, directory) = twins::daemon();
    std::fs::write(directory.join("file"), "on the second device\n").unwrap();
    for _ in 0..2 {
        let body = serde_json::json!({
            "id": "second", "tag": "second", "socket": second.socket, "num_queues": 1, "queue_size": 1024,
        });
        machine.ask("add-fs", &body.to_string());
        let text = machine.run(
            "until mount -t virtiofs second /mnt/second 2>/dev/null; do usleep 50000; done
             cat /mnt/second/file; umount /mnt/second",
        );
        assert_eq!(text, "on the second device\n");
        machine.ask("remove-device", r#"{"id":"second"}"#);
        machine.run(
            "while ls /sys/fs/virtiofs/*/tag 2>/dev/null | xargs grep -qs second; do usleep 50000; done",
        );
    }
    machine.end();
}
