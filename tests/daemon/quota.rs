//! A mount with a quota, from its request to what the guest and the operator see of it, with the sandbox on.

use std::path::Path;

use rafsd_frontend::{Guest, Options, ops};
use serde_json::json;

use super::counters::eventually;
use super::process::Daemon;

const MIB: u64 = 1 << 20;

/// Mounts a directory with a quota of 4 MiB and 20 inodes.
pub fn mount(daemon: &Daemon, mountpoint: &str, source: &Path) {
    let config = json!({"quota": {"bytes": 4 * MIB, "inodes": 20}, "cache": "never"}).to_string();
    let body = json!({"fs_type": "passthrough_fs", "source": source, "config": config});
    daemon
        .ask(
            "POST",
            &format!("/api/v1/mount?mountpoint={mountpoint}"),
            &body.to_string(),
        )
        .nothing();
}

#[test]
fn a_limited_mount_is_full_when_it_says_so() {
    let daemon = Daemon::start(&["--thread-pool-size", "2"]);
    let share = daemon.path("share");
    std::fs::create_dir(&share).unwrap();
    mount(&daemon, "/limited", &share);
    let other = daemon.path("other");
    std::fs::create_dir(&other).unwrap();
    daemon.mount_directory("/free", &other).nothing();
    let status = |mountpoint: &str| {
        let target = format!("/api/rafsd/v1/mounts?mountpoint={mountpoint}");
        daemon.ask("GET", &target, "").json()[0].clone()
    };
    assert_eq!(status("/limited")["quota"]["bytes"]["limit"], 4 * MIB);
    assert_eq!(
        status("/limited")["quota"]["inodes"],
        json!({"used": 1, "limit": 20})
    );
    assert_eq!(status("/limited")["cache"]["policy"], "never");
    assert_eq!(status("/free")["quota"], json!(null));
    assert_eq!(status("/free")["cache"]["policy"], "auto");

    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    let root = guest.resolve("/limited").unwrap().nodeid;
    let (file, handle) = guest.create(root, "file", 0o644, libc::O_RDWR as u32).unwrap();
    let data = vec![7; 128 * 1024];
    let mut end = 0;
    let refused = loop {
        match guest.write(file.nodeid, handle, end, &data) {
            Ok(written) => end += u64::from(written),
            Err(error) => break error.to_string(),
        }
        assert!(end <= 4 * MIB);
    };
    println!("after {end} bytes: {refused}");
    assert_eq!(
        guest.errno(&ops::write(file.nodeid, handle, end, &data)).unwrap(),
        libc::ENOSPC
    );
    let shown = guest.statfs(root).unwrap();
    assert_eq!(shown.blocks * u64::from(shown.frsize), 4 * MIB);
    assert!(shown.bavail * u64::from(shown.frsize) < 4096);
    assert_eq!((shown.files, shown.ffree), (20, 18));
    let used = status("/limited")["quota"]["bytes"]["used"].as_u64().unwrap();
    assert!(used <= 4 * MIB && used > 4 * MIB - 4096, "{used}");

    // The other mount has room, and a file without a name costs until it is let go of.
    let free = guest.resolve("/free").unwrap().nodeid;
    guest.write_file(free, "file", &data).unwrap();
    guest.unlink(root, "file").unwrap();
    assert_eq!(status("/limited")["quota"]["inodes"]["used"], 2);
    guest.release(file.nodeid, handle).unwrap();
    guest.forget(file.nodeid, 1).unwrap();
    eventually("the file is let go of", || {
        status("/limited")["quota"]["inodes"]["used"] == 1
    });
    guest.write_file(root, "again", &data).unwrap();
    drop(guest);

    // What the host removes is found by counting again.
    for number in 0..18 {
        std::fs::write(share.join(format!("of-the-host-{number}")), "").unwrap();
    }
    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    daemon
        .ask("DELETE", "/api/v1/mount?mountpoint=/limited", "")
        .nothing();
    mount(&daemon, "/limited", &share);
    let root = guest.resolve("/limited").unwrap().nodeid;
    assert_eq!(guest.errno(&ops::mkdir(root, "d", 0o755)).unwrap(), libc::ENOSPC);
    std::fs::remove_file(share.join("of-the-host-0")).unwrap();
    eventually("room that the host has made", || {
        guest.mkdir(root, "d", 0o755).is_ok()
    });
    drop(guest);
    daemon.terminate();
}
