//! Names: LOOKUP and everything that makes, moves or removes an entry.

use fuse_backend_rs::abi::fuse_abi;
use passthrough::CreateExtras;

use super::Call;
use crate::fuse::abi::{CreateIn, EntryOut, LinkIn, MkdirIn, MknodIn, Opcode, OpenOut, Rename2In, RenameIn};
use crate::fuse::decode::Extensions;
use crate::fuse::errno::Errno;
use crate::fuse::reply;
use crate::mounts::{Child, Mount, Target, nodeid};

pub fn lookup(call: &Call<'_>) -> Result<EntryOut, Errno> {
    let mut arguments = call.arguments;
    let name = arguments.name()?;
    match call.target()? {
        Target::Mount(mount, local) => reply::entry(mount, &mount.fs().lookup(&call.context, local, name)?),
        Target::Pseudo(node) => match call.table.child(node, name.to_bytes()) {
            Some(Child::Directory(node)) => Ok(reply::pseudo_entry(node)),
            Some(Child::Mountpoint(mount)) => mountpoint(call, mount),
            None => Err(Errno::NOENT),
        },
    }
}

/// The entry of a mountpoint: the instance's root. Its name is not cached, its attributes are as the instance
/// says.
pub fn mountpoint(call: &Call<'_>, mount: &Mount) -> Result<EntryOut, Errno> {
    let (stat, timeout) = mount.fs().getattr(&call.context, mount.root, None)?;
    Ok(EntryOut {
        nodeid: nodeid(mount.id, mount.root).ok_or(Errno::OVERFLOW)?,
        attr_valid: timeout.as_secs(),
        attr_valid_nsec: timeout.subsec_nanos(),
        attr: reply::attr(mount, &stat, 0),
        ..EntryOut::default()
    })
}

pub fn readlink(call: &Call<'_>) -> Result<Vec<u8>, Errno> {
    match call.target()? {
        Target::Mount(mount, local) => Ok(mount.fs().readlink(&call.context, local)?),
        Target::Pseudo(_) => Err(Errno::INVAL),
    }
}

pub fn symlink(call: &Call<'_>) -> Result<EntryOut, Errno> {
    let mut arguments = call.arguments;
    let extensions = Extensions::take(&call.header, &mut arguments)?;
    let (name, target) = (arguments.name()?, arguments.target()?);
    let (mount, host, local) = call.writable(call.header.nodeid)?;
    reply::entry(
        mount,
        &host.symlink_with(&call.context, target, local, name, &extras(&extensions))?,
    )
}

pub fn mknod(call: &Call<'_>) -> Result<EntryOut, Errno> {
    let mut arguments = call.arguments;
    let wanted: MknodIn = arguments.take()?;
    let extensions = Extensions::take(&call.header, &mut arguments)?;
    let name = arguments.name()?;
    let (mount, host, local) = call.writable(call.header.nodeid)?;
    let MknodIn {
        mode, rdev, umask, ..
    } = wanted;
    let entry = host.mknod_with(
        &call.context,
        local,
        name,
        mode,
        rdev,
        umask,
        &extras(&extensions),
    )?;
    reply::entry(mount, &entry)
}

pub fn mkdir(call: &Call<'_>) -> Result<EntryOut, Errno> {
    let mut arguments = call.arguments;
    let wanted: MkdirIn = arguments.take()?;
    let extensions = Extensions::take(&call.header, &mut arguments)?;
    let name = arguments.name()?;
    let (mount, host, local) = call.writable(call.header.nodeid)?;
    let entry = host.mkdir_with(
        &call.context,
        local,
        name,
        wanted.mode,
        wanted.umask,
        &extras(&extensions),
    )?;
    reply::entry(mount, &entry)
}

pub fn unlink(call: &Call<'_>) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let name = arguments.name()?;
    let (_, host, local) = call.writable(call.header.nodeid)?;
    Ok(host.unlink(&call.context, local, name)?)
}

pub fn rmdir(call: &Call<'_>) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let name = arguments.name()?;
    let (_, host, local) = call.writable(call.header.nodeid)?;
    Ok(host.rmdir(&call.context, local, name)?)
}

pub fn rename(opcode: Opcode, call: &Call<'_>) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let (new_directory, flags) = if opcode == Opcode::Rename2 {
        let wanted: Rename2In = arguments.take()?;
        (wanted.newdir, wanted.flags)
    } else {
        (arguments.take::<RenameIn>()?.newdir, 0)
    };
    let (old_name, new_name) = (arguments.name()?, arguments.name()?);
    let (mount, host, old) = call.writable(call.header.nodeid)?;
    let new = same_mount(call, mount, new_directory)?;
    Ok(host.rename(&call.context, old, old_name, new, new_name, flags)?)
}

pub fn link(call: &Call<'_>) -> Result<EntryOut, Errno> {
    let mut arguments = call.arguments;
    let wanted: LinkIn = arguments.take()?;
    let name = arguments.name()?;
    let (mount, host, directory) = call.writable(call.header.nodeid)?;
    let file = same_mount(call, mount, wanted.oldnodeid)?;
    reply::entry(mount, &host.link(&call.context, file, directory, name)?)
}

/// The local id behind `nodeid`, which must be in `mount`.
pub fn same_mount(call: &Call<'_>, mount: &Mount, nodeid: u64) -> Result<u64, Errno> {
    match call.resolve(nodeid)? {
        Target::Mount(other, local) if other.id == mount.id => Ok(local),
        _ => Err(Errno::XDEV),
    }
}

pub fn create(call: &Call<'_>) -> Result<(EntryOut, OpenOut), Errno> {
    let mut arguments = call.arguments;
    let wanted: CreateIn = arguments.take()?;
    let extensions = Extensions::take(&call.header, &mut arguments)?;
    let name = arguments.name()?;
    let (mount, host, local) = call.writable(call.header.nodeid)?;
    let (entry, handle, options) = host.create_with(
        &call.context,
        local,
        name,
        &create_in(&wanted),
        &extras(&extensions),
    )?;
    Ok((
        reply::entry(mount, &entry)?,
        reply::open_out(Some(handle), options.bits()),
    ))
}

/// TMPFILE carries a name that means nothing (Linux sends `/`).
///
/// A file of mode 0 is what Linux's overlay asks for, when it is mounted, to know whether it may make its copies this
/// way. It may not: such a copy keeps the name `/` inside the guest's kernel, which looks it up by that name whenever
/// the entry's time is over, and no answer of ours could be right. Told so here, the overlay uses files with names.
pub fn tmpfile(call: &Call<'_>) -> Result<(EntryOut, OpenOut), Errno> {
    let mut arguments = call.arguments;
    let wanted: CreateIn = arguments.take()?;
    let extensions = Extensions::take(&call.header, &mut arguments)?;
    let (mount, host, local) = call.writable(call.header.nodeid)?;
    if wanted.mode & 0o7777 == 0 {
        return Err(Errno::NOTSUP);
    }
    let (entry, handle, options) =
        host.tmpfile(&call.context, local, &create_in(&wanted), &extras(&extensions))?;
    Ok((
        reply::entry(mount, &entry)?,
        reply::open_out(Some(handle), options.bits()),
    ))
}

fn create_in(wanted: &CreateIn) -> fuse_abi::CreateIn {
    fuse_abi::CreateIn {
        flags: wanted.flags,
        mode: wanted.mode,
        umask: wanted.umask,
        fuse_flags: wanted.open_flags,
    }
}

fn extras<'a>(extensions: &'a Extensions<'_>) -> CreateExtras<'a> {
    CreateExtras {
        group: extensions.group,
        labels: &extensions.labels,
    }
}
