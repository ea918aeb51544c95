//! The daemon as a child process, and as little HTTP as it takes to talk to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Generous: the machine may be busy. What must be quick is measured where it matters.
pub const LONG: Duration = Duration::from_secs(60);
/// Within a second, as the documentation says; a busy machine gets more.
pub const SOON: Duration = Duration::from_secs(10);

pub fn rafsd() -> Command {
    Command::new(env!("CARGO_BIN_EXE_rafsd"))
}

/// A daemon in a directory of its own, with the sockets `vu.sock` and `api.sock`.
pub struct Daemon {
    pub dir: tempfile::TempDir,
    pub child: Child,
    log: Mutex<Receiver<String>>,
}

impl Daemon {
    /// Starts the daemon as Kata does, with further arguments, and waits until it says that it runs.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_with(|command| {
            command.args(arguments);
        })
    }

    pub fn start_with(change: impl FnOnce(&mut Command)) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), change)
    }

    pub fn start_in(dir: tempfile::TempDir, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = rafsd();
        command.args(["virtiofs", "--log-level", "info", "--apisock"]);
        command
            .arg(dir.path().join("api.sock"))
            .arg("--sock")
            .arg(dir.path().join("vu.sock"));
        change(&mut command);
        let mut child = command
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, log) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut daemon = Self {
            dir,
            child,
            log: Mutex::new(log),
        };
        daemon.wait_for_running();
        daemon
    }

    fn wait_for_running(&mut self) {
        let deadline = Instant::now() + LONG;
        while self
            .try_ask("GET", "/api/v1/daemon", "")
            .is_none_or(|answer| !answer.body.contains("RUNNING"))
        {
            if let Some(status) = self.child.try_wait().unwrap() {
                let log: Vec<_> = self.log.lock().unwrap().iter().collect();
                panic!("ended with {status}: {log:#?}");
            }
            assert!(Instant::now() < deadline, "never RUNNING");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn try_ask(&self, method: &str, target: &str, body: &str) -> Option<Answer> {
        ask(&self.path("api.sock"), method, target, body)
    }

    pub fn ask(&self, method: &str, target: &str, body: &str) -> Answer {
        self.try_ask(method, target, body)
            .expect("the API socket answers")
    }

    /// Mounts a directory of the host.
    pub fn mount_directory(&self, mountpoint: &str, source: &Path) -> Answer {
        let body = serde_json::json!({"fs_type": "passthrough_fs", "source": source, "config": ""});
        self.ask(
            "POST",
            &format!("/api/v1/mount?mountpoint={mountpoint}"),
            &body.to_string(),
        )
    }

    pub fn mountpoints(&self) -> Vec<String> {
        let info = self.ask("GET", "/api/v1/daemon", "").json();
        info["backend_collection"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect()
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Sends SIGTERM and checks that the daemon ends within a second, with code 0, and without its sockets.
    pub fn terminate(mut self) {
        self.signal("-TERM");
        self.ends_cleanly();
    }

    pub fn ends_cleanly(&mut self) {
        let before = Instant::now();
        let status = wait(&mut self.child);
        assert!(before.elapsed() < SOON, "took {:?}", before.elapsed());
        assert_eq!(status.code(), Some(0), "{status}");
        assert!(!self.path("vu.sock").exists() && !self.path("api.sock").exists());
    }

    /// The next line of the log.
    pub fn next_line(&self) -> String {
        self.log
            .lock()
            .unwrap()
            .recv_timeout(LONG)
            .expect("one more line in the log")
    }

    /// Waits for a line of the log.
    pub fn logs(&self, what: &str) -> String {
        loop {
            let line = self.next_line();
            if line.contains(what) {
                return line;
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Status line and headers.
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
            .next()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks the status and hands the message of an error out.
    pub fn error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{self:?}");
        self.json()["message"].as_str().unwrap().to_owned()
    }

    pub fn nothing(&self) {
        assert_eq!((self.status, self.body.as_str()), (204, ""));
    }
}

/// One request over a connection of its own; None if there is nobody.
pub fn ask(socket: &Path, method: &str, target: &str, body: &str) -> Option<Answer> {
    let mut stream = UnixStream::connect(socket).ok()?;
    // Longer still: dozens of clients may ask at once, on a machine that does other things.
    stream.set_read_timeout(Some(6 * LONG)).unwrap();
    let length = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    let request =
        format!("{method} {target} HTTP/1.1\r\nHost: unix\r\nConnection: close\r\n{length}\r\n{body}");
    stream.write_all(request.as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Answer {
        status,
        head: head.to_owned(),
        body: body.to_owned(),
    })
}
