//! A mount table and System V objects of our own.
//!
//! The mounts of the host stay where they are, because any of them may be mounted later, and go on to appear: the whole
//! tree is a slave of the host's. Only `/proc` is mounted afresh, read-only and with no process of others in it, and
//! `/sys` is made read-only: to user 0, with no capability at all, the files there are a way out.
//!
//! There is no pid namespace. It would begin with a child, and runtimes that put the process they started into the
//! sandbox's cgroup would account for and kill the parent alone. What it is for is had otherwise: others are not in
//! `/proc`, cannot be signalled (Landlock, system call filters) nor traced (capabilities, filters). Nor is there a
//! user namespace: it would give an unprivileged daemon nothing but the mount table, for which it has no use, and files of
//! others would show as nobody's.
//!
//! This is the only place of the sandbox with `unsafe` code.
#![allow(unsafe_code)]

use std::io;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, unshare_unsafe};

use super::Failure;

const LAYER: &str = "mount namespace";

/// Enters the namespaces. Returns what the host does not give.
pub fn enter() -> Result<Vec<String>, Failure> {
    let failed = |error: rustix::io::Errno| Failure::new(LAYER, error);
    let missing = |why: &str| Ok(vec![format!("no mount namespace: {why}")]);
    if !capabilities(None)
        .map_err(failed)?
        .effective
        .contains(CapabilitySet::SYS_ADMIN)
    {
        return missing("the daemon was started without CAP_SYS_ADMIN");
    }
    let table =
        std::fs::read_to_string("/proc/self/mountinfo").map_err(|error| Failure::new(LAYER, error))?;
    if !root_receives_mounts(&table) {
        return missing(
            "the host's root is mounted private, so mounts made later would never appear (`mount --make-rshared /` makes it shared)",
        );
    }
    // SAFETY: only the mount table, the working directory, the root and System V objects are unshared. The descriptor
    // table and memory, which others rely on, stay as they are, and there is one thread.
    if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWIPC) } {
        return missing(&error.to_string());
    }
    // Nothing that is mounted here may reach the host, so this one is no matter of taste.
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .map_err(failed)?;
    let mut notices = Vec::new();
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if let Err(error) = mount("proc", "/proc", "proc", flags, c"hidepid=2") {
        notices.push(format!("/proc stays the host's: {error}"));
    }
    if let Err(error) = make_read_only(c"/sys") {
        notices.push(format!("/sys stays writable: {error}"));
    }
    Ok(notices)
}

/// Enters the namespaces but that of mounts, for a daemon whose mount the host is to see. Returns what is left out.
pub fn enter_all_but_mounts() -> Result<Vec<String>, Failure> {
    let mut notices = vec!["no mount namespace: the host would not see the mount".to_owned()];
    // SAFETY: only System V objects are unshared, of which there are none.
    if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWIPC) } {
        notices.push(format!("no IPC namespace: {error}"));
    }
    Ok(notices)
}

/// Whether the root of the mount table passes on or receives what is mounted elsewhere.
fn root_receives_mounts(table: &str) -> bool {
    let of_root = |line: &&str| line.split(' ').nth(4) == Some("/");
    let receives = |line: &str| {
        line.split(' ')
            .skip(6)
            .take_while(|field| *field != "-")
            .any(|field| field.starts_with("shared:") || field.starts_with("master:"))
    };
    // Of several, one upon another, the last is the one that is seen.
    table.lines().rfind(of_root).is_some_and(receives)
}

/// Makes the mount at `path` and all below it read-only, in this namespace.
fn make_read_only(path: &std::ffi::CStr) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: `path` ends with NUL and `attributes` is a `struct mount_attr` of the size told; the kernel reads both
    // and keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn propagation_is_read_from_the_mount_table() {
        let line = |fields: &str| format!("27 1 254:0 / / rw,relatime{fields} - ext4 /dev/vda rw");
        assert!(root_receives_mounts(&line(" shared:1")));
        assert!(root_receives_mounts(&line(" master:7 propagate_from:2")));
        assert!(!root_receives_mounts(&line("")));
        assert!(!root_receives_mounts(&line(" unbindable")));
        assert!(!root_receives_mounts(""));
        let upon = format!("{}\n{}\n", line(" shared:1"), line(""));
        assert!(!root_receives_mounts(&upon));
        let other = "28 27 0:25 / /mnt rw shared:9 - tmpfs x rw";
        assert!(!root_receives_mounts(&format!("{}\n{other}", line(""))));
    }
}
