//! From the runtime's configuration to the values that the store and the instances are made of.

mod directory;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use backend::config as store;
use kata::config::backend::{Http, Mirror, Proxy};
use kata::config::{Backend, Cache, Config, ConfigError, Secret};

use crate::cli::{CacheMode, Virtiofsd};
use directory::Directory;

/// Extra headers come from variables of this name and the header's.
const HEADER_VARIABLE: &str = "NYDUS_HEADER_";

/// Replaces the registry's `auth` in the configuration of the mount made at the start.
const AUTH_VARIABLE: &str = "IMAGE_PULL_AUTH";

/// All that a mounted image is made of, beside its bootstrap.
#[derive(Clone, Debug)]
pub struct ImageConfig {
    /// Where its blobs come from.
    pub source: store::SourceConfig,
    /// Where they are kept.
    pub cache: store::CacheConfig,
    /// How it is presented.
    pub options: rafs::fs::Options,
}

/// Headers that the environment asks to send with every request to a source.
pub fn headers_of_environment() -> Vec<(String, store::Secret)> {
    std::env::vars_os()
        .filter_map(|(name, value)| {
            let name = name.to_str()?.strip_prefix(HEADER_VARIABLE)?.to_owned();
            Some((name, store::Secret::new(value.to_str()?)))
        })
        .collect()
}

/// Credentials that the environment has for the image mounted at the start.
pub fn auth_of_environment() -> Option<Secret> {
    std::env::var(AUTH_VARIABLE)
        .ok()
        .filter(|auth| !auth.is_empty())
        .map(Secret::new)
}

/// Translates `config`, which must be complete enough for an image; makes the cache's directory.
///
/// # Errors
///
/// Something is missing, or asks for what cannot be done here.
pub fn image(config: &Config, headers: &[(String, store::Secret)]) -> Result<ImageConfig, String> {
    let (backend, cache, rafs) = config
        .for_rafs()
        .map_err(|error: ConfigError| error.to_string())?;
    if config.overlay.is_some() {
        return Err(
            "overlay: a writable overlay is made by the guest, not by the daemon; leave it out".into(),
        );
    }
    Ok(ImageConfig {
        source: source(backend, headers),
        cache: cache_directory(cache, rafs.batch_size)?,
        options: rafs::fs::Options {
            xattr: rafs.enable_xattr,
            validate: rafs.validate,
        },
    })
}

fn cache_directory(cache: &Cache, amplify: u64) -> Result<store::CacheConfig, String> {
    let Some(file_cache) = cache.file_cache() else {
        return Err(match cache.kind.as_str() {
            "fscache" => {
                "the cache's type is \"fscache\", allowed is blobcache: fscache needs the host's kernel to mount the image".into()
            }
            kind => format!(
                "the cache's type is {kind:?}, allowed is blobcache: Rafs v6 must have local blobcache configured, with a work_dir"
            ),
        });
    };
    if file_cache.enable_encryption || file_cache.enable_convergent_encryption {
        return Err(
            "the cache's enable_encryption is true, allowed is false: caches are not encrypted".into(),
        );
    }
    let dir = std::path::absolute(&file_cache.work_dir)
        .map_err(|error| format!("the cache's work_dir is {:?}: {error}", file_cache.work_dir))?;
    std::fs::create_dir_all(&dir).map_err(|error| format!("the cache's work_dir is {dir:?}: {error}"))?;
    Ok(store::CacheConfig {
        amplify: u32::try_from(amplify).unwrap_or(u32::MAX),
        quota: file_cache.quota,
        pin: file_cache.pin,
        ..store::CacheConfig::new(dir)
    })
}

fn source(backend: &Backend, headers: &[(String, store::Secret)]) -> store::SourceConfig {
    let secret = |secret: &Secret| Some(secret).filter(|s| !s.is_empty()).map(hidden);
    let text = |text: &str| Some(text).filter(|text| !text.is_empty()).map(str::to_owned);
    match backend {
        Backend::LocalFs(c) => store::SourceConfig::Dir(store::DirConfig {
            dir: path(&c.dir),
            alt_dirs: c.alt_dirs.iter().map(PathBuf::from).collect(),
            blob_file: path(&c.blob_file),
        }),
        Backend::LocalDisk(c) => store::SourceConfig::LocalDisk(store::LocalDiskConfig {
            device: PathBuf::from(&c.device_path),
            disable_gpt: c.disable_gpt,
        }),
        Backend::Oss(c) => store::SourceConfig::Oss(store::OssConfig {
            endpoint: c.endpoint.clone(),
            scheme: scheme(&c.scheme),
            bucket: c.bucket_name.clone(),
            prefix: c.object_prefix.clone(),
            access_key_id: secret(&c.access_key_id),
            access_key_secret: secret(&c.access_key_secret),
            http: http(&c.http, headers),
        }),
        Backend::S3(c) => store::SourceConfig::S3(store::S3Config {
            endpoint: c.endpoint.clone(),
            scheme: scheme(&c.scheme),
            region: c.region.clone(),
            bucket: c.bucket_name.clone(),
            prefix: c.object_prefix.clone(),
            access_key_id: secret(&c.access_key_id),
            access_key_secret: secret(&c.access_key_secret),
            http: http(&c.http, headers),
        }),
        Backend::Registry(c) => store::SourceConfig::Registry(store::RegistryConfig {
            host: c.host.clone(),
            repo: c.repo.clone(),
            scheme: scheme(&c.scheme),
            auth: c.auth.as_ref().and_then(secret),
            token: c.registry_token.as_ref().and_then(secret),
            blob_url_scheme: text(&c.blob_url_scheme),
            blob_redirected_host: text(&c.blob_redirected_host),
            http: http(&c.http, headers),
        }),
        Backend::HttpProxy(c) => store::SourceConfig::HttpProxy(store::HttpProxyConfig {
            addr: c.addr.expose().to_owned(),
            path: c.path.clone(),
            http: http(&c.http, headers),
        }),
    }
}

fn hidden(secret: &Secret) -> store::Secret {
    store::Secret::new(secret.expose())
}

fn path(text: &str) -> Option<PathBuf> {
    (!text.is_empty()).then(|| Path::new(text).to_owned())
}

fn scheme(text: &str) -> store::Scheme {
    match text {
        "http" => store::Scheme::Http,
        "https" => store::Scheme::Https,
        _ => store::Scheme::Detect,
    }
}

fn http(http: &Http, headers: &[(String, store::Secret)]) -> store::HttpConfig {
    let seconds = |seconds: u32| Duration::from_secs(u64::from(seconds.max(1)));
    store::HttpConfig {
        connect_timeout: seconds(http.connect_timeout),
        timeout: seconds(http.timeout),
        retry_limit: u32::from(http.retry_limit),
        skip_verify: http.skip_verify,
        ca_cert_files: http.ca_cert_files.iter().map(PathBuf::from).collect(),
        mirrors: http.mirrors.iter().map(mirror).collect(),
        proxy: http.proxy.is_given().then(|| proxy(&http.proxy)),
        headers: headers.to_vec(),
    }
}

fn mirror(mirror: &Mirror) -> store::MirrorConfig {
    let headers = mirror.headers.iter();
    store::MirrorConfig {
        host: mirror.host.expose().to_owned(),
        ping_url: mirror.ping_url.expose().to_owned(),
        headers: headers
            .map(|(name, value)| (name.clone(), hidden(value)))
            .collect(),
        check_interval: Duration::from_secs(mirror.health_check_interval.max(1)),
        failure_limit: mirror.failure_limit.into(),
        auth_through: mirror.auth_through,
        ..store::MirrorConfig::default()
    }
}

fn proxy(proxy: &Proxy) -> store::ProxyConfig {
    store::ProxyConfig {
        url: store::Secret::new(proxy.url.expose()),
        ping_url: proxy.ping_url.expose().to_owned(),
        fallback: proxy.fallback,
        check_interval: Duration::from_secs(proxy.check_interval.max(1)),
        check_pause_elapsed: Duration::from_secs(proxy.check_pause_elapsed),
        use_http: proxy.use_http,
    }
}

/// What host directories are served with, from the command line.
#[derive(Clone, Debug)]
pub struct HostConfig {
    options: passthrough::Options,
}

impl HostConfig {
    /// Reads the options of virtiofsd.
    ///
    /// # Errors
    ///
    /// Rules for ids contradict each other.
    pub fn new(given: &Virtiofsd) -> Result<Self, String> {
        let mut options = passthrough::Options::new("/");
        options.read_only = given.readonly;
        options.posix_acl = given.posix_acl;
        options.writeback = given.writeback;
        options.locks = given.host_locks;
        options.allow_direct_io = given.allow_direct_io;
        options.announce_submounts = !given.no_announce_submounts;
        options.cache = match given.cache {
            None | Some(CacheMode::Auto) => passthrough::CachePolicy::default(),
            Some(CacheMode::Always) => passthrough::CachePolicy::Always,
            Some(CacheMode::Never) => passthrough::CachePolicy::Never,
            Some(CacheMode::Metadata) => passthrough::CachePolicy::Metadata,
        };
        options.xattr_rules = given.xattrmap.clone().map(Arc::new);
        options.ids = passthrough::IdMaps {
            users: directory::ids("--translate-uid", &given.translate_uid)?,
            groups: directory::ids("--translate-gid", &given.translate_gid)?,
        };
        if let Some(mode) = given.inode_file_handles {
            options.inode_files = directory::inode_files(mode);
        }
        Ok(Self { options })
    }

    /// What is the same for all of them.
    pub fn options(&self) -> &passthrough::Options {
        &self.options
    }

    /// The same for the directory `root`, with what the `config` of its mount request says otherwise.
    ///
    /// # Errors
    ///
    /// The request's configuration makes no sense.
    pub fn of(&self, root: &str, config: &str) -> Result<passthrough::Options, String> {
        let asked = Directory::parse(config)?;
        let unknown: Vec<&str> = asked.unknown().collect();
        if !unknown.is_empty() {
            tracing::warn!(
                "config of the directory {root}: unknown keys are ignored: {}",
                unknown.join(", ")
            );
        }
        let mut options = passthrough::Options {
            root: root.into(),
            ..self.options.clone()
        };
        asked.apply(&mut options)?;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGISTRY: &str = r#"{"version":2,"backend":{"type":"registry","registry":{"host":"h","repo":"r","scheme":"",
        "auth":"YTpi","timeout":0,"proxy":{"url":"http://p"}}},
        "cache":{"type":"filecache","filecache":{"work_dir":"DIR"}},"rafs":{"batch_size":0}}"#;

    fn translate(text: &str) -> Result<ImageConfig, String> {
        image(
            &Config::parse(text).unwrap().config,
            &[("X-A".into(), store::Secret::new("v"))],
        )
    }

    #[test]
    fn registry_in_full() {
        let dir = tempfile::tempdir().unwrap();
        let work_dir = dir.path().join("deep/cache");
        let image = translate(&REGISTRY.replace("DIR", work_dir.to_str().unwrap())).unwrap();
        let store::SourceConfig::Registry(registry) = image.source else {
            panic!()
        };
        assert_eq!(registry.scheme, store::Scheme::Detect);
        assert_eq!(registry.auth.unwrap().expose(), "YTpi");
        assert_eq!(registry.token, None);
        assert_eq!(
            registry.http.timeout,
            Duration::from_secs(1),
            "0 would never succeed"
        );
        assert_eq!(registry.http.proxy.unwrap().url.expose(), "http://p");
        assert_eq!(registry.http.headers.len(), 1);
        assert_eq!(
            (image.cache.dir.as_path(), image.cache.amplify),
            (work_dir.as_path(), 0)
        );
        assert!(work_dir.is_dir(), "made if it is missing");
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let text = REGISTRY.replace("DIR", dir.path().to_str().unwrap());
        let refused = |from: &str, to: &str| translate(&text.replace(from, to)).unwrap_err();
        assert!(refused("\"filecache\",", "\"dummycache\",").contains("Rafs v6 must have local blobcache"));
        assert!(
            refused("{\"work_dir\"", "{\"enable_encryption\":true,\"work_dir\"")
                .contains("enable_encryption is true, allowed is false")
        );
        assert!(
            refused(
                "\"rafs\":",
                "\"overlay\":{\"upper_dir\":\"u\",\"work_dir\":\"w\"},\"rafs\":"
            )
            .contains("overlay")
        );
        assert!(translate(r#"{"version":2}"#).unwrap_err().contains("backend"));
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(
            translate(&REGISTRY.replace("DIR", file.to_str().unwrap()))
                .unwrap_err()
                .contains("work_dir")
        );
    }
}
