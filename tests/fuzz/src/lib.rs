//! What the fuzz targets do, as ordinary functions from bytes to "nothing bad happened".
//!
//! An input is not an image. It is a list of changes to a valid image, which the project's own builder made when the
//! target started: fields are set, moved, exchanged, and the digests and duplicates that would give the change away
//! are put right again. So that nearly every input gets past the first checks, to where the mistakes would be.
//!
//! * [`v5_bootstrap`], [`v6_bootstrap`], [`blob_context`], [`toc`]: the targets.
//! * [`chains`], [`messages`]: the targets for the device, which serves a guest of this process. `machine`: both of them.
//!   `null`: file systems without files.
//! * `script`: an input as a list of decisions. `mutate`: the changes. `bases`: the images.
//! * `explore`: looks at all that an image gives. `memory`: how much that took.
//!
//! The binaries below `targets/` are libFuzzer's entry to these functions; `make fuzz` builds and runs them.
// An input that leads to a panic is what is looked for.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod bases;
pub mod blob_context;
pub mod chains;
mod explore;
mod machine;
mod memory;
pub mod messages;
mod mutate;
mod null;
mod script;
pub mod toc;
pub mod v5_bootstrap;
pub mod v6_bootstrap;
