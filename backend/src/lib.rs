//! From "these chunks, please" to "they are local and verified".
//!
//! Rooms:
//!
//! * [`chunk`]: what a blob and a chunk are, as the image's metadata describes them.
//! * [`store`]: the seam. Looks chunks up without waiting, fetches absent ones, tells when they are resident.
//! * [`source`]: where a blob's bytes come from: a directory, an OCI registry, ...
//! * `cache`: the sparse data file of a blob and its residency map. [`upkeep`]: looking after a directory of them.
//! * [`codec`]: decrypt, decompress and verify, or refuse.
//! * [`config`], [`error`], [`metrics`]: the same rooms as in every crate.
//!
//! This crate must not know FUSE, virtio, the RAFS layout or Kata. No type of a source or of HTTP
//! appears above [`store`].
#![forbid(unsafe_code)]

mod cache;
pub mod chunk;
pub mod codec;
pub mod config;
pub mod error;
pub mod metrics;
pub mod source;
pub mod store;

pub use cache::upkeep;
