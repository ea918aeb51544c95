//! Where blobs come from: the `backend` object, the same keys in both generations.

use std::collections::BTreeMap;

use serde::ser::{SerializeMap, SerializeStruct};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ConfigError;
use super::check::{self, Check};
use super::read::read;
use super::secret::{Secret, SecretUrl, as_null};

/// A source of blobs, by `backend.type`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A directory of blobs, or a single blob file.
    LocalFs(LocalFs),
    /// A disk with one GPT partition per blob.
    LocalDisk(LocalDisk),
    /// Aliyun object storage.
    Oss(Oss),
    /// S3-compatible object storage.
    S3(S3),
    /// An OCI registry.
    Registry(Registry),
    /// A plain HTTP server, possibly on a Unix socket.
    HttpProxy(HttpProxy),
}

/// The values of `backend.type`.
pub(super) const TYPES: [&str; 6] = ["localfs", "localdisk", "oss", "s3", "registry", "http-proxy"];

impl Backend {
    /// `backend.type`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::LocalFs(_) => "localfs",
            Self::LocalDisk(_) => "localdisk",
            Self::Oss(_) => "oss",
            Self::S3(_) => "s3",
            Self::Registry(_) => "registry",
            Self::HttpProxy(_) => "http-proxy",
        }
    }

    /// Settings of the HTTP client, for the sources that have one.
    pub fn http(&self) -> Option<&Http> {
        match self {
            Self::LocalFs(_) | Self::LocalDisk(_) => None,
            Self::Oss(oss) => Some(&oss.http),
            Self::S3(s3) => Some(&s3.http),
            Self::Registry(registry) => Some(&registry.http),
            Self::HttpProxy(proxy) => Some(&proxy.http),
        }
    }

    /// Settings of the HTTP client, to be changed.
    pub fn http_mut(&mut self) -> Option<&mut Http> {
        match self {
            Self::LocalFs(_) | Self::LocalDisk(_) => None,
            Self::Oss(oss) => Some(&mut oss.http),
            Self::S3(s3) => Some(&mut s3.http),
            Self::Registry(registry) => Some(&mut registry.http),
            Self::HttpProxy(proxy) => Some(&mut proxy.http),
        }
    }

    /// Reads the settings of a source of type `kind` from `object`, which stands at `at`.
    pub(super) fn read(kind: &str, kind_at: &str, object: Value, at: &str) -> Result<Self, ConfigError> {
        // The client's settings stand beside the source's own. They are read on their own, because
        // serde's `flatten` would lose the name of the field that an error is about.
        let http = |object: &Value| read::<Http>(object.clone(), at);
        Ok(match kind {
            "localfs" => Self::LocalFs(read(object, at)?),
            "localdisk" => Self::LocalDisk(read(object, at)?),
            "oss" => Self::Oss(Oss {
                http: http(&object)?,
                ..read(object, at)?
            }),
            "s3" => Self::S3(S3 {
                http: http(&object)?,
                ..read(object, at)?
            }),
            "registry" => Self::Registry(Registry {
                http: http(&object)?,
                ..read(object, at)?
            }),
            "http-proxy" => Self::HttpProxy(HttpProxy {
                http: http(&object)?,
                ..read(object, at)?
            }),
            other => return Err(check::not_one_of(kind_at, other, &TYPES)),
        })
    }

    pub(super) fn check(&self, at: &str) -> Check {
        match self {
            Self::LocalFs(c) => {
                if c.dir.is_empty() && c.blob_file.is_empty() {
                    return check::refuse(&format!("{at}.dir"), "", "a directory, unless blob_file is set");
                }
                Ok(())
            }
            Self::LocalDisk(c) => check::given(at, "device_path", &c.device_path),
            Self::Oss(c) => {
                check::scheme(at, "scheme", &c.scheme)?;
                check::given(at, "endpoint", &c.endpoint)?;
                check::given(at, "bucket_name", &c.bucket_name)?;
                c.http.check(at)
            }
            Self::S3(c) => {
                check::scheme(at, "scheme", &c.scheme)?;
                check::given(at, "endpoint", &c.endpoint)?;
                check::given(at, "region", &c.region)?;
                check::given(at, "bucket_name", &c.bucket_name)?;
                c.http.check(at)
            }
            Self::Registry(c) => {
                if !c.scheme.is_empty() {
                    check::scheme(at, "scheme", &c.scheme)?;
                }
                if !c.blob_url_scheme.is_empty() {
                    check::scheme(at, "blob_url_scheme", &c.blob_url_scheme)?;
                }
                check::given(at, "host", &c.host)?;
                check::given(at, "repo", &c.repo)?;
                c.http.check(at)
            }
            Self::HttpProxy(c) => {
                check::proxy_address(&format!("{at}.addr"), &c.addr)?;
                c.http.check(at)
            }
        }
    }
}

impl Serialize for Backend {
    /// All types by name, as the incumbent shows it; the others are null.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let object = match self {
            Self::LocalFs(c) => serde_json::to_value(c),
            Self::LocalDisk(c) => serde_json::to_value(c),
            Self::Oss(c) => serde_json::to_value(c),
            Self::S3(c) => serde_json::to_value(c),
            Self::Registry(c) => serde_json::to_value(c),
            Self::HttpProxy(c) => serde_json::to_value(c),
        }
        .map_err(serde::ser::Error::custom)?;
        let mut map = serializer.serialize_map(Some(TYPES.len() + 1))?;
        map.serialize_entry("type", self.type_name())?;
        for name in TYPES {
            map.serialize_entry(
                name,
                if name == self.type_name() {
                    &object
                } else {
                    &Value::Null
                },
            )?;
        }
        map.end()
    }
}

/// `localfs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LocalFs {
    /// The one blob; for images with a single blob.
    pub blob_file: String,
    /// Directory whose files are named by blob id.
    pub dir: String,
    /// Further directories to look in.
    pub alt_dirs: Vec<String>,
}

/// `localdisk`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalDisk {
    /// Block device or disk image.
    pub device_path: String,
    /// Look blobs up by something else than partition names.
    #[serde(default)]
    pub disable_gpt: bool,
}

/// `oss`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Oss {
    /// `http` or `https`.
    #[serde(default = "https")]
    pub scheme: String,
    /// Host and port of the service.
    pub endpoint: String,
    /// Bucket.
    pub bucket_name: String,
    /// Goes before the blob id.
    #[serde(default)]
    pub object_prefix: String,
    /// Key id; empty for anonymous access.
    #[serde(default)]
    pub access_key_id: Secret,
    /// Key.
    #[serde(default)]
    pub access_key_secret: Secret,
    /// HTTP client.
    #[serde(flatten, skip_deserializing)]
    pub http: Http,
}

/// `s3`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct S3 {
    /// `http` or `https`.
    #[serde(default = "https")]
    pub scheme: String,
    /// Host and port of the service.
    pub endpoint: String,
    /// Region, part of the signature.
    pub region: String,
    /// Bucket.
    pub bucket_name: String,
    /// Goes before the blob id.
    #[serde(default)]
    pub object_prefix: String,
    /// Key id; empty for anonymous access.
    #[serde(default)]
    pub access_key_id: Secret,
    /// Key.
    #[serde(default)]
    pub access_key_secret: Secret,
    /// HTTP client.
    #[serde(flatten, skip_deserializing)]
    pub http: Http,
}

/// `registry`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registry {
    /// `http`, `https`, or empty: find out.
    #[serde(default = "https")]
    pub scheme: String,
    /// Host and port.
    pub host: String,
    /// Repository.
    pub repo: String,
    /// base64 of `user:password`.
    #[serde(default, serialize_with = "as_null")]
    pub auth: Option<Secret>,
    /// Bearer token to send as it is.
    #[serde(default, serialize_with = "as_null")]
    pub registry_token: Option<Secret>,
    /// Scheme of redirected blob URLs; empty: leave it.
    #[serde(default)]
    pub blob_url_scheme: String,
    /// Host of redirected blob URLs; empty: leave it.
    #[serde(default)]
    pub blob_redirected_host: String,
    /// HTTP client.
    #[serde(flatten, skip_deserializing)]
    pub http: Http,
}

/// `http-proxy`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpProxy {
    /// `http://...`, `https://...`, or the absolute path of a Unix socket.
    pub addr: SecretUrl,
    /// Goes before the blob id.
    #[serde(default)]
    pub path: String,
    /// HTTP client.
    #[serde(flatten, skip_deserializing)]
    pub http: Http,
}

/// Settings of the HTTP client, common to all sources that use one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Http {
    /// Limit of one request, seconds.
    pub timeout: u32,
    /// Limit of connecting, seconds.
    pub connect_timeout: u32,
    /// How often to try again.
    pub retry_limit: u8,
    /// Take any server certificate.
    pub skip_verify: bool,
    /// PEM files with further roots.
    pub ca_cert_files: Vec<String>,
    /// Forward proxy.
    pub proxy: Proxy,
    /// Mirrors of a registry or an HTTP server, asked in this order before proxy and origin.
    pub mirrors: Vec<Mirror>,
}

impl Default for Http {
    fn default() -> Self {
        Self {
            timeout: 5,
            connect_timeout: 5,
            retry_limit: 0,
            skip_verify: false,
            ca_cert_files: Vec::new(),
            proxy: Proxy::default(),
            mirrors: Vec::new(),
        }
    }
}

impl Http {
    fn check(&self, at: &str) -> Check {
        let url = format!("{at}.proxy.url");
        if !self.proxy.url.is_empty() {
            check::http_url(&url, &self.proxy.url)?;
        }
        if !self.proxy.ping_url.is_empty() {
            check::http_url(&format!("{at}.proxy.ping_url"), &self.proxy.ping_url)?;
        }
        for (number, mirror) in self.mirrors.iter().enumerate() {
            let at = format!("{at}.mirrors[{number}]");
            check::http_url(&format!("{at}.host"), &mirror.host)?;
            if !mirror.ping_url.is_empty() {
                check::http_url(&format!("{at}.ping_url"), &mirror.ping_url)?;
            }
        }
        Ok(())
    }
}

/// `proxy`: Dragonfly and similar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Proxy {
    /// Forward proxy; empty for none.
    pub url: SecretUrl,
    /// What to ask for the proxy's health; empty: do not ask.
    pub ping_url: SecretUrl,
    /// Go direct while the proxy is unhealthy.
    pub fallback: bool,
    /// Between two health checks, seconds.
    pub check_interval: u64,
    /// Stop checking when idle for so long, seconds.
    pub check_pause_elapsed: u64,
    /// Talk plain http to the proxy about https origins.
    pub use_http: bool,
    /// Dragonfly scheduler to ask instead of a plain proxy.
    pub dragonfly_scheduler_endpoint: SecretUrl,
}

impl Proxy {
    /// Whether a proxy is asked for. `{"fallback": false}` alone, which Go clients always send, asks for none.
    pub fn is_given(&self) -> bool {
        !self.url.is_empty()
    }
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            url: SecretUrl::default(),
            ping_url: SecretUrl::default(),
            fallback: true,
            check_interval: 5,
            check_pause_elapsed: 300,
            use_http: false,
            dragonfly_scheduler_endpoint: SecretUrl::default(),
        }
    }
}

/// A server that has the same blobs under the same paths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mirror {
    /// `http://HOST[:PORT]` or `https://HOST[:PORT]`.
    pub host: SecretUrl,
    /// What to ask for its health; empty: do not ask.
    pub ping_url: SecretUrl,
    /// More request headers; may hold secrets.
    pub headers: BTreeMap<String, Secret>,
    /// Between two health checks, or attempts while it fails, seconds.
    pub health_check_interval: u64,
    /// Failures in a row after which it is left out.
    pub failure_limit: u8,
    /// Send it the registry's credentials, too.
    pub auth_through: bool,
}

impl Default for Mirror {
    fn default() -> Self {
        Self {
            host: SecretUrl::default(),
            ping_url: SecretUrl::default(),
            headers: BTreeMap::new(),
            health_check_interval: 5,
            failure_limit: 5,
            auth_through: true,
        }
    }
}

/// A further source, for blobs that the image says to come from elsewhere.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ExternalBackend {
    /// Merged over what the image says.
    pub patch: serde_json::Map<String, Value>,
    /// Type of the source.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its settings; may hold secrets.
    pub config: serde_json::Map<String, Value>,
}

impl std::fmt::Debug for ExternalBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExternalBackend")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl Serialize for ExternalBackend {
    /// Which keys are secret depends on the type of the source, so no value is shown at all.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hidden = |map: &serde_json::Map<String, Value>| {
            map.keys()
                .map(|key| (key.clone(), String::new()))
                .collect::<BTreeMap<_, _>>()
        };
        let mut out = serializer.serialize_struct("ExternalBackend", 3)?;
        out.serialize_field("patch", &hidden(&self.patch))?;
        out.serialize_field("type", &self.kind)?;
        out.serialize_field("config", &hidden(&self.config))?;
        out.end()
    }
}

fn https() -> String {
    "https".to_owned()
}
