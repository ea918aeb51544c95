//! `rafs serve` as a client sees it: the registry's answers, and each fault it can be told to show.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use rafsd::tool::serve::{Auth, Fault, Identity, Options, Server, UpstreamOptions};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// An image directory with one blob of `size` bytes and a bootstrap.
struct Images {
    directory: TempDir,
    blob: Vec<u8>,
    digest: String,
}

fn images(size: usize) -> Images {
    let directory = TempDir::new().unwrap();
    let blob: Vec<u8> = (0..size as u64)
        .map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8)
        .collect();
    let digest = hex::encode(Sha256::digest(&blob));
    fs::create_dir(directory.path().join("blobs")).unwrap();
    fs::write(directory.path().join("blobs").join(&digest), &blob).unwrap();
    fs::write(directory.path().join("bootstrap"), b"metadata").unwrap();
    Images {
        directory,
        blob,
        digest,
    }
}

impl Images {
    fn serve(&self, options: Options) -> Server {
        Server::start(Options {
            directories: vec![self.directory.path().to_path_buf()],
            ..options
        })
        .unwrap()
    }

    fn path(&self) -> String {
        format!("/v2/some/deep/repository/blobs/sha256:{}", self.digest)
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// The body is shorter than announced.
    broken: bool,
    /// From the head to the end of the body.
    body_time: Duration,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

fn converse(mut stream: impl Read + Write, method: &str, path: &str, headers: &[&str], body: &str) -> Answer {
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: registry.test\r\nConnection: close\r\n");
    for header in headers {
        request.push_str(header);
        request.push_str("\r\n");
    }
    request.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    stream.write_all(request.as_bytes()).unwrap();
    let mut received = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    let mut head = None;
    loop {
        let n = match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        received.extend_from_slice(&buffer[..n]);
        if head.is_none()
            && let Some(end) = received.windows(4).position(|w| w == b"\r\n\r\n")
        {
            head = Some((
                String::from_utf8(received[..end].to_vec()).unwrap(),
                Instant::now(),
            ));
            received.drain(..end + 4);
        }
    }
    let (head, at) = head.expect("an answer");
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .collect();
    let mut answer = Answer {
        status,
        headers,
        body: received,
        broken: false,
        body_time: at.elapsed(),
    };
    let announced: usize = answer
        .header("content-length")
        .map_or(0, |length| length.parse().unwrap());
    answer.broken = method != "HEAD" && announced != answer.body.len();
    answer
}

fn ask(server: &Server, method: &str, path: &str, headers: &[&str]) -> Answer {
    converse(
        TcpStream::connect(server.addr()).unwrap(),
        method,
        path,
        headers,
        "",
    )
}

fn get(server: &Server, path: &str) -> Answer {
    ask(server, "GET", path, &[])
}

#[test]
fn blobs_and_bootstraps_are_found_by_digest_in_any_repository() {
    let images = images(700_000);
    let server = images.serve(Options::default());
    let whole = get(&server, &images.path());
    assert_eq!((whole.status, whole.body == images.blob), (200, true));
    assert_eq!(
        whole.header("docker-content-digest"),
        Some(format!("sha256:{}", images.digest).as_str())
    );
    assert_eq!(
        get(&server, &format!("/v2/x/blobs/sha256:{}", images.digest))
            .body
            .len(),
        700_000
    );

    let bootstrap = hex::encode(Sha256::digest(b"metadata"));
    assert_eq!(
        get(&server, &format!("/v2/x/blobs/sha256:{bootstrap}")).body,
        b"metadata"
    );
    fs::write(images.directory.path().join("bootstrap"), b"another").unwrap();
    assert_eq!(
        get(&server, &format!("/v2/x/blobs/sha256:{bootstrap}")).status,
        404,
        "it is not there any more"
    );

    let head = ask(&server, "HEAD", &images.path(), &[]);
    assert_eq!(
        (head.status, head.header("content-length"), head.body.len()),
        (200, Some("700000"), 0)
    );
    assert_eq!(get(&server, "/v2/").status, 200);
}

#[test]
fn an_image_one_level_deeper_and_built_later_is_served() {
    let images = images(100);
    let server = images.serve(Options::default());
    let late = images.directory.path().join("late/blobs");
    let digest = hex::encode(Sha256::digest(b"late"));
    assert_eq!(get(&server, &format!("/v2/x/blobs/sha256:{digest}")).status, 404);
    fs::create_dir_all(&late).unwrap();
    fs::write(late.join(&digest), b"late").unwrap();
    assert_eq!(
        get(&server, &format!("/v2/x/blobs/sha256:{digest}")).body,
        b"late"
    );
    let index = String::from_utf8(get(&server, "/").body).unwrap();
    assert!(
        index.contains(&digest) && index.contains(&images.digest),
        "{index}"
    );
}

#[test]
fn what_is_not_a_blob_is_refused_in_the_words_of_the_specification() {
    let images = images(100);
    let server = images.serve(Options::default());
    let other = "0".repeat(64);
    for (path, status, code) in [
        (format!("/v2/x/blobs/sha256:{other}"), 404, "BLOB_UNKNOWN"),
        (
            "/v2/x/blobs/sha256:../../etc/passwd".to_owned(),
            400,
            "DIGEST_INVALID",
        ),
        ("/v2/x/blobs/sha512:00".to_owned(), 400, "DIGEST_INVALID"),
        ("/v2/x/manifests/latest".to_owned(), 404, "UNSUPPORTED"),
    ] {
        let answer = get(&server, &path);
        let body = String::from_utf8(answer.body).unwrap();
        assert_eq!(answer.status, status, "{path}");
        assert!(body.contains(code), "{path}: {body}");
    }
    assert_eq!(ask(&server, "DELETE", &images.path(), &[]).status, 405);
}

#[test]
fn ranges_are_partial_answers_and_impossible_ones_are_refused() {
    let images = images(1_000_000);
    let server = images.serve(Options::default());
    for (range, expected) in [
        ("bytes=0-0", 0..1),
        ("bytes=300000-800000", 300_000..800_001),
        ("bytes=999999-", 999_999..1_000_000),
        ("bytes=-5", 999_995..1_000_000),
        ("bytes=999990-2000000", 999_990..1_000_000),
    ] {
        let answer = ask(&server, "GET", &images.path(), &[&format!("Range: {range}")]);
        assert_eq!(answer.status, 206, "{range}");
        let content_range = format!("bytes {}-{}/1000000", expected.start, expected.end - 1);
        assert_eq!(answer.header("content-range"), Some(content_range.as_str()));
        assert!(answer.body == images.blob[expected], "{range}");
    }
    let beyond = ask(&server, "GET", &images.path(), &["Range: bytes=1000000-"]);
    assert_eq!(
        (beyond.status, beyond.header("content-range")),
        (416, Some("bytes */1000000"))
    );
    let several = ask(&server, "GET", &images.path(), &["Range: bytes=0-1,500-599"]);
    assert_eq!(several.status, 206);
    assert!(
        several
            .header("content-type")
            .unwrap()
            .starts_with("multipart/byteranges; boundary=")
    );
    let part = |range: std::ops::Range<usize>| {
        let head = format!(
            "Content-Range: bytes {}-{}/1000000\r\n\r\n",
            range.start,
            range.end - 1
        );
        [head.as_bytes(), &images.blob[range], b"\r\n--"].concat()
    };
    for wanted in [part(0..2), part(500..600)] {
        assert!(several.body.windows(wanted.len()).any(|window| window == wanted));
    }
    let whole = ask(&server, "GET", &images.path(), &["Range: bytes=0-,0-"]);
    assert_eq!(
        (whole.status, whole.body.len()),
        (200, 1_000_000),
        "more than the blob itself"
    );
}

#[test]
fn every_registry_request_is_recorded_and_logged() {
    let images = images(1000);
    let log = images.directory.path().join("log");
    let server = images.serve(Options {
        request_log: Some(log.clone()),
        ..Options::default()
    });
    ask(&server, "GET", &images.path(), &["Range: bytes=10-19"]);
    get(&server, "/v2/x/blobs/sha256:nonsense");
    get(&server, "/");
    let requests = server.requests();
    assert_eq!(requests.len(), 2, "only what asks the registry: {requests:?}");
    assert_eq!(requests[0].range.as_deref(), Some("bytes=10-19"));
    assert_eq!((requests[0].status, requests[0].bytes), (206, 10));
    assert_eq!(requests[1].status, 400);
    assert_eq!(get(&server, "/_requests").body, br#"{"bytes":10,"requests":2}"#);

    server.stop();
    let lines: Vec<serde_json::Value> = fs::read_to_string(log)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    let first = lines.iter().find(|line| line["status"] == 206).unwrap();
    assert_eq!((&first["method"], &first["bytes"]), (&"GET".into(), &10.into()));
    assert!(first["time"].as_f64().unwrap() > 1.7e9 && first["path"] == images.path());
}

#[test]
fn faults_do_what_they_say_and_end_when_they_are_taken_back() {
    let images = images(400_000);
    let server = images.serve(Options {
        fault: "latency=150".parse().unwrap(),
        ..Options::default()
    });
    let start = Instant::now();
    get(&server, &images.path());
    assert!(start.elapsed() >= Duration::from_millis(150));

    server.set_fault("fail=1,status=503".parse().unwrap());
    assert_eq!(get(&server, &images.path()).status, 503);

    server.set_fault("corrupt=1".parse().unwrap());
    let wrong = ask(&server, "GET", &images.path(), &["Range: bytes=100000-399999"]);
    let bits: u32 = wrong
        .body
        .iter()
        .zip(&images.blob[100_000..])
        .map(|(a, b)| (a ^ b).count_ones())
        .sum();
    assert_eq!((wrong.body.len(), bits), (300_000, 1), "one bit is wrong");

    server.set_fault("truncate=1".parse().unwrap());
    let short = get(&server, &images.path());
    assert!(
        short.broken && short.body == images.blob[..200_000],
        "{} bytes",
        short.body.len()
    );

    server.set_fault("stall=0.3".parse().unwrap());
    let late = get(&server, &images.path());
    assert!(
        late.body_time >= Duration::from_millis(250) && late.body == images.blob,
        "{:?}",
        late.body_time
    );

    server.set_fault("rate=1000000".parse().unwrap());
    let slow = get(&server, &images.path());
    assert!(
        slow.body_time >= Duration::from_millis(300) && slow.body == images.blob,
        "{:?}",
        slow.body_time
    );

    server.set_fault(Fault::default());
    let quick = |_| {
        let start = Instant::now();
        assert!(get(&server, &images.path()).body == images.blob);
        start.elapsed() < Duration::from_millis(250)
    };
    assert!((0..50).any(quick), "it is as slow as before");
}

#[test]
fn faults_are_set_over_http_too() {
    let images = images(10);
    let server = images.serve(Options::default());
    let put = |text| {
        converse(
            TcpStream::connect(server.addr()).unwrap(),
            "PUT",
            "/_fault",
            &[],
            text,
        )
    };
    assert_eq!(put("fail=1,seed=9").status, 204);
    assert_eq!(get(&server, &images.path()).status, 500);
    let nonsense = put("fail=7");
    assert_eq!((nonsense.status, nonsense.body.is_empty()), (400, false));
    assert_eq!(
        get(&server, &images.path()).status,
        500,
        "a refused change changes nothing"
    );
    let shown = String::from_utf8(get(&server, "/_fault").body).unwrap();
    assert!(shown.contains("fail=1") && shown.contains("seed=9"), "{shown}");
    assert_eq!(put("").status, 204);
    assert_eq!(get(&server, &images.path()).status, 200);
}

fn basic(credentials: &str) -> String {
    format!(
        "Authorization: Basic {}",
        base64::engine::general_purpose::STANDARD.encode(credentials)
    )
}

#[test]
fn basic_authentication_asks_for_user_and_password() {
    let images = images(10);
    let auth = Auth::Basic {
        user: "user".into(),
        password: "pass:word".into(),
    };
    let server = images.serve(Options {
        auth,
        ..Options::default()
    });
    let refused = get(&server, &images.path());
    assert_eq!(refused.status, 401);
    assert!(refused.header("www-authenticate").unwrap().starts_with("Basic "));
    assert_eq!(
        ask(&server, "GET", &images.path(), &[&basic("user:wrong")]).status,
        401
    );
    assert_eq!(
        ask(&server, "GET", &images.path(), &[&basic("user:pass:word")]).status,
        200
    );
    assert_eq!(get(&server, "/v2/").status, 401);
}

#[test]
fn bearer_tokens_are_for_one_repository_and_expire() {
    let images = images(10);
    let auth = Auth::Bearer {
        credentials: Some(("user".into(), "word".into())),
        ttl: Duration::from_millis(700),
    };
    let server = images.serve(Options {
        auth,
        ..Options::default()
    });
    let refused = get(&server, &images.path());
    let challenge = refused.header("www-authenticate").unwrap();
    assert_eq!(
        challenge,
        r#"Bearer realm="http://registry.test/token",service="rafs",scope="repository:some/deep/repository:pull""#
    );
    let path = "/token?service=rafs&scope=repository%3Asome%2Fdeep%2Frepository%3Apull";
    assert_eq!(
        get(&server, path).status,
        401,
        "the token endpoint asks for the password"
    );
    let granted = ask(&server, "GET", path, &[&basic("user:word")]);
    let granted: serde_json::Value = serde_json::from_slice(&granted.body).unwrap();
    let bearer = format!("Authorization: Bearer {}", granted["token"].as_str().unwrap());
    assert_eq!(ask(&server, "GET", &images.path(), &[&bearer]).status, 200);
    let elsewhere = images.path().replace("deep", "other");
    assert_eq!(ask(&server, "GET", &elsewhere, &[&bearer]).status, 401);
    std::thread::sleep(Duration::from_millis(750));
    let expired = ask(&server, "GET", &images.path(), &[&bearer]);
    assert_eq!(expired.status, 401);
    assert!(
        expired
            .header("www-authenticate")
            .unwrap()
            .contains("invalid_token")
    );
}

#[test]
fn https_is_spoken_with_a_certificate() {
    let images = images(300_000);
    let made = rcgen::generate_simple_self_signed(["registry.test".to_owned()]).unwrap();
    let identity = Identity {
        certificate: made.cert.pem().into_bytes(),
        key: made.signing_key.serialize_pem().into_bytes(),
    };
    let server = images.serve(Options {
        tls: Some(identity),
        ..Options::default()
    });
    assert!(server.url().starts_with("https://127.0.0.1:"));

    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
    let client =
        rustls::ClientConnection::new(Arc::new(config), "registry.test".try_into().unwrap()).unwrap();
    let stream = rustls::StreamOwned::new(client, TcpStream::connect(server.addr()).unwrap());
    let answer = converse(stream, "GET", &images.path(), &[], "");
    assert_eq!((answer.status, answer.body == images.blob), (200, true));
}

#[test]
fn a_stopped_server_frees_its_port_and_breaks_connections_off() {
    let images = images(100_000);
    let server = images.serve(Options {
        fault: "stall=60".parse().unwrap(),
        ..Options::default()
    });
    let addr = server.addr();
    let path = images.path();
    let waiting =
        std::thread::spawn(move || converse(TcpStream::connect(addr).unwrap(), "GET", &path, &[], ""));
    while server.requests().is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let start = Instant::now();
    server.stop();
    assert!(waiting.join().unwrap().broken);
    assert!(start.elapsed() < Duration::from_secs(60));
    let again = Server::start(Options {
        listen: Some(addr),
        ..Options::default()
    })
    .unwrap();
    assert_eq!(again.addr(), addr);
}

#[test]
fn the_command_prints_its_address_first_and_ends_with_sigterm() {
    let images = images(10);
    let mut process = std::process::Command::new(env!("CARGO_BIN_EXE_rafs"))
        .arg("serve")
        .arg(images.directory.path())
        .args(["--listen", "127.0.0.1:0", "--fault", "fail=1", "--latency", "1"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(process.stdout.take().unwrap()));
    let address: std::net::SocketAddr = lines.next().unwrap().unwrap().parse().unwrap();
    let answer = converse(
        TcpStream::connect(address).unwrap(),
        "GET",
        &images.path(),
        &[],
        "",
    );
    assert_eq!(answer.status, 500);
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&process),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    assert!(process.wait().unwrap().success());
}

/// A server with an empty directory, in front of `upstream`.
fn in_front_of(upstream: &str) -> (TempDir, Server) {
    let store = TempDir::new().unwrap();
    let server = mirror(&store, upstream);
    (store, server)
}

fn mirror(store: &TempDir, upstream: &str) -> Server {
    Server::start(Options {
        directories: vec![store.path().to_path_buf()],
        upstream: Some(UpstreamOptions {
            url: upstream.into(),
            ..UpstreamOptions::default()
        }),
        ..Options::default()
    })
    .unwrap()
}

/// Names of all files in a store.
fn stored(store: &TempDir) -> Vec<String> {
    ["blobs", "tags"]
        .iter()
        .flat_map(|name| fs::read_dir(store.path().join(name)).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[test]
fn an_upstream_is_asked_once_for_what_is_not_there() {
    let images = images(1_500_000);
    let upstream = images.serve(Options {
        fault: "latency=100".parse().unwrap(),
        ..Options::default()
    });
    let (store, server) = in_front_of(&upstream.url());
    let part = || ask(&server, "GET", &images.path(), &["Range: bytes=700000-700999"]);
    let head = || ask(&server, "HEAD", &images.path(), &[]);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4).map(|_| scope.spawn(part)).collect();
        for reader in readers {
            let answer = reader.join().unwrap();
            assert_eq!(
                (answer.status, answer.header("content-range")),
                (206, Some("bytes 700000-700999/1500000"))
            );
            assert!(answer.body == images.blob[700_000..701_000]);
        }
    });
    assert_eq!(upstream.requests().len(), 1, "{:?}", upstream.requests());
    assert_eq!(stored(&store), vec![images.digest.clone()]);

    upstream.stop();
    assert_eq!(part().status, 206);
    assert_eq!(head().header("content-length"), Some("1500000"));
    assert!(get(&server, &images.path()).body == images.blob);
    let other = format!("/v2/x/blobs/sha256:{}", "0".repeat(64));
    let gone = get(&server, &other);
    let reason = String::from_utf8(gone.body).unwrap();
    assert_eq!(gone.status, 502, "{reason}");
    assert!(reason.contains("127.0.0.1:"), "it is named: {reason}");
}

#[test]
fn what_an_upstream_damages_or_lacks_is_not_stored() {
    let images = images(300_000);
    let upstream = images.serve(Options {
        fault: "corrupt=1".parse().unwrap(),
        ..Options::default()
    });
    let (store, server) = in_front_of(&upstream.url());
    let damaged = get(&server, &images.path());
    let reason = String::from_utf8(damaged.body).unwrap();
    assert_eq!(damaged.status, 502, "{reason}");
    assert!(
        reason.contains(&images.digest) && reason.contains("has digest"),
        "{reason}"
    );
    for (fault, status) in [
        ("truncate=1", 502),
        ("fail=1,status=503", 502),
        ("fail=1,status=404", 404),
    ] {
        upstream.set_fault(fault.parse().unwrap());
        assert_eq!(get(&server, &images.path()).status, status, "{fault}");
    }
    assert_eq!(stored(&store), Vec::<String>::new());
    upstream.set_fault(Fault::default());
    let other = format!("/v2/x/blobs/sha256:{}", "0".repeat(64));
    assert_eq!(get(&server, &other).status, 404);
    assert_eq!(get(&server, &images.path().replace("deep", "..")).status, 400);
    assert!(get(&server, &images.path()).body == images.blob);
}

#[test]
fn an_upstream_may_want_tls_and_a_password_or_a_token() {
    let images = images(300_000);
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (user, password) = ("user".to_owned(), "pass:word".to_owned());
    for auth in [
        Auth::Basic {
            user: user.clone(),
            password: password.clone(),
        },
        Auth::Bearer {
            credentials: Some((user.clone(), password.clone())),
            ttl: Duration::from_secs(60),
        },
    ] {
        let upstream = images.serve(Options {
            auth: auth.clone(),
            tls: Some(Identity {
                certificate: made.cert.pem().into_bytes(),
                key: made.signing_key.serialize_pem().into_bytes(),
            }),
            ..Options::default()
        });
        let authority = images.directory.path().join("authority.pem");
        fs::write(&authority, made.cert.pem()).unwrap();
        for (credentials, status) in [("user:pass%3Aword", 200), ("user:other", 502)] {
            let store = TempDir::new().unwrap();
            let server = Server::start(Options {
                directories: vec![store.path().to_path_buf()],
                upstream: Some(UpstreamOptions {
                    url: upstream
                        .url()
                        .replace("://", &format!("://{credentials}@"))
                        .into(),
                    authorities: vec![authority.clone()],
                    ..UpstreamOptions::default()
                }),
                ..Options::default()
            })
            .unwrap();
            let answer = get(&server, &images.path());
            let reason = String::from_utf8_lossy(&answer.body);
            assert_eq!(answer.status, status, "{auth:?} {credentials}: {reason}");
            match status {
                200 => assert!(answer.body == images.blob),
                _ => assert!(!reason.contains("other"), "{reason}"),
            }
        }
    }
}

/// Registry with one manifest, `repository:latest`, that closes after `answers` answers; how many it gave.
fn registry_of_a_manifest(
    manifest: &'static str,
    answers: usize,
) -> (String, std::thread::JoinHandle<Vec<String>>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let serve = move || {
        let answer = || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let mut size = 0;
            while !request[..size].ends_with(b"\r\n\r\n") {
                size += stream.read(&mut request[size..]).unwrap();
            }
            let length = manifest.len();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{manifest}"
            )
            .unwrap();
            let text = String::from_utf8(request[..size].to_vec()).unwrap();
            text.lines().next().unwrap().to_owned()
        };
        (0..answers).map(|_| answer()).collect()
    };
    (url, std::thread::spawn(serve))
}

#[test]
fn manifests_are_kept_by_digest_and_tags_answer_without_the_upstream() {
    let manifest =
        r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#;
    let digest = format!("sha256:{}", hex::encode(Sha256::digest(manifest)));
    let (url, registry) = registry_of_a_manifest(manifest, 2);
    let (store, server) = in_front_of(&url);
    let path = |reference: &str| format!("/v2/some/repository/manifests/{reference}");
    let check = |server: &Server, reference: &str| {
        let answer = get(server, &path(reference));
        assert_eq!(
            answer.status,
            200,
            "{reference}: {}",
            String::from_utf8_lossy(&answer.body)
        );
        assert_eq!(answer.header("docker-content-digest"), Some(digest.as_str()));
        assert_eq!(
            answer.header("content-type"),
            Some("application/vnd.oci.image.index.v1+json")
        );
        assert_eq!(answer.body, manifest.as_bytes());
    };
    check(&server, "latest");
    check(&server, &digest);
    check(&server, &digest);
    assert_eq!(
        registry.join().unwrap(),
        [
            format!("GET {} HTTP/1.1", path("latest")),
            format!("GET {} HTTP/1.1", path(&digest))
        ]
    );
    // The registry is gone now, and the server is another one.
    server.stop();
    let server = mirror(&store, &url);
    check(&server, "latest");
    check(&server, &digest);
    assert_eq!(ask(&server, "HEAD", &path("latest"), &[]).status, 200);
    assert_eq!(get(&server, &path("other")).status, 502);
}

#[test]
fn what_is_no_manifest_is_not_stored_as_one() {
    let (url, registry) = registry_of_a_manifest("<html>", 1);
    let (store, server) = in_front_of(&url);
    let answer = get(&server, "/v2/x/manifests/latest");
    let reason = String::from_utf8(answer.body).unwrap();
    assert!(answer.status == 502 && reason.contains("no manifest"), "{reason}");
    registry.join().unwrap();
    assert_eq!(stored(&store), Vec::<String>::new());
}

#[test]
fn an_upstream_needs_a_url_and_a_directory_to_keep_things_in() {
    let store = TempDir::new().unwrap();
    let start = |directories: Vec<PathBuf>, upstream: &str| {
        let options = Options {
            directories,
            upstream: Some(UpstreamOptions {
                url: upstream.into(),
                ..UpstreamOptions::default()
            }),
            ..Options::default()
        };
        Server::start(options).err().unwrap().to_string()
    };
    let there = || vec![store.path().to_path_buf()];
    assert!(start(there(), "ftp://registry.test").contains("upstream"));
    assert!(start(there(), "http://registry.test/path").contains("upstream"));
    assert!(start(Vec::new(), "http://registry.test").contains("directory"));
    fs::write(store.path().join("file"), b"").unwrap();
    let file = store.path().join("file");
    assert!(start(vec![file], "http://registry.test").contains("file"));
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let missing = PathBuf::from("/nonexistent/images");
    let error = Server::start(Options {
        directories: vec![missing],
        ..Options::default()
    })
    .err()
    .unwrap();
    assert!(error.to_string().contains("/nonexistent/images"), "{error}");
}
