//! VMM and guest in one process, for tests and benchmarks of a vhost-user virtio-fs device.
//!
//! Rooms:
//!
//! * [`memory`]: guest memory in memfds; one or many regions, holes, added and removed at run time.
//! * [`message`]: vhost-user messages as they go over the socket, with descriptors and time limits.
//! * [`vring`]: the driver's side of a split virtqueue.
//! * [`vmm`]: the life of a connection, in the order of QEMU or of Cloud Hypervisor.
//! * [`abi`], [`ops`]: FUSE requests and replies as bytes. Written from the kernel's header, apart from
//!   the device's own decoder, so that one does not hide the other's errors.
//! * [`guest`]: a FUSE client on the queues; many requests in flight, any order of completion.
//! * [`daemon`], [`http`]: starts a daemon, talks to its API socket, measures it, ends it.
//! * [`image`], [`registry`]: images to mount, and a registry that fails as it is told to.
//! * [`random`]: repeatable numbers.
//! * [`tree`]: walks what a guest sees, and compares it with what it should see.
//!
//! This crate must not use code of the device under test, nor of the crates that the device is built on.
#![allow(clippy::indexing_slicing, clippy::panic)] // Test support: what is wrong here fails a test.

pub mod abi;
pub mod daemon;
mod error;
pub mod guest;
pub mod http;
pub mod image;
pub mod memory;
pub mod message;
pub mod ops;
pub mod random;
pub mod registry;
pub mod tree;
pub mod vmm;
pub mod vring;

pub use error::{Error, Result};
pub use guest::{Guest, Reply, Ticket};
pub use vmm::{Options, Order};
