//! Settings that change while an image is served.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::mpsc::channel;

use rafsd_frontend::registry::{REPOSITORY, Registry};
use rafsd_frontend::{Guest, Options};
use serde_json::json;

use super::counters::{eventually, mount};
use super::images::Image;
use super::process::{Daemon, LONG};

const CONFIG: &str = "/api/v1/config?id=/m";

#[test]
fn a_source_that_takes_no_credentials_accepts_them_without_effect() {
    let image = Image::build();
    let daemon = Daemon::start(&[]);
    let config = json!({"version": 2, "backend": {"type": "localfs", "localfs": {"dir": image.blobs()}},
        "cache": {"type": "blobcache", "filecache": {"work_dir": image.cache()}}, "rafs": {}});
    mount(&daemon, "/m", &image, &config).nothing();
    daemon.ask("PUT", CONFIG, r#"{"registry_auth":"YTpi"}"#).nothing();
    assert_eq!(
        daemon.ask("GET", CONFIG, "").json(),
        json!({"registry_auth": "***"})
    );
    // What makes no sense is the client's mistake, not a failure.
    let message = daemon
        .ask("PUT", CONFIG, r#"{"proxy_url":"http://127.0.0.1:1"}"#)
        .error(400);
    assert!(
        message.contains("proxy_url") && message.contains("local"),
        "{message}"
    );
    daemon
        .ask(
            "PUT",
            CONFIG,
            r#"{"dragonfly_scheduler_endpoint":"http://127.0.0.1:1"}"#,
        )
        .error(501);
    daemon.terminate();
}

#[test]
fn another_proxy_is_used_from_the_next_request_on() {
    let image = Image::build();
    let registry = Registry::start(&image.blobs()).unwrap();
    let daemon = Daemon::start(&[]);
    let config = json!({"version": 2,
        "backend": {"type": "registry", "registry": {"scheme": "http", "host": registry.address.to_string(), "repo": REPOSITORY}},
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache()}}, "rafs": {"batch_size": 0}});
    mount(&daemon, "/m", &image, &config).nothing();
    for (body, what) in [
        (r#"{"proxy_url":"proxy:1"}"#, "proxy_url"),
        (r#"{"registry_auth":"no base64!"}"#, "registry_auth"),
    ] {
        let message = daemon.ask("PUT", CONFIG, body).error(400);
        assert!(
            message.contains(what) && !message.contains("base64!"),
            "{message}"
        );
    }

    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = proxy.local_addr().unwrap();
    let (tell, asked) = channel();
    std::thread::spawn(move || {
        for stream in proxy.incoming().map_while(Result::ok) {
            let first = BufReader::new(&stream).lines().next();
            let _ = tell.send(first.and_then(Result::ok).unwrap_or_default());
            let _ = (&stream)
                .write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    let body = json!({"proxy_url": format!("http://user:hunter2@{address}")}).to_string();
    daemon.ask("PUT", CONFIG, &body).nothing();
    assert_eq!(
        daemon.ask("GET", CONFIG, "").json(),
        json!({"proxy_url": format!("http://{address}")})
    );
    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    let reader = std::thread::spawn(move || {
        let read = guest.read_file("/m/hello");
        (guest, read)
    });
    let first = asked.recv_timeout(LONG).unwrap();
    assert!(first.contains(&registry.address.to_string()), "{first}");

    // Without a proxy again the read goes through.
    daemon.ask("PUT", CONFIG, r#"{"proxy_url":""}"#).nothing();
    eventually("read", || reader.is_finished());
    let (guest, read) = reader.join().unwrap();
    assert_eq!(read.unwrap(), b"hello");
    drop(guest);
    daemon.terminate();
}
