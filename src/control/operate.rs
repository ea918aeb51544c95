//! Fulfils [`kata::control::operate::Operate`]: what operators ask.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use backend::store::{Blob, Paused};
use kata::control::Control;
use kata::control::ControlError;
use kata::control::operate::{
    AccessTrace, AwaitedData, BlobStatus, CachePolicy, DeviceCounters, DrainRequest, Drained, Histogram,
    ImageStatus, LatencyClass, LimitStatus, LiveRequest, MountLatencies, MountStatus, Operate, Overview,
    PrefetchStatus, QuotaStatus, Residency,
};
use passthrough::PassthroughFs;
use rafs::fs::RafsFs;

use super::instance::Kind;
use super::table::{Mounted, MountedImage};
use super::{DaemonControl, exposition, mountpoint_of, trace};
use crate::metrics::{Latencies, Snapshot, Work};
use crate::mounts::Instance;
use crate::virtio::{Requests, Stage, Waiting};

/// How often a drain looks whether requests still wait.
const LOOK: Duration = Duration::from_millis(5);

impl Operate for DaemonControl {
    fn overview(&self) -> Overview {
        Overview {
            version: self.version(),
            pid: std::process::id(),
            uptime_ms: millis(self.started.elapsed()),
            state: self.state(),
            draining: self.draining.load(Ordering::SeqCst),
            log_level: self.log.level(),
            mounts: self.mounts.list().len(),
            waiting: self.waiting().len(),
            device: device_counters(self.device()),
        }
    }

    fn mount_status(&self, mountpoint: Option<&str>) -> Result<Vec<MountStatus>, ControlError> {
        let waiting = self.waiting();
        let answered: BTreeMap<String, u64> = self
            .mounts
            .list()
            .into_iter()
            .map(|mount| {
                let requests = mount.metrics.snapshot().requests;
                (mount.path, requests.iter().map(|(_, count)| count).sum())
            })
            .collect();
        let all = self.table.status(|path, mounted, changing| {
            let image = mounted.image.as_ref();
            let directory = mounted.directory.upgrade();
            let options = directory.as_ref().map(|tree| tree.options());
            MountStatus {
                mountpoint: path.to_owned(),
                kind: match mounted.kind {
                    Kind::Image => "image".to_owned(),
                    Kind::Directory => "directory".to_owned(),
                },
                source: mounted.source.clone(),
                since: mounted.since.for_json(),
                state: if changing { "changing" } else { "serving" }.to_owned(),
                read_only: options.is_none_or(|options| options.read_only),
                cache: match options {
                    None => CachePolicy {
                        policy: "always".to_owned(),
                        metadata_ms: None,
                        data: true,
                    },
                    Some(options) => cache_policy(options.cache),
                },
                waiting: waiting
                    .iter()
                    .filter(|waiting| waiting.mountpoint == path)
                    .count(),
                requests: answered.get(path).copied().unwrap_or_default(),
                quota: directory.as_deref().and_then(quota_status),
                image: image.map(image_status),
            }
        });
        one_or_all(mountpoint, all, |status| &status.mountpoint)
    }

    fn live_requests(&self) -> Vec<LiveRequest> {
        let waiting = self.waiting();
        let images = self.images();
        let paths = self.paths_of(&waiting, &images);
        let live = |waiting: &Waiting| LiveRequest {
            unique: waiting.unique,
            operation: waiting.operation.to_owned(),
            opcode: waiting.opcode,
            mountpoint: waiting.mountpoint.clone(),
            path: paths.get(&(waiting.mountpoint.as_str(), waiting.local)).cloned(),
            inode: waiting.local,
            offset: waiting.read.map(|read| read.offset),
            size: waiting.read.map(|read| read.size),
            age_ms: millis(waiting.since.elapsed()),
            deadline_ms: waiting
                .deadline
                .map(|deadline| millis(deadline.saturating_duration_since(Instant::now()))),
            waits_for: stage(waiting.stage).to_owned(),
            data: images
                .get(&waiting.mountpoint)
                .filter(|_| waiting.stage == Stage::Data)
                .and_then(|image| awaited(image, waiting)),
        };
        waiting.iter().map(live).collect()
    }

    fn latencies(&self, mountpoint: Option<&str>) -> Result<Vec<MountLatencies>, ControlError> {
        let latencies = |mount: crate::mounts::MountInfo| {
            let latencies = mount.metrics.snapshot().latencies;
            let named = Work::ALL.into_iter().zip(&latencies);
            MountLatencies {
                mountpoint: mount.path,
                by_work: named
                    .map(|(work, latencies)| (work.name().to_owned(), histogram(latencies)))
                    .collect(),
            }
        };
        let all = self.mounts.list().into_iter().map(latencies).collect();
        one_or_all(mountpoint, all, |latencies| &latencies.mountpoint)
    }

    fn residency(&self, mountpoint: &str, path: &str) -> Result<Residency, ControlError> {
        let mountpoint = mountpoint_of(mountpoint)?;
        let image = self
            .images()
            .remove(&mountpoint)
            .and_then(|image| image.instance.upgrade());
        let image = image.ok_or_else(|| not_found(format!("no image is mounted at {mountpoint}")))?;
        let damaged =
            |error: rafs::error::Damaged| ControlError::failed(format!("{mountpoint}: {path}: {error}"));
        let reader = image.reader();
        let inode = reader
            .at_path(path.as_bytes())
            .map_err(damaged)?
            .ok_or_else(|| not_found(format!("the image at {mountpoint} has no {path}")))?;
        if inode.kind != rafs::inode::Kind::File {
            return Err(ControlError::bad_request(format!(
                "{mountpoint}: {path} is no regular file"
            )));
        }
        let chunks = reader.chunks(&inode).map_err(damaged)?;
        let resident = |chunk: &rafs::reader::FileChunk| {
            image
                .blobs()
                .get(chunk.blob)
                .is_some_and(|blob| blob.is_resident(chunk.index))
        };
        let mut ranges: Vec<[usize; 2]> = Vec::new();
        let mut count = 0;
        for (position, _) in chunks.iter().enumerate().filter(|(_, chunk)| resident(chunk)) {
            count += 1;
            match ranges.last_mut() {
                Some([_, last]) if *last + 1 == position => *last = position,
                _ => ranges.push([position, position]),
            }
        }
        Ok(Residency {
            mountpoint,
            path: path.to_owned(),
            inode: inode.id,
            size: inode.size,
            chunks: chunks.len(),
            resident: count,
            ranges,
        })
    }

    fn start_trace(&self, mountpoint: &str) -> Result<(), ControlError> {
        let (mountpoint, image) = self.traceable(mountpoint)?;
        image.start_trace();
        tracing::info!("{mountpoint}: recording an access trace");
        Ok(())
    }

    fn stop_trace(&self, mountpoint: &str) -> Result<(), ControlError> {
        let (mountpoint, image) = self.traceable(mountpoint)?;
        image.stop_trace();
        tracing::info!("{mountpoint}: no longer recording an access trace");
        let trace = image.trace();
        if trace.chunks() == 0 {
            return Ok(());
        }
        let Some(mounted) = self.images().remove(&mountpoint) else {
            return Ok(());
        };
        match trace::keep(&mounted.config, Path::new(&mounted.bootstrap), &trace) {
            Ok(path) => tracing::info!("{mountpoint}: the next mount will replay {}", path.display()),
            Err(error) => tracing::warn!("{mountpoint}: the access trace cannot be kept: {error}"),
        }
        Ok(())
    }

    fn trace(&self, mountpoint: &str) -> Result<AccessTrace, ControlError> {
        let (mountpoint, image) = self.traceable(mountpoint)?;
        let trace = image.trace();
        Ok(AccessTrace {
            mountpoint,
            recording: image.tracing(),
            chunks: trace.chunks(),
            trace: trace.to_string(),
        })
    }

    fn drain(&self, request: DrainRequest) -> Drained {
        self.draining.store(true, Ordering::SeqCst);
        tracing::info!("draining: new mounts are refused");
        let deadline = Instant::now() + Duration::from_millis(request.timeout_ms);
        loop {
            let waiting = self.waiting().len();
            if waiting == 0 || Instant::now() >= deadline {
                return Drained {
                    drained: waiting == 0,
                    waiting,
                };
            }
            std::thread::sleep(LOOK);
        }
    }

    fn undrain(&self) {
        if self.draining.swap(false, Ordering::SeqCst) {
            tracing::info!("no longer draining: mounts are taken again");
        }
    }

    fn exposition(&self) -> String {
        exposition::text(self)
    }
}

impl DaemonControl {
    /// Requests that wait.
    pub(super) fn waiting(&self) -> Vec<Waiting> {
        self.requests.get().map(Requests::list).unwrap_or_default()
    }

    /// What the device has counted.
    pub(super) fn device(&self) -> Snapshot {
        self.requests.get().map(Requests::metrics).unwrap_or_default()
    }

    /// Where the files are that requests wait for, by mountpoint and local id. Images are searched for them; of directories the
    /// host's kernel is asked.
    fn paths_of<'a>(
        &self,
        waiting: &'a [Waiting],
        images: &BTreeMap<String, MountedImage>,
    ) -> BTreeMap<(&'a str, u64), String> {
        let mut wanted: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
        for waiting in waiting {
            wanted
                .entry(&waiting.mountpoint)
                .or_default()
                .insert(waiting.local);
        }
        let mut paths = BTreeMap::new();
        for mount in self.mounts.list() {
            let Some((mountpoint, ids)) = wanted.get_key_value(mount.path.as_str()) else {
                continue;
            };
            let found = match (mount.instance, images.get(&mount.path)) {
                (Instance::Passthrough(host), _) => ids
                    .iter()
                    .filter_map(|id| Some((*id, host.path_of(*id)?.to_string_lossy().into_owned())))
                    .collect(),
                (Instance::Rafs(_), Some(image)) => match image.instance.upgrade() {
                    Some(instance) => image.paths.find(instance.reader(), ids),
                    None => continue,
                },
                (Instance::Rafs(_), None) => continue,
            };
            paths.extend(found.into_iter().map(|(id, path)| ((*mountpoint, id), path)));
        }
        paths
    }

    /// The image at `mountpoint`, whose accesses can be recorded, and its path.
    fn traceable(&self, mountpoint: &str) -> Result<(String, Arc<RafsFs>), ControlError> {
        let mountpoint = mountpoint_of(mountpoint)?;
        let mounts = self
            .table
            .all(|_, mounted: &Mounted| mounted.image.as_ref().map(|image| image.instance.upgrade()));
        match mounts.into_iter().find(|(path, _)| *path == mountpoint) {
            Some((_, Some(Some(image)))) => Ok((mountpoint, image)),
            Some((_, None)) => Err(ControlError::bad_request(format!(
                "a directory is mounted at {mountpoint}; only images have access traces"
            ))),
            // Its last reference went just now.
            Some((_, Some(None))) | None => Err(not_found(format!("nothing is mounted at {mountpoint}"))),
        }
    }

    /// Images by mountpoint.
    pub(super) fn images(&self) -> BTreeMap<String, MountedImage> {
        self.table
            .all(|_, mounted: &Mounted| mounted.image.clone())
            .into_iter()
            .filter_map(|(path, image)| Some((path, image?)))
            .collect()
    }
}

fn one_or_all<T>(
    wanted: Option<&str>,
    all: Vec<T>,
    name: impl Fn(&T) -> &str,
) -> Result<Vec<T>, ControlError> {
    let Some(wanted) = wanted else { return Ok(all) };
    let path = mountpoint_of(wanted)?;
    let found: Vec<T> = all.into_iter().filter(|one| name(one) == path).collect();
    if found.is_empty() {
        return Err(not_found(format!("nothing is mounted at {path}")));
    }
    Ok(found)
}

fn not_found(message: String) -> ControlError {
    ControlError { status: 404, message }
}

pub(super) fn stage(stage: Stage) -> &'static str {
    match stage {
        Stage::Data => "data",
        Stage::Lock => "lock",
        Stage::Worker => "worker",
        Stage::Thread => "thread",
        Stage::Driver => "driver",
    }
}

fn device_counters(counted: Snapshot) -> DeviceCounters {
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
fn cache_policy(policy: passthrough::CachePolicy) -> CachePolicy {
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
fn quota_status(tree: &PassthroughFs) -> Option<QuotaStatus> {
    let (used, limits) = (tree.quota_usage()?, tree.options().quota);
    let status = |used, limit| LimitStatus { used, limit };
    Some(QuotaStatus {
        bytes: status(used.bytes, limits.bytes),
        inodes: status(used.inodes, limits.inodes),
    })
}

fn image_status(image: &MountedImage) -> ImageStatus {
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
fn awaited(image: &MountedImage, waiting: &Waiting) -> Option<AwaitedData> {
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

fn histogram(latencies: &Latencies) -> Histogram {
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

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
