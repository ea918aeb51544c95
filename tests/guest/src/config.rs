//! Mount configurations as the snapshotter writes them.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};

/// The repository that clients name; `rafs serve` answers for any.
pub(crate) const REPOSITORY: &str = "demo/images";

/// For an image of the registry at `address`, cached in `cache`.
#[must_use]
pub fn of_registry(address: SocketAddr, cache: &Path) -> Value {
    let registry = json!({
        "readahead": false, "scheme": "http", "host": address.to_string(), "repo": REPOSITORY,
        "proxy": {"fallback": false}, "timeout": 5, "connect_timeout": 5, "retry_limit": 2,
    });
    mount("registry", &registry, cache)
}

/// For an image whose blobs lie in the directory `blobs`, cached in `cache`.
#[must_use]
pub fn of_directory(blobs: &Path, cache: &Path) -> Value {
    mount("localfs", &json!({"dir": blobs}), cache)
}

fn mount(kind: &str, config: &Value, cache: &Path) -> Value {
    json!({
        "device": {
            "id": "/image",
            "backend": {"type": kind, "config": config},
            "cache": {"type": "blobcache", "config": {"work_dir": cache}},
        },
        "mode": "direct",
        "digest_validate": false,
        "enable_xattr": true,
        "amplify_io": 1_048_576,
    })
}
