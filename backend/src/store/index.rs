//! The chunk index of a blob: read when the first chunk is described, kept in the cache directory for runs without a network.
//!
//! Also what depends on nothing but the index and the cache directory: recalling which chunks an earlier run left there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::budget::Ticket;
use super::fetch::Plan;
use super::{Blob, FetchError, Priority};
use crate::chunk::IndexRange;
use crate::codec;
use crate::source::retry::Backoff;

/// Chunks recalled in one go.
const WINDOW: u32 = 1024;
/// Pause between looks for an index that another process reads.
const LOOK: Duration = Duration::from_millis(20);
/// Largest chunk index that is read from a source.
const MAX_INDEX: u32 = 512 << 20;

/// What is known of a blob's chunk index.
pub(super) enum IndexState {
    /// Not asked yet.
    Unknown,
    /// On its way; these go on when it is there.
    Loading(Vec<Plan>),
    /// It describes chunks.
    Ready,
}

impl Blob {
    /// Gives the plan back if the chunks can be described; otherwise keeps it until they can, or it has failed.
    pub(super) fn with_index(self: &Arc<Self>, plan: Plan) -> Option<Plan> {
        let mut state = self.index.lock();
        match self.look_for_index(&mut state) {
            None => Some(plan),
            Some(range) => {
                if let IndexState::Loading(plans) = &mut *state {
                    plans.push(plan);
                } else {
                    *state = IndexState::Loading(vec![plan]);
                    self.seek_index(range, false);
                }
                None
            }
        }
    }

    /// What must be read from the source, if there is nothing at hand.
    fn look_for_index(&self, state: &mut IndexState) -> Option<IndexRange> {
        if matches!(state, IndexState::Ready) {
            return None;
        }
        let files = &self.shared.files;
        loop {
            let Some(range) = self.description.index.wanted() else {
                if !matches!(state, IndexState::Loading(_)) {
                    *state = IndexState::Ready;
                }
                return None;
            };
            if matches!(state, IndexState::Loading(_)) {
                return Some(range);
            }
            let Some(bytes) = files.load_index(&range) else {
                return Some(range);
            };
            let supplied = self.description.index.supply(&bytes);
            if let Err(error) = &supplied {
                tracing::warn!(%error, "kept chunk index is not used");
            }
            if supplied.is_err() || self.description.index.wanted().as_ref() == Some(&range) {
                files.drop_index();
                return Some(range);
            }
        }
    }

    /// Takes the bytes of the index from the source. Runs on a decode thread.
    fn supply(self: &Arc<Self>, range: IndexRange, bytes: &[u8], again: bool) {
        let supplied = self.description.index.supply(bytes);
        match supplied {
            Ok(()) if self.description.index.wanted().as_ref() == Some(&range) => {
                self.end_loading(
                    IndexState::Unknown,
                    Some("chunk index: supplied, and still wanted".into()),
                );
            }
            Ok(()) => {
                self.shared.files.save_index(&range, bytes);
                self.end_loading(IndexState::Unknown, None);
            }
            Err(error) if again => self.end_loading(IndexState::Unknown, Some(error.to_string())),
            Err(error) => {
                tracing::warn!(%error, source = self.shared.origin.source.host(), "damaged chunk index, once more");
                self.shared.origin.source.distrust();
                self.seek_index(range, true);
            }
        }
    }

    /// Takes the index from where another process left it, or reads it, unless another process does so now. Runs on a decode thread.
    fn take_index(self: Arc<Self>, range: IndexRange, again: bool) {
        let runtime = self.shared.engine.runtime().handle().clone();
        if !self.shared.files.begin_index() {
            return drop(runtime.spawn(async move {
                tokio::time::sleep(LOOK).await;
                if self.index_wanted(None) {
                    self.seek_index(range, again);
                }
            }));
        }
        // With the right, so that nobody finishes between this look and our request.
        match self.shared.files.load_index(&range).filter(|_| !again) {
            Some(bytes) if self.description.index.supply(&bytes).is_ok() => {
                self.shared.files.end_index();
                self.end_loading(IndexState::Unknown, None);
            }
            _ => drop(runtime.spawn(load(self, range, again))),
        }
    }

    fn seek_index(self: &Arc<Self>, range: IndexRange, again: bool) {
        let blob = Arc::clone(self);
        let job = move |_: &mut codec::Decoder| blob.take_index(range, again);
        self.engine().pool.push(Priority::Demand, Box::new(job));
    }

    fn end_loading(self: &Arc<Self>, state: IndexState, failure: Option<String>) {
        let old = std::mem::replace(&mut *self.index.lock(), state);
        let IndexState::Loading(plans) = old else { return };
        for plan in plans {
            match &failure {
                Some(reason) => plan.waiter.fail(FetchError::new(&self.shared.id, reason)),
                None => self.plan(plan),
            }
        }
    }

    /// Whether somebody waits for the index.
    fn index_wanted(&self, note: Option<&str>) -> bool {
        let mut state = self.index.lock();
        let IndexState::Loading(plans) = &mut *state else {
            return false;
        };
        plans.retain(|plan| plan.waiter.live());
        if let Some(note) = note {
            plans.iter().for_each(|plan| plan.waiter.note(note));
        }
        if plans.is_empty() {
            *state = IndexState::Unknown;
            return false;
        }
        true
    }

    /// Recalls, when nothing else is to do, which chunks an earlier run or another process left in the cache.
    pub(super) fn recall(self: &Arc<Self>) {
        if self
            .shared
            .files
            .ledger()
            .is_some_and(|ledger| ledger.any_present())
        {
            self.recall_from(0);
        }
    }

    fn recall_from(self: &Arc<Self>, first: u32) {
        let blob = Arc::downgrade(self);
        let job = move |_: &mut codec::Decoder| {
            let Some(blob) = blob.upgrade() else { return };
            if blob.look_for_index(&mut blob.index.lock()).is_some() {
                return;
            }
            blob.recall_window(first);
            let next = first.saturating_add(WINDOW);
            if next < blob.description.chunk_count {
                blob.recall_from(next);
            }
        };
        self.engine().pool.push(Priority::Background, Box::new(job));
    }

    fn recall_window(&self, first: u32) {
        let count = WINDOW.min(self.description.chunk_count.saturating_sub(first));
        for (index, version, stamp) in self.shared.files.recall_all(first, count) {
            if let Ok(chunk) = self.describe(index)
                && codec::stamp(&self.description, &chunk) == stamp
            {
                self.residency.insert(index, version);
            }
        }
    }
}

/// Reads the index from the source, as long as somebody waits for it.
async fn load(blob: Arc<Blob>, range: IndexRange, again: bool) {
    let shared = Arc::clone(&blob.shared);
    let end = range.offset.checked_add(range.size.into());
    let (Some(end), true) = (end, range.size <= MAX_INDEX) else {
        let reason = format!("chunk index at {}+{} can not be read", range.offset, range.size);
        return blob.end_loading(IndexState::Unknown, Some(reason));
    };
    let ticket = Ticket::new(Priority::Demand);
    let (mut backoff, started) = (Backoff::new(shared.origin.source.retry_limit()), Instant::now());
    let mut bytes = BytesMut::new();
    loop {
        // The first time the right is there already.
        while backoff.attempts() > 0 && !shared.files.begin_index() {
            tokio::time::sleep(LOOK).await;
        }
        let Some(permit) = shared
            .engine
            .budget
            .enter(shared.origin.lane, &ticket, range.size.into())
            .await
        else {
            return;
        };
        if !blob.index_wanted(None) {
            return shared.files.end_index();
        }
        let before = bytes.len();
        let rest = range.offset + before as u64..end;
        let mut sink = |piece: Bytes| bytes.extend_from_slice(&piece);
        let Err(error) = shared
            .origin
            .read(
                &range.blob_id,
                &[rest],
                Priority::Demand,
                backoff.attempts() > 0,
                &mut sink,
            )
            .await
        else {
            let stored = bytes.freeze();
            let job = move |_: &mut codec::Decoder| {
                blob.supply(range, &stored, again);
                blob.shared.files.end_index();
                drop(permit);
            };
            return shared.engine.pool.push(Priority::Demand, Box::new(job));
        };
        drop(permit);
        shared.files.end_index();
        if bytes.len() > before {
            backoff.reset();
        }
        let pause = backoff.after(&error);
        let spent = started.elapsed().as_secs_f64();
        let reason = format!(
            "chunk index: {error} (attempt {}, {spent:.1} s)",
            backoff.attempts()
        );
        tracing::debug!(blob = %shared.id, %reason, "request failed");
        let Some(pause) = pause else {
            return blob.end_loading(IndexState::Unknown, Some(reason));
        };
        if !blob.index_wanted(Some(&reason)) {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}
