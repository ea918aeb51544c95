//! OPENDIR, READDIR, READDIRPLUS, RELEASEDIR.

use std::io;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};

use super::Call;
use super::entries::mountpoint;
use crate::fuse::abi::{EntryOut, Opcode, OpenIn, OpenOut, ReadIn, ReleaseIn};
use crate::fuse::errno::Errno;
use crate::fuse::reply::{self, Listing};
use crate::mounts::{Child, Mount, Node, Target};

/// `d_type` of a directory.
const DIRECTORY: u32 = libc::DT_DIR as u32;

pub fn opendir(call: &Call<'_>) -> Result<OpenOut, Errno> {
    let mut arguments = call.arguments;
    let wanted: OpenIn = arguments.take()?;
    match call.target()? {
        Target::Pseudo(_) => Ok(OpenOut::default()),
        Target::Mount(mount, local) => {
            let (handle, options) = mount.fs().opendir(&call.context, local, wanted.flags)?;
            Ok(reply::open_out(handle, options.bits()))
        }
    }
}

pub fn releasedir(call: &Call<'_>) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let wanted: ReleaseIn = arguments.take()?;
    match call.target()? {
        Target::Pseudo(_) => Ok(()),
        Target::Mount(mount, local) => {
            let result = mount
                .fs()
                .releasedir(&call.context, local, wanted.flags, wanted.fh);
            match result.map_err(Errno::from) {
                Err(Errno::NOSYS) => Ok(()),
                result => result,
            }
        }
    }
}

/// Fills `body` with entries, at most `room` bytes of them.
pub fn readdir(opcode: Opcode, call: &Call<'_>, room: usize, body: &mut Vec<u8>) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let wanted: ReadIn = arguments.take()?;
    let size = wanted.size.min(u32::try_from(room).unwrap_or(u32::MAX));
    let plus = opcode == Opcode::Readdirplus;
    let mut listing = Listing::new(body, size as usize);
    match call.target()? {
        Target::Pseudo(node) => pseudo(call, node, wanted.offset, plus, &mut listing),
        Target::Mount(mount, local) => {
            let request = ReadIn { size, ..wanted };
            host(call, mount, local, &request, plus, &mut listing)
        }
    }
}

fn host(
    call: &Call<'_>,
    mount: &Mount,
    local: u64,
    wanted: &ReadIn,
    plus: bool,
    listing: &mut Listing<'_>,
) -> Result<(), Errno> {
    let ReadIn { fh, size, offset, .. } = *wanted;
    let ino = |entry: &DirEntry<'_>| entry.ino ^ mount.ino_mask;
    let result = if plus {
        let mut add = |entry: DirEntry<'_>, found: Entry| -> io::Result<usize> {
            let found =
                reply::entry(mount, &found).map_err(|errno| io::Error::from_raw_os_error(errno.get()))?;
            Ok(listing.add(Some(&found), ino(&entry), entry.offset, entry.type_, entry.name))
        };
        mount
            .fs()
            .readdirplus(&call.context, local, fh, size, offset, &mut add)
    } else {
        let mut add = |entry: DirEntry<'_>| -> io::Result<usize> {
            Ok(listing.add(None, ino(&entry), entry.offset, entry.type_, entry.name))
        };
        mount
            .fs()
            .readdir(&call.context, local, fh, size, offset, &mut add)
    };
    match result {
        // What was listed before the error is not lost: the error comes again with the next request.
        Err(_) if !listing.is_empty() => Ok(()),
        result => Ok(result?),
    }
}

fn pseudo(
    call: &Call<'_>,
    node: &Node,
    after: u64,
    plus: bool,
    listing: &mut Listing<'_>,
) -> Result<(), Errno> {
    // Nothing is known to the guest of `.` and `..` that it should remember: nodeid 0.
    let dots = [
        (1, &b"."[..], node.ino()),
        (2, &b".."[..], call.table.parent_ino(node)),
    ];
    for (position, name, ino) in dots {
        let known = EntryOut {
            attr: crate::fuse::abi::Attr {
                ino,
                ..Default::default()
            },
            ..Default::default()
        };
        if position > after && listing.add(plus.then_some(&known), ino, position, DIRECTORY, name) == 0 {
            return Ok(());
        }
    }
    for (position, name, ino) in call.table.entries(node, after) {
        let known = match call.table.child(node, name) {
            Some(Child::Directory(child)) => reply::pseudo_entry(child),
            // A root that cannot be read is listed, and found out about when it is looked up.
            Some(Child::Mountpoint(mount)) => mountpoint(call, mount).unwrap_or_default(),
            None => continue,
        };
        let ino = if known.attr.ino != 0 { known.attr.ino } else { ino };
        if listing.add(plus.then_some(&known), ino, position, DIRECTORY, name) == 0 {
            break;
        }
    }
    Ok(())
}
