//! What Cloud Hypervisor asks of a file system device, scenario by scenario.
//!
//! Each scenario is a module with two tests. `twin` plays Cloud Hypervisor's part with the in-process front-end: the
//! messages in its order, on guest memory and rings of its own. It always runs. `real` does the same with the program
//! itself and a Linux guest, where `cloud-hypervisor` and a usable `/dev/kvm` exist, and otherwise says that it was
//! skipped. `README.md` has the list; `readme` compares it with what is here.
//!
//! * `machine`: the program, its guest, and how the guest is told what to do; `twins`: what the twins share.

#![allow(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod activation;
mod hot_plug;
mod machine;
mod memory;
mod migration;
mod pause;
mod readme;
mod reconnect;
mod reset;
mod snapshot;
mod twins;
