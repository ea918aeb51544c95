//! Every option, and what it does.

use rafsd_frontend::{Guest, Options};

use super::command_lines::Started;
use crate::fuse::can_mount;
use crate::images::Image;
use crate::process::{Daemon, rafsd};

const KATA: &str = "virtiofs --apisock @/a --sock @/v";

/// Runs to the end: exit code and what was said.
fn ends(arguments: &[&str]) -> (Option<i32>, String) {
    let output = rafsd().args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

/// An option that is refused with the others of the line, by name.
fn refused(arguments: &[&str], what: &str) {
    let (code, said) = ends(&[&["virtiofs", "--sock", "/no/such/directory/v"], arguments].concat());
    assert_eq!(code, Some(2), "{arguments:?}: {said}");
    assert!(said.contains(what), "{arguments:?}: {said}");
}

#[test]
fn apisock() {
    let started = Started::by("virtiofs -A @/a --sock @/v");
    started.exit();
    // Without it there is no server, and the device serves all the same.
    let dir = tempfile::tempdir().unwrap();
    let share = tempfile::tempdir().unwrap();
    std::fs::write(share.path().join("file"), "data").unwrap();
    let mut child = rafsd()
        .args(["virtiofs", "--log-level", "error", "--sock"])
        .arg(dir.path().join("v"))
        .arg("--shared-dir")
        .arg(share.path())
        .spawn()
        .unwrap();
    let deadline = std::time::Instant::now() + crate::process::LONG;
    while !dir.path().join("v").exists() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let guest = Guest::boot(dir.path().join("v"), Options::default()).unwrap();
    assert_eq!(guest.read_file("/file").unwrap(), b"data");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn config() {
    let image = Image::build();
    let config = image.blobs().join("../config.json");
    std::fs::write(&config, image.config()).unwrap();
    let daemon = Daemon::start_with(|command| {
        command.arg("-B").arg(image.bootstrap()).arg("-C").arg(&config);
    });
    let info = daemon.ask("GET", "/api/v1/daemon", "").json();
    assert_eq!(info["backend_collection"]["/"]["config"]["id"], "/17");
}

#[test]
fn id_and_supervisor() {
    let started = Started::by(&format!("{KATA} --id i1 --supervisor /run/s"));
    let info = started.get("/api/v1/daemon");
    assert_eq!(
        (info["id"].as_str(), info["supervisor"].as_str()),
        (Some("i1"), Some("/run/s"))
    );
    started.exit();
    refused(&["--id", "x"], "--supervisor");
    refused(&["--supervisor", "/s"], "--id");
}

#[test]
fn upgrade() {
    let started = Started::by(&format!("{KATA} --upgrade"));
    assert_eq!(started.get("/api/v1/daemon")["state"], "RUNNING");
    // The incumbent ignores it and says nothing.
    started.says("accepted without effect: --upgrade");
    started.exit();
}

#[test]
fn log_level() {
    for level in ["trace", "debug", "info", "warn", "error"] {
        let started = Started::by(&format!("{KATA} -l {level}"));
        assert_eq!(started.get("/api/rafsd/v1/daemon")["log_level"], level);
    }
    refused(
        &["--log-level", "loud"],
        "[possible values: trace, debug, info, warn, error]",
    );
}

#[test]
fn log_file() {
    let started = Started::by(&format!("{KATA} -L daemon"));
    let (log, stderr) = (started.path("daemon.log"), started.path("log"));
    let read = || std::fs::read_to_string(&log).unwrap();
    crate::counters::eventually("written", || read().contains("Waiting for vhost-user"));
    let text = read();
    assert!(!text.contains('\u{1b}'), "no colours");
    assert_eq!(std::fs::read_to_string(stderr).unwrap(), "");
    // A second daemon appends.
    let dir = std::mem::replace(&mut { started }.dir, tempfile::tempdir().unwrap());
    let started = Started::in_directory(dir, "virtiofs --apisock @/a --sock @/v2 -L daemon.log", &[]);
    let read = || std::fs::read_to_string(started.path("daemon.log")).unwrap();
    crate::counters::eventually("appended", || read().len() > text.len());
    assert!(read().starts_with(&text));
}

#[test]
fn log_rotation_size() {
    let started = Started::by(&format!("{KATA} -L daemon -l trace --log-rotation-size 1"));
    let long = format!("/{}", "x".repeat(15_000));
    let rotated = || {
        let names = std::fs::read_dir(started.dir.path()).unwrap();
        names
            .filter(|entry| {
                let name = entry.as_ref().unwrap().file_name();
                name.to_str().unwrap().starts_with("daemon.2")
            })
            .count()
    };
    for _ in 0..200 {
        crate::process::ask(&started.path("a"), "GET", &long, "").unwrap();
        if rotated() > 0 {
            return;
        }
    }
    panic!("3 MB of log and no new file");
}

#[test]
fn rlimit_nofile() {
    let limit = |started: &Started| {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", started.child.id())).unwrap();
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max open files"))
            .unwrap();
        line.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap()
    };
    let ours = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let started = Started::by(&format!("{KATA} --rlimit-nofile 0"));
    assert_eq!(Some(limit(&started)), ours, "left alone");
    started.exit();
    // More than may be had is no reason to fail, as it is for the incumbent.
    let started = Started::by(&format!("{KATA} --rlimit-nofile 1000000"));
    assert!(Some(limit(&started)) >= ours);
    started.exit();
}

#[test]
fn help_and_version() {
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["virtiofs", "--help"],
        &["fuse", "--help"],
    ] {
        let (code, said) = ends(arguments);
        assert_eq!(code, Some(0), "{arguments:?}");
        assert!(said.contains("--apisock"));
    }
    for arguments in [&["--version"], &["-V"]] {
        assert_eq!(ends(arguments).0, Some(0));
    }
    // The form that management layers read, as the vhost-user specification has it for back-end programs.
    let (code, said) = ends(&["--print-capabilities"]);
    assert_eq!(code, Some(0));
    let capabilities: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(capabilities, serde_json::json!({"type": "fs"}));
}

#[test]
fn sock() {
    let (code, said) = ends(&["virtiofs", "--apisock", "/no/such/directory/a"]);
    assert_eq!(code, Some(2));
    assert!(said.contains("--sock PATH is required"), "{said}");
    refused(&["--fd", "3"], "--fd");
}

#[test]
fn hybrid_mode() {
    // With it or without it images and directories stand side by side.
    for extra in ["", "--hybrid-mode"] {
        let image = Image::build();
        let started = Started::by(&format!("{KATA} {extra}"));
        for (at, kind, source, config) in [
            (
                "/c",
                "passthrough_fs",
                started.dir.path().to_owned(),
                String::new(),
            ),
            ("/m", "rafs", image.bootstrap(), image.config()),
        ] {
            let body = serde_json::json!({"fs_type": kind, "source": source, "config": config});
            let target = format!("/api/v1/mount?mountpoint={at}");
            crate::process::ask(&started.path("a"), "POST", &target, &body.to_string())
                .unwrap()
                .nothing();
        }
    }
}

#[test]
fn bootstrap_and_localfs_dir() {
    let image = Image::build();
    let (bootstrap, blobs) = (image.bootstrap(), image.blobs());
    let (bootstrap, blobs) = (bootstrap.to_str().unwrap(), blobs.to_str().unwrap());
    let daemon = Daemon::start(&["--bootstrap", bootstrap, "--localfs-dir", blobs]);
    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    assert_eq!(guest.read_file("/hello").unwrap(), b"hello");
    drop(guest);
    daemon.terminate();
    refused(
        &["-B", bootstrap, "-s", "/tmp"],
        "--bootstrap cannot be used with --shared-dir",
    );
    refused(
        &["-B", bootstrap, "-D", "/tmp", "-C", "/c"],
        "--localfs-dir cannot be used with --config",
    );
}

#[test]
fn shared_dir() {
    let share = tempfile::tempdir().unwrap();
    std::fs::write(share.path().join("file"), "data").unwrap();
    let daemon = Daemon::start(&["-s", share.path().to_str().unwrap()]);
    assert_eq!(daemon.mountpoints(), ["/"]);
    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    assert_eq!(guest.read_file("/file").unwrap(), b"data");
}

#[test]
fn virtual_mountpoint() {
    let share = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&["--shared-dir", share.path().to_str().unwrap(), "-m", "/host"]);
    assert_eq!(daemon.mountpoints(), ["/host"]);
}

#[test]
fn prefetch_files() {
    let image = Image::build();
    let at = |name: &str| image.blobs().join("..").join(name);
    let list = at("list");
    let text = image.config().replace(
        "\"mode\"",
        "\"fs_prefetch\":{\"enable\":true,\"prefetch_all\":false},\"mode\"",
    );
    std::fs::write(at("config.json"), text).unwrap();
    let start = |list: &str| {
        std::fs::write(at("list"), list).unwrap();
        let mut command = rafsd();
        command
            .arg("-B")
            .arg(image.bootstrap())
            .arg("-C")
            .arg(at("config.json"));
        command
    };
    drop(start("\n  /hello  \n\n/no/such\n"));
    let daemon = Daemon::start_with(|command| {
        command
            .arg("-B")
            .arg(image.bootstrap())
            .arg("-C")
            .arg(at("config.json"));
        command.arg("--prefetch-files").arg(&list);
    });
    crate::counters::eventually("the listed file is local", || {
        let cache = daemon.ask("GET", "/api/v1/metrics/blobcache", "").json();
        cache["entries_count"] == 1
    });
    daemon.terminate();
    let dir = tempfile::tempdir().unwrap();
    let output = start("hello\n")
        .arg("--sock")
        .arg(dir.path().join("v"))
        .arg("--prefetch-files")
        .arg(&list)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("invalid prefetch file list"));
    assert!(!dir.path().join("v").exists());
    refused(&["--prefetch-files", "/list"], "--bootstrap");
}

#[test]
fn dedup_db() {
    let started = Started::by(&format!("{KATA} --dedup-db @/db"));
    started.says("accepted without effect: --dedup-db");
    assert!(!started.path("db").exists());
}

#[test]
fn options_of_fuse() {
    if !can_mount("options_of_fuse") {
        return;
    }
    for policy in ["none", "resend", "flush"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let line =
            format!("fuse -M @/mnt --apisock @/a --failover-policy {policy} --fuse-threads 1 --writable");
        Started::in_directory(dir, &line, &[]).exit();
    }
    for (arguments, what) in [
        (&["fuse"][..], "--mountpoint DIR is required"),
        (
            &["fuse", "-M", "/m", "--failover-policy", "x"],
            "none, resend, flush",
        ),
        (&["fuse", "-M", "/m", "--fuse-threads", "0"], "1..=1024"),
        (&["fuse", "-M", "/m", "--thread-num", "1025"], "1..=1024"),
    ] {
        let (code, said) = ends(arguments);
        assert_eq!(code, Some(2), "{arguments:?}");
        assert!(said.contains(what), "{arguments:?}: {said}");
    }
}

/// What launchers can emit and the incumbent does not know.
#[test]
fn options_accepted_without_effect() {
    let started = Started::by(&format!(
        "{KATA} --backend-source http://x --thread-pool-size 4 --threads=2 --syslog -o x"
    ));
    started.says("accepted without effect: --thread-pool-size, --syslog, --backend-source, -o x");
    started.exit();
}

#[test]
fn options_of_virtiofsd() {
    Started::by(&format!(
        "{KATA} --cache=auto --sandbox chroot --xattr --seccomp kill -o writeback,xattr --announce-submounts --request-queues 1"
    ))
    .exit();
}

#[test]
fn the_last_of_a_repeated_option_wins() {
    let started =
        Started::by("virtiofs --sock /no/such/directory/v -l trace --apisock @/a -l warn --sock @/v");
    assert_eq!(started.get("/api/rafsd/v1/daemon")["log_level"], "warn");
    started.exit();
}
