//! Extended attributes.
//!
//! They are read and written by way of `/proc/self/fd/N`: the calls that take a descriptor refuse O_PATH ones, and
//! opening a file to read its attributes would be impossible for device nodes, fifos and symbolic links.

use std::borrow::Cow;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::PassthroughFs;
use super::usage::settle;
use crate::inode::Inode;
use crate::proc::FdText;
use crate::sys::errno;

/// Longest value and longest list of names that Linux allows, in bytes.
const VALUE_MAX: usize = 65_536;
/// The attribute that holds a file's access ACL.
const ACCESS_ACL: &CStr = c"system.posix_acl_access";
/// The attribute that holds the ACL of what is made in a directory.
const DEFAULT_ACL: &CStr = c"system.posix_acl_default";

impl PassthroughFs {
    fn xattr_node(&self, inode: u64) -> io::Result<Arc<Inode>> {
        if !self.options.xattr {
            return Err(errno(libc::EOPNOTSUPP));
        }
        self.inode(inode)
    }

    /// Whether the guest's kernel keeps ACLs, as of the whole connection, and this mount serves none.
    fn withholds_acls(&self) -> bool {
        self.has(FsOptions::POSIX_ACL) && !self.serves_acls()
    }

    /// Whether `name` is an ACL that is withheld.
    fn withholds(&self, name: &CStr) -> bool {
        (name == ACCESS_ACL || name == DEFAULT_ACL) && self.withholds_acls()
    }

    /// The name under which the host stores what the guest calls `name`.
    fn stored_name<'a>(&self, name: &'a CStr) -> io::Result<Cow<'a, CStr>> {
        match &self.options.xattr_rules {
            None => Ok(Cow::Borrowed(name)),
            Some(rules) => rules.to_host(name),
        }
    }

    /// GETXATTR. `size` 0 asks for the length of the value.
    pub(super) fn get_xattr(&self, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        if self.withholds(name) {
            return Err(errno(libc::ENODATA));
        }
        let node = self.xattr_node(inode)?;
        let name = &*self.stored_name(name)?;
        let fd = node.fd()?;
        let path = FdText::absolute(fd.as_fd())?;
        if size == 0 {
            let length = rustix::fs::getxattr_query(path.as_c_str(), name)?;
            return Ok(GetxattrReply::Count(length as u32));
        }
        let mut value = vec![0; (size as usize).min(VALUE_MAX)];
        let length = rustix::fs::getxattr(path.as_c_str(), name, value.as_mut_slice())?;
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    /// LISTXATTR. `size` 0 asks for the length of the list.
    pub(super) fn list_xattr(&self, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let node = self.xattr_node(inode)?;
        let fd = node.fd()?;
        let path = FdText::absolute(fd.as_fd())?;
        if self.options.xattr_rules.is_some() || self.withholds_acls() {
            let names = self.names_for_guest(path.as_c_str())?;
            return match size as usize {
                0 => Ok(ListxattrReply::Count(names.len() as u32)),
                size if size < names.len() => Err(errno(libc::ERANGE)),
                _ => Ok(ListxattrReply::Names(names)),
            };
        }
        if size == 0 {
            let length = rustix::fs::listxattr_query(path.as_c_str())?;
            return Ok(ListxattrReply::Count(length as u32));
        }
        let mut names = vec![0u8; (size as usize).min(VALUE_MAX)];
        let length = rustix::fs::listxattr(path.as_c_str(), names.as_mut_slice())?;
        names.truncate(length);
        Ok(ListxattrReply::Names(names))
    }

    /// The names of the file behind `path` that the guest may know, as it knows them, each with its NUL.
    fn names_for_guest(&self, path: &CStr) -> io::Result<Vec<u8>> {
        let mut stored = vec![0u8; VALUE_MAX];
        let length = rustix::fs::listxattr(path, stored.as_mut_slice())?;
        let mut names = Vec::new();
        for stored in stored
            .get(..length)
            .unwrap_or(&[])
            .split_inclusive(|byte| *byte == 0)
        {
            let Ok(stored) = CStr::from_bytes_with_nul(stored) else {
                continue;
            };
            let name = match &self.options.xattr_rules {
                None => Some(stored.to_bytes()),
                Some(rules) => rules.to_guest(stored.to_bytes()),
            };
            if let Some(name) = name.filter(|_| !self.withholds(stored)) {
                names.extend_from_slice(name);
                names.push(0);
            }
        }
        Ok(names)
    }

    /// SETXATTR; with `kill_setgid` (FUSE_SETXATTR_ACL_KILL_SGID) the file loses its set-group-id bit, because the
    /// caller sets an ACL on a file of a group that it is not in.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP where this mount or the host serves no such attribute, EROFS, and what the host says.
    pub fn setxattr_with(
        &self,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_setgid: bool,
    ) -> io::Result<()> {
        self.writable()?;
        let node = self.xattr_node(inode)?;
        let change = self.change_beside(&node, value.len())?;
        let charge = self.charge_in(&change, &node)?;
        self.set_xattr_of(&node, name, value, flags)?;
        settle(&change, &charge, node.fd()?.as_fd());
        drop(change);
        if kill_setgid && name == ACCESS_ACL {
            let mode = rustix::fs::fstat(&node.fd()?)?.st_mode;
            if mode & libc::S_ISGID != 0 {
                self.change_mode(&node, mode & 0o7777 & !libc::S_ISGID)?;
            }
        }
        Ok(())
    }

    fn set_xattr_of(&self, node: &Arc<Inode>, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        if self.withholds(name) {
            return Err(errno(libc::EOPNOTSUPP));
        }
        if value.len() > VALUE_MAX {
            return Err(errno(libc::E2BIG));
        }
        let name = &*self.stored_name(name)?;
        let fd = node.fd()?;
        let path = FdText::absolute(fd.as_fd())?;
        let flags = XattrFlags::from_bits(flags).ok_or_else(|| errno(libc::EINVAL))?;
        Ok(rustix::fs::setxattr(path.as_c_str(), name, value, flags)?)
    }

    /// Puts security labels on a file that has just been made.
    pub(super) fn label(&self, node: &Arc<Inode>, labels: &[(&CStr, &[u8])]) -> io::Result<()> {
        labels
            .iter()
            .try_for_each(|(name, value)| self.set_xattr_of(node, name, value, 0))
    }

    /// REMOVEXATTR.
    pub(super) fn remove_xattr(&self, inode: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        if self.withholds(name) {
            return Err(errno(libc::EOPNOTSUPP));
        }
        let node = self.xattr_node(inode)?;
        let name = &*self.stored_name(name)?;
        let fd = node.fd()?;
        let path = FdText::absolute(fd.as_fd())?;
        let change = self.change_of(&node);
        let charge = self.charge_in(&change, &node)?;
        rustix::fs::removexattr(path.as_c_str(), name)?;
        settle(&change, &charge, fd.as_fd());
        Ok(())
    }

    /// Ends the file capabilities of an open file that is about to change, if they are stored under a name that the
    /// host's kernel does not know and clear by itself (CVE-2021-20263).
    pub(super) fn end_capability(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        match &self.stored_capability {
            None => Ok(()),
            Some(name) => absent_is_fine(rustix::fs::fremovexattr(file, name.as_c_str())),
        }
    }

    /// As [`Self::end_capability`], for a file that is not open.
    pub(super) fn end_capability_of(&self, node: &Arc<Inode>) -> io::Result<()> {
        match &self.stored_capability {
            Some(name) if node.is_regular() => {
                let fd = node.fd()?;
                absent_is_fine(rustix::fs::removexattr(
                    FdText::absolute(fd.as_fd())?.as_c_str(),
                    name.as_c_str(),
                ))
            }
            _ => Ok(()),
        }
    }
}

fn absent_is_fine(removed: Result<(), Errno>) -> io::Result<()> {
    match removed {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
