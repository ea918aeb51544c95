//! Whether there is something better to do than to fetch whole blobs.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::{IDLE, Idle, STRAINED, State};
use crate::store::Blob;

/// How often a prefetch that is paused looks whether it may go on.
const LOOK: Duration = Duration::from_millis(100);

/// Waits until there is nothing better to do than to fetch whole blobs.
pub(super) async fn leisure(blob: &Blob, mut watch: Option<&mut Watch>, state: &State) {
    loop {
        let origin = &blob.shared.origin;
        let paused = if origin.strained() || origin.width() == 0 {
            STRAINED
        } else if watch.as_mut().is_some_and(|watch| watch.is_idle()) {
            IDLE
        } else {
            0
        };
        if state.paused.swap(paused, Relaxed) != paused && paused != 0 {
            let reason = if paused == IDLE {
                "the container is idle"
            } else {
                "the source is strained"
            };
            tracing::debug!(blob = %blob.description().id, reason, "prefetch pauses");
        }
        if paused == 0 {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Since when a container has asked for nothing.
pub(super) struct Watch {
    idle: Idle,
    requests: u64,
    since: Instant,
}

impl Watch {
    pub(super) fn new(idle: Idle) -> Self {
        let requests = (idle.requests)();
        Self {
            idle,
            requests,
            since: Instant::now(),
        }
    }

    fn is_idle(&mut self) -> bool {
        let requests = (self.idle.requests)();
        if requests != self.requests {
            self.requests = requests;
            self.since = Instant::now();
        }
        self.since.elapsed() >= self.idle.after
    }
}
