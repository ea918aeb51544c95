//! Socket files in the life of a daemon: whose they are, and who may replace them.

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::process::Command;

use rafsd_frontend::{Guest, Options};

use crate::process::{Daemon, ask, rafsd, wait};

fn fails_to_start(change: impl FnOnce(&mut Command)) -> String {
    let mut command = rafsd();
    change(&mut command);
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| wait(&mut child)));
    let _ = child.kill();
    assert_eq!(status.expect("it started").code(), Some(1));
    std::io::read_to_string(child.stderr.take().unwrap()).unwrap()
}

#[test]
fn second_daemon_on_the_same_paths() {
    let daemon = Daemon::start(&[]);
    let inode = || std::fs::metadata(daemon.path("vu.sock")).unwrap().ino();
    let before = inode();
    let text = fails_to_start(|command| {
        command
            .arg("--sock")
            .arg(daemon.path("vu.sock"))
            .arg("--apisock")
            .arg(daemon.path("other.sock"));
    });
    assert!(text.contains("another process listens"), "{text}");
    let text = fails_to_start(|command| {
        command
            .arg("--sock")
            .arg(daemon.path("other.sock"))
            .arg("--apisock")
            .arg(daemon.path("api.sock"));
    });
    assert!(text.contains("another process listens"), "{text}");
    assert!(!daemon.path("other.sock").exists(), "nothing is left behind");
    assert_eq!(inode(), before);
    assert_eq!(daemon.mountpoints().len(), 0);
    daemon.terminate();
}

#[test]
fn sigkill() {
    let mut daemon = Daemon::start(&[]);
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    assert!(daemon.path("vu.sock").exists() && daemon.path("api.sock").exists());
    let dir = std::mem::replace(&mut daemon.dir, tempfile::tempdir().unwrap());
    Daemon::start_in(dir, |_| ()).terminate();
}

#[test]
fn start_leaves_files_of_other_kinds_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vu.sock");
    std::fs::write(&path, "precious").unwrap();
    let text = fails_to_start(|command| {
        command.arg("--sock").arg(&path);
    });
    assert!(text.contains("vu.sock") && text.contains("no socket"), "{text}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn relative_paths_work() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = rafsd()
        .current_dir(dir.path())
        .args(["virtiofs", "--hybrid-mode", "--log-level", "info"])
        .args(["--apisock", "nydusd-api.sock", "--sock", "virtiofsd.sock"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let api = dir.path().join("nydusd-api.sock");
    while ask(&api, "GET", "/api/v1/daemon", "").is_none() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(
        std::fs::metadata(dir.path().join("virtiofsd.sock"))
            .unwrap()
            .file_type()
            .is_socket()
    );
    ask(&api, "PUT", "/api/v1/daemon/exit", "").unwrap().nothing();
    assert_eq!(wait(&mut child).code(), Some(0));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn sockets_belong_to_the_owner_of_their_directory() {
    let dir = tempfile::tempdir().unwrap();
    if std::os::unix::fs::chown(dir.path(), Some(12_345), Some(23_456)).is_err() {
        println!("skipped: giving files away needs CAP_CHOWN");
        return;
    }
    let daemon = Daemon::start_in(dir, |_| ());
    for name in ["vu.sock", "api.sock"] {
        let file = std::fs::metadata(daemon.path(name)).unwrap();
        assert_eq!((file.uid(), file.gid()), (12_345, 23_456), "{name}");
    }
    daemon.terminate();
}

#[test]
fn an_inherited_socket_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vu.sock")).unwrap();
    // A copy without close-on-exec, made by the shell, as a service manager would hand it over.
    let mut child = Command::new("sh")
        .args(["-c", "exec \"$0\" --fd=9 --apisock \"$1\" 9<&0"])
        .arg(env!("CARGO_BIN_EXE_rafsd"))
        .arg(dir.path().join("api.sock"))
        .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(
            listener.try_clone().unwrap(),
        )))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    assert!(listener.as_raw_fd() >= 0);
    let api = dir.path().join("api.sock");
    while ask(&api, "GET", "/api/v1/daemon", "").is_none() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    ask(&api, "PUT", "/api/v1/daemon/exit", "").unwrap().nothing();
    assert_eq!(wait(&mut child).code(), Some(0));
    assert!(
        dir.path().join("vu.sock").exists(),
        "its file belongs to who made it"
    );
}

#[test]
fn start() {
    let daemon = Daemon::start(&[]);
    for name in ["vu.sock", "api.sock"] {
        let file = std::fs::metadata(daemon.path(name)).unwrap();
        assert!(file.file_type().is_socket());
        assert_eq!(file.uid(), rustix::process::geteuid().as_raw());
        assert_eq!(file.mode() & 0o002, 0, "nobody else's");
    }
}

/// The incumbent unlinks its socket when the first front-end comes, and takes no other.
#[test]
fn front_end_connects_and_disconnects() {
    let daemon = Daemon::start(&[]);
    for _ in 0..3 {
        let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
        assert!(daemon.path("vu.sock").exists());
        drop(guest);
        let info = daemon.ask("GET", "/api/v1/daemon", "").json();
        assert_eq!(info["state"], "RUNNING");
    }
}

#[test]
fn sigterm() {
    let daemon = Daemon::start(&[]);
    let (device, api) = (daemon.path("vu.sock"), daemon.path("api.sock"));
    daemon.terminate();
    assert!(!device.exists() && !api.exists());
}

/// One refused connection of the machine monitor ends the sandbox: whoever has seen RUNNING can connect.
#[test]
fn the_device_listens_before_the_api_says_running() {
    let dir = tempfile::tempdir().unwrap();
    let (device, api) = (dir.path().join("v"), dir.path().join("a"));
    let mut child = rafsd()
        .args(["virtiofs", "--log-level", "error", "--apisock"])
        .arg(&api)
        .arg("--sock")
        .arg(&device)
        .spawn()
        .unwrap();
    // The other way round as well: a socket that can be seen can be connected to, at once.
    while !api.exists() {
        assert!(child.try_wait().unwrap().is_none());
    }
    assert!(device.exists(), "bound first");
    let answer = ask(&api, "GET", "/api/v1/daemon", "").expect("not refused");
    assert_eq!(answer.json()["state"], "RUNNING");
    drop(std::os::unix::net::UnixStream::connect(&device).unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
}
