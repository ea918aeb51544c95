//! What of an image is fetched before a guest asks for it: a recorded start, then the image's own list, then the files that the runtime
//! names, then everything, as far as the configuration wants that.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use backend::store::{Idle, Prefetch, PrefetchOptions, PrefetchProgress, Store, Wanted, Wish};
use kata::config::Config;
use parking_lot::Mutex;
use rafs::fs::RafsFs;

use super::counters::Counters;
use super::trace;

/// Fetches at a time at most, whatever the configuration says; demand needs room, too.
const MAX_PARALLEL: u64 = 64;

/// The prefetch of one mount. It stops when the last reference goes, that is with the mount.
#[derive(Default)]
pub(super) struct Prefetching {
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    /// Of a recorded start, from the mount on; of everything else, once the list is made.
    parts: Vec<Prefetch>,
    /// A list is being made.
    planning: bool,
}

impl Prefetching {
    /// How far it is, if it has begun.
    pub fn progress(&self) -> Option<PrefetchProgress> {
        let running = self.running.lock();
        let all = running.parts.iter().map(Prefetch::progress).reduce(together)?;
        Some(PrefetchProgress {
            ended: all.ended.filter(|_| !running.planning),
            ..all
        })
    }
}

fn together(a: PrefetchProgress, b: PrefetchProgress) -> PrefetchProgress {
    PrefetchProgress {
        chunks: a.chunks + b.chunks,
        bytes: a.bytes + b.bytes,
        fetches: a.fetches + b.fetches,
        failures: a.failures + b.failures,
        busy: a.busy + b.busy,
        began: a.began.min(b.began),
        ended: a.ended.zip(b.ended).map(|(a, b)| a.max(b)),
        paused: a.paused.or(b.paused),
    }
}

/// What a mount request says, as far as it matters here.
pub(super) struct Request<'a> {
    pub config: &'a Config,
    pub bootstrap: &'a Path,
    /// Files that the runtime names.
    pub files: Vec<String>,
    /// Of the mount: what its container does.
    pub counters: &'a Arc<Counters>,
}

/// Begins to prefetch as the request says. A recorded start is on its way when this returns. Walking a large image takes its
/// time, and a mount does not wait for it.
pub(super) fn start(store: &Arc<Store>, image: &Arc<RafsFs>, request: Request<'_>) -> Arc<Prefetching> {
    let config = request.config;
    let prefetching = Arc::new(Prefetching::default());
    let by_file = config.rafs.as_ref().map(|rafs| &rafs.prefetch);
    let by_blob = config.cache.as_ref().map(|cache| &cache.prefetch);
    let enabled: Vec<&kata::config::Prefetch> = [by_file, by_blob]
        .into_iter()
        .flatten()
        .filter(|prefetch| prefetch.enable)
        .collect();
    let settings = enabled.first().copied().cloned().unwrap_or_default();
    let options = PrefetchOptions {
        parallel: usize::try_from(settings.threads.clamp(1, MAX_PARALLEL)).unwrap_or(1),
        size: u32::try_from(settings.batch_size).unwrap_or(u32::MAX).max(1),
        bandwidth: settings.bandwidth_limit,
        idle: idle(request.counters, &settings),
    };
    if let Some(trace) = trace::of_mount(config, request.bootstrap) {
        let replay = store.prefetch(trace.wishes(image), options.clone());
        prefetching.running.lock().parts.push(replay);
    }
    if enabled.is_empty() {
        return prefetching;
    }
    let wanted = Rest {
        files: by_file
            .is_some_and(|prefetch| prefetch.enable)
            .then_some(request.files),
        everything: enabled.iter().any(|prefetch| prefetch.prefetch_all),
    };
    prefetching.running.lock().planning = true;
    let (store, image, slot) = (
        Arc::clone(store),
        Arc::downgrade(image),
        Arc::downgrade(&prefetching),
    );
    let plan = move || run(&store, &image, &slot, options, &wanted);
    if let Err(error) = std::thread::Builder::new()
        .name("prefetch-plan".into())
        .spawn(plan)
    {
        tracing::warn!("prefetch: cannot start a thread: {error}");
        prefetching.running.lock().planning = false;
    }
    prefetching
}

fn idle(counters: &Arc<Counters>, settings: &kata::config::Prefetch) -> Option<Idle> {
    let counters = Arc::clone(counters);
    (settings.idle_pause > 0).then(|| Idle {
        requests: Arc::new(move || counters.operations()),
        after: Duration::from_secs(settings.idle_pause),
    })
}

/// What is wanted beside a recorded start.
struct Rest {
    /// The files on the image's own list and these, if files are wanted at all.
    files: Option<Vec<String>>,
    everything: bool,
}

fn run(
    store: &Store,
    image: &Weak<RafsFs>,
    slot: &Weak<Prefetching>,
    options: PrefetchOptions,
    wanted: &Rest,
) {
    // Gone already: the mount was short.
    let Some(image) = image.upgrade() else { return };
    let mut wishes = match &wanted.files {
        Some(files) => wanted_files(&image, files),
        None => Vec::new(),
    };
    if wanted.everything {
        wishes.extend(image.blobs().iter().map(|blob| Wish {
            blob: Arc::clone(blob),
            wanted: Wanted::Whole,
        }));
    }
    drop(image);
    let Some(slot) = slot.upgrade() else { return };
    let mut running = slot.running.lock();
    running.planning = false;
    if !wishes.is_empty() {
        running.parts.push(store.prefetch(wishes, options));
    }
}

/// The chunks of the files on the image's list and on `files`, in that order, each once.
fn wanted_files(image: &RafsFs, files: &[String]) -> Vec<Wish> {
    let reader = image.reader();
    let mut roots = reader.prefetch_table().unwrap_or_else(|error| {
        tracing::warn!("prefetch: the image's own list is damaged: {error}");
        Vec::new()
    });
    for path in files {
        match reader.at_path(path.as_bytes()) {
            Ok(Some(inode)) => roots.push(inode.id),
            // Lists are made for many images; what this one does not have is no error.
            Ok(None) => tracing::debug!("prefetch: the image has no {path}"),
            Err(error) => tracing::warn!("prefetch: {path}: {error}"),
        }
    }
    let mut wishes: Vec<Wish> = Vec::new();
    let mut seen = HashSet::new();
    let mut last_blob = None;
    for file in roots.iter().flat_map(|root| reader.files_below(*root)) {
        let Ok(chunks) = reader.inode(file).and_then(|inode| reader.chunks(&inode)) else {
            continue;
        };
        for chunk in chunks {
            let Some(blob) = image.blobs().get(chunk.blob) else {
                continue;
            };
            if !seen.insert((chunk.blob, chunk.index)) {
                continue;
            }
            match wishes.last_mut() {
                Some(Wish {
                    wanted: Wanted::Listed(chunks),
                    ..
                }) if last_blob == Some(chunk.blob) => chunks.push(chunk.index),
                _ => wishes.push(Wish {
                    blob: Arc::clone(blob),
                    wanted: Wanted::Listed(vec![chunk.index]),
                }),
            }
            last_blob = Some(chunk.blob);
        }
    }
    wishes
}
