//! What the API counts, with a guest at work.

use std::time::{Duration, Instant};

use rafsd_frontend::registry::{REPOSITORY, Registry};
use rafsd_frontend::{Guest, Options, ops};
use serde_json::{Value, json};

use super::images::Image;
use super::process::{Answer, Daemon, LONG};

pub fn mount(daemon: &Daemon, mountpoint: &str, image: &Image, config: &Value) -> Answer {
    let body = json!({"fs_type": "rafs", "source": image.bootstrap(), "config": config.to_string()});
    daemon.ask(
        "POST",
        &format!("/api/v1/mount?mountpoint={mountpoint}"),
        &body.to_string(),
    )
}

/// Everything counted, nothing fetched beyond what is asked for.
fn config(image: &Image, prefetch: Value) -> Value {
    json!({"version": 2, "id": "snapshot-1",
        "backend": {"type": "localfs", "localfs": {"dir": image.blobs()}},
        "cache": {"type": "blobcache", "filecache": {"work_dir": image.cache()}},
        "rafs": {"batch_size": 0, "iostats_files": true, "access_pattern": true, "latest_read_files": true,
            "prefetch": prefetch}})
}

fn get(daemon: &Daemon, target: &str) -> Value {
    daemon.ask("GET", target, "").json()
}

pub fn eventually(what: &str, check: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !check() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn operations_of_a_guest_are_counted_by_mount() {
    let image = Image::build();
    let daemon = Daemon::start(&[]);
    mount(&daemon, "/m", &image, &config(&image, json!({"enable": false}))).nothing();
    mount(
        &daemon,
        "/other",
        &image,
        &config(&image, json!({"enable": false})),
    )
    .nothing();
    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    assert_eq!(guest.read_file("/m/hello").unwrap(), b"hello");
    let tool = guest.resolve("/m/usr/bin/tool").unwrap().nodeid;
    assert_eq!(guest.read(tool, 0, 0, 4096).unwrap(), vec![7; 4096]);
    assert_eq!(guest.read(tool, 0, 4096, 4096).unwrap(), vec![7; 4096]);
    assert!(guest.lookup(tool, "x").is_err());

    let metrics = get(&daemon, "/api/v1/metrics?id=/m");
    assert_eq!(metrics["id"], "/m");
    assert_eq!(metrics["data_read"], 5 + 2 * 4096);
    assert!(metrics["fop_hits"][9].as_u64().unwrap() >= 4, "{metrics}");
    assert!(metrics["fop_errors"][9].as_u64().unwrap() >= 1, "{metrics}");
    assert_eq!(metrics["block_count_read"][2].as_u64(), Some(2), "{metrics}");
    let sum = |array: &Value| {
        array
            .as_array()
            .unwrap()
            .iter()
            .map(|count| count.as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!(
        sum(&metrics["read_latency_dist"]),
        sum(&metrics["block_count_read"]),
        "{metrics}"
    );
    assert_eq!(sum(&get(&daemon, "/api/v1/metrics?id=/other")["fop_hits"]), 0);

    let inodes: Vec<u64> = get(&daemon, "/api/v1/metrics/files?id=/m")
        .as_object()
        .unwrap()
        .keys()
        .map(|inode| inode.parse().unwrap())
        .collect();
    let pattern = get(&daemon, "/api/v1/metrics/pattern?id=/m");
    assert_eq!(pattern.as_array().unwrap().len(), 2);
    assert!(
        pattern
            .as_array()
            .unwrap()
            .iter()
            .all(|record| inodes.contains(&record["ino"].as_u64().unwrap()))
    );
    assert_eq!(pattern[1]["nr_read"], 2);
    let latest = get(&daemon, "/api/v1/metrics/files?id=/m&latest=true");
    assert!(!latest.as_array().unwrap().is_empty());
    assert_eq!(get(&daemon, "/api/v1/metrics/files?id=/m&latest=true"), json!([]));

    // By the configuration's id as well; without one only if there is no doubt.
    let cache = get(&daemon, "/api/v1/metrics/blobcache?id=snapshot-1");
    assert!(cache["entries_count"].as_u64().unwrap() >= 2, "{cache}");
    assert_eq!(cache["store_path"], image.cache().to_str().unwrap());
    assert_eq!(cache["data_all_ready"], false);
    assert!(
        cache["total"].as_u64() >= Some(3) && cache["partial_hits"].as_u64() >= Some(2),
        "{cache}"
    );
    daemon.ask("GET", "/api/v1/metrics", "").error(404);
    daemon
        .ask("DELETE", "/api/v1/mount?mountpoint=/other", "")
        .nothing();
    assert_eq!(get(&daemon, "/api/v1/metrics")["id"], "/m");
    let backend = get(&daemon, "/api/v1/metrics/backend");
    assert_eq!(
        (backend["backend_type"].as_str(), backend["read_errors"].as_u64()),
        (Some("localfs"), Some(0))
    );
    assert!(backend["read_count"].as_u64().unwrap() >= 2, "{backend}");
    drop(guest);
    daemon.terminate();
}

#[test]
fn prefetch_makes_everything_resident() {
    let image = Image::build();
    let daemon = Daemon::start(&[]);
    mount(
        &daemon,
        "/m",
        &image,
        &config(&image, json!({"enable": true, "prefetch_all": true})),
    )
    .nothing();
    let cache = || get(&daemon, "/api/v1/metrics/blobcache");
    eventually("all resident", || cache()["data_all_ready"] == true);
    eventually("prefetch ended", || {
        cache()["prefetch_end_time_secs"].as_u64() > Some(0)
    });
    let cache = cache();
    assert!(cache["prefetch_data_amount"].as_u64().unwrap() > 0, "{cache}");
    assert!(cache["prefetch_requests_count"].as_u64().unwrap() > 0, "{cache}");
    daemon.terminate();
}

#[test]
fn files_that_the_runtime_names_are_prefetched() {
    let image = Image::build();
    let daemon = Daemon::start(&[]);
    let body = json!({"fs_type": "rafs", "source": image.bootstrap(),
        "config": config(&image, json!({"enable": true})).to_string(),
        "prefetch_files": ["/hello", "/no/such/file"]});
    daemon
        .ask("POST", "/api/v1/mount?mountpoint=/m", &body.to_string())
        .nothing();
    eventually("one chunk resident", || {
        get(&daemon, "/api/v1/metrics/blobcache")["entries_count"] == 1
    });
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(
        get(&daemon, "/api/v1/metrics/blobcache")["entries_count"],
        1,
        "and no other"
    );
}

#[test]
fn requests_that_wait_are_listed() {
    let image = Image::build();
    let registry = Registry::start(&image.blobs()).unwrap();
    registry.set(|fault| fault.stalled = true);
    let daemon = Daemon::start(&[]);
    let config = json!({"version": 2, "id": "r",
        "backend": {"type": "registry", "registry": {"scheme": "http", "host": registry.address.to_string(), "repo": REPOSITORY}},
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache()}}, "rafs": {}});
    mount(&daemon, "/m", &image, &config).nothing();
    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    assert_eq!(daemon.ask("GET", "/api/v1/metrics/inflight", "").status, 204);
    let tool = guest.resolve("/m/usr/bin/tool").unwrap().nodeid;
    let ticket = guest.submit(&ops::read(tool, 0, 0, 4096)).unwrap();
    eventually("listed", || {
        daemon.ask("GET", "/api/v1/metrics/inflight", "").status == 200
    });
    let listed = get(&daemon, "/api/v1/metrics/inflight");
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert_eq!(
        (listed[0]["opcode"].as_u64(), listed[0]["inode"].as_u64()),
        (Some(15), Some(tool))
    );
    assert!(
        now - listed[0]["timestamp_secs"].as_u64().unwrap() <= 20,
        "{listed}"
    );
    // Unmounting answers it.
    daemon.ask("DELETE", "/api/v1/mount?mountpoint=/m", "").nothing();
    guest.wait(ticket).unwrap();
    assert_eq!(daemon.ask("GET", "/api/v1/metrics/inflight", "").status, 204);
    drop(guest);
    daemon.terminate();
}
