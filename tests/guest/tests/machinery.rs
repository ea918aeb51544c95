//! The machinery itself: boots, commands, limits, stop and continue, without any device under test.
#![allow(missing_docs)]

use std::time::Duration;

use rafsd_guest::{Boot, Cache};

#[test]
fn a_guest_boots_and_runs_commands_side_by_side() {
    let mut guest = Boot::new(&Cache::open().unwrap()).unwrap().start().unwrap();
    assert!(guest.check("uname -r").unwrap().contains("-cloud-"));

    guest.check("mkfifo /run/gate").unwrap();
    let waiting = guest
        .start(
            Duration::from_secs(120),
            "read line </run/gate; echo got $line; exit 7",
        )
        .unwrap();
    let done = guest.run("echo out; echo err >&2; exit 3").unwrap();
    assert_eq!((done.status, done.text.as_str()), (3, "out\nerr\n"));

    let killed = guest.run_within(Duration::from_secs(1), "sleep 1000").unwrap();
    assert_eq!(killed.status, 137);
    assert!(guest.is_running(&waiting));
    guest.check("echo the gate opens >/run/gate").unwrap();
    let waited = guest.finish(&waiting).unwrap();
    assert_eq!((waited.status, waited.text.as_str()), (7, "got the gate opens\n"));

    // A long output arrives whole.
    let long = guest.check("seq 1 20000").unwrap();
    assert_eq!(long.lines().count(), 20_000);
    assert_eq!(long.lines().last(), Some("20000"));

    guest.stop().unwrap();
    let after = guest.start(Duration::from_secs(60), "echo awake").unwrap();
    assert!(guest.is_running(&after));
    guest.cont().unwrap();
    assert_eq!(guest.finish(&after).unwrap().text, "awake\n");

    guest
        .check("load erofs; load loop; load virtio_blk; grep -q erofs /proc/filesystems")
        .unwrap();
    guest.check("touch /run/before-reset").unwrap();
    guest.reset().unwrap();
    guest.check("[ ! -e /run/before-reset ]").unwrap();
    guest.power_off().unwrap();
}

#[test]
fn a_panic_after_boot_is_reported_with_the_console() {
    let mut guest = Boot::new(&Cache::open().unwrap()).unwrap().start().unwrap();
    let error = guest.run("echo c >/proc/sysrq-trigger; sleep 100").unwrap_err();
    assert!(format!("{error:#}").contains("panicked"), "{error:#}");
}
