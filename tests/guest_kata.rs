//! The life of a sandbox as each of the two runtimes makes it, with a real guest: start, passthrough, ten containers that come and
//! go with bind mounts made later, and an end that leaves nothing.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::image::busybox_tree;
use rafsd_guest::{Boot, Cache, Daemon, Image, Registry, config};

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const RAFS: &str = env!("CARGO_BIN_EXE_rafs");

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}

/// The directories that a runtime shares. Dropping them takes the mounts away.
struct Share {
    /// Where the runtime puts things.
    writable: PathBuf,
    /// What the daemon is given.
    source: PathBuf,
    mounted: Vec<PathBuf>,
}

impl Share {
    /// The Go runtime gives the daemon a read-only view that follows; runtime-rs the writable side itself.
    fn make(directory: &Path, read_only_view: bool) -> Self {
        let writable = directory.join("mounts");
        fs::create_dir_all(&writable).unwrap();
        let mut share = Self {
            source: writable.clone(),
            writable,
            mounted: Vec::new(),
        };
        let path = share.writable.clone();
        share.bind(&path.clone(), &path);
        run("mount", &["--make-shared", path.to_str().unwrap()]);
        if read_only_view {
            let view = directory.join("shared");
            fs::create_dir_all(&view).unwrap();
            share.bind(&path, &view);
            run("mount", &["--make-slave", view.to_str().unwrap()]);
            run("mount", &["-o", "remount,bind,ro", view.to_str().unwrap()]);
            share.source = view;
        }
        share
    }

    fn bind(&mut self, from: &Path, to: &Path) {
        run("mount", &["--bind", from.to_str().unwrap(), to.to_str().unwrap()]);
        self.mounted.push(to.to_owned());
    }

    /// As the runtime does: lazily, for the guest may still hold files.
    fn unbind(&mut self, path: &Path) {
        run("umount", &["-l", path.to_str().unwrap()]);
        self.mounted.retain(|mounted| mounted != path);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        for path in self.mounted.iter().rev() {
            let _ = Command::new("umount").arg("-l").arg(path).status();
        }
    }
}

fn timeline(runtime: &str, arguments: &[&str], read_only_view: bool) {
    let cache = Cache::open().unwrap();
    let directory = scratch(&cache).unwrap();
    let at = |name: &str| directory.path().join(name);
    let store = at("store");
    let image = Image::build(Path::new(RAFS), &busybox_tree(&cache).unwrap(), &store).unwrap();
    let registry = Registry::start(Path::new(RAFS), &store, Duration::ZERO).unwrap();
    let config = config::of_registry(registry.address(), &at("cache"));
    let mut share = Share::make(directory.path(), read_only_view);

    let begun = Instant::now();
    let daemon = Daemon::start_with(Path::new(RAFSD), arguments).unwrap();
    println!("{runtime}: ready after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(10), "the runtime gives up");
    daemon.mount_passthrough("/containers", &share.source).unwrap();
    let mut guest = Boot::new(&cache)
        .unwrap()
        .device(&daemon.socket())
        .start()
        .unwrap();
    guest.mount_device().unwrap();

    for number in 0..10 {
        let name = format!("c{number}");
        let (lower, snapshot) = (format!("/rafs/{name}/lowerdir"), at(&format!("snapshots/{name}")));
        for part in ["fs", "work"] {
            fs::create_dir_all(snapshot.join(part)).unwrap();
        }
        daemon.mount_image(&lower, &image.bootstrap, &config).unwrap();
        let place = share.writable.join(&name).join("snapshotdir");
        fs::create_dir_all(&place).unwrap();
        fs::create_dir_all(share.writable.join(&name).join("rootfs")).unwrap();
        share.bind(&snapshot, &place);
        let here = format!("{SHARED}/containers/{name}");
        guest
            .check(&format!(
                "mkdir -p /run/{name} && mount -t overlay overlay -o \
                 lowerdir={SHARED}{lower},upperdir={here}/snapshotdir/fs,workdir={here}/snapshotdir/work,index=off /run/{name} && \
                 cat /run/{name}/etc/os-release && echo from-{name} > /run/{name}/written && rm /run/{name}/etc/os-release"
            ))
            .unwrap();
        assert_eq!(
            fs::read_to_string(snapshot.join("fs/written")).unwrap(),
            format!("from-{name}\n")
        );
        assert!(
            snapshot.join("fs/etc/os-release").symlink_metadata().is_ok(),
            "a whiteout"
        );
        if read_only_view {
            let refused = guest.run(&format!("touch {SHARED}/containers/new")).unwrap();
            assert_ne!(refused.status, 0, "the root of the share is read-only");
        }
        // The container ends.
        guest.check(&format!("umount /run/{name}")).unwrap();
        daemon.unmount(&lower).unwrap();
        share.unbind(&place);
        fs::remove_dir_all(share.writable.join(&name)).unwrap();
    }
    assert!(
        guest
            .check(&format!("ls {SHARED}/rafs 2>/dev/null || true"))
            .unwrap()
            .trim()
            .is_empty()
    );

    guest.kill().unwrap();
    let (socket, api) = (daemon.socket(), daemon.api_socket());
    let (status, took) = daemon.terminate().unwrap();
    assert!(status.success(), "{status}");
    println!("{runtime}: ended after {took:?}");
    assert!(!socket.exists() && !api.exists());
    assert_eq!(fs::read_dir(&share.writable).unwrap().count(), 0);
    drop(share);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains(directory.path().to_str().unwrap()),
        "a mount is left behind"
    );
}

/// The other order of the same steps; in `make test-guest-full`.
#[test]
#[ignore = "a second guest takes long"]
fn a_sandbox_of_the_go_runtime() {
    timeline("Go", &[], true);
}

#[test]
fn a_sandbox_of_runtime_rs() {
    timeline("runtime-rs", &["--hybrid-mode"], false);
}
