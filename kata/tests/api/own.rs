//! Our own API: its rows, its errors, its document; counters over TCP.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use rafsd_kata::api::Scrape;
use rafsd_kata::control::operate::{AwaitedData, LiveRequest};
use serde_json::json;

use super::model::{Answer, Daemon};

fn error(answer: &Answer, status: u16, code: &str) -> String {
    let message = answer.error_with(status, code);
    assert!(!message.is_empty());
    message
}

#[test]
fn get_and_put_own_daemon() {
    let daemon = Daemon::start();
    daemon
        .ask("PUT", "/api/rafsd/v1/daemon", Some(r#"{"log_level":"warn"}"#))
        .nothing();
    let info = daemon.ask("GET", "/api/rafsd/v1/daemon", None).json();
    assert_eq!(
        (&info["log_level"], &info["state"]),
        (&json!("warn"), &json!("RUNNING"))
    );
    assert!(info["device"]["requests"].is_object() && info["uptime_ms"].is_u64());
    let loud = daemon.ask("PUT", "/api/rafsd/v1/daemon", Some(r#"{"log_level":"loud"}"#));
    assert!(error(&loud, 500, "FAILED").contains("loud"));
}

#[test]
fn get_own_mounts_and_latencies() {
    let daemon = Daemon::start();
    for what in ["mounts", "latencies"] {
        let path = format!("/api/rafsd/v1/{what}");
        assert_eq!(daemon.ask("GET", &path, None).json(), json!([]));
        assert_eq!(
            daemon.ask("GET", &format!("{path}?mountpoint=%2Fm"), None).json(),
            json!([])
        );
        let missing = daemon.ask("GET", &format!("{path}?mountpoint=/x"), None);
        assert!(error(&missing, 404, "NOT_FOUND").contains("/x"));
    }
}

#[test]
fn get_own_requests() {
    let daemon = Daemon::start();
    assert_eq!(
        daemon.ask("GET", "/api/rafsd/v1/requests", None).json(),
        json!([])
    );
    daemon.model.live.lock().unwrap().push(LiveRequest {
        unique: 7,
        operation: "Read".into(),
        opcode: 15,
        mountpoint: "/m".into(),
        path: Some("/bin/sh".into()),
        inode: 3,
        offset: Some(0),
        size: Some(4096),
        age_ms: 900,
        deadline_ms: Some(29_100),
        waits_for: "data".into(),
        data: Some(AwaitedData {
            image: "/b".into(),
            source_type: "registry".into(),
            source_host: "registry.example".into(),
            blob: "abc".into(),
            chunks: vec![4],
            last_error: None,
        }),
    });
    let listed = daemon.ask("GET", "/api/rafsd/v1/requests", None).json();
    assert_eq!(listed[0]["path"], "/bin/sh");
    assert_eq!(listed[0]["data"]["source_host"], "registry.example");
}

#[test]
fn get_own_residency() {
    let daemon = Daemon::start();
    let of = |query: &str| daemon.ask("GET", &format!("/api/rafsd/v1/residency{query}"), None);
    let found = of("?mountpoint=/m&path=%2Fbin%2Fsh").json();
    assert_eq!(
        (&found["path"], &found["ranges"]),
        (&json!("/bin/sh"), &json!([[0, 1]]))
    );
    assert!(error(&of("?mountpoint=/m"), 400, "BAD_REQUEST").contains("path"));
    assert!(error(&of("?path=/x"), 400, "BAD_REQUEST").contains("mountpoint"));
    error(&of("?mountpoint=/x&path=/x"), 404, "NOT_FOUND");
}

#[test]
fn put_own_credentials() {
    let daemon = Daemon::start();
    let put = |body: &str| daemon.ask("PUT", "/api/rafsd/v1/credentials?mountpoint=/m", Some(body));
    put(r#"{"registry_auth":"YTpi"}"#).nothing();
    let stored = daemon.model.settings.lock().unwrap()["/m"].clone();
    assert_eq!(stored.registry_auth.unwrap().expose(), "YTpi");
    assert!(!error(&put(r#"{"registry_auth":4711}"#), 400, "BAD_REQUEST").contains("4711"));
}

#[test]
fn put_and_delete_own_drain() {
    let daemon = Daemon::start();
    let put = |body: &str| daemon.ask("PUT", "/api/rafsd/v1/drain", Some(body));
    assert_eq!(
        put(r#"{"timeout_ms":5}"#).json(),
        json!({"drained": true, "waiting": 0})
    );
    assert_eq!(*daemon.model.drained.lock().unwrap(), [5]);
    assert!(error(&put(r#"{"timeout_ms":60001}"#), 400, "BAD_REQUEST").contains("60001"));
    daemon.ask("DELETE", "/api/rafsd/v1/drain", None).nothing();
    assert!(daemon.model.drained.lock().unwrap().is_empty());
}

#[test]
fn get_own_document() {
    let daemon = Daemon::start();
    let document = daemon.ask("GET", "/api/rafsd/v1/openapi.json", None).json();
    assert_eq!(document["openapi"], "3.1.0");
    let mount = &document["paths"]["/api/v1/mount"]["post"];
    assert_eq!(
        mount["parameters"][0],
        json!({"name": "mountpoint", "in": "query", "required": true, "schema": {"type": "string"}})
    );
    assert_eq!(
        mount["requestBody"]["content"]["application/json"]["schema"]["$ref"],
        "#/components/schemas/MountRequest"
    );
    assert!(mount["responses"]["204"].is_object() && mount["responses"]["default"].is_object());
}

#[test]
fn own_errors_are_json_with_codes() {
    let daemon = Daemon::start();
    error(
        &daemon.ask("GET", "/api/rafsd/v1/nothing", None),
        404,
        "NOT_FOUND",
    );
    error(
        &daemon.ask("GET", "/api/rafsd/v1/daemon", Some("{}")),
        400,
        "BAD_REQUEST",
    );
}

#[test]
fn metrics_on_the_api_socket() {
    let daemon = Daemon::start();
    let answer = daemon.ask("GET", "/metrics", None);
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .header("content-type")
            .unwrap()
            .starts_with("application/openmetrics-text")
    );
}

#[test]
fn metrics_over_tcp_and_nothing_else() {
    let daemon = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let scrape = Scrape::start(listener, daemon.model.clone()).unwrap();
    let ask = |request: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(
            stream,
            "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = ask("GET /metrics");
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("# EOF\n"),
        "{answer}"
    );
    assert!(ask("GET /api/v1/daemon").starts_with("HTTP/1.1 404"));
    assert!(ask("PUT /api/v1/daemon/exit").starts_with("HTTP/1.1 400"));
    assert!(!*daemon.model.exited.lock().unwrap());
    drop(scrape);
    assert!(TcpStream::connect(address).is_err());
}
