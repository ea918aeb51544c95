//! Inode flags (`chattr`, `lsattr`) and extended flags (project ids), the only ioctls that a guest may make here.
//!
//! What the guest changes is its own: whether it may is decided by its kernel and, for `chattr +i` and the like, by the
//! capabilities that the daemon was left. What accounts for the guest is not its own: the project that the host's quota
//! counts a file for, and whether new files inherit it, cannot be changed from here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use fuse_backend_rs::api::filesystem::Context;

use super::PassthroughFs;
use crate::sys::{self, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, errno};

/// Length of `struct fsxattr`.
const EXTENDED: usize = 28;
/// `FS_PROJINHERIT_FL` of the inode flags.
const FLAG_PROJECT_INHERIT: u32 = 0x2000_0000;
/// `FS_XFLAG_PROJINHERIT` of the extended flags.
const EXTENDED_PROJECT_INHERIT: u32 = 0x200;

/// The answer to an ioctl: its result and the bytes it wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoctlReply {
    /// Return value of the ioctl.
    pub result: i32,
    data: [u8; EXTENDED],
    len: usize,
}

impl IoctlReply {
    /// EINVAL: the guest has less room than the ioctl writes.
    fn new(written: &[u8], room: u32) -> io::Result<Self> {
        let mut data = [0; EXTENDED];
        match data.get_mut(..written.len()) {
            Some(data) if written.len() <= room as usize => data.copy_from_slice(written),
            _ => return Err(errno(libc::EINVAL)),
        }
        Ok(IoctlReply {
            result: 0,
            data,
            len: written.len(),
        })
    }

    /// What the ioctl wrote.
    pub fn data(&self) -> &[u8] {
        self.data.get(..self.len).unwrap_or(&[])
    }
}

impl PassthroughFs {
    /// FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR; all others are ENOTTY.
    ///
    /// `input` is what the guest sent, `out_size` how much it takes back, both in bytes.
    ///
    /// # Errors
    ///
    /// ENOTTY, EINVAL for an argument of the wrong size, EPERM for a change of the project, EBADF, EROFS, and what the
    /// host's file system says.
    pub fn ioctl_inline(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        command: u32,
        input: &[u8],
        out_size: u32,
    ) -> io::Result<IoctlReply> {
        let handle = self.handles.get_any(handle, inode)?;
        let file = handle.as_fd();
        let wrong_size = || errno(libc::EINVAL);
        match command {
            FS_IOC_GETFLAGS => IoctlReply::new(&flags_of(file)?.to_ne_bytes(), out_size),
            FS_IOC_SETFLAGS => {
                self.writable()?;
                let mut wanted = *input.first_chunk::<4>().ok_or_else(wrong_size)?;
                if (u32::from_ne_bytes(wanted) ^ flags_of(file)?) & FLAG_PROJECT_INHERIT != 0 {
                    return Err(errno(libc::EPERM));
                }
                sys::inode_flags(file, command, &mut wanted)?;
                IoctlReply::new(&[], 0)
            }
            FS_IOC_FSGETXATTR => IoctlReply::new(&extended_flags_of(file)?, out_size),
            FS_IOC_FSSETXATTR => {
                self.writable()?;
                let mut wanted = *input.first_chunk::<EXTENDED>().ok_or_else(wrong_size)?;
                if project_of(&wanted) != project_of(&extended_flags_of(file)?) {
                    return Err(errno(libc::EPERM));
                }
                sys::extended_flags(file, command, &mut wanted)?;
                IoctlReply::new(&[], 0)
            }
            _ => Err(errno(libc::ENOTTY)),
        }
    }
}

fn flags_of(file: BorrowedFd<'_>) -> io::Result<u32> {
    let mut flags = [0; 4];
    sys::inode_flags(file, FS_IOC_GETFLAGS, &mut flags)?;
    Ok(u32::from_ne_bytes(flags))
}

fn extended_flags_of(file: BorrowedFd<'_>) -> io::Result<[u8; EXTENDED]> {
    let mut flags = [0; EXTENDED];
    sys::extended_flags(file, FS_IOC_FSGETXATTR, &mut flags)?;
    Ok(flags)
}

/// What a `struct fsxattr` says of the project: whether it is inherited, and its id.
fn project_of(extended: &[u8; EXTENDED]) -> (bool, u32) {
    let [a, b, c, d, _, _, _, _, _, _, _, _, e, f, g, h, ..] = *extended;
    (
        u32::from_ne_bytes([a, b, c, d]) & EXTENDED_PROJECT_INHERIT != 0,
        u32::from_ne_bytes([e, f, g, h]),
    )
}
