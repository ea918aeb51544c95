//! The other way: the whole tree as one compressed archive, downloaded and unpacked before anything runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rafsd_guest::Registry;
use rafsd_guest::debian::output;
use sha2::{Digest, Sha256};

/// A tree as a tar.zst layer, stored as a blob.
pub struct Packed {
    path: PathBuf,
    digest: String,
}

impl Packed {
    /// Packs `tree` into the registry's store.
    pub fn build(tree: &Path, store: &Path) -> Result<Self> {
        let unnamed = store.join("layer.tar.zst");
        output(
            Command::new("tar")
                .args(["--create", "--zstd", "--xattrs", "--numeric-owner", "--sort=name"])
                .arg("--file")
                .arg(&unnamed)
                .arg("--directory")
                .arg(tree)
                .arg("."),
        )?;
        let mut hash = Sha256::new();
        std::io::copy(&mut fs::File::open(&unnamed)?, &mut hash)?;
        let digest = hex::encode(hash.finalize());
        let path = store.join(&digest);
        fs::rename(&unnamed, &path)?;
        Ok(Self { path, digest })
    }

    /// Downloads the layer and unpacks it as it comes.
    pub fn unpack(&self, registry: &Registry, into: &Path) -> Result<()> {
        let mut tar = Command::new("tar")
            .args([
                "--extract",
                "--zstd",
                "--xattrs",
                "--numeric-owner",
                "--preserve-permissions",
                "--file=-",
            ])
            .arg("--directory")
            .arg(into)
            .stdin(Stdio::piped())
            .spawn()
            .context("start tar")?;
        let mut pipe = tar.stdin.take().context("no pipe to tar")?;
        let sent = registry.download(&self.digest, &mut pipe);
        drop(pipe);
        let status = tar.wait()?;
        sent?;
        ensure!(status.success(), "tar ended with {status}");
        Ok(())
    }

    /// Size of the layer in bytes.
    pub fn size(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.len())
    }
}
