//! Ways to the origin: mirrors and a forward proxy, used while they are healthy and left out while they are not; second questions; pauses
//! that a source asks for.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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
    assert!(begin.elapsed() < Duration::from_secs(18));
    assert!(silent.requests().len() <= 4);
    assert!(t.origin.requests().len() == 1);
}

#[test]
fn without_a_fallback_the_origin_is_never_asked() {
    let t = setup();
    t.broken.store(true, Ordering::SeqCst);
    let blob = t.open(&t.config(|proxy| proxy.fallback = false));
    let outcome = start(&blob, &[0], Duration::from_secs(3)).recv().unwrap();
    assert!(outcome.unwrap_err().reason.contains("502"));
    assert_eq!(t.origin.requests().len(), 0);
    t.broken.store(false, Ordering::SeqCst);
    t.check(&blob, 0);
    assert_eq!(t.origin.requests().len(), 0);
}

/// Waits until no more health checks come in.
fn until_quiet(server: &Server) {
    let begin = Instant::now();
    let mut last = usize::MAX;
    while last != server.count("/ping") {
        assert!(begin.elapsed() < Duration::from_secs(60), "checks never end");
        last = server.count("/ping");
        std::thread::sleep(Duration::from_millis(1500));
    }
}

#[test]
fn the_health_check_decides() {
    let t = setup();
    let ping_url = format!("http://{}/ping", t.proxy.host());
    let config = t.config(|proxy| {
        proxy.ping_url = ping_url;
        proxy.check_pause_elapsed = Duration::from_secs(3);
    });
    let blob = t.open(&config);
    t.check(&blob, 0);
    t.broken.store(true, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(900));
    let (proxied, _) = t.counts();
    (1..8).for_each(|index| t.check(&blob, index));
    assert_eq!(t.counts().0, proxied, "an unhealthy proxy is not asked for blobs");
    t.broken.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(900));
    let (_, direct) = t.counts();
    (8..14).for_each(|index| t.check(&blob, index));
    assert_eq!(t.counts().1, direct, "a healthy one is");
    until_quiet(&t.proxy);
    t.check(&blob, 14);
    let pings = t.proxy.count("/ping");
    std::thread::sleep(Duration::from_millis(900));
    assert!(
        t.proxy.count("/ping") > pings,
        "with the next request they begin again"
    );
}

/// The proxy of the setup as a mirror.
fn mirror(t: &Setup, change: impl FnOnce(&mut MirrorConfig)) -> SourceConfig {
    let mut mirror = MirrorConfig {
        host: format!("http://{}", t.proxy.host()),
        check_interval: Duration::from_millis(500),
        failure_limit: 3,
        ..MirrorConfig::default()
    };
    change(&mut mirror);
    with_mirrors(t, vec![mirror])
}

fn with_mirrors(t: &Setup, mirrors: Vec<MirrorConfig>) -> SourceConfig {
    SourceConfig::Registry(RegistryConfig {
        host: t.origin.host(),
        repo: "app".into(),
        scheme: Scheme::Http,
        token: Some("secret".into()),
        http: HttpConfig {
            timeout: Duration::from_secs(1),
            mirrors,
            ..HttpConfig::default()
        },
        ..RegistryConfig::default()
    })
}

#[test]
fn a_mirror_is_asked_first_with_its_own_headers() {
    let t = setup();
    let config = mirror(&t, |mirror| {
        mirror.headers = vec![("X-Dragonfly-Registry".into(), "https://registry.example".into())];
        mirror.auth_through = false;
    });
    let blob = t.open(&config);
    (0..5).for_each(|index| t.check(&blob, index));
    assert_eq!(t.counts(), (5, 0));
    let request = &t.proxy.requests()[0];
    assert!(request.target.starts_with("/v2/app/blobs/"), "{}", request.target);
    assert_eq!(
        request.header("x-dragonfly-registry"),
        Some("https://registry.example")
    );
    assert_eq!(request.header("authorization"), None);
    let blob = t.open(&mirror(&t, |_| {}));
    fetch(&blob, &[9]).unwrap();
    assert_eq!(
        t.proxy.requests()[5].header("authorization"),
        Some("Bearer secret")
    );
    assert!(
        !format!("{config:?}").contains("registry.example"),
        "headers are not shown"
    );
}

#[test]
fn a_broken_mirror_is_left_out_and_tried_again() {
    let t = setup();
    t.broken.store(true, Ordering::SeqCst);
    let blob = t.open(&mirror(&t, |_| {}));
    (0..10).for_each(|index| t.check(&blob, index));
    let (mirrored, direct) = t.counts();
    assert_eq!(direct, 10);
    assert!((3..=5).contains(&mirrored), "{mirrored}");
    assert_eq!(blob.source_metrics().errors, 0, "nobody notices");
    t.broken.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(600));
    (10..20).for_each(|index| t.check(&blob, index));
    assert_eq!(t.counts(), (mirrored + 10, 10), "back within one interval");
}

#[test]
fn what_a_mirror_lacks_comes_from_the_next() {
    let t = setup();
    let lacking = Server::start(|_| Reply::status(404));
    let mirrors = [&lacking, &t.proxy].map(|server| MirrorConfig {
        host: format!("http://{}", server.host()),
        ..MirrorConfig::default()
    });
    let blob = t.open(&with_mirrors(&t, mirrors.into()));
    (0..8).for_each(|index| t.check(&blob, index));
    assert_eq!(
        (lacking.requests().len(), t.counts()),
        (8, (8, 0)),
        "lacking is not failing"
    );
}

#[test]
fn a_mirror_that_damages_data_costs_no_reader_an_error() {
    let t = setup();
    let data = Arc::clone(&t.blob);
    let lying = Server::start(move |request| {
        let mut reply = Reply::blob(request, &data.stored);
        reply.body[5] ^= 4;
        reply
    });
    let host = format!("http://{}", lying.host());
    let blob = t.open(&mirror(&t, |mirror| {
        mirror.host = host;
        // It is tried again in the middle of the test only if somebody forgets that it lied.
        mirror.check_interval = Duration::from_secs(60);
    }));
    (0..6).for_each(|index| t.check(&blob, index));
    assert_eq!(lying.requests().len(), 1);
    assert_eq!(blob.metrics().damaged, 1);
    assert_eq!(t.counts().1, 6, "the origin serves them");
}

#[test]
fn a_slow_answer_is_overtaken_by_a_second_question() {
    let mut t = setup();
    let data = Arc::clone(&t.blob);
    let slow = Arc::new(AtomicBool::new(false));
    let once = Arc::clone(&slow);
    t.origin = Server::start(move |request| Reply {
        delay: if once.swap(false, Ordering::SeqCst) {
            Duration::from_secs(30)
        } else {
            Duration::ZERO
        },
        ..Reply::blob(request, &data.stored)
    });
    let SourceConfig::Registry(mut config) = with_mirrors(&t, Vec::new()) else {
        unreachable!()
    };
    config.http.timeout = Duration::from_secs(25);
    let blob = t.open(&SourceConfig::Registry(config));
    (0..30).for_each(|index| t.check(&blob, index));
    let before = t.origin.requests().len();
    slow.store(true, Ordering::SeqCst);
    let begin = Instant::now();
    t.check(&blob, 30);
    assert!(begin.elapsed() < Duration::from_secs(24), "{:?}", begin.elapsed());
    assert!(t.origin.requests().len() >= before + 2, "asked twice");
    assert_eq!(blob.source_metrics().errors, 0);
}

#[test]
fn who_asks_to_be_left_alone_is_left_alone_by_all() {
    let mut t = setup();
    let data = Arc::clone(&t.blob);
    let refusals = Arc::new(AtomicUsize::new(1));
    let left = Arc::clone(&refusals);
    t.origin = Server::start(move |request| {
        let refuse = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match refuse {
            Ok(_) => Reply::status(429).with("Retry-After", "2"),
            Err(_) => Reply::blob(request, &data.stored),
        }
    });
    let blob = t.open(&with_mirrors(&t, Vec::new()));
    let first = start(&blob, &[0], Duration::from_secs(60));
    let begin = Instant::now();
    while t.origin.requests().is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(Duration::from_millis(300));
    (1..6).for_each(|index| t.check(&blob, index * 2));
    first.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    let requests = t.origin.requests();
    let early = requests[1..]
        .iter()
        .filter(|request| request.at - requests[0].at < Duration::from_millis(1900))
        .count();
    assert_eq!(early, 0, "{} requests", requests.len());
}

#[test]
fn a_name_without_an_address_is_told_apart() {
    let t = setup();
    let SourceConfig::Registry(mut config) = with_mirrors(&t, Vec::new()) else {
        unreachable!()
    };
    config.host = "registry.invalid:5000".into();
    let blob = t.open(&SourceConfig::Registry(config));
    let error = start(&blob, &[0], Duration::from_secs(3))
        .recv_timeout(Duration::from_secs(60))
        .unwrap()
        .unwrap_err();
    assert!(
        error.timed_out && error.reason.contains("name not resolved"),
        "{error}"
    );
}

#[test]
fn signed_requests_take_no_mirrors() {
    let t = setup();
    let mirrors = vec![MirrorConfig::default()];
    let http = HttpConfig {
        mirrors,
        ..HttpConfig::default()
    };
    let config = SourceConfig::S3(S3Config {
        endpoint: "s3.example".into(),
        region: "here".into(),
        bucket: "images".into(),
        http,
        ..S3Config::default()
    });
    let opened = t
        .store
        .open_blob(t.blob.description(), &config, &CacheConfig::new(t.dir.path()));
    assert!(opened.err().unwrap().reason.contains("mirror"));
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
