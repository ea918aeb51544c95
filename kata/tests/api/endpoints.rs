//! Endpoints, one test each.

use rafsd_kata::control::metrics::InFlight;
use serde_json::json;

use super::model::Daemon;

const PASSTHROUGH: &str = r#"{"fs_type":"passthrough_fs","source":"/s","config":""}"#;
const RAFS: &str = r#"{"fs_type":"rafs","source":"/b","config":"{}","prefetch_files":["/bin/sh"]}"#;

/// Names of an object's members, in the order of the text.
fn keys(value: &serde_json::Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn get_daemon() {
    let daemon = Daemon::start();
    let info = daemon.ask("GET", "/api/v1/daemon", None).json();
    assert_eq!(info["state"], "RUNNING");
    assert!(info["id"].is_null() && info["supervisor"].is_null());
    assert_eq!(info["backend_collection"], json!({}));
    for member in ["package_ver", "git_commit", "build_time", "profile", "rustc"] {
        assert!(info["version"][member].is_string(), "{member}");
    }
    daemon
        .ask("POST", "/api/v1/mount?mountpoint=/containers", Some(PASSTHROUGH))
        .nothing();
    let info = daemon.ask("GET", "/api/v1/daemon", None).json();
    assert_eq!(
        info["backend_collection"]["/containers"],
        json!({"backend_type": "PassthroughFs", "mountpoint": "/containers",
               "mounted_time": "2026-11-21 21:46:42.629744263 +00:00:00", "config": null})
    );
}

#[test]
fn put_daemon() {
    let daemon = Daemon::start();
    for level in ["trace", "debug", "info", "warn", "error", "off"] {
        daemon
            .ask(
                "PUT",
                "/api/v1/daemon",
                Some(&json!({"log_level": level}).to_string()),
            )
            .nothing();
        assert_eq!(*daemon.model.log_level.lock().unwrap(), level);
    }
    let message = daemon
        .ask("PUT", "/api/v1/daemon", Some(r#"{"log_level":"loud"}"#))
        .error(500);
    assert!(
        message.contains("loud") && message.contains("trace, debug, info"),
        "{message}"
    );
    let message = daemon.ask("PUT", "/api/v1/daemon", Some("{}")).error(400);
    assert!(message.contains("missing field `log_level`"), "{message}");
    daemon.ask("PUT", "/api/v1/daemon", Some("not json")).error(400);
}

#[test]
fn get_daemon_events() {
    assert_eq!(
        Daemon::start().ask("GET", "/api/v1/daemon/events", None).json(),
        json!({"max_errors": 500, "total_errors": 0, "max_size": 51200, "total_size": 0, "errors": []})
    );
}

#[test]
fn get_daemon_backend() {
    let daemon = Daemon::start();
    daemon.ask("GET", "/api/v1/daemon/backend", None).error(400);
    let message = daemon
        .ask("GET", "/api/v1/daemon/backend?mountpoint=/containers", None)
        .error(500);
    assert!(message.contains("filesystem type mismatch, expect RAFS"));
    let superblock = daemon
        .ask("GET", "/api/v1/daemon/backend?mountpoint=/rafs", None)
        .json();
    assert_eq!(superblock["magic"], 3774210530u32);
}

#[test]
fn put_daemon_start() {
    let message = Daemon::start()
        .ask("PUT", "/api/v1/daemon/start", None)
        .error(400);
    assert!(message.contains("UnexpectedEvent(\"Start\")"), "{message}");
}

#[test]
fn put_daemon_exit() {
    let daemon = Daemon::start();
    daemon.ask("PUT", "/api/v1/daemon/exit", None).nothing();
    assert!(*daemon.model.exited.lock().unwrap());
}

#[test]
fn put_daemon_fuse_sendfd() {
    assert!(
        Daemon::start()
            .ask("PUT", "/api/v1/daemon/fuse/sendfd", None)
            .error(501)
            .contains("Unsupported")
    );
}

#[test]
fn put_daemon_fuse_takeover() {
    let message = Daemon::start()
        .ask("PUT", "/api/v1/daemon/fuse/takeover", None)
        .error(400);
    assert!(message.contains("UnexpectedEvent(\"Takeover\")"), "{message}");
}

#[test]
fn post_mount() {
    let daemon = Daemon::start();
    let ask = |target: &str, body: &str| daemon.ask("POST", target, Some(body));
    ask("/api/v1/mount?mountpoint=/containers", PASSTHROUGH).nothing();
    let message = ask("/api/v1/mount?mountpoint=/containers", PASSTHROUGH).error(500);
    assert!(message.contains("object or filesystem already exists"));
    ask("/api/v1/mount?mountpoint=/rafs/c1/lowerdir", RAFS).nothing();
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
    assert!(
        ask("/api/v1/mount", PASSTHROUGH)
            .error(400)
            .contains("mountpoint")
    );
    assert!(
        ask("/api/v1/mount?mountpoint=/x", r#"{"config":""}"#)
            .error(400)
            .contains("source")
    );
    assert!(
        ask("/api/v1/mount?mountpoint=/x", r#"{"source":"/s"}"#)
            .error(400)
            .contains("config")
    );
    assert!(
        ask("/api/v1/mount?mountpoint=/x", "{")
            .error(400)
            .contains("line 1")
    );
}

#[test]
fn put_mount() {
    let daemon = Daemon::start();
    let message = daemon
        .ask("PUT", "/api/v1/mount?mountpoint=/m", Some(RAFS))
        .error(500);
    assert!(message.contains("object or filesystem doesn't exist"));
    daemon
        .ask("POST", "/api/v1/mount?mountpoint=/m", Some(RAFS))
        .nothing();
    daemon
        .ask("PUT", "/api/v1/mount?mountpoint=/m", Some(RAFS))
        .nothing();
}

#[test]
fn delete_mount() {
    let daemon = Daemon::start();
    daemon
        .ask("POST", "/api/v1/mount?mountpoint=/m", Some(RAFS))
        .nothing();
    daemon
        .ask("DELETE", "/api/v1/mount?mountpoint=/m", None)
        .nothing();
    let message = daemon
        .ask("DELETE", "/api/v1/mount?mountpoint=/m", None)
        .error(500);
    assert!(message.contains("object or filesystem doesn't exist"));
    daemon.ask("DELETE", "/api/v1/mount", None).error(400);
}

#[test]
fn get_and_put_config() {
    let daemon = Daemon::start();
    assert_eq!(daemon.ask("GET", "/api/v1/config", None).json(), json!({}));
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
        keys(&daemon.ask("GET", "/api/v1/config", None).json()),
        ["/rafs/c1/lowerdir:proxy_url", "/rafs/c1/lowerdir:registry_auth"]
    );
    assert!(put(r#"{"colour":"red"}"#).error(500).contains("colour"));
    assert!(!put(r#"{"registry_auth":4711}"#).error(400).contains("4711"));
    daemon
        .ask("PUT", "/api/v1/config", Some(r#"{"registry_auth":"x"}"#))
        .error(400);
}

#[test]
fn get_metrics() {
    let daemon = Daemon::start();
    let metrics = daemon.ask("GET", "/api/v1/metrics?id=%2Fm", None).json();
    for (member, length) in [
        ("block_count_read", 8),
        ("fop_hits", 15),
        ("fop_errors", 15),
        ("fop_cumulative_latency_total", 15),
        ("read_latency_dist", 8),
    ] {
        assert_eq!(metrics[member].as_array().unwrap().len(), length, "{member}");
    }
    for member in [
        "files_account_enabled",
        "access_pattern_enabled",
        "record_latest_read_files_enabled",
        "measure_latency",
    ] {
        assert!(metrics[member].is_boolean(), "{member}");
    }
    assert!(metrics["id"].is_string() && metrics["nr_opens"].is_u64() && metrics["data_read"].is_u64());
    assert_eq!(daemon.ask("GET", "/api/v1/metrics", None).status, 200);
    assert!(
        daemon
            .ask("GET", "/api/v1/metrics?id=/x", None)
            .error(404)
            .contains("NoCounter")
    );
}

#[test]
fn get_metrics_files() {
    let daemon = Daemon::start();
    let files = daemon.ask("GET", "/api/v1/metrics/files?id=/m", None).json();
    assert_eq!(
        keys(&files["136"]),
        [
            "block_count_read",
            "data_read",
            "fop_errors",
            "fop_hits",
            "total_fops"
        ]
    );
    let latest = daemon
        .ask("GET", "/api/v1/metrics/files?id=/m&latest=true", None)
        .json();
    assert_eq!(latest, json!([[136], [150, 152]]));
    assert!(
        daemon
            .ask("GET", "/api/v1/metrics/files?latest=false", None)
            .json()
            .is_object()
    );
    daemon.ask("GET", "/api/v1/metrics/files?id=/x", None).error(404);
}

#[test]
fn get_metrics_pattern() {
    let daemon = Daemon::start();
    assert_eq!(
        daemon.ask("GET", "/api/v1/metrics/pattern?id=/m", None).json(),
        json!([{"ino":136,"nr_read":0,"first_access_time_secs":0,"first_access_time_nanos":0}])
    );
    daemon
        .ask("GET", "/api/v1/metrics/pattern?id=/x", None)
        .error(404);
}

#[test]
fn get_metrics_inflight() {
    let daemon = Daemon::start();
    daemon.ask("GET", "/api/v1/metrics/inflight", None).nothing();
    daemon.model.in_flight.lock().unwrap().push(InFlight {
        inode: 1,
        opcode: 15,
        unique: 7,
        timestamp_secs: 9,
    });
    assert_eq!(
        daemon.ask("GET", "/api/v1/metrics/inflight", None).json(),
        json!([{"inode":1,"opcode":15,"unique":7,"timestamp_secs":9}])
    );
}

#[test]
fn get_metrics_backend() {
    let daemon = Daemon::start();
    let metrics = daemon.ask("GET", "/api/v1/metrics/backend?id=/m", None).json();
    assert_eq!(metrics["backend_type"], "localfs");
    assert_eq!(metrics["read_latency_sizes_dist"].as_array().unwrap().len(), 8);
    assert_eq!(metrics["read_latency_sizes_dist"][7].as_array().unwrap().len(), 8);
    for member in [
        "read_count",
        "read_errors",
        "read_amount_total",
        "read_cumulative_latency_millis_total",
    ] {
        assert!(metrics[member].is_u64(), "{member}");
    }
    daemon
        .ask("GET", "/api/v1/metrics/backend?id=/x", None)
        .error(404);
}

#[test]
fn get_metrics_blobcache() {
    let daemon = Daemon::start();
    let metrics = daemon.ask("GET", "/api/v1/metrics/blobcache", None).json();
    assert!(metrics["underlying_files"].is_array() && metrics["data_all_ready"].is_boolean());
    assert_eq!(metrics["store_path"], "/c");
    for member in [
        "partial_hits",
        "whole_hits",
        "total",
        "entries_count",
        "prefetch_data_amount",
        "prefetch_requests_count",
        "prefetch_workers",
        "prefetch_unmerged_chunks",
        "prefetch_cumulative_time_millis",
        "prefetch_begin_time_secs",
        "prefetch_begin_time_millis",
        "prefetch_end_time_secs",
        "prefetch_end_time_millis",
        "buffered_backend_size",
    ] {
        assert!(metrics[member].is_u64(), "{member}");
    }
    daemon
        .ask("GET", "/api/v1/metrics/blobcache?id=/x", None)
        .error(404);
}

#[test]
fn v2_daemon() {
    let daemon = Daemon::start();
    let info = daemon.ask("GET", "/api/v2/daemon", None).json();
    assert_eq!(keys(&info).len(), 5);
    assert!(info["backend_collection"].is_null());
    daemon
        .ask("PUT", "/api/v2/daemon", Some(r#"{"log_level":"info"}"#))
        .nothing();
}

#[test]
fn v2_blobs_get_answers_and_the_daemon_lives() {
    let daemon = Daemon::start();
    assert!(
        daemon
            .ask("GET", "/api/v2/blobs?domain_id=x", None)
            .error(501)
            .contains("Unsupported")
    );
    daemon.ask("GET", "/api/v2/blobs", None).error(400);
    assert_eq!(daemon.ask("GET", "/api/v1/daemon", None).status, 200);
}

#[test]
fn v2_blobs_put() {
    let daemon = Daemon::start();
    let put = |body: &str| daemon.ask("PUT", "/api/v2/blobs", Some(body));
    assert!(
        put(r#"{"type":"bootstrap","id":"b","config":{}}"#)
            .error(501)
            .contains("Unsupported")
    );
    put(r#"{"type":"bootstrap","id":"b"}"#).error(400);
}

#[test]
fn v2_blobs_delete() {
    let daemon = Daemon::start();
    let delete = |query: &str| daemon.ask("DELETE", &format!("/api/v2/blobs{query}"), None);
    assert!(
        delete("?domain_id=d&blob_id=b")
            .error(501)
            .contains("Unsupported")
    );
    delete("?blob_id=b").nothing();
    delete("").error(400);
}
