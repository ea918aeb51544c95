//! Real processes that share a cache directory: this test binary, started again.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

mod support;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rafsd_backend::chunk::IndexRange;
use rafsd_backend::config::HttpProxyConfig;
use rafsd_backend::store::*;
use support::http::{Reply, Request, Server};
use support::*;

/// What a child reads: the address of the server, the cache directory, and its own number, separated by blanks.
const TASK: &str = "RAFSD_TEST_CHILD";
const INDEX: Range<u64> = 0..5000;

/// The same in every process. Its chunk index, kept at the start of the blob, must be read first.
fn image() -> TestBlob {
    TestBlob::new(120, 40_000)
}

fn open(store: &Store, image: &TestBlob, address: &str, cache: &Path) -> Arc<Blob> {
    let range = IndexRange {
        blob_id: image.id.clone(),
        offset: INDEX.start,
        size: INDEX.end as u32,
    };
    let index = image.stored[..INDEX.end as usize].to_vec();
    let source = SourceConfig::HttpProxy(HttpProxyConfig {
        addr: format!("http://{address}"),
        path: "/blobs".into(),
        ..HttpProxyConfig::default()
    });
    let cache = CacheConfig {
        amplify: 256 << 10,
        ..CacheConfig::new(cache)
    };
    store
        .open_blob(image.description_with(Some((range, index))), &source, &cache)
        .unwrap()
}

/// Not a test: what a child does. It reads everything, from a place of its own on.
#[test]
fn child() {
    let Ok(task) = std::env::var(TASK) else { return };
    let [address, cache, number] = task.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let number: usize = number.parse().unwrap();
    let image = image();
    let store = Store::new(StoreOptions::default()).unwrap();
    let blob = open(&store, &image, address, Path::new(cache));
    let count = image.chunks.len();
    let order: Vec<u32> = (0..count).map(|at| ((at + number * 17) % count) as u32).collect();
    for some in order.chunks(3) {
        fetch(&blob, some).unwrap();
        for index in some {
            assert!(read(&blob, &image.chunks[*index as usize]) == image.plain[*index as usize]);
        }
    }
}

fn start_child(address: &str, cache: &Path, number: usize) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(TASK, format!("{address} {} {number}", cache.display()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn ranges(server: &Server) -> Vec<Range<usize>> {
    server.requests().iter().filter_map(Request::range).collect()
}

/// So many processes start the same image at once, with nothing cached.
fn start_at_once(processes: usize) {
    let image = image();
    let data = image.stored.clone();
    let server = Server::start(move |request| Reply {
        delay: Duration::from_millis(5),
        ..Reply::blob(request, &data)
    });
    let cache = tempfile::tempdir().unwrap();
    let address = server.address.to_string();
    let begin = Instant::now();
    let children: Vec<_> = (0..processes)
        .map(|number| start_child(&address, cache.path(), number))
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let mut chunks: Vec<_> = ranges(&server);
    let index = chunks.iter().position(|range| *range == (0..INDEX.end as usize));
    chunks.remove(index.expect("the chunk index was read"));
    chunks.sort_by_key(|range| range.start);
    let served: usize = chunks.iter().map(Range::len).sum();
    eprintln!(
        "{processes} processes: {} requests, {served} bytes for {} in {:.1} s",
        chunks.len() + 1,
        image.stored.len(),
        begin.elapsed().as_secs_f64()
    );
    assert!(
        chunks.windows(2).all(|pair| pair[0].end <= pair[1].start),
        "a byte twice: {chunks:?}"
    );
    assert_eq!(served, image.stored.len());
}

#[test]
fn twenty_processes_that_start_at_once_fetch_each_byte_once() {
    start_at_once(20);
}

#[test]
fn a_process_that_is_killed_in_the_middle_holds_up_nobody() {
    let image = image();
    let data = image.stored.clone();
    let silent = Arc::new(AtomicBool::new(true));
    let now = Arc::clone(&silent);
    let server = Server::start(move |request| match now.load(Ordering::SeqCst) {
        // The index, and then not a word.
        true if request.range() != Some(0..INDEX.end as usize) => Reply {
            delay: Duration::from_secs(600),
            ..Reply::default()
        },
        _ => Reply::blob(request, &data),
    });
    let cache = tempfile::tempdir().unwrap();
    let address = server.address.to_string();
    let mut child = start_child(&address, cache.path(), 0);
    let begin = Instant::now();
    while server.requests().len() < 2 {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "the child asks for nothing"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    silent.store(false, Ordering::SeqCst);
    let store = Store::new(StoreOptions::default()).unwrap();
    let blob = open(&store, &image, &address, cache.path());
    let outcome = start(&blob, &[0, 1, 2], Duration::from_secs(60));
    assert!(
        outcome.recv_timeout(Duration::from_millis(300)).is_err(),
        "the child has these chunks on their way"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = Instant::now();
    assert!(outcome.recv_timeout(Duration::from_secs(60)).unwrap().is_ok());
    eprintln!(
        "there {:.3} s after the other one was killed",
        killed.elapsed().as_secs_f64()
    );
    for index in 0..3 {
        assert!(read(&blob, &image.chunks[index]) == image.plain[index]);
    }
}

/// The registry and all credentials are gone; the daemon starts again.
#[test]
fn cached_images_are_served_whole_with_no_connection() {
    let images: Vec<TestBlob> = (0..12)
        .map(|number| TestBlob::new(3 + number, 20_000 + 100 * number as usize))
        .collect();
    let blobs: Vec<(String, Vec<u8>)> = images
        .iter()
        .map(|image| (image.id.clone(), image.stored.clone()))
        .collect();
    let server = Server::start(move |request| {
        let found = blobs.iter().find(|(id, _)| request.target.ends_with(id.as_str()));
        found.map_or(Reply::status(404), |(_, data)| Reply::blob(request, data))
    });
    let cache = tempfile::tempdir().unwrap();
    let config = |address: &str| {
        SourceConfig::HttpProxy(HttpProxyConfig {
            addr: format!("http://{address}"),
            ..HttpProxyConfig::default()
        })
    };
    let serve = |address: &str| {
        let store = Store::new(StoreOptions::default()).unwrap();
        for image in &images {
            let blob = store
                .open_blob(
                    image.description(),
                    &config(address),
                    &CacheConfig::new(cache.path()),
                )
                .unwrap();
            fetch(&blob, &(0..image.chunks.len() as u32).collect::<Vec<_>>()).unwrap();
            for (chunk, plain) in image.chunks.iter().zip(&image.plain) {
                assert!(read(&blob, chunk) == *plain);
            }
        }
    };
    serve(&server.address.to_string());
    let asked = server.requests().len();
    drop(server);
    assert_eq!(asked, images.len());
    // A listener that counts stands where nobody should knock.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let knocked = listener.local_addr().unwrap().to_string();
    let store = Store::new(StoreOptions::default()).unwrap();
    let files: Vec<PathBuf> = std::fs::read_dir(cache.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(files.len() >= 3 * images.len());
    for image in &images {
        let blob = store
            .open_blob(
                image.description(),
                &config(&knocked),
                &CacheConfig::new(cache.path()),
            )
            .unwrap();
        fetch(&blob, &(0..image.chunks.len() as u32).collect::<Vec<_>>()).unwrap();
        for (chunk, plain) in image.chunks.iter().zip(&image.plain) {
            assert!(read(&blob, chunk) == *plain);
        }
    }
    assert_eq!(
        listener.accept().unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock,
        "nobody connected"
    );
}
