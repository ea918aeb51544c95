//! A test for every request there is, named after it.

use rafsd_frontend::ops;
use serde_json::{Value, json};

use crate::counters::{eventually, mount};
use crate::images::Image;
use crate::operate::Scene;
use crate::process::{Daemon, wait};

/// A daemon with an image at `/m`, whose blobs are in a directory and of which everything is counted.
fn with_image() -> (Image, Daemon) {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let config = json!({"version": 2, "id": "/17",
        "backend": {"type": "localfs", "localfs": {"dir": image.blobs()}},
        "cache": {"type": "blobcache", "filecache": {"work_dir": image.cache()}},
        "rafs": {"batch_size": 0, "iostats_files": true, "access_pattern": true, "latest_read_files": true}});
    mount(&daemon, "/m", &image, &config).nothing();
    (image, daemon)
}

/// The same, after a guest has read a file.
fn after_a_read() -> (Image, Daemon) {
    let (image, daemon) = with_image();
    let options = rafsd_frontend::Options::default();
    let guest = rafsd_frontend::Guest::boot(daemon.path("vu.sock"), options).unwrap();
    assert_eq!(guest.read_file("/m/hello").unwrap(), b"hello");
    (image, daemon)
}

fn get(daemon: &Daemon, target: &str) -> Value {
    let answer = daemon.ask("GET", target, "");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn put(daemon: &Daemon, target: &str, body: &Value) -> crate::process::Answer {
    daemon.ask("PUT", target, &body.to_string())
}

/// Names of the members.
fn members(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn is_numbers(value: &Value, length: usize) -> bool {
    let array = value.as_array().unwrap();
    array.len() == length && array.iter().all(Value::is_u64)
}

#[test]
fn get_api_v1_daemon() {
    let (_image, daemon) = with_image();
    let info = get(&daemon, "/api/v1/daemon");
    assert_eq!(
        members(&info),
        ["backend_collection", "id", "state", "supervisor", "version"]
    );
    assert_eq!(info["state"], "RUNNING");
    assert!(info["id"].is_null() && info["supervisor"].is_null());
    for member in ["package_ver", "git_commit", "build_time", "profile", "rustc"] {
        let text = info["version"][member].as_str();
        assert!(text.is_some_and(|text| !text.is_empty()), "{member}");
    }
    let mounted = &info["backend_collection"]["/m"];
    assert_eq!(
        members(mounted),
        ["backend_type", "config", "mounted_time", "mountpoint"]
    );
    assert_eq!(
        (&mounted["backend_type"], &mounted["mountpoint"]),
        (&json!("Rafs"), &json!("/m"))
    );
    // `2026-11-21 21:46:42.629744263 +00:00:00`
    let time = mounted["mounted_time"].as_str().unwrap();
    assert!(time.len() == 39 && time.ends_with(" +00:00:00"), "{time}");
    assert_eq!(
        (&mounted["config"]["version"], &mounted["config"]["id"]),
        (&json!(2), &json!("/17"))
    );
}

#[test]
fn put_api_v1_daemon() {
    let daemon = Daemon::start(&[]);
    for level in ["trace", "debug", "info", "warn", "error", "off"] {
        put(&daemon, "/api/v1/daemon", &json!({"log_level": level})).nothing();
        assert_eq!(get(&daemon, "/api/rafsd/v1/daemon")["log_level"], level);
    }
    let message = put(&daemon, "/api/v1/daemon", &json!({"log_level": "loud"})).error(500);
    assert!(
        message.contains("Configure") && message.contains("loud"),
        "{message}"
    );
    let message = put(&daemon, "/api/v1/daemon", &json!({})).error(400);
    assert!(message.contains("missing field `log_level`"), "{message}");
}

#[test]
fn get_api_v1_daemon_events() {
    let daemon = Daemon::start(&[]);
    assert_eq!(
        get(&daemon, "/api/v1/daemon/events"),
        json!({"max_errors": 500, "total_errors": 0, "max_size": 51200, "total_size": 0, "errors": []})
    );
}

#[test]
fn get_api_v1_daemon_backend() {
    let (_image, daemon) = with_image();
    let dump = get(&daemon, "/api/v1/daemon/backend?mountpoint=/m");
    assert_eq!(
        (&dump["magic"], &dump["version"]),
        (&json!(3_774_210_530_u32), &json!(1536))
    );
    for member in [
        "sb_size",
        "root_inode",
        "chunk_size",
        "batch_size",
        "inodes_count",
        "inode_table_entries",
        "inode_table_offset",
        "blob_table_size",
        "blob_table_offset",
        "extended_blob_table_offset",
        "extended_blob_table_entries",
        "blob_device_table_count",
        "blob_device_table_offset",
        "prefetch_table_offset",
        "prefetch_table_entries",
        "meta_blkaddr",
        "root_nid",
        "chunk_table_offset",
        "chunk_table_size",
    ] {
        assert!(dump[member].is_u64(), "{member}");
    }
    assert!(dump["flags"]["bits"].is_u64() && dump["is_chunk_dict"].is_boolean());
    for timeout in ["attr_timeout", "entry_timeout"] {
        assert_eq!(dump[timeout], json!({"secs": 4_294_967_296_u64, "nanos": 0}));
    }
    daemon.mount_directory("/c", daemon.dir.path()).nothing();
    let refused = |query: &str, status| {
        daemon
            .ask("GET", &format!("/api/v1/daemon/backend{query}"), "")
            .error(status)
    };
    assert!(refused("?mountpoint=/c", 500).contains("filesystem type mismatch, expect RAFS"));
    refused("?mountpoint=/x", 500);
    refused("", 400);
}

#[test]
fn put_api_v1_daemon_start() {
    let daemon = Daemon::start(&[]);
    let message = daemon.ask("PUT", "/api/v1/daemon/start", "").error(400);
    assert!(message.contains("UnexpectedEvent(\"Start\")"), "{message}");
    assert_eq!(get(&daemon, "/api/v1/daemon")["state"], "RUNNING");
}

/// The incumbent's answers and then hangs, with its API gone.
#[test]
fn put_api_v1_daemon_exit() {
    let mut daemon = Daemon::start(&[]);
    daemon.ask("PUT", "/api/v1/daemon/exit", "").nothing();
    assert_eq!(wait(&mut daemon.child).code(), Some(0));
    assert!(!daemon.path("vu.sock").exists() && !daemon.path("api.sock").exists());
}

#[test]
fn put_api_v1_daemon_fuse_sendfd() {
    let daemon = Daemon::start(&["--id", "i", "--supervisor", "/no/such/supervisor"]);
    let message = daemon.ask("PUT", "/api/v1/daemon/fuse/sendfd", "").error(501);
    assert!(
        message.contains("Unsupported") && message.contains("vhost-user"),
        "{message}"
    );
}

#[test]
fn put_api_v1_daemon_fuse_takeover() {
    let daemon = Daemon::start(&["--upgrade"]);
    let message = daemon.ask("PUT", "/api/v1/daemon/fuse/takeover", "").error(400);
    assert!(message.contains("UnexpectedEvent(\"Takeover\")"), "{message}");
}

#[test]
fn post_api_v1_mount() {
    let (_image, daemon) = with_image();
    let post = |target: &str, body: Value| daemon.ask("POST", target, &body.to_string());
    let share = json!({"fs_type": "passthrough_fs", "source": daemon.dir.path(), "config": ""});
    post("/api/v1/mount?mountpoint=/c", share.clone()).nothing();
    assert!(post("/api/v1/mount", share).error(400).contains("mountpoint"));
    for missing in ["source", "config"] {
        let mut body = json!({"fs_type": "passthrough_fs", "source": "/", "config": ""});
        body.as_object_mut().unwrap().remove(missing);
        let message = post("/api/v1/mount?mountpoint=/x", body).error(400);
        assert!(message.contains(missing), "{message}");
    }
    post(
        "/api/v1/mount?mountpoint=/x",
        json!({"source": "/", "config": ""}),
    )
    .error(500);
    post(
        "/api/v1/mount?mountpoint=/x",
        json!({"fs_type": "rafs", "source": "/", "config": {}}),
    )
    .error(400);
    assert_eq!(daemon.mountpoints(), ["/c", "/m"]);
}

#[test]
fn put_api_v1_mount() {
    let (image, daemon) = with_image();
    let body = json!({"fs_type": "rafs", "source": image.bootstrap(), "config": image.config()});
    put(&daemon, "/api/v1/mount?mountpoint=/m", &body).nothing();
    let message = put(&daemon, "/api/v1/mount?mountpoint=/x", &body).error(500);
    assert!(
        message.contains("object or filesystem doesn't exist"),
        "{message}"
    );
    put(&daemon, "/api/v1/mount", &body).error(400);
}

#[test]
fn delete_api_v1_mount() {
    let (_image, daemon) = with_image();
    let delete = |query: &str| daemon.ask("DELETE", &format!("/api/v1/mount{query}"), "");
    delete("?mountpoint=/m").nothing();
    let message = delete("?mountpoint=/m").error(500);
    assert!(
        message.contains("object or filesystem doesn't exist"),
        "{message}"
    );
    delete("").error(400);
}

#[test]
fn get_api_v1_config() {
    let (_image, daemon) = with_image();
    assert_eq!(get(&daemon, "/api/v1/config"), json!({}));
    put(&daemon, "/api/v1/config?id=/m", &json!({"registry_auth": "YTpi"})).nothing();
    // The incumbent shows them to whoever asks.
    assert_eq!(
        get(&daemon, "/api/v1/config?id=/m"),
        json!({"registry_auth": "***"})
    );
    assert_eq!(get(&daemon, "/api/v1/config"), json!({"/m:registry_auth": "***"}));
}

#[test]
fn put_api_v1_config() {
    let (_image, daemon) = with_image();
    let target = "/api/v1/config?id=%2Fm";
    put(&daemon, target, &json!({"registry_auth": "YTpi"})).nothing();
    let message = put(&daemon, target, &json!({"colour": "red"})).error(500);
    assert!(
        message.contains("Configure") && message.contains("colour"),
        "{message}"
    );
    put(
        &daemon,
        target,
        &json!({"dragonfly_scheduler_endpoint": "http://x"}),
    )
    .error(501);
    put(&daemon, "/api/v1/config?id=/x", &json!({"registry_auth": "YTpi"})).error(500);
    put(&daemon, "/api/v1/config", &json!({"registry_auth": "YTpi"})).error(400);
}

#[test]
fn get_api_v1_metrics() {
    let (_image, daemon) = after_a_read();
    for target in [
        "/api/v1/metrics",
        "/api/v1/metrics?id=%2Fm",
        "/api/v1/metrics?id=/17",
    ] {
        let metrics = get(&daemon, target);
        for (member, length) in [
            ("block_count_read", 8),
            ("fop_hits", 15),
            ("fop_errors", 15),
            ("fop_cumulative_latency_total", 15),
            ("read_latency_dist", 8),
        ] {
            assert!(is_numbers(&metrics[member], length), "{member}");
        }
        for member in [
            "files_account_enabled",
            "access_pattern_enabled",
            "record_latest_read_files_enabled",
            "measure_latency",
        ] {
            assert!(metrics[member].is_boolean(), "{member}");
        }
        assert_eq!((&metrics["id"], &metrics["data_read"]), (&json!("/m"), &json!(5)));
        assert!(metrics["nr_opens"].is_u64());
        // Reads and lookups, where clients look for them.
        assert!(metrics["fop_hits"][4].as_u64() >= Some(1) && metrics["fop_hits"][9].as_u64() >= Some(1));
    }
    let message = daemon.ask("GET", "/api/v1/metrics?id=/x", "").error(404);
    assert!(message.contains("NoCounter"), "{message}");
}

#[test]
fn get_api_v1_metrics_files() {
    let (_image, daemon) = after_a_read();
    let files = get(&daemon, "/api/v1/metrics/files?id=/m");
    assert!(!files.as_object().unwrap().is_empty());
    for (inode, file) in files.as_object().unwrap() {
        inode.parse::<u64>().unwrap();
        assert_eq!(
            members(file),
            [
                "block_count_read",
                "data_read",
                "fop_errors",
                "fop_hits",
                "total_fops"
            ]
        );
        assert!(is_numbers(&file["fop_hits"], 15) && is_numbers(&file["block_count_read"], 8));
    }
    let latest = get(&daemon, "/api/v1/metrics/files?id=/m&latest=true");
    let ranges = latest.as_array().unwrap();
    assert!(!ranges.is_empty());
    for range in ranges {
        assert!(is_numbers(range, 1) || is_numbers(range, 2), "{range}");
    }
    assert_eq!(
        get(&daemon, "/api/v1/metrics/files?id=/m&latest=true"),
        json!([]),
        "cleared by reading"
    );
    daemon.ask("GET", "/api/v1/metrics/files?id=/x", "").error(404);
}

#[test]
fn get_api_v1_metrics_pattern() {
    let (_image, daemon) = after_a_read();
    let pattern = get(&daemon, "/api/v1/metrics/pattern?id=/m");
    assert_eq!(
        members(&pattern[0]),
        [
            "first_access_time_nanos",
            "first_access_time_secs",
            "ino",
            "nr_read"
        ]
    );
    assert_eq!(pattern[0]["nr_read"], 1);
    daemon.ask("GET", "/api/v1/metrics/pattern?id=/x", "").error(404);
}

#[test]
fn get_api_v1_metrics_inflight() {
    let scene = Scene::start(&[]);
    scene.daemon.ask("GET", "/api/v1/metrics/inflight", "").nothing();
    scene.registry.set(|fault| fault.stalled = true);
    let guest = scene.boot();
    let hello = guest.resolve("/m/hello").unwrap().nodeid;
    let ticket = guest.submit(&ops::read(hello, 0, 0, 5)).unwrap();
    let ask = || scene.daemon.ask("GET", "/api/v1/metrics/inflight", "");
    eventually("listed", || ask().status == 200);
    let listed = ask().json();
    assert_eq!(
        members(&listed[0]),
        ["inode", "opcode", "timestamp_secs", "unique"]
    );
    assert_eq!(
        (&listed[0]["inode"], &listed[0]["opcode"]),
        (&json!(hello), &json!(15))
    );
    scene.registry.set(|fault| fault.stalled = false);
    guest.wait(ticket).unwrap();
}

#[test]
fn get_api_v1_metrics_backend() {
    let (_image, daemon) = after_a_read();
    let metrics = get(&daemon, "/api/v1/metrics/backend?id=/m");
    assert_eq!(metrics["backend_type"], "localfs");
    for member in [
        "read_count",
        "read_errors",
        "read_amount_total",
        "read_cumulative_latency_millis_total",
    ] {
        assert!(metrics[member].is_u64(), "{member}");
    }
    assert!(is_numbers(&metrics["read_cumulative_latency_millis_dist"], 8));
    assert!(is_numbers(&metrics["read_count_block_size_dist"], 8));
    let by_size = metrics["read_latency_sizes_dist"].as_array().unwrap();
    assert!(by_size.len() == 8 && by_size.iter().all(|row| is_numbers(row, 8)));
    assert!(metrics["read_count"].as_u64() >= Some(1));
    daemon.ask("GET", "/api/v1/metrics/backend?id=/x", "").error(404);
}

#[test]
fn get_api_v1_metrics_blobcache() {
    let (image, daemon) = after_a_read();
    // By the id of the configuration, and by the mountpoint.
    for target in [
        "/api/v1/metrics/blobcache?id=/17",
        "/api/v1/metrics/blobcache?id=/m",
    ] {
        let metrics = get(&daemon, target);
        let file = metrics["underlying_files"][0].as_str().unwrap();
        assert!(file.ends_with(".blob.data"), "{file}");
        assert_eq!(metrics["store_path"], json!(image.cache()));
        assert_eq!(metrics["data_all_ready"], false);
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
    }
    daemon
        .ask("GET", "/api/v1/metrics/blobcache?id=/x", "")
        .error(404);
}

#[test]
fn get_api_v2_daemon() {
    let (_image, daemon) = with_image();
    let info = get(&daemon, "/api/v2/daemon");
    assert_eq!((members(&info).len(), &info["state"]), (5, &json!("RUNNING")));
    assert!(info["backend_collection"].is_null());
}

#[test]
fn put_api_v2_daemon() {
    let daemon = Daemon::start(&[]);
    put(&daemon, "/api/v2/daemon", &json!({"log_level": "warn"})).nothing();
    assert_eq!(get(&daemon, "/api/rafsd/v1/daemon")["log_level"], "warn");
}

#[test]
fn put_api_v2_blobs() {
    let daemon = Daemon::start(&[]);
    let entry = json!({"type": "bootstrap", "id": "b", "domain_id": "d", "config_v2": {"version": 2}});
    let message = put(&daemon, "/api/v2/blobs", &entry).error(501);
    assert!(message.contains("Unsupported"), "{message}");
    put(&daemon, "/api/v2/blobs", &json!({"type": "bootstrap", "id": "b"})).error(400);
}

#[test]
fn delete_api_v2_blobs() {
    let daemon = Daemon::start(&[]);
    let delete = |query: &str| daemon.ask("DELETE", &format!("/api/v2/blobs{query}"), "");
    delete("?domain_id=d").error(501);
    delete("?domain_id=d&blob_id=b").error(501);
    delete("?blob_id=b").nothing();
    delete("").error(400);
}

/// The one that ends the incumbent.
#[test]
fn get_api_v2_blobs() {
    let mut daemon = Daemon::start(&[]);
    daemon.ask("GET", "/api/v2/blobs?domain_id=x", "").error(501);
    daemon.ask("GET", "/api/v2/blobs", "").error(400);
    assert!(daemon.child.try_wait().unwrap().is_none());
    assert_eq!(get(&daemon, "/api/v1/daemon")["state"], "RUNNING");
}

/// An error of our own API: its code is one that says something.
fn own_error(answer: &crate::process::Answer, status: u16, code: &str) {
    answer.error(status);
    assert_eq!(answer.json()["code"], code, "{answer:?}");
}

#[test]
fn get_api_rafsd_v1_daemon() {
    let (_image, daemon) = after_a_read();
    let overview = get(&daemon, "/api/rafsd/v1/daemon");
    assert_eq!(overview["pid"], daemon.child.id());
    assert_eq!(
        (&overview["mounts"], &overview["waiting"], &overview["draining"]),
        (&json!(1), &json!(0), &json!(false))
    );
    assert!(overview["uptime_ms"].is_u64() && overview["device"]["requests"]["Read"].as_u64() >= Some(1));
}

#[test]
fn put_api_rafsd_v1_daemon() {
    let daemon = Daemon::start(&[]);
    let target = "/api/rafsd/v1/daemon";
    put(&daemon, target, &json!({"log_level": "debug"})).nothing();
    assert_eq!(get(&daemon, target)["log_level"], "debug");
    own_error(
        &put(&daemon, target, &json!({"log_level": "loud"})),
        500,
        "FAILED",
    );
    own_error(&put(&daemon, target, &json!({})), 400, "BAD_REQUEST");
}

#[test]
fn get_api_rafsd_v1_mounts() {
    let (image, daemon) = after_a_read();
    let mounts = get(&daemon, "/api/rafsd/v1/mounts?mountpoint=/m");
    assert_eq!(
        (&mounts[0]["kind"], &mounts[0]["state"]),
        (&json!("image"), &json!("serving"))
    );
    assert_eq!(mounts[0]["source"], json!(image.bootstrap()));
    assert_eq!(mounts[0]["image"]["blobs"][0]["resident"], 1);
    let answer = daemon.ask("GET", "/api/rafsd/v1/mounts?mountpoint=/x", "");
    own_error(&answer, 404, "NOT_FOUND");
}

#[test]
fn get_api_rafsd_v1_requests() {
    let scene = Scene::start(&[]);
    assert_eq!(scene.get("/api/rafsd/v1/requests"), json!([]));
    scene.registry.set(|fault| fault.stalled = true);
    let guest = scene.boot();
    let hello = guest.resolve("/m/hello").unwrap().nodeid;
    let ticket = guest.submit(&ops::read(hello, 0, 0, 5)).unwrap();
    eventually("listed", || scene.get("/api/rafsd/v1/requests") != json!([]));
    let listed = scene.get("/api/rafsd/v1/requests");
    assert_eq!(
        (&listed[0]["operation"], &listed[0]["path"]),
        (&json!("Read"), &json!("/hello"))
    );
    assert_eq!(
        listed[0]["data"]["source_host"],
        scene.registry.address.to_string()
    );
    scene.registry.set(|fault| fault.stalled = false);
    guest.wait(ticket).unwrap();
}

#[test]
fn get_api_rafsd_v1_latencies() {
    let (_image, daemon) = after_a_read();
    let latencies = get(&daemon, "/api/rafsd/v1/latencies?mountpoint=/m");
    let by_work = &latencies[0]["by_work"];
    assert_eq!(members(by_work), ["metadata", "read", "write"]);
    assert_eq!(by_work["read"]["count"], 1);
    let answer = daemon.ask("GET", "/api/rafsd/v1/latencies?mountpoint=/x", "");
    own_error(&answer, 404, "NOT_FOUND");
}

#[test]
fn get_api_rafsd_v1_residency() {
    let (_image, daemon) = after_a_read();
    let of = |path: &str| {
        let target = format!("/api/rafsd/v1/residency?mountpoint=/m&path={path}");
        daemon.ask("GET", &target, "")
    };
    let hello = of("/hello").json();
    assert_eq!(
        (&hello["chunks"], &hello["ranges"]),
        (&json!(1), &json!([[0, 0]]))
    );
    assert_eq!(of("/usr/bin/tool").json()["ranges"], json!([]));
    own_error(&of("/usr"), 400, "BAD_REQUEST");
    own_error(&of("/no/such"), 404, "NOT_FOUND");
}

#[test]
fn put_api_rafsd_v1_trace() {
    let (_image, daemon) = with_image();
    let put = |query: &str| daemon.ask("PUT", &format!("/api/rafsd/v1/trace{query}"), "");
    put("?mountpoint=/m").nothing();
    assert_eq!(
        get(&daemon, "/api/rafsd/v1/trace?mountpoint=/m")["recording"],
        true
    );
    own_error(&put("?mountpoint=/x"), 404, "NOT_FOUND");
    own_error(&put(""), 400, "BAD_REQUEST");
}

#[test]
fn get_api_rafsd_v1_trace() {
    let (_image, daemon) = with_image();
    let trace = get(&daemon, "/api/rafsd/v1/trace?mountpoint=/m");
    assert_eq!(
        trace,
        json!({"mountpoint": "/m", "recording": false, "chunks": 0, "trace": "rafsd-trace 1\n"})
    );
}

#[test]
fn delete_api_rafsd_v1_trace() {
    let (_image, daemon) = with_image();
    let ask = |method: &str| daemon.ask(method, "/api/rafsd/v1/trace?mountpoint=/m", "");
    ask("PUT").nothing();
    ask("DELETE").nothing();
    ask("DELETE").nothing();
    assert_eq!(ask("GET").json()["recording"], false);
}

#[test]
fn put_api_rafsd_v1_credentials() {
    let (_image, daemon) = with_image();
    let target = "/api/rafsd/v1/credentials?mountpoint=/m";
    put(&daemon, target, &json!({"registry_auth": "YTpi"})).nothing();
    assert_eq!(
        get(&daemon, "/api/v1/config?id=/m"),
        json!({"registry_auth": "***"})
    );
    let wrong = put(&daemon, target, &json!({"registry_auth": 4711}));
    own_error(&wrong, 400, "BAD_REQUEST");
    assert!(!wrong.body.contains("4711"), "a secret is not repeated");
}

#[test]
fn put_api_rafsd_v1_drain() {
    let daemon = Daemon::start(&[]);
    let drained = put(&daemon, "/api/rafsd/v1/drain", &json!({"timeout_ms": 100}));
    assert_eq!(drained.json(), json!({"drained": true, "waiting": 0}));
    daemon.mount_directory("/c", daemon.dir.path()).error(503);
    let too_long = put(&daemon, "/api/rafsd/v1/drain", &json!({"timeout_ms": 60_001}));
    own_error(&too_long, 400, "BAD_REQUEST");
}

#[test]
fn delete_api_rafsd_v1_drain() {
    let daemon = Daemon::start(&[]);
    put(&daemon, "/api/rafsd/v1/drain", &json!({"timeout_ms": 0})).json();
    daemon.ask("DELETE", "/api/rafsd/v1/drain", "").nothing();
    daemon.mount_directory("/c", daemon.dir.path()).nothing();
}

/// The document is also how the tests know of every request there is.
#[test]
fn get_api_rafsd_v1_openapi_json() {
    let daemon = Daemon::start(&[]);
    let document = get(&daemon, "/api/rafsd/v1/openapi.json");
    assert_eq!(document["openapi"], "3.1.0");
    let tests = include_str!("endpoints.rs");
    let mut missing = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in members(methods) {
            let name = format!("{method}{}", path.replace(['/', '.'], "_"));
            if !tests.contains(&format!("#[test]\nfn {name}()")) {
                missing.push(name);
            }
        }
    }
    assert!(missing.is_empty(), "requests without a test: {missing:?}");
}

#[test]
fn get_metrics() {
    let (_image, daemon) = after_a_read();
    let answer = daemon.ask("GET", "/metrics", "");
    assert_eq!(answer.status, 200);
    let kind = answer.header("Content-Type").unwrap();
    assert!(
        kind.starts_with("application/openmetrics-text; version=1.0.0"),
        "{kind}"
    );
    assert_eq!(
        crate::operate::samples(&answer.body)["rafsd_mounts{kind=\"image\"}"],
        1.0
    );
    assert!(answer.body.ends_with("# EOF\n"));
}
