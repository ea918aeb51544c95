//! Names of a directory in the order and the blocks that they are stored in.

use super::super::tree::{Entry, Inode};
use super::{BLOCK, Dirent};

/// Entry of a directory, including the two that the tree does not hold.
pub(super) enum Name<'t> {
    This,
    Parent,
    Child(&'t Entry),
}

impl Name<'_> {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::This => b".",
            Self::Parent => b"..",
            Self::Child(entry) => &entry.name,
        }
    }
}

/// `.` and `..` take part in the sort: ` x` comes before them.
pub(super) fn sorted_names(inode: &Inode) -> Vec<Name<'_>> {
    let mut names: Vec<Name<'_>> = inode.entries().iter().map(Name::Child).collect();
    for name in [Name::This, Name::Parent] {
        let at = names.partition_point(|other| other.bytes() < name.bytes());
        names.insert(at, name);
    }
    names
}

/// Cuts entries into blocks: the next one begins where an entry and its name do not fit any more.
pub(super) fn blocks_of<'n, 't>(names: &'n [Name<'t>]) -> Vec<&'n [Name<'t>]> {
    let mut blocks = Vec::new();
    let mut rest = names;
    while !rest.is_empty() {
        let mut used = 0;
        let fit = rest
            .iter()
            .position(|name| {
                used += entry_size(name);
                used > BLOCK
            })
            .unwrap_or(rest.len());
        let (block, next) = rest.split_at(fit);
        blocks.push(block);
        rest = next;
    }
    blocks
}

fn entry_size(name: &Name<'_>) -> u64 {
    (size_of::<Dirent>() + name.bytes().len()) as u64
}

/// Bytes of all blocks of a directory, of the last one as much as is used.
pub(super) fn directory_size(inode: &Inode) -> u64 {
    let names = sorted_names(inode);
    let blocks = blocks_of(&names);
    let last: u64 = blocks
        .last()
        .map_or(0, |block| block.iter().map(entry_size).sum());
    (blocks.len() as u64).saturating_sub(1) * BLOCK + last
}
