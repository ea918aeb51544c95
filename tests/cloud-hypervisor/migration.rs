//! The first half of a migration: pages that the device writes are logged, in a new log each round. The second half, the
//! transfer of the device's state, is refused by not being offered.

use rafsd_frontend::message::protocol;
use rafsd_frontend::ops;

use crate::machine::Machine;
use crate::twins::{self, Work};

#[test]
fn twin() {
    let (daemon, _) = twins::daemon();
    let guest = twins::boot(&daemon);
    let mut work = Work::new(&guest, "file");
    assert!(guest.vmm().has_protocol(protocol::LOG_SHMFD));
    assert!(!guest.vmm().has_protocol(protocol::DEVICE_STATE));
    let tickets = work.start(&guest);
    guest.log().unwrap();
    work.finish(&guest, tickets);
    twins::assert_idle(&guest);
    for _ in 0..5 {
        guest.vmm().dirty_pages();
        let before = guest.snapshot();
        let tickets = work.start(&guest);
        work.finish(&guest, tickets);
        twins::assert_idle(&guest);
        let logged = guest.vmm().dirty_pages();
        // The guest wrote requests; what the device wrote are answers and used rings.
        let used = guest.lane(1).queue.used.clone();
        let rings = used.address & !4095;
        assert!(guest.changed_pages(&before).contains(&rings));
        assert!(
            logged.contains(&rings),
            "the used ring changed and was not logged"
        );
        // The next round has a log of its own, and the one before is not touched any more.
        let old = guest.log().unwrap().unwrap();
        old.take();
        guest.getattr(ops::ROOT).unwrap();
        assert_eq!(old.take(), Vec::<u64>::new());
    }
    // Cancelled: the machine goes on, without a log.
    guest.stop_log().unwrap();
    let tickets = work.start(&guest);
    work.finish(&guest, tickets);
}

#[test]
fn real() {
    let Some(mut machine) = Machine::start("migration") else {
        return;
    };
    // To a socket where nobody listens: whatever the program makes of it, the guest goes on.
    let target = machine.shared().parent().unwrap().join("nobody.sock");
    let body = serde_json::json!({ "destination_url": format!("unix:{}", target.display()), "local": true });
    machine.try_ask("send-migration", &body.to_string());
    machine.try_ask("resume", "");
    assert_eq!(machine.run("echo still here"), "still here\n");
    machine.end();
}
