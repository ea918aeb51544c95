//! The daemon's states.

use crate::fuse::can_mount;
use crate::process::Daemon;

use super::command_lines::Started;

fn put(daemon: &Daemon, what: &str) -> crate::process::Answer {
    daemon.ask("PUT", &format!("/api/v1/daemon/{what}"), "")
}

fn state(daemon: &Daemon) -> serde_json::Value {
    daemon.ask("GET", "/api/v1/daemon", "").json()["state"].clone()
}

/// Runtimes mount before they start the machine: nobody has connected yet, and nothing is mounted.
#[test]
fn running_needs_no_front_end() {
    let daemon = Daemon::start(&[]);
    assert_eq!(state(&daemon), "RUNNING");
    let options = rafsd_frontend::Options::default();
    drop(rafsd_frontend::Guest::boot(daemon.path("vu.sock"), options).unwrap());
    assert_eq!(state(&daemon), "RUNNING");
}

#[test]
fn any_other_event_is_refused_and_changes_nothing() {
    let daemon = Daemon::start(&[]);
    for (what, event) in [("start", "Start"), ("fuse/takeover", "Takeover")] {
        let message = put(&daemon, what).error(400);
        assert!(
            message.contains(&format!("UnexpectedEvent(\"{event}\")")),
            "{message}"
        );
        assert_eq!(state(&daemon), "RUNNING");
    }
}

#[test]
fn running_stop() {
    let mut daemon = Daemon::start(&[]);
    put(&daemon, "exit").nothing();
    daemon.ends_cleanly();
}

/// Clients that ask for it go on without it; the message says what it would take.
#[test]
fn fuse_hot_upgrade_is_not_supported() {
    if !can_mount("fuse_hot_upgrade_is_not_supported") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("mnt")).unwrap();
    let started = Started::in_directory(dir, "fuse --upgrade -M @/mnt -A @/a --id i --supervisor @/s", &[]);
    let put = |what: &str| {
        let target = format!("/api/v1/daemon/fuse/{what}");
        crate::process::ask(&started.path("a"), "PUT", &target, "").unwrap()
    };
    assert!(put("sendfd").error(501).contains("end this daemon"));
    put("takeover").error(400);
    started.says("accepted without effect: --upgrade");
    started.exit();
}
