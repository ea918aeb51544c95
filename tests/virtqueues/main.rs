//! The real daemon, seen from a guest: everything goes over its sockets and through virtqueues.
//!
//! * `machines`: every kind of machine, and what a guest does all day
//! * `fixtures`: images of the incumbent's tool, byte for byte
//! * `isolation`: a source that stalls; `integrity`: one that lies
//! * `lifecycle`: front-ends, rings, memory and daemons that come and go
//! * `locks`: two sandboxes on one directory
//! * `submounts`: what the host mounts below a served tree
//! * `escape`: what lies beside the share
//! * `hostile`: what a guest may try

#![allow(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used)]

mod escape;
mod fixtures;
mod hostile;
mod integrity;
mod isolation;
mod lifecycle;
mod locks;
mod machines;
mod submounts;
mod support;
