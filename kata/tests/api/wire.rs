//! Wire rules.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use super::model::Daemon;

const PASSTHROUGH: &str = r#"{"fs_type":"passthrough_fs","source":"/s","config":""}"#;

#[test]
fn success_with_data() {
    let answer = Daemon::start().ask("GET", "/api/v1/daemon", None);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("server"), Some("Nydus API"));
    assert_eq!(
        answer.header("content-length").unwrap(),
        answer.body.len().to_string()
    );
}

#[test]
fn success_without_data() {
    Daemon::start()
        .ask("PUT", "/api/v1/daemon", Some(r#"{"log_level":"debug"}"#))
        .nothing();
}

#[test]
fn wrong_method_is_400_and_says_what_is_right() {
    let daemon = Daemon::start();
    for method in ["POST", "DELETE", "HEAD", "PATCH", "OPTIONS"] {
        let answer = daemon.ask(method, "/api/v1/daemon", None);
        assert_eq!(answer.status, 400, "{method}");
        assert_eq!(answer.header("allow"), Some("GET, PUT"));
    }
    assert!(
        daemon
            .ask("POST", "/api/v1/daemon", None)
            .error(400)
            .contains("BadRequest")
    );
}

#[test]
fn unknown_path_is_404() {
    let daemon = Daemon::start();
    for path in [
        "/",
        "/api",
        "/api/v1",
        "/api/v1/",
        "/api/v1/daemon/",
        "/api/v3/daemon",
        "/api/v1//daemon",
    ] {
        assert!(
            daemon.ask("GET", path, None).error(404).contains("NoRoute"),
            "{path}"
        );
    }
}

#[test]
fn body_where_none_belongs_is_400_and_empty_counts_as_none() {
    let daemon = Daemon::start();
    daemon.ask("GET", "/api/v1/daemon", Some("{}")).error(400);
    daemon.ask("PUT", "/api/v1/daemon/exit", Some("{}")).error(400);
    assert!(!*daemon.model.exited.lock().unwrap());
    assert_eq!(daemon.ask("GET", "/api/v1/daemon", Some("")).status, 200);
    daemon.ask("PUT", "/api/v1/daemon/exit", Some("")).nothing();
}

#[test]
fn missing_body_is_400() {
    let daemon = Daemon::start();
    daemon.ask("PUT", "/api/v1/daemon", None).error(400);
    daemon
        .ask("POST", "/api/v1/mount?mountpoint=/x", Some(""))
        .error(400);
}

#[test]
fn body_that_is_too_large_gets_a_json_error() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    client.send("PUT /api/v1/daemon HTTP/1.1\r\nContent-Length: 4194305\r\n\r\n");
    assert!(client.receive(false).error(413).contains("4194304"));
    // The same without a length that would give it away.
    let mut client = daemon.connect();
    client.send("PUT /api/v1/daemon HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = format!("100000\r\n{}\r\n", " ".repeat(0x100000));
    for _ in 0..5 {
        // The server may close as soon as it knows.
        let _ = client.stream.write_all(chunk.as_bytes());
    }
    assert!(client.receive(false).error(413).contains("4194304"));
}

#[test]
fn large_mount_requests_are_welcome() {
    let daemon = Daemon::start();
    let files: Vec<_> = (0..10_000)
        .map(|number| format!("/usr/lib/file-{number}"))
        .collect();
    let body = serde_json::json!({"fs_type":"rafs","source":"/b","config":"{}","prefetch_files":files});
    let body = body.to_string();
    assert!(body.len() > 51_200);
    daemon
        .ask("POST", "/api/v1/mount?mountpoint=/m", Some(&body))
        .nothing();
    let requests = daemon.model.requests.lock().unwrap();
    assert_eq!(requests[0].prefetch_files.as_ref().unwrap().len(), 10_000);
}

#[test]
fn chunked_bodies_are_accepted() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    client.send("PUT /api/v1/daemon HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.send("15\r\n{\"log_level\":\"trace\"}\r\n0\r\n\r\n");
    client.receive(false).nothing();
    assert_eq!(*daemon.model.log_level.lock().unwrap(), "trace");
    client.send("GET /api/v1/daemon HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
    assert_eq!(client.receive(false).status, 200);
}

#[test]
fn http_1_0_is_accepted() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    client.send("GET /api/v1/daemon HTTP/1.0\r\n\r\n");
    assert_eq!(client.receive(false).status, 200);
}

#[test]
fn host_header_and_absolute_targets_do_not_matter() {
    let daemon = Daemon::start();
    for head in [
        "GET http://localhost/api/v1/daemon HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /api/v1/daemon HTTP/1.1\r\nHost: 2f72756e2f6170692e736f636b:0\r\n\r\n",
        "GET /api/v1/daemon HTTP/1.1\r\n\r\n",
    ] {
        let mut client = daemon.connect();
        client.send(head);
        assert_eq!(client.receive(false).status, 200, "{head}");
    }
}

#[test]
fn query_values_are_decoded() {
    let daemon = Daemon::start();
    for (query, mountpoint) in [
        ("mountpoint=%2Fcontainers", "/containers"),
        ("mountpoint=/rafs/c1/lowerdir", "/rafs/c1/lowerdir"),
        ("x=1&mountpoint=/a+b&y", "/a b"),
        ("mountpoint=%2Fa%2Bb", "/a+b"),
        ("mountpoint=/%C3%A4", "/ä"),
    ] {
        daemon
            .ask("POST", &format!("/api/v1/mount?{query}"), Some(PASSTHROUGH))
            .nothing();
        assert!(
            daemon.model.mounts.lock().unwrap().contains_key(mountpoint),
            "{query}"
        );
    }
}

#[test]
fn unknown_json_keys_are_ignored() {
    let daemon = Daemon::start();
    daemon
        .ask("PUT", "/api/v1/daemon", Some(r#"{"log_level":"warn","x":[1]}"#))
        .nothing();
}

#[test]
fn a_slow_mount_delays_nobody() {
    let daemon = Daemon::start();
    let gate = daemon.slow_mount();
    let mut slow = daemon.connect();
    slow.send(&format!(
        "POST /api/v1/mount?mountpoint=/slow HTTP/1.1\r\nContent-Length: {}\r\n\r\n{PASSTHROUGH}",
        PASSTHROUGH.len()
    ));
    while daemon.model.gate.lock().unwrap().is_some() {
        std::thread::yield_now();
    }
    let before = Instant::now();
    assert_eq!(
        daemon.ask("GET", "/api/v1/daemon", None).json()["state"],
        "RUNNING"
    );
    daemon
        .ask("POST", "/api/v1/mount?mountpoint=/fast", Some(PASSTHROUGH))
        .nothing();
    assert!(before.elapsed() < Duration::from_secs(20));
    gate.send(()).unwrap();
    slow.receive(false).nothing();
}

#[test]
fn hundreds_of_silent_connections_disturb_nobody_and_are_not_closed() {
    let daemon = Daemon::start();
    let silent: Vec<_> = (0..300).map(|_| daemon.connect()).collect();
    assert_eq!(daemon.ask("GET", "/api/v1/daemon", None).status, 200);
    for client in &silent {
        client.stream.set_nonblocking(true).unwrap();
        let outcome = (&client.stream).read(&mut [0]);
        assert_eq!(
            outcome.unwrap_err().kind(),
            std::io::ErrorKind::WouldBlock,
            "closed"
        );
    }
}

#[test]
fn one_connection_too_many_is_told_so() {
    let daemon = Daemon::start();
    let held: Vec<_> = (0..rafsd_kata::api::MAX_CONNECTIONS)
        .map(|_| daemon.connect())
        .collect();
    let mut one_more = daemon.connect();
    one_more.receive(false).error(503);
    assert_eq!(one_more.stream.read(&mut [0]).unwrap(), 0, "closed");
    drop(held);
    // As soon as the others have gone there is room again.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut client = daemon.connect();
        let _ = client.stream.write_all(b"GET /api/v1/daemon HTTP/1.1\r\n\r\n");
        if client.receive(false).status == 200 {
            break;
        }
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn keep_alive_serves_request_after_request() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    for _ in 0..20 {
        assert_eq!(client.ask("GET", "/api/v1/daemon", None).status, 200);
        client.ask("GET", "/nothing", None).error(404);
        client
            .ask("DELETE", "/api/v1/mount?mountpoint=/x", None)
            .error(500);
    }
}

#[test]
fn a_client_may_shut_its_side_down_before_the_answer() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    client.send("GET /api/v1/daemon HTTP/1.1\r\n\r\n");
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.receive(false).status, 200);
}

#[test]
fn a_bug_in_a_handler_costs_one_answer() {
    let daemon = Daemon::start();
    daemon
        .ask("POST", "/api/v1/mount?mountpoint=/panic", Some(PASSTHROUGH))
        .error(500);
    assert_eq!(daemon.ask("GET", "/api/v1/daemon", None).status, 200);
}

#[test]
fn garbage_costs_one_connection() {
    let daemon = Daemon::start();
    for garbage in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "\x16\x03\x01\x02\x00\r\n\r\n",
    ] {
        let mut client = daemon.connect();
        client.send(garbage);
        let mut rest = Vec::new();
        let _ = client.stream.read_to_end(&mut rest);
    }
    assert_eq!(daemon.ask("GET", "/api/v1/daemon", None).status, 200);
}

#[test]
fn stopping_is_quick_even_with_a_mount_under_way() {
    let mut daemon = Daemon::start();
    let _gate = daemon.slow_mount();
    let mut slow = daemon.connect();
    slow.send(&format!(
        "POST /api/v1/mount?mountpoint=/slow HTTP/1.1\r\nContent-Length: {}\r\n\r\n{PASSTHROUGH}",
        PASSTHROUGH.len()
    ));
    while daemon.model.gate.lock().unwrap().is_some() {
        std::thread::yield_now();
    }
    let mut silent = daemon.connect();
    // Answered once, so that it has been accepted: a connection that only waits in the queue is reset instead.
    silent.send("GET /api/v1/daemon HTTP/1.1\r\n\r\n");
    silent.receive(false);
    let before = Instant::now();
    daemon.server.take().unwrap().stop();
    assert!(
        before.elapsed() < Duration::from_millis(900),
        "{:?}",
        before.elapsed()
    );
    assert_eq!((&silent.stream).read(&mut [0]).unwrap(), 0, "closed at the end");
}
