//! The device and the daemon around it.
//!
//! * [`virtio`]: the vhost-user device: rings, requests, drain.
//! * [`mounts`]: the mount table: path ↔ mount id ↔ instance.

pub mod mounts;
pub mod virtio;
