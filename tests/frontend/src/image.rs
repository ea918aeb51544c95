//! Images to mount, and the configuration that goes with them.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::registry::{REPOSITORY, Registry};
use crate::{Error, Result};

/// Fixtures made by the incumbent's image tool, which may lie beside this project: `../shared/fixtures/rafs`.
/// Says so on stderr when they do not.
pub fn fixtures() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/fixtures/rafs");
    match path.canonicalize() {
        Ok(path) => Some(path),
        Err(_) => {
            eprintln!("SKIPPED: no fixtures at {}", path.display());
            None
        }
    }
}

/// An image in a directory: `bootstrap` and `blobs/`.
#[derive(Clone, Debug)]
pub struct Image {
    /// The bootstrap file.
    pub bootstrap: PathBuf,
    /// The directory of blobs.
    pub blobs: PathBuf,
}

impl Image {
    /// Makes an image of `tree` below `output`, with the image tool `rafs` and its options.
    pub fn build(rafs: &str, tree: &Path, output: &Path, options: &[&str]) -> Result<Self> {
        let made = Command::new(rafs)
            .arg("build")
            .arg(tree)
            .arg("--output")
            .arg(output)
            .args(options)
            .output()
            .map_err(|e| Error::io(format!("run {rafs}"), e))?;
        if !made.status.success() {
            let text = String::from_utf8_lossy(&made.stderr);
            return Err(Error::Usage(format!("rafs build: {}: {text}", made.status)));
        }
        Ok(Self {
            bootstrap: output.join("bootstrap"),
            blobs: output.join("blobs"),
        })
    }

    /// The file of its only blob.
    pub fn blob(&self) -> Result<PathBuf> {
        let read = |e| Error::io(format!("read {}", self.blobs.display()), e);
        let mut files = std::fs::read_dir(&self.blobs)
            .map_err(read)?
            .flatten()
            .map(|entry| entry.path());
        match (files.next(), files.next()) {
            (Some(blob), None) => Ok(blob),
            _ => Err(Error::Usage(format!(
                "{} does not hold one blob",
                self.blobs.display()
            ))),
        }
    }

    /// Configuration for blobs in their directory and a cache in `cache`.
    pub fn local(&self, cache: &Path) -> String {
        config(
            json!({ "type": "localfs", "config": { "dir": self.blobs } }),
            cache,
        )
    }
}

/// Configuration for blobs in `registry` and a cache in `cache`. Each attempt to fetch may take
/// `timeout` seconds, and there are `retries` more.
pub fn remote(registry: &Registry, cache: &Path, timeout: u64, retries: u64) -> String {
    let backend = json!({
        "type": "registry",
        "config": {
            "scheme": "http",
            "host": registry.address.to_string(),
            "repo": REPOSITORY,
            "timeout": timeout,
            "connect_timeout": timeout,
            "retry_limit": retries,
            "proxy": { "fallback": false },
        },
    });
    config(backend, cache)
}

/// The shape that container snapshotters send, without prefetch.
fn config(backend: serde_json::Value, cache: &Path) -> String {
    json!({
        "device": {
            "id": cache,
            "backend": backend,
            "cache": { "type": "blobcache", "config": { "work_dir": cache } },
        },
        "mode": "direct",
        "digest_validate": false,
        "enable_xattr": true,
        "fs_prefetch": { "enable": false },
    })
    .to_string()
}
