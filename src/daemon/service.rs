//! What a service manager expects: sockets that it passes, a word when the daemon serves, a file with the process id.

use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use super::inherited;
use crate::error::Error;

/// Number of the first passed descriptor.
const FIRST: i32 = 3;
/// Descriptors that are looked at.
const MOST: i32 = 16;

/// Sockets that systemd passed (`sd_listen_fds`): the one named `api` is the API's, the first other one the device's.
#[derive(Debug, Default)]
pub struct PassedSockets {
    pub device: Option<UnixListener>,
    pub api: Option<UnixListener>,
}

impl PassedSockets {
    /// Takes what the environment announces for this process.
    ///
    /// # Errors
    ///
    /// Something else than a listening Unix socket was passed, or more than two.
    pub fn take() -> Result<Self, Error> {
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        let mut passed = Self::default();
        if variable("LISTEN_PID") != std::process::id().to_string() {
            return Ok(passed);
        }
        let count = variable("LISTEN_FDS").parse::<i32>().unwrap_or_default();
        let names = variable("LISTEN_FDNAMES");
        let mut names = names.split(':');
        for number in FIRST..FIRST + count.clamp(0, MOST) {
            let place = match names.next() {
                Some("api") => &mut passed.api,
                _ => &mut passed.device,
            };
            let listener = inherited::listener(number)?;
            if place.replace(listener).is_some() {
                return Err(Error::Socket {
                    path: format!("descriptor {number}"),
                    reason: "one vhost-user socket and one named `api` can be passed".into(),
                });
            }
        }
        Ok(passed)
    }
}

/// The service manager, if there is one that wants to be told (`sd_notify`).
#[derive(Debug)]
pub struct Manager(Option<UnixDatagram>);

impl Manager {
    /// The one that the environment names.
    pub fn of_environment() -> Self {
        let path = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty());
        Self(path.and_then(|path| {
            connect(Path::new(&path))
                .inspect_err(|error| {
                    tracing::warn!("service manager at {}: {error}", Path::new(&path).display());
                })
                .ok()
        }))
    }

    /// Tells it.
    pub fn tell(&self, state: &str) {
        if let Some(socket) = &self.0
            && let Err(error) = socket.send(state.as_bytes())
        {
            tracing::warn!("cannot tell the service manager: {error}");
        }
    }
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let bytes = path.as_os_str().as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// A file with the process id. Dropping it removes the file.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
}

impl PidFile {
    /// Writes the file; it appears complete.
    ///
    /// # Errors
    ///
    /// It could not be written.
    pub fn write(path: &Path) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::Start(format!("pid file {}: {error}", path.display()));
        let path = std::path::absolute(path).map_err(failed)?;
        let mut beside = path.clone().into_os_string();
        beside.push(format!(".{}", std::process::id()));
        fs::write(&beside, format!("{}\n", std::process::id())).map_err(failed)?;
        fs::rename(&beside, &path).map_err(|error| {
            // What could not be moved must not stay.
            let _ = fs::remove_file(&beside);
            failed(error)
        })?;
        Ok(Self { path })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // By the call that the main thread's filter knows.
        let _ = rustix::fs::unlinkat(rustix::fs::CWD, &self.path, rustix::fs::AtFlags::empty());
    }
}
