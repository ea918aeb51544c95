//! What operators see of a daemon with a guest at work: our own API, and the counters for Prometheus.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use rafsd_frontend::abi::{opcode, open_flags};
use rafsd_frontend::registry::{REPOSITORY, Registry};
use rafsd_frontend::{Guest, Options, ops};
use serde_json::{Value, json};

use super::counters::{eventually, mount};
use super::images::Image;
use super::process::Daemon;

/// A daemon with an image from a registry at `/m` and a directory at `/c`.
pub struct Scene {
    pub image: Image,
    pub registry: Registry,
    pub daemon: Daemon,
    pub share: tempfile::TempDir,
}

impl Scene {
    pub fn start(arguments: &[&str]) -> Self {
        let image = Image::build();
        let registry = Registry::start(&image.blobs()).unwrap();
        let daemon = Daemon::start(arguments);
        let config = json!({"version": 2, "id": "r",
            "backend": {"type": "registry", "registry": {"scheme": "http", "host": registry.address.to_string(), "repo": REPOSITORY}},
            "cache": {"type": "filecache", "filecache": {"work_dir": image.cache()}}, "rafs": {"batch_size": 0}});
        mount(&daemon, "/m", &image, &config).nothing();
        let share = tempfile::tempdir().unwrap();
        std::fs::write(share.path().join("file"), "data").unwrap();
        daemon.mount_directory("/c", share.path()).nothing();
        Self {
            image,
            registry,
            daemon,
            share,
        }
    }

    pub fn boot(&self) -> Guest {
        Guest::boot(self.daemon.path("vu.sock"), Options::default()).unwrap()
    }

    pub fn get(&self, target: &str) -> Value {
        self.daemon.ask("GET", target, "").json()
    }
}

/// Runs `rafs ctl` and hands out what it prints.
fn ctl(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_rafs"))
        .args(["ctl", "--apisock"])
        .arg(daemon.path("api.sock"))
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Samples by name and labels, as they are written.
pub fn samples(text: &str) -> BTreeMap<String, f64> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

#[test]
fn a_stalled_read_names_its_file_image_and_source_within_a_second() {
    let scene = Scene::start(&[]);
    scene.registry.set(|fault| fault.stalled = true);
    let guest = scene.boot();
    assert_eq!(scene.get("/api/rafsd/v1/requests"), json!([]));
    let tool = guest.resolve("/m/usr/bin/tool").unwrap().nodeid;
    let begun = Instant::now();
    let ticket = guest.submit(&ops::read(tool, 0, 1 << 20, 4096)).unwrap();
    eventually("listed", || scene.get("/api/rafsd/v1/requests") != json!([]));
    let took = begun.elapsed();
    let listed = scene.get("/api/rafsd/v1/requests");
    let age = Duration::from_millis(listed[0]["age_ms"].as_u64().unwrap());
    assert!(age <= begun.elapsed(), "{listed}");
    println!("listed {took:?} after the read was sent");

    let [request] = listed.as_array().unwrap().as_slice() else {
        panic!("{listed}")
    };
    assert_eq!(request["operation"], "Read");
    assert_eq!(request["mountpoint"], "/m");
    assert_eq!(request["path"], "/usr/bin/tool");
    assert_eq!(
        (&request["offset"], &request["size"]),
        (&json!(1 << 20), &json!(4096))
    );
    assert_eq!(request["waits_for"], "data");
    assert!(request["deadline_ms"].as_u64().unwrap() <= 30_000);
    let data = &request["data"];
    assert_eq!(data["image"], scene.image.bootstrap().to_str().unwrap());
    assert_eq!(data["source_type"], "registry");
    assert_eq!(data["source_host"], scene.registry.address.to_string());
    assert_eq!(data["chunks"].as_array().unwrap().len(), 1);
    // On a slow machine an attempt may just have ended, and the next one not begun.
    eventually("counted", || {
        let status = scene.get("/api/rafsd/v1/mounts?mountpoint=/m");
        let (waiting, blob) = (&status[0]["waiting"], &status[0]["image"]["blobs"][0]);
        (waiting, &blob["in_flight"]) == (&json!(1), &json!(1))
    });

    // And the same for people.
    let told = ctl(&scene.daemon, &["requests"]);
    for part in [
        "Read",
        "/m/usr/bin/tool",
        "1 chunk of blob",
        scene.image.bootstrap().to_str().unwrap(),
        &scene.registry.address.to_string(),
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    println!("{told}");
    assert_eq!(
        serde_json::from_str::<Value>(&ctl(&scene.daemon, &["requests", "--json"])).unwrap()[0]["path"],
        "/usr/bin/tool"
    );

    // A drain sees it, too; new mounts are refused meanwhile.
    let drain = |timeout: u64| {
        let body = json!({"timeout_ms": timeout}).to_string();
        scene.daemon.ask("PUT", "/api/rafsd/v1/drain", &body).json()
    };
    assert_eq!(drain(10), json!({"drained": false, "waiting": 1}));
    scene
        .daemon
        .mount_directory("/other", scene.share.path())
        .error(503);
    // What arrives ends the wait. The stalled attempt itself ends by its time-out.
    scene.registry.set(|fault| fault.stalled = false);
    assert_eq!(drain(30_000), json!({"drained": true, "waiting": 0}));
    guest.wait(ticket).unwrap();
    scene.daemon.ask("DELETE", "/api/rafsd/v1/drain", "").nothing();
    scene
        .daemon
        .mount_directory("/other", scene.share.path())
        .nothing();
    drop(guest);
    scene.daemon.terminate();
}

#[test]
fn a_wait_on_a_directory_of_the_host_names_its_file() {
    let scene = Scene::start(&["--host-locks"]);
    std::fs::create_dir(scene.share.path().join("data")).unwrap();
    std::fs::write(scene.share.path().join("data/base.db"), "x").unwrap();
    let guest = scene.boot();
    let node = guest.resolve("/c/data/base.db").unwrap().nodeid;
    let fh = guest.open(node, open_flags::RDWR).unwrap();
    let lock = |code, owner, kind: i32| {
        let lock = ops::Lock {
            owner,
            start: 0,
            end: i64::MAX as u64,
            kind: kind as u32,
            flock: false,
        };
        ops::lock(code, node, fh, &lock)
    };
    assert_eq!(guest.errno(&lock(opcode::SETLK, 1, libc::F_WRLCK)).unwrap(), 0);
    let waits = guest.submit(&lock(opcode::SETLKW, 2, libc::F_WRLCK)).unwrap();
    eventually("listed", || scene.get("/api/rafsd/v1/requests") != json!([]));
    let listed = scene.get("/api/rafsd/v1/requests");
    assert_eq!(
        (
            &listed[0]["mountpoint"],
            &listed[0]["path"],
            &listed[0]["waits_for"]
        ),
        (&json!("/c"), &json!("/data/base.db"), &json!("lock"))
    );
    let told = ctl(&scene.daemon, &["requests"]);
    assert!(told.contains("/c/data/base.db"), "{told}");
    assert_eq!(guest.errno(&lock(opcode::SETLK, 1, libc::F_UNLCK)).unwrap(), 0);
    assert_eq!(guest.wait(waits).unwrap().errno, 0);
    drop(guest);
    scene.daemon.terminate();
}

#[test]
fn mounts_latencies_and_residency() {
    let scene = Scene::start(&[]);
    let guest = scene.boot();
    let tool = guest.resolve("/m/usr/bin/tool").unwrap().nodeid;
    assert_eq!(guest.read(tool, 0, 1 << 20, 4096).unwrap(), vec![8; 4096]);
    assert_eq!(guest.read_file("/c/file").unwrap(), b"data");

    let overview = scene.get("/api/rafsd/v1/daemon");
    assert_eq!(
        (&overview["mounts"], &overview["log_level"], &overview["draining"]),
        (&json!(2), &json!("info"), &json!(false))
    );
    assert!(overview["device"]["requests"]["Read"].as_u64().unwrap() >= 2);
    assert_eq!(overview["device"]["bugs"], 0);

    let mounts = scene.get("/api/rafsd/v1/mounts");
    let (directory, image) = (&mounts[0], &mounts[1]);
    assert_eq!(
        (&directory["kind"], &directory["source"]),
        (&json!("directory"), &json!(scene.share.path()))
    );
    assert_eq!(
        (&directory["cache"]["policy"], &directory["cache"]["metadata_ms"]),
        (&json!("auto"), &json!(1000))
    );
    assert_eq!(directory["read_only"], false);
    assert_eq!(
        (&image["kind"], &image["state"], &image["read_only"]),
        (&json!("image"), &json!("serving"), &json!(true))
    );
    assert!(image["cache"]["metadata_ms"].is_null(), "for ever");
    assert!(image["requests"].as_u64().unwrap() >= 3);
    let blob = &image["image"]["blobs"][0];
    // Three chunks of the tool; the small file may share one with it or not.
    assert_eq!(blob["resident"], 1);
    assert!(
        blob["chunks"].as_u64().unwrap() >= 3 && blob["damaged"] == 0,
        "{blob}"
    );
    assert_eq!(image["image"]["source_failures"], 0);

    let latencies = scene.get("/api/rafsd/v1/latencies?mountpoint=/m");
    let read = &latencies[0]["by_work"]["read"];
    assert_eq!(read["count"], 1);
    let classes: u64 = read["classes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|class| class["count"].as_u64().unwrap())
        .sum();
    assert_eq!(classes, 1);
    assert!(
        read["p99_us"].as_u64().unwrap() > 0
            && latencies[0]["by_work"]["metadata"]["count"].as_u64().unwrap() >= 3
    );

    let residency = scene.get("/api/rafsd/v1/residency?mountpoint=/m&path=/usr/bin/tool");
    assert_eq!(
        (&residency["chunks"], &residency["resident"]),
        (&json!(3), &json!(1))
    );
    assert_eq!(
        (&residency["ranges"], &residency["size"]),
        (&json!([[1, 1]]), &json!(3 << 20))
    );
    for (target, status) in [
        ("residency?mountpoint=/m&path=/no/such/file", 404),
        ("residency?mountpoint=/m&path=/usr", 400),
        ("residency?mountpoint=/c&path=/file", 404),
        ("mounts?mountpoint=/nothing", 404),
    ] {
        scene
            .daemon
            .ask("GET", &format!("/api/rafsd/v1/{target}"), "")
            .error(status);
    }
    drop(guest);
    scene.daemon.terminate();
}

#[test]
fn an_access_trace_has_the_chunks_in_the_order_of_their_first_read() {
    let scene = Scene::start(&[]);
    let guest = scene.boot();
    let trace = || scene.get("/api/rafsd/v1/trace?mountpoint=/m");
    assert_eq!(guest.read_file("/m/hello").unwrap(), b"hello");
    assert_eq!(
        trace(),
        json!({"mountpoint": "/m", "recording": false, "chunks": 0, "trace": "rafsd-trace 1\n"})
    );

    let tool = guest.resolve("/m/usr/bin/tool").unwrap().nodeid;
    ctl(&scene.daemon, &["trace", "start", "/m"]);
    // The last chunk of the tool, the other file, the first chunk, and the last one again.
    guest.read(tool, 0, 2 << 20, 4096).unwrap();
    assert_eq!(guest.read_file("/m/hello").unwrap(), b"hello");
    guest.read(tool, 0, 0, 4096).unwrap();
    guest.read(tool, 0, 2 << 20, 4096).unwrap();
    let recorded = trace();
    assert_eq!(
        (&recorded["recording"], &recorded["chunks"]),
        (&json!(true), &json!(3))
    );
    let text = recorded["trace"].as_str().unwrap();
    let parsed: rafs::trace::Trace = text.parse().unwrap();
    let order: Vec<u32> = parsed
        .parts
        .iter()
        .flat_map(|(_, chunks)| chunks.clone())
        .collect();
    let [last, hello, first] = order.as_slice() else {
        panic!("{text}")
    };
    assert_eq!(*last, first + 2, "{text}");
    assert!(!(*first..=*last).contains(hello), "{text}");
    assert_eq!(ctl(&scene.daemon, &["trace", "show", "/m"]), text);

    // What was recorded outlives the end of the recording, and nothing is added.
    ctl(&scene.daemon, &["trace", "stop", "/m"]);
    guest.read(tool, 0, 1 << 20, 4096).unwrap();
    let stopped = trace();
    assert_eq!(
        (&stopped["recording"], &stopped["trace"]),
        (&json!(false), &recorded["trace"])
    );
    // A new recording begins from nothing.
    ctl(&scene.daemon, &["trace", "start", "/m"]);
    assert_eq!(trace()["chunks"], 0);

    for method in ["GET", "PUT", "DELETE"] {
        for (mountpoint, status) in [("/c", 400), ("/nothing", 404)] {
            let target = format!("/api/rafsd/v1/trace?mountpoint={mountpoint}");
            let message = scene.daemon.ask(method, &target, "").error(status);
            assert!(message.contains(mountpoint), "{message}");
        }
    }
    drop(guest);
    scene.daemon.terminate();
}

#[test]
fn counters_for_prometheus_on_both_sockets() {
    let port = {
        // Free a moment ago; nobody else is likely to take it within the next one.
        let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        probe.local_addr().unwrap().port()
    };
    let scene = Scene::start(&["--metrics-address", &port.to_string()]);
    let guest = scene.boot();
    assert_eq!(guest.read_file("/m/hello").unwrap(), b"hello");
    assert_eq!(guest.read_file("/c/file").unwrap(), b"data");
    let seen = samples(&scene.daemon.ask("GET", "/metrics", "").body);
    let source = format!("source=\"{}\",type=\"registry\"", scene.registry.address);
    assert_eq!(seen["rafsd_mounts{kind=\"image\"}"], 1.0);
    assert_eq!(
        seen["rafsd_requests_total{mountpoint=\"/m\",operation=\"Read\"}"],
        1.0
    );
    assert_eq!(
        seen["rafsd_request_duration_seconds_count{mountpoint=\"/m\",work=\"read\"}"],
        1.0
    );
    assert_eq!(
        seen["rafsd_request_duration_seconds_bucket{le=\"+Inf\",mountpoint=\"/m\",work=\"read\"}"],
        1.0
    );
    assert_eq!(seen["rafsd_bugs_total"], 0.0);
    assert_eq!(seen["rafsd_image_resident_chunks{mountpoint=\"/m\"}"], 1.0);
    assert_eq!(seen[&format!("rafsd_fetched_chunks_total{{{source}}}")], 1.0);
    assert_eq!(seen[&format!("rafsd_verified_chunks_total{{{source}}}")], 1.0);
    assert_eq!(seen[&format!("rafsd_source_failures_in_a_row{{{source}}}")], 0.0);
    assert!(seen[&format!("rafsd_source_requests_total{{{source}}}")] >= 1.0);

    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("rafsd_mounts{kind=\"directory\"} 1"), "{answer}");
    drop(guest);
    scene.daemon.terminate();
}

#[test]
fn evictions_are_counted_by_cache_directory() {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let quota = 2 << 20;
    let config = json!({"version": 2, "backend": {"type": "localfs", "localfs": {"dir": image.blobs()}},
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache(), "quota": quota}}, "rafs": {"batch_size": 0}});
    mount(&daemon, "/m", &image, &config).nothing();
    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    let cache = |what: &str| {
        let name = format!("rafsd_{what}{{directory=\"{}\"}}", image.cache().display());
        samples(&daemon.ask("GET", "/metrics", "").body)[&name]
    };
    assert_eq!(
        (cache("cache_quota_bytes"), cache("evicted_chunks_total")),
        (f64::from(quota), 0.0)
    );
    // Three chunks of 1 MiB: there is never room for all.
    eventually("evicted", || {
        assert_eq!(guest.read_file("/m/usr/bin/tool").unwrap().len(), 3 << 20);
        cache("evicted_chunks_total") >= 1.0
    });
    assert!(cache("evicted_bytes_total") >= f64::from(1 << 20));
    assert!(cache("cache_used_bytes") > 0.0);
    drop(guest);
    daemon.terminate();
}

#[test]
fn every_subcommand_of_ctl() {
    let scene = Scene::start(&[]);
    let guest = scene.boot();
    assert_eq!(guest.read_file("/m/hello").unwrap(), b"hello");
    let share = scene.share.path().to_str().unwrap();
    let says = |arguments: &[&str], parts: &[&str]| {
        let text = ctl(&scene.daemon, arguments);
        for part in parts {
            assert!(text.contains(part), "{arguments:?}: {part}: {text}");
        }
        let json = ctl(&scene.daemon, &[arguments, &["--json"]].concat());
        serde_json::from_str::<Value>(&json).unwrap_or_else(|error| panic!("{error}: {json}"))
    };
    let pid = scene.daemon.child.id().to_string();
    assert_eq!(
        says(&["info"], &["RUNNING", &pid, "Lookup"])["pid"],
        scene.daemon.child.id()
    );
    assert_eq!(
        says(&["mounts"], &["/m", "/c", share, "% of"])
            .as_array()
            .unwrap()
            .len(),
        2
    );
    says(&["mounts", "/c"], &["directory", "auto"]);
    says(&["requests"], &["no request waits"]);
    says(&["latencies", "/m"], &["metadata", "read", "us"]);
    says(&["residency", "/m", "/hello"], &["1 of 1 chunks are local: 0"]);
    assert!(says(&["metrics"], &["rafsd_mounts{kind=\"image\"} 1"])["rafsd_mounts{kind=\"image\"}"] == 1.0);
    ctl(&scene.daemon, &["mount", share, "/other"]);
    assert!(ctl(&scene.daemon, &["mounts"]).contains("/other"));
    ctl(&scene.daemon, &["umount", "/other"]);
    ctl(&scene.daemon, &["log-level", "debug"]);
    assert_eq!(scene.get("/api/rafsd/v1/daemon")["log_level"], "debug");
    assert!(ctl(&scene.daemon, &["drain", "--timeout", "1"]).contains("drained"));
    ctl(&scene.daemon, &["drain", "--end"]);
    let top = ctl(&scene.daemon, &["top", "-n", "1", "-i", "0.1"]);
    assert!(
        top.contains("REQUESTS/S") && top.contains("/c") && top.contains("no request waits"),
        "{top}"
    );
    // What goes wrong is told, with code 1.
    let output = Command::new(env!("CARGO_BIN_EXE_rafs"))
        .args(["ctl", "umount", "/nothing", "-A"])
        .arg(scene.daemon.path("api.sock"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("doesn't exist"));
    drop(guest);
    scene.daemon.terminate();
}
