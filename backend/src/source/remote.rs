//! What all sources behind HTTP have in common: a [`Protocol`] knows how to ask its kind of server, a [`Remote`] makes a source of it.

use std::ops::Range;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::http::{Answer, Transport};
use super::{Sink, Source, no_password};
use crate::config::Secret;
use crate::error::SourceError;

/// How a kind of server is asked for parts of blobs.
pub(crate) trait Protocol: Send + Sync {
    /// Host, for messages.
    fn host(&self) -> &str;

    /// What requests are sent with.
    fn transport(&self) -> &Transport;

    /// Whether such servers may know lists of ranges.
    fn knows_lists(&self) -> bool {
        true
    }

    /// Asks for `ranges`, none of which is empty; gives the checked head of an answer that promises them.
    fn open(
        &self,
        blob_id: &str,
        ranges: &[Range<u64>],
    ) -> impl Future<Output = Result<Answer, SourceError>> + Send;

    /// As [`Source::replace_auth`].
    fn replace_auth(&self, _auth: Secret) -> Result<(), SourceError> {
        Err(no_password(self.host()))
    }

    /// As [`Source::token_requests`].
    fn token_requests(&self) -> u64 {
        0
    }
}

/// See the module.
pub(crate) struct Remote<P>(pub(crate) P);

impl<P: Protocol> Remote<P> {
    async fn read_list(
        &self,
        blob_id: &str,
        ranges: &[Range<u64>],
        sink: Sink<'_>,
    ) -> Result<(), SourceError> {
        if ranges.iter().all(Range::is_empty) {
            return Ok(());
        }
        let answer = self.0.open(blob_id, ranges).await?;
        self.0.transport().body(answer, ranges, sink).await
    }
}

impl<P: Protocol> Source for Remote<P> {
    fn host(&self) -> &str {
        self.0.host()
    }

    fn read<'a>(
        &'a self,
        blob_id: &'a str,
        range: Range<u64>,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        async move { self.read_list(blob_id, &[range], sink).await }.boxed()
    }

    fn ranges_per_request(&self) -> usize {
        if self.0.knows_lists() {
            self.0.transport().ranges_per_request()
        } else {
            1
        }
    }

    fn read_ranges<'a>(
        &'a self,
        blob_id: &'a str,
        ranges: &'a [Range<u64>],
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        self.read_list(blob_id, ranges, sink).boxed()
    }

    fn replace_auth(&self, auth: Secret) -> Result<(), SourceError> {
        self.0.replace_auth(auth)
    }

    fn token_requests(&self) -> u64 {
        self.0.token_requests()
    }

    fn replace_proxy(&self, url: Secret) -> Result<(), SourceError> {
        self.0.transport().replace_proxy(url)
    }

    fn distrust(&self) {
        self.0.transport().distrust();
    }

    fn is_detoured(&self) -> bool {
        self.0.transport().is_detoured()
    }

    fn retry_limit(&self) -> u32 {
        self.0.transport().retry_limit()
    }
}
