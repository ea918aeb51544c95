//! Values in their families.

use std::fmt::Error;

use backend::metrics::{BlobMetrics, CacheMetrics, SourceMetrics};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::families::*;
use super::gather::{Image, Scrape, SourceName};
use crate::metrics::{Latencies, Work};

/// Upper bounds of the classes of a source's latencies, seconds; the last one has none.
const SOURCE_BOUNDS: [f64; 8] = [0.001, 0.02, 0.05, 0.1, 0.5, 1.0, 2.0, f64::INFINITY];

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
        self.encode_caches(encoder)?;
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

    fn encode_caches(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut each = |of: Family, value: fn(&CacheMetrics, u64) -> Value| {
            let values = self.caches.iter();
            family(
                encoder,
                of,
                values.map(|(directory, (cache, quota))| {
                    (vec![("directory", directory.clone())], value(cache, *quota))
                }),
            )
        };
        each(CACHE_USED, |cache, _| Value::Level(cache.used as f64))?;
        each(CACHE_QUOTA, |_, quota| Value::Level(quota as f64))?;
        each(EVICTED, |cache, _| Value::Count(cache.evicted_chunks))?;
        each(EVICTED_BYTES, |cache, _| Value::Count(cache.evicted_bytes))
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
