//! The HTTP API over a real Unix socket: wire rules, and every endpoint with what clients send and expect.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod endpoints;
mod model;
mod own;
mod wire;
