//! The start of a container from an image of which nothing is local: some three hundred files that lie all over it.
//!
//! What is asserted are requests and bytes; times are printed (`--no-capture`), for they are the machine's.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

use std::collections::VecDeque;
use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backend::config::{HttpConfig, RegistryConfig, Scheme};
use backend::store::{CacheConfig, PrefetchOptions, SourceConfig, Store, StoreOptions};
use rafs::build::{Options as BuildOptions, build_directory};
use rafs::fs::{Options, RafsFs};
use rafs::trace::Trace;
use rafsd::tool::serve::{Options as ServeOptions, Server};
use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::image::remote;
use rafsd_frontend::registry::Registry;
use rafsd_frontend::{Guest, ops};
use serde_json::{Value, json};
use tempfile::TempDir;

const DIRECTORIES: usize = 40;
const FILES: usize = 40;
/// Every fifth file is read.
const STEP: usize = 5;

/// Text of 1 to 40 KiB that compresses about as programs do.
fn content(number: usize) -> Vec<u8> {
    let mut state = number as u64 + 1;
    let size = 1024 + number * 7919 % (39 << 10);
    let mut data = Vec::with_capacity(size + 16);
    while data.len() < size {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        data.extend_from_slice(&(state >> 24).to_le_bytes()[..5]);
        data.extend_from_slice(b"    self.");
    }
    data.truncate(size);
    data
}

fn name(number: usize) -> String {
    format!(
        "/lib/package-{:02}/module-{:02}.py",
        number / FILES,
        number % FILES
    )
}

struct Site {
    image: TempDir,
    server: Server,
}

fn site() -> Site {
    let image = TempDir::new().unwrap();
    let tree = image.path().join("tree");
    for directory in 0..DIRECTORIES {
        fs::create_dir_all(tree.join(format!("lib/package-{directory:02}"))).unwrap();
    }
    for number in 0..DIRECTORIES * FILES {
        fs::write(tree.join(name(number).trim_start_matches('/')), content(number)).unwrap();
    }
    build_directory(&tree, &image.path().join("image"), &BuildOptions::default(), &()).unwrap();
    let server = Server::start(ServeOptions {
        directories: vec![image.path().join("image")],
        ..ServeOptions::default()
    })
    .unwrap();
    Site { image, server }
}

/// A daemon's part of it: a store, and the image mounted.
struct Mount {
    store: Store,
    image: Arc<RafsFs>,
}

impl Site {
    fn mount(&self, cache: &Path) -> Mount {
        let source = SourceConfig::Registry(RegistryConfig {
            host: self.server.addr().to_string(),
            repo: "debian/python".into(),
            scheme: Scheme::Http,
            http: HttpConfig {
                timeout: Duration::from_secs(60),
                ..HttpConfig::default()
            },
            ..RegistryConfig::default()
        });
        let store = Store::new(StoreOptions::default()).unwrap();
        let cache = CacheConfig::new(cache);
        let open = &mut |blob| store.open_blob(blob, &source, &cache);
        let image = RafsFs::open(
            &self.image.path().join("image/bootstrap"),
            Options::default(),
            open,
        )
        .unwrap();
        Mount {
            image: Arc::new(image),
            store,
        }
    }

    /// Requests and bytes since the last call.
    fn traffic(&self) -> (usize, u64) {
        let requests = self.server.requests();
        self.server.clear_requests();
        (requests.len(), requests.iter().map(|request| request.bytes).sum())
    }
}

impl Mount {
    /// Reads the start set, so many files at a time; tells how long that took.
    fn start(&self, depth: usize) -> Duration {
        let begin = Instant::now();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..depth {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(STEP, Ordering::Relaxed);
                        if number >= DIRECTORIES * FILES {
                            return;
                        }
                        let expected = content(number);
                        let file = self
                            .image
                            .reader()
                            .at_path(name(number).as_bytes())
                            .unwrap()
                            .unwrap();
                        let mut data = vec![0; expected.len() + 10];
                        let deadline = Instant::now() + Duration::from_secs(120);
                        let size = self.image.read_waiting(file.id, 0, &mut data, deadline).unwrap();
                        assert!(data[..size] == expected, "{}", name(number));
                    }
                });
            }
        });
        begin.elapsed()
    }

    /// Compressed bytes of the chunks of a trace.
    fn needed(&self, trace: &Trace) -> u64 {
        let blobs = self.image.blobs();
        let chunk = |id: &String, index: &u32| {
            let blob = blobs.iter().find(|blob| blob.description().id == *id).unwrap();
            u64::from(blob.description().index.chunk(*index).unwrap().compressed_size)
        };
        trace
            .parts
            .iter()
            .flat_map(|(id, chunks)| chunks.iter().map(move |index| chunk(id, index)))
            .sum()
    }
}

#[test]
fn a_replayed_trace_costs_few_requests_and_few_bytes() {
    let site = site();
    let set = |latency| {
        let fault = format!("latency={latency}");
        site.server.set_fault(fault.parse().unwrap());
    };
    eprintln!("latency ms | depth | cold s, requests, KiB | with the trace s, requests, KiB | warm s");
    let mut trace: Option<Trace> = None;
    for (latency, depth) in [(5, 1), (20, 8)] {
        set(latency);
        let cache = TempDir::new().unwrap();
        let cold = site.mount(cache.path());
        cold.image.start_trace();
        site.traffic();
        let cold_time = cold.start(depth);
        let (cold_requests, cold_bytes) = site.traffic();
        let recorded = cold.image.trace().to_string().parse::<Trace>().unwrap();
        let needed = cold.needed(&recorded);
        drop(cold);
        let warm_time = site.mount(cache.path()).start(depth);
        assert_eq!(site.traffic().0, 0, "warm");

        let cache = TempDir::new().unwrap();
        let replayed = site.mount(cache.path());
        let begin = Instant::now();
        let options = PrefetchOptions {
            size: 4 << 20,
            ..PrefetchOptions::default()
        };
        let trace: &Trace = trace.get_or_insert(recorded);
        let prefetch = replayed.store.prefetch(trace.wishes(&replayed.image), options);
        while prefetch.progress().ended.is_none() {
            assert!(begin.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_micros(500));
        }
        replayed.start(depth);
        let trace_time = begin.elapsed();
        let (requests, bytes) = site.traffic();
        eprintln!(
            "{latency} | {depth} | {:.2}, {cold_requests}, {} | {:.2}, {requests}, {} (needed {}) | {:.2}",
            cold_time.as_secs_f64(),
            cold_bytes >> 10,
            trace_time.as_secs_f64(),
            bytes >> 10,
            needed >> 10,
            warm_time.as_secs_f64(),
        );
        assert!(requests <= 8, "{requests} requests");
        assert!(bytes * 10 <= needed * 11, "{bytes} bytes for {needed}");
    }
}

/// A daemon with the image mounted, and a guest on it.
struct Served {
    daemon: Daemon,
    guest: Guest,
}

impl Site {
    fn config(&self, cache: &Path) -> Value {
        json!({
            "device": {
                "backend": {"type": "registry", "config": {
                    "scheme": "http", "host": self.server.addr().to_string(), "repo": "debian/python", "timeout": 60}},
                "cache": {"type": "blobcache", "config": {"work_dir": cache}},
            },
            "mode": "direct",
        })
    }

    fn daemon(&self) -> Served {
        let daemon = Builder::new(env!("CARGO_BIN_EXE_rafsd"))
            .unwrap()
            .start()
            .unwrap();
        let guest = daemon.guest(rafsd_frontend::Options::default()).unwrap();
        Served { daemon, guest }
    }

    fn bootstrap(&self) -> PathBuf {
        self.image.path().join("image/bootstrap")
    }

    /// Requests and bytes of a start in a daemon of its own, from the mount on.
    fn start_by_daemon(&self, config: &Value) -> (usize, u64) {
        let served = self.daemon();
        self.traffic();
        served
            .daemon
            .mount_rafs("/image", &self.bootstrap(), &config.to_string())
            .unwrap();
        served.start(8);
        self.traffic()
    }
}

impl Served {
    /// Reads the start set over the virtqueue, so many files at a time.
    fn start(&self, depth: usize) {
        let mut waiting = VecDeque::new();
        for number in (0..DIRECTORIES * FILES).step_by(STEP) {
            let node = self
                .guest
                .resolve(format!("/image{}", name(number)))
                .unwrap()
                .nodeid;
            let fh = self.guest.open(node, 0).unwrap();
            let ticket = self.guest.submit(&ops::read(node, fh, 0, 128 << 10)).unwrap();
            waiting.push_back((number, ticket));
            if waiting.len() >= depth {
                self.finish(waiting.pop_front());
            }
        }
        while !waiting.is_empty() {
            self.finish(waiting.pop_front());
        }
    }

    fn finish(&self, read: Option<(usize, rafsd_frontend::guest::Ticket)>) {
        let (number, ticket) = read.unwrap();
        let reply = self.guest.wait_for(ticket, Duration::from_secs(120)).unwrap();
        assert!(reply.ok().unwrap() == content(number), "{}", name(number));
    }

    fn ask(&self, method: &str, target: &str) -> String {
        let answer = self.daemon.request(method, target, None).unwrap();
        assert!(
            answer.status < 300,
            "{method} {target}: {} {}",
            answer.status,
            answer.body
        );
        answer.body
    }
}

#[test]
fn a_daemon_replays_the_trace_that_another_recorded() {
    let site = site();
    site.server.set_fault("latency=20".parse().unwrap());
    let (first, second, third) = (
        TempDir::new().unwrap(),
        TempDir::new().unwrap(),
        TempDir::new().unwrap(),
    );

    let recording = site.daemon();
    let config = site.config(first.path()).to_string();
    recording
        .daemon
        .mount_rafs("/image", &site.bootstrap(), &config)
        .unwrap();
    recording.ask("PUT", "/api/rafsd/v1/trace?mountpoint=/image");
    site.traffic();
    recording.start(8);
    let cold = site.traffic();
    let shown: Value =
        serde_json::from_str(&recording.ask("GET", "/api/rafsd/v1/trace?mountpoint=/image")).unwrap();
    recording.ask("DELETE", "/api/rafsd/v1/trace?mountpoint=/image");
    drop(recording);
    let trace = shown["trace"].as_str().unwrap();
    let needed = site.mount(first.path()).needed(&trace.parse().unwrap());

    // Named by the configuration.
    let file = second.path().join("python.trace");
    fs::write(&file, trace).unwrap();
    let mut config = site.config(&second.path().join("cache"));
    config["trace"] = json!(file);
    let named = site.start_by_daemon(&config);
    // Found beside the cache, where the recording left it.
    let kept = first.path().join("traces");
    let cache = third.path().join("cache");
    fs::create_dir_all(cache.join("traces")).unwrap();
    for file in fs::read_dir(kept).unwrap().flatten() {
        fs::copy(file.path(), cache.join("traces").join(file.file_name())).unwrap();
    }
    let found = site.start_by_daemon(&site.config(&cache));
    eprintln!("requests, bytes: cold {cold:?}, named {named:?}, found {found:?}; needed {needed}");
    for (requests, bytes) in [named, found] {
        assert!(requests <= 8, "{requests} requests");
        assert!(bytes * 10 <= needed * 11, "{bytes} bytes for {needed}");
    }
    // Named to the tool.
    let tool = TempDir::new().unwrap();
    let served = site.daemon();
    let config = tool.path().join("config.json");
    fs::write(&config, site.config(&tool.path().join("cache")).to_string()).unwrap();
    site.traffic();
    let status = Command::new(env!("CARGO_BIN_EXE_rafs"))
        .args(["ctl", "--apisock"])
        .arg(served.daemon.directory().join("api.sock"))
        .args(["mount", "--config"])
        .arg(&config)
        .arg("--trace")
        .arg(&file)
        .arg(site.bootstrap())
        .arg("/image")
        .status();
    assert!(status.unwrap().success());
    served.start(8);
    assert!(site.traffic().0 <= 8);
    // All of that is local now, and a replay of it costs nothing.
    assert_eq!(site.start_by_daemon(&site.config(&cache)), (0, 0));
    // Unless nobody wants it; and one that is none costs nothing but a warning.
    for trace in ["none", "/no/such/trace"] {
        fs::remove_dir_all(&cache).unwrap();
        let mut config = site.config(&cache);
        config["trace"] = json!(trace);
        assert!(site.start_by_daemon(&config).0 > 8);
    }
}

/// Images of the restart without a network.
const IMAGES: usize = 50;

/// Some files of image `number`; some are in other images, too.
fn small_tree(number: usize) -> Vec<(String, Vec<u8>)> {
    let own = (0..4).map(|file| (format!("own-{file}"), content(10_000 + number * 10 + file)));
    let common = (0..4).map(|file| (format!("common-{file}"), content(9000 + number / 10 * 10 + file)));
    own.chain(common).collect()
}

#[test]
fn fifty_cached_images_restart_without_a_network() {
    let dir = TempDir::new().unwrap();
    let blobs = dir.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    for number in 0..IMAGES {
        let (tree, output) = (dir.path().join("tree"), dir.path().join(number.to_string()));
        fs::create_dir(&tree).unwrap();
        for (name, data) in small_tree(number) {
            fs::write(tree.join(name), data).unwrap();
        }
        build_directory(&tree, &output, &BuildOptions::default(), &()).unwrap();
        fs::remove_dir_all(&tree).unwrap();
        for blob in fs::read_dir(output.join("blobs")).unwrap().flatten() {
            fs::rename(blob.path(), blobs.join(blob.file_name())).unwrap();
        }
    }
    let registry = Registry::start(&blobs).unwrap();
    let config = remote(&registry, &dir.path().join("cache"), 20, 0);
    let serve = || {
        let daemon = Builder::new(env!("CARGO_BIN_EXE_rafsd"))
            .unwrap()
            .start()
            .unwrap();
        let guest = daemon.guest(rafsd_frontend::Options::default()).unwrap();
        for number in 0..IMAGES {
            let bootstrap = dir.path().join(number.to_string()).join("bootstrap");
            let mountpoint = format!("/image-{number}");
            daemon.mount_rafs(&mountpoint, &bootstrap, &config).unwrap();
        }
        for number in 0..IMAGES {
            for (name, data) in small_tree(number) {
                let path = format!("/image-{number}/{name}");
                assert!(guest.read_file(&path).unwrap() == data, "{path}");
            }
        }
    };
    serve();
    assert!(registry.requests() > 0);
    let cache = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafs"));
        let output = command
            .arg("cache")
            .args(arguments)
            .arg(dir.path().join("cache"))
            .output();
        let output = output.unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, text) = cache(&["ls", "--json"]);
    let listed: Value = serde_json::from_str(&text).unwrap();
    let listed = listed.as_array().unwrap();
    assert_eq!(
        (code, listed.len()),
        (Some(0), fs::read_dir(&blobs).unwrap().count())
    );
    assert!(
        listed
            .iter()
            .all(|blob| blob["present"] == blob["chunks"] && blob["pinned"] == false),
        "{text}"
    );
    assert_eq!(cache(&["verify"]).0, Some(0));
    let (code, text) = cache(&["gc"]);
    assert!(code == Some(0) && text.starts_with("0 chunks"), "{text}");
    // The registry is gone. Who asks for it all the same is noticed.
    let address = registry.address;
    drop(registry);
    let trap = loop {
        // Its thread lets go of the port a little later.
        match TcpListener::bind(address) {
            Ok(trap) => break trap,
            Err(error) => assert_eq!(error.kind(), ErrorKind::AddrInUse),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    trap.set_nonblocking(true).unwrap();
    serve();
    let asked = trap.accept().map_err(|error| error.kind());
    assert_eq!(
        asked.map(drop),
        Err(ErrorKind::WouldBlock),
        "a connection was made"
    );
}
