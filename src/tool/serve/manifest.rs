//! Manifests: what tells one from any other file, and the names that they are asked for by.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Largest manifest, in bytes (the distribution specification lets registries refuse larger ones).
pub(super) const MAX_MANIFEST: u64 = 4 << 20;

/// The kinds of manifests that are understood.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    schema_version: u32,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

/// The bytes and the media type of a manifest; `None` if the file is none.
pub(super) fn read(path: &Path) -> io::Result<Option<(Vec<u8>, String)>> {
    parse(&File::open(path)?)
}

/// As [`read`], from an open file.
pub(super) fn parse(file: &File) -> io::Result<Option<(Vec<u8>, String)>> {
    let mut bytes = Vec::new();
    file.take(MAX_MANIFEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_MANIFEST {
        return Ok(None);
    }
    let Ok(head) = serde_json::from_slice::<Head>(&bytes) else {
        return Ok(None);
    };
    let kind = head.media_type.unwrap_or_else(|| {
        let kind = if head.manifests.is_some() {
            "index"
        } else {
            "manifest"
        };
        format!("application/vnd.oci.image.{kind}.v1+json")
    });
    Ok((head.schema_version == 2).then_some((bytes, kind)))
}

/// Whether `name` is a repository's, and so can be part of a path at an upstream.
pub(super) fn is_repository(name: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && part
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
    };
    name.len() <= 255 && name.split('/').all(part)
}

/// Whether `tag` is one.
pub(super) fn is_tag(tag: &str) -> bool {
    tag.len() <= 128
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && tag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_leave_no_way_out_of_a_path() {
        for good in ["x", "library/alpine", "a/b.c/d_e-f"] {
            assert!(is_repository(good), "{good}");
        }
        for bad in ["", "/x", "x/", "a//b", "../x", "a/..", "A", "a?b", "a b", "a%2f"] {
            assert!(!is_repository(bad), "{bad}");
        }
        assert!(is_tag("latest") && is_tag("v1.2-3_x"));
        for bad in ["", "..", ".x", "a/b", "a?b", "sha256:00", &"a".repeat(129)] {
            assert!(!is_tag(bad), "{bad}");
        }
    }
}
