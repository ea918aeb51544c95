//! What requests become for the daemon behind them, and its answers for the client. That every endpoint has the shapes which clients
//! expect is tested on the daemon itself.

use rafsd_kata::control::metrics::InFlight;
use serde_json::json;

use super::model::Daemon;

const RAFS: &str = r#"{"fs_type":"rafs","source":"/b","config":"{}","prefetch_files":["/bin/sh"]}"#;

#[test]
fn mount_requests_arrive_as_they_were_sent() {
    let daemon = Daemon::start();
    let post = |target: &str, body: &str| daemon.ask("POST", target, Some(body));
    post(
        "/api/v1/mount?mountpoint=/containers",
        r#"{"fs_type":"passthrough_fs","source":"/s","config":""}"#,
    )
    .nothing();
    post("/api/v1/mount?mountpoint=%2Frafs%2Fc1%2Flowerdir", RAFS).nothing();
    let requests = daemon.model.requests.lock().unwrap().clone();
    assert_eq!(
        (requests[0].fs_type.as_str(), requests[0].prefetch_files.clone()),
        ("passthrough_fs", None)
    );
    assert_eq!(
        (requests[1].source.as_str(), requests[1].config.as_str()),
        ("/b", "{}")
    );
    assert_eq!(requests[1].prefetch_files, Some(vec!["/bin/sh".to_owned()]));
    let names: Vec<String> = daemon.model.mounts.lock().unwrap().keys().cloned().collect();
    assert_eq!(names, ["/containers", "/rafs/c1/lowerdir"]);
}

#[test]
fn what_the_daemon_refuses_is_told_in_its_words() {
    let daemon = Daemon::start();
    for (method, target, body, words) in [
        ("PUT", "/api/v1/mount?mountpoint=/m", Some(RAFS), "doesn't exist"),
        ("DELETE", "/api/v1/mount?mountpoint=/m", None, "doesn't exist"),
        ("GET", "/api/v1/daemon/backend?mountpoint=/m", None, "expect RAFS"),
    ] {
        let message = daemon.ask(method, target, body).error(500);
        assert!(message.contains(words), "{method} {target}: {message}");
    }
    let message = daemon.ask("GET", "/api/v1/metrics?id=/x", None).error(404);
    assert!(
        message.contains("NoCounter") && message.contains("/x"),
        "{message}"
    );
}

#[test]
fn bodies_that_cannot_be_read_never_arrive() {
    let daemon = Daemon::start();
    let target = "/api/v1/mount?mountpoint=/x";
    for (body, word) in [
        ("{", "line 1"),
        (r#"{"config":""}"#, "source"),
        (r#"{"source":"/s"}"#, "config"),
        ("not json", "line 1"),
    ] {
        let message = daemon.ask("POST", target, Some(body)).error(400);
        assert!(message.contains(word), "{body}: {message}");
    }
    assert!(daemon.model.requests.lock().unwrap().is_empty());
}

#[test]
fn levels_are_checked_before_the_daemon_hears_of_them() {
    let daemon = Daemon::start();
    let put = |target: &str, level: &str| {
        let body = json!({"log_level": level}).to_string();
        daemon.ask("PUT", target, Some(&body))
    };
    for (target, level) in [("/api/v1/daemon", "trace"), ("/api/v2/daemon", "warn")] {
        put(target, level).nothing();
        assert_eq!(*daemon.model.log_level.lock().unwrap(), level);
    }
    let message = put("/api/v1/daemon", "loud").error(500);
    assert!(
        message.contains("loud") && message.contains("trace, debug, info"),
        "{message}"
    );
    assert_eq!(*daemon.model.log_level.lock().unwrap(), "warn");
}

#[test]
fn secrets_reach_the_daemon_and_no_answer() {
    let daemon = Daemon::start();
    let put = |body: &str| daemon.ask("PUT", "/api/v1/config?id=/rafs/c1/lowerdir", Some(body));
    put(r#"{"registry_auth":"YTpi","proxy_url":"http://user:hunter2@proxy:1/"}"#).nothing();
    let stored = daemon.model.settings.lock().unwrap()["/rafs/c1/lowerdir"].clone();
    assert_eq!(stored.registry_auth.unwrap().expose(), "YTpi");
    assert_eq!(stored.proxy_url.unwrap().expose(), "http://user:hunter2@proxy:1/");
    assert_eq!(
        daemon
            .ask("GET", "/api/v1/config?id=/rafs/c1/lowerdir", None)
            .json(),
        json!({"registry_auth": "***", "proxy_url": "http://proxy:1/"})
    );
    assert_eq!(
        daemon.ask("GET", "/api/v1/config", None).json(),
        json!({"/rafs/c1/lowerdir:proxy_url": "http://proxy:1/", "/rafs/c1/lowerdir:registry_auth": "***"})
    );
    assert!(!put(r#"{"registry_auth":4711}"#).error(400).contains("4711"));
}

#[test]
fn counters_are_passed_on() {
    let daemon = Daemon::start();
    daemon.ask("GET", "/api/v1/metrics/inflight", None).nothing();
    daemon.model.in_flight.lock().unwrap().push(InFlight {
        inode: 1,
        opcode: 15,
        unique: 7,
        timestamp_secs: 9,
    });
    for (target, expected) in [
        (
            "inflight",
            json!([{"inode":1,"opcode":15,"unique":7,"timestamp_secs":9}]),
        ),
        (
            "pattern?id=/m",
            json!([{"ino":136,"nr_read":0,"first_access_time_secs":0,"first_access_time_nanos":0}]),
        ),
        ("files?id=/m&latest=true", json!([[136], [150, 152]])),
    ] {
        let target = format!("/api/v1/metrics/{target}");
        assert_eq!(daemon.ask("GET", &target, None).json(), expected, "{target}");
    }
}

#[test]
fn exit_reaches_the_daemon() {
    let daemon = Daemon::start();
    daemon.ask("PUT", "/api/v1/daemon/exit", None).nothing();
    assert!(*daemon.model.exited.lock().unwrap());
}
