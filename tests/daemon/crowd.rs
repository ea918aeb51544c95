//! Many clients of the API at once, some of which are killed in the middle: the daemon's state is what the survivors were told.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde_json::json;

use super::process::{Daemon, ask};

const CLIENTS: u64 = 64;

/// A small generator of numbers, good enough to choose what to do next.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

fn descriptors(daemon: &Daemon) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id()))
        .unwrap()
        .count()
}

/// Each client owns some mountpoints; all look at everything.
fn client(
    socket: &Path,
    share: &Path,
    number: u64,
    until: Instant,
    killed: &AtomicU64,
) -> BTreeMap<String, bool> {
    let mut dice = Dice(number * 7919 + 1);
    let mut mine: BTreeMap<String, bool> = (0..4)
        .map(|slot| (format!("/c{number}/m{slot}"), false))
        .collect();
    let body = json!({"fs_type": "passthrough_fs", "source": share, "config": ""}).to_string();
    while Instant::now() < until {
        let mountpoint = format!("/c{number}/m{}", dice.roll(4));
        let mounted = mine[&mountpoint];
        let target = format!("/api/v1/mount?mountpoint={mountpoint}");
        match dice.roll(8) {
            0..3 => {
                let status = ask(socket, "POST", &target, &body).unwrap().status;
                assert_eq!(status, if mounted { 500 } else { 204 }, "mount {mountpoint}");
                mine.insert(mountpoint, true);
            }
            3..6 => {
                let status = ask(socket, "DELETE", &target, "").unwrap().status;
                assert_eq!(status, if mounted { 204 } else { 500 }, "umount {mountpoint}");
                mine.insert(mountpoint, false);
            }
            6 => {
                let what = [
                    "/api/v1/daemon",
                    "/api/rafsd/v1/mounts",
                    "/api/rafsd/v1/requests",
                    "/metrics",
                ];
                let answer = ask(socket, "GET", what[dice.roll(4) as usize], "").unwrap();
                assert_eq!(answer.status, 200);
            }
            // Killed in the middle of a request whose outcome nobody learns: one that changes nothing, or half a mount.
            _ => {
                let Ok(mut stream) = UnixStream::connect(socket) else {
                    continue;
                };
                let half = format!(
                    "POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{{\"fs_",
                    body.len()
                );
                let whole = "GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n".to_owned();
                let text = if dice.roll(2) == 0 { half } else { whole };
                let _ = stream.write_all(text.as_bytes());
                killed.fetch_add(1, Relaxed);
            }
        }
    }
    mine
}

fn crowd(duration: Duration) {
    let daemon = Daemon::start(&["--log-level", "error"]);
    let share = tempfile::tempdir().unwrap();
    let socket = daemon.path("api.sock");
    // One mount and back, so that what is made once is there.
    daemon.mount_directory("/first", share.path()).nothing();
    daemon
        .ask("DELETE", "/api/v1/mount?mountpoint=/first", "")
        .nothing();
    let before = descriptors(&daemon);
    let killed = AtomicU64::new(0);
    let until = Instant::now() + duration;
    let expected: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (socket, share, killed) = (&socket, share.path(), &killed);
                scope.spawn(move || client(socket, share, number, until, killed))
            })
            .collect();
        let models = clients.into_iter().flat_map(|client| client.join().unwrap());
        let mut all: Vec<String> = models
            .filter_map(|(path, mounted)| mounted.then_some(path))
            .collect();
        all.sort();
        all
    });
    assert!(killed.load(Relaxed) > CLIENTS / 2);
    assert_eq!(daemon.mountpoints(), expected);
    println!(
        "{} mounts stand, {} clients were killed",
        expected.len(),
        killed.load(Relaxed)
    );
    for path in expected {
        daemon
            .ask("DELETE", &format!("/api/v1/mount?mountpoint={path}"), "")
            .nothing();
    }
    assert!(daemon.mountpoints().is_empty());
    let deadline = Instant::now() + Duration::from_secs(20);
    while descriptors(&daemon) > before {
        assert!(
            Instant::now() < deadline,
            "{} descriptors, {before} before",
            descriptors(&daemon)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    daemon.terminate();
}

#[test]
fn sixty_four_clients_and_the_state_is_what_they_were_told() {
    crowd(Duration::from_secs(8));
}

/// `cargo test --test daemon crowd -- --ignored`
#[test]
#[ignore = "takes five minutes"]
fn sixty_four_clients_for_five_minutes() {
    crowd(Duration::from_secs(300));
}
