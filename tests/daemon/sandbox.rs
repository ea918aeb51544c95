//! What the running daemon has been left: capabilities, namespaces, filters.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use rafsd::sandbox::{Mode, Role, Sandbox, Settings, SystemCalls};
use rafsd_frontend::registry::{REPOSITORY, Registry};
use rafsd_frontend::{Guest, Options, ops};
use rustix::thread::CapabilitySet;
use serde_json::json;

use super::counters::{eventually, mount};
use super::images::Image;
use super::process::{Daemon, rafsd};

/// Fields of `/proc/PID/task/TID/status`, by the name of the thread.
pub fn threads(pid: u32) -> Vec<(String, BTreeMap<String, String>)> {
    let read = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("status")).ok()?;
        let fields = text.lines().filter_map(|line| line.split_once(":\t"));
        let fields: BTreeMap<_, _> = fields.map(|(name, value)| (name.into(), value.into())).collect();
        Some((fields.get("Name").cloned()?, fields))
    };
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.filter_map(|task| read(task.unwrap())).collect()
}

fn capabilities(fields: &BTreeMap<String, String>, set: &str) -> CapabilitySet {
    CapabilitySet::from_bits_retain(u64::from_str_radix(&fields[set], 16).unwrap())
}

/// An image from a registry, a directory and a guest that has used both: every kind of thread is there.
fn busy() -> (Daemon, Guest, Registry, Image) {
    let image = Image::build();
    let registry = Registry::start(&image.blobs()).unwrap();
    let daemon = Daemon::start(&["--host-locks"]);
    let config = json!({"version": 2,
        "backend": {"type": "registry", "registry": {"scheme": "http", "host": registry.address.to_string(), "repo": REPOSITORY}},
        "cache": {"type": "filecache", "filecache": {"work_dir": image.cache()}}, "rafs": {}});
    mount(&daemon, "/image", &image, &config).nothing();
    let share = daemon.path("share");
    std::fs::create_dir(&share).unwrap();
    super::quota::mount(&daemon, "/share", &share);
    let guest = Guest::boot(daemon.path("vu.sock"), Options::default()).unwrap();
    assert_eq!(guest.read_file("/image/hello").unwrap(), b"hello");
    let directory = guest.resolve("/share").unwrap().nodeid;
    let file = guest.write_file(directory, "file", b"text").unwrap();
    let handle = guest.open(file.nodeid, 0).unwrap();
    guest.fsync(file.nodeid, handle).unwrap();
    (daemon, guest, registry, image)
}

#[test]
fn every_thread_has_given_up_what_it_does_not_need() {
    let (daemon, guest, _registry, _image) = busy();
    let needed = CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETUID
        | CapabilitySet::SETGID
        | CapabilitySet::MKNOD
        | CapabilitySet::SETFCAP
        | CapabilitySet::SYS_ADMIN;
    let own = rustix::thread::capabilities(None).unwrap().permitted;
    let mut seen = Vec::new();
    for (name, fields) in threads(daemon.child.id()) {
        let (effective, permitted) = (capabilities(&fields, "CapEff"), capabilities(&fields, "CapPrm"));
        let serves_no_files = [
            "log",
            "deadlines",
            "net",
            "decode-",
            "lock-wait",
            "mount-watch",
            "quota",
        ];
        let expected = match serves_no_files.iter().any(|start| name.starts_with(start)) {
            true => CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH,
            false => needed,
        };
        assert_eq!(effective, own & expected, "{name}");
        assert_eq!(permitted, own & expected, "{name}");
        assert_eq!(capabilities(&fields, "CapInh"), CapabilitySet::empty(), "{name}");
        assert_eq!(capabilities(&fields, "CapAmb"), CapabilitySet::empty(), "{name}");
        assert!(needed.contains(capabilities(&fields, "CapBnd")), "{name}");
        assert_eq!(fields["NoNewPrivs"], "1", "{name}");
        assert_eq!(fields["Seccomp"], "2", "{name}");
        assert!(fields["Seccomp_filters"].parse::<u32>().unwrap() >= 2, "{name}");
        seen.push(name);
    }
    for name in [
        "rafsd",
        "log",
        "deadlines",
        "vhost-user",
        "queue-hiprio",
        "queue-1",
        "worker-starter",
        "worker",
        "api",
        "api-worker",
        "net",
        "decode-0",
        "lock-wait",
        "mount-watch",
        "quota",
    ] {
        assert!(
            seen.iter().any(|other| other == name),
            "no thread {name}: {seen:?}"
        );
    }
    drop(guest);
    daemon.terminate();
}

#[test]
fn weakening_is_told_loudly() {
    let daemon = Daemon::start(&["--sandbox", "none", "--seccomp", "none"]);
    daemon.logs("SANDBOX WEAKENED: --sandbox none");
    daemon.logs("SANDBOX WEAKENED: --seccomp none");
    for (name, fields) in threads(daemon.child.id()) {
        assert_eq!(fields["Seccomp"], "0", "{name}");
        assert_eq!(fields["NoNewPrivs"], "1", "{name}");
    }
    daemon.terminate();
    let daemon = Daemon::start(&["--sandbox=chroot", "--seccomp=log", "--modcaps=-sys_admin:-mknod"]);
    daemon.logs("SANDBOX WEAKENED: --sandbox chroot");
    daemon.logs("SANDBOX WEAKENED: --seccomp log");
    for (_, fields) in threads(daemon.child.id()) {
        let bounding = capabilities(&fields, "CapBnd");
        assert!(!bounding.intersects(CapabilitySet::SYS_ADMIN | CapabilitySet::MKNOD));
    }
    daemon.terminate();
}

/// A mount namespace whose root is shared, as systemd makes it.
struct Host(Child);

impl Host {
    /// None, with a line that says so, where the tests have no right to make one.
    fn make(test: &str) -> Option<Self> {
        let mut host = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "shared",
                "sh",
                "-c",
                "echo ready; exec cat",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = host.stdout.as_mut().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        if line != "ready\n" {
            println!("SKIPPED: {test}: no mount namespace can be made here");
            let _ = host.wait();
            return None;
        }
        Some(Self(host))
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--mount", "--target", &self.0.id().to_string(), "--"])
            .arg(program);
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        assert!(
            self.command(program).args(arguments).status().unwrap().success(),
            "{program} {arguments:?}"
        );
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn mounts_of_the_host_appear_and_those_of_the_daemon_stay_its_own() {
    let Some(host) = Host::make("mounts_of_the_host_appear_and_those_of_the_daemon_stay_its_own") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    std::fs::create_dir_all(share.join("later")).unwrap();
    let (sock, api) = (dir.path().join("vu.sock"), dir.path().join("api.sock"));
    let mut child = host
        .command(env!("CARGO_BIN_EXE_rafsd"))
        .arg("--sock")
        .arg(&sock)
        .arg("--apisock")
        .arg(&api)
        .arg("--shared-dir")
        .arg(&share)
        .spawn()
        .unwrap();
    eventually("the daemon runs", || {
        super::process::ask(&api, "GET", "/api/v1/daemon", "").is_some()
    });
    let pid = child.id();
    let of = |pid: u32, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    for kind in ["mnt", "ipc"] {
        assert_ne!(of(pid, kind), of(host.0.id(), kind), "{kind}");
    }
    // Nothing of the daemon's table is shared with the host's.
    let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    for line in table.lines() {
        assert!(!line.contains(" shared:"), "{line}");
    }
    let proc = table
        .lines()
        .rfind(|line| line.split(' ').nth(4) == Some("/proc"))
        .unwrap();
    assert!(
        proc.contains("hidepid=") && proc.split(' ').nth(5).unwrap().starts_with("ro,"),
        "{proc}"
    );
    assert!(
        table
            .lines()
            .filter(|line| line.split(' ').nth(4).unwrap().starts_with("/sys"))
            .all(|line| line.split(' ').nth(5).unwrap().starts_with("ro,"))
    );

    let guest = Guest::boot(&sock, Options::default()).unwrap();
    assert_eq!(
        guest
            .list(guest.resolve("/later").unwrap().nodeid, true, 4096)
            .unwrap()
            .len(),
        2
    );
    let later = share.join("later");
    host.run("mount", &["-t", "tmpfs", "none", later.to_str().unwrap()]);
    host.run("touch", &[later.join("file").to_str().unwrap()]);
    eventually("the new mount is seen", || guest.resolve("/later/file").is_ok());
    // And it is let go of, so that the host can unmount the disk below it.
    host.run("umount", &["--lazy", later.to_str().unwrap()]);
    eventually("the mount is gone", || guest.resolve("/later/file").is_err());
    drop(guest);
    assert!(
        Command::new("kill")
            .arg(pid.to_string())
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(super::process::wait(&mut child).code(), Some(0));
    // The socket's directory was opened before the namespace was left.
    assert!(!sock.exists() && !api.exists());
}

#[test]
fn a_private_root_is_told_and_kept() {
    let line = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = line
        .lines()
        .rfind(|line| line.split(' ').nth(4) == Some("/"))
        .unwrap();
    let private = !root.contains(" shared:") && !root.contains(" master:");
    let daemon = Daemon::start(&[]);
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
    if private {
        assert!(daemon.logs("no mount namespace").contains("private"));
    }
    assert_eq!(of("self") == of(&daemon.child.id().to_string()), private);
    daemon.terminate();
}

#[test]
fn serves_as_an_unprivileged_user_with_relative_sockets() {
    const USER: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("share")).unwrap();
    for path in ["", "share"] {
        std::os::unix::fs::chown(dir.path().join(path), Some(USER), Some(USER)).unwrap();
    }
    let image = Image::build();
    let owned = Command::new("chown")
        .arg("-R")
        .arg(format!("{USER}:{USER}"))
        .arg(image.dir.path())
        .status();
    assert!(owned.unwrap().success());
    // The build may lie where only its owner can look.
    let program = dir.path().join("rafsd");
    std::fs::copy(env!("CARGO_BIN_EXE_rafsd"), &program).unwrap();
    let mut child = Command::new(&program)
        .args(["virtiofs", "--hybrid-mode", "--log-level", "info"])
        .args(["--apisock", "api.sock", "--sock", "vu.sock"])
        .current_dir(dir.path())
        .uid(USER)
        .gid(USER)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let api = dir.path().join("api.sock");
    eventually("the daemon runs", || {
        super::process::ask(&api, "GET", "/api/v1/daemon", "").is_some()
    });
    let mount = |mountpoint: &str, kind: &str, source: &Path, config: String| {
        let body = json!({"fs_type": kind, "source": source, "config": config});
        let target = format!("/api/v1/mount?mountpoint={mountpoint}");
        super::process::ask(&api, "POST", &target, &body.to_string())
            .unwrap()
            .nothing();
    };
    let share = dir.path().join("share");
    mount("/rw", "passthrough_fs", &share, String::new());
    let rules = json!({"translate_uid": [format!("map:1000:{USER}:1")], "translate_gid": [format!("map:1000:{USER}:1")],
        "quota": {"bytes": 1 << 20}});
    mount("/translated", "passthrough_fs", &share, rules.to_string());
    mount("/image", "rafs", &image.bootstrap(), image.config());
    let guest = Guest::boot(dir.path().join("vu.sock"), Options::default()).unwrap();
    let root = guest.resolve("/rw").unwrap().nodeid;
    guest.write_file(root, "file", b"text").unwrap();
    assert_eq!(guest.read_file("/rw/file").unwrap(), b"text");
    let made = std::fs::metadata(dir.path().join("share/file")).unwrap();
    assert_eq!((made.uid(), made.gid()), (USER, USER));
    assert!(
        guest
            .call(&ops::mkdir(root, "other", 0o755).by(1000, 1000))
            .is_err()
    );
    // The guest's user 1000 is the daemon's on the translated mount, and nobody else is anybody.
    let translated = guest.resolve("/translated").unwrap().nodeid;
    guest
        .call(&ops::mkdir(translated, "of-1000", 0o755).by(1000, 1000))
        .unwrap();
    let shown = guest.resolve("/translated/of-1000").unwrap().attr;
    assert_eq!((shown.uid, shown.gid), (1000, 1000));
    assert!(guest.call(&ops::mkdir(translated, "of-0", 0o755)).is_err());
    assert_eq!(guest.read_file("/image/hello").unwrap(), b"hello");
    for (name, fields) in threads(child.id()) {
        assert_eq!(capabilities(&fields, "CapPrm"), CapabilitySet::empty(), "{name}");
        assert_eq!(fields["Seccomp"], "2", "{name}");
    }
    drop(guest);
    assert!(
        Command::new("kill")
            .arg(child.id().to_string())
            .status()
            .unwrap()
            .success()
    );
    let status = super::process::wait(&mut child);
    let mut log = String::new();
    std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut log).unwrap();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(
        log.contains("no mount namespace: the daemon was started without CAP_SYS_ADMIN"),
        "{log}"
    );
}

#[test]
fn a_capability_that_does_not_exist_is_bad_usage() {
    let output = rafsd()
        .args(["--sock", "/nowhere/s", "--modcaps=+everything"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("everything"));
}

/// Tells the child below what to do.
const DEED: &str = "RAFSD_TEST_DEED";

/// Does one thing in a thread of one role, in a process of its own, and says how that ended.
fn deed(role: &str, what: &str, action: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "sandbox::in_a_process_of_its_own",
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env(DEED, format!("{role} {what} {action}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap()
}

#[test]
#[ignore = "run by the test below, in a process that it may end"]
fn in_a_process_of_its_own() {
    let text = std::env::var(DEED).unwrap();
    let [role, what, action] = text.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let system_calls = match action {
        "kill" => SystemCalls::Kill,
        "log" => SystemCalls::Log,
        _ => SystemCalls::None,
    };
    let settings = Settings {
        mode: Mode::Chroot,
        system_calls,
        ..Settings::default()
    };
    let (sandbox, _) = Sandbox::of_process(&settings).unwrap();
    let role = Role::ALL
        .into_iter()
        .find(|each| format!("{each:?}") == role)
        .unwrap();
    let what = what.to_owned();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            sandbox.enter(role);
            act(&what);
        });
    });
}

fn act(what: &str) {
    use rustix::net::{AddressFamily, SocketType, socket};
    match what {
        "nothing" => {}
        "program" => drop(Command::new("true").status()),
        "signal" => drop(rustix::process::kill_process(
            rustix::process::getpid(),
            rustix::process::Signal::CONT,
        )),
        "socket" => drop(socket(AddressFamily::UNIX, SocketType::STREAM, None)),
        "packet" => drop(socket(AddressFamily::PACKET, SocketType::DGRAM, None)),
        "listen" => drop(std::os::unix::net::UnixListener::bind("/nowhere/at/all")),
        "mount" => drop(rustix::mount::mount_change(
            "/",
            rustix::mount::MountPropagationFlags::PRIVATE,
        )),
        "chroot" => drop(rustix::process::chroot("/")),
        "user" => drop(rustix::thread::set_thread_res_uid(
            None,
            rustix::process::geteuid(),
            None,
        )),
        "thread" => std::thread::spawn(|| ()).join().unwrap(),
        "code" => drop(std::fs::File::open("/proc/self/exe").map(|file| map_executable(&file))),
        "tcp" => {
            let error = std::net::TcpStream::connect("127.0.0.1:9").unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        }
        "rename" => {
            // Landlock must not be in the way of moves between directories.
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("to")).unwrap();
            std::fs::write(dir.path().join("file"), "").unwrap();
            std::fs::rename(dir.path().join("file"), dir.path().join("to/file")).unwrap();
        }
        other => panic!("{other}"),
    }
}

fn map_executable(file: &std::fs::File) {
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    // SAFETY: the kernel chooses the place, and nothing is read from or run in the mapping.
    let mapped = unsafe {
        mmap(
            std::ptr::null_mut(),
            4096,
            ProtFlags::READ | ProtFlags::EXEC,
            MapFlags::PRIVATE,
            file,
            0,
        )
    };
    mapped.unwrap();
}

#[test]
fn a_forbidden_call_ends_the_process() {
    const SIGSYS: Option<i32> = Some(31);
    for (role, what) in [
        ("Queue", "program"),
        ("Queue", "signal"),
        ("Queue", "socket"),
        ("Queue", "mount"),
        ("Queue", "chroot"),
        ("Queue", "thread"),
        ("Queue", "code"),
        ("Worker", "socket"),
        ("Decode", "socket"),
        ("Decode", "user"),
        ("Net", "packet"),
        ("Net", "user"),
        ("Net", "program"),
        ("Api", "program"),
        ("Api", "mount"),
        ("Control", "socket"),
        ("Main", "program"),
        ("Log", "socket"),
        ("Helper", "thread"),
    ] {
        assert_eq!(deed(role, what, "kill").signal(), SIGSYS, "{role} {what}");
    }
    for (role, what) in [
        ("Queue", "nothing"),
        ("Queue", "user"),
        ("Queue", "rename"),
        ("Worker", "user"),
        ("Worker", "rename"),
        ("Net", "socket"),
        ("Net", "thread"),
        ("Net", "code"),
        ("Api", "thread"),
        ("Control", "thread"),
        ("Main", "thread"),
        ("WorkerStarter", "thread"),
    ] {
        assert_eq!(deed(role, what, "kill").code(), Some(0), "{role} {what}");
    }
    assert_eq!(deed("Queue", "socket", "log").code(), Some(0));
    assert_eq!(deed("Queue", "socket", "none").code(), Some(0));
}

#[test]
fn landlock_keeps_threads_without_network_from_connecting() {
    if !Path::new("/proc/self").exists() || landlock_version() < 4 {
        println!(
            "SKIPPED: landlock_keeps_threads_without_network_from_connecting: Landlock is older than version 4"
        );
        return;
    }
    // With the filters off, so that Landlock alone is in the way.
    for role in ["Queue", "Worker", "Decode", "Helper", "Log"] {
        assert_eq!(deed(role, "tcp", "none").code(), Some(0), "{role}");
    }
}

/// 0 where there is none.
fn landlock_version() -> i64 {
    const VERSION: u32 = 1;
    // SAFETY: with a null pointer and no size the call reads no memory; it answers with a number.
    unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            VERSION,
        )
    }
}
