//! Access traces on the host's disk: which one a mount replays, and where a recording is kept for the next mount.
//!
//! A recording is kept in the image's cache directory as `traces/DIGEST.trace`, under the SHA-256 of the bootstrap, so that the next mount of
//! the same image finds it without being told. A configuration may name another file, or `none` (`rafs.trace`).

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use kata::config::Config;
use rafs::trace::Trace;
use sha2::{Digest, Sha256};

/// A trace of so many bytes names more chunks than the largest images have.
const MAX_FILE: u64 = 64 << 20;
/// The value of `rafs.trace` that means: no trace.
const NONE: &str = "none";

/// The trace that a mount with `config` replays. A trace only makes things faster: one that cannot be read is logged, and the image
/// is mounted without.
pub(super) fn of_mount(config: &Config, bootstrap: &Path) -> Option<Trace> {
    let named = config.rafs.as_ref().map_or("", |rafs| rafs.trace.as_str());
    let path = match named {
        NONE => return None,
        "" => kept(config, bootstrap)?,
        path => PathBuf::from(path),
    };
    match read(&path) {
        Ok(trace) => {
            tracing::info!("replaying {} chunks of {}", trace.chunks(), path.display());
            Some(trace)
        }
        Err(reason) => {
            tracing::warn!("access trace {}: {reason}; mounted without", path.display());
            None
        }
    }
}

/// Keeps a recording for the next mount of the image; tells where.
pub(super) fn keep(config: &Config, bootstrap: &Path, trace: &Trace) -> io::Result<PathBuf> {
    let directory = directory(config).ok_or_else(|| io::Error::other("the image has no cache directory"))?;
    fs::create_dir_all(&directory)?;
    let path = directory.join(name(bootstrap)?);
    let temporary = path.with_added_extension(std::process::id().to_string());
    let written = fs::write(&temporary, trace.to_string()).and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map(|()| path)
}

fn read(path: &Path) -> Result<Trace, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let mut text = String::new();
    let length = file.take(MAX_FILE + 1).read_to_string(&mut text);
    match length.map_err(|error| error.to_string())? as u64 {
        0..=MAX_FILE => text
            .parse()
            .map_err(|error: rafs::trace::TraceError| error.to_string()),
        _ => Err(format!("larger than {MAX_FILE} bytes")),
    }
}

/// The file kept by an earlier recording, if there is one.
fn kept(config: &Config, bootstrap: &Path) -> Option<PathBuf> {
    let directory = directory(config)?;
    // Most hosts have no traces, and need not hash every bootstrap for that.
    fs::read_dir(&directory).ok()?.next()?.ok()?;
    let path = directory.join(name(bootstrap).ok()?);
    path.exists().then_some(path)
}

fn directory(config: &Config) -> Option<PathBuf> {
    let cache = config.cache.as_ref()?.file_cache()?;
    Some(Path::new(&cache.work_dir).join("traces"))
}

fn name(bootstrap: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    io::copy(&mut File::open(bootstrap)?, &mut hasher)?;
    Ok(format!("{}.trace", hex::encode(hasher.finalize())))
}
