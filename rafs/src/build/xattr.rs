//! Which extended attributes an image can hold, and how v6 packs them.

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use crate::layout::v6::{XATTR_PREFIXES, XattrEntry, XattrHeader};

use super::tree::Xattr;

/// Splits a complete name into EROFS name index and suffix.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|(index, prefix)| {
        let suffix = name.strip_prefix(*prefix)?;
        // The two ACL names are complete; the others are name spaces.
        (prefix.ends_with(b".") != suffix.is_empty()).then_some((*index, suffix))
    })
}

/// Whether RAFS has a place for an attribute of this name.
pub(super) fn check_name(name: &[u8]) -> Result<(), String> {
    match split(name) {
        Some((_, suffix)) if suffix.len() <= 255 => Ok(()),
        _ => Err(format!(
            "extended attribute {} has no place in the format (user.*, trusted.*, security.* and POSIX ACLs have)",
            String::from_utf8_lossy(name)
        )),
    }
}

/// The v6 area of an inode's attributes, empty if it has none (v6 section 9); `Err` tells what does not fit.
pub(super) fn area_v6(xattrs: &[Xattr]) -> Result<Vec<u8>, String> {
    if xattrs.is_empty() {
        return Ok(Vec::new());
    }
    let header = XattrHeader {
        reserved: U32::new(0),
        shared_count: 0,
        reserved2: [0; 7],
    };
    let mut area = header.as_bytes().to_vec();
    for (name, value) in xattrs {
        let shown = || String::from_utf8_lossy(name).into_owned();
        let (index, suffix) =
            split(name).ok_or_else(|| format!("extended attribute {} has no place", shown()))?;
        let name_length =
            u8::try_from(suffix.len()).map_err(|_| format!("extended attribute {} is too long", shown()))?;
        let value_length = u16::try_from(value.len()).map_err(|_| {
            format!(
                "extended attribute {} has {} bytes, v6 allows {}",
                shown(),
                value.len(),
                u16::MAX
            )
        })?;
        let entry = XattrEntry {
            name_len: name_length,
            name_index: index,
            value_size: U16::new(value_length),
        };
        area.extend_from_slice(entry.as_bytes());
        area.extend_from_slice(suffix);
        area.extend_from_slice(value);
        area.resize(area.len().next_multiple_of(4), 0);
    }
    if icount_v6(area.len()).is_none() {
        return Err(format!(
            "extended attributes take {} bytes, v6 allows 262148",
            area.len()
        ));
    }
    Ok(area)
}

/// `i_xattr_icount` of an area of so many bytes.
pub(super) fn icount_v6(area: usize) -> Option<u16> {
    if area == 0 {
        Some(0)
    } else {
        u16::try_from(area.checked_sub(12)? / 4 + 1).ok()
    }
}

/// The v5 attribute area without its length: pairs one after the other (v5 section 7).
pub(super) fn payload_v5(xattrs: &[Xattr]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (name, value) in xattrs {
        payload.extend_from_slice(&((name.len() + 1 + value.len()) as u32).to_le_bytes());
        payload.extend_from_slice(name);
        payload.push(0);
        payload.extend_from_slice(value);
    }
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_by_their_prefix() {
        assert_eq!(split(b"user.a"), Some((1, b"a".as_slice())));
        assert_eq!(
            split(b"trusted.overlay.opaque"),
            Some((4, b"overlay.opaque".as_slice()))
        );
        assert_eq!(split(b"system.posix_acl_access"), Some((2, b"".as_slice())));
        assert_eq!(split(b"system.posix_acl_accessible"), None);
        assert_eq!(split(b"user."), None);
        assert_eq!(split(b"system.nfs4_acl"), None);
    }

    #[test]
    fn an_area_is_padded_per_entry_and_counts_words() {
        let area = area_v6(&[(b"user.a".to_vec(), b"xy".to_vec())]).unwrap();
        assert_eq!(area.len(), 12 + 8);
        assert_eq!(&area[12..], [1, 1, 2, 0, b'a', b'x', b'y', 0]);
        assert_eq!(icount_v6(area.len()), Some(3));
        assert_eq!(icount_v6(0), Some(0));
    }

    #[test]
    fn a_value_beyond_16_bits_is_refused() {
        let error = area_v6(&[(b"user.big".to_vec(), vec![0; 65536])]).unwrap_err();
        assert!(error.contains("user.big") && error.contains("65536"), "{error}");
    }
}
