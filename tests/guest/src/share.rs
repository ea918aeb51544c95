//! A guest whose device shows one directory of the host, served by `rafsd` or, for comparison, by `virtiofsd`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cache::workspace;
use crate::{Boot, Daemon, Guest};

/// A guest, and what serves the directory that it has at [`SHARED`](crate::guest::SHARED).
pub struct Share {
    /// Ends first: its device is served to the end.
    guest: Guest,
    server: Server,
}

enum Server {
    Rafsd(Daemon),
    Virtiofsd(#[expect(dead_code, reason = "held until the end")] Killed),
}

/// A process that ends with the value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Share {
    /// Serves `directory` with `rafsd`, started with these further arguments, and boots a guest with it.
    pub fn by_rafsd(rafsd: &Path, arguments: &[&str], directory: &Path, boot: &Boot) -> Result<Self> {
        let daemon = Daemon::start_with(rafsd, arguments)?;
        daemon.mount_passthrough("/", directory)?;
        let socket = daemon.socket();
        Self::boot(boot, &socket, Server::Rafsd(daemon))
    }

    /// The same with `virtiofsd`.
    pub fn by_virtiofsd(virtiofsd: &Path, directory: &Path, boot: &Boot) -> Result<Self> {
        let socket = directory.with_extension("virtiofsd");
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(virtiofsd)
            .arg("--socket-path")
            .arg(&socket)
            .arg("--shared-dir")
            .arg(directory)
            .args([
                "--sandbox=none",
                "--seccomp=none",
                "--xattr",
                "--announce-submounts",
                "--log-level=off",
            ])
            .spawn()
            .with_context(|| format!("start {}", virtiofsd.display()))?;
        let child = Killed(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "virtiofsd does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        Self::boot(boot, &socket, Server::Virtiofsd(child))
    }

    fn boot(boot: &Boot, socket: &Path, server: Server) -> Result<Self> {
        let mut guest = boot.clone().device(socket).start()?;
        guest.mount_device()?;
        Ok(Self { guest, server })
    }

    /// The guest.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    /// What the server has logged, if it is ours.
    #[must_use]
    pub fn log(&self) -> String {
        match &self.server {
            Server::Rafsd(daemon) => daemon.log(),
            Server::Virtiofsd(_) => String::new(),
        }
    }
}

/// Where `virtiofsd` is: `$VIRTIOFSD`, what `make peers` built, or Debian's package.
#[must_use]
pub fn virtiofsd() -> Option<PathBuf> {
    let given = std::env::var_os("VIRTIOFSD").map(PathBuf::from);
    let built = workspace().join("target/peers/bin/virtiofsd");
    given
        .into_iter()
        .chain([built, "/usr/libexec/virtiofsd".into()])
        .find(|program| program.is_file())
}

/// The directory with programs of others that make targets install, linked statically so that they run anywhere:
/// `target/posix/bin` or `$RAFSD_POSIX_PROGRAMS`. An error unless `program` is there.
pub fn program(program: &str) -> Result<PathBuf> {
    let directory = std::env::var_os("RAFSD_POSIX_PROGRAMS")
        .map_or_else(|| workspace().join("target/posix/bin"), PathBuf::from);
    let path = directory.join(program);
    ensure!(
        path.is_file(),
        "no {}: run make test-posix or make test-stress",
        path.display()
    );
    Ok(path)
}
