//! A daemon that is nothing but its state, and an HTTP client that shows every byte.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use rafsd_kata::api::Server;
use rafsd_kata::control::metrics::*;
use rafsd_kata::control::operate::*;
use rafsd_kata::control::*;

#[derive(Default)]
pub struct Model {
    pub mounts: Mutex<BTreeMap<String, MountInfo>>,
    pub settings: Mutex<BTreeMap<String, Settings>>,
    pub requests: Mutex<Vec<MountRequest>>,
    pub log_level: Mutex<String>,
    pub exited: Mutex<bool>,
    pub in_flight: Mutex<Vec<InFlight>>,
    pub live: Mutex<Vec<LiveRequest>>,
    pub drained: Mutex<Vec<u64>>,
    /// Mounting `/slow` waits for a word from here.
    pub gate: Mutex<Option<Receiver<()>>>,
}

impl Control for Model {
    fn state(&self) -> State {
        State::Running
    }
    fn version(&self) -> Version {
        let text = |text: &str| text.to_owned();
        Version {
            package_ver: text("v0.1.0"),
            git_commit: text("abc"),
            build_time: text("2026-11-21T00:00:00Z"),
            profile: text("release"),
            rustc: text("rustc 1.95.0"),
        }
    }
    fn id(&self) -> Option<String> {
        None
    }
    fn supervisor(&self) -> Option<String> {
        None
    }
    fn mounts(&self) -> BTreeMap<String, MountInfo> {
        self.mounts.lock().unwrap().clone()
    }
    fn mount(&self, mountpoint: &str, request: MountRequest) -> Result<(), ControlError> {
        match mountpoint {
            "/slow" => {
                let gate = self.gate.lock().unwrap().take();
                if let Some(gate) = gate {
                    let _ = gate.recv_timeout(Duration::from_secs(30));
                }
            }
            "/panic" => panic!("a bug"),
            _ => {}
        }
        let mut mounts = self.mounts.lock().unwrap();
        if mounts.contains_key(mountpoint) {
            return Err(ControlError::failed("object or filesystem already exists"));
        }
        mounts.insert(
            mountpoint.to_owned(),
            MountInfo {
                backend_type: "PassthroughFs".into(),
                mountpoint: mountpoint.to_owned(),
                mounted_time: "2026-11-21 21:46:42.629744263 +00:00:00".into(),
                config: None,
            },
        );
        self.requests.lock().unwrap().push(request);
        Ok(())
    }
    fn remount(&self, mountpoint: &str, _: MountRequest) -> Result<(), ControlError> {
        match self.mounts.lock().unwrap().contains_key(mountpoint) {
            true => Ok(()),
            false => Err(ControlError::failed("object or filesystem doesn't exist")),
        }
    }
    fn umount(&self, mountpoint: &str) -> Result<(), ControlError> {
        match self.mounts.lock().unwrap().remove(mountpoint) {
            Some(_) => Ok(()),
            None => Err(ControlError::failed("object or filesystem doesn't exist")),
        }
    }
    fn set_log_level(&self, level: &str) -> Result<(), ControlError> {
        *self.log_level.lock().unwrap() = level.to_owned();
        Ok(())
    }
    fn start(&self) -> Result<(), ControlError> {
        Err(ControlError::unexpected_event(
            "Start",
            State::Running,
            State::Ready,
        ))
    }
    fn exit(&self) -> Result<(), ControlError> {
        *self.exited.lock().unwrap() = true;
        Ok(())
    }
    fn events(&self) -> Events {
        Events {
            max_errors: 500,
            max_size: 51200,
            ..Events::default()
        }
    }
    fn superblock(&self, mountpoint: &str) -> Result<serde_json::Value, ControlError> {
        match mountpoint {
            "/rafs" => Ok(serde_json::json!({"magic": 3774210530u32})),
            _ => Err(ControlError::failed("filesystem type mismatch, expect RAFS")),
        }
    }
    fn settings(&self) -> BTreeMap<String, Settings> {
        self.settings.lock().unwrap().clone()
    }
    fn change_settings(&self, mountpoint: &str, change: Settings) -> Result<(), ControlError> {
        self.settings
            .lock()
            .unwrap()
            .insert(mountpoint.to_owned(), change);
        Ok(())
    }
    fn fs_metrics(&self, id: Option<&str>) -> Result<FsMetrics, ControlError> {
        counter(id, |id| FsMetrics {
            id,
            ..FsMetrics::default()
        })
    }
    fn file_metrics(&self, id: Option<&str>) -> Result<BTreeMap<u64, FileMetrics>, ControlError> {
        counter(id, |_| BTreeMap::from([(136, FileMetrics::default())]))
    }
    fn latest_files(&self, id: Option<&str>) -> Result<Vec<Vec<u64>>, ControlError> {
        counter(id, |_| vec![vec![136], vec![150, 152]])
    }
    fn access_pattern(&self, id: Option<&str>) -> Result<Vec<AccessRecord>, ControlError> {
        counter(id, |_| {
            vec![AccessRecord {
                ino: 136,
                ..AccessRecord::default()
            }]
        })
    }
    fn backend_metrics(&self, id: Option<&str>) -> Result<BackendMetrics, ControlError> {
        counter(id, |_| BackendMetrics {
            backend_type: "localfs".into(),
            ..BackendMetrics::default()
        })
    }
    fn cache_metrics(&self, id: Option<&str>) -> Result<CacheMetrics, ControlError> {
        counter(id, |_| CacheMetrics {
            store_path: "/c".into(),
            ..CacheMetrics::default()
        })
    }
    fn in_flight(&self) -> Result<Vec<InFlight>, ControlError> {
        Ok(self.in_flight.lock().unwrap().clone())
    }
}

impl Operate for Model {
    fn overview(&self) -> Overview {
        Overview {
            version: self.version(),
            pid: 1,
            uptime_ms: 1,
            state: self.state(),
            draining: !self.drained.lock().unwrap().is_empty(),
            log_level: self.log_level.lock().unwrap().clone(),
            mounts: 0,
            waiting: 0,
            device: DeviceCounters::default(),
        }
    }
    fn mount_status(&self, mountpoint: Option<&str>) -> Result<Vec<MountStatus>, ControlError> {
        named(mountpoint).map(|()| Vec::new())
    }
    fn live_requests(&self) -> Vec<LiveRequest> {
        self.live.lock().unwrap().clone()
    }
    fn latencies(&self, mountpoint: Option<&str>) -> Result<Vec<MountLatencies>, ControlError> {
        named(mountpoint).map(|()| Vec::new())
    }
    fn residency(&self, mountpoint: &str, path: &str) -> Result<Residency, ControlError> {
        named(Some(mountpoint))?;
        Ok(Residency {
            mountpoint: mountpoint.into(),
            path: path.into(),
            inode: 1,
            size: 3,
            chunks: 3,
            resident: 2,
            ranges: vec![[0, 1]],
        })
    }
    fn start_trace(&self, mountpoint: &str) -> Result<(), ControlError> {
        named(Some(mountpoint))
    }
    fn stop_trace(&self, mountpoint: &str) -> Result<(), ControlError> {
        named(Some(mountpoint))
    }
    fn trace(&self, mountpoint: &str) -> Result<AccessTrace, ControlError> {
        named(Some(mountpoint))?;
        Ok(AccessTrace {
            mountpoint: mountpoint.into(),
            recording: false,
            chunks: 0,
            trace: "rafsd-trace 1\n".into(),
        })
    }
    fn drain(&self, request: DrainRequest) -> Drained {
        self.drained.lock().unwrap().push(request.timeout_ms);
        Drained {
            drained: true,
            waiting: 0,
        }
    }
    fn undrain(&self) {
        self.drained.lock().unwrap().clear();
    }
    fn exposition(&self) -> String {
        "# EOF\n".into()
    }
}

fn named(mountpoint: Option<&str>) -> Result<(), ControlError> {
    match mountpoint {
        None | Some("/m") => Ok(()),
        Some(other) => Err(ControlError {
            status: 404,
            message: format!("nothing is mounted at {other}"),
        }),
    }
}

/// One counter of every kind exists, for `/m`.
fn counter<T>(id: Option<&str>, make: impl FnOnce(String) -> T) -> Result<T, ControlError> {
    match id {
        None | Some("/m") => Ok(make("/m".into())),
        Some(other) => Err(ControlError::no_counter(format!("no mount {other}"))),
    }
}

/// A server over a model, on a socket of its own.
pub struct Daemon {
    pub model: Arc<Model>,
    pub path: std::path::PathBuf,
    pub server: Option<Server>,
    _dir: tempfile::TempDir,
}

impl Daemon {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let model = Arc::new(Model::default());
        let server = Server::start(UnixListener::bind(&path).unwrap(), model.clone()).unwrap();
        Self {
            model,
            path,
            server: Some(server),
            _dir: dir,
        }
    }

    /// Makes the next mount of `/slow` wait until the sender speaks or is dropped.
    pub fn slow_mount(&self) -> Sender<()> {
        let (sender, receiver) = std::sync::mpsc::channel();
        *self.model.gate.lock().unwrap() = Some(receiver);
        sender
    }

    pub fn connect(&self) -> Client {
        Client::to(&self.path)
    }

    /// One request on a connection of its own.
    pub fn ask(&self, method: &str, target: &str, body: Option<&str>) -> Answer {
        self.connect().ask(method, target, body)
    }
}

/// An answer, taken apart but not interpreted.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> serde_json::Value {
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:?}");
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks the status and the one shape of errors, and hands the message out.
    pub fn error(&self, status: u16) -> String {
        self.error_with(status, "UNDEFINED")
    }

    pub fn error_with(&self, status: u16, code: &str) -> String {
        assert_eq!(self.status, status, "{self:?}");
        let body = self.json();
        assert_eq!(body.as_object().unwrap().len(), 2, "{self:?}");
        assert_eq!(body["code"], code);
        body["message"].as_str().unwrap().to_owned()
    }

    /// Checks for a success without data: no body, no length.
    pub fn nothing(&self) {
        assert_eq!(self.status, 204, "{self:?}");
        assert_eq!(self.body, "");
        assert_eq!(self.header("content-length"), None);
        assert_eq!(self.header("transfer-encoding"), None);
    }
}

pub struct Client {
    pub stream: UnixStream,
}

impl Client {
    pub fn to(path: &std::path::Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { stream }
    }

    pub fn ask(&mut self, method: &str, target: &str, body: Option<&str>) -> Answer {
        let length = body
            .map(|body| format!("Content-Length: {}\r\n", body.len()))
            .unwrap_or_default();
        let body = body.unwrap_or_default();
        self.send(&format!(
            "{method} {target} HTTP/1.1\r\nHost: unix\r\n{length}\r\n{body}"
        ));
        self.receive(method == "HEAD")
    }

    pub fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    pub fn receive(&mut self, head_only: bool) -> Answer {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            assert_eq!(self.stream.read(&mut byte).unwrap(), 1, "closed after {head:?}");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let mut lines = head.trim_end().lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: Vec<(String, String)> = lines
            .map(|line| {
                line.split_once(": ")
                    .map(|(key, value)| (key.into(), value.into()))
                    .unwrap()
            })
            .collect();
        let mut answer = Answer {
            status,
            headers,
            body: String::new(),
        };
        if let Some(length) = answer.header("content-length").filter(|_| !head_only) {
            let mut body = vec![0; length.parse().unwrap()];
            self.stream.read_exact(&mut body).unwrap();
            answer.body = String::from_utf8(body).unwrap();
        }
        answer
    }
}
