//! How the daemon ends.

use std::os::unix::net::UnixStream;
use std::process::Stdio;

use crate::process::{Daemon, rafsd, wait};

/// Runs to the end: exit code, stdout, stderr.
fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = rafsd().args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn help_and_version_end_with_0() {
    for arguments in [&["--help"][..], &["--version"], &["virtiofs", "--help"]] {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
        assert!(!stdout.is_empty());
    }
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

/// The incumbent leaves the other socket behind.
#[test]
fn what_cannot_be_done_ends_with_1_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (sock, api, missing) = (path("vu.sock"), path("api.sock"), path("missing"));
    std::fs::write(path("junk"), "no bootstrap").unwrap();
    let junk = path("junk");
    let no_api = path("missing/api.sock");
    let here = dir.path().to_str().unwrap();
    for arguments in [
        &["--sock", &path("missing/vu.sock")][..],
        &["--sock", &sock, "--apisock", &no_api],
        &["--sock", &sock, "--shared-dir", &missing],
        &["--sock", &sock, "--bootstrap", &missing],
        &["--sock", &sock, "--bootstrap", &junk, "--config", &missing],
        &["--sock", &sock, "--bootstrap", &junk, "--localfs-dir", here],
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

/// In a plain container the limit of open files cannot be raised; there the incumbent ends with 1.
#[test]
fn a_refused_rlimit_is_no_reason_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = std::process::Command::new("sh")
        .args(["-c", "ulimit -n 256; exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_rafsd"))
        .arg("--sock")
        .arg(dir.path().join("vu.sock"))
        .arg("--apisock")
        .arg(dir.path().join("api.sock"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let ask = |method, target| crate::process::ask(&dir.path().join("api.sock"), method, target, "");
    while ask("GET", "/api/v1/daemon").is_none() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    ask("PUT", "/api/v1/daemon/exit").unwrap().nothing();
    assert_eq!(wait(&mut child).code(), Some(0));
}

/// With the incumbent this needs SIGKILL.
#[test]
fn sigterm_before_any_front_end_connected() {
    Daemon::start(&[]).terminate();
}

/// The incumbent goes on until the front-end leaves.
#[test]
fn sigterm_with_a_front_end_connected() {
    let daemon = Daemon::start(&[]);
    let front_end = UnixStream::connect(daemon.path("vu.sock")).unwrap();
    daemon.terminate();
    drop(front_end);
}

#[test]
fn sigterm_after_the_front_end_has_gone() {
    let daemon = Daemon::start(&[]);
    let options = rafsd_frontend::Options::default();
    drop(rafsd_frontend::Guest::boot(daemon.path("vu.sock"), options).unwrap());
    daemon.terminate();
}

#[test]
fn sigint_and_exit_over_the_api() {
    let mut daemon = Daemon::start(&[]);
    daemon.signal("-INT");
    daemon.ends_cleanly();
    let mut daemon = Daemon::start(&[]);
    daemon.ask("PUT", "/api/v1/daemon/exit", "").nothing();
    daemon.ends_cleanly();
}
