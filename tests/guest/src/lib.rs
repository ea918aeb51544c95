//! Real guests for tests and for the demo.
//!
//! Boots a Debian kernel under `qemu-system-x86_64` (emulated, no `/dev/kvm` needed) with a vhost-user file system
//! device, and runs commands in it while the host mounts, unmounts, stops and kills things around it.
//!
//! * [`cache`]: what is prepared once and kept under `target/guest/`
//! * [`debian`]: packages and whole trees from the machine's own Debian mirror
//! * [`kernel`], [`initrd`], [`cpio`]: what the guest boots: kernel, modules, busybox, the agent (`init.sh`)
//! * [`guest`]: a running guest: boot, commands, stop and continue, kill
//! * [`console`]: the host's half of the conversation with the agent
//! * [`daemon`]: a `rafsd` process and its administration API
//! * [`config`]: mount configurations as the snapshotter writes them
//! * [`registry`]: a `rafs serve` process and what it was asked for
//! * [`sandbox`]: daemon, guest and containers put together as Kata does it
//! * [`share`]: one directory in a guest, served by `rafsd` or by `virtiofsd`
//! * [`image`]: images built with `rafs build`, and trees to build them from
//!
//! Nothing here knows how `rafsd` works inside: it uses the command line, the sockets and the API, as a runtime does.

pub mod cache;
pub mod config;
pub mod console;
pub mod cpio;
pub mod daemon;
pub mod debian;
pub mod guest;
mod http;
pub mod image;
pub mod initrd;
pub mod kernel;
pub mod registry;
pub mod sandbox;
pub mod share;

pub use cache::Cache;
pub use daemon::Daemon;
pub use guest::{Boot, Guest};
pub use image::Image;
pub use registry::Registry;
pub use sandbox::{Container, Sandbox};
pub use share::Share;
