//! GETXATTR, LISTXATTR, SETXATTR, REMOVEXATTR.

use std::ffi::CStr;

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};

use super::{Call, fail};
use crate::fuse::abi::{
    GetxattrIn, GetxattrOut, Opcode, SETXATTR_ACL_KILL_SGID, SetxattrIn, SetxattrInCompat, init,
};
use crate::fuse::errno::Errno;
use crate::fuse::init::Session;
use crate::mounts::Target;
use crate::virtio::request::Request;

/// What Linux allows as the value of an attribute (`XATTR_SIZE_MAX`).
const VALUE_MAX: u32 = 65536;

/// The answer of both questions.
enum Found {
    Bytes(Vec<u8>),
    Size(u32),
}

pub fn getxattr(call: &Call<'_>, request: Request<'_>, session: &Session) {
    let get = || {
        let mut arguments = call.arguments;
        let wanted: GetxattrIn = arguments.take()?;
        let name = arguments.attribute()?;
        match call.target()? {
            Target::Pseudo(_) => Err(Errno::NODATA),
            Target::Mount(mount, local) => {
                let found = mount.fs().getxattr(&call.context, local, name, wanted.size);
                let found = match found.map_err(|error| absent_acl(session, name, error.into()))? {
                    GetxattrReply::Value(value) => Found::Bytes(value),
                    GetxattrReply::Count(size) => Found::Size(size),
                };
                fit(found, wanted.size)
            }
        }
    };
    reply(request, Opcode::Getxattr, get());
}

/// A guest that keeps ACLs takes any error but ENODATA for a reason to refuse access, also where none can be stored.
fn absent_acl(session: &Session, name: &CStr, error: Errno) -> Errno {
    let asked = error == Errno::NOTSUP && name.to_bytes().starts_with(b"system.posix_acl_");
    match asked && session.has(init::POSIX_ACL) {
        true => Errno::NODATA,
        false => error,
    }
}

pub fn listxattr(call: &Call<'_>, request: Request<'_>) {
    let list = || {
        let mut arguments = call.arguments;
        let wanted: GetxattrIn = arguments.take()?;
        match call.target()? {
            Target::Pseudo(_) if wanted.size == 0 => Ok(Found::Size(0)),
            Target::Pseudo(_) => Ok(Found::Bytes(Vec::new())),
            Target::Mount(mount, local) => {
                let found = match mount.fs().listxattr(&call.context, local, wanted.size)? {
                    ListxattrReply::Names(names) => Found::Bytes(names),
                    ListxattrReply::Count(size) => Found::Size(size),
                };
                fit(found, wanted.size)
            }
        }
    };
    reply(request, Opcode::Listxattr, list());
}

/// A size is what was asked for if no room was offered, and bytes must fit the room.
fn fit(found: Found, room: u32) -> Result<Found, Errno> {
    match found {
        Found::Bytes(bytes) if room == 0 => u32::try_from(bytes.len())
            .map(Found::Size)
            .map_err(|_| Errno::RANGE),
        Found::Bytes(bytes) if bytes.len() > room as usize => Err(Errno::RANGE),
        found => Ok(found),
    }
}

fn reply(request: Request<'_>, opcode: Opcode, found: Result<Found, Errno>) {
    match found {
        Ok(Found::Bytes(bytes)) => request.reply_bytes(&bytes),
        Ok(Found::Size(size)) => request.reply(&GetxattrOut { size, padding: 0 }),
        Err(errno) => fail(request, opcode, errno),
    }
}

pub fn setxattr(call: &Call<'_>, session: &Session) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let (size, flags, kill_setgid) = if session.has(init::SETXATTR_EXT) {
        let wanted: SetxattrIn = arguments.take()?;
        (
            wanted.size,
            wanted.flags,
            wanted.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0,
        )
    } else {
        let wanted: SetxattrInCompat = arguments.take()?;
        (wanted.size, wanted.flags, false)
    };
    let name = arguments.attribute()?;
    if size > VALUE_MAX {
        return Err(Errno::RANGE);
    }
    let value = arguments.bytes(size)?;
    let (_, host, local) = call.writable(call.header.nodeid)?;
    Ok(host.setxattr_with(&call.context, local, name, value, flags, kill_setgid)?)
}

pub fn removexattr(call: &Call<'_>) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let name = arguments.attribute()?;
    let (_, host, local) = call.writable(call.header.nodeid)?;
    Ok(host.removexattr(&call.context, local, name)?)
}
