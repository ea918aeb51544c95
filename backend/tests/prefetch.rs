//! Prefetching, and what is counted.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rafsd_backend::config::HttpProxyConfig;
use rafsd_backend::store::*;
use support::http::{Reply, Request, Server};
use support::*;

struct Setup {
    _dir: tempfile::TempDir,
    test: TestBlob,
    source: Arc<FaultySource>,
    store: Store,
    blob: Arc<Blob>,
}

fn setup(count: u32) -> Setup {
    let test = TestBlob::new(count, 50_000);
    let source = FaultySource::new(&test);
    let store = Store::new(StoreOptions::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // What is asked for, and no neighbours.
    let cache = CacheConfig {
        amplify: 0,
        ..CacheConfig::new(dir.path())
    };
    let blob = store
        .open_blob_from(test.description(), source.clone(), &cache)
        .unwrap();
    Setup {
        _dir: dir,
        test,
        source,
        store,
        blob,
    }
}

impl Setup {
    fn wish(&self, wanted: Wanted) -> Vec<Wish> {
        vec![Wish {
            blob: Arc::clone(&self.blob),
            wanted,
        }]
    }
}

fn finish(prefetch: &Prefetch) -> PrefetchProgress {
    let begin = Instant::now();
    loop {
        let progress = prefetch.progress();
        if progress.ended.is_some() {
            return progress;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "{progress:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_whole_blob_comes_in_merged_requests() {
    let t = setup(60);
    let options = PrefetchOptions {
        size: 300_000,
        ..PrefetchOptions::default()
    };
    let progress = finish(&t.store.prefetch(t.wish(Wanted::Whole), options));
    assert_eq!(
        (progress.chunks, progress.failures, t.blob.resident()),
        (60, 0, 60)
    );
    assert_eq!(progress.bytes, t.test.stored.len() as u64);
    assert_eq!(t.source.fetched(), t.test.stored.len() as u64);
    let expected = t.test.stored.len() / 300_000;
    assert!(
        t.source.requests().len() <= expected + 2,
        "{} requests",
        t.source.requests().len()
    );
    assert!(progress.began <= progress.ended);
    let metrics = t.blob.source_metrics();
    assert_eq!(
        (metrics.requests as usize, metrics.errors),
        (t.source.requests().len(), 0)
    );
    assert_eq!(
        (metrics.bytes, metrics.in_flight),
        (t.test.stored.len() as u64, 0)
    );
    assert_eq!((t.blob.metrics().fetched, t.blob.metrics().damaged), (60, 0));
}

#[test]
fn a_list_is_fetched_in_its_order_and_no_more() {
    let t = setup(60);
    let options = PrefetchOptions {
        parallel: 1,
        size: 1,
        ..PrefetchOptions::default()
    };
    finish(
        &t.store
            .prefetch(t.wish(Wanted::Listed(vec![50, 3, 3, 21, 999])), options),
    );
    let starts: Vec<_> = t.source.requests().iter().map(|request| request.start).collect();
    assert_eq!(
        starts,
        [50, 3, 21].map(|index: usize| t.test.chunks[index].compressed_offset)
    );
    assert_eq!(t.blob.resident(), 3);
}

#[test]
fn demand_overtakes_a_prefetch_that_waits_for_bandwidth() {
    let t = setup(60);
    let options = PrefetchOptions {
        size: 50_000,
        bandwidth: 100_000,
        ..PrefetchOptions::default()
    };
    let prefetch = t.store.prefetch(t.wish(Wanted::Whole), options);
    let begin = Instant::now();
    fetch(&t.blob, &[55]).unwrap();
    assert!(begin.elapsed() < Duration::from_secs(2));
    std::thread::sleep(Duration::from_millis(1000));
    let bytes = prefetch.progress().bytes;
    let allowed = (begin.elapsed().as_secs_f64() * 100_000.0) as u64 + 100_000;
    assert!(bytes > 0 && bytes <= allowed, "{bytes} of {allowed}");
}

#[test]
fn a_dropped_prefetch_stops() {
    let t = setup(60);
    let options = PrefetchOptions {
        parallel: 1,
        size: 50_000,
        bandwidth: 200_000,
        idle: None,
    };
    let prefetch = t.store.prefetch(t.wish(Wanted::Whole), options);
    std::thread::sleep(Duration::from_millis(300));
    drop(prefetch);
    std::thread::sleep(Duration::from_millis(200));
    let before = t.source.requests().len();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(t.source.requests().len(), before);
    assert!(t.blob.resident() < 60);
}

#[test]
fn a_prefetch_from_a_source_that_refuses_gives_up() {
    let t = setup(60);
    t.source.denied.store(true, Ordering::SeqCst);
    let options = PrefetchOptions {
        parallel: 8,
        size: 1,
        ..PrefetchOptions::default()
    };
    let progress = finish(
        &t.store
            .prefetch(t.wish(Wanted::Listed((0..60).collect())), options),
    );
    assert!(progress.failures >= 5 && progress.failures < 30, "{progress:?}");
    t.source.denied.store(false, Ordering::SeqCst);
    fetch(&t.blob, &[1]).unwrap();
}

#[test]
fn demand_on_a_chunk_that_is_being_prefetched_joins_it() {
    let t = setup(8);
    t.source.stalled.store(true, Ordering::SeqCst);
    let prefetch = t
        .store
        .prefetch(t.wish(Wanted::Whole), PrefetchOptions::default());
    while t.source.requests().is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let outcome = start(&t.blob, &[3], Duration::from_secs(10));
    std::thread::sleep(Duration::from_millis(50));
    t.source.stalled.store(false, Ordering::SeqCst);
    outcome.recv().unwrap().unwrap();
    finish(&prefetch);
    assert_eq!(t.source.requests().len(), 1);
    assert_eq!(t.blob.metrics().joined, 1);
}

/// Prefetches every third chunk of a blob by HTTP.
fn prefetch_thirds(answer: impl Fn(&Request, &[u8]) -> Reply + Send + Sync + 'static) -> (Server, TestBlob) {
    let test = TestBlob::new(90, 20_000);
    let data = test.stored.clone();
    let server = Server::start(move |request| answer(request, &data));
    let source = SourceConfig::HttpProxy(HttpProxyConfig {
        addr: format!("http://{}", server.address),
        ..HttpProxyConfig::default()
    });
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(StoreOptions::default()).unwrap();
    let blob = store
        .open_blob(test.description(), &source, &CacheConfig::new(dir.path()))
        .unwrap();
    let thirds: Vec<u32> = (0..90).step_by(3).rev().collect();
    let wish = Wish {
        blob: Arc::clone(&blob),
        wanted: Wanted::Listed(thirds.clone()),
    };
    let progress = finish(&store.prefetch(vec![wish], PrefetchOptions::default()));
    assert_eq!((progress.chunks, blob.resident()), (30, 30), "{progress:?}");
    for index in thirds {
        assert!(read(&blob, &test.chunks[index as usize]) == test.plain[index as usize]);
    }
    (server, test)
}

#[test]
fn a_list_of_chunks_is_one_request_for_many_ranges() {
    let (server, test) = prefetch_thirds(Reply::parts);
    let requests = server.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    let asked: usize = requests[0].ranges().iter().map(std::ops::Range::len).sum();
    let needed: u32 = test
        .chunks
        .iter()
        .step_by(3)
        .map(|chunk| chunk.compressed_size)
        .sum();
    assert_eq!(asked, needed as usize, "and no byte more");
}

#[test]
fn a_list_of_chunks_from_a_server_that_knows_no_lists() {
    // It answers with the whole blob, as servers may.
    let (server, _) = prefetch_thirds(Reply::blob);
    let lists = server
        .requests()
        .iter()
        .filter(|request| request.ranges().len() > 1)
        .count();
    assert_eq!(
        (lists, server.requests().len()),
        (1, 31),
        "asked once, and then for each"
    );
}

#[test]
fn a_list_that_breaks_off_goes_on_where_it_broke() {
    let first = std::sync::atomic::AtomicBool::new(true);
    let (server, _) = prefetch_thirds(move |request, data| {
        let reply = Reply::parts(request, data);
        match first.swap(false, Ordering::SeqCst) {
            true => Reply {
                cut: Some(reply.body.len() / 2),
                ..reply
            },
            false => reply,
        }
    });
    let requests = server.requests();
    assert_eq!(requests.len(), 2);
    assert!(
        requests[1].ranges().len() < requests[0].ranges().len(),
        "what had arrived is not asked for again"
    );
}

#[test]
fn a_replay_takes_few_requests_in_its_order_whatever_the_batch_size() {
    let t = setup(60);
    let options = PrefetchOptions {
        size: 1,
        ..PrefetchOptions::default()
    };
    let order: Vec<u32> = (10..50).rev().collect();
    finish(&t.store.prefetch(t.wish(Wanted::Replay(order)), options));
    let requests = t.source.requests();
    assert!((2..=8).contains(&requests.len()), "{requests:?}");
    assert!(
        requests
            .iter()
            .any(|request| request.end == t.test.chunks[50].compressed_offset)
    );
    assert_eq!(
        (t.source.fetched(), t.blob.resident()),
        (requests.iter().map(|r| r.end - r.start).sum(), 40)
    );
}

/// A prefetch of all of a blob that would take ten seconds.
fn slow_and_whole(idle: Option<Idle>) -> PrefetchOptions {
    PrefetchOptions {
        parallel: 4,
        size: 1,
        bandwidth: 100_000,
        idle,
    }
}

fn wait_for(prefetch: &Prefetch, paused: Option<Paused>) {
    let begin = Instant::now();
    while prefetch.progress().paused != paused {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{:?}",
            prefetch.progress()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Nothing more comes while it is paused.
fn is_quiet(t: &Setup) {
    // One fetch may have been on its way.
    std::thread::sleep(Duration::from_millis(300));
    let before = t.source.requests().len();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(t.source.requests().len(), before);
}

#[test]
fn whole_blobs_come_beside_reads() {
    let t = setup(60);
    *t.source.held_at.lock().unwrap() = Some(t.test.chunks[59].compressed_offset);
    let reader = start(&t.blob, &[59], Duration::from_secs(60));
    let begin = Instant::now();
    let soon = |what: &dyn Fn() -> bool| {
        while !what() {
            assert!(begin.elapsed() < Duration::from_secs(40), "{}", t.blob.resident());
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    soon(&|| t.source.requests().len() == 1);
    let options = PrefetchOptions {
        size: 300_000,
        ..PrefetchOptions::default()
    };
    let prefetch = t.store.prefetch(t.wish(Wanted::Whole), options);
    soon(&|| t.blob.resident() == 59);
    *t.source.held_at.lock().unwrap() = None;
    reader.recv().unwrap().unwrap();
    finish(&prefetch);
    assert_eq!(t.blob.resident(), 60);
    assert_eq!(t.source.fetched(), t.test.stored.len() as u64, "each byte once");
}

#[test]
fn whole_blobs_wait_while_the_container_is_idle() {
    let t = setup(60);
    let requests = Arc::new(AtomicU64::new(7));
    let seen = Arc::clone(&requests);
    let idle = Idle {
        requests: Arc::new(move || seen.load(Ordering::SeqCst)),
        after: Duration::from_millis(400),
    };
    let prefetch = t
        .store
        .prefetch(t.wish(Wanted::Whole), slow_and_whole(Some(idle.clone())));
    wait_for(&prefetch, Some(Paused::Idle));
    let before = prefetch.progress().chunks;
    assert!(before > 0 && before < 60, "{before}");
    is_quiet(&t);
    // The container does something again.
    requests.fetch_add(1, Ordering::SeqCst);
    wait_for(&prefetch, None);
    wait_for(&prefetch, Some(Paused::Idle));
    assert!(prefetch.progress().chunks > before);
    // What was asked for by name does not wait.
    let never_busy = Idle {
        after: Duration::ZERO,
        ..idle
    };
    let options = PrefetchOptions {
        idle: Some(never_busy),
        ..PrefetchOptions::default()
    };
    finish(&t.store.prefetch(t.wish(Wanted::Listed(vec![58, 59])), options));
    assert!(t.blob.is_resident(59));
}

#[test]
fn whole_blobs_wait_while_reads_are_answered_slower_than_before() {
    let t = setup(60);
    (30..50).for_each(|index| drop(fetch(&t.blob, &[index]).unwrap()));
    let prefetch = t.store.prefetch(t.wish(Wanted::Whole), slow_and_whole(None));
    wait_for(&prefetch, None);
    t.source.delay_ms.store(400, Ordering::SeqCst);
    fetch(&t.blob, &[57]).unwrap();
    wait_for(&prefetch, Some(Paused::Strained));
    is_quiet(&t);
    t.source.delay_ms.store(0, Ordering::SeqCst);
    // Nobody knows better until somebody asks.
    wait_for(&prefetch, None);
}

#[test]
fn whole_blobs_wait_while_the_source_fails_and_go_on_when_it_heals() {
    let t = setup(60);
    let prefetch = t.store.prefetch(t.wish(Wanted::Whole), slow_and_whole(None));
    t.source.broken.store(true, Ordering::SeqCst);
    let outcome = start(&t.blob, &[57], Duration::from_secs(20));
    wait_for(&prefetch, Some(Paused::Strained));
    let before = prefetch.progress().chunks;
    t.source.broken.store(false, Ordering::SeqCst);
    outcome.recv().unwrap().unwrap();
    wait_for(&prefetch, None);
    let begin = Instant::now();
    while prefetch.progress().chunks <= before {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{:?}",
            prefetch.progress()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
