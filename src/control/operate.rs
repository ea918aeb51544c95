//! Fulfils [`kata::control::operate::Operate`]: what operators ask.

mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kata::control::Control;
use kata::control::ControlError;
use kata::control::operate::{
    AccessTrace, CachePolicy, DrainRequest, Drained, LiveRequest, MountLatencies, MountStatus, Operate,
    Overview, Residency,
};
use rafs::fs::RafsFs;

pub(super) use self::status::stage;
use self::status::{awaited, cache_policy, device_counters, histogram, image_status, millis, quota_status};
use super::instance::Kind;
use super::table::{Mounted, MountedImage};
use super::{DaemonControl, exposition, mountpoint_of, trace};
use crate::metrics::{Snapshot, Work};
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
