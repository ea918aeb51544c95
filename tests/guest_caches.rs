//! What a real guest sees of what the host changes, under each cache policy, side by side in one device.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::{Boot, Cache, Daemon, Guest};
use serde_json::json;

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");

/// More than the longest time-out of `auto` here, on any machine.
const LONG: Duration = Duration::from_secs(120);

fn said(guest: &mut Guest, script: &str) -> String {
    guest.run(&format!("{{ {script}; }} 2>&1")).unwrap().text
}

fn eventually(guest: &mut Guest, script: &str, wanted: &str) {
    let started = Instant::now();
    loop {
        let text = said(guest, script);
        if text == wanted {
            println!("{script}: {:.1} s", started.elapsed().as_secs_f64());
            return;
        }
        assert!(started.elapsed() < LONG, "{script}: {text}, not {wanted}");
    }
}

#[test]
fn a_guest_sees_what_the_host_changes_as_its_mounts_policy_says() {
    let cache = Cache::open().unwrap();
    let directory = scratch(&cache).unwrap();
    let daemon = Daemon::start(Path::new(RAFSD)).unwrap();
    let mounts = [
        ("never", json!({"cache": "never"})),
        ("metadata", json!({"virtio_fs_cache": "metadata"})),
        ("usual", json!({})),
        ("auto", json!({"cache_policy": "auto", "cache_timeout": 4})),
        ("always", json!({"virtio_fs_cache": "always"})),
    ];
    for (name, options) in &mounts {
        let source = directory.path().join(name);
        fs::create_dir(&source).unwrap();
        for (file, content) in [("file", "first\n"), ("goes", ""), ("opened", "first\n")] {
            fs::write(source.join(file), content).unwrap();
        }
        daemon
            .mount_passthrough_with(&format!("/{name}"), &source, options)
            .unwrap();
    }
    let boot = Boot::new(&cache).unwrap().device(&daemon.socket());
    let mut guest = boot.start().unwrap();
    guest.mount_device().unwrap();
    let guest = &mut guest;

    // All of it is known, and one file of each is open, when the host changes it.
    for (name, _) in &mounts {
        let text = said(
            guest,
            &format!("cd {SHARED}/{name}; cat file; stat -c %s file; ls; stat -c %s goes comes"),
        );
        assert_eq!(
            text,
            "first\n6\nfile\ngoes\nopened\n0\nstat: can't stat 'comes': No such file or directory\n"
        );
    }
    for (name, _) in &mounts {
        let source = directory.path().join(name);
        fs::write(source.join("file"), "second, and longer\n").unwrap();
        fs::write(source.join("comes"), "").unwrap();
        fs::remove_file(source.join("goes")).unwrap();
    }

    // A name that was not there is never remembered as such.
    for (name, _) in &mounts {
        assert_eq!(
            said(guest, &format!("cd {SHARED}/{name}; stat -c %s comes")),
            "0\n",
            "{name}"
        );
    }
    let all = |name: &str| format!("cd {SHARED}/{name}; stat -c %s file goes; cat file");
    let new = "19\nstat: can't stat 'goes': No such file or directory\nsecond, and longer\n";
    assert_eq!(said(guest, &all("never")), new);
    eventually(guest, &all("usual"), new);
    eventually(guest, &all("auto"), new);
    // Data is the host's, what is told about it is not.
    assert_eq!(said(guest, &all("metadata")), "6\n0\nsecond, and longer\n");
    assert_eq!(said(guest, &all("always")), "6\n0\nfirst\n");

    // What the guest changes itself it sees at once, and so does the host.
    for (name, _) in &mounts {
        let text = said(
            guest,
            &format!(
                "cd {SHARED}/{name}; echo more >>opened; cat opened; stat -c %s opened; rm opened; stat -c %s opened"
            ),
        );
        assert_eq!(
            text, "first\nmore\n11\nstat: can't stat 'opened': No such file or directory\n",
            "{name}"
        );
        assert!(!directory.path().join(name).join("opened").exists(), "{name}");
    }
    let complaints = guest.complaints();
    assert!(complaints.is_empty(), "{complaints:#?}");
}
