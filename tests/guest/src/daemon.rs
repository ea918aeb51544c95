//! A `rafsd` process and its administration API, used the way a container runtime uses them.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::http;

/// For things that take milliseconds on a free machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running daemon. It is killed when this is dropped.
pub struct Daemon {
    process: Child,
    directory: TempDir,
}

impl Daemon {
    /// Starts `binary` as Kata does and waits until it reports RUNNING.
    pub fn start(binary: &Path) -> Result<Self> {
        Self::start_with(binary, &[])
    }

    /// The same with more arguments after `virtiofs`.
    pub fn start_with(binary: &Path, arguments: &[&str]) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("rafsd-").tempdir()?;
        let log = File::create(directory.path().join("log"))?;
        // The daemon goes when we go, however we go.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(binary)
            .args(["virtiofs", "--log-level", "info"])
            .arg("--apisock")
            .arg(directory.path().join("api"))
            .arg("--sock")
            .arg(directory.path().join("fs"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", binary.display()))?;
        let mut daemon = Self { process, directory };
        daemon.wait_until_running()?;
        Ok(daemon)
    }

    fn wait_until_running(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(state) = self.state()
                && state == "RUNNING"
            {
                return Ok(());
            }
            if let Some(status) = self.process.try_wait()? {
                bail!("rafsd ended ({status}) and said:\n{}", self.log());
            }
            ensure!(
                Instant::now() < deadline,
                "rafsd is not RUNNING after {PATIENCE:?}; it said:\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The vhost-user socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("fs")
    }

    /// The socket of the administration API.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.directory.path().join("api")
    }

    /// The daemon's process id.
    #[must_use]
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// The state that it reports, e.g. `RUNNING`.
    pub fn state(&self) -> Result<String> {
        let (status, body) = self.request("GET", "/api/v1/daemon", None)?;
        ensure!(status == 200, "GET /api/v1/daemon: {status} {body}");
        let state = serde_json::from_str::<Value>(&body)?
            .get("state")
            .and_then(Value::as_str)
            .map(str::to_owned);
        state.with_context(|| format!("no state in {body}"))
    }

    /// Mounts a directory of the host.
    pub fn mount_passthrough(&self, mountpoint: &str, directory: &Path) -> Result<()> {
        self.mount(mountpoint, "passthrough_fs", directory, "")
    }

    /// Mounts a directory of the host with options of its own.
    pub fn mount_passthrough_with(&self, mountpoint: &str, directory: &Path, options: &Value) -> Result<()> {
        self.mount(mountpoint, "passthrough_fs", directory, &options.to_string())
    }

    /// Mounts the image with this bootstrap. `config` is JSON as the snapshotter writes it.
    pub fn mount_image(&self, mountpoint: &str, bootstrap: &Path, config: &Value) -> Result<()> {
        self.mount(mountpoint, "rafs", bootstrap, &config.to_string())
    }

    fn mount(&self, mountpoint: &str, kind: &str, source: &Path, config: &str) -> Result<()> {
        let body = json!({ "fs_type": kind, "source": source, "config": config });
        let (status, answer) = self.request(
            "POST",
            &format!("/api/v1/mount?mountpoint={mountpoint}"),
            Some(&body),
        )?;
        ensure!(status == 204, "mount {mountpoint}: {status} {answer}");
        Ok(())
    }

    /// Takes a mount away.
    pub fn unmount(&self, mountpoint: &str) -> Result<()> {
        let (status, answer) =
            self.request("DELETE", &format!("/api/v1/mount?mountpoint={mountpoint}"), None)?;
        ensure!(status == 204, "unmount {mountpoint}: {status} {answer}");
        Ok(())
    }

    /// One request to the API: status and body of the answer.
    pub fn request(&self, method: &str, target: &str, body: Option<&Value>) -> Result<(u16, String)> {
        let stream = UnixStream::connect(self.api_socket()).context("connect to the API socket")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let answer = http::request(stream, method, target, body.map(Value::to_string).as_deref())?;
        Ok((answer.status, answer.text()?))
    }

    /// Sends SIGTERM and waits for the end: exit status and how long it took.
    pub fn terminate(mut self) -> Result<(ExitStatus, Duration)> {
        let pid = i32::try_from(self.process.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("the daemon has no pid")?;
        let start = Instant::now();
        kill_process(pid, Signal::TERM)?;
        loop {
            if let Some(status) = self.process.try_wait()? {
                return Ok((status, start.elapsed()));
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "rafsd ignores SIGTERM; it said:\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if thread::panicking() {
            eprintln!("rafsd said:\n{}", self.log());
        }
    }
}
