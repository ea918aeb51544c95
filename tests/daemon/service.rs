//! What a service manager sees: readiness, passed sockets, the pid file.

use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Command, Stdio};

use super::process::{Daemon, LONG, ask, wait};

#[test]
fn readiness_and_end_are_told_and_the_pid_file_lasts_as_long() {
    let dir = tempfile::tempdir().unwrap();
    let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    notify.set_read_timeout(Some(LONG)).unwrap();
    let (socket, pid_file) = (dir.path().join("notify"), dir.path().join("pid"));
    let daemon = Daemon::start_with(|command| {
        command
            .env("NOTIFY_SOCKET", &socket)
            .arg("--pid-file")
            .arg(&pid_file);
    });
    let told = || {
        let mut text = [0; 256];
        let length = notify.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    assert_eq!(told(), "READY=1");
    assert_eq!(
        std::fs::read_to_string(&pid_file).unwrap(),
        format!("{}\n", daemon.child.id())
    );
    daemon.terminate();
    assert_eq!(told(), "STOPPING=1");
    assert!(!pid_file.exists());
}

#[test]
fn sockets_that_systemd_passes_are_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let listener = |name: &str| {
        Stdio::from(std::os::fd::OwnedFd::from(
            UnixListener::bind(path(name)).unwrap(),
        ))
    };
    // The shell keeps its process id over exec, as systemd does.
    let mut child = Command::new("sh")
        .args([
            "-c",
            "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=vhost:api exec \"$0\" 3<&0 4<&1 2>/dev/null",
        ])
        .arg(env!("CARGO_BIN_EXE_rafsd"))
        .stdin(listener("vu.sock"))
        .stdout(listener("api.sock"))
        .spawn()
        .unwrap();
    let deadline = std::time::Instant::now() + LONG;
    while ask(&path("api.sock"), "GET", "/api/v1/daemon", "").is_none() {
        assert!(child.try_wait().unwrap().is_none() && std::time::Instant::now() < deadline);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    ask(&path("api.sock"), "PUT", "/api/v1/daemon/exit", "")
        .unwrap()
        .nothing();
    assert_eq!(wait(&mut child).code(), Some(0));
    assert!(
        path("vu.sock").exists() && path("api.sock").exists(),
        "they belong to who made them"
    );
}

#[test]
fn completions_and_man_pages_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let rafs = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_rafs"))
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for shell in ["bash", "zsh", "fish"] {
        assert!(rafs(&["completions", shell]).contains("residency"));
        assert!(rafs(&["completions", shell, "--of", "rafsd"]).contains("metrics-address"));
    }
    rafs(&["man", dir.path().to_str().unwrap()]);
    let page = std::fs::read_to_string(dir.path().join("rafsd.1")).unwrap();
    assert!(page.contains("apisock"));
    assert!(dir.path().join("rafs-ctl.1").exists());
}
