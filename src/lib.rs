//! The device and the daemon around it.
//!
//! * [`virtio`]: the vhost-user device: rings, requests, drain.
//! * `fuse`: the protocol: decode, dispatch, encode.
//! * [`mounts`]: the mount table: path ↔ mount id ↔ instance.
//! * [`metrics`]: what the device has counted.
//! * [`tool`]: what the `rafs` binary does with images.

mod fuse;
pub mod metrics;
pub mod mounts;
pub mod tool;
pub mod virtio;
