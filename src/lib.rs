//! The device and the daemon around it.
//!
//! * [`cli`], [`config`]: what the command line and the runtime's configurations ask for.
//! * [`daemon`]: owns the parts; starts and stops them in order.
//! * [`control`]: fulfils what the API asks: wire request → mount specification → mount.
//! * [`virtio`]: the vhost-user device: rings, requests, drain.
//! * `fuse`: the protocol: decode, dispatch, encode; `fuse_dev`: the same mounts over `/dev/fuse`.
//! * [`mounts`]: the mount table: path ↔ mount id ↔ instance.
//! * [`sandbox`]: what is left to whoever takes the daemon over.
//! * [`metrics`]: what the device has counted.
//! * [`tool`]: what the `rafs` binary does with images.
//! * [`logging`], [`error`]: one line per event; exit codes.

pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod error;
mod fuse;
mod fuse_dev;
pub mod logging;
pub mod metrics;
pub mod mounts;
pub mod sandbox;
pub mod tool;
pub mod virtio;
