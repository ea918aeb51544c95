//! What a request asks for: from the directories, or else from the upstream.

use std::fs::File;
use std::io;
use std::sync::Arc;

use axum::http::StatusCode;
use axum::response::Response;
use sha2::{Digest, Sha256};

use super::State;
use super::answer::{broken, refuse};
use super::body::Content;
use super::manifest;
use super::pull::{Kind, PullError};

/// What was asked for.
pub(super) struct Found {
    pub(super) content: Content,
    pub(super) size: u64,
    pub(super) digest: String,
    /// Media type.
    pub(super) kind: String,
}

pub(super) fn only_by_digest() -> Response {
    refuse(
        StatusCode::NOT_FOUND,
        "UNSUPPORTED",
        "only blobs and manifests by digest are served here",
    )
}

/// A failure to get something from the upstream. `code` is the word for what it has not got either.
fn not_pulled(error: &PullError, code: &str, name: &str) -> Response {
    let (status, code) = match error {
        PullError::Missing => (StatusCode::NOT_FOUND, code),
        PullError::Upstream(_) => (StatusCode::BAD_GATEWAY, "UNKNOWN"),
        PullError::Store(_) => (StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN"),
    };
    refuse(status, code, format!("{name}: {error}"))
}

async fn open(state: &Arc<State>, hex: &str) -> Option<(File, u64)> {
    let (state, hex) = (state.clone(), hex.to_owned());
    let opened = tokio::task::spawn_blocking(move || state.catalog.open(&hex)).await;
    opened.ok().flatten()
}

pub(super) async fn by_digest(
    state: &Arc<State>,
    kind: Kind,
    repository: &str,
    hex: &str,
) -> Result<Found, Response> {
    let digest = format!("sha256:{hex}");
    let (name, code) = match kind {
        Kind::Blob => ("blob", "BLOB_UNKNOWN"),
        Kind::Manifest => ("manifest", "MANIFEST_UNKNOWN"),
    };
    let unknown = || refuse(StatusCode::NOT_FOUND, code, format!("no {name} {digest}"));
    let mut opened = open(state, hex).await;
    if let (None, Some(pull)) = (&opened, &state.pull) {
        if !manifest::is_repository(repository) {
            return Err(refuse(
                StatusCode::BAD_REQUEST,
                "NAME_INVALID",
                "not a repository's name",
            ));
        }
        pull.object(kind, repository, hex)
            .await
            .map_err(|error| not_pulled(&error, code, &digest))?;
        opened = open(state, hex).await;
    }
    let (file, size) = opened.ok_or_else(unknown)?;
    match kind {
        Kind::Blob => Ok(Found {
            content: Content::File(Arc::new(file)),
            size,
            digest,
            kind: "application/octet-stream".to_owned(),
        }),
        Kind::Manifest => read_manifest(file).await?.ok_or_else(unknown),
    }
}

pub(super) async fn by_tag(state: &Arc<State>, repository: &str, tag: &str) -> Result<Found, Response> {
    let Some(pull) = &state.pull else {
        return Err(only_by_digest());
    };
    if !manifest::is_repository(repository) {
        return Err(refuse(
            StatusCode::BAD_REQUEST,
            "NAME_INVALID",
            "not a repository's name",
        ));
    }
    let name = format!("{repository}:{tag}");
    let path = pull
        .tag(repository, tag)
        .await
        .map_err(|error| not_pulled(&error, "MANIFEST_UNKNOWN", &name))?;
    let file = File::open(path).map_err(broken)?;
    read_manifest(file)
        .await?
        .ok_or_else(|| broken(format!("{name}: what is stored is no manifest")))
}

async fn read_manifest(file: File) -> Result<Option<Found>, Response> {
    let read = tokio::task::spawn_blocking(move || manifest::parse(&file)).await;
    let read = read.map_err(io::Error::other).flatten().map_err(broken)?;
    Ok(read.map(|(bytes, kind)| Found {
        size: bytes.len() as u64,
        digest: format!("sha256:{}", hex::encode(Sha256::digest(&bytes))),
        content: Content::Bytes(bytes.into()),
        kind,
    }))
}
