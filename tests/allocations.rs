//! In its steady state a queue thread serves without allocating memory, all the way from the ring and back.
//!
//! The whole daemon runs in this process, so that this process's allocator can count. It asks for the name of the
//! thread at each allocation; only queue threads count, and only while requests are measured.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use rafsd::cli::{Cli, Task};
use rafsd_frontend::image::Image;
use rafsd_frontend::{Guest, Options, http, ops};
use serde_json::json;

/// Queue threads are named so.
const QUEUE_THREAD: &[u8] = b"queue-";

struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    if !COUNTING.load(Ordering::Relaxed) {
        return;
    }
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, with a NUL, to the address it is given.
    let asked = unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    if asked == 0 && name.starts_with(QUEUE_THREAD) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is handed to the system's allocator as it came, and counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the promises of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Runs the daemon in this process until the process ends, and waits until it is RUNNING.
fn start_daemon(directory: &Path) {
    let api = directory.join("api.sock");
    let arguments = [
        "rafsd".into(),
        "virtiofs".into(),
        "--sock".into(),
        directory.join("vhost.sock"),
        "--apisock".into(),
        api.clone(),
    ];
    let Task::Serve(cli) = Cli::parse_from(arguments).check().unwrap() else {
        panic!("the command line asks for something else");
    };
    std::thread::spawn(move || rafsd::daemon::run(*cli).unwrap());
    let start = Instant::now();
    let running = || {
        http::request(&api, "GET", "/api/v1/daemon", None).is_ok_and(|answer| answer.body.contains("RUNNING"))
    };
    while !running() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "the daemon does not start"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn mount(directory: &Path, mountpoint: &str, fs_type: &str, source: &Path, config: &str) {
    let body = json!({ "fs_type": fs_type, "source": source, "config": config }).to_string();
    let target = format!("/api/v1/mount?mountpoint={mountpoint}");
    let answer = http::request(&directory.join("api.sock"), "POST", &target, Some(&body)).unwrap();
    assert_eq!(answer.status, 204, "{}", answer.body);
}

/// Allocations of queue threads while a request is served many times, after a few to warm up: the least of three rounds, for
/// there are things that a thread allocates once in its life, such as its place in the queue of a lock that it first waits for.
fn allocations(guest: &Guest, request: &ops::Request) -> u64 {
    let rounds = [(); 3].map(|()| allocations_once(guest, request));
    rounds.into_iter().min().unwrap_or(u64::MAX)
}

fn allocations_once(guest: &Guest, request: &ops::Request) -> u64 {
    let serve = |times: usize| {
        for _ in 0..times {
            guest.call(request).unwrap();
        }
    };
    serve(50);
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    COUNTING.store(true, Ordering::SeqCst);
    serve(500);
    COUNTING.store(false, Ordering::SeqCst);
    ALLOCATIONS.load(Ordering::SeqCst) - before
}

#[test]
fn serving_allocates_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), vec![7; 300_000]).unwrap();
    let output = directory.path().join("image");
    let image = Image::build(env!("CARGO_BIN_EXE_rafs"), &tree, &output, &[]).unwrap();
    start_daemon(directory.path());
    let config = image.local(&directory.path().join("cache"));
    mount(directory.path(), "/image", "rafs", &image.bootstrap, &config);
    mount(directory.path(), "/host", "passthrough_fs", &tree, "");
    let guest = Guest::boot(directory.path().join("vhost.sock"), Options::default()).unwrap();

    for top in ["/host", "/image"] {
        let directory = guest.resolve(top).unwrap().nodeid;
        let file = guest.lookup(directory, "file").unwrap().nodeid;
        let fh = guest.open(file, 0).unwrap();
        assert_eq!(guest.read_file(format!("{top}/file")).unwrap(), vec![7; 300_000]);
        for (what, request) in [
            ("getattr", ops::getattr(file, None)),
            ("getattr of an open file", ops::getattr(file, Some(fh))),
            ("lookup", ops::lookup(directory, "file")),
            ("read of 4 KiB", ops::read(file, fh, 4096, 4096)),
            ("read of 128 KiB", ops::read(file, fh, 8192, 128 << 10)),
        ] {
            let counted = allocations(&guest, &request);
            assert_eq!(counted, 0, "{what} in {top}: allocations in 500 requests");
        }
    }
    // The counter counts: an opened host file is an entry of a table.
    let file = guest.resolve("/host/file").unwrap().nodeid;
    assert!(allocations(&guest, &ops::open(file, 0)) > 0);
}
