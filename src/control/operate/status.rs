//! States and counters as the API shows them.

use std::sync::Arc;
use std::time::Duration;

use backend::store::{Blob, Paused};
use kata::control::operate::{
    AwaitedData, BlobStatus, CachePolicy, DeviceCounters, Histogram, ImageStatus, LatencyClass, LimitStatus,
    PrefetchStatus, QuotaStatus,
};
use passthrough::PassthroughFs;
use rafs::fs::RafsFs;

use crate::control::table::MountedImage;
use crate::metrics::{Latencies, Snapshot};
use crate::virtio::{Stage, Waiting};

pub(in crate::control) fn stage(stage: Stage) -> &'static str {
    match stage {
        Stage::Data => "data",
        Stage::Lock => "lock",
        Stage::Worker => "worker",
        Stage::Thread => "thread",
        Stage::Driver => "driver",
    }
}

pub(in crate::control) fn device_counters(counted: Snapshot) -> DeviceCounters {
    DeviceCounters {
        requests: counted
            .requests
            .into_iter()
            .map(|(operation, count)| (operation.to_owned(), count))
            .collect(),
        errors: counted.errors.into_iter().collect(),
        bytes_read: counted.bytes_read,
        bytes_written: counted.bytes_written,
        parked: counted.parked,
        expired: counted.expired,
        malformed: counted.malformed,
        bugs: counted.bugs,
    }
}

/// What guests may keep of a directory.
pub(in crate::control) fn cache_policy(policy: passthrough::CachePolicy) -> CachePolicy {
    let name = match policy {
        passthrough::CachePolicy::Never => "never",
        passthrough::CachePolicy::Metadata => "metadata",
        passthrough::CachePolicy::Auto { .. } => "auto",
        passthrough::CachePolicy::Always => "always",
    };
    CachePolicy {
        policy: name.to_owned(),
        metadata_ms: u64::try_from(policy.entry_timeout().as_millis()).ok(),
        data: policy == passthrough::CachePolicy::Always,
    }
}

/// What a directory takes, if that is limited.
pub(in crate::control) fn quota_status(tree: &PassthroughFs) -> Option<QuotaStatus> {
    let (used, limits) = (tree.quota_usage()?, tree.options().quota);
    let status = |used, limit| LimitStatus { used, limit };
    Some(QuotaStatus {
        bytes: status(used.bytes, limits.bytes),
        inodes: status(used.inodes, limits.inodes),
    })
}

pub(in crate::control) fn image_status(image: &MountedImage) -> ImageStatus {
    let instance = image.instance.upgrade();
    let blobs: &[Arc<Blob>] = instance.as_deref().map_or(&[], RafsFs::blobs);
    let first = blobs.first();
    ImageStatus {
        id: image.config.id.clone(),
        source_type: image.source_type().to_owned(),
        source_host: first
            .map(|blob| blob.source_host().to_owned())
            .unwrap_or_default(),
        source_failures: first.map_or(0, |blob| blob.source_metrics().failures_in_a_row),
        cache_dir: image.cache_dir().to_owned(),
        blobs: blobs.iter().map(|blob| blob_status(blob)).collect(),
        prefetch: image.prefetching.progress().map(|progress| PrefetchStatus {
            chunks: progress.chunks,
            bytes: progress.bytes,
            failures: progress.failures,
            ended: progress.ended.is_some(),
            paused: progress.paused.map(|reason| {
                match reason {
                    Paused::Idle => "idle",
                    Paused::Strained => "source",
                }
                .to_owned()
            }),
        }),
    }
}

fn blob_status(blob: &Blob) -> BlobStatus {
    let (description, counted) = (blob.description(), blob.metrics());
    BlobStatus {
        id: description.id.clone(),
        size: description.uncompressed_size,
        chunks: description.chunk_count,
        resident: blob.resident(),
        in_flight: blob.in_flight(),
        fetched: counted.fetched,
        damaged: counted.damaged,
    }
}

/// The data that a read waits for: of the first blob of which something is absent.
pub(in crate::control) fn awaited(image: &MountedImage, waiting: &Waiting) -> Option<AwaitedData> {
    let instance = image.instance.upgrade()?;
    let (read, reader) = (waiting.read?, instance.reader());
    let end = read.offset.saturating_add(read.size.into());
    let inode = reader.inode(read.inode).ok()?;
    let mut chunks = reader.chunks(&inode).ok()?;
    chunks.retain(|chunk| {
        let overlaps =
            chunk.file_offset < end && chunk.file_offset.saturating_add(chunk.size.into()) > read.offset;
        let resident = |blob: &Arc<Blob>| blob.is_resident(chunk.index);
        overlaps && !instance.blobs().get(chunk.blob).is_some_and(resident)
    });
    let position = chunks.first()?.blob;
    let blob = instance.blobs().get(position)?;
    let absent: Vec<u32> = chunks
        .iter()
        .filter(|chunk| chunk.blob == position)
        .map(|chunk| chunk.index)
        .collect();
    Some(AwaitedData {
        image: image.bootstrap.clone(),
        source_type: image.source_type().to_owned(),
        source_host: blob.source_host().to_owned(),
        blob: blob.description().id.clone(),
        last_error: blob.last_error(&absent),
        chunks: absent,
    })
}

pub(in crate::control) fn histogram(latencies: &Latencies) -> Histogram {
    let classes = latencies.classes.iter().enumerate();
    Histogram {
        count: latencies.count(),
        total_us: micros(latencies.total),
        p50_us: micros(latencies.quantile(0.5)),
        p99_us: micros(latencies.quantile(0.99)),
        classes: classes
            .filter(|(_, count)| **count > 0)
            .map(|(class, count)| LatencyClass {
                up_to_us: Latencies::bound(class),
                count: *count,
            })
            .collect(),
    }
}

pub(in crate::control) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
