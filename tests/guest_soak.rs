//! Hours in one sandbox: containers come and go while the guest works, and the daemon stays what it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::image::{busybox_tree, python_tree};
use rafsd_guest::{Boot, Cache, Container, Image, Registry, Sandbox, config};

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const RAFS: &str = env!("CARGO_BIN_EXE_rafs");

/// What a process holds of the machine.
#[derive(Debug)]
struct Holding {
    descriptors: usize,
    resident_kib: u64,
    threads: usize,
}

impl Holding {
    fn of(process: u32) -> Self {
        let count = |name: &str| fs::read_dir(format!("/proc/{process}/{name}")).unwrap().count();
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        Self {
            descriptors: count("fd"),
            resident_kib: resident.trim().trim_end_matches(" kB").parse().unwrap(),
            threads: count("task"),
        }
    }
}

#[test]
#[ignore = "long: RAFSD_SOAK_MINUTES, 10 unless told; run by make soak"]
fn containers_come_and_go_for_long_and_the_daemon_does_not_grow() {
    let minutes = std::env::var("RAFSD_SOAK_MINUTES").map_or(10, |minutes| minutes.parse().unwrap());
    let length = Duration::from_secs(60 * minutes);
    let cache = Cache::open().unwrap();
    let directory = scratch(&cache).unwrap();
    let store = directory.path().join("store");
    let rafs = Path::new(RAFS);
    let python = Image::build(rafs, &python_tree(&cache).unwrap(), &store.join("python")).unwrap();
    let busybox = Image::build(rafs, &busybox_tree(&cache).unwrap(), &store.join("busybox")).unwrap();
    let registry = Registry::start(rafs, &store, Duration::from_millis(2)).unwrap();
    let config = config::of_registry(registry.address(), &directory.path().join("cache"));

    let mut sandbox = Sandbox::prepare(Path::new(RAFSD), directory.path()).unwrap();
    sandbox.boot(&Boot::new(&cache).unwrap()).unwrap();
    let steady = Container::named("steady");
    sandbox.mount_image(&steady, &busybox, &config).unwrap();
    // Works through the image and a host directory all the time.
    let worker = format!(
        "cd {SHARED}/containers; mkdir work; until [ -e /run/enough ]; do
            cp {SHARED}{lower}/bin/busybox work/copy || exit 1
            echo 1 >/proc/sys/vm/drop_caches
            cmp work/copy {SHARED}{lower}/bin/busybox || exit 2
            seq 1 200 | while read n; do echo $n >work/$n && mv work/$n work/$n.new && rm work/$n.new || exit 3; done || exit 3
        done",
        lower = steady.mountpoint()
    );
    let work = sandbox
        .guest()
        .unwrap()
        .start(length + Duration::from_secs(600), &worker)
        .unwrap();

    let start = Instant::now();
    let mut settled = None;
    let mut rounds = 0;
    while start.elapsed() < length {
        let container = Container::named("passing");
        sandbox.mount_image(&container, &python, &config).unwrap();
        let (text, _) = sandbox
            .run(
                &container,
                "python3 -c 'print(6 * 7)' | tee /root/answer; rm /etc/issue",
            )
            .unwrap();
        assert_eq!(text, "42\n");
        assert_eq!(
            fs::read_to_string(sandbox.layer(&container).join("root/answer")).unwrap(),
            "42\n"
        );
        let guest = sandbox.guest().unwrap();
        guest.stop().unwrap();
        guest.cont().unwrap();
        guest
            .check(&format!(
                "umount {}; rm -rf {SHARED}/containers/passing",
                container.root()
            ))
            .unwrap();
        sandbox.daemon().unmount(&container.mountpoint()).unwrap();
        rounds += 1;
        if rounds == 3 {
            settled = Some(Holding::of(sandbox.daemon().process_id()));
        }
    }
    sandbox.guest().unwrap().check("touch /run/enough").unwrap();
    let done = sandbox.guest().unwrap().finish(&work).unwrap();
    assert_eq!(done.status, 0, "the work in the guest failed: {}", done.text);

    let now = Holding::of(sandbox.daemon().process_id());
    let settled = settled.expect("too short for three rounds");
    eprintln!("{rounds} rounds; after three: {settled:?}; at the end: {now:?}");
    assert!(
        now.descriptors <= settled.descriptors + 16,
        "descriptors: {settled:?}, then {now:?}"
    );
    assert!(
        now.threads <= settled.threads + 4,
        "threads: {settled:?}, then {now:?}"
    );
    assert!(
        now.resident_kib <= settled.resident_kib + 32 * 1024,
        "memory: {settled:?}, then {now:?}"
    );
    sandbox.end().unwrap();
}
