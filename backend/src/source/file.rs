//! Reading ranges of local files on tokio's blocking threads, so that a file system that hangs holds up its own readers only.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

use super::Sink;
use crate::error::{SourceError, SourceErrorKind};

/// Bytes read, and handed on, at a time.
const PIECE: u64 = 1 << 20;

/// Reads `range` of `file`, whose place is called `host`.
pub(super) async fn read(
    host: &str,
    file: Arc<File>,
    range: Range<u64>,
    sink: Sink<'_>,
) -> Result<(), SourceError> {
    let mut start = range.start;
    while start < range.end {
        let end = range.end.min(start.saturating_add(PIECE));
        let file = Arc::clone(&file);
        sink(blocking(host, move || piece(&file, start..end)).await?);
        start = end;
    }
    Ok(())
}

/// Runs `work` where it may block.
pub(super) async fn blocking<T: Send + 'static>(
    host: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, SourceError> {
    let result = tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)
        .flatten();
    result.map_err(|error| {
        let kind = match error.kind() {
            ErrorKind::NotFound => SourceErrorKind::NotFound,
            ErrorKind::PermissionDenied => SourceErrorKind::Denied,
            ErrorKind::UnexpectedEof => SourceErrorKind::RangeRefused,
            _ => SourceErrorKind::Io,
        };
        SourceError::new(kind, host, error)
    })
}

fn piece(file: &File, range: Range<u64>) -> io::Result<Bytes> {
    let mut piece = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut piece, range.start)
        .map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => io::Error::new(
                ErrorKind::UnexpectedEof,
                format!("the file ends before byte {}", range.end),
            ),
            _ => error,
        })?;
    Ok(piece.into())
}
