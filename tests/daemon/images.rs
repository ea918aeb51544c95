//! Images over the API of the real daemon, from a directory of blobs.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::process::{Answer, Daemon};

/// A small image and its blobs, built by the project's own tool.
pub struct Image {
    pub dir: tempfile::TempDir,
}

impl Image {
    pub fn build() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("usr/bin")).unwrap();
        // Three chunks, none like another.
        let tool = [[7; 1 << 20], [8; 1 << 20], [9; 1 << 20]].concat();
        std::fs::write(tree.join("usr/bin/tool"), tool).unwrap();
        std::fs::write(tree.join("hello"), "hello").unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_rafs"))
            .arg("build")
            .arg(&tree)
            .arg("--output")
            .arg(dir.path().join("image"))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self { dir }
    }

    pub fn bootstrap(&self) -> PathBuf {
        self.dir.path().join("image/bootstrap")
    }

    pub fn blobs(&self) -> PathBuf {
        self.dir.path().join("image/blobs")
    }

    pub fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// As the snapshotter writes it.
    pub fn config(&self) -> String {
        json!({
            "device": {
                "id": "/17",
                "backend": {"type": "localfs", "config": {"dir": self.blobs(), "readahead": false, "colour": 1}},
                "cache": {"type": "blobcache", "config": {"work_dir": self.cache()}},
            },
            "mode": "direct",
            "enable_xattr": true,
        })
        .to_string()
    }
}

pub fn request(daemon: &Daemon, method: &str, mountpoint: &str, source: &Path, config: &str) -> Answer {
    let body = json!({"fs_type": "rafs", "source": source, "config": config});
    daemon.ask(
        method,
        &format!("/api/v1/mount?mountpoint={mountpoint}"),
        &body.to_string(),
    )
}

#[test]
fn an_image_is_mounted_shown_remounted_and_unmounted() {
    let image = Image::build();
    let daemon = Daemon::start(&[]);
    let at = "%2Frafs%2Fc1%2Flowerdir";
    request(&daemon, "POST", at, &image.bootstrap(), &image.config()).nothing();
    let warning = daemon.logs("unknown keys");
    assert!(
        warning.ends_with("are ignored: device.backend.config.colour"),
        "{warning}"
    );
    let info = daemon.ask("GET", "/api/v1/daemon", "").json();
    let shown = &info["backend_collection"]["/rafs/c1/lowerdir"];
    assert_eq!(shown["backend_type"], "Rafs");
    assert_eq!(
        (
            shown["config"]["version"].as_u64(),
            shown["config"]["id"].as_str()
        ),
        (Some(2), Some("/17"))
    );
    assert_eq!(shown["config"]["rafs"]["enable_xattr"], true);
    request(&daemon, "POST", at, &image.bootstrap(), &image.config()).error(500);
    request(&daemon, "PUT", at, &image.bootstrap(), &image.config()).nothing();
    daemon
        .ask("DELETE", &format!("/api/v1/mount?mountpoint={at}"), "")
        .nothing();
    assert!(daemon.mountpoints().is_empty());
    request(&daemon, "PUT", at, &image.bootstrap(), &image.config()).error(500);
    daemon.terminate();
}
