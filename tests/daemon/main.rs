//! The real binary: command lines, sockets, life cycle.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod api;
mod command_line;
mod counters;
mod images;
mod lifecycle;
mod nydusctl;
mod operate;
mod process;
mod sandbox;
mod settings;
mod sockets;
