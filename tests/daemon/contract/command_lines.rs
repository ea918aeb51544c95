//! Every command line that a launcher is known to use, as it is written there.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::fuse::can_mount;
use crate::images::Image;
use crate::process::{LONG, ask, rafsd, wait};

/// A daemon started in a directory of its own, whose API socket is `a` there.
pub struct Started {
    pub dir: tempfile::TempDir,
    pub child: Child,
}

impl Started {
    /// Starts `line`, in which `@` stands for the directory, and waits until it is RUNNING.
    pub fn by(line: &str) -> Self {
        Self::in_directory(tempfile::tempdir().unwrap(), line, &[])
    }

    pub fn in_directory(dir: tempfile::TempDir, line: &str, environment: &[(&str, &str)]) -> Self {
        let here = dir.path().to_str().unwrap();
        let child = rafsd()
            .current_dir(dir.path())
            .args(line.split_whitespace().map(|word| word.replace('@', here)))
            .envs(environment.iter().copied())
            .stdout(Stdio::null())
            .stderr(Stdio::from(
                std::fs::File::create(dir.path().join("log")).unwrap(),
            ))
            .spawn()
            .unwrap();
        let mut started = Self { dir, child };
        let deadline = Instant::now() + LONG;
        while ask(&started.path("a"), "GET", "/api/v1/daemon", "")
            .is_none_or(|answer| !answer.body.contains("\"RUNNING\""))
        {
            assert!(
                started.child.try_wait().unwrap().is_none() && Instant::now() < deadline,
                "{line}: {}",
                started.log()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        started
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    /// Waits until the log says so: it is written by a thread of its own.
    pub fn says(&self, what: &str) {
        let deadline = Instant::now() + LONG;
        while !self.log().contains(what) {
            assert!(Instant::now() < deadline, "no {what:?} in {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether the device's socket `v` is there, and a front-end could connect.
    pub fn listens(&self) -> bool {
        std::os::unix::net::UnixStream::connect(self.path("v")).is_ok()
    }

    pub fn get(&self, target: &str) -> serde_json::Value {
        ask(&self.path("a"), "GET", target, "").unwrap().json()
    }

    /// Ends it over its API, and checks the exit code.
    pub fn exit(mut self) {
        ask(&self.path("a"), "PUT", "/api/v1/daemon/exit", "")
            .unwrap()
            .nothing();
        assert_eq!(wait(&mut self.child).code(), Some(0), "{}", self.log());
        assert!(!self.path("v").exists() && !self.path("a").exists());
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts it, connects to the device, and ends it.
fn serves(line: &str) {
    let started = Started::by(line);
    assert!(started.listens(), "{line}");
    started.exit();
}

/// An image in `DIR/image`, with its configuration in `DIR/config.json`.
fn image_in(dir: &Path, image: &Image) -> String {
    std::fs::write(dir.join("config.json"), image.config()).unwrap();
    image.bootstrap().to_str().unwrap().to_owned()
}

#[test]
fn l1_kata_go() {
    serves("virtiofs --log-level info --apisock @/a --sock @/v");
    serves("virtiofs --log-level debug --apisock @/a --sock @/v");
}

#[test]
fn l2_kata_runtime_rs() {
    serves("virtiofs --hybrid-mode --log-level info --apisock @/a --sock @/v");
}

#[test]
fn l3_runtime_rs_rootless() {
    serves("virtiofs --hybrid-mode --log-level info --apisock a --sock v");
}

#[test]
fn l4_snapshotter_dedicated() {
    if !can_mount("l4_snapshotter_dedicated") {
        return;
    }
    let image = Image::build();
    let dir = tempfile::tempdir().unwrap();
    let bootstrap = image_in(dir.path(), &image);
    std::fs::create_dir(dir.path().join("mnt")).unwrap();
    std::fs::write(dir.path().join("files"), "/hello\n").unwrap();
    let started = Started::in_directory(
        dir,
        &format!(
            "fuse --thread-num 2 --id i --config @/config.json --bootstrap {bootstrap} --mountpoint @/mnt --apisock @/a \
             --log-level info --log-rotation-size 100 --supervisor @/s --log-file @/daemon.log --prefetch-files @/files \
             --backend-source http://x --failover-policy resend"
        ),
        &[],
    );
    assert_eq!(std::fs::read(started.path("mnt/hello")).unwrap(), b"hello");
    started.exit();
}

#[test]
fn l5_snapshotter_shared() {
    if !can_mount("l5_snapshotter_shared") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("mnt")).unwrap();
    let line =
        "fuse --thread-num 2 --id i --mountpoint @/mnt --apisock @/a --log-level info --supervisor @/s";
    Started::in_directory(dir, line, &[]).exit();
}

/// fscache is no virtio-fs.
#[test]
fn l6_snapshotter_fscache_is_refused() {
    let output = rafsd().args(["singleton", "--fscache", "/tmp"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("singleton"));
}

#[test]
fn l7_version_probe() {
    let output = rafsd().arg("--version").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    // `Git Commit:\s*(.+)`
    let commit = text.lines().find_map(|line| line.strip_prefix("Git Commit:"));
    assert!(commit.is_some_and(|commit| !commit.trim().is_empty()), "{text}");
}

#[test]
fn l8_smoke_tests() {
    if !can_mount("l8_smoke_tests") {
        return;
    }
    let image = Image::build();
    let dir = tempfile::tempdir().unwrap();
    let bootstrap = image_in(dir.path(), &image);
    std::fs::create_dir(dir.path().join("mnt")).unwrap();
    let started = Started::in_directory(
        dir,
        &format!(
            "--mountpoint @/mnt --apisock @/a --log-level error --thread-num 10 --config @/config.json \
             --bootstrap {bootstrap} --dedup-db @/db --supervisor @/s --id u --writable"
        ),
        &[],
    );
    assert_eq!(std::fs::read(started.path("mnt/hello")).unwrap(), b"hello");
    started.exit();
}

#[test]
fn l9_documentation() {
    serves("--log-level info --sock @/v --apisock @/a");
    let image = Image::build();
    let dir = tempfile::tempdir().unwrap();
    let bootstrap = image_in(dir.path(), &image);
    let line =
        format!("--config @/config.json --sock @/v --bootstrap {bootstrap} --log-level info --apisock @/a");
    let started = Started::in_directory(dir, &line, &[]);
    let info = started.get("/api/v1/daemon");
    assert_eq!(info["backend_collection"]["/"]["backend_type"], "Rafs");
    started.exit();
}

#[test]
fn l10_extra_arguments_of_the_documentation() {
    let base = "virtiofs --log-level info --apisock @/a --sock @/v";
    let started = Started::by(&format!("{base} --log-level debug"));
    assert_eq!(started.get("/api/rafsd/v1/daemon")["log_level"], "debug");
    started.exit();
    serves(&format!("{base} --threads 4"));
}

#[test]
fn l11_default_extra_arguments() {
    let base = "virtiofs --log-level info --apisock @/a --sock @/v";
    serves(&format!("{base} --thread-pool-size=1 --announce-submounts"));
    serves(&format!("{base} --thread-pool-size=1 -o announce_submounts"));
}
