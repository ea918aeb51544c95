//! Daemon configuration, as clients of the incumbent write it.
//!
//! One text, three places: the file of `--config`, the `config` string of a mount request, and the same
//! string inside the runtime's mount options. Two generations of keys, JSON or TOML; the first that fits
//! wins: JSON of generation 2 (`"version": 2`), TOML of generation 2, JSON of generation 1 (`device` and
//! `mode`). All of it becomes one [`Config`], which is generation 2.
//!
//! Keys that mean nothing here are accepted, for clients send such keys, and are handed back so that they
//! can be reported. A [`Config`] serialises to JSON of generation 2 with every key and **without secrets**.
//!
//! Rooms: [`backend`] (sources of blobs), `v1` (generation 1), `read` (text to typed values), `check` and `error`
//! (refusals), `shown` (values in them), [`secret`].

pub mod backend;
mod check;
mod error;
#[cfg(test)]
mod fields;
mod read;
pub mod secret;
mod shown;
mod v1;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use backend::{Backend, ExternalBackend};
use check::Check;
pub use error::ConfigError;
pub use read::read;
use read::{Syntax, unknown_keys};
pub use secret::{Secret, SecretUrl};

/// Longest text that is read, bytes.
pub const MAX_TEXT: usize = 1 << 20;

/// Largest batch of reads or prefetches, bytes.
const MAX_BATCH: u64 = 256 << 20;

/// A configuration of generation 2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Always 2.
    pub version: u32,
    /// Name of the instance; key of its cache metrics.
    pub id: String,
    /// Where blobs come from.
    pub backend: Option<Backend>,
    /// Where blobs come from that the image says to be elsewhere.
    pub external_backends: Vec<ExternalBackend>,
    /// Where chunks are kept.
    pub cache: Option<Cache>,
    /// How the image is presented.
    pub rafs: Option<Rafs>,
    /// Writable overlay in the daemon.
    pub overlay: Option<Overlay>,
}

/// `cache`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cache {
    /// `blobcache` or `filecache`; `fscache`; `dummycache` or empty for none.
    #[serde(rename = "type")]
    pub kind: String,
    /// Means nothing any more.
    pub compressed: bool,
    /// Verify chunks when they are read from the cache, not only when they are put there.
    pub validate: bool,
    /// Prefetch of whole blobs.
    pub prefetch: Prefetch,
    /// Settings of `blobcache` and `filecache`.
    pub filecache: Option<FileCache>,
    /// Settings of `fscache`.
    pub fscache: Option<FsCache>,
}

impl Cache {
    /// Settings of the file cache, if the type asks for one.
    pub fn file_cache(&self) -> Option<&FileCache> {
        match self.kind.as_str() {
            "blobcache" | "filecache" => self.filecache.as_ref(),
            _ => None,
        }
    }
}

/// `cache.filecache`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FileCache {
    /// Directory of the cache; made if it is missing.
    pub work_dir: String,
    /// Deprecated; means nothing here.
    pub disable_indexed_map: bool,
    /// Encrypt what is cached.
    pub enable_encryption: bool,
    /// Encrypt with keys made of the content.
    pub enable_convergent_encryption: bool,
    /// 32 bytes, hexadecimal.
    pub encryption_key: Secret,
    /// Bytes that the directory may use; 0: no limit. Ours, not upstream's.
    pub quota: u64,
    /// Keep what is cached of this image, whatever the quota, as long as it is mounted. Ours, not upstream's.
    pub pin: bool,
}

impl Default for FileCache {
    fn default() -> Self {
        Self {
            work_dir: ".".to_owned(),
            disable_indexed_map: false,
            enable_encryption: false,
            enable_convergent_encryption: false,
            encryption_key: Secret::default(),
            quota: 0,
            pin: false,
        }
    }
}

/// `cache.fscache`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FsCache {
    /// Directory of the kernel's cache.
    pub work_dir: String,
}

impl Default for FsCache {
    fn default() -> Self {
        Self {
            work_dir: ".".to_owned(),
        }
    }
}

/// `rafs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rafs {
    /// `direct` or `cached`; the same here.
    pub mode: String,
    /// Read ahead up to so many bytes around a small read; 0: off.
    pub batch_size: u64,
    /// Check the digests of the metadata at mount.
    pub validate: bool,
    /// Show the image's extended attributes.
    pub enable_xattr: bool,
    /// Count operations per file.
    pub iostats_files: bool,
    /// Record first accesses.
    pub access_pattern: bool,
    /// Record which files were read last.
    pub latest_read_files: bool,
    /// Prefetch by file.
    pub prefetch: Prefetch,
    /// File with an access trace to replay; empty: the one that was kept of the last recording, if any; `none`. Ours, not upstream's.
    pub trace: String,
}

impl Default for Rafs {
    fn default() -> Self {
        Self {
            mode: "direct".to_owned(),
            batch_size: 1 << 20,
            validate: false,
            enable_xattr: false,
            iostats_files: false,
            access_pattern: false,
            latest_read_files: false,
            prefetch: Prefetch::default(),
            trace: String::new(),
        }
    }
}

/// `cache.prefetch` and `rafs.prefetch`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefetch {
    /// Prefetch at all.
    pub enable: bool,
    /// Fetches at a time, 1 to 1024.
    #[serde(default = "eight")]
    pub threads: u64,
    /// Merge neighbours up to so many bytes.
    #[serde(default = "one_mib")]
    pub batch_size: u64,
    /// Bytes per second in all; 0: no limit.
    #[serde(default)]
    pub bandwidth_limit: u64,
    /// After the listed files, everything.
    #[serde(default)]
    pub prefetch_all: bool,
    /// Ask for whole blobs.
    #[serde(default)]
    pub stream_prefetch: bool,
    /// Seconds without a request after which everything that is not listed waits; 0: it never does. Ours, not upstream's.
    #[serde(default = "one_minute")]
    pub idle_pause: u64,
}

impl Default for Prefetch {
    fn default() -> Self {
        Self {
            enable: false,
            threads: eight(),
            batch_size: one_mib(),
            bandwidth_limit: 0,
            prefetch_all: false,
            stream_prefetch: false,
            idle_pause: one_minute(),
        }
    }
}

fn eight() -> u64 {
    8
}

fn one_mib() -> u64 {
    1 << 20
}

fn one_minute() -> u64 {
    60
}

/// `overlay`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Overlay {
    /// Directory that takes the changes.
    pub upper_dir: String,
    /// Its work directory.
    pub work_dir: String,
}

/// A configuration, and what in its text was not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The configuration.
    pub config: Config,
    /// Paths of unknown keys, in order; accepted, to be reported in one warning.
    pub unknown: Vec<String>,
}

/// Where the fields of a document stand, for the refusals; the generations name them differently.
struct Names {
    backend: &'static str,
    cache_type: &'static str,
    filecache: &'static str,
    fscache: &'static str,
    mode: &'static str,
    batch_size: &'static str,
    cache_prefetch: [&'static str; 2],
    rafs_prefetch: [&'static str; 2],
}

const NAMES: Names = Names {
    backend: "backend",
    cache_type: "cache.type",
    filecache: "cache.filecache",
    fscache: "cache.fscache",
    mode: "rafs.mode",
    batch_size: "rafs.batch_size",
    cache_prefetch: ["cache.prefetch.threads", "cache.prefetch.batch_size"],
    rafs_prefetch: ["rafs.prefetch.threads", "rafs.prefetch.batch_size"],
};

/// Generation 2 as it is written: `backend` still by type name.
#[derive(Deserialize)]
struct Document {
    version: u64,
    #[serde(default)]
    id: String,
    #[serde(default)]
    backend: Option<serde_json::Map<String, Value>>,
    #[serde(default)]
    external_backends: Vec<ExternalBackend>,
    #[serde(default)]
    cache: Option<Cache>,
    #[serde(default)]
    rafs: Option<Rafs>,
    #[serde(default)]
    overlay: Option<Overlay>,
}

impl Config {
    /// Parses and checks `text`.
    ///
    /// # Errors
    ///
    /// The text is neither JSON nor TOML, a required field is missing, or a value is not allowed.
    pub fn parse(text: &str) -> Result<Parsed, ConfigError> {
        if text.len() > MAX_TEXT {
            return Err(ConfigError::TooLong(text.len() as u64));
        }
        let mut unknown = Vec::new();
        let value = match read::parse(text)? {
            Syntax::Json(value) if is_generation_1(&value) => {
                let config = v1::read_document(value, &mut unknown)?;
                config.check(&v1::NAMES)?;
                return Ok(Parsed { config, unknown });
            }
            Syntax::Json(value) | Syntax::Toml(value) => value,
        };
        let config = Self::read_document(&value)?;
        config.check(&NAMES)?;
        let known = serde_json::to_value(&config).unwrap_or_default();
        unknown_keys(&value, &known, "", &mut unknown);
        Ok(Parsed { config, unknown })
    }

    /// Parses and checks the file at `path`.
    ///
    /// # Errors
    ///
    /// As [`Config::parse`], or the file cannot be read.
    pub fn from_file(path: &std::path::Path) -> Result<Parsed, ConfigError> {
        let failed = |reason: String| ConfigError::File {
            path: path.display().to_string(),
            reason,
        };
        let length = std::fs::metadata(path)
            .map_err(|error| failed(error.to_string()))?
            .len();
        if length > MAX_TEXT as u64 {
            return Err(ConfigError::TooLong(length));
        }
        let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        Self::parse(&text)
    }

    /// `text` with another access trace to replay, as JSON of the same generation.
    ///
    /// # Errors
    ///
    /// The text is neither JSON nor TOML.
    pub fn with_trace(text: &str, trace: &str) -> Result<String, ConfigError> {
        let (Syntax::Json(mut value) | Syntax::Toml(mut value)) = read::parse(text)?;
        let place = if is_generation_1(&value) {
            Some(&mut value)
        } else {
            value.as_object_mut().map(|document| {
                document
                    .entry("rafs")
                    .or_insert_with(|| Value::Object(serde_json::Map::new()))
            })
        };
        if let Some(object) = place.and_then(Value::as_object_mut) {
            object.insert("trace".to_owned(), trace.into());
        }
        Ok(value.to_string())
    }

    /// A directory of blobs that is its own cache, as `--localfs-dir` asks for.
    pub fn local_directory(dir: &str) -> Self {
        Self {
            version: 2,
            id: String::new(),
            backend: Some(Backend::LocalFs(backend::LocalFs {
                dir: dir.to_owned(),
                ..Default::default()
            })),
            external_backends: Vec::new(),
            cache: Some(Cache {
                kind: "filecache".to_owned(),
                filecache: Some(FileCache {
                    work_dir: dir.to_owned(),
                    ..FileCache::default()
                }),
                ..Cache::default()
            }),
            rafs: Some(Rafs {
                enable_xattr: true,
                ..Rafs::default()
            }),
            overlay: None,
        }
    }

    /// The three objects that a RAFS mount needs.
    ///
    /// # Errors
    ///
    /// Names the one that is missing.
    pub fn for_rafs(&self) -> Result<(&Backend, &Cache, &Rafs), ConfigError> {
        Ok((
            self.backend.as_ref().ok_or(ConfigError::Missing("backend"))?,
            self.cache.as_ref().ok_or(ConfigError::Missing("cache"))?,
            self.rafs.as_ref().ok_or(ConfigError::Missing("rafs"))?,
        ))
    }

    fn read_document(value: &Value) -> Result<Self, ConfigError> {
        let document: Document = read(value.clone(), "")?;
        check::range("version", document.version, 2, 2)?;
        let backend = match document.backend {
            Some(object) => Some(read_backend(object)?),
            None => None,
        };
        Ok(Self {
            version: 2,
            id: document.id,
            backend,
            external_backends: document.external_backends,
            cache: document.cache,
            rafs: document.rafs,
            overlay: document.overlay,
        })
    }

    fn check(&self, names: &Names) -> Check {
        if let Some(backend) = &self.backend {
            if names.backend == NAMES.backend {
                backend.check(&format!("{}.{}", names.backend, backend.type_name()))?;
            } else {
                backend.check(names.backend)?;
            }
        }
        if let Some(cache) = &self.cache {
            cache.check(names)?;
        }
        if let Some(rafs) = &self.rafs {
            check::one_of(names.mode, &rafs.mode, &["direct", "cached"])?;
            check::range(names.batch_size, rafs.batch_size, 0, MAX_BATCH)?;
            rafs.prefetch.check(names.rafs_prefetch)?;
        }
        if let Some(overlay) = &self.overlay {
            check::given("overlay", "upper_dir", &overlay.upper_dir)?;
            check::given("overlay", "work_dir", &overlay.work_dir)?;
        }
        Ok(())
    }
}

/// JSON is of generation 1 if it has `device` and does not say that it is of generation 2. A text that has
/// neither is read as generation 2, whose error then asks for the version.
fn is_generation_1(value: &Value) -> bool {
    value.get("device").is_some() && value.get("version").and_then(Value::as_u64) != Some(2)
}

fn read_backend(mut object: serde_json::Map<String, Value>) -> Result<Backend, ConfigError> {
    let kind: String = match object.get("type") {
        Some(kind) => read(kind.clone(), "backend.type")?,
        None => {
            return Err(ConfigError::Field {
                field: "backend.type".into(),
                reason: "missing field `type`".into(),
            });
        }
    };
    if !backend::TYPES.contains(&kind.as_str()) {
        return Err(check::not_one_of("backend.type", &kind, &backend::TYPES));
    }
    let at = format!("backend.{kind}");
    match object.remove(&kind) {
        Some(settings) => Backend::read(&kind, "backend.type", settings, &at),
        None => Err(ConfigError::Field {
            field: at,
            reason: format!("missing, but needed by type {kind}"),
        }),
    }
}

impl Cache {
    fn check(&self, names: &Names) -> Check {
        const TYPES: [&str; 5] = ["blobcache", "filecache", "fscache", "dummycache", ""];
        check::one_of(names.cache_type, &self.kind, &TYPES)?;
        let needed = |at: &str| {
            Err(ConfigError::Field {
                field: at.to_owned(),
                reason: format!("missing, but needed by cache type {}", self.kind),
            })
        };
        match self.kind.as_str() {
            "blobcache" | "filecache" => match &self.filecache {
                Some(settings) => settings.check(names.filecache)?,
                None => return needed(names.filecache),
            },
            "fscache" => match &self.fscache {
                Some(settings) => check::given(names.fscache, "work_dir", &settings.work_dir)?,
                None => return needed(names.fscache),
            },
            _ => {}
        }
        self.prefetch.check(names.cache_prefetch)
    }
}

impl FileCache {
    fn check(&self, at: &str) -> Check {
        check::given(at, "work_dir", &self.work_dir)?;
        let key = self.encryption_key.expose();
        if !key.is_empty() && (key.len() != 64 || !key.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            return check::refuse(&format!("{at}.encryption_key"), key, "32 bytes in hexadecimal");
        }
        Ok(())
    }
}

impl Prefetch {
    fn check(&self, [threads, batch_size]: [&str; 2]) -> Check {
        if self.enable {
            check::range(threads, self.threads, 1, 1024)?;
            check::range(batch_size, self.batch_size, 0, MAX_BATCH)?;
        }
        Ok(())
    }
}
