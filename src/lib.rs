//! The device and the daemon around it.
//!
//! * [`virtio`]: the vhost-user device: rings, requests, drain.
//! * [`mounts`]: the mount table: path ↔ mount id ↔ instance.
//! * [`tool`]: what the `rafs` binary does with images.

pub mod mounts;
pub mod tool;
pub mod virtio;
