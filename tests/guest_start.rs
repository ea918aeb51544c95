//! The start of a container in a real guest: eight programs read some three hundred files that lie all over a Debian system with Python.
//! Recorded once, the next mount replays it in a few requests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::image::python_tree;
use rafsd_guest::registry::Traffic;
use rafsd_guest::{Boot, Cache, Image, Registry, Sandbox, config};
use serde_json::{Value, json};

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const RAFS: &str = env!("CARGO_BIN_EXE_rafs");

/// Files that a start reads, and programs that read them at the same time.
const FILES: usize = 320;
const READERS: usize = 8;

/// A guest on a daemon, an image for a registry, and what a start reads of it.
struct Site {
    sandbox: Sandbox,
    image: Image,
    store: PathBuf,
    directory: tempfile::TempDir,
    mounts: u32,
}

/// What a start cost.
#[derive(Clone, Copy, Debug)]
struct Start {
    /// From the mount request to the last byte.
    time: Duration,
    traffic: Traffic,
}

impl Site {
    fn new() -> Self {
        let cache = Cache::open().unwrap();
        let directory = scratch(&cache).unwrap();
        let store = directory.path().join("store");
        let tree = python_tree(&cache).unwrap();
        let image = Image::build(Path::new(RAFS), &tree, &store).unwrap();
        let mut sandbox = Sandbox::prepare(Path::new(RAFSD), directory.path()).unwrap();
        let lists = directory.path().join("containers/lists");
        fs::create_dir(&lists).unwrap();
        let files = spread(&tree);
        for reader in 0..READERS {
            let list: Vec<&str> = files
                .iter()
                .skip(reader)
                .step_by(READERS)
                .map(String::as_str)
                .collect();
            fs::write(lists.join(reader.to_string()), list.join("\n")).unwrap();
        }
        sandbox.boot(&Boot::new(&cache).unwrap()).unwrap();
        Self {
            sandbox,
            image,
            store,
            directory,
            mounts: 0,
        }
    }

    fn registry(&self, latency: u64) -> Registry {
        Registry::start(Path::new(RAFS), &self.store, Duration::from_millis(latency)).unwrap()
    }

    /// An empty directory for a cache.
    fn cache(&self, name: &str) -> PathBuf {
        let cache = self.directory.path().join(name);
        let _ = fs::remove_dir_all(&cache);
        fs::create_dir(&cache).unwrap();
        cache
    }

    /// Mounts the image, starts, and unmounts it; records the start if asked to.
    fn start(&mut self, registry: &Registry, config: &Value, record: bool) -> Start {
        self.mounts += 1;
        let mountpoint = format!("/rafs/start-{}", self.mounts);
        let before = registry.traffic().unwrap();
        let begin = Instant::now();
        let daemon = self.sandbox.daemon();
        daemon
            .mount_image(&mountpoint, &self.image.bootstrap, config)
            .unwrap();
        let trace = format!("/api/rafsd/v1/trace?mountpoint={mountpoint}");
        if record {
            assert_eq!(daemon.request("PUT", &trace, None).unwrap().0, 204);
        }
        let script = format!(
            "cd {SHARED}{mountpoint}; for list in {SHARED}/containers/lists/*; do (xargs cat <$list >/dev/null || echo failed: $list) & done; wait"
        );
        let said = self.sandbox.guest().unwrap().check(&script).unwrap();
        let time = begin.elapsed();
        assert_eq!(said, "");
        let traffic = registry.traffic().unwrap() - before;
        let daemon = self.sandbox.daemon();
        if record {
            assert_eq!(daemon.request("DELETE", &trace, None).unwrap().0, 204);
        }
        daemon.unmount(&mountpoint).unwrap();
        Start { time, traffic }
    }
}

/// Files of a tree, from all over it, in no order.
fn spread(tree: &Path) -> Vec<String> {
    let listed = Command::new("find")
        .arg(tree)
        .args(["-type", "f", "-size", "+0", "-size", "-512k", "-printf", "%P\n"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&listed.stdout);
    let plain = |path: &&str| {
        path.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._/+-".contains(&byte))
    };
    let mut all: Vec<&str> = text.lines().filter(plain).collect();
    all.sort_unstable();
    assert!(all.len() > 2 * FILES, "{} files only", all.len());
    // 131 has no divisor with 320 in common: each file once.
    (0..FILES)
        .map(|number| (number * 131 % FILES) * all.len() / FILES)
        .filter_map(|position| all.get(position).map(|path| (*path).to_owned()))
        .collect()
}

/// Copies recorded traces from one cache directory to another, as a site does that records on one host.
fn copy_traces(from: &Path, to: &Path) {
    fs::create_dir(to.join("traces")).unwrap();
    for trace in fs::read_dir(from.join("traces")).unwrap() {
        let trace = trace.unwrap();
        fs::copy(trace.path(), to.join("traces").join(trace.file_name())).unwrap();
    }
}

#[test]
fn a_recorded_start_is_replayed_in_few_requests_and_no_byte_too_many() {
    let mut site = Site::new();
    let registry = site.registry(20);
    let exactly = {
        let mut config = config::of_registry(registry.address(), &site.cache("exact"));
        config["amplify_io"] = json!(0);
        site.start(&registry, &config, false)
    };
    let recorded = site.cache("recorded");
    let cold = site.start(
        &registry,
        &config::of_registry(registry.address(), &recorded),
        true,
    );
    let cache = site.cache("replayed");
    copy_traces(&recorded, &cache);
    // A source that nothing is known of: nobody asks it a second time because of an answer that is late.
    let registry = site.registry(20);
    let config = config::of_registry(registry.address(), &cache);
    let replayed = site.start(&registry, &config, false);
    let warm = site.start(&registry, &config, false);
    eprintln!("without neighbours {exactly:?}\nby default {cold:?}\nreplayed {replayed:?}\nwarm {warm:?}");
    assert!(cold.traffic.requests > 8, "{cold:?}");
    assert!(replayed.traffic.requests <= 8, "{replayed:?}");
    assert!(
        replayed.traffic.bytes * 10 <= exactly.traffic.bytes * 11,
        "{replayed:?} for {exactly:?}"
    );
    assert_eq!(warm.traffic, Traffic::default());
    site.sandbox.end().unwrap();
}

/// What the cache has before a start.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    All,
    Trace,
    Nothing,
}

/// For `docs/performance.md`.
#[test]
#[ignore = "prints a table; nothing else should run beside it"]
fn starts_in_a_guest_cold_replayed_and_warm() {
    const ROUNDS: usize = 11;
    let mut site = Site::new();
    println!("| latency | start | seconds | x warm | requests | KiB |\n|---|---|---|---|---|---|");
    for latency in [5, 20] {
        let registry = site.registry(latency);
        let recorded = site.cache("recorded");
        let config = |cache: &Path| config::of_registry(registry.address(), cache);
        site.start(&registry, &config(&recorded), true);
        let mut rows = [
            ("warm", Before::All, Vec::new()),
            ("trace replayed", Before::Trace, Vec::new()),
            ("default", Before::Nothing, Vec::new()),
        ];
        for round in 0..ROUNDS {
            // Nobody is always first.
            for turn in 0..rows.len() {
                let which = (turn + round) % rows.len();
                let (_, before, starts) = &mut rows[which];
                let cache = match before {
                    Before::All => recorded.clone(),
                    Before::Trace | Before::Nothing => site.cache("cold"),
                };
                if *before == Before::Trace {
                    copy_traces(&recorded, &cache);
                }
                starts.push(site.start(&registry, &config(&cache), false));
            }
        }
        let [(_, _, warm), ..] = &rows;
        for (name, _, starts) in &rows {
            let seconds = |start: &Start| start.time.as_secs_f64();
            let ratios = starts
                .iter()
                .zip(warm)
                .map(|(start, warm)| seconds(start) / seconds(warm));
            println!(
                "| {latency} ms | {name} | {:.3} | {:.2} | {:.0} | {:.0} |",
                median(starts.iter().map(seconds)),
                median(ratios),
                median(starts.iter().map(|start| start.traffic.requests as f64)),
                median(starts.iter().map(|start| start.traffic.bytes as f64 / 1024.0)),
            );
        }
    }
    site.sandbox.end().unwrap();
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
