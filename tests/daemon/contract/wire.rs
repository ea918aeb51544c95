//! Rules of the wire.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use rafsd_frontend::ops;
use serde_json::json;

use crate::counters::eventually;
use crate::operate::Scene;
use crate::process::{Daemon, LONG};

/// A connection that shows every byte.
struct Client(UnixStream);

impl Client {
    fn to(daemon: &Daemon) -> Self {
        let stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Self(stream)
    }

    fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).unwrap();
    }

    /// The head of the next answer; its body is read and dropped.
    fn head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            assert_eq!(self.0.read(&mut byte).unwrap(), 1, "closed");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let length = head.lines().find_map(|line| {
            line.to_lowercase()
                .strip_prefix("content-length: ")
                .and_then(|length| length.parse::<usize>().ok())
        });
        self.0.read_exact(&mut vec![0; length.unwrap_or(0)]).unwrap();
        head
    }

    fn status(&mut self) -> u16 {
        self.head().split(' ').nth(1).unwrap().parse().unwrap()
    }
}

#[test]
fn success_with_data() {
    let answer = Daemon::start(&[]).ask("GET", "/api/v1/daemon", "");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    assert_eq!(answer.header("Server"), Some("Nydus API"));
    assert_eq!(
        answer.header("Content-Length"),
        Some(answer.body.len().to_string().as_str())
    );
    answer.json();
}

#[test]
fn success_without_data() {
    let answer = Daemon::start(&[]).ask("PUT", "/api/v1/daemon", r#"{"log_level":"info"}"#);
    assert_eq!((answer.status, answer.body.as_str()), (204, ""));
    assert_eq!(answer.header("Content-Length"), None);
    assert_eq!(answer.header("Transfer-Encoding"), None);
}

#[test]
fn error() {
    let daemon = Daemon::start(&[]);
    for (method, target, body, status) in [
        ("GET", "/api/v1/nothing", "", 404),
        ("PUT", "/api/v1/daemon", "{", 400),
        ("DELETE", "/api/v1/mount?mountpoint=/x", "", 500),
        ("PUT", "/api/v1/daemon/fuse/sendfd", "", 501),
    ] {
        let answer = daemon.ask(method, target, body);
        assert_eq!(answer.header("Content-Type"), Some("application/json"));
        let error = answer.json();
        assert_eq!(answer.status, status);
        assert_eq!(error["code"], "UNDEFINED");
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()));
        assert_eq!(error.as_object().unwrap().len(), 2, "one shape for all: {error}");
    }
}

#[test]
fn methods() {
    let daemon = Daemon::start(&[]);
    for method in ["POST", "DELETE", "PATCH", "OPTIONS"] {
        let message = daemon.ask(method, "/api/v1/daemon", "").error(400);
        assert!(message.contains("BadRequest"), "{message}");
    }
    assert_eq!(daemon.ask("HEAD", "/api/v1/daemon", "").status, 400);
    for path in ["/", "/api/v1", "/api/v1/daemon/", "/api/v9/daemon"] {
        assert!(daemon.ask("GET", path, "").error(404).contains("NoRoute"));
    }
}

#[test]
fn body_presence() {
    let daemon = Daemon::start(&[]);
    daemon.ask("GET", "/api/v1/daemon", "{}").error(400);
    daemon.ask("PUT", "/api/v1/daemon/exit", "{}").error(400);
    daemon.ask("PUT", "/api/v1/daemon", "").error(400);
    let mut client = Client::to(&daemon);
    client.send("GET /api/v1/daemon HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.status(), 200, "an empty body counts as none");
}

#[test]
fn body_limit() {
    let daemon = Daemon::start(&[]);
    // What the incumbent refuses: a mount with a long list of files.
    let files: Vec<String> = (0..5_000).map(|file| format!("/usr/lib/file-{file}")).collect();
    let body = json!({"fs_type": "passthrough_fs", "source": daemon.dir.path(), "config": "", "prefetch_files": files})
        .to_string();
    assert!(body.len() > 51_200);
    daemon.ask("POST", "/api/v1/mount?mountpoint=/x", &body).nothing();
    let mut client = Client::to(&daemon);
    client.send("PUT /api/v1/daemon HTTP/1.1\r\nContent-Length: 4194305\r\n\r\n");
    let head = client.head();
    assert!(head.starts_with("HTTP/1.1 413"), "{head}");
    assert!(head.to_lowercase().contains("application/json"), "{head}");
}

#[test]
fn transfer_encoding_chunked() {
    let daemon = Daemon::start(&[]);
    let mut client = Client::to(&daemon);
    client.send("PUT /api/v1/daemon HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.send("15\r\n{\"log_level\":\"debug\"}\r\n0\r\n\r\n");
    assert_eq!(client.status(), 204);
}

#[test]
fn http_1_0() {
    let daemon = Daemon::start(&[]);
    let mut client = Client::to(&daemon);
    client.send("GET /api/v1/daemon HTTP/1.0\r\n\r\n");
    assert_eq!(client.status(), 200);
}

#[test]
fn query_values() {
    let daemon = Daemon::start(&[]);
    let share = tempfile::tempdir().unwrap();
    for given in ["%2Fcontainers", "/raw", "/with+space", "/with%2Bplus", "/%C3%A4"] {
        daemon.mount_directory(given, share.path()).nothing();
    }
    assert_eq!(
        daemon.mountpoints(),
        ["/containers", "/raw", "/with space", "/with+plus", "/ä"]
    );
}

#[test]
fn unknown_json_keys() {
    let daemon = Daemon::start(&[]);
    daemon
        .ask("PUT", "/api/v1/daemon", r#"{"log_level":"info","colour":[1]}"#)
        .nothing();
    let body = json!({"fs_type": "passthrough_fs", "source": daemon.dir.path(), "config": r#"{"colour":1}"#, "x": {}});
    daemon
        .ask("POST", "/api/v1/mount?mountpoint=/x", &body.to_string())
        .nothing();
    // They are told, once.
    assert!(daemon.logs("unknown").contains("colour"));
}

#[test]
fn host_header() {
    let daemon = Daemon::start(&[]);
    for host in ["unix", "localhost", "2f72756e2f6170692e736f636b:0"] {
        let mut client = Client::to(&daemon);
        client.send(&format!("GET /api/v1/daemon HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(client.status(), 200, "{host}");
    }
    let mut client = Client::to(&daemon);
    client.send("GET http://localhost/api/v1/daemon HTTP/1.1\r\n\r\n");
    assert_eq!(client.status(), 200);
}

#[test]
fn concurrency() {
    let scene = Scene::start(&[]);
    scene.registry.set(|fault| fault.stalled = true);
    let guest = scene.boot();
    let hello = guest.resolve("/m/hello").unwrap().nodeid;
    let ticket = guest.submit(&ops::read(hello, 0, 0, 5)).unwrap();
    eventually("waiting", || scene.get("/api/rafsd/v1/requests") != json!([]));
    let api = scene.daemon.path("api.sock");
    // A request that takes its time: a drain with a read that cannot end.
    let slow = std::thread::spawn(move || {
        crate::process::ask(&api, "PUT", "/api/rafsd/v1/drain", r#"{"timeout_ms":60000}"#).unwrap()
    });
    eventually("draining", || {
        scene.get("/api/rafsd/v1/daemon")["draining"] == true
    });
    assert_eq!(scene.get("/api/v1/daemon")["state"], "RUNNING");
    scene
        .daemon
        .ask("DELETE", "/api/v1/mount?mountpoint=/c", "")
        .nothing();
    assert!(!slow.is_finished());
    scene.registry.set(|fault| fault.stalled = false);
    guest.wait(ticket).unwrap();
    assert_eq!(slow.join().unwrap().json()["drained"], true);
}

#[test]
fn connections() {
    let daemon = Daemon::start(&[]);
    let idle: Vec<_> = (0..300).map(|_| Client::to(&daemon)).collect();
    assert_eq!(daemon.ask("GET", "/api/v1/daemon", "").status, 200);
    for client in idle {
        client.0.set_nonblocking(true).unwrap();
        let outcome = (&client.0).read(&mut [0]).unwrap_err();
        assert_eq!(outcome.kind(), std::io::ErrorKind::WouldBlock, "closed");
    }
}

#[test]
fn keep_alive() {
    let mut daemon = Daemon::start(&[]);
    let mut used = Client::to(&daemon);
    for _ in 0..3 {
        used.send("GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(used.status(), 200);
    }
    // A silent connection is how the snapshotter learns that the daemon died, and only then.
    used.0.set_nonblocking(true).unwrap();
    assert!((&used.0).read(&mut [0]).is_err(), "open");
    used.0.set_nonblocking(false).unwrap();
    daemon.child.kill().unwrap();
    assert_eq!((&used.0).read(&mut [0]).unwrap_or(0), 0, "closed by the death");
}

#[test]
fn status_mapping() {
    let daemon = Daemon::start(&[]);
    daemon
        .ask("PUT", "/api/rafsd/v1/drain", r#"{"timeout_ms":0}"#)
        .json();
    daemon.mount_directory("/x", std::path::Path::new("/")).error(503);
    daemon.ask("PUT", "/api/v1/daemon/fuse/sendfd", "").error(501);
    daemon.ask("PUT", "/api/v1/daemon/start", "").error(400);
    daemon.ask("GET", "/api/v1/metrics?id=/x", "").error(404);
    daemon.ask("DELETE", "/api/v1/mount?mountpoint=/x", "").error(500);
    daemon.ask("PUT", "/api/v1/daemon", "{").error(400);
}
