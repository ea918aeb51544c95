//! All counters in the text format of Prometheus (OpenMetrics). They are read when somebody scrapes; nothing is kept up
//! for it.
//!
//! Rooms: `families` (what there is; `docs/metrics.md` lists it, and a test compares), `gather` (all values at one moment),
//! `encode` (a value in its family).

mod encode;
mod families;
mod gather;

use prometheus_client::registry::Registry;

use super::DaemonControl;
use gather::Scrape;

/// The counters of `control` at this moment.
pub(super) fn text(control: &DaemonControl) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape::of(control)));
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}
