//! A forward proxy before the origin: used while it is healthy, left out while it is not.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rafsd_backend::config::*;
use rafsd_backend::store::*;
use support::http::{Reply, Server};
use support::*;

struct Setup {
    dir: tempfile::TempDir,
    blob: Arc<TestBlob>,
    origin: Server,
    proxy: Server,
    broken: Arc<AtomicBool>,
    store: Store,
}

/// An origin, and a proxy that answers for it; its health check is at `/ping`.
fn setup() -> Setup {
    let blob = Arc::new(TestBlob::new(40, 9000));
    let broken = Arc::new(AtomicBool::new(false));
    let data = Arc::clone(&blob);
    let origin = Server::start(move |request| Reply::blob(request, &data.stored));
    let (data, sick) = (Arc::clone(&blob), Arc::clone(&broken));
    let proxy = Server::start(move |request| {
        if sick.load(Ordering::SeqCst) {
            return Reply::status(502);
        }
        if request.target == "/ping" {
            Reply::status(200)
        } else {
            Reply::blob(request, &data.stored)
        }
    });
    let store = Store::new(StoreOptions::default()).unwrap();
    Setup {
        dir: tempfile::tempdir().unwrap(),
        blob,
        origin,
        proxy,
        broken,
        store,
    }
}

impl Setup {
    fn config(&self, change: impl FnOnce(&mut ProxyConfig)) -> SourceConfig {
        let mut proxy = ProxyConfig {
            url: format!("http://{}", self.proxy.host()).into(),
            check_interval: Duration::from_millis(500),
            ..ProxyConfig::default()
        };
        change(&mut proxy);
        let http = HttpConfig {
            timeout: Duration::from_secs(1),
            proxy: Some(proxy),
            ..HttpConfig::default()
        };
        let (host, repo) = (self.origin.host(), "app".into());
        let scheme = Scheme::Http;
        SourceConfig::Registry(RegistryConfig {
            host,
            repo,
            scheme,
            http,
            ..RegistryConfig::default()
        })
    }

    fn open(&self, config: &SourceConfig) -> Arc<Blob> {
        let cache = CacheConfig {
            amplify: 0,
            ..CacheConfig::new(self.dir.path())
        };
        self.store
            .open_blob(self.blob.description(), config, &cache)
            .unwrap()
    }

    fn check(&self, blob: &Arc<Blob>, index: u32) {
        fetch(blob, &[index]).unwrap();
        assert!(read(blob, &self.blob.chunks[index as usize]) == self.blob.plain[index as usize]);
    }

    fn counts(&self) -> (usize, usize) {
        (self.proxy.count("/blobs/"), self.origin.count("/blobs/"))
    }
}

#[test]
fn a_healthy_proxy_is_asked_instead_of_the_origin() {
    let t = setup();
    let blob = t.open(&t.config(|_| {}));
    (0..5).for_each(|index| t.check(&blob, index));
    assert_eq!(t.counts(), (5, 0));
    let target = &t.proxy.requests()[0].target;
    assert!(
        target.starts_with(&format!("http://{}/v2/app/blobs/", t.origin.host())),
        "{target}"
    );
}

#[test]
fn a_broken_proxy_costs_a_few_requests_and_is_tried_again() {
    let t = setup();
    t.broken.store(true, Ordering::SeqCst);
    let blob = t.open(&t.config(|_| {}));
    (0..10).for_each(|index| t.check(&blob, index));
    let (proxied, direct) = t.counts();
    assert_eq!(direct, 10, "every request reaches the origin");
    assert!((3..=5).contains(&proxied), "{proxied} requests to a broken proxy");
    assert_eq!(blob.source_metrics().errors, 0, "nobody notices");
    t.broken.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(600));
    (10..20).for_each(|index| t.check(&blob, index));
    assert_eq!(t.counts(), (proxied + 10, 10), "back within one interval");
}

#[test]
fn a_proxy_that_goes_silent_is_left_out_too() {
    let t = setup();
    let data = Arc::clone(&t.blob);
    let silent = Server::start(move |request| Reply {
        stall: Some(100),
        ..Reply::blob(request, &data.stored)
    });
    let blob = t.open(&t.config(|proxy| proxy.url = format!("http://{}", silent.host()).into()));
    let begin = Instant::now();
    t.check(&blob, 0);
    assert!(begin.elapsed() < Duration::from_secs(8));
    assert!(silent.requests().len() <= 4);
    assert!(t.origin.requests().len() == 1);
}

#[test]
fn without_a_fallback_the_origin_is_never_asked() {
    let t = setup();
    t.broken.store(true, Ordering::SeqCst);
    let blob = t.open(&t.config(|proxy| proxy.fallback = false));
    let outcome = start(&blob, &[0], Duration::from_secs(1)).recv().unwrap();
    assert!(outcome.unwrap_err().reason.contains("502"));
    assert_eq!(t.origin.requests().len(), 0);
    t.broken.store(false, Ordering::SeqCst);
    t.check(&blob, 0);
    assert_eq!(t.origin.requests().len(), 0);
}

#[test]
fn the_health_check_decides() {
    let t = setup();
    let ping_url = format!("http://{}/ping", t.proxy.host());
    let config = t.config(|proxy| proxy.ping_url = ping_url);
    let blob = t.open(&config);
    t.check(&blob, 0);
    t.broken.store(true, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(600));
    // This one starts the check; what comes after it knows the outcome.
    t.check(&blob, 1);
    std::thread::sleep(Duration::from_millis(200));
    let (proxied, _) = t.counts();
    (2..8).for_each(|index| t.check(&blob, index));
    assert_eq!(t.counts().0, proxied, "an unhealthy proxy is not asked for blobs");
    t.broken.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(600));
    t.check(&blob, 8);
    std::thread::sleep(Duration::from_millis(200));
    let (_, direct) = t.counts();
    (9..14).for_each(|index| t.check(&blob, index));
    assert_eq!(t.counts().1, direct, "a healthy one is");
    let pings = t.proxy.count("/ping");
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(t.proxy.count("/ping"), pings, "no requests, no checks");
}

#[test]
fn the_proxy_is_replaced_at_run_time() {
    let t = setup();
    let config = t.config(|_| {});
    let blob = t.open(&config);
    t.check(&blob, 0);
    t.store.replace_proxy(&config, "".into()).unwrap();
    t.check(&blob, 1);
    assert_eq!(t.counts(), (1, 1));
    t.store
        .replace_proxy(&config, format!("http://user:secret@{}", t.proxy.host()).into())
        .unwrap();
    t.check(&blob, 2);
    assert_eq!(t.counts(), (2, 1));
    assert!(t.proxy.requests()[1].header("proxy-authorization").is_some());
    assert!(t.store.replace_proxy(&config, "no url\n".into()).is_err());
}

#[test]
fn an_empty_url_is_no_proxy() {
    let t = setup();
    let blob = t.open(&t.config(|proxy| proxy.url = "".into()));
    t.check(&blob, 0);
    assert_eq!(t.counts(), (0, 1));
}
