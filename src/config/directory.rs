//! What a mount request says of a directory of the host: the options of this mount alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use passthrough::{CachePolicy, IdMap, InodeFiles, Options, Quota, XattrRulesError};
use serde::Deserialize;
use serde_json::Value;

use crate::cli::InodeFileHandles;

/// The `config` of a mount request for a directory. What is not there is as the command line has it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Directory {
    /// `never`, `metadata`, `auto`, `always`. Kata and virtiofsd call it so, too.
    #[serde(alias = "virtio_fs_cache", alias = "cache_policy")]
    cache: Option<String>,
    /// With `auto`: seconds for which a change made on the host may stay unseen.
    cache_timeout: Option<f64>,
    #[serde(alias = "read_only")]
    readonly: Option<bool>,
    writeback: Option<bool>,
    locks: Option<bool>,
    xattr: Option<bool>,
    posix_acl: Option<bool>,
    allow_direct_io: Option<bool>,
    announce_submounts: Option<bool>,
    /// Rules as of `--xattrmap`; `""` for none.
    xattrmap: Option<String>,
    translate_uid: Option<Vec<String>>,
    translate_gid: Option<Vec<String>>,
    inode_file_handles: Option<InodeFileHandles>,
    quota: Option<Limits>,
    #[serde(flatten)]
    unknown: BTreeMap<String, Value>,
}

/// What the directory may take of the host's disk.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    bytes: Option<u64>,
    inodes: Option<u64>,
}

impl Directory {
    /// Reads the text of a request; none at all is fine. So is the configuration of an image, which clients pass along with
    /// every mount and which says nothing of a directory.
    ///
    /// # Errors
    ///
    /// It is no JSON object, or a key has a value that it cannot have.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let value: Value =
            serde_json::from_str(text).map_err(|error| format!("config of a directory: {error}"))?;
        if value.get("backend").is_some() || value.get("device").is_some() {
            return Ok(Self::default());
        }
        kata::config::read(value, "").map_err(|error| format!("config of a directory: {error}"))
    }

    /// Keys that mean nothing here.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        self.unknown.keys().map(String::as_str)
    }

    /// Changes `options` as the request says.
    ///
    /// # Errors
    ///
    /// A policy that there is not, or a time that goes with none.
    pub fn apply(&self, options: &mut Options) -> Result<(), String> {
        if let Some(name) = &self.cache {
            options.cache = match name.as_str() {
                "never" | "none" => CachePolicy::Never,
                "metadata" => CachePolicy::Metadata,
                "auto" => CachePolicy::default(),
                "always" => CachePolicy::Always,
                _ => {
                    return Err(format!(
                        "config of a directory: cache is {name:?}, allowed is never, metadata, auto or always"
                    ));
                }
            };
        }
        if let Some(seconds) = self.cache_timeout {
            let timeout = Duration::try_from_secs_f64(seconds)
                .map_err(|_| {
                    format!("config of a directory: cache_timeout is {seconds}, allowed is a number of seconds from 0 on")
                })?;
            match &mut options.cache {
                CachePolicy::Auto { timeout: known } => *known = timeout,
                _ => return Err("config of a directory: cache_timeout goes with cache \"auto\"".into()),
            }
        }
        let set = |option: &mut bool, given: Option<bool>| *option = given.unwrap_or(*option);
        set(&mut options.read_only, self.readonly);
        set(&mut options.writeback, self.writeback);
        set(&mut options.locks, self.locks);
        set(&mut options.xattr, self.xattr);
        set(&mut options.posix_acl, self.posix_acl);
        set(&mut options.allow_direct_io, self.allow_direct_io);
        set(&mut options.announce_submounts, self.announce_submounts);
        let refuse = |error: String| format!("config of a directory: {error}");
        if let Some(text) = &self.xattrmap {
            let rules = Some(text)
                .filter(|text| !text.is_empty())
                .map(|text| text.parse());
            let rules = rules.transpose();
            let rules =
                rules.map_err(|error: XattrRulesError| refuse(format!("xattrmap is {text:?}: {error}")))?;
            options.xattr_rules = rules.map(Arc::new);
        }
        if let Some(rules) = &self.translate_uid {
            options.ids.users = ids("translate_uid", rules).map_err(refuse)?;
        }
        if let Some(rules) = &self.translate_gid {
            options.ids.groups = ids("translate_gid", rules).map_err(refuse)?;
        }
        if let Some(mode) = self.inode_file_handles {
            options.inode_files = inode_files(mode);
        }
        if let Some(Limits { bytes, inodes }) = self.quota {
            options.quota = Quota { bytes, inodes };
        }
        Ok(())
    }
}

/// The rules of a translation of ids, in order.
///
/// # Errors
///
/// One is none, or overlaps another.
pub(super) fn ids(name: &str, rules: &[String]) -> Result<IdMap, String> {
    let mut map = IdMap::default();
    for rule in rules {
        map.add(rule)
            .map_err(|error| format!("{name} has {rule:?}: {error}"))?;
    }
    Ok(map)
}

/// What a mode means to the file system.
pub(super) fn inode_files(mode: InodeFileHandles) -> InodeFiles {
    match mode {
        InodeFileHandles::Never => InodeFiles::Descriptors,
        InodeFileHandles::Prefer => InodeFiles::Handles,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Result<Options, String> {
        let mut options = Options::new("/");
        options.locks = false;
        Directory::parse(text)?.apply(&mut options)?;
        Ok(options)
    }

    #[test]
    fn each_mount_has_its_own_options() {
        let plain = options("").unwrap();
        assert!(plain.cache == CachePolicy::default() && !plain.locks && !plain.read_only && plain.xattr);
        let other =
            options(r#"{"cache":"always","writeback":true,"locks":true,"read_only":true,"xattr":false}"#)
                .unwrap();
        assert_eq!(other.cache, CachePolicy::Always);
        assert!(other.writeback && other.locks && other.read_only && !other.xattr);
        let timed = options(r#"{"virtio_fs_cache":"auto","cache_timeout":2.5}"#).unwrap();
        let timeout = Duration::from_millis(2500);
        assert_eq!(timed.cache, CachePolicy::Auto { timeout });
        let mapped = options(
            r#"{"xattrmap":"built-in","translate_uid":["map:0:1000:1"],"translate_gid":["map:0:1000:1"],
                "inode_file_handles":"never"}"#,
        )
        .unwrap();
        assert!(
            mapped.xattr_rules.is_some() && !mapped.ids.users.is_empty() && !mapped.ids.groups.is_empty()
        );
        assert_eq!(mapped.inode_files, InodeFiles::Descriptors);
        assert!(mapped.quota.is_none());
        let limited = options(r#"{"quota":{"bytes":1048576}}"#).unwrap().quota;
        assert_eq!((limited.bytes, limited.inodes), (Some(1 << 20), None));
        assert_eq!(
            options(r#"{"cache_policy":"never"}"#).unwrap().cache,
            CachePolicy::Never
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_what_is_unknown_is_told() {
        for (text, part) in [
            ("[1]", "the configuration is [1], allowed is "),
            ("never", "config of a directory"),
            (
                r#"{"cache":"sometimes"}"#,
                "cache is \"sometimes\", allowed is never, metadata",
            ),
            (r#"{"cache":1}"#, "cache is 1, allowed is a text"),
            (r#"{"cache":"always","cache_timeout":1}"#, "goes with"),
            (
                r#"{"cache_timeout":-1}"#,
                "cache_timeout is -1, allowed is a number of seconds",
            ),
            (
                r#"{"cache_timeout":"x"}"#,
                "cache_timeout is \"x\", allowed is a number",
            ),
            (r#"{"xattrmap":":nonsense:"}"#, "xattrmap is \":nonsense:\""),
            (r#"{"xattrmap":[]}"#, "xattrmap is [], allowed is a text"),
            (
                r#"{"translate_uid":["map:0:1"]}"#,
                "translate_uid has \"map:0:1\"",
            ),
            (
                r#"{"translate_gid":"map:0:1"}"#,
                "translate_gid is \"map:0:1\", allowed is a list",
            ),
            (
                r#"{"translate_gid":[1]}"#,
                "translate_gid[0] is 1, allowed is a text",
            ),
            (
                r#"{"inode_file_handles":"often"}"#,
                "inode_file_handles is \"often\", allowed is ",
            ),
            (
                r#"{"quota":{"bytes":-1}}"#,
                "quota.bytes is -1, allowed is a whole number",
            ),
            (r#"{"quota":{"blocks":1}}"#, "blocks"),
            (r#"{"quota":1048576}"#, "quota is 1048576, allowed is an object"),
        ] {
            let error = options(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        for flag in [
            "readonly",
            "read_only",
            "writeback",
            "locks",
            "xattr",
            "posix_acl",
            "allow_direct_io",
            "announce_submounts",
        ] {
            let error = options(&format!("{{{flag:?}:\"yes\"}}")).unwrap_err();
            assert!(
                error.contains(&format!("{flag} is \"yes\", allowed is true or false")),
                "{error}"
            );
        }
        let image = r#"{"version":2,"backend":{"type":"localfs"},"cache":{"type":"blobcache"}}"#;
        assert!(options(image).unwrap().cache == CachePolicy::default());
        let parsed = Directory::parse(r#"{"locks":true,"lock":true,"cash":1}"#).unwrap();
        assert_eq!(parsed.unknown().collect::<Vec<_>>(), ["cash", "lock"]);
    }
}
