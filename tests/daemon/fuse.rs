//! FUSE mode: the same mounts, seen by this host.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Instant;

use rafsd_frontend::registry::{REPOSITORY, Registry};
use serde_json::json;

use super::images::Image;
use super::process::{LONG, ask, rafsd, wait};

/// Whether this process may mount; some containers may not.
pub fn can_mount(test: &str) -> bool {
    let root = std::fs::read_to_string("/proc/self/status")
        .unwrap()
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:\t").map(str::to_owned))
        .and_then(|caps| u64::from_str_radix(&caps, 16).ok())
        // CAP_SYS_ADMIN
        .is_some_and(|caps| caps & (1 << 21) != 0);
    let able = root && Path::new("/dev/fuse").exists();
    if !able {
        eprintln!("SKIPPED {test}: mounting /dev/fuse needs root");
    }
    able
}

struct Mounted {
    dir: tempfile::TempDir,
    child: Child,
}

impl Mounted {
    fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let mut child = rafsd()
            .args(arguments)
            .arg("--mountpoint")
            .arg(dir.path().join("mnt"))
            .arg("--apisock")
            .arg(dir.path().join("api.sock"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + LONG;
        while ask(&dir.path().join("api.sock"), "GET", "/api/v1/daemon", "")
            .is_none_or(|answer| !answer.body.contains("RUNNING"))
        {
            assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        Self { dir, child }
    }

    fn api(&self, method: &str, target: &str, body: &str) -> super::process::Answer {
        ask(&self.dir.path().join("api.sock"), method, target, body).unwrap()
    }

    fn ends(mut self) {
        let pid = self.child.id().to_string();
        assert!(
            std::process::Command::new("kill")
                .arg(pid)
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(wait(&mut self.child).code(), Some(0));
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(
            !mounts.contains(self.dir.path().to_str().unwrap()),
            "still mounted"
        );
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn images_and_directories_are_served_over_dev_fuse() {
    if !can_mount("images_and_directories_are_served_over_dev_fuse") {
        return;
    }
    let (image, share) = (Image::build(), tempfile::tempdir().unwrap());
    let registry = Registry::start(&image.blobs()).unwrap();
    let daemon = Mounted::start(&["fuse", "--thread-num", "2"]);
    let root = daemon.dir.path().join("mnt");
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
    let config = json!({"version": 2, "id": "r",
        "backend": {"type": "registry", "registry": {"scheme": "http", "host": registry.address.to_string(), "repo": REPOSITORY}},
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache()}}, "rafs": {"batch_size": 0}});
    for (at, body) in [
        (
            "/image",
            json!({"fs_type": "rafs", "source": image.bootstrap(), "config": config.to_string()}),
        ),
        (
            "/share",
            json!({"fs_type": "passthrough_fs", "source": share.path(), "config": ""}),
        ),
    ] {
        daemon
            .api(
                "POST",
                &format!("/api/v1/mount?mountpoint={at}"),
                &body.to_string(),
            )
            .nothing();
    }
    let tool = [vec![7u8; 1 << 20], vec![8; 1 << 20], vec![9; 1 << 20]].concat();
    assert!(std::fs::read(root.join("image/usr/bin/tool")).unwrap() == tool);
    let denied = std::fs::write(root.join("image/hello"), "x").unwrap_err();
    assert_eq!(denied.raw_os_error(), Some(30), "EROFS: {denied}");

    // The directory: what is written here is there, and the other way round.
    let data = b"0123456789abcdef".repeat(200_000);
    std::fs::write(root.join("share/file"), &data).unwrap();
    assert!(std::fs::read(share.path().join("file")).unwrap() == data);
    std::fs::create_dir(share.path().join("dir")).unwrap();
    std::fs::rename(root.join("share/file"), root.join("share/dir/renamed")).unwrap();
    assert!(std::fs::read(root.join("share/dir/renamed")).unwrap() == data);

    // Several at a time.
    std::thread::scope(|scope| {
        for number in 0..8 {
            let root = &root;
            scope.spawn(move || {
                let path = root.join(format!("share/f{number}"));
                for round in 0..20 {
                    std::fs::write(&path, format!("{number} {round}")).unwrap();
                    assert_eq!(
                        std::fs::read_to_string(&path).unwrap(),
                        format!("{number} {round}")
                    );
                }
                std::fs::remove_file(path).unwrap();
            });
        }
    });
    // All of it in the sandbox, but for the mount table, which is the host's.
    let pid = daemon.child.id();
    let mut names = std::collections::BTreeSet::new();
    for (name, fields) in super::sandbox::threads(pid) {
        assert_eq!(fields["Seccomp"], "2", "{name}");
        assert_eq!(fields["NoNewPrivs"], "1", "{name}");
        // CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
        if name.starts_with("fuse-") {
            assert_eq!(
                u64::from_str_radix(&fields["CapPrm"], 16).unwrap(),
                0b110,
                "{name}"
            );
        }
        names.insert(name);
    }
    for name in [
        "fuse-requests",
        "fuse-replies",
        "unmount",
        "queue-1",
        "worker-starter",
    ] {
        assert!(names.contains(name), "{name}: {names:?}");
    }
    let of = |pid: &str, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    assert_eq!(of(&pid.to_string(), "mnt"), of("self", "mnt"));
    assert_ne!(of(&pid.to_string(), "ipc"), of("self", "ipc"));
    daemon
        .api("DELETE", "/api/v1/mount?mountpoint=/image", "")
        .nothing();
    assert!(!root.join("image").exists());
    let metrics = daemon.api("GET", "/metrics", "").body;
    assert!(metrics.contains("rafsd_bugs_total 0"), "{metrics}");
    daemon.ends();
}

#[test]
fn l8_no_subcommand_and_a_stalled_source_stalls_nobody_else() {
    if !can_mount("l8_no_subcommand_and_a_stalled_source_stalls_nobody_else") {
        return;
    }
    let (image, share) = (Image::build(), tempfile::tempdir().unwrap());
    std::fs::write(share.path().join("file"), "data").unwrap();
    let registry = Registry::start(&image.blobs()).unwrap();
    registry.set(|fault| fault.stalled = true);
    let config = tempfile::NamedTempFile::new().unwrap();
    let text = json!({"version": 2, "id": "r",
        "backend": {"type": "registry", "registry": {"scheme": "http", "host": registry.address.to_string(), "repo": REPOSITORY}},
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache()}}, "rafs": {"batch_size": 0}});
    std::fs::write(config.path(), text.to_string()).unwrap();
    let bootstrap = image.bootstrap();
    let daemon = Mounted::start(&[
        "--log-level",
        "error",
        "--thread-num",
        "1",
        "--config",
        config.path().to_str().unwrap(),
        "--bootstrap",
        bootstrap.to_str().unwrap(),
        "--virtual-mountpoint",
        "/image",
    ]);
    let body = json!({"fs_type": "passthrough_fs", "source": share.path(), "config": ""});
    daemon
        .api("POST", "/api/v1/mount?mountpoint=/share", &body.to_string())
        .nothing();
    let root = daemon.dir.path().join("mnt");
    let stalled = root.join("image/usr/bin/tool");
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let path = stalled.clone();
            std::thread::spawn(move || std::fs::read(path).map(|bytes| bytes.len()))
        })
        .collect();
    let deadline = Instant::now() + LONG;
    while daemon.api("GET", "/api/rafsd/v1/requests", "").body == "[]" {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(std::fs::read_to_string(root.join("share/file")).unwrap(), "data");
    assert!(readers.iter().all(|reader| !reader.is_finished()));
    registry.set(|fault| fault.stalled = false);
    for reader in readers {
        assert_eq!(reader.join().unwrap().unwrap(), 3 << 20);
    }
    daemon.ends();
}
