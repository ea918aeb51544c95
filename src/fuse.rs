//! The FUSE protocol: decode once into private memory, validate, dispatch, encode.
//!
//! * [`abi`]: the wire format.
//! * [`decode`]: from guest memory to checked arguments.
//! * [`init`]: what is negotiated, and the session.
//! * [`dispatch`]: which operation goes where, and what each kind of mount answers.
//! * [`locks`]: locks that do not go to the host.
//! * [`reply`]: from what instances return to wire structs.
//! * [`errno`]: the one error type of this border.

pub(crate) mod abi;
pub(crate) mod decode;
pub(crate) mod dispatch;
pub(crate) mod errno;
pub(crate) mod init;
pub(crate) mod locks;
pub(crate) mod reply;
