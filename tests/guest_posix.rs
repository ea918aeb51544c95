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
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::{Boot, Cache, Daemon, Guest};

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

/// `pjdfstest` and `fsx`, linked statically.
fn programs() -> PathBuf {
    let directory = std::env::var_os("RAFSD_POSIX_PROGRAMS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/posix/bin"),
        PathBuf::from,
    );
    assert!(
        directory.join("pjdfstest").is_file(),
        "no pjdfstest in {}: run make test-posix",
        directory.display()
    );
    directory
}

fn virtiofsd() -> Option<PathBuf> {
    let given = std::env::var_os("VIRTIOFSD").map(PathBuf::from);
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin/virtiofsd");
    given
        .into_iter()
        .chain([built, "/usr/libexec/virtiofsd".into()])
        .find(|program| program.is_file())
}

/// A guest whose device shows one directory of the host, with the programs in it.
struct Shared {
    guest: Guest,
    _rafsd: Option<Daemon>,
    _virtiofsd: Option<Killed>,
}

/// A process that ends with the value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Shared {
    fn with_rafsd(cache: &Cache, share: &Path) -> Self {
        let daemon = Daemon::start(Path::new(RAFSD)).unwrap();
        daemon.mount_passthrough("/", share).unwrap();
        let socket = daemon.socket();
        Self {
            guest: boot(cache, share, &socket),
            _rafsd: Some(daemon),
            _virtiofsd: None,
        }
    }

    fn with_virtiofsd(cache: &Cache, program: &Path, share: &Path) -> Self {
        let socket = share.with_extension("virtiofsd");
        let child = Command::new(program)
            .arg("--socket-path")
            .arg(&socket)
            .arg("--shared-dir")
            .arg(share)
            .args([
                "--sandbox=none",
                "--seccomp=none",
                "--xattr",
                "--announce-submounts",
                "--log-level=off",
            ])
            .spawn()
            .unwrap();
        let child = Killed(child);
        let deadline = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "virtiofsd does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Self {
            guest: boot(cache, share, &socket),
            _rafsd: None,
            _virtiofsd: Some(child),
        }
    }
}

fn boot(cache: &Cache, share: &Path, socket: &Path) -> Guest {
    fs::create_dir_all(share.join("work")).unwrap();
    for name in ["pjdfstest", "fsx"] {
        fs::copy(programs().join(name), share.join(name)).unwrap();
    }
    fs::write(share.join("pjdfstest.toml"), CONFIGURATION).unwrap();
    let mut guest = Boot::new(cache).unwrap().device(socket).start().unwrap();
    guest.mount_device().unwrap();
    guest.check(USERS).unwrap();
    guest
}

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
    let directory = scratch(&cache).unwrap();
    let on_host = directory.path().join("host");
    fs::create_dir(&on_host).unwrap();
    let configuration = directory.path().join("pjdfstest.toml");
    fs::write(&configuration, CONFIGURATION).unwrap();
    let output = Command::new(programs().join("pjdfstest"))
        .arg("-c")
        .arg(&configuration)
        .arg("-p")
        .arg(&on_host)
        .output()
        .unwrap();
    let host = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("host: {}", summary(&host));

    let run = |mut shared: Shared| {
        let script = format!("cd {SHARED}; ./pjdfstest -c pjdfstest.toml -p work");
        shared.guest.run_within(LIMIT, &script).unwrap().text
    };
    let share = directory.path().join("ours");
    fs::create_dir(&share).unwrap();
    let ours = run(Shared::with_rafsd(&cache, &share));
    println!("rafsd: {}", summary(&ours));
    let theirs = virtiofsd().map(|program| {
        let share = directory.path().join("theirs");
        fs::create_dir(&share).unwrap();
        run(Shared::with_virtiofsd(&cache, &program, &share))
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

#[test]
#[ignore = "needs fsx: make test-posix"]
fn a_file_stays_what_was_written_to_it() {
    let operations = std::env::var("RAFSD_FSX_OPERATIONS").unwrap_or_else(|_| "2000".into());
    let cache = Cache::open().unwrap();
    let directory = scratch(&cache).unwrap();
    let share = directory.path().join("ours");
    fs::create_dir(&share).unwrap();
    let mut shared = Shared::with_rafsd(&cache, &share);
    for seed in [1, 2] {
        let script = format!("cd {SHARED}/work; ../fsx -q -S {seed} -N {operations} file-{seed}");
        let done = shared.guest.run_within(LIMIT * 4, &script).unwrap();
        assert_eq!(done.status, 0, "seed {seed}: {}", done.text);
        println!("fsx: {operations} operations, seed {seed}: clean");
    }
    assert_eq!(shared.guest.kernel_messages().matches("WARNING").count(), 0);
}
