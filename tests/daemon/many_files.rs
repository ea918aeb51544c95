//! A guest that knows many files costs the daemon few descriptors and little memory, and nothing once it forgets them.

use std::fs::{self, File};
use std::path::Path;

use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::{Guest, Options, ops};

use super::peers;

/// Files of a directory.
const EACH: usize = 1000;
/// What the daemons may open.
const DESCRIPTORS: usize = 1024;

fn make_files(share: &Path, count: usize) {
    for number in 0..count {
        let directory = share.join(format!("d{}", number / EACH));
        if number % EACH == 0 {
            fs::create_dir(&directory).unwrap();
        }
        File::create(directory.join(format!("f{number}"))).unwrap();
    }
}

/// Looks every file up once; the node ids.
fn look_up(daemon: &Daemon, guest: &Guest, root: u64, count: usize) -> Vec<u64> {
    let mut nodes = Vec::with_capacity(count + count / EACH + 1);
    for first in (0..count).step_by(EACH) {
        let directory = guest.lookup(root, format!("d{}", first / EACH)).unwrap().nodeid;
        nodes.push(directory);
        let numbers: Vec<usize> = (first..count.min(first + EACH)).collect();
        for part in numbers.chunks(32) {
            let requests: Vec<_> = part
                .iter()
                .map(|n| ops::lookup(directory, format!("f{n}")))
                .collect();
            for ticket in guest.submit_all(1, &requests).unwrap() {
                nodes.push(
                    ops::read_entry(&guest.wait(ticket).unwrap().ok().unwrap())
                        .unwrap()
                        .nodeid,
                );
            }
        }
        assert!(daemon.descriptors().unwrap() < DESCRIPTORS);
    }
    nodes
}

fn forget(guest: &Guest, nodes: &[u64]) {
    for part in nodes.chunks(400) {
        let part: Vec<(u64, u64)> = part.iter().map(|node| (*node, 1)).collect();
        guest.batch_forget(&part).unwrap();
    }
    guest.wait_idle(0).unwrap();
    guest.wait_idle(1).unwrap();
}

/// Resident memory that belongs to the process, in bytes.
fn resident(daemon: &Daemon) -> usize {
    daemon.memory_kib("RssAnon").unwrap() as usize * 1024
}

struct Cost {
    /// Bytes of resident memory for each file that the guest knows.
    bytes: f64,
    descriptors: usize,
}

/// Looks all up, forgets all, twice; what it took.
fn walk_twice(daemon: &Daemon, guest: &Guest, root: u64, count: usize) -> Cost {
    let before = (resident(daemon), daemon.descriptors().unwrap());
    let nodes = look_up(daemon, guest, root, count);
    let known = (resident(daemon), daemon.descriptors().unwrap());
    forget(guest, &nodes);
    let again = look_up(daemon, guest, root, count);
    let known_again = resident(daemon);
    forget(guest, &again);
    // Memory that was given back is used again: what is known twice costs no more than what is known once.
    let grown = known_again.saturating_sub(known.0);
    assert!(grown < 4 << 20, "{grown} bytes more the second time");
    let left = daemon.descriptors().unwrap();
    assert!(
        left <= before.1 + 4,
        "{left} descriptors after FORGET, {} before",
        before.1
    );
    Cost {
        bytes: (known.0 - before.0) as f64 / count as f64,
        descriptors: known.1 - before.1,
    }
}

/// `rafsd` or a peer, with few descriptors to open.
fn limited(program: &Path) -> Builder {
    Builder::new("/usr/bin/prlimit")
        .unwrap()
        .arg(format!("--nofile={DESCRIPTORS}"))
        .arg(program.to_str().unwrap())
}

fn costs_little(count: usize) {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    make_files(&share, count);
    let shared = share.to_str().unwrap();

    let builder = limited(Path::new(env!("CARGO_BIN_EXE_rafsd")));
    let socket = builder.directory().join("vu.sock").to_str().unwrap().to_owned();
    let daemon = builder
        .arg("--sock")
        .arg(&socket)
        .arg("--shared-dir")
        .arg(shared)
        .spawn_plain("vu.sock")
        .unwrap();
    let guest = daemon.guest(Options::default()).unwrap();
    let ours = walk_twice(&daemon, &guest, 1, count);
    println!(
        "rafsd: {count} files, {:.0} bytes of resident memory each, {} descriptors",
        ours.bytes, ours.descriptors
    );
    // Half of what the process may open belongs to guests.
    assert!(
        ours.descriptors <= DESCRIPTORS / 2 + 16,
        "{} descriptors",
        ours.descriptors
    );
    assert!(ours.bytes < 400.0, "{} bytes each", ours.bytes);
    drop((guest, daemon));

    let Some(virtiofsd) = peers::virtiofsd("costs_little") else {
        return;
    };
    let builder = limited(&virtiofsd);
    let socket = builder.directory().join("vu.sock").to_str().unwrap().to_owned();
    let daemon = builder
        .arg("--socket-path")
        .arg(&socket)
        .arg("--shared-dir")
        .arg(shared)
        .arg("--sandbox=none")
        .arg("--seccomp=none")
        .arg("--inode-file-handles=prefer")
        .arg("--rlimit-nofile=0")
        .spawn_plain("vu.sock")
        .unwrap();
    let guest = daemon.guest(Options::default()).unwrap();
    let before = resident(&daemon);
    let nodes = look_up(&daemon, &guest, 1, count);
    let theirs = (resident(&daemon) - before) as f64 / nodes.len() as f64;
    println!("virtiofsd: {count} files, {theirs:.0} bytes of resident memory each");
    assert!(
        ours.bytes <= theirs * 1.05,
        "{:.0} bytes, virtiofsd {theirs:.0}",
        ours.bytes
    );
}

#[test]
fn twenty_thousand_files_cost_few_descriptors_and_little_memory() {
    costs_little(20_000);
}

#[test]
#[ignore = "makes a million files: make test-many"]
fn a_million_files_cost_few_descriptors_and_little_memory() {
    costs_little(1_000_000);
}
