//! The connection is lost. The program connects to the same path again, for up to a minute, and sets the protocol features
//! of before without asking. Rings go on at the available index: what was in flight is lost, what comes is served.

use rafsd_frontend::ops::{self, Init};
use rafsd_frontend::vmm::Restart;

use crate::machine::Machine;
use crate::twins::{self, RAFSD, Work};

#[test]
fn twin() {
    let (mut daemon, _) = twins::daemon();
    let guest = twins::boot(&daemon);
    let mut work = Work::new(&guest, "file");
    for _ in 0..5 {
        let tickets = work.start(&guest);
        work.finish(&guest, tickets);
        twins::until(|| guest.reconnect(Restart::Available));
        // The guest knows nothing of it: no INIT, and nodes and handles are those of before.
    }
    assert_eq!(guest.getattr(work.node).unwrap().nlink, 1);

    // A daemon that was killed and started again has forgotten the session: it says so, and the guest can begin anew.
    daemon.kill().unwrap();
    let daemon = daemon.restart(RAFSD).unwrap();
    let shared = daemon.directory().join("shared");
    daemon.mount_passthrough("/", &shared).unwrap();
    twins::until(|| guest.reconnect(Restart::Available));
    for _ in 0..3 {
        assert_eq!(guest.errno(&ops::getattr(work.node, None)).unwrap(), libc::EIO);
    }
    guest.init(&Init::default()).unwrap();
    assert!(guest.resolve("/file").is_ok());
    twins::assert_idle(&guest);
}

#[test]
fn real() {
    let Some(mut machine) = Machine::start("reconnect") else {
        return;
    };
    machine.run("echo before >/mnt/shared/file");
    machine.restart_daemon();
    // The guest's commands come over the device: it mounts again when it is told EIO.
    assert_eq!(machine.run("cat /mnt/shared/file"), "before\n");
    machine.end();
}
