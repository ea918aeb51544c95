//! The incumbent's own client, unmodified, with every subcommand. It panics over an answer that lacks a member or has it in
//! another type, so that what it prints proves the shapes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rafsd_frontend::{Guest, Options};
use serde_json::{Value, json};

use super::images::Image;
use super::process::Daemon;

/// `NYDUSCTL`, what `make peers` has built, or what is installed.
fn nydusctl() -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin/nydusctl");
    let installed = std::env::var_os("PATH").unwrap_or_default();
    std::env::var_os("NYDUSCTL")
        .map(PathBuf::from)
        .into_iter()
        .chain([built])
        .chain(std::env::split_paths(&installed).map(|dir| dir.join("nydusctl")))
        .find(|path| path.exists())
}

struct Client<'a> {
    program: PathBuf,
    daemon: &'a Daemon,
}

impl Client<'_> {
    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(&self.program)
            .arg("--sock")
            .arg(self.daemon.path("api.sock"))
            .args(arguments)
            .output()
            .unwrap()
    }

    /// What it prints when all is well.
    fn says(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{arguments:?}: {}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    fn raw(&self, arguments: &[&str]) -> Value {
        let text = self.says(&[&["--raw"], arguments].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Releases differ in whether the mountpoint is an option.
    fn umount(&self, mountpoint: &str) -> Output {
        let output = self.run(&["umount", "-m", mountpoint]);
        match output.status.code() {
            Some(2) => self.run(&["umount", mountpoint]),
            _ => output,
        }
    }
}

#[test]
fn nydusctl_runs_every_subcommand() {
    let Some(program) = nydusctl() else {
        eprintln!("SKIPPED nydusctl_runs_every_subcommand: no nydusctl (make peers)");
        return;
    };
    let image = Image::build();
    let daemon = Daemon::start(&[]);
    let client = Client {
        program,
        daemon: &daemon,
    };
    let config = daemon.path("config.json");
    let text = json!({"version": 2, "id": "/17", "backend": {"type": "localfs", "localfs": {"dir": image.blobs()}},
        "cache": {"type": "blobcache", "filecache": {"work_dir": image.cache()}}, "rafs": {"mode": "direct", "batch_size": 0}});
    std::fs::write(&config, text.to_string()).unwrap();
    let config = config.to_str().unwrap();
    let (bootstrap, share) = (image.bootstrap(), tempfile::tempdir().unwrap());
    let mount = |source: &Path, kind: &str, at: &str| {
        let source = source.to_str().unwrap();
        client.run(&["mount", "-s", source, "-c", config, "-m", at, "-t", kind])
    };

    // info, of an empty daemon and of one with both kinds of mounts.
    let info = client.says(&["info"]);
    assert!(info.contains("\"RUNNING\"") && info.contains("\"v0."), "{info}");
    assert!(mount(&bootstrap, "rafs", "/image").status.success());
    assert!(
        mount(share.path(), "passthrough_fs", "/containers")
            .status
            .success()
    );
    assert_eq!(
        mount(share.path(), "passthrough_fs", "/containers").status.code(),
        Some(1)
    );
    let info = client.says(&["info"]);
    for part in ["/image", "/containers", "Rafs", "PassthroughFs", "Mode:  direct"] {
        assert!(info.contains(part), "{part}: {info}");
    }
    assert_eq!(client.raw(&["info"])["state"], "RUNNING");

    // metrics, after a guest has read three chunks.
    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    assert_eq!(guest.read_file("/image/usr/bin/tool").unwrap().len(), 3 << 20);
    let backend = client.says(&["metrics", "backend"]);
    assert!(
        backend.contains("\"localfs\"") && backend.contains("Read Errors:        0"),
        "{backend}"
    );
    let raw = client.raw(&["metrics", "backend"]);
    assert_eq!(raw["read_errors"], 0);
    assert!(
        raw["read_count"].as_u64().unwrap() >= 1 && raw["read_amount_total"].as_u64().unwrap() > 0,
        "{raw}"
    );
    let cache = client.says(&["metrics", "cache"]);
    assert!(
        cache.contains(".blob.data") && cache.contains(image.cache().to_str().unwrap()),
        "{cache}"
    );
    let raw = client.raw(&["metrics", "cache"]);
    assert_eq!(raw["entries_count"], 3);
    assert_eq!(
        raw["total"].as_u64().unwrap(),
        raw["partial_hits"].as_u64().unwrap() + raw["whole_hits"].as_u64().unwrap()
    );
    let stats = client.says(&["metrics", "fsstats"]);
    assert!(stats.contains("Read Data: 3145728Bytes"), "{stats}");
    let raw = client.raw(&["metrics", "fsstats"]);
    assert_eq!(
        (&raw["id"], &raw["data_read"]),
        (&json!("/image"), &json!(3 << 20))
    );
    drop(guest);

    // set and umount.
    client.says(&["set", "log-level", "debug"]);
    daemon.ask("GET", "/marker", "").error(404);
    daemon.logs("/marker");
    for mountpoint in ["/image", "/containers"] {
        assert!(client.umount(mountpoint).status.success());
        assert_eq!(
            client.umount(mountpoint).status.code(),
            Some(1),
            "nothing is there any more"
        );
    }
    assert!(daemon.mountpoints().is_empty());
    assert!(
        !client.run(&["metrics", "fsstats"]).status.success(),
        "no counter is left"
    );
    daemon.terminate();
}
