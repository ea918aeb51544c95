//! GETATTR, SETATTR, STATX, STATFS, ACCESS.

use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi;
use fuse_backend_rs::api::filesystem::SetattrValid;

use super::{Call, handle};
use crate::fuse::abi::{AccessIn, AttrOut, FATTR_FH, GetattrIn, SetattrIn, StatfsOut, StatxIn, StatxOut};
use crate::fuse::errno::Errno;
use crate::fuse::reply;
use crate::mounts::{Instance, Target};

pub fn getattr(call: &Call<'_>) -> Result<AttrOut, Errno> {
    let mut arguments = call.arguments;
    let wanted: GetattrIn = arguments.take()?;
    match call.target()? {
        Target::Pseudo(node) => Ok(reply::attr_out(reply::pseudo_attr(node), Duration::ZERO)),
        Target::Mount(mount, local) => {
            let handle = handle(wanted.flags, wanted.fh);
            let (stat, timeout) = mount.fs().getattr(&call.context, local, handle)?;
            Ok(reply::attr_out(reply::attr(mount, &stat, 0), timeout))
        }
    }
}

pub fn setattr(call: &Call<'_>) -> Result<AttrOut, Errno> {
    let mut arguments = call.arguments;
    let wanted: SetattrIn = arguments.take()?;
    let (mount, host, local) = call.writable(call.header.nodeid)?;
    let handle = (wanted.valid & FATTR_FH != 0).then_some(wanted.fh);
    let valid = SetattrValid::from_bits_truncate(wanted.valid);
    let (stat, timeout) = host.setattr(&call.context, local, stat_of(&wanted), handle, valid)?;
    Ok(reply::attr_out(reply::attr(mount, &stat, 0), timeout))
}

/// What SETATTR asks for, in the shape that instances take it.
fn stat_of(wanted: &SetattrIn) -> libc::stat64 {
    let mut stat = libc::stat64::from(fuse_abi::Attr::default());
    stat.st_mode = wanted.mode;
    stat.st_uid = wanted.uid;
    stat.st_gid = wanted.gid;
    stat.st_size = wanted.size as i64;
    stat.st_atime = wanted.atime as i64;
    stat.st_mtime = wanted.mtime as i64;
    stat.st_ctime = wanted.ctime as i64;
    stat.st_atime_nsec = i64::from(wanted.atimensec);
    stat.st_mtime_nsec = i64::from(wanted.mtimensec);
    stat.st_ctime_nsec = i64::from(wanted.ctimensec);
    stat
}

pub fn statx(call: &Call<'_>) -> Result<StatxOut, Errno> {
    let mut arguments = call.arguments;
    let wanted: StatxIn = arguments.take()?;
    let (mount, local) = match call.target()? {
        Target::Pseudo(node) => return Ok(reply::statx_from_attr(&reply::pseudo_attr(node), Duration::ZERO)),
        Target::Mount(mount, local) => (mount, local),
    };
    let handle = handle(wanted.getattr_flags, wanted.fh);
    if let Instance::Passthrough(host) = &mount.instance {
        match host.statx(&call.context, local, handle) {
            Ok((statx, timeout)) => return Ok(reply::statx_out(mount, &statx, timeout)),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (stat, timeout) = mount.fs().getattr(&call.context, local, handle)?;
    Ok(reply::statx_from_attr(&reply::attr(mount, &stat, 0), timeout))
}

pub fn statfs(call: &Call<'_>) -> Result<StatfsOut, Errno> {
    match call.target()? {
        Target::Pseudo(_) => Ok(StatfsOut {
            bsize: 4096,
            frsize: 4096,
            namelen: 255,
            ..StatfsOut::default()
        }),
        Target::Mount(mount, local) => Ok(reply::statfs_out(&mount.fs().statfs(&call.context, local)?)),
    }
}

/// The guest's kernel checks permissions itself; what is left is whether a mount can be written at all.
pub fn access(call: &Call<'_>) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let wanted: AccessIn = arguments.take()?;
    let writes = wanted.mask & libc::W_OK as u32 != 0;
    match call.target()? {
        Target::Mount(mount, local) if !(writes && mount.read_only) => {
            match mount
                .fs()
                .access(&call.context, local, wanted.mask)
                .map_err(Errno::from)
            {
                Err(Errno::NOSYS) => Ok(()),
                result => result,
            }
        }
        Target::Pseudo(_) if !writes => Ok(()),
        _ => Err(Errno::ROFS),
    }
}
