//! A directory of blobs: each blob is a file under its id.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::{Sink, Source, file};
use crate::config::DirConfig;
use crate::error::{SourceError, SourceErrorKind};

/// See the module.
pub struct Dir {
    config: Arc<DirConfig>,
    host: String,
}

impl Dir {
    /// A source of the files that `config` names. They are looked up when they are read.
    pub fn new(config: DirConfig) -> Result<Self, SourceError> {
        let place = config
            .blob_file
            .as_ref()
            .or(config.dir.as_ref())
            .or(config.alt_dirs.first());
        let Some(place) = place else {
            return Err(SourceError::new(
                SourceErrorKind::Config,
                "localfs",
                "neither dir nor blob_file is given",
            ));
        };
        Ok(Self {
            host: place.display().to_string(),
            config: Arc::new(config),
        })
    }
}

impl Source for Dir {
    fn host(&self) -> &str {
        &self.host
    }

    fn read<'a>(
        &'a self,
        blob_id: &'a str,
        range: Range<u64>,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        async move {
            let (config, id) = (Arc::clone(&self.config), blob_id.to_owned());
            let file = file::blocking(&self.host, move || open(&config, &id)).await?;
            file::read(&self.host, Arc::new(file), range, sink).await
        }
        .boxed()
    }
}

fn open(config: &DirConfig, blob_id: &str) -> io::Result<File> {
    if let Some(file) = &config.blob_file {
        return File::open(file);
    }
    // A blob id comes from an image: it must not lead out of the directory.
    if blob_id.is_empty() || blob_id == "." || blob_id == ".." || blob_id.contains(['/', '\0']) {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            format!("{blob_id:?} is no file name"),
        ));
    }
    let mut missing = None;
    for dir in config.dir.iter().chain(&config.alt_dirs) {
        match File::open(path(dir, blob_id)) {
            Err(error) if error.kind() == ErrorKind::NotFound => missing = Some(error),
            other => return other,
        }
    }
    Err(missing.unwrap_or_else(|| ErrorKind::NotFound.into()))
}

fn path(dir: &Path, blob_id: &str) -> PathBuf {
    dir.join(blob_id)
}
