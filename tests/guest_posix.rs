//! Test suites of others for file systems, in a real guest: on our device, on virtiofsd's, and on the host's own.
//!
//! `make test-posix` installs the programs and runs this.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::kernel::Kernel;
use rafsd_guest::share::{program, virtiofsd};
use rafsd_guest::{Boot, Cache, Share};

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const LIMIT: Duration = Duration::from_secs(900);

/// Cases of pjdfstest that pass on the host's file system and not in a guest, with the reason in docs/passthrough.md.
const KNOWN: [&str; 1] = ["link::link_count_max"];

const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.05
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// The users that the configuration names: a guest's RAM disk has none.
const USERS: &str = "
mkdir -p /etc
echo 'root:x:0:0:root:/:/bin/sh' >/etc/passwd
echo 'daemon:x:1:1:daemon:/:/bin/sh' >>/etc/passwd
echo 'nobody:x:65534:65534:nobody:/:/bin/sh' >>/etc/passwd
echo 'root:x:0:' >/etc/group
echo 'daemon:x:1:' >>/etc/group
echo 'nogroup:x:65534:' >>/etc/group
";

/// Outcomes by name of the case.
fn outcomes(text: &str) -> BTreeMap<String, String> {
    let of = |line: &str| {
        let (name, outcome) = line.split_once(char::is_whitespace)?;
        let outcome = outcome.split_whitespace().next()?.to_ascii_lowercase();
        (name.contains("::")).then(|| (name.to_owned(), outcome))
    };
    text.lines().filter_map(of).collect()
}

fn summary(text: &str) -> &str {
    text.lines()
        .find(|line| line.starts_with("Summary:"))
        .unwrap_or_else(|| panic!("no summary: {text}"))
}

fn passes(outcome: Option<&String>) -> bool {
    outcome.is_some_and(|outcome| outcome == "ok")
}

#[test]
#[ignore = "needs pjdfstest: make test-posix"]
fn what_passes_on_the_host_passes_in_a_guest() {
    let cache = Cache::open().unwrap();
    passes_what_the_host_passes(&cache, Kernel::of_this_release(&cache).unwrap());
}

#[test]
#[ignore = "needs pjdfstest: make test-posix"]
fn what_passes_on_the_host_passes_in_a_guest_with_a_newer_kernel() {
    let cache = Cache::open().unwrap();
    passes_what_the_host_passes(&cache, Kernel::of_backports(&cache).unwrap());
}

fn passes_what_the_host_passes(cache: &Cache, kernel: Kernel) {
    println!("guest: {}", kernel.release());
    let boot = Boot::with_kernel(cache, kernel).unwrap();
    let directory = scratch(cache).unwrap();
    let program = program("pjdfstest").unwrap();
    let on_host = directory.path().join("host");
    fs::create_dir(&on_host).unwrap();
    let configuration = directory.path().join("pjdfstest.toml");
    fs::write(&configuration, CONFIGURATION).unwrap();
    let output = Command::new(&program)
        .arg("-c")
        .arg(&configuration)
        .arg("-p")
        .arg(&on_host)
        .output()
        .unwrap();
    let host = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("host: {}", summary(&host));

    let run = |mut share: Share, directory: &Path| {
        fs::create_dir(directory.join("work")).unwrap();
        fs::copy(&program, directory.join("pjdfstest")).unwrap();
        fs::write(directory.join("pjdfstest.toml"), CONFIGURATION).unwrap();
        let guest = share.guest();
        guest.check(USERS).unwrap();
        let script = format!("cd {SHARED}; ./pjdfstest -c pjdfstest.toml -p work");
        let text = guest.run_within(LIMIT, &script).unwrap().text;
        let complaints = guest.complaints();
        assert!(complaints.is_empty(), "{complaints:#?}");
        text
    };
    let share = directory.path().join("ours");
    fs::create_dir(&share).unwrap();
    let ours = run(
        Share::by_rafsd(Path::new(RAFSD), &[], &share, &boot).unwrap(),
        &share,
    );
    println!("rafsd: {}", summary(&ours));
    let theirs = virtiofsd().map(|program| {
        let share = directory.path().join("theirs");
        fs::create_dir(&share).unwrap();
        run(Share::by_virtiofsd(&program, &share, &boot).unwrap(), &share)
    });
    match &theirs {
        Some(theirs) => println!("virtiofsd: {}", summary(theirs)),
        None => println!("SKIPPED: pjdfstest on virtiofsd: there is none (make peers)"),
    }

    let (host, ours) = (outcomes(&host), outcomes(&ours));
    let theirs = theirs.map(|text| outcomes(&text));
    assert!(host.len() > 300, "{} cases", host.len());
    let mut unexpected = Vec::new();
    for (name, outcome) in host.iter().filter(|(_, outcome)| *outcome == "ok") {
        if passes(ours.get(name)) {
            continue;
        }
        let theirs = theirs.as_ref().map(|theirs| theirs.get(name));
        println!(
            "{name}: host {outcome}, rafsd {:?}, virtiofsd {theirs:?}",
            ours.get(name)
        );
        if !KNOWN.contains(&name.as_str()) {
            unexpected.push(name);
        }
    }
    assert!(unexpected.is_empty(), "{unexpected:#?}");
}
