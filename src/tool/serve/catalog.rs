//! Digests to files.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::ServeError;

/// Finds what is served. Directories are looked at anew for each request: an image that is built while the server
/// runs is served at once.
pub(super) struct Catalog {
    directories: Vec<PathBuf>,
    /// Digests of bootstraps, as long as (path, inode, size, time) stay the same.
    bootstraps: Mutex<HashMap<PathBuf, (Stamp, String)>>,
}

/// Tells two versions of a file apart.
type Stamp = (u64, u64, i64, i64);

/// What is served.
#[derive(Debug, serde::Serialize)]
pub(super) struct Listed {
    kind: &'static str,
    digest: String,
    size: u64,
    path: PathBuf,
}

impl Catalog {
    pub(super) fn new(directories: Vec<PathBuf>) -> Result<Self, ServeError> {
        for path in &directories {
            std::fs::read_dir(path).map_err(|source| ServeError::File {
                action: "serve",
                path: path.clone(),
                source,
            })?;
        }
        Ok(Self {
            directories,
            bootstraps: Mutex::default(),
        })
    }

    /// Opens what has this sha256 (64 hexadecimal digits, lower case).
    pub(super) fn open(&self, hex: &str) -> Option<(File, u64)> {
        let images = self.images();
        let blob = images
            .iter()
            .flat_map(|image| [image.join("blobs").join(hex), image.join(hex)]);
        let bootstraps = images.iter().filter_map(|image| {
            let (path, digest, _) = self.bootstrap(image)?;
            (digest == hex).then_some(path)
        });
        blob.chain(bootstraps).find_map(|path| {
            let file = File::open(path).ok()?;
            let metadata = file.metadata().ok()?;
            metadata.is_file().then_some((file, metadata.len()))
        })
    }

    /// All that is served.
    pub(super) fn list(&self) -> Vec<Listed> {
        let mut listed = Vec::new();
        for image in self.images() {
            if let Some((path, digest, size)) = self.bootstrap(&image) {
                listed.push(Listed {
                    kind: "bootstrap",
                    digest: format!("sha256:{digest}"),
                    size,
                    path,
                });
            }
            for directory in [image.join("blobs"), image] {
                for path in children(&directory) {
                    let name = path
                        .file_name()
                        .and_then(|name| name.to_str())
                        .unwrap_or_default()
                        .to_owned();
                    if let Some(size) = path
                        .metadata()
                        .ok()
                        .filter(|m| m.is_file() && is_digest(&name))
                        .map(|m| m.len())
                    {
                        listed.push(Listed {
                            kind: "blob",
                            digest: format!("sha256:{name}"),
                            size,
                            path,
                        });
                    }
                }
            }
        }
        listed
    }

    /// The directories and those directly in them.
    fn images(&self) -> Vec<PathBuf> {
        let mut images = self.directories.clone();
        for directory in &self.directories {
            images.extend(children(directory).into_iter().filter(|path| path.is_dir()));
        }
        images
    }

    /// Path, digest and size of an image's bootstrap.
    fn bootstrap(&self, image: &Path) -> Option<(PathBuf, String, u64)> {
        let path = image.join("bootstrap");
        let metadata = path.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let stamp = (
            metadata.ino(),
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec(),
        );
        let known = self
            .bootstraps
            .lock()
            .get(&path)
            .filter(|(known, _)| *known == stamp)
            .cloned();
        let digest = match known {
            Some((_, digest)) => digest,
            None => {
                let digest = digest_of(&path).ok()?;
                self.bootstraps
                    .lock()
                    .insert(path.clone(), (stamp, digest.clone()));
                digest
            }
        };
        Some((path, digest, metadata.len()))
    }
}

/// What is in a directory, sorted; nothing if it cannot be read.
fn children(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

fn digest_of(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hex::encode(hash.finalize()))
}

/// 64 hexadecimal digits in lower case.
pub(super) fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}
