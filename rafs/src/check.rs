//! Checks all metadata of an image: every entry, inode, attribute and chunk address, and the digests of v5.

use std::collections::HashSet;

use crate::digest;
use crate::error::Damaged;
use crate::inode::{Inode, Kind};
use crate::reader::{Reader, Step};

/// What a complete check has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Directory entries that lead somewhere, and the root.
    pub names: u64,
    /// Inodes: names of one file count once.
    pub inodes: u64,
    /// Bytes of all files, each inode once.
    pub bytes: u64,
    /// Faults found.
    pub faults: u64,
}

impl Reader {
    /// Checks everything that can be checked without the blobs, and calls `fault` with path and reason for whatever is
    /// wrong. Goes on after a fault. Touches every page of the metadata.
    pub fn check(&self, fault: &mut dyn FnMut(&[u8], Damaged)) -> Checked {
        let mut checked = Checked::default();
        let mut seen = HashSet::new();
        let map = self.indexed.build_map().map(|_| ());
        if let Err(damaged) = map {
            checked.faults += 1;
            fault(b"/", damaged);
        }
        let mut visit = |step: Step<'_>| {
            let mut note = |result: Result<(), Damaged>| {
                if let Err(damaged) = result {
                    checked.faults += 1;
                    fault(step.path, damaged);
                }
            };
            let inode = match step.inode {
                Ok(inode) => inode,
                Err(damaged) => {
                    note(Err(damaged));
                    return Ok::<(), std::convert::Infallible>(());
                }
            };
            if seen.insert(inode.id) {
                self.check_inode(inode, map.is_ok(), &mut note);
                checked.inodes += 1;
                checked.bytes =
                    checked
                        .bytes
                        .saturating_add(if inode.kind == Kind::File { inode.size } else { 0 });
            }
            checked.names += 1;
            Ok(())
        };
        match self.walk(&mut visit) {
            Ok(()) => checked,
        }
    }

    fn check_inode(&self, inode: &Inode, mapped: bool, note: &mut dyn FnMut(Result<(), Damaged>)) {
        note(self.xattrs(inode).map(|_| ()));
        note(digest::check(&self.indexed.image, inode));
        match inode.kind {
            Kind::Directory => {
                for dots in [b".".as_slice(), b".."] {
                    note(self.lookup(inode, dots).and_then(|found| {
                        let missing = Damaged::new("directory", inode.id, "has no `.` or no `..`");
                        found.map(|_| ()).ok_or(missing)
                    }));
                }
            }
            // A map that cannot be built was noted already.
            Kind::File if mapped => note(self.chunks(inode).map(|_| ())),
            Kind::Symlink => note(self.symlink_target(inode).map(|_| ())),
            _ => {}
        }
    }
}
