//! All counters at one moment.

use std::collections::{BTreeMap, HashSet};

use backend::metrics::{BlobMetrics, CacheMetrics, SourceMetrics};
use kata::Control;

use crate::control::{DaemonControl, operate};
use crate::metrics::{MountSnapshot, Snapshot};
use crate::mounts::Instance;

/// A source: host or path, type.
pub(super) type SourceName = (String, &'static str);

/// All counters at one moment.
#[derive(Debug, Default)]
pub(super) struct Scrape {
    pub(super) version: [(&'static str, String); 2],
    pub(super) uptime: f64,
    pub(super) draining: bool,
    pub(super) kinds: BTreeMap<&'static str, u64>,
    pub(super) mounts: Vec<(String, MountSnapshot)>,
    pub(super) device: Snapshot,
    pub(super) waiting: BTreeMap<&'static str, u64>,
    pub(super) oldest: f64,
    pub(super) images: Vec<Image>,
    /// By directory, with its quota.
    pub(super) caches: BTreeMap<String, (CacheMetrics, u64)>,
    pub(super) sources: BTreeMap<SourceName, (SourceMetrics, BlobMetrics)>,
}

#[derive(Debug)]
pub(super) struct Image {
    pub(super) mountpoint: String,
    pub(super) chunks: u64,
    pub(super) resident: u64,
    pub(super) in_flight: u64,
    pub(super) prefetched: u64,
}

impl Scrape {
    pub(super) fn of(control: &DaemonControl) -> Self {
        let version = control.version();
        let mounts = control.mounts.list();
        let mut scrape = Self {
            version: [("version", version.package_ver), ("commit", version.git_commit)],
            uptime: control.started.elapsed().as_secs_f64(),
            draining: control.is_draining(),
            kinds: BTreeMap::from([("image", 0), ("directory", 0)]),
            device: control.device(),
            waiting: ["data", "lock", "worker", "thread", "driver"]
                .map(|stage| (stage, 0))
                .into(),
            ..Self::default()
        };
        for mount in mounts {
            let kind = match mount.instance {
                Instance::Rafs(_) => "image",
                Instance::Passthrough(_) => "directory",
            };
            *scrape.kinds.entry(kind).or_default() += 1;
            scrape.mounts.push((mount.path, mount.metrics.snapshot()));
        }
        for waiting in control.waiting() {
            *scrape.waiting.entry(operate::stage(waiting.stage)).or_default() += 1;
            scrape.oldest = scrape.oldest.max(waiting.since.elapsed().as_secs_f64());
        }
        scrape.add_images(control);
        scrape
    }

    fn add_images(&mut self, control: &DaemonControl) {
        // Mounts share blobs, and blobs share sources: each is counted once.
        let mut seen = HashSet::new();
        for (mountpoint, image) in control.images() {
            let Some(instance) = image.instance.upgrade() else {
                continue;
            };
            let blobs = instance.blobs();
            self.images.push(Image {
                chunks: blobs
                    .iter()
                    .map(|blob| u64::from(blob.description().chunk_count))
                    .sum(),
                resident: blobs.iter().map(|blob| u64::from(blob.resident())).sum(),
                in_flight: blobs.iter().map(|blob| blob.in_flight() as u64).sum(),
                prefetched: image.prefetching.progress().map_or(0, |progress| progress.bytes),
                mountpoint,
            });
            let cache = blobs.iter().find_map(|blob| blob.cache_metrics());
            if let Some(cache) = cache {
                let (_, quota) = self
                    .caches
                    .entry(image.cache_dir().to_owned())
                    .or_insert((cache, 0));
                // Mounts that share a directory may say different things; the least of them is what holds.
                *quota = match (*quota, image.cache_quota()) {
                    (0, other) | (other, 0) => other,
                    (one, other) => one.min(other),
                };
            }
            for blob in blobs {
                let source = (blob.source_host().to_owned(), image.source_type());
                let (requests, chunks) = self.sources.entry(source.clone()).or_default();
                if seen.insert((source.clone(), image.source.clone(), None)) {
                    add_source(requests, &blob.source_metrics());
                }
                let id = Some((blob.description().id.clone(), image.cache_dir().to_owned()));
                if seen.insert((source, image.source.clone(), id)) {
                    add_blob(chunks, &blob.metrics());
                }
            }
        }
    }
}

fn add_source(sum: &mut SourceMetrics, more: &SourceMetrics) {
    sum.requests += more.requests;
    sum.errors += more.errors;
    sum.retries += more.retries;
    sum.in_flight += more.in_flight;
    sum.bytes += more.bytes;
    sum.latency += more.latency;
    sum.token_requests += more.token_requests;
    sum.failures_in_a_row = sum.failures_in_a_row.max(more.failures_in_a_row);
    sum.by_latency
        .iter_mut()
        .zip(more.by_latency)
        .for_each(|(sum, count)| *sum += count);
}

fn add_blob(sum: &mut BlobMetrics, more: &BlobMetrics) {
    sum.fetched += more.fetched;
    sum.fetched_bytes += more.fetched_bytes;
    sum.recalled += more.recalled;
    sum.held += more.held;
    sum.damaged += more.damaged;
    sum.joined += more.joined;
}
