//! The registry source against registries of every temper.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rafsd_backend::config::{HttpConfig, RegistryConfig, Scheme, Secret};
use rafsd_backend::store::*;
use support::http::{Reply, Request, Server};
use support::*;

const REPO: &str = "team/app";

fn config(server: &Server, scheme: Scheme) -> RegistryConfig {
    let http = HttpConfig {
        timeout: Duration::from_millis(500),
        connect_timeout: Duration::from_millis(500),
        ..HttpConfig::default()
    };
    RegistryConfig {
        host: server.host(),
        repo: REPO.into(),
        scheme,
        http,
        ..RegistryConfig::default()
    }
}

fn credentials(text: &str) -> Option<Secret> {
    Some(STANDARD.encode(text).into())
}

struct Setup {
    dir: tempfile::TempDir,
    blob: Arc<TestBlob>,
    store: Store,
}

fn setup() -> Setup {
    Setup {
        dir: tempfile::tempdir().unwrap(),
        blob: Arc::new(TestBlob::new(8, 60_000)),
        store: Store::new(StoreOptions::default()).unwrap(),
    }
}

impl Setup {
    fn open(&self, config: RegistryConfig) -> Arc<Blob> {
        let cache = CacheConfig {
            amplify: 0,
            ..CacheConfig::new(self.dir.path().join("cache"))
        };
        self.store
            .open_blob(self.blob.description(), &SourceConfig::Registry(config), &cache)
            .unwrap()
    }

    fn check(&self, blob: &Arc<Blob>, chunks: &[u32]) {
        fetch(blob, chunks).unwrap();
        for &index in chunks {
            assert!(read(blob, &self.blob.chunks[index as usize]) == self.blob.plain[index as usize]);
        }
    }
}

#[test]
fn anonymous_over_plain_http() {
    let t = setup();
    let data = Arc::clone(&t.blob);
    let server = Server::start(move |request| Reply::blob(request, &data.stored));
    t.check(&t.open(config(&server, Scheme::Http)), &[0, 1, 5]);
    let requests = server.requests();
    assert_eq!(requests.len(), 2);
    assert_eq!(
        requests[0].target,
        format!("/v2/{REPO}/blobs/sha256:{}", t.blob.id)
    );
    assert!(
        requests
            .iter()
            .all(|request| request.header("authorization").is_none())
    );
}

#[test]
fn tls_with_a_configured_authority_without_and_unchecked() {
    let t = setup();
    let data = Arc::clone(&t.blob);
    let server = Server::start_tls(move |request| Reply::blob(request, &data.stored));
    let untrusting = t.open(config(&server, Scheme::Https));
    let error = fetch(&untrusting, &[0]).unwrap_err();
    assert!(error.reason.contains("untrusted certificate"), "{error}");
    assert_eq!(server.requests().len(), 0);

    let mut trusting = config(&server, Scheme::Https);
    trusting.http.ca_cert_files = vec![server.certificate_file(t.dir.path())];
    t.check(&t.open(trusting.clone()), &[0]);
    trusting.host = format!("127.0.0.1:{}", server.address.port());
    let error = fetch(&t.open(trusting), &[1]).unwrap_err();
    assert!(
        error.reason.contains("untrusted certificate"),
        "the name must match: {error}"
    );

    let mut careless = config(&server, Scheme::Https);
    careless.http.skip_verify = true;
    t.check(&t.open(careless), &[2]);
}

#[test]
fn the_scheme_is_detected_once() {
    let t = setup();
    let data = Arc::clone(&t.blob);
    let server = Server::start(move |request| Reply::blob(request, &data.stored));
    let blob = t.open(config(&server, Scheme::Detect));
    t.check(&blob, &[0]);
    t.check(&blob, &[3]);
    assert_eq!(server.count("/blobs/"), 2);
    let data = Arc::clone(&t.blob);
    let server = Server::start_tls(move |request| Reply::blob(request, &data.stored));
    let mut secure = config(&server, Scheme::Detect);
    secure.http.skip_verify = true;
    t.check(&t.open(secure), &[4]);
}

#[test]
fn basic_credentials_are_sent_when_asked_for() {
    let t = setup();
    let data = Arc::clone(&t.blob);
    let expected = format!("Basic {}", STANDARD.encode("me:secret"));
    let server = Server::start(move |request| match request.header("authorization") {
        Some(sent) if sent == expected => Reply::blob(request, &data.stored),
        _ => Reply::status(401).with("WWW-Authenticate", "Basic realm=\"here\""),
    });
    let mut good = config(&server, Scheme::Http);
    good.auth = credentials("me:secret");
    let blob = t.open(good);
    t.check(&blob, &[0]);
    t.check(&blob, &[1]);
    assert_eq!(server.requests().len(), 3, "one refusal, then straight");

    let mut wrong = config(&server, Scheme::Http);
    wrong.auth = credentials("me:wrong");
    let source = SourceConfig::Registry(wrong.clone());
    let blob = t.open(wrong);
    let error = fetch(&blob, &[2]).unwrap_err();
    assert!(
        error.reason.contains("denied") && !error.reason.contains("wrong"),
        "{error}"
    );
    t.store
        .replace_auth(&source, credentials("me:secret").unwrap())
        .unwrap();
    t.check(&blob, &[2]);
}

/// A registry with a token service beside it, in one server.
struct Tokens {
    server: Server,
    issued: Arc<AtomicUsize>,
}

fn tokens(blob: &Arc<TestBlob>, life: f64) -> Tokens {
    let valid: Arc<Mutex<Vec<(String, Instant)>>> = Arc::default();
    let issued = Arc::new(AtomicUsize::new(0));
    let (data, count) = (Arc::clone(blob), Arc::clone(&issued));
    let server = Server::start(move |request| {
        if request.target.starts_with("/token") {
            assert_eq!(
                request.header("authorization"),
                Some(&*format!("Basic {}", STANDARD.encode("me:secret")))
            );
            assert!(
                request.target.contains("scope=repository%3Ateam%2Fapp%3Apull"),
                "{}",
                request.target
            );
            let token = format!("token-{}", count.fetch_add(1, Ordering::SeqCst));
            let end = Instant::now() + Duration::from_secs_f64(life);
            valid.lock().unwrap().push((token.clone(), end));
            let body = format!("{{\"token\":\"{token}\",\"expires_in\":{}}}", life.ceil());
            return Reply {
                delay: Duration::from_millis(50),
                ..Reply::json(body)
            };
        }
        let sent = request
            .header("authorization")
            .and_then(|header| header.strip_prefix("Bearer "));
        let known = |token| {
            valid
                .lock()
                .unwrap()
                .iter()
                .any(|(t, end)| t == token && Instant::now() < *end)
        };
        if sent.is_some_and(known) {
            return Reply::blob(request, &data.stored);
        }
        let realm = format!(
            "Bearer realm=\"http://{}/token\",service=\"s\"",
            request.header("host").unwrap()
        );
        Reply::status(401).with("WWW-Authenticate", realm)
    });
    Tokens { server, issued }
}

#[test]
fn one_token_serves_all_and_is_renewed_before_it_ends() {
    let t = setup();
    let tokens = tokens(&t.blob, 2.0);
    let mut config = config(&tokens.server, Scheme::Http);
    config.auth = credentials("me:secret");
    let blob = t.open(config);
    let waiting: Vec<_> = [0, 2, 4, 6]
        .map(|index| start(&blob, &[index], Duration::from_secs(10)))
        .into();
    waiting
        .iter()
        .for_each(|outcome| drop(outcome.recv().unwrap().unwrap()));
    assert_eq!(
        tokens.issued.load(Ordering::SeqCst),
        1,
        "one renewal for all that were refused"
    );
    let refusals = tokens.server.count("/blobs/") - 4;
    assert!(refusals <= 4);
    // In the last third of its life the token is replaced behind the scenes.
    for index in [1, 3, 5, 7] {
        std::thread::sleep(Duration::from_millis(800));
        t.check(&blob, &[index]);
    }
    let issued = tokens.issued.load(Ordering::SeqCst);
    assert!((2..=4).contains(&issued), "{issued} tokens in 3.2 s");
    assert_eq!(
        tokens.server.count("/blobs/"),
        8 + refusals,
        "no request was refused again"
    );
}

#[test]
fn a_registry_that_refuses_fresh_tokens_sees_few_token_requests() {
    let t = setup();
    let refuse = Arc::new(AtomicBool::new(true));
    let issued = Arc::new(AtomicUsize::new(0));
    let (data, healed, count) = (Arc::clone(&t.blob), Arc::clone(&refuse), Arc::clone(&issued));
    let server = Server::start(move |request| {
        if request.target.starts_with("/token") {
            count.fetch_add(1, Ordering::SeqCst);
            return Reply::json("{\"access_token\":\"t\"}".into());
        }
        if healed.load(Ordering::SeqCst) || request.header("authorization").is_none() {
            let realm = format!(
                "Bearer realm=\"http://{}/token\"",
                request.header("host").unwrap()
            );
            return Reply::status(401).with("WWW-Authenticate", realm);
        }
        Reply::blob(request, &data.stored)
    });
    let blob = t.open(config(&server, Scheme::Http));
    let begin = Instant::now();
    let waiting: Vec<_> = (0..8)
        .map(|index| start(&blob, &[index], Duration::from_secs(20)))
        .collect();
    for outcome in waiting {
        let error = outcome.recv().unwrap().unwrap_err();
        assert!(error.reason.contains("denied"), "{error}");
    }
    let bound = begin.elapsed().as_secs() as usize + 2;
    assert!(
        issued.load(Ordering::SeqCst) <= bound,
        "{} token requests",
        issued.load(Ordering::SeqCst)
    );
    refuse.store(false, Ordering::SeqCst);
    t.check(&blob, &[0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn redirects_are_remembered_and_credentials_stay_at_home() {
    let t = setup();
    let data = Arc::clone(&t.blob);
    let expired = Arc::new(AtomicBool::new(false));
    let gone = Arc::clone(&expired);
    let cdn = Server::start(move |request| {
        assert_eq!(request.header("authorization"), None);
        if gone.load(Ordering::SeqCst) && request.target.contains("sig=1") {
            return Reply::status(403);
        }
        Reply::blob(request, &data.stored)
    });
    let signature = Arc::new(AtomicUsize::new(1));
    let (to, next) = (cdn.host(), Arc::clone(&signature));
    let server = Server::start(move |request| match request.header("authorization") {
        None => Reply::status(401).with("WWW-Authenticate", "Basic"),
        Some(_) => {
            let sig = next.load(Ordering::SeqCst);
            Reply::status(307).with("Location", format!("http://{to}/blob?sig={sig}"))
        }
    });
    let mut config = config(&server, Scheme::Http);
    config.auth = credentials("me:secret");
    let blob = t.open(config);
    (0..4).for_each(|index| t.check(&blob, &[index]));
    assert_eq!((server.requests().len(), cdn.requests().len()), (2, 4));
    expired.store(true, Ordering::SeqCst);
    signature.store(2, Ordering::SeqCst);
    t.check(&blob, &[4]);
    t.check(&blob, &[5]);
    assert_eq!((server.requests().len(), cdn.count("sig=2")), (3, 2));
}

#[test]
fn a_redirect_loop_ends() {
    let t = setup();
    let server = Server::start(|_| Reply::status(302).with("Location", "/again"));
    let outcome = start(
        &t.open(config(&server, Scheme::Http)),
        &[0],
        Duration::from_secs(3),
    )
    .recv()
    .unwrap();
    assert!(outcome.unwrap_err().reason.contains("redirects"));
}

/// Answers by `fault` for the first `count` requests, and well afterwards.
fn faulty(blob: &Arc<TestBlob>, count: usize, fault: fn(&Request, &[u8]) -> Reply) -> Server {
    let (data, seen) = (Arc::clone(blob), AtomicUsize::new(0));
    Server::start(move |request| {
        if seen.fetch_add(1, Ordering::SeqCst) < count {
            fault(request, &data.stored)
        } else {
            Reply::blob(request, &data.stored)
        }
    })
}

type Fault = fn(&Request, &[u8]) -> Reply;

const FAULTS: [(&str, Fault); 14] = [
    ("whole blob", |_, data| Reply {
        body: data.to_vec(),
        ..Reply::status(200)
    }),
    ("asked for", |request, data| {
        let mut reply = Reply::blob(request, data);
        reply.headers[0].1 = reply.headers[0].1.replacen("bytes ", "bytes 1", 1);
        reply
    }),
    ("no Content-Range", |request, data| Reply {
        headers: vec![],
        ..Reply::blob(request, data)
    }),
    ("416", |_, _| {
        Reply::status(416).with("Content-Range", "bytes */7")
    }),
    ("429", |_, _| Reply::status(429).with("Retry-After", "1")),
    ("500", |_, _| Reply::status(500)),
    ("503", |_, _| Reply::status(503).with("Retry-After", "1")),
    ("404", |_, _| Reply::status(404)),
    ("", |_, _| Reply {
        reset: true,
        ..Reply::default()
    }),
    ("", |request, data| Reply {
        cut: Some(0),
        ..Reply::blob(request, data)
    }),
    ("silent", |request, data| Reply {
        stall: Some(100),
        ..Reply::blob(request, data)
    }),
    ("no answer", |_, _| Reply {
        delay: Duration::from_secs(5),
        ..Reply::status(200)
    }),
    ("bytes in", |request, data| Reply {
        drip: Some(Duration::from_millis(100)),
        ..Reply::blob(request, data)
    }),
    ("encoded", |request, data| {
        Reply::blob(request, data).with("Content-Encoding", "gzip")
    }),
];

#[test]
fn every_fault_is_told_apart_and_survived() {
    std::thread::scope(|scope| {
        for (name, fault) in FAULTS {
            scope.spawn(move || {
                let t = setup();
                let server = faulty(&t.blob, 1, fault);
                t.check(&t.open(config(&server, Scheme::Http)), &[1, 2]);
                assert!(server.requests().len() >= 2, "{name}");

                let t = setup();
                let server = faulty(&t.blob, usize::MAX, fault);
                let begin = Instant::now();
                let blob = t.open(config(&server, Scheme::Http));
                let error = start(&blob, &[1, 2], Duration::from_secs(4))
                    .recv()
                    .unwrap()
                    .unwrap_err();
                assert!(begin.elapsed() < Duration::from_secs(30), "{name}: {error}");
                assert!(error.reason.contains(name), "{name}: {error}");
                assert!(!blob.is_resident(1) && !blob.is_resident(2), "{name}");
            });
        }
    });
}

#[test]
fn a_body_longer_than_promised_is_no_problem_but_its_own() {
    let t = setup();
    let server = faulty(&t.blob, 1, |request, data| {
        let mut reply = Reply::blob(request, data);
        reply.body.extend_from_slice(b"and more");
        reply
    });
    t.check(&t.open(config(&server, Scheme::Http)), &[1]);
}

#[test]
fn a_registry_that_is_gone_costs_the_deadline() {
    let t = setup();
    let server = Server::start(|_| Reply::status(500));
    let config = config(&server, Scheme::Http);
    drop(server);
    let error = start(&t.open(config), &[0], Duration::from_secs(3))
        .recv()
        .unwrap()
        .unwrap_err();
    assert!(
        error.timed_out && error.reason.contains("unreachable") && error.reason.contains("attempt"),
        "{error}"
    );
}

#[test]
fn secrets_are_not_shown() {
    let t = setup();
    let server = Server::start(|_| Reply::status(403));
    let mut config = config(&server, Scheme::Http);
    config.auth = credentials("me:topsecret");
    config.token = Some("topsecret".into());
    config.http.headers.push(("X-Key".into(), "topsecret".into()));
    let shown = format!("{config:?}");
    assert!(!shown.contains("topsecret") && !shown.contains(&STANDARD.encode("me:topsecret")));
    let error = fetch(&t.open(config), &[0]).unwrap_err();
    assert!(!format!("{error:?}").contains("topsecret"));
}

#[test]
fn configurations_that_can_not_work_fail_at_open() {
    let t = setup();
    let server = Server::start(|_| Reply::status(500));
    let cache = CacheConfig::new(t.dir.path());
    let with = |change: fn(&mut RegistryConfig)| {
        let mut config = config(&server, Scheme::Http);
        change(&mut config);
        t.store
            .open_blob(t.blob.description(), &SourceConfig::Registry(config), &cache)
    };
    assert!(with(|_| {}).is_ok());
    assert!(with(|c| c.host = "user@host".into()).is_err());
    assert!(with(|c| c.host = "host/path".into()).is_err());
    assert!(with(|c| c.repo = String::new()).is_err());
    assert!(with(|c| c.auth = Some("no base64!".into())).is_err());
    assert!(with(|c| c.http.ca_cert_files = vec!["/does/not/exist".into()]).is_err());
}
