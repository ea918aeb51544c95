//! From a mount request to a file system.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use backend::config::{Secret, SourceConfig, StoreOptions, StoreThread, ThreadStart};
use backend::store::Store;
use kata::config::{Config, SecretUrl};
use kata::control::ControlError;
use parking_lot::Mutex;
use passthrough::{FdBudget, MountWatcher, PassthroughFs};
use rafs::fs::RafsFs;

use super::prefetch::{self, Prefetching};
use crate::config::{self, HostConfig};
use crate::sandbox::{Role, Sandbox};

/// What can be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Image,
    Directory,
}

impl Kind {
    /// By `fs_type` of a mount request.
    pub fn of(fs_type: &str) -> Result<Self, ControlError> {
        match fs_type {
            "rafs" => Ok(Self::Image),
            "passthrough" | "passthroughfs" | "passthrough_fs" => Ok(Self::Directory),
            other => Err(ControlError::failed(format!(
                "invalid argument: only 'rafs' and 'passthrough_fs' are supported, but {other:?} was specified"
            ))),
        }
    }

    /// The name that the API shows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "Rafs",
            Self::Directory => "PassthroughFs",
        }
    }
}

/// Reads the configuration of a mount request.
pub(super) fn configuration(text: &str) -> Result<Config, ControlError> {
    let parsed = Config::parse(text).map_err(|error| {
        ControlError::failed(format!(
            "RAFS failed to handle request, Failed to load config: {error}"
        ))
    })?;
    if !parsed.unknown.is_empty() {
        tracing::warn!(
            "configuration: unknown keys are ignored: {}",
            parsed.unknown.join(", ")
        );
    }
    Ok(parsed.config)
}

/// Makes file systems. The store of chunks, with its threads, is made when the first image needs it.
pub struct Instances {
    host: HostConfig,
    headers: Vec<(String, Secret)>,
    sandbox: Sandbox,
    /// Descriptors that guests may make the daemon hold, over all directories.
    budget: Arc<FdBudget>,
    watcher: Mutex<Option<MountWatcher>>,
    store: OnceLock<Arc<Store>>,
    making_store: Mutex<()>,
}

impl Instances {
    /// Directories of the host are served as `host` says; `headers` go with every request for chunks. Threads made
    /// for mounts put on `sandbox`.
    pub fn new(host: HostConfig, headers: Vec<(String, Secret)>, sandbox: Sandbox) -> Self {
        Self {
            host,
            headers,
            sandbox,
            budget: FdBudget::of_process(),
            watcher: Mutex::new(None),
            store: OnceLock::new(),
            making_store: Mutex::new(()),
        }
    }

    fn store(&self) -> Result<&Arc<Store>, ControlError> {
        let _one_at_a_time = self.making_store.lock();
        if let Some(store) = self.store.get() {
            return Ok(store);
        }
        let sandbox = self.sandbox.clone();
        let options = StoreOptions {
            thread_start: ThreadStart(Arc::new(move |thread| {
                sandbox.enter(match thread {
                    StoreThread::Net => Role::Net,
                    StoreThread::Decode => Role::Decode,
                });
            })),
            ..StoreOptions::default()
        };
        let store = Store::new(options)
            .map_err(|error| ControlError::failed(format!("cannot start the chunk store: {error}")))?;
        Ok(self.store.get_or_init(|| Arc::new(store)))
    }

    /// Opens the image whose bootstrap is `source`. Needs no network.
    pub(super) fn image(
        &self,
        mountpoint: &str,
        source: &str,
        config: &Config,
        prefetch_files: &[String],
    ) -> Result<(Arc<RafsFs>, SourceConfig), ControlError> {
        let refuse = |reason: &dyn std::fmt::Display| {
            ControlError::failed(format!("mount of image {source} at {mountpoint}: {reason}"))
        };
        if let Some(relative) = prefetch_files.iter().find(|path| !path.starts_with('/')) {
            return Err(refuse(&format!(
                "invalid prefetch file list: {relative:?} is not absolute"
            )));
        }
        let image = config::image(config, &self.headers).map_err(|reason| refuse(&reason))?;
        let store = self.store()?;
        let opened = RafsFs::open(Path::new(source), image.options, &mut |description| {
            store.open_blob(description, &image.source, &image.cache)
        });
        let opened = opened
            .map_err(|error| refuse(&format!("Failed to fill superBlock: {error}{}", cause(&error))))?;
        Ok((Arc::new(opened), image.source))
    }

    /// Begins to fetch what `request` wants fetched early.
    pub(super) fn prefetch(
        &self,
        image: &Arc<RafsFs>,
        request: prefetch::Request<'_>,
    ) -> Result<Arc<Prefetching>, ControlError> {
        Ok(prefetch::start(self.store()?, image, request))
    }

    /// Gives the source of the image at `path` new credentials. Blobs that use it keep using it. A source that has no use for a
    /// user and a password is left as it is: clients renew the credentials of every mount, whatever its source.
    pub(super) fn replace_auth(
        &self,
        path: &str,
        source: &SourceConfig,
        auth: &str,
    ) -> Result<(), ControlError> {
        if !matches!(source, SourceConfig::Registry(_)) {
            tracing::debug!("{path}: registry_auth means nothing to its source");
            return Ok(());
        }
        self.store()?
            .replace_auth(source, Secret::new(auth))
            .map_err(|error| {
                ControlError::bad_request(format!("Configure: registry_auth: {error}{}", cause(&error)))
            })
    }

    /// Sends what the source of an image asks for through the proxy at `url`, or directly if that is empty.
    pub(super) fn replace_proxy(&self, source: &SourceConfig, url: &SecretUrl) -> Result<(), ControlError> {
        if !url.is_empty() {
            url.check("proxy_url")
                .map_err(|error| ControlError::bad_request(format!("Configure: {error}")))?;
        }
        if matches!(source, SourceConfig::Dir(_) | SourceConfig::LocalDisk(_)) {
            return Err(ControlError::bad_request(
                "Configure: proxy_url: the source of this image is local, it uses no proxy",
            ));
        }
        self.store()?
            .replace_proxy(source, Secret::new(url.expose()))
            .map_err(|error| ControlError::failed(format!("Configure: proxy_url: {error}{}", cause(&error))))
    }

    /// Opens the directory `source` of the host. The `config` of a mount request may change what the command line says.
    pub(super) fn directory(&self, source: &str, config: &str) -> Result<Arc<PassthroughFs>, ControlError> {
        let options = self.host.of(source, config).map_err(ControlError::failed)?;
        let sandbox = self.sandbox.clone();
        let start = passthrough::ThreadStart(Arc::new(move || sandbox.enter(Role::Helper)));
        let options = passthrough::Options {
            budget: Some(Arc::clone(&self.budget)),
            thread_start: start.clone(),
            ..options
        };
        let tree = PassthroughFs::new(options).map(Arc::new).map_err(|error| {
            ControlError::failed(format!(
                "passthroughfs failed to handle request: {error}{}",
                cause(&error)
            ))
        })?;
        self.watch(&tree, start);
        Ok(tree)
    }

    /// Has `tree` let go of what the host unmounts below it. Without the watcher it holds on to it until it is unmounted
    /// itself, which is no reason to refuse it.
    fn watch(&self, tree: &Arc<PassthroughFs>, start: passthrough::ThreadStart) {
        let mut watcher = self.watcher.lock();
        if watcher.is_none() {
            match MountWatcher::start(start) {
                Ok(started) => *watcher = Some(started),
                Err(error) => tracing::warn!("the host's unmounts are not watched: {error}"),
            }
        }
        if let Some(watcher) = &*watcher {
            watcher.watch(tree);
        }
    }
}

/// The chain of causes, each introduced by a colon.
fn cause(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(&format!(": {error}"));
        next = error.source();
    }
    text
}
