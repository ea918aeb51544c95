//! GETLK, SETLK, SETLKW; and what closing a file does to its locks.
//!
//! A host tree that has locks keeps them on the host; all others are kept among the guest's processes. Waiting costs
//! no thread: the request is parked.

use std::sync::Arc;

use fuse_backend_rs::api::filesystem::FileLock;
use passthrough::LockDone;

use super::{Call, Server, answer, fail};
use crate::fuse::abi::{LOCK_FLOCK, LockIn, LockRange, Opcode, init};
use crate::fuse::errno::Errno;
use crate::fuse::locks::Wanted;
use crate::mounts::{CancelLock, HostFs, Instance, Mount, Target};
use crate::virtio::request::Request;

/// Who keeps a file's locks.
enum Keeper<'a> {
    /// The host, for a local id of this tree.
    Host(&'a dyn HostFs, u64),
    Guest,
}

struct Asked<'a> {
    keeper: Keeper<'a>,
    mount: &'a Arc<Mount>,
    wanted: Wanted,
    flags: u32,
}

fn ask<'a>(server: &Server, call: &Call<'a>) -> Result<Asked<'a>, Errno> {
    let mut arguments = call.arguments;
    let LockIn {
        fh,
        owner,
        range,
        lock_flags,
        ..
    } = arguments.take()?;
    let flock = lock_flags & LOCK_FLOCK != 0;
    let Target::Mount(mount, local) = call.target()? else {
        // Linux keeps the locks of directories to itself.
        return Err(Errno::ISDIR);
    };
    let negotiated = match flock {
        true => init::FLOCK_LOCKS,
        false => init::POSIX_LOCKS,
    };
    if !server.session.has(negotiated) {
        return Err(Errno::NOTSUP);
    }
    let keeper = match &mount.instance {
        Instance::Passthrough(host) if host.has_locks() => Keeper::Host(host.as_ref(), local),
        _ => Keeper::Guest,
    };
    let wanted = Wanted {
        nodeid: call.header.nodeid,
        fh,
        owner,
        lock: FileLock {
            start: range.start,
            end: range.end,
            lock_type: range.kind,
            pid: range.pid,
        },
        flock,
    };
    Ok(Asked {
        keeper,
        mount,
        wanted,
        flags: lock_flags,
    })
}

pub fn getlk(server: &Server, call: &Call<'_>) -> Result<LockRange, Errno> {
    let Asked {
        keeper,
        wanted,
        flags,
        ..
    } = ask(server, call)?;
    let found = match keeper {
        Keeper::Guest => server.locks.get(&wanted)?,
        Keeper::Host(host, local) => {
            host.getlk(&call.context, local, wanted.fh, wanted.owner, wanted.lock, flags)?
        }
    };
    Ok(LockRange {
        start: found.start,
        end: found.end,
        kind: found.lock_type,
        pid: found.pid,
    })
}

pub fn setlk(server: &Server, opcode: Opcode, call: &Call<'_>, request: Request<'_>) {
    let asked = match ask(server, call) {
        Ok(asked) => asked,
        Err(errno) => return fail(request, opcode, errno),
    };
    let Asked { wanted, flags, .. } = asked;
    let at_once = match asked.keeper {
        Keeper::Guest => server.locks.set(&wanted),
        Keeper::Host(host, local) => host
            .setlk(&call.context, local, wanted.fh, wanted.owner, wanted.lock, flags)
            .map_err(Errno::from),
    };
    match at_once {
        Err(Errno::AGAIN) if opcode == Opcode::Setlkw => {}
        decided => return answer(request, opcode, decided),
    }
    let deferred = &server.deferred;
    match asked.keeper {
        Keeper::Guest => {
            let locks = Arc::clone(&server.locks);
            deferred.park_lock(request, asked.mount, move |done: LockDone| {
                let id = locks.set_later(&wanted, done)?;
                Some(Arc::new(move || locks.cancel(id)) as CancelLock)
            });
        }
        Keeper::Host(host, local) => deferred.park_lock(request, asked.mount, |done| {
            host.set_lock_later(local, wanted.fh, wanted.owner, wanted.lock, flags, done)
        }),
    }
}
