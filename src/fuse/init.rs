//! INIT: what the device offers, and the session that comes of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::abi::{InitInCompat, InitInExt, InitOut, init};
use fuse_backend_rs::api::filesystem::FsOptions;

use super::decode::Arguments;
use super::errno::Errno;
use crate::virtio::DeviceOptions;

/// The protocol's major version.
const MAJOR: u32 = 7;
/// The newest minor version whose structs and flags this device knows.
const MINOR: u32 = 41;
/// Linux has had virtio-fs since 5.4, which speaks 7.31.
const OLDEST_MINOR: u32 = 31;
/// Since then extensions are counted in the header of a request.
const EXTENSIONS_MINOR: u32 = 38;
/// Bytes of the data of a WRITE at most, and of a READ by way of `max_pages`.
pub const MAX_WRITE: u32 = 1 << 20;
const PAGE: u32 = 4096;

/// Offered whenever the driver knows them.
const WANTED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::HAS_IOCTL_DIR
    // Passthrough trees may be changed by the host.
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    // Each mount says which of its directories are other file systems of the host.
    | init::SUBMOUNTS
    | init::ABORT_ERROR
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// ACLs are kept, and honoured by the guest; modes come unmasked, since a default ACL may say otherwise.
const ACLS: u64 = init::POSIX_ACL | init::DONT_MASK;

/// Locks are asked of the device.
const LOCKS: u64 = init::POSIX_LOCKS | init::FLOCK_LOCKS;

/// Offered if the host trees that are mounted now want it: all of them for writeback, one for the rest.
const BY_MOUNTS: u64 = ACLS | LOCKS | init::WRITEBACK_CACHE;

/// What the driver and the device agreed on. Outlives a front-end's connection: a driver whose VMM connects
/// again does not send INIT again.
#[derive(Default)]
pub struct Session {
    initialised: AtomicBool,
    flags: AtomicU64,
    /// Offered on request of whoever started the device.
    extra: u64,
}

/// What INIT is answered with.
pub enum Greeting {
    /// The reply; a new session has begun.
    Agreed(InitOut),
    /// The driver is too new: it is told our major version and will ask again.
    TryOlder(InitOut),
}

impl Session {
    /// No session yet. With `security_labels` new files are labelled by the guest's security module; its labels
    /// must then be possible on all host trees. With `locks` the device is asked for locks, whatever is mounted when
    /// the guest starts. With `killpriv` the guest leaves it to the device to clear set-id bits of what is written, also
    /// for its overlays, whose writes come without a word of who made them: so they keep the bits.
    pub fn new(options: &DeviceOptions) -> Self {
        let extra = [
            (options.security_labels, init::SECURITY_CTX),
            (options.locks, LOCKS),
            (options.posix_acl, ACLS),
            (options.killpriv, init::HANDLE_KILLPRIV_V2),
        ];
        Session {
            extra: extra
                .iter()
                .filter(|(asked, _)| *asked)
                .fold(0, |all, (_, flags)| all | flags),
            ..Session::default()
        }
    }

    /// Negotiates a new session. `settle` says which of the offered flags the mounts agree to.
    pub fn init(
        &self,
        mut arguments: Arguments<'_>,
        settle: impl FnOnce(FsOptions, FsOptions) -> FsOptions,
    ) -> Result<Greeting, Errno> {
        let asked: InitInCompat = arguments.take()?;
        if asked.major > MAJOR {
            let reply = InitOut {
                major: MAJOR,
                minor: MINOR,
                ..InitOut::default()
            };
            return Ok(Greeting::TryOlder(reply));
        }
        if asked.major < MAJOR || asked.minor < OLDEST_MINOR {
            tracing::error!(asked.major, asked.minor, "the guest's FUSE protocol is too old");
            return Err(Errno::PROTO);
        }
        let mut offered = u64::from(asked.flags);
        // The second half of the flags counts only if the first says that there is one.
        if offered & init::INIT_EXT != 0
            && let Ok(more) = arguments.take::<InitInExt>()
        {
            offered |= u64::from(more.flags2) << 32;
        }
        let possible = FsOptions::from_bits_truncate(offered & (WANTED | BY_MOUNTS));
        let always = FsOptions::from_bits_truncate(WANTED | self.extra & BY_MOUNTS);
        let mut wanted = WANTED | self.extra;
        if asked.minor >= EXTENSIONS_MINOR {
            wanted |= init::CREATE_SUPP_GROUP;
        } else {
            wanted &= !init::SECURITY_CTX;
        }
        let flags = settle(possible, always).bits() | offered & wanted;
        self.flags.store(flags, Ordering::Relaxed);
        self.initialised.store(true, Ordering::Release);
        tracing::info!(asked.minor, offered, flags, "FUSE session");
        let max_pages = if flags & init::MAX_PAGES != 0 {
            (MAX_WRITE / PAGE) as u16
        } else {
            0
        };
        Ok(Greeting::Agreed(InitOut {
            major: MAJOR,
            minor: MINOR.min(asked.minor),
            max_readahead: asked.max_readahead,
            flags: flags as u32,
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: MAX_WRITE,
            time_gran: 1,
            max_pages,
            flags2: (flags >> 32) as u32,
            ..InitOut::default()
        }))
    }

    /// Whether INIT was answered and no DESTROY came since.
    pub fn is_initialised(&self) -> bool {
        self.initialised.load(Ordering::Acquire)
    }

    /// Whether a flag was agreed on.
    pub fn has(&self, flag: u64) -> bool {
        self.flags.load(Ordering::Relaxed) & flag != 0
    }

    /// DESTROY.
    pub fn end(&self) {
        self.initialised.store(false, Ordering::Release);
        self.flags.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn greet(session: &Session, major: u32, minor: u32, flags: u64) -> Result<Greeting, Errno> {
        let compat = InitInCompat {
            major,
            minor,
            max_readahead: 131072,
            flags: flags as u32,
        };
        let ext = InitInExt {
            flags2: (flags >> 32) as u32,
            unused: [0; 11],
        };
        let bytes = [compat.as_bytes(), ext.as_bytes()].concat();
        session.init(Arguments::new(&bytes), |offered, always| offered & always)
    }

    #[test]
    fn only_offered_flags_are_agreed_on() {
        let session = Session::default();
        let Ok(Greeting::Agreed(reply)) = greet(&session, 7, 38, init::ASYNC_READ | init::MAX_PAGES) else {
            panic!("INIT failed")
        };
        assert_eq!(u64::from(reply.flags), init::ASYNC_READ | init::MAX_PAGES);
        assert_eq!(reply.minor, 38);
        assert_eq!(reply.max_pages, 256);
        assert_eq!(reply.max_write, 1 << 20);
        assert!(session.is_initialised());
        session.end();
        assert!(!session.is_initialised() && !session.has(init::ASYNC_READ));
    }

    #[test]
    fn writeback_and_no_open_are_never_agreed_on() {
        let session = Session::default();
        let Ok(Greeting::Agreed(reply)) = greet(&session, 7, 99, u64::MAX) else {
            panic!("INIT failed")
        };
        let flags = u64::from(reply.flags) | (u64::from(reply.flags2) << 32);
        assert_eq!(
            flags & (init::WRITEBACK_CACHE | init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT),
            0
        );
        assert_ne!(flags & init::INIT_EXT, 0);
        assert_eq!(reply.minor, 41);
    }

    #[test]
    fn other_major_versions() {
        let session = Session::default();
        assert!(matches!(greet(&session, 8, 0, 0), Ok(Greeting::TryOlder(_))));
        assert!(matches!(greet(&session, 6, 40, 0), Err(Errno::PROTO)));
        assert!(matches!(greet(&session, 7, 12, 0), Err(Errno::PROTO)));
        assert!(!session.is_initialised());
    }
}
