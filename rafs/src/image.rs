//! An image: the bytes of its bootstrap and what the superblock says of them.
//!
//! Everything below works on an image and holds nothing per inode: an [`crate::inode::Inode`] is decoded
//! when it is needed and forgotten.

use std::path::Path;

use crate::bootstrap::Bootstrap;
use crate::error::Refused;
use crate::layout::Flags;
use crate::superblock::Superblock;

/// A checked superblock over its bootstrap.
pub(crate) struct Image {
    pub(crate) bootstrap: Bootstrap,
    pub(crate) superblock: Superblock,
    /// Owner of everything, when the image stores none.
    pub(crate) owner: Option<(u32, u32)>,
    /// Names of one directory have consecutive inode numbers.
    pub(crate) numbered: bool,
}

impl Image {
    /// Opens the image at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, Refused> {
        Self::new(Bootstrap::open(path)?, path)
    }

    /// Reads the superblock of `bootstrap`, which came from `path`.
    pub(crate) fn new(bootstrap: Bootstrap, path: &Path) -> Result<Self, Refused> {
        let superblock = Superblock::read(&bootstrap, path)?;
        let owner = (!superblock.flags.has(Flags::EXPLICIT_UID_GID)).then(|| {
            (
                rustix::process::geteuid().as_raw(),
                rustix::process::getegid().as_raw(),
            )
        });
        let mut image = Self {
            bootstrap,
            superblock,
            owner,
            numbered: false,
        };
        image.check_root()?;
        // Whatever is wrong with the root shows when it is used.
        image.numbered = image.is_numbered().unwrap_or(true);
        Ok(image)
    }

    /// Local id of the root.
    pub(crate) fn root(&self) -> u64 {
        self.superblock.root
    }
}
