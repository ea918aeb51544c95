//! Command lines and exit codes.

use std::process::Stdio;

use super::process::{Daemon, rafsd, wait};

/// Runs to the end: exit code, stdout, stderr.
fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = rafsd().args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn version_names_the_commit() {
    let (code, stdout, _) = run(&["--version"]);
    assert_eq!(code, Some(0));
    let commit = stdout
        .lines()
        .find_map(|line| line.strip_prefix("Git Commit:"))
        .unwrap();
    assert!(!commit.trim().is_empty());
}

#[test]
fn help_ends_with_0() {
    let (code, stdout, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    assert!(stdout.contains("--apisock") && stdout.contains("virtiofs"));
    assert_eq!(run(&["virtiofs", "--help"]).0, Some(0));
    // The form that management layers read, as the vhost-user specification has it for back-end programs.
    let (code, capabilities, _) = run(&["--print-capabilities"]);
    let capabilities: serde_json::Value = serde_json::from_str(&capabilities).unwrap();
    assert_eq!(
        (code, capabilities),
        (Some(0), serde_json::json!({ "type": "fs" }))
    );
}

#[test]
fn bad_usage_ends_with_2_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let sock = dir.path().join("vu.sock");
    let sock = sock.to_str().unwrap();
    for arguments in [
        &["virtiofs"][..],
        &["virtiofs", "--sock", sock, "--log-level", "loud"],
        &["virtiofs", "--sock", sock, "--id", "x"],
        &["virtiofs", "--sock", sock, "--unknown"],
        &[
            "virtiofs",
            "--sock",
            sock,
            "--bootstrap",
            "/b",
            "--shared-dir",
            "/s",
        ],
        &["virtiofs", "--sock", sock, "--fd", "3"],
        &["frobnicate"],
    ] {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(!stderr.is_empty());
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_done_ends_with_1_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (sock, api, missing) = (path("vu.sock"), path("api.sock"), path("missing"));
    std::fs::write(path("junk"), "no bootstrap").unwrap();
    let junk = path("junk");
    let no_api = path("missing/api.sock");
    for arguments in [
        &["--sock", &path("missing/vu.sock")][..],
        &["--sock", &sock, "--apisock", &no_api],
        &["--sock", &sock, "--shared-dir", &missing],
        &["--sock", &sock, "--bootstrap", &missing],
        &["--sock", &sock, "--bootstrap", &junk, "--config", &missing],
        &[
            "--sock",
            &sock,
            "--bootstrap",
            &junk,
            "--localfs-dir",
            dir.path().to_str().unwrap(),
        ],
        &[
            "--sock",
            &sock,
            "--apisock",
            &api,
            "--log-file",
            &path("missing/x.log"),
        ],
        &["--fd", "99"],
    ] {
        let (code, _, stderr) = run(arguments);
        assert_eq!(code, Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.contains("Error: "), "{stderr}");
        assert!(!dir.path().join("vu.sock").exists() && !dir.path().join("api.sock").exists());
    }
}

#[test]
fn every_documented_command_line_starts() {
    for extra in [
        &[][..],
        &["--hybrid-mode"],
        &["--log-level", "debug"],
        &["--threads", "4"],
        &["--thread-pool-size=1", "--announce-submounts"],
        &["--thread-pool-size=1", "-o", "announce_submounts"],
        &[
            "--cache=auto",
            "--sandbox",
            "chroot",
            "--xattr",
            "--seccomp",
            "kill",
            "-o",
            "writeback,xattr",
        ],
        &["--upgrade"],
        &["--id", "i", "--supervisor", "/s"],
        &["--rlimit-nofile", "0"],
        &["--request-queues", "1"],
    ] {
        Daemon::start(extra).terminate();
    }
}

#[test]
fn sock_without_a_subcommand_serves_virtiofs() {
    let dir = tempfile::tempdir().unwrap();
    let (sock, api) = (dir.path().join("vu.sock"), dir.path().join("api.sock"));
    let mut child = rafsd()
        .args(["--log-level", "info", "--sock"])
        .arg(&sock)
        .arg("--apisock")
        .arg(&api)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while super::process::ask(&api, "GET", "/api/v1/daemon", "").is_none() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    super::process::ask(&api, "PUT", "/api/v1/daemon/exit", "")
        .unwrap()
        .nothing();
    assert_eq!(wait(&mut child).code(), Some(0));
}

#[test]
fn options_without_effect_are_reported_in_one_line() {
    let daemon = Daemon::start(&["--threads", "4", "--syslog", "-o", "x"]);
    let line = daemon.logs("accepted without effect");
    assert!(line.contains("--thread-pool-size, --syslog, -o x"), "{line}");
}
