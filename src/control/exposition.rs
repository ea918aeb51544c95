//! All counters in the text format of Prometheus (OpenMetrics). They are read when somebody scrapes; nothing is kept up
//! for it.
//!
//! `docs/metrics.md` lists them; a test compares it with what is written here.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Error;

use backend::metrics::{BlobMetrics, SourceMetrics};
use kata::Control;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::{DaemonControl, operate};
use crate::metrics::{Latencies, MountSnapshot, Snapshot, Work};

/// A family of metrics: name (counters get `_total` added), help, type.
type Family = (&'static str, &'static str, Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

const INFO: Family = ("rafsd_build_info", "What runs; always 1", Kind::Gauge);
const UPTIME: Family = ("rafsd_uptime_seconds", "Time since the start", Kind::Gauge);
const DRAINING: Family = ("rafsd_draining", "1 while new mounts are refused", Kind::Gauge);
const MOUNTS: Family = ("rafsd_mounts", "Mounts by kind", Kind::Gauge);
const REQUESTS: Family = (
    "rafsd_requests",
    "Requests answered, by mount and operation",
    Kind::Counter,
);
const DURATION: Family = (
    "rafsd_request_duration_seconds",
    "Time until a request was answered, waits included, by mount and kind of work",
    Kind::Histogram,
);
const RECEIVED: Family = (
    "rafsd_received_requests",
    "Requests received, by operation",
    Kind::Counter,
);
const ERRORS: Family = (
    "rafsd_error_replies",
    "Error replies, by error number",
    Kind::Counter,
);
const BYTES_READ: Family = (
    "rafsd_read_bytes",
    "Bytes sent to the guest by READ",
    Kind::Counter,
);
const BYTES_WRITTEN: Family = (
    "rafsd_written_bytes",
    "Bytes taken from the guest by WRITE",
    Kind::Counter,
);
const PARKED: Family = (
    "rafsd_parked_requests",
    "Requests that had to wait for data or a lock",
    Kind::Counter,
);
const DEFERRED: Family = (
    "rafsd_deferred_requests",
    "Requests handed to a worker",
    Kind::Counter,
);
const EXPIRED: Family = (
    "rafsd_expired_requests",
    "Requests answered because their deadline passed",
    Kind::Counter,
);
const MALFORMED: Family = (
    "rafsd_malformed_requests",
    "Chains and messages that no driver sends",
    Kind::Counter,
);
const BUGS: Family = (
    "rafsd_bugs",
    "Requests dropped without an answer; 0 in a correct program",
    Kind::Counter,
);
const WAITING: Family = (
    "rafsd_waiting_requests",
    "Requests that wait now, by what they wait for",
    Kind::Gauge,
);
const OLDEST: Family = (
    "rafsd_oldest_waiting_seconds",
    "Age of the oldest request that waits",
    Kind::Gauge,
);
const CHUNKS: Family = ("rafsd_image_chunks", "Chunks of an image, by mount", Kind::Gauge);
const RESIDENT: Family = (
    "rafsd_image_resident_chunks",
    "Chunks of an image that are local, by mount",
    Kind::Gauge,
);
const IN_FLIGHT: Family = (
    "rafsd_image_in_flight_chunks",
    "Chunks of an image on their way, by mount",
    Kind::Gauge,
);
const PREFETCHED: Family = (
    "rafsd_prefetched_bytes",
    "Compressed bytes prefetched, by mount",
    Kind::Counter,
);
const FETCHED: Family = (
    "rafsd_fetched_chunks",
    "Chunks fetched and cached, by source",
    Kind::Counter,
);
const FETCHED_BYTES: Family = (
    "rafsd_fetched_bytes",
    "Their uncompressed bytes, by source",
    Kind::Counter,
);
const VERIFIED: Family = (
    "rafsd_verified_chunks",
    "Chunks whose digest matched: fetched, found in the cache, or held in memory, by source",
    Kind::Counter,
);
const CORRUPT: Family = (
    "rafsd_corrupt_chunks",
    "Fetched chunks that were damaged, by source",
    Kind::Counter,
);
const HELD: Family = (
    "rafsd_held_chunks",
    "Chunks that could not be cached, by source",
    Kind::Counter,
);
const JOINED: Family = (
    "rafsd_joined_fetches",
    "Fetches that joined one under way, by source",
    Kind::Counter,
);
const SOURCE_REQUESTS: Family = (
    "rafsd_source_requests",
    "Range requests made, by source",
    Kind::Counter,
);
const SOURCE_ERRORS: Family = (
    "rafsd_source_errors",
    "Range requests that failed, by source",
    Kind::Counter,
);
const SOURCE_RETRIES: Family = (
    "rafsd_source_retries",
    "Range requests that repeated a failed one, by source",
    Kind::Counter,
);
const SOURCE_BYTES: Family = ("rafsd_source_bytes", "Bytes received, by source", Kind::Counter);
const SOURCE_DURATION: Family = (
    "rafsd_source_duration_seconds",
    "Time of range requests, by source",
    Kind::Histogram,
);
const SOURCE_IN_FLIGHT: Family = (
    "rafsd_source_in_flight_requests",
    "Range requests under way, by source",
    Kind::Gauge,
);
const SOURCE_TOKENS: Family = (
    "rafsd_source_token_refreshes",
    "Tokens asked for, by source",
    Kind::Counter,
);
const SOURCE_FAILURES: Family = (
    "rafsd_source_failures_in_a_row",
    "Range requests that failed since the last one that went well, by source; 0: healthy",
    Kind::Gauge,
);

/// Everything, in the order in which it is written.
#[cfg(test)]
const FAMILIES: [Family; 35] = [
    INFO,
    UPTIME,
    DRAINING,
    MOUNTS,
    REQUESTS,
    DURATION,
    RECEIVED,
    ERRORS,
    BYTES_READ,
    BYTES_WRITTEN,
    PARKED,
    DEFERRED,
    EXPIRED,
    MALFORMED,
    BUGS,
    WAITING,
    OLDEST,
    CHUNKS,
    RESIDENT,
    IN_FLIGHT,
    PREFETCHED,
    FETCHED,
    FETCHED_BYTES,
    VERIFIED,
    CORRUPT,
    HELD,
    JOINED,
    SOURCE_REQUESTS,
    SOURCE_ERRORS,
    SOURCE_RETRIES,
    SOURCE_BYTES,
    SOURCE_DURATION,
    SOURCE_IN_FLIGHT,
    SOURCE_TOKENS,
    SOURCE_FAILURES,
];

/// Upper bounds of the classes of a source's latencies, seconds; the last one has none.
const SOURCE_BOUNDS: [f64; 8] = [0.001, 0.02, 0.05, 0.1, 0.5, 1.0, 2.0, f64::INFINITY];

/// The counters of `control` at this moment.
pub(super) fn text(control: &DaemonControl) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape::of(control)));
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

/// A source: host or path, type.
type SourceName = (String, &'static str);

/// All counters at one moment.
#[derive(Debug, Default)]
struct Scrape {
    version: [(&'static str, String); 2],
    uptime: f64,
    draining: bool,
    kinds: BTreeMap<&'static str, u64>,
    mounts: Vec<(String, MountSnapshot)>,
    device: Snapshot,
    waiting: BTreeMap<&'static str, u64>,
    oldest: f64,
    images: Vec<Image>,
    sources: BTreeMap<SourceName, (SourceMetrics, BlobMetrics)>,
}

#[derive(Debug)]
struct Image {
    mountpoint: String,
    chunks: u64,
    resident: u64,
    in_flight: u64,
    prefetched: u64,
}

impl Scrape {
    fn of(control: &DaemonControl) -> Self {
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
                crate::mounts::Instance::Rafs(_) => "image",
                crate::mounts::Instance::Passthrough(_) => "directory",
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

/// One value with its labels.
enum Value {
    Count(u64),
    Level(f64),
    Times {
        total: f64,
        count: u64,
        classes: Vec<(f64, u64)>,
    },
}

type Labels = Vec<(&'static str, String)>;

/// Writes one family.
fn family(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help, kind): Family,
    values: impl IntoIterator<Item = (Labels, Value)>,
) -> Result<(), Error> {
    let kind = match kind {
        Kind::Counter => MetricType::Counter,
        Kind::Gauge => MetricType::Gauge,
        Kind::Histogram => MetricType::Histogram,
    };
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in values {
        if labels.is_empty() {
            write(&mut family, value)?;
        } else {
            write(&mut family.encode_family(&labels)?, value)?;
        }
    }
    Ok(())
}

fn write(metric: &mut MetricEncoder<'_>, value: Value) -> Result<(), Error> {
    match value {
        Value::Count(count) => metric.encode_counter::<NoLabelSet, u64, u64>(&count, None),
        Value::Level(level) => metric.encode_gauge(&level),
        Value::Times {
            total,
            count,
            classes,
        } => metric.encode_histogram::<NoLabelSet>(total, count, &classes, None),
    }
}

fn count(count: u64) -> [(Labels, Value); 1] {
    [(Labels::new(), Value::Count(count))]
}

fn level(level: f64) -> [(Labels, Value); 1] {
    [(Labels::new(), Value::Level(level))]
}

fn times(latencies: &Latencies) -> Value {
    let seconds = |class| Latencies::bound(class).map_or(f64::INFINITY, |micros| micros as f64 / 1e6);
    let classes = latencies.classes.iter().enumerate();
    Value::Times {
        total: latencies.total.as_secs_f64(),
        count: latencies.count(),
        classes: classes.map(|(class, count)| (seconds(class), *count)).collect(),
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let encoder = &mut encoder;
        family(encoder, INFO, [(self.version.to_vec(), Value::Level(1.0))])?;
        family(encoder, UPTIME, level(self.uptime))?;
        family(encoder, DRAINING, level(f64::from(u8::from(self.draining))))?;
        let kinds = self.kinds.iter();
        family(
            encoder,
            MOUNTS,
            kinds.map(|(kind, n)| (vec![("kind", (*kind).to_owned())], Value::Level(*n as f64))),
        )?;
        self.encode_mounts(encoder)?;
        self.encode_device(encoder)?;
        self.encode_images(encoder)?;
        self.encode_sources(encoder)
    }
}

impl Scrape {
    fn encode_mounts(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let requests = self.mounts.iter().flat_map(|(path, counted)| {
            counted.requests.iter().map(|(operation, count)| {
                let labels = vec![
                    ("mountpoint", path.clone()),
                    ("operation", (*operation).to_owned()),
                ];
                (labels, Value::Count(*count))
            })
        });
        family(encoder, REQUESTS, requests)?;
        let durations = self.mounts.iter().flat_map(|(path, counted)| {
            Work::ALL
                .into_iter()
                .zip(&counted.latencies)
                .map(|(work, latencies)| {
                    let labels = vec![("mountpoint", path.clone()), ("work", work.name().to_owned())];
                    (labels, times(latencies))
                })
        });
        family(encoder, DURATION, durations)
    }

    fn encode_device(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let device = &self.device;
        let received = device.requests.iter();
        family(
            encoder,
            RECEIVED,
            received.map(|(operation, count)| {
                (vec![("operation", (*operation).to_owned())], Value::Count(*count))
            }),
        )?;
        let errors = device.errors.iter();
        family(
            encoder,
            ERRORS,
            errors.map(|(errno, count)| (vec![("errno", errno.to_string())], Value::Count(*count))),
        )?;
        for (of, value) in [
            (BYTES_READ, device.bytes_read),
            (BYTES_WRITTEN, device.bytes_written),
            (PARKED, device.parked),
            (DEFERRED, device.deferred),
            (EXPIRED, device.expired),
            (MALFORMED, device.malformed),
            (BUGS, device.bugs),
        ] {
            family(encoder, of, count(value))?;
        }
        let waiting = self.waiting.iter();
        family(
            encoder,
            WAITING,
            waiting.map(|(stage, n)| (vec![("waits_for", (*stage).to_owned())], Value::Level(*n as f64))),
        )?;
        family(encoder, OLDEST, level(self.oldest))
    }

    fn encode_images(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let labels = |image: &Image| vec![("mountpoint", image.mountpoint.clone())];
        for (of, value) in [
            (CHUNKS, (|image| image.chunks) as fn(&Image) -> u64),
            (RESIDENT, |image| image.resident),
            (IN_FLIGHT, |image| image.in_flight),
        ] {
            let values = self.images.iter();
            family(
                encoder,
                of,
                values.map(|image| (labels(image), Value::Level(value(image) as f64))),
            )?;
        }
        let values = self.images.iter();
        family(
            encoder,
            PREFETCHED,
            values.map(|image| (labels(image), Value::Count(image.prefetched))),
        )
    }

    fn encode_sources(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        type Counter = fn(&SourceMetrics, &BlobMetrics) -> u64;
        let labels = |(host, kind): &SourceName| vec![("source", host.clone()), ("type", (*kind).to_owned())];
        let mut counters = |of: Family, value: Counter| {
            let values = self.sources.iter();
            family(
                encoder,
                of,
                values.map(|(name, (source, blobs))| (labels(name), Value::Count(value(source, blobs)))),
            )
        };
        counters(FETCHED, |_, blobs| blobs.fetched)?;
        counters(FETCHED_BYTES, |_, blobs| blobs.fetched_bytes)?;
        counters(VERIFIED, |_, blobs| blobs.fetched + blobs.recalled + blobs.held)?;
        counters(CORRUPT, |_, blobs| blobs.damaged)?;
        counters(HELD, |_, blobs| blobs.held)?;
        counters(JOINED, |_, blobs| blobs.joined)?;
        counters(SOURCE_REQUESTS, |source, _| source.requests)?;
        counters(SOURCE_ERRORS, |source, _| source.errors)?;
        counters(SOURCE_RETRIES, |source, _| source.retries)?;
        counters(SOURCE_BYTES, |source, _| source.bytes)?;
        let values = self.sources.iter();
        family(
            encoder,
            SOURCE_DURATION,
            values.map(|(name, (source, _))| {
                let classes = SOURCE_BOUNDS.into_iter().zip(source.by_latency);
                let value = Value::Times {
                    total: source.latency.as_secs_f64(),
                    count: source.by_latency.iter().sum(),
                    classes: classes.collect(),
                };
                (labels(name), value)
            }),
        )?;
        let values = self.sources.iter();
        family(
            encoder,
            SOURCE_IN_FLIGHT,
            values.map(|(name, (source, _))| (labels(name), Value::Level(source.in_flight as f64))),
        )?;
        let values = self.sources.iter();
        family(
            encoder,
            SOURCE_TOKENS,
            values.map(|(name, (source, _))| (labels(name), Value::Count(source.token_requests))),
        )?;
        let values = self.sources.iter();
        family(
            encoder,
            SOURCE_FAILURES,
            values.map(|(name, (source, _))| (labels(name), Value::Level(source.failures_in_a_row as f64))),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written for an empty daemon: every family with its description.
    fn empty() -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Scrape::default()));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn every_family_is_written_in_order() {
        let text = empty();
        let written: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next())
            .collect();
        assert_eq!(written, FAMILIES.map(|(name, ..)| name));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn the_documentation_lists_every_metric() {
        let text = include_str!("../../docs/metrics.md");
        let documented: Vec<(&str, &str)> = text
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| `rafsd_")?.split('|').map(str::trim);
                Some((cells.next()?.trim_end_matches('`'), cells.next()?))
            })
            .collect();
        let families = FAMILIES.map(|(name, _, kind)| {
            let name = name.strip_prefix("rafsd_").unwrap();
            match kind {
                Kind::Counter => (format!("{name}_total"), "counter"),
                Kind::Gauge => (name.to_owned(), "gauge"),
                Kind::Histogram => (name.to_owned(), "histogram"),
            }
        });
        let families: Vec<(&str, &str)> = families
            .iter()
            .map(|(name, kind)| (name.as_str(), *kind))
            .collect();
        assert_eq!(documented, families);
    }
}
