//! Open files: OPEN, READ, WRITE, and what else is done with a handle.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rafs::fs::{HeldChunks, ReadOutcome};
use zerocopy::IntoBytes;

use super::entries::same_mount;
use super::{Call, Server, fail};
use crate::fuse::abi::{
    CopyFileRangeIn, FSYNC_FDATASYNC, FallocateIn, FlushIn, FsyncIn, IoctlIn, IoctlOut, LseekIn, LseekOut,
    Opcode, OpenIn, OpenOut, READ_LOCKOWNER, RELEASE_FLOCK_UNLOCK, RELEASE_FLUSH, ReadIn, ReleaseIn,
    WRITE_CACHE, WRITE_LOCKOWNER, WriteIn, WriteOut, init,
};
use crate::fuse::decode::WRITE_DATA;
use crate::fuse::errno::Errno;
use crate::fuse::reply;
use crate::mounts::{HostFs, Instance, Mount, Target};
use crate::virtio::parked::ImageRead;
use crate::virtio::request::Request;

/// Read the inode flags (`chattr`); the type of the argument has two sizes.
const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC32_GETFLAGS: u32 = 0x8004_6601;
/// Change the inode flags.
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC32_SETFLAGS: u32 = 0x4004_6602;
/// Read and change the extended inode flags (project ids).
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;
/// Bytes of `struct fsxattr`.
const FSXATTR: u32 = 28;

pub fn open(server: &Server, call: &Call<'_>) -> Result<OpenOut, Errno> {
    let mut arguments = call.arguments;
    let wanted: OpenIn = arguments.take()?;
    match call.target()? {
        Target::Pseudo(_) => Err(Errno::ISDIR),
        Target::Mount(mount, local) => {
            let changes = wanted.flags & (libc::O_ACCMODE | libc::O_TRUNC) as u32 != libc::O_RDONLY as u32;
            if mount.read_only && changes {
                return Err(Errno::ROFS);
            }
            let (handle, options, _) =
                mount
                    .fs()
                    .open(&call.context, local, wanted.flags, wanted.open_flags)?;
            let handle = handle.or_else(|| server.handle_for_locks());
            Ok(reply::open_out(handle, options.bits()))
        }
    }
}

impl Server {
    /// A handle for a file that needs none: RELEASE names nothing else by which the locks of an open file could be told.
    fn handle_for_locks(&self) -> Option<u64> {
        (self.session.has(init::POSIX_LOCKS | init::FLOCK_LOCKS))
            .then(|| self.last_handle.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

pub fn read(server: &Server, call: &Call<'_>, mut request: Request<'_>) {
    let mut arguments = call.arguments;
    let target = arguments
        .take::<ReadIn>()
        .and_then(|wanted| Ok((wanted, call.target()?)));
    let (wanted, mount, local) = match target {
        Ok((wanted, Target::Mount(mount, local))) => (wanted, mount, local),
        Ok((_, Target::Pseudo(_))) => return request.fail(libc::EISDIR),
        Err(errno) => return request.fail(errno.get()),
    };
    let size = wanted.size.min(u32::try_from(request.room()).unwrap_or(u32::MAX));
    let mut writer = request.data(size as usize);
    let image = match &mount.instance {
        Instance::Rafs(image) => image,
        Instance::Passthrough(host) => {
            let owner = (wanted.read_flags & READ_LOCKOWNER != 0).then_some(wanted.lock_owner);
            let ReadIn {
                fh, offset, flags, ..
            } = wanted;
            let result = host.read(&call.context, local, fh, &mut writer, size, offset, owner, flags);
            let written = writer.written();
            return match result {
                Ok(_) => request.reply_written(written),
                Err(error) => fail(request, Opcode::Read, error.into()),
            };
        }
    };
    match image.read_resident(local, wanted.offset, size, &HeldChunks::default(), &mut writer) {
        Ok(ReadOutcome::Done(_)) => {
            let written = writer.written();
            request.reply_written(written);
        }
        Ok(ReadOutcome::Absent(absent)) => {
            let read = ImageRead {
                inode: local,
                offset: wanted.offset,
                size,
            };
            server.deferred.park_read(request, mount, read, absent);
        }
        Err(error) => fail(request, Opcode::Read, error.into()),
    }
}

pub fn write(call: &Call<'_>, mut request: Request<'_>) {
    let mut arguments = call.arguments;
    let target = arguments
        .take::<WriteIn>()
        .and_then(|wanted| Ok((wanted, call.writable(call.header.nodeid)?)));
    let (wanted, (_, host, local)) = match target {
        Ok(target) => target,
        Err(errno) => return request.fail(errno.get()),
    };
    if (call.header.len as usize).saturating_sub(WRITE_DATA) < wanted.size as usize {
        // Less data than announced.
        return request.fail(libc::EINVAL);
    }
    let WriteIn {
        fh,
        offset,
        size,
        write_flags,
        lock_owner,
        flags,
        ..
    } = wanted;
    let owner = (write_flags & WRITE_LOCKOWNER != 0).then_some(lock_owner);
    let delayed = write_flags & WRITE_CACHE != 0;
    let mut reader = request.payload(WRITE_DATA, size as usize);
    let result = host.write(
        &call.context,
        local,
        fh,
        &mut reader,
        size,
        offset,
        owner,
        delayed,
        flags,
        write_flags,
    );
    match result {
        Ok(written) => request.reply_wrote(&WriteOut {
            size: written as u32,
            padding: 0,
        }),
        Err(error) => fail(request, Opcode::Write, error.into()),
    }
}

pub fn flush(server: &Server, call: &Call<'_>) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let wanted: FlushIn = arguments.take()?;
    server.locks.flush(call.header.nodeid, wanted.lock_owner);
    match call.target()? {
        Target::Mount(mount, local) => match &mount.instance {
            Instance::Passthrough(host) => {
                Ok(host.flush(&call.context, local, wanted.fh, wanted.lock_owner)?)
            }
            Instance::Rafs(_) => Ok(()),
        },
        Target::Pseudo(_) => Ok(()),
    }
}

pub fn release(server: &Server, call: &Call<'_>) -> Result<(), Errno> {
    let mut arguments = call.arguments;
    let wanted: ReleaseIn = arguments.take()?;
    server.locks.release(call.header.nodeid, wanted.fh);
    let Target::Mount(mount, local) = call.target()? else {
        return Ok(());
    };
    let flush = wanted.release_flags & RELEASE_FLUSH != 0;
    let unlock = wanted.release_flags & RELEASE_FLOCK_UNLOCK != 0;
    let owner = (flush || unlock).then_some(wanted.lock_owner);
    let result = mount.fs().release(
        &call.context,
        local,
        wanted.flags,
        wanted.fh,
        flush,
        unlock,
        owner,
    );
    match result.map_err(Errno::from) {
        Err(Errno::NOSYS) => Ok(()),
        result => result,
    }
}

pub fn lseek(call: &Call<'_>) -> Result<LseekOut, Errno> {
    let mut arguments = call.arguments;
    let wanted: LseekIn = arguments.take()?;
    let LseekIn {
        fh, offset, whence, ..
    } = wanted;
    let Target::Mount(mount, local) = call.target()? else {
        return Err(Errno::ISDIR);
    };
    match mount
        .fs()
        .lseek(&call.context, local, fh, offset, whence)
        .map_err(Errno::from)
    {
        Err(Errno::NOSYS) => {
            let size = mount.fs().getattr(&call.context, local, None)?.0.st_size as u64;
            dense_seek(offset, whence, size)
        }
        result => Ok(LseekOut { offset: result? }),
    }
}

/// Data everywhere, and a hole at the end, as Linux has it for file systems that do not know better.
fn dense_seek(offset: u64, whence: u32, size: u64) -> Result<LseekOut, Errno> {
    match i32::try_from(whence) {
        Ok(libc::SEEK_DATA) if offset < size => Ok(LseekOut { offset }),
        Ok(libc::SEEK_HOLE) if offset < size => Ok(LseekOut { offset: size }),
        Ok(libc::SEEK_DATA | libc::SEEK_HOLE) => Err(Errno::NXIO),
        _ => Err(Errno::INVAL),
    }
}

/// overlayfs asks for the inode flags of everything that it copies up.
pub fn ioctl(call: &Call<'_>, request: Request<'_>) {
    let mut arguments = call.arguments;
    let target = arguments.take::<IoctlIn>().and_then(|wanted| {
        let input = arguments.bytes(wanted.in_size)?;
        Ok((wanted, input, call.target()?))
    });
    let (wanted, input, target) = match target {
        Ok(target) => target,
        Err(errno) => return request.fail(errno.get()),
    };
    if let Target::Mount(mount, local) = target
        && let Instance::Passthrough(host) = &mount.instance
        && !(mount.read_only && changes_flags(wanted.cmd))
    {
        let IoctlIn {
            fh, cmd, out_size, ..
        } = wanted;
        return match host.ioctl_inline(&call.context, local, fh, cmd, input, out_size) {
            Ok(reply) => {
                let out = IoctlOut {
                    result: reply.result,
                    ..IoctlOut::default()
                };
                request.reply_parts(out.as_bytes(), reply.data());
            }
            // What the guest's kernel makes of ENOSYS is ENOTTY.
            Err(error) => fail(
                request,
                Opcode::Ioctl,
                match Errno::from(error) {
                    Errno::NOSYS => Errno::NOTTY,
                    errno => errno,
                },
            ),
        };
    }
    // Files of images and pseudo directories have no flags set.
    match wanted.cmd {
        FS_IOC_GETFLAGS | FS_IOC32_GETFLAGS if wanted.out_size >= 4 => {
            request.reply_parts(IoctlOut::default().as_bytes(), &[0; 4]);
        }
        FS_IOC_FSGETXATTR if wanted.out_size >= FSXATTR => {
            request.reply_parts(IoctlOut::default().as_bytes(), &[0; FSXATTR as usize]);
        }
        cmd if changes_flags(cmd) => request.fail(libc::EROFS),
        _ => request.fail(libc::ENOTTY),
    }
}

fn changes_flags(cmd: u32) -> bool {
    matches!(cmd, FS_IOC_SETFLAGS | FS_IOC32_SETFLAGS | FS_IOC_FSSETXATTR)
}

pub fn fsync(server: &Server, opcode: Opcode, call: &Call<'_>, request: Request<'_>) {
    let mut arguments = call.arguments;
    let target = arguments
        .take::<FsyncIn>()
        .and_then(|wanted| Ok((wanted, call.target()?)));
    let (wanted, target) = match target {
        Ok(target) => target,
        Err(errno) => return request.fail(errno.get()),
    };
    let Target::Mount(mount, local) = target else {
        return request.reply_empty();
    };
    if let Instance::Rafs(_) = &mount.instance {
        return request.reply_empty();
    }
    let context = call.context;
    let data_only = wanted.fsync_flags & FSYNC_FDATASYNC != 0;
    on_host(server, request, mount, move |host| {
        if opcode == Opcode::Fsyncdir {
            host.fsyncdir(&context, local, data_only, wanted.fh)?;
        } else {
            host.fsync(&context, local, data_only, wanted.fh)?;
        }
        Ok(Vec::new())
    });
}

/// Has a worker do `job` on the host tree behind `mount`.
fn on_host<J>(server: &Server, request: Request<'_>, mount: &Arc<Mount>, job: J)
where
    J: FnOnce(&dyn HostFs) -> Result<Vec<u8>, Errno> + Send + 'static,
{
    let kept = Arc::clone(mount);
    server
        .deferred
        .run(request, Some(mount), move || match &kept.instance {
            Instance::Passthrough(host) => job(host.as_ref()),
            Instance::Rafs(_) => Err(Errno::ROFS),
        });
}

/// SYNCFS names the root of what the guest sees as one file system: everything below has to be written back.
pub fn syncfs(server: &Server, call: &Call<'_>, request: Request<'_>) {
    let mounts: Vec<(Arc<Mount>, u64)> = match call.target() {
        Ok(Target::Mount(mount, local)) => vec![(Arc::clone(mount), local)],
        Ok(Target::Pseudo(_)) => call
            .table
            .mounts()
            .iter()
            .map(|mount| (Arc::clone(mount), mount.root))
            .collect(),
        Err(errno) => return request.fail(errno.get()),
    };
    server.deferred.run(request, None, move || {
        for (mount, local) in mounts {
            if let Instance::Passthrough(host) = &mount.instance
                && !mount.read_only
            {
                host.syncfs(local)?;
            }
        }
        Ok(Vec::new())
    });
}

pub fn fallocate(server: &Server, call: &Call<'_>, request: Request<'_>) {
    let mut arguments = call.arguments;
    let target = arguments
        .take::<FallocateIn>()
        .and_then(|wanted| Ok((wanted, call.writable(call.header.nodeid)?)));
    let (wanted, mount, local) = match target {
        Ok((wanted, (mount, _, local))) => (wanted, mount, local),
        Err(errno) => return request.fail(errno.get()),
    };
    let context = call.context;
    on_host(server, request, mount, move |host| {
        let FallocateIn {
            fh,
            offset,
            length,
            mode,
            ..
        } = wanted;
        host.fallocate(&context, local, fh, mode, offset, length)?;
        Ok(Vec::new())
    });
}

pub fn copy_file_range(server: &Server, call: &Call<'_>, request: Request<'_>) {
    let plan = || {
        let mut arguments = call.arguments;
        let wanted: CopyFileRangeIn = arguments.take()?;
        let (mount, _, to) = call.writable(wanted.nodeid_out)?;
        let from = same_mount(call, mount, call.header.nodeid)?;
        Ok((wanted, mount, from, to))
    };
    let (wanted, mount, from, to) = match plan() {
        Ok(plan) => plan,
        Err(errno) => return fail(request, Opcode::CopyFileRange, errno),
    };
    let context = call.context;
    on_host(server, request, mount, move |host| {
        let CopyFileRangeIn {
            fh_in,
            off_in,
            fh_out,
            off_out,
            len,
            flags,
            ..
        } = wanted;
        let copied =
            host.copy_file_range(&context, (from, fh_in, off_in), (to, fh_out, off_out), len, flags)?;
        let size = u32::try_from(copied).map_err(|_| Errno::OVERFLOW)?;
        Ok(WriteOut { size, padding: 0 }.as_bytes().to_vec())
    });
}
