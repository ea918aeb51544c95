//! What mount, remount and unmount mean.

use std::path::Path;

use rafsd_frontend::{Guest, Options, ops};
use serde_json::json;

use crate::counters::eventually;
use crate::images::{Image, request};
use crate::operate::Scene;
use crate::process::{Answer, Daemon};

fn directory() -> (tempfile::TempDir, Daemon) {
    let share = tempfile::tempdir().unwrap();
    std::fs::write(share.path().join("file"), "data").unwrap();
    (share, Daemon::start(&[]))
}

fn boot(daemon: &Daemon) -> Guest {
    Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap()
}

fn umount(daemon: &Daemon, mountpoint: &str) -> Answer {
    daemon.ask("DELETE", &format!("/api/v1/mount?mountpoint={mountpoint}"), "")
}

#[test]
fn fs_type_values() {
    let (share, daemon) = directory();
    let mount = |at: &str, fs_type: &str| {
        let body = json!({"fs_type": fs_type, "source": share.path(), "config": ""});
        daemon.ask(
            "POST",
            &format!("/api/v1/mount?mountpoint={at}"),
            &body.to_string(),
        )
    };
    mount("/a", "passthrough").nothing();
    mount("/b", "passthroughfs").nothing();
    mount("/c", "passthrough_fs").nothing();
    // `rafs` is known: what it refuses is the source.
    assert!(mount("/d", "rafs").error(500).contains("Failed to load config"));
    for wrong in ["bogus", "", "RAFS", "Passthrough_fs"] {
        let message = mount("/d", wrong).error(500);
        let expected = format!("only 'rafs' and 'passthrough_fs' are supported, but {wrong:?} was specified");
        assert!(message.contains(&expected), "{message}");
    }
    assert_eq!(daemon.mountpoints(), ["/a", "/b", "/c"]);
}

#[test]
fn same_mountpoint_twice() {
    let (share, daemon) = directory();
    daemon.mount_directory("/m", share.path()).nothing();
    let message = daemon.mount_directory("/m", share.path()).error(500);
    assert!(
        message.contains("object or filesystem already exists"),
        "{message}"
    );
    // Of many at once one wins, too.
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|_| scope.spawn(|| daemon.mount_directory("/one", share.path()).status))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let won = statuses.iter().filter(|status| **status == 204).count();
    assert_eq!(won, 1, "{statuses:?}");
}

#[test]
fn nested_new_path() {
    let (share, daemon) = directory();
    daemon
        .mount_directory("/rafs/c1/lowerdir", share.path())
        .nothing();
    let guest = boot(&daemon);
    for path in ["/", "/rafs", "/rafs/c1"] {
        let directory = guest.resolve(path).unwrap();
        assert_eq!(
            guest.getattr(directory.nodeid).unwrap().mode & 0o170_000,
            0o040_000
        );
    }
    assert_eq!(guest.read_file("/rafs/c1/lowerdir/file").unwrap(), b"data");
}

#[test]
fn mount_at_root_after_others() {
    let (share, daemon) = directory();
    daemon.mount_directory("/other", share.path()).nothing();
    daemon.mount_directory("/", share.path()).nothing();
    daemon.mount_directory("/", share.path()).error(500);
    assert_eq!(boot(&daemon).read_file("/file").unwrap(), b"data");
}

#[test]
fn mount_below_an_existing_mount() {
    let (share, daemon) = directory();
    daemon.mount_directory("/m", share.path()).nothing();
    daemon.mount_directory("/m/below/it", share.path()).nothing();
    assert_eq!(daemon.mountpoints(), ["/m", "/m/below/it"]);
}

#[test]
fn mountpoint_relative_or_empty() {
    let (share, daemon) = directory();
    for mountpoint in ["", "relative", "relative/deep"] {
        let message = daemon.mount_directory(mountpoint, share.path()).error(500);
        assert!(message.contains("it must be absolute"), "{message}");
    }
}

/// The incumbent takes both as they are, as names of their own.
#[test]
fn dots_or_trailing_slash_in_a_mountpoint() {
    let (share, daemon) = directory();
    for mountpoint in ["/a/../b", "/a/./b", "/.."] {
        let message = daemon.mount_directory(mountpoint, share.path()).error(500);
        assert!(message.contains("must not contain"), "{message}");
    }
    daemon.mount_directory("/a//b/", share.path()).nothing();
    assert_eq!(daemon.mountpoints(), ["/a/b"]);
    umount(&daemon, "/a/b/").nothing();
}

#[test]
fn passthrough_source_missing() {
    let (share, daemon) = directory();
    let missing = share.path().join("missing");
    let message = daemon.mount_directory("/m", &missing).error(500);
    assert!(
        message.contains("No such file or directory (os error 2)"),
        "{message}"
    );
    assert!(message.contains(missing.to_str().unwrap()), "{message}");
    // The place is free.
    daemon.mount_directory("/m", share.path()).nothing();
}

#[test]
fn rafs_source_missing_or_not_rafs() {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let junk = image.blobs().join("../junk");
    std::fs::write(&junk, vec![1; 10_000]).unwrap();
    // Nobody will ever write to it.
    let fifo = image.blobs().join("../fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    for source in [&junk, Path::new("/no/such/bootstrap"), &image.blobs(), &fifo] {
        let message = request(&daemon, "POST", "/m", source, &image.config()).error(500);
        assert!(message.contains("Failed to fill superBlock"), "{message}");
        assert!(message.contains(source.to_str().unwrap()), "{message}");
    }
    request(&daemon, "POST", "/m", &image.bootstrap(), &image.config()).nothing();
}

#[test]
fn bad_config() {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let refused = |config: &str| request(&daemon, "POST", "/m", &image.bootstrap(), config).error(500);
    assert!(refused("{").contains("failed to parse configuration information"));
    assert!(refused("").contains("RAFS failed to handle request, Failed to load config"));
    for (config, what) in [
        (r#"{"version":2}"#.to_owned(), "backend is missing"),
        (
            image.config().replace("direct", "fast"),
            "mode is \"fast\", allowed is one of direct, cached",
        ),
        (
            image.config().replace("blobcache", "dummycache"),
            "must have local blobcache configured",
        ),
        (image.config().replace("blobcache", "fscache"), "fscache"),
    ] {
        let message = refused(&config);
        assert!(message.contains(what), "{message}");
    }
    assert!(daemon.mountpoints().is_empty());
}

#[test]
fn prefetch_files_relative_entry() {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let mount = |files: serde_json::Value| {
        let body = json!({"fs_type": "rafs", "source": image.bootstrap(), "config": image.config(),
            "prefetch_files": files});
        daemon.ask("POST", "/api/v1/mount?mountpoint=/m", &body.to_string())
    };
    let message = mount(json!(["/hello", "relative"])).error(500);
    assert!(
        message.contains("invalid prefetch file list") && message.contains("relative"),
        "{message}"
    );
    for fine in [json!([]), json!(["/no/such/file", "/usr"]), json!(null)] {
        mount(fine).nothing();
        umount(&daemon, "/m").nothing();
    }
}

#[test]
fn backend_unreachable() {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let sources = [
        json!({"type": "registry", "registry": {"host": "127.0.0.1:1", "repo": "r"}}),
        json!({"type": "oss", "oss": {"endpoint": "127.0.0.1:1", "bucket_name": "b"}}),
        json!({"type": "s3", "s3": {"endpoint": "127.0.0.1:1", "region": "r", "bucket_name": "b"}}),
        json!({"type": "http-proxy", "http-proxy": {"addr": "http://127.0.0.1:1"}}),
    ];
    for (number, source) in sources.into_iter().enumerate() {
        let cache = image.cache().join(number.to_string());
        let config = json!({"version": 2, "backend": source,
            "cache": {"type": "filecache", "filecache": {"work_dir": cache}}, "rafs": {}});
        let mountpoint = format!("/m{number}");
        request(
            &daemon,
            "POST",
            &mountpoint,
            &image.bootstrap(),
            &config.to_string(),
        )
        .nothing();
    }
    assert_eq!(daemon.mountpoints().len(), 4);
    // It serves all that needs no data.
    assert!(boot(&daemon).resolve("/m0/usr/bin/tool").is_ok());
}

/// The incumbent has room for 255.
#[test]
fn more_than_256_mounts() {
    let (share, daemon) = directory();
    for number in 0..300 {
        daemon
            .mount_directory(&format!("/m{number}"), share.path())
            .nothing();
    }
    assert_eq!(daemon.mountpoints().len(), 300);
    assert_eq!(boot(&daemon).read_file("/m299/file").unwrap(), b"data");
}

#[test]
fn remount() {
    let (image, daemon) = (Image::build(), Daemon::start(&[]));
    let (bootstrap, config) = (image.bootstrap(), image.config());
    request(&daemon, "POST", "/m", &bootstrap, &config).nothing();
    let guest = boot(&daemon);
    let inode = || {
        guest
            .getattr(guest.resolve("/m/usr/bin/tool").unwrap().nodeid)
            .unwrap()
            .ino
    };
    let before = inode();
    request(&daemon, "PUT", "/m", &bootstrap, &config).nothing();
    assert_eq!(inode(), before);
    assert_eq!(guest.read_file("/m/hello").unwrap(), b"hello");
    let message = request(&daemon, "PUT", "/x", &bootstrap, &config).error(500);
    assert!(
        message.contains("object or filesystem doesn't exist"),
        "{message}"
    );
    daemon.mount_directory("/d", daemon.dir.path()).nothing();
    let message = request(&daemon, "PUT", "/d", &bootstrap, &config).error(500);
    assert!(message.contains("type mismatch"), "{message}");
}

#[test]
fn umount_unknown_twice_or_prefix_only() {
    let (share, daemon) = directory();
    daemon.mount_directory("/a/b", share.path()).nothing();
    for unknown in ["/never", "/a", "/a/b/c"] {
        let message = umount(&daemon, unknown).error(500);
        assert!(
            message.contains("object or filesystem doesn't exist"),
            "{message}"
        );
    }
    umount(&daemon, "/a/b").nothing();
    umount(&daemon, "/a/b").error(500);
}

#[test]
fn umount_while_the_guest_is_using_the_tree() {
    let scene = Scene::start(&[]);
    scene
        .daemon
        .mount_directory("/rafs/c9", scene.share.path())
        .nothing();
    scene.registry.set(|fault| fault.stalled = true);
    let guest = scene.boot();
    let (open, hello) = (
        guest.resolve("/rafs/c9/file").unwrap().nodeid,
        guest.resolve("/m/hello").unwrap().nodeid,
    );
    let handle = guest.open(open, 0).unwrap();
    let waiting = guest.submit(&ops::read(hello, 0, 0, 5)).unwrap();
    eventually("waiting", || scene.get("/api/rafsd/v1/requests") != json!([]));
    for mountpoint in ["/rafs/c9", "/m"] {
        umount(&scene.daemon, mountpoint).nothing();
    }
    // What waited is answered, what was open is gone, and of the path nothing stays.
    guest.wait(waiting).unwrap().ok().unwrap_err();
    guest.read(open, handle, 0, 4).unwrap_err();
    guest.resolve("/rafs").unwrap_err();
}

#[test]
fn visibility() {
    let (share, daemon) = directory();
    let guest = boot(&daemon);
    guest.resolve("/late").unwrap_err();
    daemon.mount_directory("/late/mount", share.path()).nothing();
    assert_eq!(guest.read_file("/late/mount/file").unwrap(), b"data");
    // No guest keeps what it knows of the directories that lead to mounts.
    let entry = guest.resolve("/late").unwrap();
    assert_eq!(entry.entry_valid, (0, 0));
}
