//! The contract with the container runtime: HTTP API, nydusd-compatible configuration, command line facts.
//!
//! Rooms:
//!
//! * [`api`]: the HTTP server on the API socket, over a [`Control`] that the daemon fulfils.
//! * [`config`]: daemon configuration, generations 1 and 2, JSON and TOML.
//!
//! This crate must not know FUSE, RAFS or virtio.
#![forbid(unsafe_code)]

pub mod api;
pub mod config;
pub mod control;
pub use control::Control;
