//! Whose name a request acts in, for the length of one system call.
//!
//! The guest's kernel has checked permissions before it sends a request. What is left for the host is ownership: a new
//! file must belong to the user who made it, with the set-group-id rules and the default ACLs of the directory applied
//! as a local kernel would. So calls that create something run under the request's user and group, all others as the
//! daemon.
//!
//! Linux credentials belong to threads. The raw system calls used here change the calling thread alone; the guards put
//! everything back when they are dropped, and a thread that cannot get its identity back ends the process, because its
//! next request would run as the wrong user. While a thread acts as a user it holds no capability but those that
//! repeat a decision of the guest's kernel (CAP_DAC_OVERRIDE, and CAP_MKNOD for device nodes), and in particular not
//! CAP_FSETID, so the host strips set-group-id bits from files of a group the user is not in.

use std::cell::OnceCell;
use std::io;

use rustix::fs::{Gid, Mode, Uid};
use rustix::process::umask;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use crate::ids::{IdMap, IdMaps};
use crate::sys::{errno, unshare_fs};

thread_local! {
    static BASE: OnceCell<Base> = const { OnceCell::new() };
}

/// What a thread is between requests.
#[derive(Clone, Copy, Debug)]
struct Base {
    uid: Uid,
    gid: Gid,
    capabilities: CapabilitySets,
}

impl Base {
    fn has(&self, capability: CapabilitySet) -> bool {
        self.capabilities.effective.contains(capability)
    }
}

/// Makes the calling thread fit to act for users: a umask of its own (0) and no supplementary groups.
///
/// Done by the first request that needs it; a thread that will lose the right to call `unshare` or `setgroups` to a
/// system call filter calls this before. Nothing else may change the thread's credentials or umask afterwards.
///
/// # Errors
///
/// The errno of `unshare`, `capget` or `setgroups`.
pub fn prepare_thread() -> io::Result<()> {
    base().map(drop)
}

fn base() -> io::Result<Base> {
    BASE.with(|cell| {
        if let Some(base) = cell.get() {
            return Ok(*base);
        }
        unshare_fs()?;
        umask(Mode::empty());
        let base = Base {
            uid: rustix::process::geteuid(),
            gid: rustix::process::getegid(),
            capabilities: capabilities(None)?,
        };
        // Groups that the daemon happened to be started with must not count as the user's (CVE-2022-0358).
        if base.has(CapabilitySet::SETGID) {
            set_thread_groups(&[])?;
        }
        Ok(*cell.get_or_init(|| base))
    })
}

/// What the guest's user 0 is if nothing else is said: user 0, or the daemon's own user if the daemon can be no other.
pub(crate) fn ids_of_daemon() -> IdMaps {
    let sets = CapabilitySet::SETUID | CapabilitySet::SETGID;
    if capabilities(None).is_ok_and(|own| own.effective.contains(sets)) {
        return IdMaps::default();
    }
    let one = |own: u32| {
        if own == 0 {
            IdMap::default()
        } else {
            IdMap::one(0, own)
        }
    };
    IdMaps {
        users: one(rustix::process::geteuid().as_raw()),
        groups: one(rustix::process::getegid().as_raw()),
    }
}

/// Ends the process: a thread that keeps a guest user's identity, or lacks its own, must not serve another request.
fn lost_identity(what: &str, error: rustix::io::Errno) -> ! {
    tracing::error!(%error, what, "cannot restore the credentials of a thread");
    std::process::abort()
}

/// The calling thread acts as a user of the guest until this is dropped.
#[derive(Debug)]
#[must_use = "the thread changes back when the guard is dropped"]
pub(crate) struct ActingAs {
    base: Base,
    uid: bool,
    gid: bool,
    groups: bool,
}

impl ActingAs {
    /// Acts as `uid` and `gid`, with `group` as the only supplementary group, keeping the capabilities `keep`.
    ///
    /// Costs nothing when the thread is that user already. EPERM when the daemon may not become that user.
    pub(crate) fn user(uid: u32, gid: u32, group: Option<u32>, keep: CapabilitySet) -> io::Result<Self> {
        // -1 means "leave as it is" to the kernel: the request would run as the daemon.
        if uid == u32::MAX || gid == u32::MAX || group == Some(u32::MAX) {
            return Err(errno(libc::EINVAL));
        }
        let base = base()?;
        let mut acting = ActingAs {
            base,
            uid: false,
            gid: false,
            groups: false,
        };
        if let Some(group) = group.filter(|group| *group != gid) {
            set_thread_groups(&[Gid::from_raw(group)])?;
            acting.groups = true;
        }
        if gid != base.gid.as_raw() {
            set_thread_res_gid(None, Gid::from_raw(gid), None)?;
            acting.gid = true;
        }
        if uid != base.uid.as_raw() {
            set_thread_res_uid(None, Uid::from_raw(uid), None)?;
            acting.uid = true;
            // Leaving user 0 cleared every effective capability.
            let kept = keep & base.capabilities.effective;
            if !kept.is_empty() {
                set_capabilities(
                    None,
                    CapabilitySets {
                        effective: kept,
                        ..base.capabilities
                    },
                )?;
            }
        }
        Ok(acting)
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        if self.uid {
            set_thread_res_uid(None, self.base.uid, None)
                .unwrap_or_else(|error| lost_identity("user", error));
            // Returning to user 0 makes every permitted capability effective; any other user gets none back.
            set_capabilities(None, self.base.capabilities)
                .unwrap_or_else(|error| lost_identity("capabilities", error));
        }
        if self.gid {
            set_thread_res_gid(None, self.base.gid, None)
                .unwrap_or_else(|error| lost_identity("group", error));
        }
        if self.groups {
            set_thread_groups(&[]).unwrap_or_else(|error| lost_identity("groups", error));
        }
    }
}

/// The calling thread creates files with a umask other than 0 until this is dropped.
///
/// The host applies it as the guest's kernel would: not at all where the directory has a default ACL.
#[derive(Debug)]
#[must_use = "the umask changes back when the guard is dropped"]
pub(crate) struct Umask(bool);

impl Umask {
    /// Masks the permission bits `mask` (higher bits are ignored).
    pub(crate) fn set(mask: u32) -> io::Result<Self> {
        let mask = Mode::from_raw_mode(mask & 0o777);
        if mask.is_empty() {
            base()?;
            return Ok(Umask(false));
        }
        base()?;
        umask(mask);
        Ok(Umask(true))
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        if self.0 {
            umask(Mode::empty());
        }
    }
}

/// The calling thread lacks CAP_FSETID until this is dropped, so that the host clears set-user-id and set-group-id
/// bits of a file that is written or truncated.
#[derive(Debug)]
#[must_use = "the capability comes back when the guard is dropped"]
pub(crate) struct WithoutFsetid(Option<Base>);

impl WithoutFsetid {
    /// Gives the capability up if `drop` says so and the thread has it.
    pub(crate) fn when(drop: bool) -> io::Result<Self> {
        if !drop {
            return Ok(WithoutFsetid(None));
        }
        let base = base()?;
        if !base.has(CapabilitySet::FSETID) {
            return Ok(WithoutFsetid(None));
        }
        let effective = base.capabilities.effective - CapabilitySet::FSETID;
        set_capabilities(
            None,
            CapabilitySets {
                effective,
                ..base.capabilities
            },
        )?;
        Ok(WithoutFsetid(Some(base)))
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if let Some(base) = self.0 {
            set_capabilities(None, base.capabilities)
                .unwrap_or_else(|error| lost_identity("capabilities", error));
        }
    }
}
