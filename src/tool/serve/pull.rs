//! Pull-through: what the directories lack is fetched once from another registry and kept.
//!
//! Objects that are named by their digest go to `DIR/blobs/<hex>`, where they are found like any other blob. A tag may mean another
//! manifest tomorrow: it is asked for each time, and `DIR/tags/<hex>.json` answers while the upstream does not.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use backend::error::{SourceError, SourceErrorKind};
use backend::source::pull::{Upstream, UpstreamOptions};
use bytes::Bytes;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::ServeError;
use super::manifest::{self, MAX_MANIFEST};

/// Pieces of a body on their way to the disk.
const PIECES: usize = 4;
/// Start of the names of files that are being written.
const PARTIAL: &str = ".pull-";

/// See the module.
pub(super) struct Pull {
    upstream: Upstream,
    store: PathBuf,
    /// One turn per file that is being fetched.
    turns: Mutex<HashMap<PathBuf, Turn>>,
}

type Turn = Arc<tokio::sync::Mutex<()>>;

/// Why an object is not there now.
#[derive(Debug, thiserror::Error)]
pub(super) enum PullError {
    /// The upstream has none either.
    #[error("not at the upstream either")]
    Missing,
    /// The upstream cannot be asked, or sends what cannot be used.
    #[error("{0}")]
    Upstream(String),
    /// There is no place for it.
    #[error("cannot store it: {0}")]
    Store(#[from] io::Error),
}

impl From<SourceError> for PullError {
    fn from(error: SourceError) -> Self {
        match error.kind {
            SourceErrorKind::NotFound => Self::Missing,
            _ => Self::Upstream(format!("upstream: {error}")),
        }
    }
}

/// What to fetch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Blob,
    Manifest,
}

/// An object, and where it is to be kept.
struct Wanted {
    kind: Kind,
    repository: String,
    path: String,
    target: PathBuf,
    /// Its sha256, if that is known.
    digest: Option<String>,
}

impl Pull {
    /// Fetches from `upstream`, and keeps it in `store`, which has to be writable.
    pub(super) fn new(upstream: &UpstreamOptions, store: &Path) -> Result<Self, ServeError> {
        let unusable = |source| ServeError::File {
            action: "keep what the upstream sends in",
            path: store.to_path_buf(),
            source,
        };
        for directory in ["blobs", "tags"].map(|name| store.join(name)) {
            std::fs::create_dir_all(&directory).map_err(unusable)?;
            Partial::new(&directory.join("probe")).map_err(unusable)?;
            remove_leftovers(&directory);
        }
        Ok(Self {
            upstream: Upstream::new(upstream).map_err(ServeError::Upstream)?,
            store: store.to_path_buf(),
            turns: Mutex::default(),
        })
    }

    /// Fetches what has this sha256, unless it has come meanwhile. Goes on if the client does not wait for it.
    pub(super) async fn object(
        self: &Arc<Self>,
        kind: Kind,
        repository: &str,
        hex: &str,
    ) -> Result<(), PullError> {
        let what = match kind {
            Kind::Blob => "blobs",
            Kind::Manifest => "manifests",
        };
        let path = format!("/v2/{repository}/{what}/sha256:{hex}");
        let wanted = Wanted {
            kind,
            repository: repository.to_owned(),
            path,
            target: self.store.join("blobs").join(hex),
            digest: Some(hex.to_owned()),
        };
        self.in_turn(wanted).await
    }

    /// Where the manifest is that a tag means now, or meant when the upstream last answered.
    pub(super) async fn tag(self: &Arc<Self>, repository: &str, tag: &str) -> Result<PathBuf, PullError> {
        let target = tag_file(&self.store, repository, tag);
        let wanted = Wanted {
            kind: Kind::Manifest,
            repository: repository.to_owned(),
            path: format!("/v2/{repository}/manifests/{tag}"),
            target: target.clone(),
            digest: None,
        };
        match self.in_turn(wanted).await {
            Err(PullError::Upstream(reason)) if target.exists() => {
                tracing::warn!(reason, repository, tag, "the manifest stored before is served");
                Ok(target)
            }
            outcome => outcome.map(|()| target),
        }
    }

    async fn in_turn(self: &Arc<Self>, wanted: Wanted) -> Result<(), PullError> {
        let pull = Arc::clone(self);
        let fetch = tokio::spawn(async move {
            let turn = pull
                .turns
                .lock()
                .entry(wanted.target.clone())
                .or_default()
                .clone();
            let held = turn.lock().await;
            let outcome = if wanted.digest.is_some() && wanted.target.exists() {
                Ok(())
            } else {
                pull.fetch(wanted).await
            };
            drop(held);
            drop(turn);
            pull.turns.lock().retain(|_, turn| Arc::strong_count(turn) > 1);
            outcome
        });
        fetch.await.map_err(io::Error::other)?
    }

    async fn fetch(&self, wanted: Wanted) -> Result<(), PullError> {
        let Wanted {
            kind,
            repository,
            path,
            target,
            digest,
        } = wanted;
        let (limit, accept) = match kind {
            Kind::Blob => (u64::MAX, "*/*"),
            Kind::Manifest => (MAX_MANIFEST, manifest::ACCEPT),
        };
        let host = self.upstream.host();
        let mut object = self.upstream.get(&repository, &path, accept).await?;
        let (send, receive) = mpsc::channel(PIECES);
        let name = target.clone();
        let writer = tokio::task::spawn_blocking(move || write(&name, receive));
        let received = async {
            let mut size = 0;
            while let Some(piece) = self.upstream.piece(&mut object).await? {
                size += piece.len() as u64;
                if size > limit {
                    let reason = format!("upstream {host}: {path} is a manifest of more than {limit} bytes");
                    return Err(PullError::Upstream(reason));
                }
                if send.send(piece).await.is_err() {
                    break; // the writer tells why
                }
            }
            Ok(())
        }
        .await;
        drop(send);
        let written = writer.await.map_err(io::Error::other)?;
        received?;
        let (partial, actual) = written?;
        if let Some(expected) = digest.filter(|expected| *expected != actual) {
            let reason = format!("upstream {host}: {path} has digest sha256:{actual}, not sha256:{expected}");
            return Err(PullError::Upstream(reason));
        }
        let kept = tokio::task::spawn_blocking(move || {
            if kind == Kind::Manifest && manifest::read(&partial.path)?.is_none() {
                return Ok(false);
            }
            partial.keep(&target).map(|()| true)
        });
        if kept.await.map_err(io::Error::other)?? {
            Ok(())
        } else {
            Err(PullError::Upstream(format!(
                "upstream {host}: {path} is no manifest"
            )))
        }
    }
}

/// Writes what arrives to a partial file for `target`, and tells its sha256.
fn write(target: &Path, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<(Partial, String)> {
    let mut partial = Partial::new(target)?;
    let mut hash = Sha256::new();
    while let Some(piece) = pieces.blocking_recv() {
        hash.update(&piece);
        partial.file.write_all(&piece)?;
    }
    Ok((partial, hex::encode(hash.finalize())))
}

/// The file of a tag. No blob is found by its name.
pub(super) fn tag_file(store: &Path, repository: &str, tag: &str) -> PathBuf {
    let key = hex::encode(Sha256::digest(format!("{repository}:{tag}")));
    store.join("tags").join(format!("{key}.json"))
}

/// A file that is not complete, locked by its writer. Removed when dropped.
struct Partial {
    file: File,
    path: PathBuf,
}

impl Partial {
    fn new(target: &Path) -> io::Result<Self> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let path = target.with_file_name(format!("{PARTIAL}{}-{name}", std::process::id()));
        let file = File::create(&path)?;
        let partial = Self { file, path };
        partial.file.lock()?;
        Ok(partial)
    }

    /// Gives the complete file its name, once its content is sure to outlive a power cut.
    fn keep(self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.path, target)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes partial files whose writers are gone.
fn remove_leftovers(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let partial = entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PARTIAL.as_bytes());
        if partial
            && let Ok(file) = File::open(entry.path())
            && !matches!(file.try_lock(), Err(TryLockError::WouldBlock))
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
