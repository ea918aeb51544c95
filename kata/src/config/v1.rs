//! Generation 1: what the snapshotter writes and the runtime forwards. JSON only, and only read.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::backend::{Backend, ExternalBackend};
use super::read::{read, unknown_keys};
use super::{Cache, Config, ConfigError, FileCache, FsCache, Prefetch, Rafs, check};

#[derive(Deserialize, Serialize)]
pub(super) struct Document {
    device: Device,
    mode: String,
    #[serde(default)]
    digest_validate: bool,
    #[serde(default)]
    iostats_files: bool,
    #[serde(default)]
    enable_xattr: bool,
    #[serde(default)]
    access_pattern: bool,
    #[serde(default)]
    latest_read_files: bool,
    #[serde(default = "one_mib")]
    amplify_io: u64,
    #[serde(default)]
    fs_prefetch: Option<FsPrefetch>,
    #[serde(default)]
    trace: String,
}

#[derive(Deserialize, Serialize)]
struct Device {
    #[serde(default)]
    id: String,
    backend: Source,
    #[serde(default)]
    external_backends: Vec<ExternalBackend>,
    #[serde(default)]
    cache: DeviceCache,
}

#[derive(Deserialize, Serialize)]
struct Source {
    #[serde(rename = "type")]
    kind: String,
    config: Value,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
struct DeviceCache {
    #[serde(rename = "type")]
    kind: String,
    compressed: bool,
    validate: bool,
    config: Option<Value>,
}

#[derive(Deserialize, Serialize)]
#[serde(default)]
struct FsPrefetch {
    enable: bool,
    threads_count: u64,
    merging_size: u64,
    bandwidth_rate: u64,
    prefetch_all: bool,
    stream_prefetch: bool,
    idle_pause: u64,
}

impl Default for FsPrefetch {
    fn default() -> Self {
        Self {
            enable: false,
            threads_count: 8,
            merging_size: one_mib(),
            bandwidth_rate: 0,
            prefetch_all: true,
            stream_prefetch: false,
            idle_pause: 60,
        }
    }
}

fn one_mib() -> u64 {
    1 << 20
}

/// Names of the fields that the checks of the generations share, as generation 1 has them.
pub(super) const NAMES: super::Names = super::Names {
    backend: "device.backend.config",
    cache_type: "device.cache.type",
    filecache: "device.cache.config",
    fscache: "device.cache.config",
    mode: "mode",
    batch_size: "amplify_io",
    cache_prefetch: ["fs_prefetch.threads_count", "fs_prefetch.merging_size"],
    rafs_prefetch: ["fs_prefetch.threads_count", "fs_prefetch.merging_size"],
};

/// Reads and converts a document; paths of keys that mean nothing here go to `unknown`.
pub(super) fn read_document(value: Value, unknown: &mut Vec<String>) -> Result<Config, ConfigError> {
    let document: Document = read(value.clone(), "")?;
    let known = serde_json::to_value(&document).unwrap_or_default();
    unknown_keys(&value, &known, "", unknown);

    let source = document.device.backend;
    if source.kind == "http-proxy" {
        check::refuse(
            "device.backend.type",
            source.kind.as_str(),
            "a source that generation 1 knows: localfs, localdisk, oss, s3 or registry (http-proxy needs a configuration with \"version\": 2)",
        )?;
    }
    let backend = Backend::read(
        &source.kind,
        "device.backend.type",
        source.config.clone(),
        NAMES.backend,
    )?;
    let written = serde_json::to_value(&backend).unwrap_or_default();
    unknown_keys(
        &source.config,
        written.get(backend.type_name()).unwrap_or(&Value::Null),
        NAMES.backend,
        unknown,
    );

    let prefetch = match document.fs_prefetch {
        Some(p) => Prefetch {
            enable: p.enable,
            threads: p.threads_count,
            batch_size: p.merging_size,
            bandwidth_limit: p.bandwidth_rate,
            prefetch_all: p.prefetch_all,
            stream_prefetch: p.stream_prefetch,
            idle_pause: p.idle_pause,
        },
        None => Prefetch::default(),
    };
    let cache = document.device.cache;
    let mut file_cache = None;
    let mut fs_cache = None;
    match cache.kind.as_str() {
        "blobcache" | "filecache" => {
            let Some(object) = cache.config else {
                return Err(ConfigError::Field {
                    field: NAMES.filecache.to_owned(),
                    reason: format!("missing, but needed by cache type {}; {{}} is enough", cache.kind),
                });
            };
            let typed: FileCache = read(object.clone(), NAMES.filecache)?;
            let known = serde_json::to_value(&typed).unwrap_or_default();
            unknown_keys(&object, &known, NAMES.filecache, unknown);
            file_cache = Some(typed);
        }
        "fscache" => fs_cache = Some(read::<FsCache>(cache.config.unwrap_or_default(), NAMES.fscache)?),
        _ => {}
    }
    Ok(Config {
        version: 2,
        id: document.device.id,
        backend: Some(backend),
        external_backends: document.device.external_backends,
        cache: Some(Cache {
            kind: cache.kind,
            compressed: cache.compressed,
            validate: cache.validate,
            prefetch: prefetch.clone(),
            filecache: file_cache,
            fscache: fs_cache,
        }),
        rafs: Some(Rafs {
            mode: document.mode,
            batch_size: document.amplify_io,
            validate: document.digest_validate,
            enable_xattr: document.enable_xattr,
            iostats_files: document.iostats_files,
            access_pattern: document.access_pattern,
            latest_read_files: document.latest_read_files,
            prefetch,
            trace: document.trace,
        }),
        overlay: None,
    })
}
