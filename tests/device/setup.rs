//! A device on a socket of its own.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use passthrough::PassthroughFs;
use rafsd::mounts::{Instance, MountId, MountOptions, Mounts};
use rafsd::virtio::{Device, DeviceOptions};
use rafsd_frontend::{Guest, Options};

/// A device, its mounts and its directory.
pub struct Setup {
    pub directory: tempfile::TempDir,
    pub mounts: Arc<Mounts>,
    pub device: Option<Device>,
    pub socket: PathBuf,
}

impl Setup {
    pub fn new() -> Self {
        Self::with(DeviceOptions {
            request_queues: 4,
            ..DeviceOptions::default()
        })
    }

    pub fn with(options: DeviceOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("sock");
        let mounts = Arc::new(Mounts::new());
        let listener = UnixListener::bind(&socket).unwrap();
        let device = Device::start(listener, Arc::clone(&mounts), options).unwrap();
        Setup {
            directory,
            mounts,
            device: Some(device),
            socket,
        }
    }

    /// Mounts a new host directory `name` at `path`, read-write.
    pub fn host(&self, path: &str, name: &str) -> PathBuf {
        let root = self.directory.path().join(name);
        std::fs::create_dir_all(&root).unwrap();
        self.mount_host(path, &root, false);
        root
    }

    pub fn mount_host(&self, path: &str, root: &std::path::Path, read_only: bool) -> MountId {
        let fs = PassthroughFs::new(passthrough::Options::new(root)).unwrap();
        let options = MountOptions {
            read_only,
            ..MountOptions::default()
        };
        self.mounts
            .mount(path, Instance::Passthrough(Arc::new(fs)), options)
            .unwrap()
    }

    pub fn guest(&self) -> Guest {
        self.guest_with(Options::default())
    }

    pub fn guest_with(&self, options: Options) -> Guest {
        Guest::boot(&self.socket, options).unwrap()
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            if !std::thread::panicking() {
                let metrics = device.metrics();
                assert_eq!(metrics.bugs, 0, "requests were dropped: {metrics:?}");
            }
            device.stop();
        }
    }
}
