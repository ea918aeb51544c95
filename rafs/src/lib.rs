//! RAFS metadata, v5 and v6: layouts, bounds-checked readers, read plans, and the writer.
//!
//! Rooms, from the bytes up:
//!
//! * [`layout`]: structures on disk and what one field allows by itself; no logic.
//! * [`bootstrap`]: the bytes of a bootstrap, bounds-checked; where it is in a file.
//! * [`superblock`]: what superblock and tables say, checked when an image is opened. `image`: both together.
//! * [`inode`], `dir`, `xattr`: decoded on every use, nothing is kept. `digest`: the digest tree of v5.
//! * `plan`: (inode, offset, size) to ranges of chunks. `index`: what the store must know of a chunk.
//! * [`reader`]: metadata for tools; `check`: all of it. [`fs`]: the instance, a read-only file system over one image.
//! * [`build`]: the writer, a tree becomes a bootstrap and a blob.
//! * [`tar`]: archives, read and written. [`trace`]: which chunks were read first.
//! * [`error`]: what can be wrong with an image. `sys`: the crate's unsafe code.
//!
//! This crate must not know tokio, HTTP, virtio or Kata.

pub mod bootstrap;
pub mod build;
mod check;
mod digest;
mod dir;
pub mod error;
pub mod fs;
mod image;
mod index;
pub mod inode;
pub mod layout;
mod plan;
pub mod reader;
pub mod superblock;
mod sys;
pub mod tar;
pub mod trace;
mod xattr;
