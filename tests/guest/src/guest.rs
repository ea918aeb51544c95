//! A running guest.
//!
//! QEMU emulates the processor (`-accel tcg`), so guests run anywhere. The processor model is chosen with care: QEMU
//! 7.2 corrupts flags around CMPXCHG16B, and a guest that does not see the instruction does not use it. With several
//! processors a guest may still panic now and then *while it boots*; such a boot is repeated. A panic later is a
//! finding and never repeated.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cache::Cache;
use crate::console::{Console, End, Output, Ticket};
use crate::initrd;
use crate::kernel::Kernel;

/// A boot takes 3 to 5 s on a free machine.
const PATIENCE_AT_BOOT: Duration = Duration::from_secs(300);

/// For commands without a limit of their own.
const PATIENCE: Duration = Duration::from_secs(180);

/// Where guests mount the device, as Kata's agent does.
pub const SHARED: &str = "/run/kata-containers/shared";

/// The tag under which guests see the device.
pub const TAG: &str = "kataShared";

/// What guests' kernels are told: where to write, what to start, and to leave out what an emulator gets wrong.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet nokaslr mitigations=off nowatchdog rdinit=/init";

/// QEMU with an emulated processor, no devices, and so much memory, which other processes can map as vhost-user wants it.
#[must_use]
pub fn emulator(memory_mib: u32) -> Command {
    // The guest goes when we go, however we go.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-machine", "pc", "-accel", "tcg", "-cpu", "Nehalem,-cx16"]);
    command.args(["-m", &format!("{memory_mib}M"), "-numa", "node,memdev=mem"]);
    let memory = format!("memory-backend-memfd,id=mem,size={memory_mib}M,share=on");
    command.args(["-object", &memory]);
    command
}

/// How to boot a guest.
#[derive(Clone, Debug)]
pub struct Boot {
    kernel: Kernel,
    initrd: PathBuf,
    memory_mib: u32,
    processors: u32,
    device: Option<PathBuf>,
    request_queues: u32,
    queue_size: u32,
    disks: Vec<PathBuf>,
}

impl Boot {
    /// A guest with one processor, 1 GiB and no device, running the kernel of this Debian release.
    pub fn new(cache: &Cache) -> Result<Self> {
        Self::with_kernel(cache, Kernel::of_this_release(cache)?)
    }

    /// The same with another kernel.
    pub fn with_kernel(cache: &Cache, kernel: Kernel) -> Result<Self> {
        let initrd = initrd::prepare(cache, &kernel)?;
        Ok(Self {
            kernel,
            initrd,
            memory_mib: 1024,
            processors: 1,
            device: None,
            request_queues: 1,
            queue_size: 1024,
            disks: Vec::new(),
        })
    }

    /// Adds the vhost-user file system device that listens on this socket.
    #[must_use]
    pub fn device(mut self, socket: &Path) -> Self {
        self.device = Some(socket.to_path_buf());
        self
    }

    /// Number of request queues and entries of each queue (1 and 1024 unless told).
    #[must_use]
    pub fn queues(mut self, request_queues: u32, queue_size: u32) -> Self {
        (self.request_queues, self.queue_size) = (request_queues, queue_size);
        self
    }

    /// Number of virtual processors.
    #[must_use]
    pub fn processors(mut self, processors: u32) -> Self {
        self.processors = processors;
        self
    }

    /// Adds a file as a read-only disk: the first is `/dev/vda` once the guest has run `load virtio_blk`.
    #[must_use]
    pub fn disk(mut self, file: &Path) -> Self {
        self.disks.push(file.to_path_buf());
        self
    }

    /// Boots, and returns when the guest takes commands.
    pub fn start(&self) -> Result<Guest> {
        const ATTEMPTS: u32 = 4;
        for _ in 0..ATTEMPTS {
            let guest = Guest::launch(self)?;
            match guest.console.wait_for_agent(PATIENCE_AT_BOOT)? {
                None => return Ok(guest),
                Some(End::Panic) => {}
                Some(End::Exit) => bail!("QEMU ended during boot: {}", guest.complaint()),
            }
        }
        bail!("the guest panicked in each of {ATTEMPTS} boots")
    }

    fn command(&self, sockets: &Path) -> Command {
        let mut command = emulator(self.memory_mib);
        command.args(["-smp", &self.processors.to_string(), "-serial", "stdio"]);
        command
            .arg("-kernel")
            .arg(self.kernel.image())
            .arg("-initrd")
            .arg(&self.initrd);
        command.args(["-append", COMMAND_LINE]);
        let socket = |name: &str| format!("socket,id={name},path={}", sockets.join(name).display());
        command.args(["-chardev", &socket("qmp"), "-mon", "chardev=qmp,mode=control"]);
        command.args(["-device", "virtio-serial-pci", "-chardev", &socket("agent")]);
        command.args(["-device", "virtserialport,chardev=agent,name=agent"]);
        if let Some(device) = &self.device {
            command
                .arg("-chardev")
                .arg(format!("socket,id=fs,path={}", device.display()));
            command.arg("-device").arg(format!(
                "vhost-user-fs-pci,chardev=fs,tag={TAG},num-request-queues={},queue-size={}",
                self.request_queues, self.queue_size
            ));
        }
        for (number, disk) in self.disks.iter().enumerate() {
            let file = disk.display();
            command.arg("-drive").arg(format!(
                "if=none,id=disk{number},format=raw,readonly=on,file={file}"
            ));
            command
                .arg("-device")
                .arg(format!("virtio-blk-pci,drive=disk{number}"));
        }
        command
    }
}

/// A guest that takes commands. Its QEMU is killed when this is dropped.
pub struct Guest {
    qemu: Child,
    console: Console,
    monitor: Monitor,
    directory: TempDir,
}

impl Guest {
    fn launch(boot: &Boot) -> Result<Self> {
        // Short: the path of a socket has at most 107 bytes.
        let directory = tempfile::Builder::new().prefix("guest-").tempdir()?;
        let listen = |name: &str| UnixListener::bind(directory.path().join(name)).context("listen for QEMU");
        let (qmp, agent) = (listen("qmp")?, listen("agent")?);
        let errors = std::fs::File::create(directory.path().join("stderr"))?;
        let mut qemu = boot
            .command(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .context("start setpriv and qemu-system-x86_64 (`make packages` installs what is needed)")?;
        let connected =
            accept(&mut qemu, &qmp).and_then(|qmp| Ok((accept(&mut qemu, &agent)?, Monitor::new(qmp)?)));
        let (agent, monitor) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                let said = std::fs::read_to_string(directory.path().join("stderr")).unwrap_or_default();
                return Err(error.context(format!("QEMU said: {}", said.trim())));
            }
        };
        let kernel = qemu.stdout.take().context("QEMU has no standard output")?;
        Ok(Self {
            console: Console::start(agent, kernel)?,
            qemu,
            monitor,
            directory,
        })
    }

    /// Runs a shell script in the guest and returns its status and output.
    pub fn run(&mut self, script: &str) -> Result<Output> {
        self.run_within(PATIENCE, script)
    }

    /// The same with a limit after which the script is killed.
    pub fn run_within(&mut self, limit: Duration, script: &str) -> Result<Output> {
        let ticket = self.console.start_script(script, limit)?;
        self.console
            .finish(&ticket)
            .with_context(|| format!("in the guest: {script}"))
    }

    /// Runs a shell script that must succeed and returns its output. The script ends at its first failing command.
    pub fn check(&mut self, script: &str) -> Result<String> {
        let done = self.run(&format!("set -e\n{script}"))?;
        ensure!(
            done.status == 0,
            "in the guest: {script}\nended with status {} and said:\n{}",
            done.status,
            done.text
        );
        Ok(done.text)
    }

    /// Starts a shell script and returns at once.
    pub fn start(&mut self, limit: Duration, script: &str) -> Result<Ticket> {
        self.console.start_script(script, limit)
    }

    /// Waits for a script that was started.
    pub fn finish(&self, ticket: &Ticket) -> Result<Output> {
        self.console.finish(ticket)
    }

    /// Whether a script that was started is still running.
    #[must_use]
    pub fn is_running(&self, ticket: &Ticket) -> bool {
        self.console.peek(ticket).is_none()
    }

    /// Mounts the device at [`SHARED`].
    pub fn mount_device(&mut self) -> Result<()> {
        self.check(&format!("mkdir -p {SHARED}; mount -t virtiofs {TAG} {SHARED}"))
            .map(drop)
    }

    /// What the kernel complained about so far: its console lines of level warning and worse.
    #[must_use]
    pub fn kernel_messages(&self) -> String {
        self.console.text()
    }

    /// Those of [`Guest::kernel_messages`] that speak of trouble with the kernel or with what the device serves.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let messages = self.kernel_messages();
        messages
            .lines()
            .filter(|line| is_complaint(line))
            .map(str::to_owned)
            .collect()
    }

    /// Stops the virtual processors.
    pub fn stop(&mut self) -> Result<()> {
        self.monitor.execute("stop").map(drop)
    }

    /// Lets the virtual processors run again.
    pub fn cont(&mut self) -> Result<()> {
        self.monitor.execute("cont").map(drop)
    }

    /// Resets the machine in whatever it is doing, and returns when the guest takes commands again.
    pub fn reset(&mut self) -> Result<()> {
        self.console.forget();
        self.monitor.execute("system_reset")?;
        match self.console.wait_for_agent(PATIENCE_AT_BOOT)? {
            None => Ok(()),
            Some(end) => bail!("{end:?} after a reset: {}", self.complaint()),
        }
    }

    /// Kills QEMU, as a crash or an impatient runtime would.
    pub fn kill(mut self) -> Result<()> {
        self.qemu.kill()?;
        self.qemu.wait()?;
        Ok(())
    }

    /// Powers the guest off in an orderly way and waits for QEMU to end.
    pub fn power_off(mut self) -> Result<()> {
        // No answer comes to this one.
        self.console.start_script("poweroff -f", PATIENCE)?;
        let deadline = Instant::now() + PATIENCE;
        while self.qemu.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "the guest does not power off");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn complaint(&self) -> String {
        let said = std::fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default();
        format!("{}\n{}", said.trim(), self.console.text())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended already; either way it is gone afterwards.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn is_complaint(line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    let about_us = [
        "overlayfs:",
        "fuse:",
        "virtiofs",
        "virtio_fs",
        "warning:",
        "bug:",
        "hung task",
        "blocked for more than",
        "call trace",
    ];
    // No trouble: the overlay is told not to use unnamed files (docs/fuse.md). Not about us: an emulator that was starved
    // of processor time during boot misses timer interrupts, which the kernel takes for a bug of the BIOS.
    let known = ["does not support tmpfile", "mp-bios bug"];
    about_us.iter().any(|words| line.contains(words)) && !known.iter().any(|words| line.contains(words))
}

/// Waits for QEMU to connect, as long as it runs.
fn accept(qemu: &mut Child, listener: &UnixListener) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Some(status) = qemu.try_wait()? {
                    bail!("QEMU ended before it connected ({status})");
                }
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// QEMU's machine protocol: one JSON value per line in each direction.
struct Monitor {
    lines: io::Lines<io::BufReader<UnixStream>>,
    stream: UnixStream,
}

impl Monitor {
    fn new(stream: UnixStream) -> Result<Self> {
        use io::BufRead as _;
        stream.set_read_timeout(Some(PATIENCE))?;
        let lines = io::BufReader::new(stream.try_clone()?).lines();
        let mut monitor = Self { lines, stream };
        monitor.execute("qmp_capabilities")?;
        Ok(monitor)
    }

    fn execute(&mut self, command: &str) -> Result<Value> {
        use io::Write as _;
        writeln!(self.stream, "{}", json!({ "execute": command }))?;
        // The greeting and events come in between.
        for line in self.lines.by_ref() {
            let message: Value = serde_json::from_str(&line.context("QEMU's monitor")?)?;
            if let Some(done) = message.get("return") {
                return Ok(done.clone());
            }
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
        }
        bail!("QEMU closed its monitor at {command}")
    }
}
