//! An image becomes a tar.

use std::collections::HashMap;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use rafs::build::TemporaryFile;
use rafs::inode::{Inode, Kind};
use rafs::reader::Step;
use rafs::tar::{self, Member, Writer};

use super::super::blobs::Reader;
use super::super::inspect::{major, minor, printable};
use super::super::progress::Bar;
use super::{Source, UnpackError};

/// Writes the image to `output`, or to standard output if that is `-`. A file appears when it is complete.
pub(super) fn unpack(source: &Source<'_>, output: &Path) -> Result<(), super::BoxError> {
    let bar = Bar::bytes("unpacking");
    bar.expect(source.bytes());
    if output == Path::new("-") {
        write(source, output, &mut io::stdout().lock(), &bar)?;
        return Ok(());
    }
    let directory = output
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let file = TemporaryFile::create_in(directory)?;
    write(source, output, &mut file.file(), &bar)?;
    Ok(file.publish(output)?)
}

fn write(source: &Source<'_>, output: &Path, to: &mut dyn Write, bar: &Bar) -> Result<(), UnpackError> {
    let failed = |source| UnpackError::Io {
        action: "write",
        path: output.to_owned(),
        source,
    };
    let mut writer = Writer::new(BufWriter::with_capacity(1 << 18, to));
    let mut reader = source.reader();
    let mut first_names: HashMap<u64, Vec<u8>> = HashMap::new();
    source
        .image
        .walk(&mut |step: Step<'_>| -> Result<(), UnpackError> {
            let path = step.path;
            let inode = step.inode.map_err(|source| UnpackError::Damaged {
                path: path.to_vec(),
                source,
            })?;
            let Some(mut member) = member(source, path, inode)? else {
                eprintln!("rafs: {}: a tar has no sockets, left out", printable(path));
                return Ok(());
            };
            if inode.is_hardlinked() {
                match first_names.get(&inode.id) {
                    Some(first) => {
                        let link = Member {
                            kind: tar::Kind::HardLink,
                            link: first.clone(),
                            size: 0,
                            ..member
                        };
                        return writer
                            .member(&Member {
                                xattrs: Vec::new(),
                                ..link
                            })
                            .map_err(failed);
                    }
                    None => {
                        first_names.insert(inode.id, member.path.clone());
                    }
                }
            }
            if inode.kind == Kind::File {
                member.size = inode.size;
            }
            writer.member(&member).map_err(failed)?;
            if inode.kind == Kind::File {
                copy(source, path, inode, &mut reader, &mut |data| {
                    bar.add(data.len() as u64);
                    writer.data(data).map_err(failed)
                })?;
            }
            Ok(())
        })?;
    writer.finish().map(drop).map_err(failed)
}

fn copy(
    source: &Source<'_>,
    path: &[u8],
    inode: &Inode,
    reader: &mut Reader,
    take: &mut dyn FnMut(&[u8]) -> Result<(), UnpackError>,
) -> Result<(), UnpackError> {
    let mut end = 0;
    source.data(path, inode, reader, &mut |offset, data| {
        zeros(offset - end, take)?;
        end = offset + data.len() as u64;
        take(data)
    })?;
    zeros(inode.size - end, take)
}

/// Hands a hole of the image over.
fn zeros(mut size: u64, take: &mut dyn FnMut(&[u8]) -> Result<(), UnpackError>) -> Result<(), UnpackError> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    while size > 0 {
        let some = ZEROS.get(..size as usize).unwrap_or(&ZEROS);
        take(some)?;
        size -= some.len() as u64;
    }
    Ok(())
}

/// The member for an inode; `None` for a socket.
fn member(source: &Source<'_>, path: &[u8], inode: &Inode) -> Result<Option<Member>, UnpackError> {
    let damaged = |source| UnpackError::Damaged {
        path: path.to_vec(),
        source,
    };
    let kind = match inode.kind {
        Kind::File => tar::Kind::Regular,
        Kind::Directory => tar::Kind::Directory,
        Kind::Symlink => tar::Kind::Symlink,
        Kind::Char => tar::Kind::Char,
        Kind::Block => tar::Kind::Block,
        Kind::Fifo => tar::Kind::Fifo,
        Kind::Socket => return Ok(None),
    };
    let link = if inode.kind == Kind::Symlink {
        source.image.symlink_target(inode).map_err(damaged)?
    } else {
        Vec::new()
    };
    // `./a/b`, a directory with a slash at its end.
    let mut name = [b".", path].concat();
    if inode.kind == Kind::Directory && path != b"/" {
        name.push(b'/');
    }
    Ok(Some(Member {
        path: name,
        kind,
        link,
        mode: inode.mode & 0o7777,
        uid: inode.uid,
        gid: inode.gid,
        mtime: inode.mtime,
        mtime_nsec: inode.mtime_nsec,
        size: 0,
        device: (major(inode.rdev), minor(inode.rdev)),
        xattrs: source.image.xattrs(inode).map_err(damaged)?.into_iter().collect(),
    }))
}
