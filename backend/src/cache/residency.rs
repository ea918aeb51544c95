//! The chunks that are complete, verified for one image, and may be read from the data file.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use super::ledger::Ledger;

/// Chunks whose versions are allocated together.
const PAGE: usize = 1024;

/// Versions of neighbouring chunks.
type Page = Box<[AtomicU32]>;

/// One image's belief: for each chunk the version under which this image found it to be its own. It is worth something only
/// as long as the ledger has that version.
///
/// A container reads a small part of its image, so what belongs to the rest takes no memory: a page is made when its first
/// chunk becomes resident, and never goes.
pub(crate) struct Residency {
    pages: Box<[OnceLock<Page>]>,
    chunks: u32,
    ledger: Option<Arc<Ledger>>,
}

impl Residency {
    /// Nothing, of as many chunks as `ledger` knows; for ever if there is none.
    pub(crate) fn new(ledger: Option<Arc<Ledger>>) -> Self {
        let chunks = ledger.as_ref().map_or(0, |ledger| ledger.chunks());
        let pages = (chunks as usize).div_ceil(PAGE);
        Self {
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            chunks,
            ledger,
        }
    }

    /// The version of chunk `index`, 0 if it is not resident. A few loads. Whoever sees the version sees the data that were written before.
    pub(crate) fn version(&self, index: u32) -> u32 {
        let version = self
            .pages
            .get(index as usize / PAGE)
            .and_then(OnceLock::get)
            .and_then(|page| page.get(index as usize % PAGE))
            .map_or(0, |version| version.load(Ordering::Relaxed));
        match &self.ledger {
            Some(ledger) if version != 0 && ledger.holds(index, version) => version,
            _ => 0,
        }
    }

    pub(crate) fn insert(&self, index: u32, version: u32) {
        if index >= self.chunks {
            return;
        }
        if let Some(page) = self.pages.get(index as usize / PAGE) {
            let page = page.get_or_init(|| (0..PAGE).map(|_| AtomicU32::new(0)).collect());
            if let Some(slot) = page.get(index as usize % PAGE) {
                slot.store(version, Ordering::Relaxed);
            }
        }
    }

    /// Number of resident chunks.
    pub(crate) fn count(&self) -> u32 {
        let Some(ledger) = &self.ledger else { return 0 };
        let versions = (0..).step_by(PAGE).zip(&self.pages).flat_map(|(first, page)| {
            let page = page.get().into_iter().flatten();
            (first..).zip(page.map(|version| version.load(Ordering::Relaxed)))
        });
        let resident =
            versions.filter(|(index, version)| *version != 0 && ledger.present(*index) == *version);
        resident.count() as u32
    }

    /// Chunks withdrawn from the data file so far, by any process.
    pub(crate) fn withdrawn(&self) -> u64 {
        self.ledger.as_ref().map_or(0, |ledger| ledger.withdrawn())
    }
}
