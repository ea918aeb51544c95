//! What of an image is fetched before a guest asks for it: the image's own list, then the files that the runtime
//! names, then everything, as far as the configuration wants that.

use std::collections::HashSet;
use std::sync::{Arc, Weak};

use backend::store::{Prefetch, PrefetchOptions, PrefetchProgress, Store, Wish};
use kata::config::Config;
use parking_lot::Mutex;
use rafs::fs::RafsFs;

/// Fetches at a time at most, whatever the configuration says; demand needs room, too.
const MAX_PARALLEL: u64 = 64;

/// The prefetch of one mount. It stops when the last reference goes, that is with the mount.
#[derive(Default)]
pub(super) struct Prefetching {
    /// None while the list is being made, and for ever if nothing is wanted.
    running: Mutex<Option<Prefetch>>,
}

impl Prefetching {
    /// How far it is, if it has begun.
    pub fn progress(&self) -> Option<PrefetchProgress> {
        self.running.lock().as_ref().map(Prefetch::progress)
    }
}

/// Begins to prefetch as `config` says. Walking a large image takes its time, and a mount does not wait for it.
pub(super) fn start(
    store: &Arc<Store>,
    image: &Arc<RafsFs>,
    config: &Config,
    files: Vec<String>,
) -> Arc<Prefetching> {
    let prefetching = Arc::new(Prefetching::default());
    let by_file = config
        .rafs
        .as_ref()
        .map(|rafs| &rafs.prefetch)
        .filter(|prefetch| prefetch.enable);
    let by_blob = config
        .cache
        .as_ref()
        .map(|cache| &cache.prefetch)
        .filter(|prefetch| prefetch.enable);
    let Some(settings) = by_file.or(by_blob) else {
        return prefetching;
    };
    let options = PrefetchOptions {
        parallel: usize::try_from(settings.threads.clamp(1, MAX_PARALLEL)).unwrap_or(1),
        size: u32::try_from(settings.batch_size).unwrap_or(u32::MAX).max(1),
        bandwidth: settings.bandwidth_limit,
    };
    let everything = [by_file, by_blob]
        .into_iter()
        .flatten()
        .any(|prefetch| prefetch.prefetch_all);
    let listed = by_file.is_some();
    let (store, image, slot) = (
        Arc::clone(store),
        Arc::downgrade(image),
        Arc::downgrade(&prefetching),
    );
    let plan = move || run(&store, &image, &slot, options, &files, listed, everything);
    if let Err(error) = std::thread::Builder::new()
        .name("prefetch-plan".into())
        .spawn(plan)
    {
        tracing::warn!("prefetch: cannot start a thread: {error}");
    }
    prefetching
}

fn run(
    store: &Store,
    image: &Weak<RafsFs>,
    slot: &Weak<Prefetching>,
    options: PrefetchOptions,
    files: &[String],
    listed: bool,
    everything: bool,
) {
    // Gone already: the mount was short.
    let Some(image) = image.upgrade() else { return };
    let mut wishes = if listed {
        wanted_files(&image, files)
    } else {
        Vec::new()
    };
    if everything {
        wishes.extend(image.blobs().iter().map(|blob| Wish {
            blob: Arc::clone(blob),
            chunks: None,
        }));
    }
    drop(image);
    if wishes.is_empty() {
        return;
    }
    if let Some(slot) = slot.upgrade() {
        *slot.running.lock() = Some(store.prefetch(wishes, options));
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
                    chunks: Some(chunks), ..
                }) if last_blob == Some(chunk.blob) => chunks.push(chunk.index),
                _ => wishes.push(Wish {
                    blob: Arc::clone(blob),
                    chunks: Some(vec![chunk.index]),
                }),
            }
            last_blob = Some(chunk.blob);
        }
    }
    wishes
}
