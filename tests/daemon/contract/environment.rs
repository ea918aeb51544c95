//! Variables of the environment.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{Receiver, channel};

use rafsd_frontend::{Guest, Options, ops};
use serde_json::json;

use super::command_lines::Started;
use crate::images::Image;
use crate::process::LONG;

/// A registry that wants a user and a password and hands out every request's head, in lower case.
fn registry() -> (SocketAddr, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, heads) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let lines = BufReader::new(&stream).lines().map_while(Result::ok);
            let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            let head = head.join("\n").to_lowercase();
            let answer: &[u8] = match head.contains("authorization:") {
                false => b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"r\"\r\n",
                true => b"HTTP/1.1 404 Not Found\r\n",
            };
            let _ = (&stream).write_all(answer);
            let _ = (&stream).write_all(b"Content-Length: 0\r\nConnection: close\r\n\r\n");
            let _ = tell.send(head);
        }
    });
    (address, heads)
}

/// Heads of what a daemon in `environment` asks for when a guest reads a file of the image mounted at the start.
fn heads(environment: &[(&str, &str)], until: &str) -> Vec<String> {
    let (address, asked) = registry();
    let image = Image::build();
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"version": 2,
        "backend": {"type": "registry", "registry": {"scheme": "http", "host": address.to_string(), "repo": "r", "auth": "b2xkOm9sZA=="}},
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache()}}, "rafs": {}});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let bootstrap = image.bootstrap();
    let line = format!(
        "virtiofs --apisock @/a --sock @/v --bootstrap {} --config @/config.json",
        bootstrap.display()
    );
    let started = Started::in_directory(dir, &line, environment);
    let guest = Guest::boot(started.path("v"), Options::default()).unwrap();
    let hello = guest.resolve("/hello").unwrap().nodeid;
    guest.submit(&ops::read(hello, 0, 0, 5)).unwrap();
    let mut heads = Vec::new();
    while !heads.last().is_some_and(|head: &String| head.contains(until)) {
        heads.push(asked.recv_timeout(LONG).expect("one more request"));
    }
    heads
}

#[test]
fn image_pull_auth() {
    let heads = heads(&[("IMAGE_PULL_AUTH", "bmV3Om5ldw==")], "authorization:");
    let last = heads.last().unwrap();
    assert!(last.contains("authorization: basic bmv3om5ldw=="), "{last}");
}

#[test]
fn nydus_header() {
    let heads = heads(&[("NYDUS_HEADER_X-Tenant", "Blue")], "get ");
    assert!(heads[0].contains("x-tenant: blue"), "{heads:?}");
}

#[test]
fn rust_log() {
    let started = Started::in_directory(
        tempfile::tempdir().unwrap(),
        "virtiofs --apisock @/a --sock @/v --log-level warn",
        &[("RUST_LOG", "trace")],
    );
    assert_eq!(started.get("/api/rafsd/v1/daemon")["log_level"], "warn");
    assert!(!started.log().contains("] TRACE"), "{}", started.log());
}

#[test]
fn proxy_variables() {
    // Nobody listens there. The registry is asked all the same.
    let proxy = "http://127.0.0.1:1";
    heads(
        &[("http_proxy", proxy), ("HTTP_PROXY", proxy), ("ALL_PROXY", proxy)],
        "get ",
    );
}
