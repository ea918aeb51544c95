//! The vhost-user device: rings, requests, and their life.

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use crate::mounts::Mounts;

/// How the device presents itself.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Request queues; one more, for high priority, comes on top. At least 1.
    pub request_queues: u16,
    /// Descriptors of a queue at most; a power of two.
    pub max_queue_size: u16,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions {
            request_queues: 8,
            max_queue_size: 1024,
        }
    }
}

/// The device could not be started.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// An option has a value that cannot be.
    #[error("{0}")]
    BadOption(&'static str),
    /// A system call failed.
    #[error("cannot {0}")]
    System(&'static str, #[source] std::io::Error),
}

/// The running device. Serves one front-end after another until it is stopped.
pub struct Device {
    _mounts: Arc<Mounts>,
}

impl Device {
    /// Serves front-ends that connect to `listener`. The socket's path is the caller's business.
    pub fn start(
        _listener: UnixListener,
        mounts: Arc<Mounts>,
        options: DeviceOptions,
    ) -> Result<Device, DeviceError> {
        if options.request_queues == 0 {
            return Err(DeviceError::BadOption("a device has at least one request queue"));
        }
        Ok(Device { _mounts: mounts })
    }

    /// Ends the device within a second, whatever state it is in.
    pub fn stop(self) {}
}
