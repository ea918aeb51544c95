//! What is wrong with the incumbent and must not be with us. What a single request does wrong stands with that request.

use serde_json::json;

use crate::counters::mount;
use crate::images::Image;
use crate::process::Daemon;

fn registry_config(image: &Image, backend: &serde_json::Value) -> serde_json::Value {
    json!({"version": 2, "backend": backend,
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache()}}, "rafs": {}})
}

/// There, the counters of whatever was mounted once stay, and every query without an id fails from then on.
#[test]
fn counters_go_with_their_mounts() {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let config = registry_config(
        &image,
        &json!({"type": "localfs", "localfs": {"dir": image.blobs()}}),
    );
    mount(&daemon, "/gone", &image, &config).nothing();
    daemon
        .ask("DELETE", "/api/v1/mount?mountpoint=/gone", "")
        .nothing();
    let broken = registry_config(&image, &json!({"type": "localfs", "localfs": {}}));
    mount(&daemon, "/failed", &image, &broken).error(500);
    mount(&daemon, "/m", &image, &config).nothing();
    assert_eq!(daemon.ask("GET", "/api/v1/metrics", "").json()["id"], "/m");
    for what in ["backend", "blobcache"] {
        assert_eq!(
            daemon.ask("GET", &format!("/api/v1/metrics/{what}"), "").status,
            200
        );
    }
    daemon.ask("GET", "/api/v1/metrics?id=/gone", "").error(404);
}

/// There, S3 keys and the password of a proxy are shown to whoever asks.
#[test]
fn no_answer_shows_a_secret() {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let proxy = json!({"url": "http://user:hunter2@127.0.0.1:1"});
    let sources = [
        json!({"type": "s3", "s3": {"endpoint": "127.0.0.1:1", "region": "r", "bucket_name": "b",
            "access_key_id": "hunter2", "access_key_secret": "hunter2", "proxy": proxy}}),
        json!({"type": "oss", "oss": {"endpoint": "127.0.0.1:1", "bucket_name": "b",
            "access_key_id": "hunter2", "access_key_secret": "hunter2"}}),
        json!({"type": "registry", "registry": {"host": "127.0.0.1:1", "repo": "r",
            "registry_token": "hunter2", "proxy": proxy}}),
    ];
    for (number, source) in sources.iter().enumerate() {
        mount(
            &daemon,
            &format!("/m{number}"),
            &image,
            &registry_config(&image, source),
        )
        .nothing();
    }
    let settings = json!({"registry_auth": "aHVudGVyMg==", "proxy_url": "http://user:hunter2@127.0.0.1:1"});
    daemon
        .ask("PUT", "/api/v1/config?id=/m2", &settings.to_string())
        .error(400);
    let settings = json!({"proxy_url": "http://user:hunter2@127.0.0.1:1"});
    daemon
        .ask("PUT", "/api/v1/config?id=/m2", &settings.to_string())
        .nothing();
    for target in [
        "/api/v1/daemon",
        "/api/v1/config",
        "/api/v1/config?id=/m2",
        "/api/v1/daemon/events",
        "/api/rafsd/v1/mounts",
        "/metrics",
    ] {
        let body = daemon.ask("GET", target, "").body;
        assert!(
            !body.contains("hunter2") && !body.contains("aHVudGVyMg"),
            "{target}: {body}"
        );
    }
}

/// There, directories made for a mountpoint stay for good.
#[test]
fn directories_that_lead_to_mounts_go_with_them() {
    let daemon = Daemon::start(&[]);
    let share = tempfile::tempdir().unwrap();
    daemon.mount_directory("/a/b/c", share.path()).nothing();
    daemon.mount_directory("/a/x", share.path()).nothing();
    let options = rafsd_frontend::Options::default();
    let guest = rafsd_frontend::Guest::boot(daemon.path("vu.sock"), options).unwrap();
    daemon
        .ask("DELETE", "/api/v1/mount?mountpoint=/a/b/c", "")
        .nothing();
    guest.resolve("/a/b").unwrap_err();
    guest.resolve("/a/x").unwrap();
    daemon
        .ask("DELETE", "/api/v1/mount?mountpoint=/a/x", "")
        .nothing();
    guest.resolve("/a").unwrap_err();
}

/// There, only the first read in the guest tells, by EIO.
#[test]
fn a_source_that_does_not_work_can_be_seen() {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let source =
        json!({"type": "registry", "registry": {"scheme": "http", "host": "127.0.0.1:1", "repo": "r"}});
    mount(&daemon, "/m", &image, &registry_config(&image, &source)).nothing();
    let options = rafsd_frontend::Options::default();
    let guest = rafsd_frontend::Guest::boot(daemon.path("vu.sock"), options).unwrap();
    let hello = guest.resolve("/m/hello").unwrap().nodeid;
    guest.submit(&rafsd_frontend::ops::read(hello, 0, 0, 5)).unwrap();
    let status = || daemon.ask("GET", "/api/rafsd/v1/mounts?mountpoint=/m", "").json();
    crate::counters::eventually("failures are counted", || {
        status()[0]["image"]["source_failures"].as_u64() > Some(0)
    });
    let listed = daemon.ask("GET", "/api/rafsd/v1/requests", "").json();
    assert_eq!(listed[0]["data"]["source_host"], "127.0.0.1:1");
    assert!(listed[0]["data"]["last_error"].is_string(), "{listed}");
}
