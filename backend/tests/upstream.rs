//! Whole objects of a registry, as a server that keeps them fetches them.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rafsd_backend::error::{SourceError, SourceErrorKind};
use rafsd_backend::source::pull::{Upstream, UpstreamOptions};
use support::http::{Reply, Server};
use tokio::runtime::Runtime;

const REPO: &str = "team/app";
const PATH: &str = "/v2/team/app/blobs/sha256:00";

fn upstream(url: String) -> Upstream {
    Upstream::new(&UpstreamOptions {
        url: url.into(),
        ..UpstreamOptions::default()
    })
    .unwrap()
}

fn fetch(upstream: &Upstream) -> Result<Vec<u8>, SourceError> {
    Runtime::new().unwrap().block_on(async {
        let mut object = upstream.get(REPO, PATH, "*/*").await?;
        let mut body = Vec::new();
        while let Some(piece) = upstream.piece(&mut object).await? {
            body.extend_from_slice(&piece);
        }
        Ok(body)
    })
}

fn basic(text: &str) -> String {
    format!("Basic {}", STANDARD.encode(text))
}

#[test]
fn a_registry_behind_tls_that_wants_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let address = std::sync::Arc::new(Mutex::new(String::new()));
    let realm = std::sync::Arc::clone(&address);
    let server = Server::start_tls(move |request| {
        if request.target.starts_with("/token") {
            return match request.header("authorization") {
                Some(given) if given == basic("us er:pass:word") => {
                    assert!(request.target.contains("scope=repository%3Ateam%2Fapp%3Apull"));
                    Reply::json(r#"{"token":"abc","expires_in":300}"#.to_owned())
                }
                _ => Reply::status(401),
            };
        }
        if request.header("authorization") == Some("Bearer abc") {
            return Reply::blob(request, b"content");
        }
        let realm = realm.lock().unwrap();
        Reply::status(401).with(
            "WWW-Authenticate",
            format!(
                r#"Bearer realm="https://{realm}/token",service="here",scope="repository:team/app:pull""#
            ),
        )
    });
    *address.lock().unwrap() = server.host();
    let with = |credentials: &str, authorities| {
        Upstream::new(&UpstreamOptions {
            url: format!("https://{credentials}{}", server.host()).into(),
            authorities,
            silence: None,
        })
        .unwrap()
    };
    let trusted = || vec![server.certificate_file(dir.path())];
    let right = with("us%20er:pass%3Aword@", trusted());
    assert_eq!(fetch(&right).unwrap(), b"content");
    assert_eq!(fetch(&right).unwrap(), b"content");
    assert_eq!(server.count("/token"), 1, "a token is kept");
    let wrong = with("us%20er:other@", trusted());
    let error = fetch(&wrong).unwrap_err();
    assert_eq!(error.kind, SourceErrorKind::Denied, "{error}");
    assert!(!error.to_string().contains("other"), "{error}");
    let unknown = with("us%20er:pass%3Aword@", Vec::new());
    assert_eq!(fetch(&unknown).unwrap_err().kind, SourceErrorKind::Untrusted);
}

#[test]
fn credentials_stay_with_the_registry_where_it_redirects() {
    let elsewhere = Server::start(|request| match request.header("authorization") {
        None => Reply::blob(request, b"content"),
        Some(_) => Reply::status(400),
    });
    let target = format!("http://{}/signed", elsewhere.host());
    let server = Server::start(move |request| match request.header("authorization") {
        Some(given) if given == basic("user:pass") => Reply::status(307).with("Location", &target),
        _ => Reply::status(401).with("WWW-Authenticate", "Basic realm=\"here\""),
    });
    let upstream = upstream(format!("http://user:pass@{}", server.host()));
    assert_eq!(upstream.host(), server.host());
    assert_eq!(fetch(&upstream).unwrap(), b"content");
    assert_eq!((server.requests().len(), elsewhere.requests().len()), (2, 1));
}

#[test]
fn redirects_in_a_circle_end() {
    let server = Server::start(|request| Reply::status(302).with("Location", request.target.clone()));
    let error = fetch(&upstream(format!("http://{}", server.host()))).unwrap_err();
    assert!(error.to_string().contains("redirects"), "{error}");
}

#[test]
fn a_body_that_trickles_is_given_up() {
    let server = Server::start(|_| Reply {
        drip: Some(Duration::from_millis(200)),
        body: vec![0; 1 << 20],
        ..Reply::status(200)
    });
    let upstream = Upstream::new(&UpstreamOptions {
        url: format!("http://{}", server.host()).into(),
        silence: Some(Duration::from_secs(2)),
        ..UpstreamOptions::default()
    })
    .unwrap();
    let begin = Instant::now();
    let error = fetch(&upstream).unwrap_err();
    assert_eq!(error.kind, SourceErrorKind::Stalled, "{error}");
    // All of it would take 58 hours, and it was never silent for long.
    assert!(error.to_string().contains("bytes in"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(60));
}
