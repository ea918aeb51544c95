//! The contract with the container runtime: HTTP API, nydusd-compatible configuration, command line facts.
//!
//! Rooms:
//!
//! * [`api`]: the HTTP server on the API socket, over a [`Control`] that the daemon fulfils.
//! * [`client`]: asks such a server.
//! * [`control`]: that trait, and the values that go over the wire.
//! * [`config`]: daemon configuration, generations 1 and 2, JSON and TOML.
//! * [`timestamp`]: points in time as the wire and the log write them.
//!
//! This crate must not know FUSE, RAFS or virtio.
#![forbid(unsafe_code)]

pub mod api;
pub mod client;
pub mod config;
pub mod control;
pub mod timestamp;

pub use control::Control;
