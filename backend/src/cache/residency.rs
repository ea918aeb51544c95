//! The chunks that are complete, verified for one image, and may be read from the data file.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::ledger::Ledger;

/// One image's belief: for each chunk the version under which this image found it to be its own. It is worth something only
/// as long as the ledger has that version.
pub(crate) struct Residency {
    versions: Box<[AtomicU32]>,
    ledger: Option<Arc<Ledger>>,
}

impl Residency {
    /// Nothing, of as many chunks as `ledger` knows; for ever if there is none.
    pub(crate) fn new(ledger: Option<Arc<Ledger>>) -> Self {
        let chunks = ledger.as_ref().map_or(0, |ledger| ledger.chunks());
        Self {
            versions: (0..chunks).map(|_| AtomicU32::new(0)).collect(),
            ledger,
        }
    }

    /// The version of chunk `index`, 0 if it is not resident. Two loads. Whoever sees the version sees the data that were written before.
    pub(crate) fn version(&self, index: u32) -> u32 {
        let version = self
            .versions
            .get(index as usize)
            .map_or(0, |version| version.load(Ordering::Relaxed));
        match &self.ledger {
            Some(ledger) if version != 0 && ledger.holds(index, version) => version,
            _ => 0,
        }
    }

    pub(crate) fn insert(&self, index: u32, version: u32) {
        if let Some(slot) = self.versions.get(index as usize) {
            slot.store(version, Ordering::Relaxed);
        }
    }

    /// Number of resident chunks.
    pub(crate) fn count(&self) -> u32 {
        let Some(ledger) = &self.ledger else { return 0 };
        let resident = (0..).zip(&self.versions).filter(|(index, version)| {
            let version = version.load(Ordering::Relaxed);
            version != 0 && ledger.present(*index) == version
        });
        resident.count() as u32
    }

    /// Chunks withdrawn from the data file so far, by any process.
    pub(crate) fn withdrawn(&self) -> u64 {
        self.ledger.as_ref().map_or(0, |ledger| ledger.withdrawn())
    }
}
