//! One suite that every source must pass.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

mod support;

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rafsd_backend::config::*;
use rafsd_backend::error::{SourceError, SourceErrorKind};
use rafsd_backend::source::pull::{Upstream, UpstreamOptions};
use rafsd_backend::store::*;
use sha2::{Digest, Sha256};
use support::http::{Reply, Request, Server};
use support::*;

/// A source with `blob` in it, and nothing else.
struct Site {
    config: SourceConfig,
    /// Whatever must live as long as the source is asked.
    _server: Box<dyn std::any::Any>,
}

/// What goes wrong with a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    /// The blob is not there.
    Gone,
    /// It ends too early.
    Short,
    /// Its bytes are others.
    Corrupt,
    /// The server has an error, and a disk none of this.
    Error,
    /// The connection breaks off.
    Reset,
}

/// Makes things go wrong with the source that a test has made.
#[derive(Clone, Default)]
struct Mischief {
    wrong: Arc<Mutex<Option<Wrong>>>,
    /// Of local sources.
    file: Arc<Mutex<Option<LocalFile>>>,
}

/// A file and what it should be.
type LocalFile = (PathBuf, Vec<u8>);

impl Mischief {
    fn set(&self, wrong: Option<Wrong>) {
        *self.wrong.lock().unwrap() = wrong;
        if let Some((path, good)) = &*self.file.lock().unwrap() {
            let content = match wrong {
                Some(Wrong::Gone) => Vec::new(),
                Some(Wrong::Short) => good[..good.len() / 8].to_vec(),
                Some(Wrong::Corrupt) => good.iter().map(|byte| byte ^ 1).collect(),
                Some(Wrong::Error | Wrong::Reset) | None => good.clone(),
            };
            // In place: it may be open.
            std::fs::write(path, content).unwrap();
        }
    }

    /// Writes the file of a local source.
    fn write(&self, path: &Path, content: &[u8]) {
        std::fs::write(path, content).unwrap();
        *self.file.lock().unwrap() = Some((path.to_owned(), content.to_vec()));
    }

    /// `reply` as it is sent while something is wrong.
    fn spoil(&self, reply: Reply) -> Reply {
        match *self.wrong.lock().unwrap() {
            Some(Wrong::Gone) => Reply::status(404),
            Some(Wrong::Error) => Reply::status(503),
            Some(Wrong::Short) => Reply {
                cut: Some(reply.body.len() / 8),
                ..reply
            },
            Some(Wrong::Corrupt) => Reply {
                body: reply.body.iter().map(|byte| byte ^ 1).collect(),
                ..reply
            },
            Some(Wrong::Reset) => Reply { reset: true, ..reply },
            None => reply,
        }
    }
}

/// Whatever goes wrong: no wrong bytes, an answer with a reason, and everything as before once it is over.
fn endures(open: impl Fn(&TestBlob, &str, u32) -> Arc<Blob>, blob: &TestBlob, mischief: &Mischief) {
    let opened = open(blob, "endures", 0);
    let wrongs = [
        Wrong::Gone,
        Wrong::Short,
        Wrong::Corrupt,
        Wrong::Error,
        Wrong::Reset,
    ];
    for (index, wrong) in (20..).zip(wrongs) {
        mischief.set(Some(wrong));
        let outcome = start(&opened, &[index], Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(100));
        mischief.set(None);
        if let Err(error) = outcome.recv_timeout(Duration::from_secs(30)).expect("an answer") {
            assert!(!error.reason.is_empty());
        }
        fetch(&opened, &[index]).unwrap();
        let index = index as usize;
        assert!(
            read(&opened, &blob.chunks[index]) == blob.plain[index],
            "{wrong:?}"
        );
    }
}

/// What every source promises.
fn conforms(make: impl Fn(&Path, &TestBlob, &Mischief) -> Site) {
    let blob = TestBlob::new(30, 90_000);
    let dir = tempfile::tempdir().unwrap();
    let mischief = Mischief::default();
    let site = make(dir.path(), &blob, &mischief);
    let store = Store::new(StoreOptions::default()).unwrap();
    let open = |blob: &TestBlob, name: &str, amplify| {
        let cache = CacheConfig {
            amplify,
            ..CacheConfig::new(dir.path().join(name))
        };
        store.open_blob(blob.description(), &site.config, &cache).unwrap()
    };

    // Single chunks, the first and the last among them, and many at once.
    let opened = open(&blob, "exact", 0);
    for chunks in [vec![0], vec![29], vec![7, 8, 9, 20], (0..30).collect()] {
        fetch(&opened, &chunks).unwrap();
        for index in chunks {
            assert!(read(&opened, &blob.chunks[index as usize]) == blob.plain[index as usize]);
        }
    }
    assert_eq!(
        opened.source_metrics().bytes,
        blob.stored.len() as u64,
        "each byte once"
    );
    assert_eq!(opened.source_metrics().errors, 0);

    // Everything, by readers that know nothing of each other.
    let opened = open(&blob, "amplified", 1 << 20);
    let all: Vec<_> = (0..30)
        .rev()
        .map(|index| start(&opened, &[index], Duration::from_secs(20)))
        .collect();
    all.iter()
        .for_each(|outcome| drop(outcome.recv().unwrap().unwrap()));
    for (chunk, plain) in blob.chunks.iter().zip(&blob.plain) {
        assert!(read(&opened, chunk) == *plain);
    }

    // A range beyond the end is an error and not other bytes.
    let mut beyond = TestBlob::new(30, 90_000);
    beyond.stored.resize(beyond.stored.len() + (1 << 20), 0);
    beyond.chunks[29].compressed_offset = blob.stored.len() as u64 + 4096;
    let opened = open(&beyond, "beyond", 0);
    let error = start(&opened, &[29], Duration::from_secs(3))
        .recv()
        .unwrap()
        .unwrap_err();
    assert!(!error.reason.contains("no answer"), "{error}");

    // So is a blob that is not there.
    let mut missing = TestBlob::new(30, 90_000);
    missing.id = "f".repeat(64);
    let error = fetch(&open(&missing, "missing", 0), &[0]).unwrap_err();
    assert!(error.reason.contains("not found"), "{error}");
    endures(open, &blob, &mischief);
}

fn http() -> HttpConfig {
    HttpConfig {
        timeout: Duration::from_secs(2),
        ..HttpConfig::default()
    }
}

/// Serves `blob` at a path.
fn serve(
    blob: &TestBlob,
    path: String,
    mischief: &Mischief,
) -> impl Fn(&Request) -> Reply + Send + Sync + 'static {
    let (data, mischief) = (blob.stored.clone(), mischief.clone());
    move |request| {
        if request.target == path {
            mischief.spoil(Reply::blob(request, &data))
        } else {
            Reply::status(404)
        }
    }
}

#[test]
fn directory() {
    conforms(|dir, blob, mischief| {
        let blobs = dir.join("blobs");
        std::fs::create_dir(&blobs).unwrap();
        mischief.write(&blobs.join(&blob.id), &blob.stored);
        let config = DirConfig {
            dir: Some(blobs),
            ..DirConfig::default()
        };
        Site {
            config: SourceConfig::Dir(config),
            _server: Box::new(()),
        }
    });
}

#[test]
fn one_of_several_directories() {
    conforms(|dir, blob, mischief| {
        let blobs = dir.join("blobs");
        std::fs::create_dir(&blobs).unwrap();
        mischief.write(&blobs.join(&blob.id), &blob.stored);
        let config = DirConfig {
            dir: Some(dir.join("none")),
            alt_dirs: vec![dir.join("no"), blobs],
            blob_file: None,
        };
        Site {
            config: SourceConfig::Dir(config),
            _server: Box::new(()),
        }
    });
}

#[test]
fn registry() {
    conforms(|_, blob, mischief| {
        let server = Server::start(serve(
            blob,
            format!("/v2/team/app/blobs/sha256:{}", blob.id),
            mischief,
        ));
        let config = RegistryConfig {
            host: server.host(),
            repo: "team/app".into(),
            scheme: Scheme::Http,
            http: http(),
            ..RegistryConfig::default()
        };
        Site {
            config: SourceConfig::Registry(config),
            _server: Box::new(server),
        }
    });
}

#[test]
fn http_proxy_over_tcp() {
    conforms(|_, blob, mischief| {
        let server = Server::start(serve(blob, format!("/some/blobs/{}", blob.id), mischief));
        let addr = format!("http://{}", server.host());
        let config = HttpProxyConfig {
            addr,
            path: "/some/blobs/".into(),
            http: http(),
        };
        Site {
            config: SourceConfig::HttpProxy(config),
            _server: Box::new(server),
        }
    });
}

#[test]
fn http_proxy_over_a_unix_socket() {
    conforms(|dir, blob, mischief| {
        let socket = dir.join("proxy.sock");
        let server = Server::start_unix(&socket, serve(blob, format!("/blobs/{}", blob.id), mischief));
        let config = HttpProxyConfig {
            addr: socket.display().to_string(),
            path: "blobs".into(),
            http: http(),
        };
        Site {
            config: SourceConfig::HttpProxy(config),
            _server: Box::new(server),
        }
    });
}

fn hmac_sha256(key: &[u8], data: &str) -> Vec<u8> {
    hmac::<Sha256>(key, data.as_bytes())
}

/// RFC 2104, written down again so that the product is not checked against itself.
fn hmac<D: Digest>(key: &[u8], data: &[u8]) -> Vec<u8> {
    let pad = |byte: u8| -> Vec<u8> {
        (0..64)
            .map(|at| key.get(at).copied().unwrap_or(0) ^ byte)
            .collect()
    };
    let inner = D::new().chain_update(pad(0x36)).chain_update(data).finalize();
    D::new()
        .chain_update(pad(0x5c))
        .chain_update(inner)
        .finalize()
        .to_vec()
}

/// Checks a request's signature as S3 does.
fn s3_accepts(request: &Request, secret: &str) -> bool {
    let Some(authorization) = request.header("authorization") else {
        return false;
    };
    let parts: Vec<&str> = authorization
        .split([' ', ','])
        .filter(|part| !part.is_empty())
        .collect();
    let value = |name: &str| parts.iter().find_map(|part| part.strip_prefix(name)).unwrap();
    let (credential, names, signature) = (value("Credential="), value("SignedHeaders="), value("Signature="));
    let scope: Vec<&str> = credential.split('/').skip(1).collect();
    let lines: String = names
        .split(';')
        .map(|name| format!("{name}:{}\n", request.header(name).unwrap_or_default()))
        .collect();
    for required in ["host", "x-amz-date", "x-amz-content-sha256", "range"] {
        assert!(
            names.split(';').any(|name| name == required),
            "{required} is not signed"
        );
    }
    let canonical = format!(
        "{}\n{}\n\n{lines}\n{names}\n{}",
        request.method,
        request.target,
        request.header("x-amz-content-sha256").unwrap()
    );
    let text = format!(
        "AWS4-HMAC-SHA256\n{}\n{}\n{}",
        request.header("x-amz-date").unwrap(),
        scope.join("/"),
        hex::encode(Sha256::digest(canonical))
    );
    let mut key = format!("AWS4{secret}").into_bytes();
    for part in scope {
        key = hmac_sha256(&key, part);
    }
    hex::encode(hmac_sha256(&key, &text)) == signature
}

fn s3(server: &Server, secret: Option<&str>) -> SourceConfig {
    SourceConfig::S3(S3Config {
        endpoint: server.host(),
        scheme: Scheme::Http,
        region: "eu-1".into(),
        bucket: "images".into(),
        prefix: "nydus/".into(),
        access_key_id: secret.map(|_| "KEY".into()),
        access_key_secret: secret.map(Into::into),
        http: http(),
    })
}

#[test]
fn s3_with_a_key() {
    conforms(|_, blob, mischief| {
        let serve = serve(blob, format!("/images/nydus/{}", blob.id), mischief);
        let server = Server::start(move |request| {
            if s3_accepts(request, "SECRET") {
                serve(request)
            } else {
                Reply::status(403)
            }
        });
        Site {
            config: s3(&server, Some("SECRET")),
            _server: Box::new(server),
        }
    });
}

#[test]
fn s3_without_a_key() {
    conforms(|_, blob, mischief| {
        let serve = serve(blob, format!("/images/nydus/{}", blob.id), mischief);
        let server = Server::start(move |request| {
            assert_eq!(request.header("authorization"), None);
            serve(request)
        });
        Site {
            config: s3(&server, None),
            _server: Box::new(server),
        }
    });
}

#[test]
fn s3_with_a_wrong_key_is_denied() {
    let blob = TestBlob::new(2, 9000);
    let server = Server::start(|request| {
        if s3_accepts(request, "SECRET") {
            Reply::status(200)
        } else {
            Reply::status(403)
        }
    });
    let (store, dir) = (
        Store::new(StoreOptions::default()).unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let cache = CacheConfig::new(dir.path());
    let opened = store
        .open_blob(blob.description(), &s3(&server, Some("WRONG")), &cache)
        .unwrap();
    let error = fetch(&opened, &[0]).unwrap_err();
    assert!(
        error.reason.contains("denied") && !error.reason.contains("WRONG"),
        "{error}"
    );
}

#[test]
fn oss_with_a_key() {
    conforms(|_, blob, mischief| {
        let (name, serve) = (
            blob.id.clone(),
            serve(blob, format!("/images/nydus/{}", blob.id), mischief),
        );
        let server = Server::start(move |request| {
            let date = request.header("date").unwrap_or_default();
            let text = format!("GET\n\n\n{date}\n{}", request.target);
            let signature = STANDARD.encode(hmac::<sha1::Sha1>(b"SECRET", text.as_bytes()));
            let signed = request.header("authorization") == Some(&format!("OSS KEY:{signature}"));
            assert!(signed || !request.target.contains(&name));
            if signed {
                serve(request)
            } else {
                Reply::status(403)
            }
        });
        let config = OssConfig {
            endpoint: server.host(),
            scheme: Scheme::Http,
            bucket: "images".into(),
            prefix: "nydus/".into(),
            access_key_id: Some("KEY".into()),
            access_key_secret: Some("SECRET".into()),
            http: http(),
        };
        Site {
            config: SourceConfig::Oss(config),
            _server: Box::new(server),
        }
    });
}

/// A disk image with these partitions: name, GUID, "basic data", content.
fn gpt(partitions: &[(&str, [u8; 16], bool, &[u8])]) -> Vec<u8> {
    let mut disk = vec![0; 64 * 512];
    let mut table = Vec::new();
    for (name, guid, basic, content) in partitions {
        disk.resize(disk.len().next_multiple_of(512), 0);
        let first = disk.len() as u64 / 512;
        disk.extend_from_slice(content);
        disk.resize(disk.len().next_multiple_of(512), 0);
        let mut entry = vec![0; 128];
        let basic_data = "a2a0d0ebe5b9334487c068b6b72699c7";
        entry[..16].copy_from_slice(&if *basic {
            hex::decode(basic_data).unwrap()
        } else {
            vec![9; 16]
        });
        entry[16..32].copy_from_slice(guid);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&(disk.len() as u64 / 512 - 1).to_le_bytes());
        for (unit, slot) in name.encode_utf16().zip(entry[56..].chunks_mut(2)) {
            slot.copy_from_slice(&unit.to_le_bytes());
        }
        table.extend(entry);
    }
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[512 + 72..512 + 80].copy_from_slice(&2u64.to_le_bytes());
    disk[512 + 80..512 + 84].copy_from_slice(&(partitions.len() as u32 + 3).to_le_bytes());
    disk[512 + 84..512 + 88].copy_from_slice(&128u32.to_le_bytes());
    disk[1024..1024 + table.len()].copy_from_slice(&table);
    disk
}

/// The GUID whose digits are `digits`.
fn guid(digits: &str) -> [u8; 16] {
    let mut bytes: [u8; 16] = hex::decode(digits).unwrap().try_into().unwrap();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

#[test]
fn disk_with_partitions() {
    for basic in [false, true] {
        conforms(|dir, blob, mischief| {
            let path = dir.join("disk.img");
            let (name, rest) = blob.id.split_at(32);
            let other = ("other", [7; 16], false, &[1u8; 5000][..]);
            // A partition is a whole number of sectors: cut the blob's last one off to know its end.
            mischief.write(&path, &gpt(&[other, (name, guid(rest), basic, &blob.stored)]));
            let config = LocalDiskConfig {
                device: path,
                disable_gpt: false,
            };
            Site {
                config: SourceConfig::LocalDisk(config),
                _server: Box::new(()),
            }
        });
    }
}

#[test]
fn disks_that_make_no_sense_are_refused() {
    let blob = TestBlob::new(2, 9000);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(StoreOptions::default()).unwrap();
    let path = dir.path().join("disk.img");
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let config = SourceConfig::LocalDisk(LocalDiskConfig {
            device: path.clone(),
            disable_gpt: false,
        });
        store.open_blob(
            blob.description(),
            &config,
            &CacheConfig::new(dir.path().join("cache")),
        )
    };
    let good = gpt(&[("a", [1; 16], false, &[1; 5000])]);
    assert!(open(&good).is_ok());
    assert!(open(&[]).is_err());
    assert!(
        open(&good[..good.len() - 512]).is_err(),
        "a partition beyond the end"
    );
    for (at, bytes) in [
        (512, [0u8; 8]),
        (512 + 72, [0xff; 8]),
        (512 + 80, [0xff; 8]),
        (1024 + 40, [0xff; 8]),
    ] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&bytes);
        assert!(open(&bad).is_err(), "at {at}");
    }
    assert!(
        open(&gpt(&[
            ("a", [1; 16], true, &[1; 9]),
            ("a", [2; 16], true, &[1; 9])
        ]))
        .is_err(),
        "twice"
    );
}

/// A server of somebody else's, until the end of the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A tool where `make peers` puts it, or on the PATH; says so by name if there is none.
fn tool(name: &str, test: &str) -> Option<PathBuf> {
    let built = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/peers/bin")).join(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::iter::once(built)
        .chain(std::env::split_paths(&path).map(|dir| dir.join(name)))
        .find(|path| path.exists());
    if found.is_none() {
        eprintln!("SKIPPED {test}: no {name} here");
    }
    found
}

/// Starts a server that listens on `port`, and waits until it does.
fn serve_by(command: &mut Command, port: u16) -> Daemon {
    let mut daemon = Daemon(
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let begin = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(daemon.0.try_wait().unwrap().is_none(), "{command:?} ended");
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{command:?} does not listen"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    daemon
}

/// A port that nobody listens on, below those that the kernel gives to whoever asks for any.
fn free_port() -> u16 {
    let first = 10_000 + (std::process::id() % 20_000) as u16;
    (first..first + 1_000)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap()
}

/// Debian's `docker-registry`, with TLS and passwords.
#[test]
fn the_docker_registry_with_tls_and_basic_authentication() {
    let name = "the_docker_registry_with_tls_and_basic_authentication";
    let (Some(registry), Some(htpasswd)) = (tool("docker-registry", name), tool("htpasswd", name)) else {
        return;
    };
    conforms(|dir, blob, _| {
        let root = dir.join("registry");
        let (first, repo) = (&blob.id[..2], "team/app");
        let data = root.join(format!("docker/registry/v2/blobs/sha256/{first}/{}", blob.id));
        std::fs::create_dir_all(&data).unwrap();
        std::fs::write(data.join("data"), &blob.stored).unwrap();
        let link = root.join(format!(
            "docker/registry/v2/repositories/{repo}/_layers/sha256/{}",
            blob.id
        ));
        std::fs::create_dir_all(&link).unwrap();
        std::fs::write(link.join("link"), format!("sha256:{}", blob.id)).unwrap();

        let certificate = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let [pem, key, passwords, config] =
            ["cert.pem", "key.pem", "htpasswd", "config.yml"].map(|name| dir.join(name));
        std::fs::write(&pem, certificate.cert.pem()).unwrap();
        std::fs::write(&key, certificate.signing_key.serialize_pem()).unwrap();
        let made = Command::new(&htpasswd)
            .args(["-Bbn", "user", "pass"])
            .output()
            .unwrap();
        std::fs::write(&passwords, made.stdout).unwrap();
        let port = free_port();
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nauth:\n  htpasswd:\n    realm: here\n    path: {}\n\
             http:\n  addr: 127.0.0.1:{port}\n  tls:\n    certificate: {}\n    key: {}\n",
            root.display(),
            passwords.display(),
            pem.display(),
            key.display()
        );
        std::fs::write(&config, text).unwrap();
        let daemon = serve_by(Command::new(&registry).arg("serve").arg(&config), port);
        // Whole, as `rafs serve` takes it from an upstream.
        let whole = |credentials: &str| {
            let upstream = Upstream::new(&UpstreamOptions {
                url: format!("https://{credentials}@localhost:{port}").into(),
                authorities: vec![pem.clone()],
                silence: None,
            });
            let path = format!("/v2/{repo}/blobs/sha256:{}", blob.id);
            tokio::runtime::Runtime::new().unwrap().block_on(async {
                let upstream = upstream.unwrap();
                let mut object = upstream.get(repo, &path, "*/*").await?;
                let mut body = Vec::new();
                while let Some(piece) = upstream.piece(&mut object).await? {
                    body.extend_from_slice(&piece);
                }
                Ok::<_, SourceError>(body)
            })
        };
        assert!(whole("user:pass").unwrap() == blob.stored);
        assert_eq!(whole("user:other").unwrap_err().kind, SourceErrorKind::Denied);
        let http = HttpConfig {
            ca_cert_files: vec![pem],
            timeout: Duration::from_secs(20),
            ..HttpConfig::default()
        };
        let config = RegistryConfig {
            host: format!("localhost:{port}"),
            repo: repo.into(),
            scheme: Scheme::Https,
            auth: Some(STANDARD.encode("user:pass").into()),
            http,
            ..RegistryConfig::default()
        };
        Site {
            config: SourceConfig::Registry(config),
            _server: Box::new(daemon),
        }
    });
}

/// `s3s-fs`, an S3 server over a directory that checks signatures.
#[test]
fn s3s_fs() {
    let Some(server) = tool("s3s-fs", "s3s_fs") else {
        return;
    };
    conforms(|dir, blob, _| {
        let root = dir.join("s3");
        std::fs::create_dir_all(root.join("images/nydus")).unwrap();
        std::fs::write(root.join("images/nydus").join(&blob.id), &blob.stored).unwrap();
        let port = free_port();
        let mut command = Command::new(&server);
        command
            .args([
                "--access-key",
                "KEY",
                "--secret-key",
                "SECRET",
                "--host",
                "127.0.0.1",
                "--port",
            ])
            .arg(port.to_string())
            .arg(&root);
        let daemon = serve_by(&mut command, port);
        let config = S3Config {
            endpoint: format!("127.0.0.1:{port}"),
            scheme: Scheme::Http,
            region: "us-east-1".into(),
            bucket: "images".into(),
            prefix: "nydus/".into(),
            access_key_id: Some("KEY".into()),
            access_key_secret: Some("SECRET".into()),
            http: HttpConfig {
                timeout: Duration::from_secs(20),
                ..HttpConfig::default()
            },
        };
        Site {
            config: SourceConfig::S3(config),
            _server: Box::new(daemon),
        }
    });
}
