//! The guest reboots without a word: every ring is disabled and stopped, and set up again from the start.

use rafsd_frontend::ops::{self, Init};

use crate::machine::Machine;
use crate::twins::{self, Work};

#[test]
fn twin() {
    let (daemon, shared) = twins::daemon();
    let guest = twins::boot(&daemon);
    let mut before = 0;
    for round in 0..5 {
        let mut work = Work::new(&guest, &format!("file-{round}"));
        work.start(&guest);
        for _ in 0..20 {
            guest.submit(&ops::getattr(ops::ROOT, None)).unwrap();
        }
        guest.reboot().unwrap();
        // The firmware of the machine looks at the device before the kernel does.
        guest.reboot().unwrap();
        assert!(guest.init(&Init::default()).unwrap().minor >= 38);
        let stale = guest.errno(&ops::read(work.node, work.fh, 0, 10)).unwrap();
        assert!([libc::ESTALE, libc::EBADF].contains(&stale), "{stale}");
        assert!(guest.resolve(format!("/file-{round}")).is_ok());
        let descriptors = daemon.descriptors().unwrap();
        assert!(
            before == 0 || descriptors <= before + 2,
            "{descriptors} after {before}"
        );
        before = descriptors;
    }
    assert_eq!(std::fs::read_dir(&shared).unwrap().count(), 5);
}

#[test]
fn real() {
    let Some(mut machine) = Machine::start("reset") else {
        return;
    };
    for boots in 1..4 {
        assert_eq!(machine.boots(), boots);
        machine.begin("dd if=/dev/zero of=/mnt/shared/endless bs=64k");
        machine.reboot();
        machine.run("echo here again");
    }
    machine.end();
}
