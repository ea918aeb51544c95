//! Starts a daemon in a directory of its own, talks to its API, measures it, ends it.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::{Error, Guest, Options, Result, http};

/// A running daemon. Killed when dropped.
pub struct Daemon {
    child: Child,
    directory: tempfile::TempDir,
    ended: Option<ExitStatus>,
    /// Its vhost-user socket.
    pub socket: PathBuf,
    /// Its API socket.
    pub api: PathBuf,
}

/// How to start a daemon.
pub struct Builder {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    directory: tempfile::TempDir,
}

impl Builder {
    /// Prepares to start `rafsd virtiofs` from the binary `program`.
    pub fn new(program: impl Into<PathBuf>) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("rafsd-test-")
            .tempdir()
            .map_err(|e| Error::io("temporary directory", e))?;
        Ok(Self {
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            directory,
        })
    }

    /// The directory for sockets and logs; free for the test's own files, too.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Starts it with the sockets `vhost.sock` and `api.sock`, and waits until it is RUNNING.
    pub fn start(self) -> Result<Daemon> {
        let daemon = self.spawn()?;
        daemon.wait_running(Duration::from_secs(60))?;
        Ok(daemon)
    }

    /// Starts it without waiting for anything.
    pub fn spawn(self) -> Result<Daemon> {
        let socket = self.directory.path().join("vhost.sock");
        let api = self.directory.path().join("api.sock");
        let mut command = Command::new(&self.program);
        command
            .arg("virtiofs")
            .args(["--log-level", "info"])
            .arg("--sock")
            .arg(&socket)
            .arg("--apisock")
            .arg(&api)
            .args(&self.arguments);
        self.run(command, socket, api)
    }

    /// Starts it with nothing but the arguments given; `socket` is where it will listen. For peers.
    pub fn spawn_plain(self, socket: &str) -> Result<Daemon> {
        let socket = self.directory.path().join(socket);
        let api = self.directory.path().join("api.sock");
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        let daemon = self.run(command, socket, api)?;
        daemon.wait_for("vhost-user socket", Duration::from_secs(60), |daemon| {
            daemon.socket.exists()
        })?;
        Ok(daemon)
    }

    fn run(self, mut command: Command, socket: PathBuf, api: PathBuf) -> Result<Daemon> {
        let log =
            File::create(self.directory.path().join("log")).map_err(|e| Error::io("create a log", e))?;
        let errors = log.try_clone().map_err(|e| Error::io("clone a log", e))?;
        let child = command
            .envs(self.environment)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(|e| Error::io(format!("start {}", self.program.display()), e))?;
        Ok(Daemon {
            child,
            directory: self.directory,
            ended: None,
            socket,
            api,
        })
    }
}

impl Daemon {
    /// Its directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Waits until it has said `what`, which a thread of its own writes.
    pub fn says(&self, what: &str) -> Result<()> {
        self.wait_for(what, Duration::from_secs(20), |daemon| {
            daemon.log().contains(what)
        })
    }

    /// Whether it is alive.
    pub fn is_alive(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended.is_none()
    }

    fn wait_for(&self, what: &str, limit: Duration, ready: impl Fn(&Self) -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready(self) {
            if start.elapsed() > limit {
                let log = self.log();
                return Err(Error::Usage(format!(
                    "no {what} within {limit:?}; the daemon says:\n{log}"
                )));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Waits until the API says RUNNING.
    pub fn wait_running(&self, limit: Duration) -> Result<()> {
        self.wait_for("state RUNNING", limit, |daemon| {
            daemon
                .request("GET", "/api/v1/daemon", None)
                .is_ok_and(|answer| answer.body.contains("\"RUNNING\""))
        })
    }

    /// Talks to the API socket.
    pub fn request(&self, method: &str, target: &str, body: Option<&str>) -> Result<http::Answer> {
        http::request(&self.api, method, target, body)
    }

    fn expect_no_content(&self, what: &str, answer: http::Answer) -> Result<()> {
        if answer.status == 204 {
            return Ok(());
        }
        Err(Error::Usage(format!("{what}: {} {}", answer.status, answer.body)))
    }

    /// Mounts a directory.
    pub fn mount_passthrough(&self, mountpoint: &str, source: &Path) -> Result<()> {
        self.mount(mountpoint, "passthrough_fs", source, "")
    }

    /// Mounts a directory with a configuration text of its own.
    pub fn mount_passthrough_with(&self, mountpoint: &str, source: &Path, config: &str) -> Result<()> {
        self.mount(mountpoint, "passthrough_fs", source, config)
    }

    /// Mounts an image: bootstrap file and configuration text.
    pub fn mount_rafs(&self, mountpoint: &str, bootstrap: &Path, config: &str) -> Result<()> {
        self.mount(mountpoint, "rafs", bootstrap, config)
    }

    fn mount(&self, mountpoint: &str, fs_type: &str, source: &Path, config: &str) -> Result<()> {
        let body = serde_json::json!({ "fs_type": fs_type, "source": source, "config": config });
        let target = format!("/api/v1/mount?mountpoint={mountpoint}");
        let answer = self.request("POST", &target, Some(&body.to_string()))?;
        self.expect_no_content(&format!("mount {mountpoint}"), answer)
    }

    /// Unmounts.
    pub fn umount(&self, mountpoint: &str) -> Result<()> {
        let answer = self.request("DELETE", &format!("/api/v1/mount?mountpoint={mountpoint}"), None)?;
        self.expect_no_content(&format!("umount {mountpoint}"), answer)
    }

    /// Boots a guest on it.
    pub fn guest(&self, options: Options) -> Result<Guest> {
        Guest::boot(&self.socket, options)
            .map_err(|e| Error::Usage(format!("{e}; the daemon says:\n{}", self.log())))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id() as i32).ok_or_else(|| Error::Usage("pid 0".into()))?;
        kill_process(pid, signal).map_err(|e| Error::io("kill", e))
    }

    /// Sends SIGTERM and waits for the end: the exit status, and how long it took.
    pub fn terminate(&mut self, limit: Duration) -> Result<(ExitStatus, Duration)> {
        let start = Instant::now();
        self.signal(Signal::TERM)?;
        let status = self.wait_end(limit)?;
        Ok((status, start.elapsed()))
    }

    /// Waits for the end.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if !self.is_alive() {
                return self.ended.ok_or_else(|| Error::Usage("no exit status".into()));
            }
            if start.elapsed() > limit {
                return Err(Error::Timeout {
                    what: "end of the daemon".into(),
                    waited: limit,
                });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Starts `program` on the sockets and in the directory of this daemon, which has ended.
    pub fn restart(mut self, program: impl Into<PathBuf>) -> Result<Self> {
        let spare = tempfile::tempdir().map_err(|e| Error::io("temporary directory", e))?;
        let directory = std::mem::replace(&mut self.directory, spare);
        let builder = Builder {
            program: program.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            directory,
        };
        builder.start()
    }

    /// Kills it.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if self.is_alive() {
            self.signal(Signal::KILL)?;
        }
        self.wait_end(Duration::from_secs(60))
    }

    /// CPU time used so far by all its threads, user and system.
    pub fn cpu_time(&self) -> Result<Duration> {
        let text = self.proc("stat")?;
        // The name in parentheses may hold spaces; user time is field 14, system time field 15.
        let fields: Vec<&str> = text
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_ascii_whitespace()
            .collect();
        let ticks = |index: usize| {
            fields
                .get(index)
                .and_then(|field| field.parse::<u64>().ok())
                .unwrap_or(0)
        };
        Ok(Duration::from_millis(
            (ticks(11) + ticks(12)) * 1000 / rustix::param::clock_ticks_per_second(),
        ))
    }

    /// Nanoseconds on a CPU by the scheduler's account, all threads that live.
    pub fn cpu_nanoseconds(&self) -> Result<u64> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).map_err(|e| Error::io("tasks", e))?;
        let mut sum = 0;
        for task in tasks.flatten() {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            sum += text
                .split(' ')
                .next()
                .and_then(|field| field.parse::<u64>().ok())
                .unwrap_or(0);
        }
        Ok(sum)
    }

    /// A value of `/proc/PID/status` in KiB: `VmHWM` is the peak of resident memory.
    pub fn memory_kib(&self, key: &str) -> Result<u64> {
        let text = self.proc("status")?;
        text.lines()
            .find_map(|line| {
                line.strip_prefix(key)?
                    .strip_prefix(':')?
                    .trim()
                    .split(' ')
                    .next()?
                    .parse()
                    .ok()
            })
            .ok_or_else(|| Error::Usage(format!("no {key} in status")))
    }

    /// Open file descriptors.
    pub fn descriptors(&self) -> Result<usize> {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .map(Iterator::count)
            .map_err(|e| Error::io("descriptors", e))
    }

    /// Threads.
    pub fn threads(&self) -> Result<usize> {
        fs::read_dir(format!("/proc/{}/task", self.pid()))
            .map(Iterator::count)
            .map_err(|e| Error::io("threads", e))
    }

    fn proc(&self, file: &str) -> Result<String> {
        fs::read_to_string(format!("/proc/{}/{file}", self.pid())).map_err(|e| Error::io(file, e))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_alive() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the daemon says:\n{}---", self.log());
        }
    }
}

/// Whether a daemon ended as asked: by itself, with code 0.
pub fn ended_well(status: ExitStatus) -> bool {
    status.code() == Some(0) && status.signal().is_none()
}
