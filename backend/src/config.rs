//! What a store is made of, in types: sources, caches, limits. Values only, no run-time state.
//!
//! The vocabulary is that of nydusd's configuration, generation 2; translating the JSON is the caller's job.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A credential. Shown as `***` by `Debug`, and never by anything else.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the wire and nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is nothing to hide.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// Limits of a store, shared by all its blobs.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Threads that talk to sources.
    pub net_threads: usize,
    /// Threads that decompress, verify and write to the cache.
    pub decode_threads: usize,
    /// Bytes of fetched and decoded data held in memory at a time. Each source may always have one
    /// request under way, so that no source can starve another; the bound is thus soft by one request per source.
    pub memory: u64,
    /// Requests that one source is sent at a time.
    pub requests_per_source: usize,
    /// What every thread of the store does first.
    pub thread_start: ThreadStart,
}

/// Threads of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreThread {
    /// Talks to sources.
    Net,
    /// Decompresses, verifies and writes to the cache.
    Decode,
}

/// Called by each thread of the store before anything else. The default does nothing.
#[derive(Clone)]
pub struct ThreadStart(pub Arc<dyn Fn(StoreThread) + Send + Sync>);

impl Default for ThreadStart {
    fn default() -> Self {
        Self(Arc::new(|_| ()))
    }
}

impl fmt::Debug for ThreadStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ThreadStart")
    }
}

impl Default for StoreOptions {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            net_threads: 1,
            decode_threads: processors.clamp(1, 4),
            memory: 64 << 20,
            requests_per_source: 16,
            thread_start: ThreadStart::default(),
        }
    }
}

/// Where a blob is kept once it was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Directory of cache files; made if it is missing. May be shared with other processes.
    pub dir: PathBuf,
    /// Read amplification: a request for absent chunks is extended over their absent neighbours up to so many
    /// compressed bytes. 0 fetches what was asked for and nothing else.
    pub amplify: u32,
    /// Bytes of the disk that the directory may use, whatever process fills it; 0 for no limit. Chunks that were not used for long make room.
    pub quota: u64,
    /// Never evict chunks of this blob while it is open.
    pub pin: bool,
}

impl CacheConfig {
    /// Default of [`CacheConfig::amplify`].
    pub const AMPLIFY: u32 = 1 << 20;

    /// A cache in `dir` with defaults for the rest.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            amplify: Self::AMPLIFY,
            quota: 0,
            pin: false,
        }
    }
}

/// Where a blob's bytes come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceConfig {
    /// A directory of blobs (`localfs`).
    Dir(DirConfig),
    /// An OCI registry.
    Registry(RegistryConfig),
    /// An S3 bucket, or one of a compatible service.
    S3(S3Config),
    /// An Aliyun OSS bucket.
    Oss(OssConfig),
    /// A plain HTTP server of blobs (`http-proxy`), over TCP or a Unix socket.
    HttpProxy(HttpProxyConfig),
    /// A disk with one GPT partition per blob (`localdisk`).
    LocalDisk(LocalDiskConfig),
}

/// A directory of blobs, each under its id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct DirConfig {
    /// The directory.
    pub dir: Option<PathBuf>,
    /// Directories to look in when `dir` has no such blob.
    pub alt_dirs: Vec<PathBuf>,
    /// One file that is every blob asked for; goes before the directories.
    pub blob_file: Option<PathBuf>,
}

/// Scheme of a registry's URLs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Try https first, then http; remember what worked.
    #[default]
    Detect,
    /// Plain text.
    Http,
    /// TLS.
    Https,
}

/// An OCI registry and one of its repositories.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RegistryConfig {
    /// `host` or `host:port`.
    pub host: String,
    /// Repository, such as `library/debian`.
    pub repo: String,
    /// Scheme.
    pub scheme: Scheme,
    /// `user:password` in Base64, as in Docker's configuration.
    pub auth: Option<Secret>,
    /// A bearer token to use as it is.
    pub token: Option<Secret>,
    /// Scheme to use in redirects instead of the one the registry answers.
    pub blob_url_scheme: Option<String>,
    /// Host to use in redirects instead of the one the registry answers.
    pub blob_redirected_host: Option<String>,
    /// Transport.
    pub http: HttpConfig,
}

/// An S3 bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct S3Config {
    /// `host[:port]` of the service.
    pub endpoint: String,
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Region to sign for.
    pub region: String,
    /// Bucket.
    pub bucket: String,
    /// Prepended to blob ids.
    pub prefix: String,
    /// Access key id; anonymous without.
    pub access_key_id: Option<Secret>,
    /// Access key.
    pub access_key_secret: Option<Secret>,
    /// Transport.
    pub http: HttpConfig,
}

/// An Aliyun OSS bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct OssConfig {
    /// `host[:port]` of the service.
    pub endpoint: String,
    /// `http` or `https`.
    pub scheme: Scheme,
    /// Bucket.
    pub bucket: String,
    /// Prepended to blob ids.
    pub prefix: String,
    /// Access key id; anonymous without.
    pub access_key_id: Option<Secret>,
    /// Access key.
    pub access_key_secret: Option<Secret>,
    /// Transport.
    pub http: HttpConfig,
}

/// A plain HTTP server of blobs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct HttpProxyConfig {
    /// `http://HOST[:PORT]`, `https://HOST[:PORT]`, or the absolute path of a Unix socket.
    pub addr: String,
    /// Path prefix; a blob is at `<path>/<blob id>`.
    pub path: String,
    /// Transport.
    pub http: HttpConfig,
}

/// A disk that holds one blob per GPT partition, named by the blob id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct LocalDiskConfig {
    /// The disk or its image.
    pub device: PathBuf,
    /// The disk has no partition table: it is one blob, from its first byte.
    pub disable_gpt: bool,
}

/// Transport of sources that speak HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HttpConfig {
    /// Time to connect, TLS included.
    pub connect_timeout: Duration,
    /// Longest silence: to the first byte of an answer, and between two pieces of a body.
    pub timeout: Duration,
    /// How often an error that looks permanent (denied, not found) is given another chance. Others are retried until the deadline
    /// of those who wait.
    pub retry_limit: u32,
    /// Accept any certificate.
    pub skip_verify: bool,
    /// PEM files with more certificate authorities.
    pub ca_cert_files: Vec<PathBuf>,
    /// Mirrors to ask before the proxy and the origin, in this order.
    pub mirrors: Vec<MirrorConfig>,
    /// Forward proxy to go through.
    pub proxy: Option<ProxyConfig>,
    /// More request headers.
    pub headers: Vec<(String, Secret)>,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            timeout: Duration::from_secs(5),
            retry_limit: 2,
            skip_verify: false,
            ca_cert_files: Vec::new(),
            mirrors: Vec::new(),
            proxy: None,
            headers: Vec::new(),
        }
    }
}

/// A server that has the blobs of a registry under the same paths.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MirrorConfig {
    /// `http://HOST[:PORT]` or `https://HOST[:PORT]`.
    pub host: String,
    /// URL to ask for its health; empty for none.
    pub ping_url: String,
    /// More request headers.
    pub headers: Vec<(String, Secret)>,
    /// Time between two health checks, or between two attempts while it fails.
    pub check_interval: Duration,
    /// Health is not checked any more when there was no request for so long.
    pub check_pause_elapsed: Duration,
    /// Failures in a row after which it is left out.
    pub failure_limit: u32,
    /// Send it the credentials for the registry, too.
    pub auth_through: bool,
}

impl Default for MirrorConfig {
    fn default() -> Self {
        Self {
            host: String::new(),
            ping_url: String::new(),
            headers: Vec::new(),
            check_interval: Duration::from_secs(5),
            check_pause_elapsed: Duration::from_secs(300),
            failure_limit: 5,
            auth_through: true,
        }
    }
}

/// A forward proxy, such as Dragonfly's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProxyConfig {
    /// URL of the proxy; may hold credentials.
    pub url: Secret,
    /// URL to ask for the proxy's health; empty for none.
    pub ping_url: String,
    /// Go to the origin when the proxy is not healthy.
    pub fallback: bool,
    /// Time between two health checks.
    pub check_interval: Duration,
    /// Health is not checked any more when there was no request for so long.
    pub check_pause_elapsed: Duration,
    /// Ask the proxy for `http://` URLs where the origin's are `https://`.
    pub use_http: bool,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            url: Secret::default(),
            ping_url: String::new(),
            fallback: true,
            check_interval: Duration::from_secs(5),
            check_pause_elapsed: Duration::from_secs(300),
            use_http: false,
        }
    }
}
