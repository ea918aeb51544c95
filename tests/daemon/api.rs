//! Mounts over the API of the real daemon.

use super::process::Daemon;

#[test]
fn daemon_info_of_an_empty_daemon() {
    let daemon = Daemon::start(&["--id", "i1", "--supervisor", "/sup"]);
    let info = daemon.ask("GET", "/api/v1/daemon", "").json();
    assert_eq!(
        (info["state"].as_str(), info["id"].as_str()),
        (Some("RUNNING"), Some("i1"))
    );
    assert_eq!(info["supervisor"], "/sup");
    for member in ["package_ver", "git_commit", "build_time", "profile", "rustc"] {
        assert!(
            info["version"][member]
                .as_str()
                .is_some_and(|text| !text.is_empty()),
            "{member}"
        );
    }
    assert_eq!(info["backend_collection"], serde_json::json!({}));
}

#[test]
fn directories_are_mounted_and_unmounted() {
    let daemon = Daemon::start(&[]);
    let share = tempfile::tempdir().unwrap();
    daemon.mount_directory("%2Fcontainers", share.path()).nothing();
    let info = daemon.ask("GET", "/api/v1/daemon", "").json();
    let shown = &info["backend_collection"]["/containers"];
    assert_eq!(
        (shown["backend_type"].as_str(), shown["config"].is_null()),
        (Some("PassthroughFs"), true)
    );
    assert!(shown["mounted_time"].as_str().unwrap().ends_with(" +00:00:00"));
    let message = daemon.mount_directory("/containers", share.path()).error(500);
    assert!(
        message.contains("object or filesystem already exists"),
        "{message}"
    );
    // Below an existing mount, and with a trailing slash.
    daemon
        .mount_directory("/containers/deep/er/", share.path())
        .nothing();
    assert_eq!(daemon.mountpoints(), ["/containers", "/containers/deep/er"]);
    for mountpoint in ["/containers/deep/er", "/containers"] {
        daemon
            .ask("DELETE", &format!("/api/v1/mount?mountpoint={mountpoint}"), "")
            .nothing();
    }
    for gone in ["/containers", "/containers/deep", "/never"] {
        let message = daemon
            .ask("DELETE", &format!("/api/v1/mount?mountpoint={gone}"), "")
            .error(500);
        assert!(
            message.contains("object or filesystem doesn't exist"),
            "{message}"
        );
    }
    daemon.mount_directory("/", share.path()).nothing();
    daemon.mount_directory("/", share.path()).error(500);
    daemon.terminate();
}

#[test]
fn refused_mounts_leave_nothing() {
    let daemon = Daemon::start(&[]);
    let share = tempfile::tempdir().unwrap();
    let missing = share.path().join("missing");
    let message = daemon.mount_directory("/a", &missing).error(500);
    assert!(
        message.contains("No such file or directory") && message.contains("missing"),
        "{message}"
    );
    for mountpoint in ["", "relative", "/a/../b", "/a/./b"] {
        assert!(
            daemon
                .mount_directory(mountpoint, share.path())
                .error(500)
                .contains("mountpoint")
        );
    }
    let post = |body: serde_json::Value| daemon.ask("POST", "/api/v1/mount?mountpoint=/a", &body.to_string());
    let source = share.path();
    for fs_type in ["bogus", "", "RAFS", "Passthrough_fs"] {
        let body = serde_json::json!({"fs_type": fs_type, "source": source, "config": ""});
        assert!(
            post(body)
                .error(500)
                .contains("only 'rafs' and 'passthrough_fs' are supported")
        );
    }
    let rafs = |config: &str| {
        post(serde_json::json!({"fs_type": "rafs", "source": missing, "config": config})).error(500)
    };
    assert!(rafs("{").contains("failed to parse configuration information"));
    assert!(rafs("{\"version\":2}").contains("backend is missing"));
    assert_eq!(daemon.mountpoints().len(), 0);
    // The place is free again after every failure.
    daemon.mount_directory("/a", share.path()).nothing();
}

#[test]
fn remounting_a_directory_is_a_type_mismatch() {
    let daemon = Daemon::start(&[]);
    let share = tempfile::tempdir().unwrap();
    daemon.mount_directory("/d", share.path()).nothing();
    let body = serde_json::json!({"fs_type": "passthrough_fs", "source": share.path(), "config": ""});
    let put = |at: &str| {
        daemon.ask(
            "PUT",
            &format!("/api/v1/mount?mountpoint={at}"),
            &body.to_string(),
        )
    };
    assert!(put("/d").error(500).contains("type mismatch"));
    assert!(
        put("/x")
            .error(500)
            .contains("object or filesystem doesn't exist")
    );
    let message = daemon
        .ask("GET", "/api/v1/daemon/backend?mountpoint=/d", "")
        .error(500);
    assert!(
        message.contains("filesystem type mismatch, expect RAFS"),
        "{message}"
    );
}

#[test]
fn start_in_running_is_refused() {
    let message = Daemon::start(&[])
        .ask("PUT", "/api/v1/daemon/start", "")
        .error(400);
    assert!(message.contains("UnexpectedEvent(\"Start\")"));
}

#[test]
fn of_many_mounts_at_one_place_one_wins() {
    let daemon = Daemon::start(&[]);
    let share = tempfile::tempdir().unwrap();
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|_| scope.spawn(|| daemon.mount_directory("/one", share.path()).status))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(
        statuses.iter().filter(|status| **status == 204).count(),
        1,
        "{statuses:?}"
    );
    assert_eq!(daemon.mountpoints(), ["/one"]);
}

#[test]
fn a_directory_can_be_mounted_at_the_start() {
    let share = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&["--shared-dir", share.path().to_str().unwrap(), "-m", "/host"]);
    assert_eq!(daemon.mountpoints(), ["/host"]);
}

#[test]
fn errors_are_kept_for_the_events() {
    let events = Daemon::start(&[]).ask("GET", "/api/v1/daemon/events", "").json();
    assert_eq!(
        events,
        serde_json::json!({"max_errors": 500, "total_errors": 0, "max_size": 51200, "total_size": 0, "errors": []})
    );
}
