//! The device in this process, driven by the in-process front-end.

#![allow(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod flaws;
mod init;
mod later;
mod life;
mod locks;
mod matrix;
mod serve;
mod setup;
mod stub;
