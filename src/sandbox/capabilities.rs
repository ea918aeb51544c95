//! Capabilities: those that serving host directories needs, and no others in any set.

use std::str::FromStr;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

use super::Failure;

const LAYER: &str = "capabilities";

/// What serving takes: acting as the guest's users, making what they make, reaching files by handle.
const NEEDED: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// For `trusted.*`, without which a guest cannot make an overlay upon a host directory.
const TRUSTED: CapabilitySet = CapabilitySet::SYS_ADMIN;

/// What threads keep that serve no files: the cache's directory may belong to another user.
const REACH: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::DAC_READ_SEARCH);

/// Departures from the usual set, as `+sys_admin:-chown`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilityChanges {
    more: u64,
    less: u64,
}

impl CapabilityChanges {
    /// The same, without CAP_SYS_ADMIN if nothing is said about it.
    pub fn without_trusted(mut self) -> Self {
        if self.more & TRUSTED.bits() == 0 {
            self.less |= TRUSTED.bits();
        }
        self
    }

    /// The same, with CAP_SYS_ADMIN.
    pub fn with_trusted(mut self) -> Self {
        self.less &= !TRUSTED.bits();
        self
    }

    fn wanted(self) -> CapabilitySet {
        let usual = NEEDED.union(TRUSTED).bits();
        CapabilitySet::from_bits_truncate((usual | self.more) & !self.less)
    }
}

impl FromStr for CapabilityChanges {
    type Err = String;

    /// Reads a list of names with `+` (the default) or `-` before them, separated by colons.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut changes = Self::default();
        for item in text.split(':').filter(|item| !item.is_empty()) {
            let (adds, name) = match item.strip_prefix('-') {
                Some(name) => (false, name),
                None => (true, item.strip_prefix('+').unwrap_or(item)),
            };
            let upper = name.to_ascii_uppercase();
            let bits = CapabilitySet::from_name(upper.strip_prefix("CAP_").unwrap_or(&upper))
                .ok_or_else(|| format!("{name:?} is no capability"))?
                .bits();
            let (to, from) = match adds {
                true => (&mut changes.more, &mut changes.less),
                false => (&mut changes.less, &mut changes.more),
            };
            *to |= bits;
            *from &= !bits;
        }
        Ok(changes)
    }
}

/// Takes all others from the process, out of the bounding and ambient sets as well. Returns what is left.
pub fn reduce_process(changes: &CapabilityChanges) -> Result<CapabilitySet, Failure> {
    let failed = |error: rustix::io::Errno| Failure::new(LAYER, error);
    let held = capabilities(None).map_err(failed)?;
    let kept = held.permitted & changes.wanted();
    // An older host knows no ambient capabilities, and then there are none to clear.
    let _ = clear_ambient_capability_set();
    if held.effective.contains(CapabilitySet::SETPCAP) {
        for bit in 0..64 {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            // Beyond the last capability of the host.
            let Ok(bound) = capability_is_in_bounding_set(capability) else {
                break;
            };
            if bound && !kept.contains(capability) {
                remove_capability_from_bounding_set(capability).map_err(failed)?;
            }
        }
    }
    set(kept)?;
    Ok(kept)
}

/// Leaves the calling thread what it needs to reach the daemon's own files.
pub fn reduce_thread(of_process: CapabilitySet) -> Result<(), Failure> {
    set(of_process & REACH)
}

fn set(kept: CapabilitySet) -> Result<(), Failure> {
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(|error| Failure::new(LAYER, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_read_as_virtiofsd_reads_them() {
        let changed = |text: &str| CapabilityChanges::from_str(text).unwrap().wanted();
        assert_eq!(changed(""), NEEDED | TRUSTED);
        assert_eq!(changed("-sys_admin"), NEEDED);
        assert_eq!(
            changed("+sys_ptrace:-chown:-SYS_ADMIN"),
            (NEEDED | CapabilitySet::SYS_PTRACE) - CapabilitySet::CHOWN
        );
        assert_eq!(changed("-mknod:+mknod"), NEEDED | TRUSTED);
        assert!(
            CapabilityChanges::from_str("+everything")
                .unwrap_err()
                .contains("everything")
        );
    }

    #[test]
    fn the_capability_for_trusted_attributes_stays_if_it_is_asked_for() {
        let wanted = |text: &str| {
            CapabilityChanges::from_str(text)
                .unwrap()
                .without_trusted()
                .wanted()
        };
        assert_eq!(wanted(""), NEEDED);
        assert_eq!(wanted("+sys_admin"), NEEDED | TRUSTED);
        let kept = CapabilityChanges::from_str("-sys_admin:-chown")
            .unwrap()
            .with_trusted();
        assert_eq!(kept.wanted(), (NEEDED | TRUSTED) - CapabilitySet::CHOWN);
    }
}
