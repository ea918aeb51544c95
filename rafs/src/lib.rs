//! RAFS metadata, v5 and v6: layouts, bounds-checked readers, read plans, and the writer.
//!
//! Rooms:
//!
//! * [`layout`]: structures on disk and what one field allows by itself; no logic.
//! * [`build`]: the writer, a tree becomes a bootstrap and a blob.
//! * [`fs`]: the instance, a read-only file system over one mapped bootstrap.
//!
//! This crate must not know tokio, HTTP, virtio or Kata.
#![allow(clippy::todo, missing_docs)] // interface skeleton; removed with the implementation

pub mod build;
pub mod fs;
pub mod layout;
