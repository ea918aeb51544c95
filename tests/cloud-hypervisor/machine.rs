//! The program `cloud-hypervisor` with a Linux guest on a daemon of its own.
//!
//! The guest takes its commands through the directory that the device shows, so it needs nothing else of the machine: a
//! request that is lost shows as a command that does not end.

use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rafsd_frontend::daemon::Daemon;
use rafsd_frontend::http;
use rafsd_guest::cpio::Archive;
use rafsd_guest::guest::{COMMAND_LINE, emulator};
use rafsd_guest::kernel::Kernel;
use rafsd_guest::{Cache, initrd};

use crate::twins::{self, RAFSD};

/// Any command of a guest ends within this time.
const PATIENCE: Duration = Duration::from_secs(300);
const INIT: &str = include_str!("guest-init.sh");
/// What the guest's kernel has as modules.
const MODULES: [&str; 2] = ["virtio_pci", "virtiofs"];

/// Why the program cannot be run here, or where it is.
fn program() -> Result<PathBuf, String> {
    let named = std::env::var_os("CLOUD_HYPERVISOR").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join("cloud-hypervisor"));
    let program = named
        .into_iter()
        .chain(found)
        .find(|path| path.is_file())
        .ok_or("cloud-hypervisor is neither in CLOUD_HYPERVISOR nor in PATH")?;
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("/dev/kvm is not usable: {error}"))?;
    Ok(program)
}

/// Kernel and initial RAM disk; the latter lies in `directory`.
fn guest_files(directory: &Path) -> (PathBuf, PathBuf) {
    let cache = Cache::open().unwrap();
    let kernel = Kernel::of_this_release(&cache).unwrap();
    let modules = kernel.modules().unwrap();
    let path = directory.join("initrd");
    let mut archive = Archive::new(BufWriter::new(fs::File::create(&path).unwrap()));
    for name in ["bin", "dev", "modules"] {
        archive.directory(name).unwrap();
    }
    archive.character_device("dev/console", 5, 1).unwrap();
    let busybox = fs::read(initrd::busybox(&cache).unwrap()).unwrap();
    archive.file("bin/busybox", 0o755, &busybox).unwrap();
    archive.symlink("bin/sh", "busybox").unwrap();
    archive.file("init", 0o755, INIT.as_bytes()).unwrap();
    let mut list: Vec<String> = Vec::new();
    for module in MODULES.iter().flat_map(|name| modules.closure(name).unwrap()) {
        if !list.contains(&module.name) {
            let file = format!("modules/{}.ko", module.name);
            archive.file(&file, 0o644, &module.bytes).unwrap();
            list.push(module.name);
        }
    }
    archive
        .file("modules/boot", 0o644, (list.join("\n") + "\n").as_bytes())
        .unwrap();
    archive.finish().unwrap().into_inner().unwrap();
    (kernel.image(), path)
}

/// A command that was given to the guest.
pub struct Job(u32);

/// A running machine; it is killed when this is dropped.
pub struct Machine {
    monitor: Child,
    daemon: Option<Daemon>,
    shared: PathBuf,
    jobs: u32,
    snapshots: u32,
}

impl Machine {
    /// Starts the program for the test `name`; none, with a word to the reader, if that cannot be done here.
    pub fn start(name: &str) -> Option<Self> {
        let program = match program() {
            Ok(program) => program,
            Err(reason) => {
                eprintln!("SKIPPED cloud-hypervisor {name}::real: {reason}");
                return None;
            }
        };
        Some(Self::start_with(|directory, socket| {
            let (kernel, initrd) = guest_files(directory);
            let mut command = Command::new(program);
            command.arg("--api-socket").arg(api(directory));
            command.arg("--kernel").arg(kernel).arg("--initramfs").arg(initrd);
            command.args(["--cmdline", "console=ttyS0 rdinit=/init quiet"]);
            command.args([
                "--cpus",
                "boot=2",
                "--memory",
                "size=512M,shared=on,hotplug_size=1G",
            ]);
            let device = format!(
                "tag=shared,socket={},num_queues=1,queue_size=1024",
                socket.display()
            );
            command.args(["--fs", &device, "--console", "off"]);
            let serial = directory.join("serial");
            command.args(["--serial", &format!("file={}", serial.display())]);
            command
        }))
    }

    fn start_with(command: impl FnOnce(&Path, &Path) -> Command) -> Self {
        let (daemon, shared) = twins::daemon();
        fs::create_dir(shared.join(".run")).unwrap();
        let monitor = spawn(command(daemon.directory(), &daemon.socket));
        let machine = Self {
            monitor,
            daemon: Some(daemon),
            shared,
            jobs: 0,
            snapshots: 0,
        };
        machine.wait("the guest to boot", || machine.boots() > 0);
        machine
    }

    fn directory(&self) -> PathBuf {
        self.shared.parent().unwrap().to_owned()
    }

    /// The directory that the device shows.
    pub fn shared(&self) -> PathBuf {
        self.shared.clone()
    }

    /// How often the guest has booted.
    pub fn boots(&self) -> usize {
        let text = fs::read_to_string(self.shared.join(".run/boots")).unwrap_or_default();
        text.lines().count()
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(
                start.elapsed() < PATIENCE,
                "no end of waiting for {what}\n{}",
                self.serial()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn serial(&self) -> String {
        fs::read_to_string(self.directory().join("serial")).unwrap_or_default()
    }

    fn file(&self, job: u32, ending: &str) -> PathBuf {
        self.shared.join(format!(".run/{job}.{ending}"))
    }

    /// Has the guest start a script.
    pub fn begin(&mut self, script: &str) -> Job {
        self.jobs += 1;
        fs::write(self.file(self.jobs, "sh"), script).unwrap();
        fs::write(self.file(self.jobs, "go"), "").unwrap();
        Job(self.jobs)
    }

    /// Waits for a script, which must succeed; its output.
    pub fn finish(&mut self, Job(job): Job) -> String {
        let status = self.file(job, "status");
        self.wait("a command of the guest", || status.exists());
        let text = fs::read_to_string(self.file(job, "out")).unwrap();
        assert_eq!(fs::read_to_string(status).unwrap(), "0\n", "{text}");
        text
    }

    /// Runs a script in the guest.
    pub fn run(&mut self, script: &str) -> String {
        let job = self.begin(script);
        self.finish(job)
    }

    /// Asks the program for something; its status.
    pub fn try_ask(&mut self, what: &str, body: &str) -> u16 {
        let body = Some(body).filter(|body| !body.is_empty());
        let target = format!("/api/v1/vm.{what}");
        http::request(&api(&self.directory()), "PUT", &target, body).map_or(0, |answer| answer.status)
    }

    /// Asks the program for something that must go well.
    pub fn ask(&mut self, what: &str, body: &str) {
        let status = self.try_ask(what, body);
        assert!((200..300).contains(&status), "{what}: {status}");
    }

    /// Reboots the guest, which must come back.
    pub fn reboot(&mut self) {
        let boots = self.boots();
        self.ask("reboot", "");
        self.wait("another boot", || self.boots() > boots);
        // What the guest had not finished it takes for done.
        for job in 1..=self.jobs {
            fs::write(self.file(job, "status"), "0\n").unwrap();
        }
    }

    /// Kills the daemon and starts it on the same socket.
    pub fn restart_daemon(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        let daemon = daemon.restart(RAFSD).unwrap();
        daemon.mount_passthrough("/", &self.shared).unwrap();
        self.daemon = Some(daemon);
    }

    /// Saves the paused machine; where to.
    pub fn snapshot(&mut self) -> PathBuf {
        self.snapshots += 1;
        let directory = self.directory().join(format!("snapshot-{}", self.snapshots));
        fs::create_dir(&directory).unwrap();
        let url = format!("file://{}", directory.display());
        let body = serde_json::json!({ "destination_url": url });
        self.ask("snapshot", &body.to_string());
        directory
    }

    /// Ends the machine and makes another one of what was saved.
    pub fn restore(&mut self, snapshot: &Path) {
        self.monitor.kill().unwrap();
        self.monitor.wait().unwrap();
        let _ = fs::remove_file(api(&self.directory()));
        let mut command = Command::new(program().unwrap());
        command.arg("--api-socket").arg(api(&self.directory()));
        command.args(["--restore", &format!("source_url=file://{}", snapshot.display())]);
        self.monitor = spawn(command);
        self.wait("the restored machine", || api(&self.directory()).exists());
        twins::until(|| match self.try_ask("resume", "") {
            200..300 => Ok(()),
            status => Err(format!("resume: {status}")),
        });
    }

    /// Ends machine and daemon; both must still be there.
    pub fn end(mut self) {
        assert!(
            self.monitor.try_wait().unwrap().is_none(),
            "the machine has ended"
        );
        let mut daemon = self.daemon.take().unwrap();
        assert!(daemon.is_alive());
        self.monitor.kill().unwrap();
        self.monitor.wait().unwrap();
        let (status, _) = daemon.terminate(Duration::from_secs(20)).unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended; it is gone afterwards.
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

fn api(directory: &Path) -> PathBuf {
    directory.join("machine.sock")
}

fn spawn(mut command: Command) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The guest itself, proven where the program cannot be run: under an emulator.
#[test]
fn the_guest_takes_commands() {
    let mut machine = Machine::start_with(|directory, socket| {
        let (kernel, initrd) = guest_files(directory);
        let mut command = emulator(512);
        let serial = format!("file:{}", directory.join("serial").display());
        command.args(["-serial", &serial]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        command.args(["-append", COMMAND_LINE]);
        let chardev = format!("socket,id=fs,path={}", socket.display());
        command.args(["-chardev", &chardev]);
        command.args([
            "-device",
            "vhost-user-fs-pci,chardev=fs,tag=shared,queue-size=1024",
        ]);
        command
    });
    assert_eq!(machine.boots(), 1);
    assert_eq!(machine.run("echo one; echo two >&2"), "one\ntwo\n");
    let job = machine.begin("until [ -e /mnt/shared/enough ]; do usleep 10000; done; echo enough");
    assert_eq!(machine.run("echo beside it"), "beside it\n");
    fs::write(machine.shared().join("enough"), "").unwrap();
    assert_eq!(machine.finish(job), "enough\n");
    machine.end();
}
