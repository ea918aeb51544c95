//! Start, states, signals, log.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::process::{Daemon, rafsd, wait};

/// The kernel may run the handler of a signal in any thread, also in one that may make few system calls.
#[test]
fn a_signal_ends_it_whichever_thread_it_reaches() {
    let threads = |daemon: &Daemon| -> std::collections::BTreeMap<String, i64> {
        let task = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.unwrap();
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap();
            let number = entry.file_name().to_str().unwrap().parse().unwrap();
            (name.trim().to_owned(), number)
        };
        let path = format!("/proc/{}/task", daemon.child.id());
        std::fs::read_dir(path).unwrap().map(task).collect()
    };
    let first = Daemon::start(&[]);
    let names: Vec<String> = threads(&first).into_keys().collect();
    assert!(names.iter().any(|name| name == "log"), "{names:?}");
    first.terminate();
    for name in names {
        let mut daemon = Daemon::start(&[]);
        let Some(thread) = threads(&daemon).get(&name).copied() else {
            continue;
        };
        // SAFETY: the call takes three numbers and touches no memory of ours.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_tgkill,
                i64::from(daemon.child.id()),
                thread,
                i64::from(libc::SIGTERM),
            )
        };
        assert_eq!(sent, 0, "{name}");
        println!("{name}");
        daemon.ends_cleanly();
    }
}

#[test]
fn ends_in_time_with_silent_and_half_spoken_clients() {
    let daemon = Daemon::start(&[]);
    let clients: Vec<_> = (0..50)
        .map(|_| UnixStream::connect(daemon.path("api.sock")).unwrap())
        .collect();
    for client in &clients {
        std::io::Write::write_all(
            &mut &*client,
            b"POST /api/v1/mount?mountpoint=/x HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
        )
        .unwrap();
    }
    daemon.terminate();
}

/// What it takes in a release build stands in `docs/kata.md`; here the machine may be busy with other things.
#[test]
fn runs_soon_after_it_was_started() {
    let times: Vec<_> = (0..5)
        .map(|_| {
            let before = Instant::now();
            let daemon = Daemon::start(&[]);
            let took = before.elapsed();
            daemon.terminate();
            took
        })
        .collect();
    println!("RUNNING after {times:?}");
    assert!(*times.iter().min().unwrap() < Duration::from_secs(2), "{times:?}");
}

#[test]
fn the_log_can_be_json() {
    let daemon = Daemon::start(&["--log-format", "json"]);
    daemon
        .mount_directory("/x%0Ay", std::path::Path::new("/no/such/dir"))
        .error(500);
    let line = daemon.logs("/no/such/dir");
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(event["level"], "WARN");
    assert!(event["message"].as_str().unwrap().contains("/x\ny"), "{event}");
    assert!(event["time"].is_string() && event["place"].is_string(), "{event}");
    daemon.terminate();
}

#[test]
fn log_level_changes_while_it_runs() {
    let daemon = Daemon::start(&[]);
    daemon
        .ask("PUT", "/api/v1/daemon", r#"{"log_level":"debug"}"#)
        .nothing();
    daemon.ask("GET", "/nothing", "").error(404);
    daemon.logs("DEBUG");
    daemon
        .ask("PUT", "/api/v1/daemon", r#"{"log_level":"off"}"#)
        .nothing();
    daemon
        .mount_directory("/x", std::path::Path::new("/no/such/dir"))
        .error(500);
    daemon
        .ask("PUT", "/api/v1/daemon", r#"{"log_level":"debug"}"#)
        .nothing();
    daemon.ask("GET", "/marker", "").error(404);
    let mut seen = Vec::new();
    while !seen.last().is_some_and(|line: &String| line.contains("/marker")) {
        seen.push(daemon.next_line());
    }
    assert!(
        !seen.iter().any(|line| line.contains("/no/such/dir")),
        "{seen:#?}"
    );
}

#[test]
fn a_reader_of_the_log_that_left_or_fell_asleep_disturbs_nothing() {
    // Asleep: nobody reads the pipe of stdout and stderr, and far more is logged than it holds.
    let dir = tempfile::tempdir().unwrap();
    let api = dir.path().join("api.sock");
    let start = || {
        rafsd()
            .args(["virtiofs", "--log-level", "trace", "--apisock"])
            .arg(&api)
            .arg("--sock")
            .arg(dir.path().join("vu.sock"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let hammer = |child: &mut std::process::Child| {
        let deadline = Instant::now() + super::process::LONG;
        let long_path = format!("/{}", "x".repeat(4000));
        let mut answered = 0;
        while answered < 200 {
            assert!(child.try_wait().unwrap().is_none(), "ended");
            assert!(Instant::now() < deadline);
            answered += usize::from(super::process::ask(&api, "GET", &long_path, "").is_some());
        }
    };
    let mut asleep = start();
    hammer(&mut asleep);
    terminate(&mut asleep);
    let mut left = start();
    drop(left.stderr.take());
    hammer(&mut left);
    terminate(&mut left);
    // What was lost is told when the reader wakes up.
    let mut text = String::new();
    asleep.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("Waiting for vhost-user"));
}

fn terminate(child: &mut std::process::Child) {
    let before = Instant::now();
    assert!(
        std::process::Command::new("kill")
            .arg(child.id().to_string())
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(wait(child).code(), Some(0));
    assert!(before.elapsed() < crate::process::SOON, "{:?}", before.elapsed());
}

#[test]
fn logs_to_a_file_if_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("daemon");
    Daemon::start(&["--log-file", log.to_str().unwrap()]).terminate();
    let text = std::fs::read_to_string(dir.path().join("daemon.log")).unwrap();
    assert!(
        text.contains("Waiting for vhost-user") && text.contains("stopping because of SIGTERM"),
        "{text}"
    );
}
