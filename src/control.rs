//! Fulfils [`kata::Control`]: wire request → mount specification → mount.
//!
//! The mount table of the device knows what the guest sees; this one knows what the runtime asked for. A
//! mountpoint is taken before its instance is built and given back if that fails, so that of two requests for the same
//! place one wins at once, and no lock is held while an image is opened.

mod counted;
mod counters;
mod exposition;
mod instance;
mod metrics;
mod operate;
mod paths;
mod prefetch;
mod superblock;
mod table;
mod trace;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Instant, SystemTime};

use kata::Control;
use kata::config::Config;
use kata::control::metrics::{AccessRecord, BackendMetrics, CacheMetrics, FileMetrics, FsMetrics, InFlight};
use kata::control::{ControlError, Events, MountInfo, MountRequest, Settings, State, Version};
use kata::timestamp::Utc;

use crate::logging::Log;
use crate::mounts::{Instance, MountError, MountOptions, Mounts};
use crate::virtio::Requests;
use counted::Counted;
use counters::Counters;
pub use instance::Instances;
use instance::Kind;
use table::{Mounted, MountedImage, Table};

/// What the API leaves to the daemon's main thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// End the daemon.
    Stop,
    /// Something was mounted: what only that needed can be given back.
    Mounted,
}

/// Calls the main thread.
pub type Caller = tokio::sync::mpsc::UnboundedSender<Call>;

/// What the API acts on.
pub struct DaemonControl {
    mounts: Arc<Mounts>,
    instances: Instances,
    table: Table,
    state: AtomicU8,
    identity: Identity,
    log: Log,
    main: Caller,
    /// Known when the device runs.
    requests: OnceLock<Requests>,
    started: Instant,
    /// New mounts are refused.
    draining: AtomicBool,
}

/// What the command line says that the daemon is.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// `--id`.
    pub id: Option<String>,
    /// `--supervisor`.
    pub supervisor: Option<String>,
}

impl DaemonControl {
    /// A daemon that composes itself ([`State::Init`]) and has no mounts.
    pub fn new(
        mounts: Arc<Mounts>,
        instances: Instances,
        identity: Identity,
        log: Log,
        main: Caller,
    ) -> Self {
        Self {
            mounts,
            instances,
            table: Table::default(),
            state: AtomicU8::new(State::Init as u8),
            identity,
            log,
            main,
            requests: OnceLock::new(),
            started: Instant::now(),
            draining: AtomicBool::new(false),
        }
    }

    /// Tells where requests can be looked at. To be called once.
    pub fn set_requests(&self, requests: Requests) {
        let _ = self.requests.set(requests);
    }

    /// Tells the API what state the daemon is in.
    pub fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::SeqCst);
    }

    /// Mounts the image at `bootstrap` with a configuration that is read already.
    ///
    /// # Errors
    ///
    /// As of a mount over the API.
    pub fn mount_image(
        &self,
        mountpoint: &str,
        bootstrap: &str,
        config: Config,
        prefetch_files: Vec<String>,
    ) -> Result<(), ControlError> {
        let path = mountpoint_of(mountpoint)?;
        let place = self.table.take(&path)?;
        let (instance, mounted) = self.open_image(&path, bootstrap, config, prefetch_files)?;
        self.mounts
            .mount(&path, instance, MountOptions::default())
            .map_err(refused)?;
        place.fill(mounted);
        tracing::info!("mounted image {bootstrap} at {path}");
        Ok(())
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Refuses what would make a daemon that drains busy again.
    fn takes_mounts(&self, mountpoint: &str) -> Result<(), ControlError> {
        if self.is_draining() {
            return Err(ControlError {
                status: 503,
                message: format!("mountpoint {mountpoint}: the daemon drains and takes no new mounts"),
            });
        }
        Ok(())
    }

    fn open_image(
        &self,
        path: &str,
        bootstrap: &str,
        config: Config,
        prefetch_files: Vec<String>,
    ) -> Result<(Instance, Mounted), ControlError> {
        let (instance, source) = self.instances.image(path, bootstrap, &config, &prefetch_files)?;
        let counters = Arc::new(Counters::new(&config.rafs.clone().unwrap_or_default()));
        let request = prefetch::Request {
            config: &config,
            bootstrap: Path::new(bootstrap),
            files: prefetch_files,
            counters: &counters,
        };
        let prefetching = self.instances.prefetch(&instance, request)?;
        let image = MountedImage {
            config,
            bootstrap: bootstrap.to_owned(),
            paths: Arc::default(),
            settings: Settings::default(),
            source,
            instance: Arc::downgrade(&instance),
            counters: Arc::clone(&counters),
            prefetching,
        };
        let mounted = Mounted {
            kind: Kind::Image,
            source: bootstrap.to_owned(),
            since: Utc::now(),
            image: Some(image),
            directory: Weak::new(),
        };
        Ok((
            Instance::Rafs(Arc::new(Counted::new(instance, counters))),
            mounted,
        ))
    }

    /// Mounts the directory `source` of the host; `config` is that of a mount request, or nothing.
    ///
    /// # Errors
    ///
    /// As of a mount over the API.
    pub fn mount_directory(&self, mountpoint: &str, source: &str, config: &str) -> Result<(), ControlError> {
        let path = mountpoint_of(mountpoint)?;
        let place = self.table.take(&path)?;
        let tree = self.instances.directory(source, config)?;
        let directory = Arc::downgrade(&tree);
        let options = MountOptions {
            read_only: tree.options().read_only,
            ..MountOptions::default()
        };
        self.mounts
            .mount(&path, Instance::Passthrough(tree), options)
            .map_err(refused)?;
        place.fill(Mounted {
            kind: Kind::Directory,
            source: source.to_owned(),
            since: Utc::now(),
            image: None,
            directory,
        });
        tracing::info!("mounted directory {source} at {path}");
        Ok(())
    }
}

impl Control for DaemonControl {
    fn state(&self) -> State {
        let state = self.state.load(Ordering::SeqCst);
        [State::Init, State::Ready, State::Running]
            .into_iter()
            .find(|candidate| *candidate as u8 == state)
            .unwrap_or(State::Stopped)
    }

    fn version(&self) -> Version {
        Version {
            package_ver: concat!("v", env!("CARGO_PKG_VERSION")).to_owned(),
            git_commit: env!("RAFSD_GIT_COMMIT").to_owned(),
            build_time: env!("RAFSD_BUILD_TIME").to_owned(),
            profile: env!("RAFSD_PROFILE").to_owned(),
            rustc: env!("RAFSD_RUSTC").to_owned(),
        }
    }

    fn id(&self) -> Option<String> {
        self.identity.id.clone()
    }

    fn supervisor(&self) -> Option<String> {
        self.identity.supervisor.clone()
    }

    fn mounts(&self) -> BTreeMap<String, MountInfo> {
        self.table.all(|path, mounted| MountInfo {
            backend_type: mounted.kind.name().to_owned(),
            mountpoint: path.to_owned(),
            mounted_time: mounted.since.for_wire(),
            config: mounted
                .image
                .as_ref()
                .and_then(|image| serde_json::to_value(&image.config).ok()),
        })
    }

    fn mount(&self, mountpoint: &str, request: MountRequest) -> Result<(), ControlError> {
        self.takes_mounts(mountpoint)?;
        match Kind::of(&request.fs_type)? {
            Kind::Directory => self.mount_directory(mountpoint, &request.source, &request.config),
            Kind::Image => {
                let config = instance::configuration(&request.config)?;
                let prefetch_files = request.prefetch_files.unwrap_or_default();
                self.mount_image(mountpoint, &request.source, config, prefetch_files)
            }
        }
        .inspect_err(|error| tracing::warn!("mount at {mountpoint} refused: {error}"))?;
        let _ = self.main.send(Call::Mounted);
        Ok(())
    }

    fn remount(&self, mountpoint: &str, request: MountRequest) -> Result<(), ControlError> {
        let path = mountpoint_of(mountpoint)?;
        let place = self.table.take_mounted(&path)?;
        if Kind::of(&request.fs_type)? != Kind::Image || place.mounted().kind != Kind::Image {
            return Err(ControlError::failed(format!(
                "remount {path}: filesystem type mismatch, expect RAFS: only an image can be replaced by an image"
            )));
        }
        let config = instance::configuration(&request.config)?;
        let prefetch_files = request.prefetch_files.unwrap_or_default();
        let (instance, mounted) = self.open_image(&path, &request.source, config, prefetch_files)?;
        self.mounts
            .replace(&path, instance, MountOptions::default())
            .map_err(refused)?;
        place.replace(mounted);
        tracing::info!("remounted image {} at {path}", request.source);
        Ok(())
    }

    fn umount(&self, mountpoint: &str) -> Result<(), ControlError> {
        let path = mountpoint_of(mountpoint)?;
        let place = self.table.take_mounted(&path)?;
        self.mounts.umount(&path).map_err(refused)?;
        place.clear();
        tracing::info!("unmounted {path}");
        Ok(())
    }

    fn set_log_level(&self, level: &str) -> Result<(), ControlError> {
        self.log.set_level(level).map_err(ControlError::failed)
    }

    fn start(&self) -> Result<(), ControlError> {
        Err(ControlError::unexpected_event(
            "Start",
            self.state(),
            State::Ready,
        ))
    }

    fn exit(&self) -> Result<(), ControlError> {
        // Nobody listens any more: the daemon ends already.
        let _ = self.main.send(Call::Stop);
        Ok(())
    }

    fn events(&self) -> Events {
        self.log.errors()
    }

    fn superblock(&self, mountpoint: &str) -> Result<serde_json::Value, ControlError> {
        let path = mountpoint_of(mountpoint)?;
        let found = self.table.with(&path, |mounted| {
            let image = mounted.image.as_ref()?;
            Some((
                image.instance.upgrade()?,
                image.config.rafs.as_ref().map_or(0, |rafs| rafs.batch_size),
            ))
        })?;
        match found {
            Some((image, batch_size)) => Ok(superblock::dump(image.superblock(), batch_size)),
            None => Err(ControlError::failed(format!(
                "{path}: filesystem type mismatch, expect RAFS"
            ))),
        }
    }

    fn settings(&self) -> BTreeMap<String, Settings> {
        let settings = |mounted: &Mounted| mounted.image.as_ref().map(|image| image.settings.clone());
        let all = self.table.all(|_, mounted| settings(mounted).unwrap_or_default());
        all.into_iter()
            .filter(|(_, settings)| *settings != Settings::default())
            .collect()
    }

    fn change_settings(&self, mountpoint: &str, change: Settings) -> Result<(), ControlError> {
        let path = mountpoint_of(mountpoint)?;
        if change.dragonfly_scheduler_endpoint.is_some() {
            return Err(ControlError::unsupported(
                "dragonfly_scheduler_endpoint: schedulers are not spoken to; set proxy_url to a Dragonfly daemon",
            ));
        }
        let source = self.table.with(&path, |mounted| {
            mounted.image.as_ref().map(|image| image.source.clone())
        })?;
        let source = source.ok_or_else(|| {
            ControlError::failed(format!(
                "Configure: {path}: filesystem type mismatch, expect RAFS"
            ))
        })?;
        if let Some(url) = &change.proxy_url {
            self.instances.replace_proxy(&source, url)?;
        }
        if let Some(auth) = &change.registry_auth {
            self.instances.replace_auth(&path, &source, auth.expose())?;
        }
        self.table.change(&path, |mounted| {
            if let Some(image) = &mut mounted.image {
                let known = &mut image.settings;
                known.registry_auth = change.registry_auth.or(known.registry_auth.take());
                known.proxy_url = change.proxy_url.or(known.proxy_url.take());
            }
        })
    }

    fn fs_metrics(&self, id: Option<&str>) -> Result<FsMetrics, ControlError> {
        let (path, image) = self.table.image(id)?;
        Ok(image.counters.metrics(&path))
    }

    fn file_metrics(&self, id: Option<&str>) -> Result<BTreeMap<u64, FileMetrics>, ControlError> {
        let (path, image) = self.table.image(id)?;
        image
            .counters
            .files()
            .ok_or_else(|| not_kept(&path, "iostats_files"))
    }

    fn latest_files(&self, id: Option<&str>) -> Result<Vec<Vec<u64>>, ControlError> {
        let (path, image) = self.table.image(id)?;
        image
            .counters
            .take_latest()
            .ok_or_else(|| not_kept(&path, "latest_read_files"))
    }

    fn access_pattern(&self, id: Option<&str>) -> Result<Vec<AccessRecord>, ControlError> {
        let (path, image) = self.table.image(id)?;
        image
            .counters
            .pattern()
            .ok_or_else(|| not_kept(&path, "access_pattern"))
    }

    fn backend_metrics(&self, id: Option<&str>) -> Result<BackendMetrics, ControlError> {
        let (_, image) = self.table.image(id)?;
        Ok(metrics::source(&image))
    }

    fn cache_metrics(&self, id: Option<&str>) -> Result<CacheMetrics, ControlError> {
        let (_, image) = self.table.image(id)?;
        Ok(metrics::cache(&image))
    }

    fn in_flight(&self) -> Result<Vec<InFlight>, ControlError> {
        let now = (Instant::now(), SystemTime::now());
        let requests = self.requests.get().map(Requests::list).unwrap_or_default();
        Ok(requests
            .iter()
            .map(|waiting| metrics::in_flight(waiting, now))
            .collect())
    }
}

fn not_kept(path: &str, option: &str) -> ControlError {
    ControlError::no_counter(format!(
        "{path}: nothing is kept; set {option} in the configuration"
    ))
}

/// Checks and normalises a mountpoint: absolute, no `.` or `..`, no empty components.
fn mountpoint_of(text: &str) -> Result<String, ControlError> {
    let refuse = |why: &str| {
        Err(ControlError::failed(format!(
            "mountpoint {text:?}: invalid path: {why}"
        )))
    };
    if !text.starts_with('/') {
        return refuse("it must be absolute");
    }
    let mut path = String::with_capacity(text.len());
    for name in text.split('/').filter(|name| !name.is_empty()) {
        if name == "." || name == ".." {
            return refuse("it must not contain `.` or `..`");
        }
        path.push('/');
        path.push_str(name);
    }
    Ok(if path.is_empty() { "/".to_owned() } else { path })
}

/// The texts that clients look for.
fn refused(error: MountError) -> ControlError {
    ControlError::failed(match &error {
        MountError::Busy(path) => format!("mountpoint {path}: object or filesystem already exists"),
        MountError::NotMounted(path) => format!("mountpoint {path}: object or filesystem doesn't exist"),
        MountError::BadPath { .. } => format!("invalid path: {error}"),
        MountError::Exhausted => format!("vfs maximum mountpoints reached: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountpoints_are_normalised_or_refused() {
        for (text, path) in [
            ("/containers", "/containers"),
            ("/rafs/c1/lowerdir/", "/rafs/c1/lowerdir"),
            ("//a///b", "/a/b"),
            ("/", "/"),
            ("/..a/b..", "/..a/b.."),
        ] {
            assert_eq!(mountpoint_of(text).unwrap(), path);
        }
        for text in ["", "containers", "./a", "/a/../b", "/a/.", ".."] {
            let error = mountpoint_of(text).unwrap_err();
            assert!(
                error.status == 500 && error.message.contains("mountpoint"),
                "{error:?}"
            );
        }
    }
}
