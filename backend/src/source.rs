//! Where a blob's bytes come from.
//!
//! A [`Source`] reads byte ranges of blobs and knows nothing else: no chunks, no cache, no waiting readers. It makes
//! one attempt; who retries, and for how long, is decided by the store, which knows the deadlines.

pub(crate) mod auth;
mod bucket;
pub(crate) mod clients;
pub mod dir;
pub mod disk;
mod file;
mod hedge;
pub(crate) mod http;
pub(crate) mod http_proxy;
pub(crate) mod oss;
mod parts;
pub mod pull;
pub(crate) mod registry;
pub(crate) mod remote;
pub(crate) mod retry;
mod route;
pub(crate) mod s3;
mod tls;

use std::ops::Range;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::config::Secret;
use crate::error::{SourceError, SourceErrorKind};

/// Takes the bytes of a range, in order, piece by piece as they arrive.
pub type Sink<'a> = &'a mut (dyn FnMut(Bytes) + Send);

/// Reads ranges of blobs. Shared by all blobs of a source.
pub trait Source: Send + Sync {
    /// Host or path, for messages.
    fn host(&self) -> &str;

    /// Reads `range` of blob `blob_id` into `sink`. `Ok` means that exactly the bytes of the range were delivered. After an error,
    /// what was delivered before it is good and may be kept: the next attempt can start behind it. Ends within the time-outs
    /// of the source's configuration. May be dropped at any await point.
    fn read<'a>(
        &'a self,
        blob_id: &'a str,
        range: Range<u64>,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>>;

    /// Most ranges that one request to it can name.
    fn ranges_per_request(&self) -> usize {
        1
    }

    /// Reads several ranges, ascending and apart, as [`Source::read`] does one: their bytes one after the other. No more of them than
    /// [`Source::ranges_per_request`] said are one request.
    fn read_ranges<'a>(
        &'a self,
        blob_id: &'a str,
        ranges: &'a [Range<u64>],
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        async move {
            for range in ranges {
                self.read(blob_id, range.clone(), sink).await?;
            }
            Ok(())
        }
        .boxed()
    }

    /// Uses other credentials (`user:password` in Base64) from now on.
    fn replace_auth(&self, _auth: Secret) -> Result<(), SourceError> {
        Err(no_password(self.host()))
    }

    /// What it delivered was damaged. If it has several ways to get it, it takes another one for a while.
    fn distrust(&self) {}

    /// Whether it has several ways to its bytes, one of them is left out at present, and is not due for another try.
    fn is_detoured(&self) -> bool {
        false
    }

    /// How often errors that look permanent are given another chance.
    fn retry_limit(&self) -> u32 {
        2
    }

    /// Tokens asked for so far.
    fn token_requests(&self) -> u64 {
        0
    }

    /// Goes through the forward proxy at `url` from now on; without one if it is empty.
    fn replace_proxy(&self, _url: Secret) -> Result<(), SourceError> {
        Err(SourceError::new(
            SourceErrorKind::Config,
            self.host(),
            "this source uses no proxy",
        ))
    }
}

fn no_password(host: &str) -> SourceError {
    SourceError::new(
        SourceErrorKind::Config,
        host,
        "this source takes no user and password",
    )
}
