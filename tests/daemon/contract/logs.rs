//! What runtimes need of the log.

use std::path::Path;

use crate::process::Daemon;

/// `[2026-11-21 21:46:42.629744 +00:00] INFO message`; the place stands in all that is not INFO. No colours.
#[test]
fn one_record_per_line() {
    let daemon = Daemon::start(&[]);
    let line = daemon.logs("Waiting for vhost-user");
    let (time, rest) = line.strip_prefix('[').unwrap().split_once("] ").unwrap();
    assert_eq!(time.len(), "2026-11-21 21:46:42.629744 +00:00".len(), "{line}");
    assert!(rest.starts_with("INFO Waiting"), "{line}");
    daemon
        .mount_directory("/x%0Ay", Path::new("/no/such/dir"))
        .error(500);
    let line = daemon.logs("WARN [");
    assert!(line.contains(".rs:") && line.contains("/x\\ny"), "{line}");
    assert!(!line.contains('\u{1b}'), "{line}");
}

/// The text that one runtime waits for when it believes to have started virtiofsd.
#[test]
fn waiting_for_vhost_user_socket_connection() {
    Daemon::start(&[]).logs("Waiting for vhost-user socket connection");
}

/// A line of more than 64 KiB ends the runtime's reader, which then stops the machine.
#[test]
fn lines_are_shorter_than_64_kib() {
    let daemon = Daemon::start(&["-l", "debug"]);
    let long = format!("/{}", "x".repeat(60_000));
    daemon.ask("GET", &long, "").error(404);
    daemon
        .mount_directory(&long, Path::new("/no/such/dir"))
        .error(500);
    let line = daemon.logs("refused: ");
    assert!(line.contains("xxxx") && line.len() < 65_536, "{}", line.len());
}

/// The runtime signals the process that it started, and takes the end of its output for its death.
#[test]
fn the_process_stays_the_one_that_was_started() {
    let mut daemon = Daemon::start(&[]);
    let overview = daemon.ask("GET", "/api/rafsd/v1/daemon", "").json();
    assert_eq!(overview["pid"], daemon.child.id());
    for descriptor in [1, 2] {
        let path = format!("/proc/{}/fd/{descriptor}", daemon.child.id());
        let target = std::fs::read_link(path).unwrap();
        assert!(target.to_str().unwrap().starts_with("pipe:"), "{target:?}");
    }
    assert!(daemon.child.try_wait().unwrap().is_none());
}
