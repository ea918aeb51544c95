//! Inode numbers that stay unique over several host devices.
//!
//! A guest that is not told of submounts sees the whole share under one device number, so two host file systems below
//! the share would show two files as one. Files on the device of the root keep the host's number. Each other device
//! gets a 16-bit tag that is XORed into the top of its numbers: a bijection per device, so no two files of one device
//! ever collide, and files of different devices collide only where the host itself uses the top 16 bits.
//!
//! The tag is derived from the device number, so that the same share shows the same numbers after a restart; when two
//! devices hash to one tag, the one seen later takes the next free tag.

use parking_lot::RwLock;

/// Bits of an inode number below the tag.
const TAG_SHIFT: u32 = 48;
/// Tags are 1..=MAX_TAG; 0 is the device of the root.
const MAX_TAG: u64 = 0xffff;

/// Maps (device, host inode number) to the number that the guest sees.
#[derive(Debug)]
pub(crate) struct InodeNumbers {
    primary: u64,
    /// Secondary devices and their tags. Shares have a handful, so a scan beats a map.
    tags: RwLock<Vec<(u64, u64)>>,
}

impl InodeNumbers {
    /// Numbers for a share whose root lies on `primary`.
    pub(crate) fn new(primary: u64) -> Self {
        InodeNumbers {
            primary,
            tags: RwLock::new(Vec::new()),
        }
    }

    /// The number of file `ino` on device `device`.
    pub(crate) fn fold(&self, device: u64, ino: u64) -> u64 {
        if device == self.primary {
            return ino;
        }
        let known = self
            .tags
            .read()
            .iter()
            .find(|(seen, _)| *seen == device)
            .map(|(_, tag)| *tag);
        ino ^ (known.unwrap_or_else(|| self.assign(device)) << TAG_SHIFT)
    }

    fn assign(&self, device: u64) -> u64 {
        let mut tags = self.tags.write();
        if let Some((_, tag)) = tags.iter().find(|(seen, _)| *seen == device) {
            return *tag;
        }
        let mut tag = preferred_tag(device);
        // With every tag taken, devices share: 65,535 of them in one share is beyond any host.
        for _ in 0..MAX_TAG {
            if !tags.iter().any(|(_, taken)| *taken == tag) {
                break;
            }
            tag = tag % MAX_TAG + 1;
        }
        tags.push((device, tag));
        tag
    }
}

/// Spreads device numbers, which differ in few low bits, over the tags (Fibonacci hashing).
fn preferred_tag(device: u64) -> u64 {
    (device.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> TAG_SHIFT) % MAX_TAG + 1
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_primary_device_keeps_its_numbers() {
        let numbers = InodeNumbers::new(7);
        assert_eq!(numbers.fold(7, 42), 42);
        assert_eq!(numbers.fold(7, u64::MAX), u64::MAX);
    }

    #[test]
    fn files_of_different_devices_never_share_a_number() {
        let numbers = InodeNumbers::new(0);
        let mut seen = HashSet::new();
        for device in 0..2_000u64 {
            for ino in [1, 2, 3, (1 << TAG_SHIFT) - 1] {
                assert!(
                    seen.insert(numbers.fold(device, ino)),
                    "device {device} ino {ino}"
                );
            }
        }
    }

    #[test]
    fn numbers_are_the_same_after_a_restart() {
        let (first, second) = (InodeNumbers::new(1), InodeNumbers::new(1));
        assert_ne!(first.fold(2, 5), first.fold(3, 5));
        assert_eq!(second.fold(3, 5), first.fold(3, 5));
        assert_eq!(second.fold(2, 5), first.fold(2, 5));
    }
}
