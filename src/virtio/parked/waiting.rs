//! What people are shown of requests that wait.

use std::time::Instant;

use super::entry::{Entry, ImageRead, Wait};
use crate::fuse::abi::Opcode;
use crate::metrics::Executing;
use crate::mounts::{Mount, local_of};

/// A request that waits, for people.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// The driver's number of the request.
    pub unique: u64,
    /// FUSE opcode.
    pub opcode: u32,
    /// Its name in the protocol.
    pub operation: &'static str,
    /// The nodeid that it names.
    pub nodeid: u64,
    /// The local id in it.
    pub local: u64,
    /// Where its file is mounted; empty for the pseudo tree.
    pub mountpoint: String,
    /// Of a read of an image, the range.
    pub read: Option<ImageRead>,
    /// When it was put aside, or its execution began.
    pub since: Instant,
    /// When it will be answered whatever happens; only what waits for data has such a time.
    pub deadline: Option<Instant>,
    /// What it waits for.
    pub stage: Stage,
}

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Data of an image that is not local.
    Data,
    /// A lock that somebody else holds.
    Lock,
    /// A worker, or the host's disk behind it.
    Worker,
    /// The queue thread that executes it, and what of the host holds that up.
    Thread,
    /// The driver: the answer is known, and the queue is stopped.
    Driver,
}

impl Waiting {
    pub(super) fn of(entry: &Entry) -> Self {
        let about = entry.parked.about();
        let wait = &entry.wait;
        Waiting {
            unique: entry.parked.unique(),
            opcode: about.opcode,
            operation: Opcode::from_wire(about.opcode).name(),
            nodeid: about.nodeid,
            local: local_of(about.nodeid),
            mountpoint: wait.place.clone(),
            read: wait.read,
            since: wait.since,
            deadline: wait.deadline,
            stage: match wait {
                Wait { ready: Some(_), .. } => Stage::Driver,
                Wait { read: Some(_), .. } => Stage::Data,
                Wait { lock: Some(_), .. } => Stage::Lock,
                _ => Stage::Worker,
            },
        }
    }

    /// A request that its queue thread still executes.
    pub(in crate::virtio) fn executing(request: &Executing, mount: Option<&Mount>) -> Self {
        Waiting {
            unique: request.unique,
            opcode: request.opcode,
            operation: Opcode::from_wire(request.opcode).name(),
            nodeid: request.nodeid,
            local: local_of(request.nodeid),
            mountpoint: mount.map(|mount| mount.path.clone()).unwrap_or_default(),
            read: None,
            since: request.began,
            deadline: None,
            stage: Stage::Thread,
        }
    }
}
