//! Real Prometheus: it checks the alert rules, scrapes the daemon, and every query of the dashboard finds data.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::operate::Scene;

const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/monitoring");

fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| path.exists())
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

#[test]
fn promtool_accepts_the_alert_rules() {
    let Some(promtool) = installed("promtool") else {
        eprintln!("SKIPPED promtool_accepts_the_alert_rules: no promtool (make test-monitoring)");
        return;
    };
    for check in [
        ["check", "rules", "alerts.yml"],
        ["check", "config", "prometheus.yml"],
    ] {
        let output = Command::new(&promtool)
            .args(check)
            .current_dir(DIRECTORY)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    }
}

struct Prometheus {
    child: Child,
    port: u16,
}

impl Prometheus {
    fn start(program: &Path, directory: &Path, target: u16) -> Self {
        let config = directory.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [\"{DIRECTORY}/alerts.yml\"]\n\
             scrape_configs:\n- job_name: rafsd\n  static_configs:\n  - targets: [\"127.0.0.1:{target}\"]\n"
        );
        std::fs::write(&config, text).unwrap();
        let port = free_port();
        let child = Command::new(program)
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.join("data").display()
            ))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, port }
    }

    fn get(&self, target: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
        write!(stream, "GET {target} HTTP/1.0\r\nHost: x\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }

    fn finds(&self, query: &str) -> bool {
        let query: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        self.get(&format!("/api/v1/query?query={query}"))
            .is_some_and(|answer| !answer["data"]["result"].as_array().is_none_or(Vec::is_empty))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn prometheus_scrapes_and_every_panel_has_data() {
    let Some(program) = installed("prometheus") else {
        eprintln!(
            "SKIPPED prometheus_scrapes_and_every_panel_has_data: no prometheus (make test-monitoring)"
        );
        return;
    };
    let port = free_port();
    let scene = Scene::start(&["--metrics-address", &port.to_string()]);
    let guest = scene.boot();
    let directory = tempfile::tempdir().unwrap();
    let prometheus = Prometheus::start(&program, directory.path(), port);
    assert!(guest.lookup(1, "absent").is_err(), "an error is counted");

    let dashboard: Value =
        serde_json::from_str(&std::fs::read_to_string(format!("{DIRECTORY}/dashboard.json")).unwrap())
            .unwrap();
    let mut queries: Vec<String> = dashboard["panels"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|panel| panel["targets"].as_array().unwrap())
        .map(|target| {
            target["expr"]
                .as_str()
                .unwrap()
                .replace("$__rate_interval", "20s")
        })
        .collect();
    assert!(queries.len() > 12);
    let deadline = Instant::now() + Duration::from_secs(90);
    while !queries.is_empty() {
        assert!(Instant::now() < deadline, "no data: {queries:#?}");
        assert_eq!(guest.read_file("/m/hello").unwrap(), b"hello");
        std::thread::sleep(Duration::from_millis(300));
        queries.retain(|query| !prometheus.finds(query));
    }
    let rules = prometheus.get("/api/v1/rules").unwrap();
    let rules = rules["data"]["groups"][0]["rules"].as_array().unwrap().clone();
    assert!(rules.len() >= 7);
    for rule in rules {
        assert!(rule["lastError"].is_null() || rule["lastError"] == "", "{rule}");
    }
    drop(guest);
    scene.daemon.terminate();
}
