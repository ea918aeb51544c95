//! `rafs trace`: a recording from its beginning to the file.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use super::operate::Scene;

/// `rafs trace` of what is mounted at `mountpoint`.
struct Recording {
    child: Child,
    errors: BufReader<ChildStderr>,
}

impl Recording {
    fn start(scene: &Scene, mountpoint: &str, output: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_rafs"))
            .args(["trace", mountpoint, "--apisock"])
            .arg(scene.daemon.path("api.sock"))
            .arg("--output")
            .arg(output)
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap());
        Self { child, errors }
    }

    /// Returns when it has begun.
    fn begun(mut self) -> Self {
        let mut line = String::new();
        self.errors.read_line(&mut line).unwrap();
        assert!(line.starts_with("recording what is read of /m"), "{line}");
        self
    }

    fn interrupt(&self) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
    }

    /// Its exit status, and what else it said.
    fn end(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        self.errors.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }
}

#[test]
fn a_recording_ends_with_an_interrupt_and_leaves_the_trace() {
    let scene = Scene::start(&[]);
    let guest = scene.boot();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("start.trace");

    let recording = Recording::start(&scene, "/m", &file, &[]).begun();
    assert_eq!(guest.read_file("/m/hello").unwrap(), b"hello");
    assert!(!file.exists(), "it is not whole yet");
    recording.interrupt();
    let (status, said) = recording.end();
    assert!(status.success(), "{said}");
    assert_eq!(said, "chunks recorded: 1\n");
    let trace = scene.get("/api/rafsd/v1/trace?mountpoint=/m");
    assert_eq!(trace["recording"], false);
    assert_eq!(
        trace["trace"].as_str(),
        Some(std::fs::read_to_string(&file).unwrap().as_str())
    );
    let kept = scene.image.cache().join("traces");
    assert_eq!(kept.read_dir().unwrap().count(), 1, "for the next mount");

    // Nothing is read while this one records: the file stays as it was.
    let (status, said) = Recording::start(&scene, "/m", &file, &["--seconds", "1"])
        .begun()
        .end();
    assert_eq!(status.code(), Some(1));
    assert_eq!(said, "rafs: nothing was read of /m: there is no trace\n");
    assert_eq!(
        directory.path().read_dir().unwrap().count(),
        1,
        "nothing is left beside the first trace"
    );
    scene.daemon.terminate();
}

#[test]
fn what_can_not_be_recorded_is_refused_before_it_begins() {
    let scene = Scene::start(&[]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("start.trace");
    for (mountpoint, reason) in [("/nothing", "nothing is mounted at /nothing"), ("/c", "/c")] {
        let (status, said) = Recording::start(&scene, mountpoint, &file, &[]).end();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.starts_with("rafs: ") && said.contains(reason), "{said}");
    }
    let nowhere = directory.path().join("no/start.trace");
    let (status, said) = Recording::start(&scene, "/m", &nowhere, &[]).end();
    assert_eq!(status.code(), Some(1));
    assert!(
        said.starts_with(&format!("rafs: cannot write {}", nowhere.display())),
        "{said}"
    );
    for special in [directory.path(), Path::new("/dev/null")] {
        let (status, said) = Recording::start(&scene, "/m", special, &[]).end();
        assert_eq!(status.code(), Some(1));
        assert_eq!(
            said,
            format!(
                "rafs: cannot write {}: it is not a regular file\n",
                special.display()
            )
        );
    }
    let trace = scene.get("/api/rafsd/v1/trace?mountpoint=/m");
    assert_eq!(trace["recording"], false, "{trace}");
    assert_eq!(directory.path().read_dir().unwrap().count(), 0);
    scene.daemon.terminate();
}
