//! Owns the parts; starts and stops them in order: INIT → READY → RUNNING → STOPPED.
//!
//! Both sockets are bound before anything else is done: runtimes look for the API socket at once and wait long
//! before they look again, and a machine monitor connects to the device once. Whatever connects early waits in the
//! queue of its socket. The API says RUNNING when the device listens; it does not wait for a front-end, because
//! runtimes mount before they start one.

mod footprint;
mod inherited;
mod service;
mod socket;

use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kata::api::{Scrape, Server};
use kata::config::{Backend, Config};
use kata::control::State;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::unbounded_channel;

use crate::cli::{Cli, VirtioFs};
use crate::config::{self, HostConfig};
use crate::control::{Call, DaemonControl, Identity, Instances};
use crate::error::Error;
use crate::fuse_dev::{FuseMount, MAX_LANES, PrivateSocket};
use crate::logging::{Log, LogFile};
use crate::mounts::Mounts;
use crate::sandbox::{Notice, Role, Sandbox, Settings};
use crate::virtio::{Device, DeviceOptions};
use footprint::Footprint;
use socket::Socket;

/// How long the parts may take to stop.
const STOP: Duration = Duration::from_millis(900);

/// Descriptors that are left to the rest of the system.
const SPARE_FILES: u64 = 16_384;

/// Serves until a signal or the API ends it.
///
/// # Errors
///
/// The daemon could not start; then it has left nothing behind.
pub fn run(cli: Cli) -> Result<(), Error> {
    footprint::share_heaps();
    let listeners = Listeners::open(&cli)?;
    let log_file = open_log_file(&cli)?;
    let limit = raise_file_limit(cli.process.rlimit_nofile);
    let (sandbox, notices) = Sandbox::of_process(&settings(&cli))?;
    let (level, format) = (cli.process.log_level, cli.process.log_format);
    let log = Log::start(level, format, log_file, sandbox.clone())?;
    notices.iter().for_each(Notice::log);
    limit.into_iter().for_each(|line| tracing::info!("{line}"));
    let ended = serve(&cli, &log, &sandbox, listeners);
    log.flush();
    ended
}

/// What the daemon listens on, bound before anything else is done. Sockets that were passed have no file of ours.
struct Listeners {
    device: UnixListener,
    device_socket: Option<Socket>,
    /// Of FUSE mode: the device's socket, which nobody else knows.
    private: Option<PrivateSocket>,
    api: Option<(Option<Socket>, UnixListener)>,
    metrics: Option<TcpListener>,
}

impl Listeners {
    fn open(cli: &Cli) -> Result<Self, Error> {
        let mut passed = service::PassedSockets::take()?;
        let private = cli.serves_fuse().then(PrivateSocket::new).transpose()?;
        let (device_socket, device) = match &private {
            Some(private) => (None, private.listener()?),
            None => listen_for_device(&cli.virtiofs, &mut passed)?,
        };
        let api = match cli.process.apisock.as_deref() {
            Some(path) => {
                let (socket, listener) = Socket::listen(path, None)?;
                Some((Some(socket), listener))
            }
            None => passed.api.take().map(|listener| (None, listener)),
        };
        Ok(Self {
            device,
            device_socket,
            private,
            api,
            metrics: cli.process.metrics_address.map(listen_for_scrapers).transpose()?,
        })
    }
}

fn serve(cli: &Cli, log: &Log, sandbox: &Sandbox, listeners: Listeners) -> Result<(), Error> {
    let failed = |what: &str, error: &dyn std::fmt::Display| Error::Start(format!("{what}: {error}"));
    // Signals are caught from here on: an early one ends the daemon as soon as it has started.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(|error| failed("main loop", &error))?;
    let _guard = runtime.enter();
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| failed("SIGTERM", &error))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| failed("SIGINT", &error))?;
    let (caller, mut calls) = unbounded_channel();

    warn_of_options_without_effect(cli);
    let mounts = Arc::new(Mounts::new());
    let instances = Instances::new(
        HostConfig::new(&cli.virtiofs.virtiofsd).map_err(Error::Usage)?,
        config::headers_of_environment(),
        sandbox.clone(),
    );
    let identity = Identity {
        id: cli.process.id.clone(),
        supervisor: cli.process.supervisor.clone(),
    };
    let control = Arc::new(DaemonControl::new(
        mounts.clone(),
        instances,
        identity,
        log.clone(),
        caller,
    ));
    mount_at_start(&control, &cli.virtiofs)?;

    let options = DeviceOptions {
        request_queues: match cli.serves_fuse() {
            true => cli.fuse.fuse_threads.min(MAX_LANES),
            false => cli.virtiofs.request_queues,
        },
        locks: cli.virtiofs.virtiofsd.host_locks,
        security_labels: cli.virtiofs.virtiofsd.security_label,
        killpriv: cli.virtiofs.virtiofsd.killpriv_v2,
        posix_acl: cli.virtiofs.virtiofsd.posix_acl,
        sandbox: sandbox.clone(),
        ..DeviceOptions::default()
    };
    let device =
        Device::start(listeners.device, mounts, options).map_err(|error| failed("device", &error))?;
    control.set_requests(device.requests());
    let fuse = match (&listeners.private, &cli.fuse.mountpoint) {
        (Some(socket), Some(mountpoint)) => Some(FuseMount::start(
            mountpoint,
            socket,
            cli.fuse.fuse_threads,
            sandbox,
        )?),
        _ => None,
    };
    drop(listeners.private);
    control.set_state(State::Running);
    let (api_socket, server) = match listeners.api {
        Some((socket, listener)) => {
            let server = sandbox
                .within(Role::Api, || Server::start(listener, control.clone()))
                .flatten()
                .map_err(|error| failed("API", &error))?;
            (socket, Some(server))
        }
        None => (None, None),
    };
    let scrape = listeners
        .metrics
        .map(|listener| {
            sandbox
                .within(Role::Metrics, || Scrape::start(listener, control.clone()))
                .flatten()
        })
        .transpose()
        .map_err(|error| failed("metrics", &error))?;
    let pid_file = cli
        .process
        .pid_file
        .as_deref()
        .map(service::PidFile::write)
        .transpose()?;
    let manager = service::Manager::of_environment();
    manager.tell("READY=1");
    if fuse.is_none() {
        // virtiofsd says the same, and there are runtimes that wait for it.
        tracing::info!("Waiting for vhost-user socket connection...");
    }
    let footprint = Footprint::of_process();
    sandbox.enter(Role::Main);

    footprint.shrink();
    let reason = runtime.block_on(async {
        loop {
            tokio::select! {
                _ = terminate.recv() => break "SIGTERM",
                _ = interrupt.recv() => break "SIGINT",
                call = calls.recv() => match call {
                    Some(Call::Mounted) => footprint.shrink(),
                    Some(Call::Stop) | None => break "a request",
                },
            }
        }
    });
    tracing::info!("stopping because of {reason}");
    manager.tell("STOPPING=1");
    control.set_state(State::Stopped);
    drop((fuse, listeners.device_socket, api_socket, scrape, pid_file));
    stop_parts(device, server);
    Ok(())
}

/// Stops the parts side by side. What cannot be stopped in time ends with the process.
fn stop_parts(device: Device, server: Option<Server>) {
    let (done, finished) = std::sync::mpsc::channel();
    let spawn = |name: &str, stop: Box<dyn FnOnce() + Send>| {
        let done = done.clone();
        std::thread::Builder::new().name(name.into()).spawn(move || {
            stop();
            // The main thread may have given up.
            let _ = done.send(());
        })
    };
    let parts = [
        spawn("stop-device", Box::new(move || device.stop())),
        spawn(
            "stop-api",
            Box::new(move || server.map(Server::stop).unwrap_or_default()),
        ),
    ];
    let deadline = std::time::Instant::now() + STOP;
    for _ in parts.iter().filter(|part| part.is_ok()) {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if finished.recv_timeout(left).is_err() {
            tracing::warn!("parts did not stop within {} ms", STOP.as_millis());
            return;
        }
    }
}

fn listen_for_device(
    options: &VirtioFs,
    passed: &mut service::PassedSockets,
) -> Result<(Option<Socket>, UnixListener), Error> {
    if let Some(path) = &options.sock {
        let (socket, listener) = Socket::listen(path, options.virtiofsd.socket_group.as_deref())?;
        return Ok((Some(socket), listener));
    }
    match (options.fd, passed.device.take()) {
        (Some(fd), _) => Ok((None, inherited::listener(fd)?)),
        (None, Some(listener)) => Ok((None, listener)),
        (None, None) => Err(Error::Usage("no vhost-user socket was passed".into())),
    }
}

fn listen_for_scrapers(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).map_err(|error| Error::Socket {
        path: address.to_string(),
        reason: error.to_string(),
    })
}

fn open_log_file(cli: &Cli) -> Result<Option<LogFile>, Error> {
    let Some(path) = &cli.process.log_file else {
        return Ok(None);
    };
    LogFile::open(path, cli.process.log_rotation_size)
        .map(Some)
        .map_err(|error| Error::Start(format!("log file {}: {error}", path.display())))
}

fn warn_of_options_without_effect(cli: &Cli) {
    let unused = cli.without_effect();
    if !unused.is_empty() {
        tracing::warn!("accepted without effect: {}", unused.join(", "));
    }
}

fn settings(cli: &Cli) -> Settings {
    let given = &cli.virtiofs.virtiofsd;
    let capabilities = given.modcaps.unwrap_or_default();
    Settings {
        mode: given.sandbox,
        system_calls: given.seccomp,
        capabilities: match given.xattrmap {
            Some(_) => capabilities.without_trusted(),
            None => capabilities,
        },
        // Nobody else would see a mount in a table of our own, and the process has to take it away at its end.
        mounts_on_host: cli.serves_fuse(),
    }
}

/// Best effort: in a plain container the limit cannot be raised, and few files may be enough. Returns what to tell if
/// it was not raised.
fn raise_file_limit(wanted: u64) -> Option<String> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    if wanted == 0 {
        return None;
    }
    let system = std::fs::read_to_string("/proc/sys/fs/file-max").ok();
    let system = system
        .and_then(|text| text.trim().parse::<u64>().ok())
        .unwrap_or(u64::MAX);
    let wanted = wanted.min(system.saturating_sub(SPARE_FILES)).min(1_000_000);
    let present = getrlimit(Resource::Nofile);
    let unlimited = u64::MAX;
    if present.current.unwrap_or(unlimited) >= wanted {
        return None;
    }
    let raise = |current: u64, maximum: Option<u64>| {
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(current),
                maximum,
            },
        )
    };
    let hard = present.maximum.unwrap_or(unlimited);
    if hard >= wanted {
        let error = raise(wanted, present.maximum).err()?;
        Some(format!(
            "open files: the limit stays at {:?}: {error}",
            present.current
        ))
    } else {
        raise(wanted, Some(wanted)).err()?;
        let limit = raise(hard, Some(hard)).map_or(present.current.unwrap_or(hard), |()| hard);
        Some(format!(
            "open files: limited to {limit}, {wanted} would need CAP_SYS_RESOURCE"
        ))
    }
}

/// Mounts what the command line asks for.
fn mount_at_start(control: &DaemonControl, options: &VirtioFs) -> Result<(), Error> {
    let refused = |error: &dyn std::fmt::Display| Error::Start(error.to_string());
    let mountpoint = &options.virtual_mountpoint;
    if let Some(directory) = &options.shared_dir {
        let directory = absolute(directory)?;
        return control
            .mount_directory(mountpoint, &directory, "")
            .map_err(|error| refused(&error));
    }
    let Some(bootstrap) = &options.bootstrap else {
        return Ok(());
    };
    let mut config = match (&options.config, &options.localfs_dir) {
        (Some(path), _) => {
            let parsed = Config::from_file(path).map_err(|error| refused(&error))?;
            if !parsed.unknown.is_empty() {
                let unknown = parsed.unknown.join(", ");
                tracing::warn!("{}: unknown keys are ignored: {unknown}", path.display());
            }
            parsed.config
        }
        (None, Some(directory)) => Config::local_directory(&absolute(directory)?),
        (None, None) => return Err(refused(&"--bootstrap needs --config or --localfs-dir")),
    };
    if let (Some(auth), Some(Backend::Registry(registry))) =
        (config::auth_of_environment(), &mut config.backend)
    {
        registry.auth = Some(auth);
    }
    let prefetch_files = match &options.prefetch_files {
        Some(path) => read_prefetch_list(path)?,
        None => Vec::new(),
    };
    control
        .mount_image(mountpoint, &absolute(bootstrap)?, config, prefetch_files)
        .map_err(|error| refused(&error))
}

fn absolute(path: &Path) -> Result<String, Error> {
    let absolute =
        std::path::absolute(path).map_err(|error| Error::Start(format!("{}: {error}", path.display())))?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|path| Error::Start(format!("{}: not valid UTF-8", Path::new(&path).display())))
}

/// One path a line; blank lines mean nothing.
fn read_prefetch_list(path: &Path) -> Result<Vec<String>, Error> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::Start(format!("prefetch list {}: {error}", path.display())))?;
    Ok(text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect())
}
