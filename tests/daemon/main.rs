//! The real binary: command lines, sockets, life cycle.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod against_virtiofsd;
mod contract;
mod counters;
mod crowd;
mod fuse;
mod images;
mod lifecycle;
mod many_files;
mod monitoring;
mod nydusctl;
mod operate;
mod peers;
mod process;
mod quota;
mod recording;
mod sandbox;
mod service;
mod settings;
mod trace;
