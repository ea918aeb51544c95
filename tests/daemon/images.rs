//! Images over the API of the real daemon, from a directory of blobs.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::process::{Answer, Daemon};

/// A small image and its blobs, built by the project's own tool.
pub struct Image {
    dir: tempfile::TempDir,
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

fn request(daemon: &Daemon, method: &str, mountpoint: &str, source: &Path, config: &str) -> Answer {
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

#[test]
fn superblock_of_a_mounted_image() {
    let image = Image::build();
    let daemon = Daemon::start(&[]);
    request(&daemon, "POST", "/m", &image.bootstrap(), &image.config()).nothing();
    let dump = daemon
        .ask("GET", "/api/v1/daemon/backend?mountpoint=/m", "")
        .json();
    assert_eq!(
        (dump["magic"].as_u64(), dump["version"].as_u64()),
        (Some(3774210530), Some(1536))
    );
    assert_eq!(dump["attr_timeout"], json!({"secs": 4294967296u64, "nanos": 0}));
    for member in [
        "sb_size",
        "root_inode",
        "chunk_size",
        "batch_size",
        "inodes_count",
        "inode_table_entries",
        "inode_table_offset",
        "blob_table_size",
        "blob_table_offset",
        "extended_blob_table_offset",
        "extended_blob_table_entries",
        "blob_device_table_count",
        "blob_device_table_offset",
        "prefetch_table_offset",
        "prefetch_table_entries",
        "meta_blkaddr",
        "root_nid",
        "chunk_table_offset",
        "chunk_table_size",
    ] {
        assert!(dump[member].is_u64(), "{member}");
    }
    assert!(dump["flags"]["bits"].is_u64() && dump["is_chunk_dict"].is_boolean());
}

#[test]
fn refused_images_leave_nothing_and_the_reason_is_told() {
    let image = Image::build();
    let daemon = Daemon::start(&[]);
    let junk = image.blobs().join("../junk");
    std::fs::write(&junk, vec![1; 10_000]).unwrap();
    let refused = |source: &Path, config: &str| request(&daemon, "POST", "/m", source, config).error(500);
    for source in [
        junk.as_path(),
        Path::new("/no/such/bootstrap"),
        image.blobs().as_path(),
    ] {
        let message = refused(source, &image.config());
        assert!(message.contains("Failed to fill superBlock") && message.contains(source.to_str().unwrap()));
    }
    let message = refused(
        &image.bootstrap(),
        &image.config().replace("blobcache", "dummycache"),
    );
    assert!(message.contains("must have local blobcache"), "{message}");
    let message = refused(
        &image.bootstrap(),
        &image.config().replace("blobcache", "fscache"),
    );
    assert!(message.contains("fscache"), "{message}");
    let body = json!({"fs_type": "rafs", "source": image.bootstrap(), "config": image.config(),
        "prefetch_files": ["/hello", "relative"]});
    let message = daemon
        .ask("POST", "/api/v1/mount?mountpoint=/m", &body.to_string())
        .error(500);
    assert!(
        message.contains("invalid prefetch file list") && message.contains("relative"),
        "{message}"
    );
    assert!(daemon.mountpoints().is_empty());
    request(&daemon, "POST", "/m", &image.bootstrap(), &image.config()).nothing();
}

#[test]
fn an_unreachable_registry_does_not_keep_an_image_from_being_mounted() {
    let image = Image::build();
    let daemon = Daemon::start(&[]);
    let config = json!({"version": 2, "id": "r",
        "backend": {"type": "registry", "registry": {"host": "127.0.0.1:1", "repo": "r", "auth": "dTpodW50ZXIy"}},
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache()}},
        "rafs": {"mode": "direct"}})
    .to_string();
    let before = std::time::Instant::now();
    request(&daemon, "POST", "/m", &image.bootstrap(), &config).nothing();
    assert!(before.elapsed() < std::time::Duration::from_secs(2));
    let put = |body: &str| daemon.ask("PUT", "/api/v1/config?id=/m", body);
    put(r#"{"registry_auth":"bmV3Om5ldw=="}"#).nothing();
    assert_eq!(
        daemon.ask("GET", "/api/v1/config?id=/m", "").json(),
        json!({"registry_auth": "***"})
    );
    put(r#"{"registry_auth":"not base64"}"#).error(400);
    let everything =
        daemon.ask("GET", "/api/v1/daemon", "").body + &daemon.ask("GET", "/api/v1/config", "").body;
    assert!(
        !everything.contains("dTpodW50ZXIy") && !everything.contains("bmV3Om5ldw=="),
        "{everything}"
    );
}

#[test]
fn images_can_be_mounted_at_the_start() {
    let image = Image::build();
    let path = |path: PathBuf| path.to_str().unwrap().to_owned();
    let (bootstrap, blobs) = (path(image.bootstrap()), path(image.blobs()));
    let daemon = Daemon::start(&["--bootstrap", &bootstrap, "--localfs-dir", &blobs]);
    assert_eq!(daemon.mountpoints(), ["/"]);
    daemon.terminate();
    let config = path(image.dir.path().join("config.json"));
    std::fs::write(&config, image.config()).unwrap();
    let list = path(image.dir.path().join("list"));
    std::fs::write(&list, "\n  /hello  \n\n/usr\n").unwrap();
    let arguments = [
        "-B",
        &bootstrap,
        "-C",
        &config,
        "-m",
        "/img",
        "--prefetch-files",
        &list,
    ];
    let daemon = Daemon::start(&arguments);
    assert_eq!(daemon.mountpoints(), ["/img"]);
    daemon.terminate();
    std::fs::write(&list, "hello\n").unwrap();
    let output = super::process::rafsd()
        .args(["--sock", "/tmp/never-made.sock"])
        .args(arguments)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("invalid prefetch file list"));
    assert!(!Path::new("/tmp/never-made.sock").exists());
}
