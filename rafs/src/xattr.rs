//! Extended attributes, in the order in which the image has them.

use zerocopy::FromBytes;
use zerocopy::little_endian::{U32, U64};

use crate::error::Damaged;
use crate::image::Image;
use crate::inode::{Body, Inode};
use crate::layout::v5::UNIT;
use crate::layout::v6::{XATTR_PREFIXES, XattrEntry, XattrHeader};

/// An attribute; its name is in two parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Xattr<'a> {
    prefix: &'a [u8],
    suffix: &'a [u8],
    pub(crate) value: &'a [u8],
}

impl Xattr<'_> {
    /// Whether it is called `name`.
    pub(crate) fn is_called(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix) == Some(self.suffix)
    }

    /// The complete name.
    pub(crate) fn name(&self) -> impl Iterator<Item = u8> {
        self.prefix.iter().chain(self.suffix).copied()
    }
}

/// Takes the first attribute off some bytes; `None` if they are malformed.
type Parser<'a> = fn(&'a [u8]) -> Option<(Xattr<'a>, &'a [u8])>;

/// The attributes of one inode that are still to come.
pub(crate) struct Xattrs<'a> {
    rest: &'a [u8],
    inode: u64,
    next: Parser<'a>,
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = Result<Xattr<'a>, Damaged>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        match (self.next)(self.rest) {
            Some((xattr, rest)) => {
                self.rest = rest;
                Some(Ok(xattr))
            }
            None => {
                self.rest = &[];
                Some(Err(Damaged::new(
                    "extended attributes of inode",
                    self.inode,
                    "malformed",
                )))
            }
        }
    }
}

impl Image {
    /// The attributes of `inode`.
    pub(crate) fn xattrs(&self, inode: &Inode) -> Result<Xattrs<'_>, Damaged> {
        let (rest, next): (&[u8], Parser<'_>) = match inode.body {
            Body::V5 { xattrs: None, .. } => (&[], next_v5),
            Body::V5 {
                xattrs: Some(offset), ..
            } => {
                let size = self.bootstrap.get::<U64>("extended attributes", offset)?.get();
                (
                    self.bootstrap.slice("extended attributes", offset + UNIT, size)?,
                    next_v5,
                )
            }
            Body::V6 {
                xattrs, xattrs_size, ..
            } => {
                let area = self.bootstrap.slice("extended attributes", xattrs, xattrs_size)?;
                (area.get(size_of::<XattrHeader>()..).unwrap_or_default(), next_v6)
            }
        };
        Ok(Xattrs {
            rest,
            inode: inode.id,
            next,
        })
    }
}

/// v5: size, then name, NUL and value, back to back.
fn next_v5(bytes: &[u8]) -> Option<(Xattr<'_>, &[u8])> {
    let (size, rest) = U32::ref_from_prefix(bytes).ok()?;
    let (pair, rest) = rest.split_at_checked(usize::try_from(size.get()).ok()?)?;
    let end = pair.iter().position(|byte| *byte == 0)?;
    let (prefix, value) = (pair.get(..end)?, pair.get(end + 1..)?);
    if prefix.is_empty() || prefix.len() > crate::layout::MAX_NAME {
        return None;
    }
    Some((
        Xattr {
            prefix,
            suffix: &[],
            value,
        },
        rest,
    ))
}

/// v6: lengths, name without its prefix, value, padded to 4 bytes.
fn next_v6(bytes: &[u8]) -> Option<(Xattr<'_>, &[u8])> {
    let (entry, rest) = XattrEntry::ref_from_prefix(bytes).ok()?;
    let (_, prefix) = XATTR_PREFIXES
        .iter()
        .find(|(number, _)| *number == entry.name_index)?;
    let (suffix, after) = rest.split_at_checked(entry.name_len.into())?;
    let (value, after) = after.split_at_checked(entry.value_size.get().into())?;
    let complete = !prefix.ends_with(b".");
    if complete != suffix.is_empty()
        || suffix.contains(&0)
        || prefix.len() + suffix.len() > crate::layout::MAX_NAME
    {
        return None;
    }
    let padding = (suffix.len() + value.len()).wrapping_neg() % 4;
    // Upstream pads the last one too; an area that ends without is complete all the same.
    Some((
        Xattr {
            prefix,
            suffix,
            value,
        },
        after.get(padding..).unwrap_or_default(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_v6_name_is_its_prefix_and_its_suffix() {
        let (xattr, rest) = next_v6(b"\x03\x01\x05\x00abcHELLO\0\0\0\0").unwrap();
        assert!(xattr.is_called(b"user.abc"));
        assert!(!xattr.is_called(b"user.abcd"));
        assert!(!xattr.is_called(b"user."));
        assert_eq!((xattr.value, rest), (&b"HELLO"[..], &b"\0\0\0\0"[..]));
        assert_eq!(xattr.name().collect::<Vec<_>>(), b"user.abc");
        let (acl, _) = next_v6(b"\x00\x02\x02\x00xx\0\0").unwrap();
        assert!(acl.is_called(b"system.posix_acl_access"));
        assert_eq!(next_v6(b"\x01\x02\x00\x00x\0\0\0"), None);
        assert_eq!(next_v6(b"\x00\x01\x00\x00"), None);
        assert_eq!(next_v6(b"\x00\x05\x00\x00"), None);
    }

    #[test]
    fn a_v5_pair_is_split_at_the_first_nul() {
        let (xattr, rest) = next_v5(b"\x09\0\0\0user.a\0\0vrest").unwrap();
        assert!(xattr.is_called(b"user.a"));
        assert_eq!((xattr.value, rest), (&b"\0v"[..], &b"rest"[..]));
        assert_eq!(next_v5(b"\x05\0\0\0user.\0"), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic_or_go_on_for_ever(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            for next in [next_v5, next_v6] {
                let count = Xattrs { rest: &bytes, inode: 1, next }.count();
                prop_assert!(count <= bytes.len());
            }
        }
    }
}
