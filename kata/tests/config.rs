//! Configuration as clients write it: the documented examples, defaults, limits, refusals, secrets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use rafsd_kata::config::{Backend, Config, ConfigError, MAX_TEXT, Parsed};

/// Shape that the snapshotter dumps: generation 1, a registry, and Go's habit to write every struct.
const V1_REGISTRY: &str = r#"{"device":{"id":"/17","backend":{"type":"registry","config":{"readahead":false,"host":"registry.example:5000","repo":"team/app","auth":"dXNlcjpwYXNz","scheme":"https","skip_verify":false,"proxy":{"fallback":false},"timeout":5,"connect_timeout":5,"retry_limit":2}},"cache":{"type":"blobcache","config":{"work_dir":"/var/lib/nydus/cache","disable_indexed_map":false}}},"mode":"direct","digest_validate":false,"enable_xattr":true,"amplify_io":1048576,"fs_prefetch":{"enable":true,"prefetch_all":true,"threads_count":8,"merging_size":1048576}}"#;
const V1_LOCALFS: &str = r#"{"device":{"backend":{"type":"localfs","config":{"dir":"/var/lib/nydus/blobs"}},"cache":{"type":"blobcache","config":{"work_dir":"/var/lib/nydus/cache"}}},"mode":"direct","digest_validate":false,"iostats_files":false,"enable_xattr":true}"#;
const V2_LOCALFS: &str = r#"{"version":2,"id":"f1","backend":{"type":"localfs","localfs":{"dir":"/var/lib/nydus/blobs"}},"cache":{"type":"filecache","filecache":{"work_dir":"/var/lib/nydus/cache"}},"rafs":{"mode":"direct","enable_xattr":true,"prefetch":{"enable":true,"threads":4}}}"#;
const V2_TOML_S3: &str = r#"
version = 2
id = "t1"
[backend]
type = "s3"
[backend.s3]
endpoint = "s3.example"
region = "eu-1"
bucket_name = "images"
object_prefix = "nydus/"
access_key_id = "KEY"
access_key_secret = "SECRET"
[cache]
type = "blobcache"
[cache.filecache]
work_dir = "/var/lib/nydus/cache"
[rafs]
mode = "direct"
"#;
const V2_OSS: &str = r#"{"version":2,"id":"o","backend":{"type":"oss","oss":{"endpoint":"oss.example","bucket_name":"images","object_prefix":"nydus/","access_key_id":"KEY","access_key_secret":"SECRET"}},"cache":{"type":"filecache","filecache":{"work_dir":"/var/lib/nydus/cache"}},"rafs":{"mode":"direct"}}"#;
const V2_HTTP_PROXY: &str = r#"{"version":2,"id":"h","backend":{"type":"http-proxy","http-proxy":{"addr":"http://127.0.0.1:9977","path":"/blobs"}},"cache":{"type":"filecache","filecache":{"work_dir":"/var/lib/nydus/cache"}},"rafs":{"mode":"direct"}}"#;
const V2_REGISTRY_PROXY: &str = r#"{"version":2,"id":"r","backend":{"type":"registry","registry":{"host":"registry.example","repo":"team/app","proxy":{"url":"http://127.0.0.1:65001","ping_url":"http://127.0.0.1:40901/server/ping","fallback":true,"check_interval":5,"use_http":false}}},"cache":{"type":"filecache","filecache":{"work_dir":"/var/lib/nydus/cache"}},"rafs":{"mode":"direct"}}"#;

fn parse(text: &str) -> Parsed {
    Config::parse(text).unwrap_or_else(|error| panic!("{error}"))
}

fn refusal(text: &str) -> String {
    Config::parse(text).expect_err("must be refused").to_string()
}

/// A valid document of generation 2 with `change` made to it.
fn v2(change: impl FnOnce(&mut serde_json::Value)) -> String {
    let mut value = serde_json::from_str(V2_REGISTRY_PROXY).unwrap();
    change(&mut value);
    value.to_string()
}

fn v1(change: impl FnOnce(&mut serde_json::Value)) -> String {
    let mut value = serde_json::from_str(V1_REGISTRY).unwrap();
    change(&mut value);
    value.to_string()
}

/// Puts `value` where `path` leads.
fn put(document: &mut serde_json::Value, path: &str, value: serde_json::Value) {
    let mut at = document;
    for key in path.split('.') {
        at = &mut at[key];
    }
    *at = value;
}

fn set_v2(path: &str, value: serde_json::Value) -> String {
    v2(|document| put(document, path, value))
}

fn set_v1(path: &str, value: serde_json::Value) -> String {
    v1(|document| put(document, path, value))
}

#[test]
fn example_v1_registry() {
    let Parsed { config, unknown } = parse(V1_REGISTRY);
    assert_eq!(
        unknown, [""; 0],
        "`readahead` has no effect, but every snapshotter sends it"
    );
    let (backend, cache, rafs) = config.for_rafs().unwrap();
    let Backend::Registry(registry) = backend else {
        panic!("{backend:?}")
    };
    assert_eq!(
        (registry.host.as_str(), registry.repo.as_str()),
        ("registry.example:5000", "team/app")
    );
    assert_eq!(registry.auth.as_ref().unwrap().expose(), "dXNlcjpwYXNz");
    assert_eq!(registry.scheme, "https");
    assert_eq!(
        (
            registry.http.timeout,
            registry.http.connect_timeout,
            registry.http.retry_limit
        ),
        (5, 5, 2)
    );
    assert!(!registry.http.proxy.is_given(), "an empty URL means no proxy");
    assert_eq!(cache.file_cache().unwrap().work_dir, "/var/lib/nydus/cache");
    assert!(cache.prefetch.enable && cache.prefetch.prefetch_all && cache.prefetch.threads == 8);
    assert_eq!(cache.prefetch, rafs.prefetch);
    assert!(rafs.enable_xattr && !rafs.validate);
    assert_eq!((config.version, config.id.as_str()), (2, "/17"));
}

#[test]
fn example_v1_localfs() {
    let Parsed { config, unknown } = parse(V1_LOCALFS);
    assert!(unknown.is_empty(), "{unknown:?}");
    let (backend, cache, rafs) = config.for_rafs().unwrap();
    let Backend::LocalFs(localfs) = backend else {
        panic!("{backend:?}")
    };
    assert_eq!(localfs.dir, "/var/lib/nydus/blobs");
    assert!(
        !cache.prefetch.enable && !cache.prefetch.prefetch_all,
        "no fs_prefetch at all"
    );
    assert_eq!(rafs.batch_size, 1 << 20);
}

#[test]
fn example_v2_localfs() {
    let Parsed { config, unknown } = parse(V2_LOCALFS);
    assert!(unknown.is_empty(), "{unknown:?}");
    let rafs = config.rafs.as_ref().unwrap();
    assert_eq!(
        (
            rafs.prefetch.enable,
            rafs.prefetch.threads,
            rafs.prefetch.batch_size
        ),
        (true, 4, 1 << 20)
    );
    assert!(!rafs.prefetch.prefetch_all);
    assert!(!config.cache.as_ref().unwrap().prefetch.enable);
}

#[test]
fn example_v2_toml_s3() {
    let Parsed { config, unknown } = parse(V2_TOML_S3);
    assert!(unknown.is_empty(), "{unknown:?}");
    let Some(Backend::S3(s3)) = &config.backend else {
        panic!("{config:?}")
    };
    assert_eq!(
        (s3.endpoint.as_str(), s3.region.as_str(), s3.scheme.as_str()),
        ("s3.example", "eu-1", "https")
    );
    assert_eq!(
        (s3.access_key_id.expose(), s3.access_key_secret.expose()),
        ("KEY", "SECRET")
    );
}

#[test]
fn example_v2_oss() {
    let Some(Backend::Oss(oss)) = parse(V2_OSS).config.backend else {
        panic!()
    };
    assert_eq!(
        (oss.object_prefix.as_str(), oss.bucket_name.as_str()),
        ("nydus/", "images")
    );
}

#[test]
fn example_v2_http_proxy() {
    let Some(Backend::HttpProxy(proxy)) = parse(V2_HTTP_PROXY).config.backend else {
        panic!()
    };
    assert_eq!(
        (proxy.addr.expose(), proxy.path.as_str()),
        ("http://127.0.0.1:9977", "/blobs")
    );
}

#[test]
fn example_v2_registry_proxy() {
    let Some(Backend::Registry(registry)) = parse(V2_REGISTRY_PROXY).config.backend else {
        panic!()
    };
    let proxy = &registry.http.proxy;
    assert!(proxy.is_given() && proxy.fallback && proxy.check_pause_elapsed == 300);
}

#[test]
fn v2_with_only_a_version_parses_and_names_what_a_rafs_mount_lacks() {
    let config = parse(r#"{"version":2}"#).config;
    assert_eq!(config.for_rafs().unwrap_err(), ConfigError::Missing("backend"));
    let shown = serde_json::to_value(&config).unwrap();
    for key in [
        "version",
        "id",
        "backend",
        "external_backends",
        "cache",
        "rafs",
        "overlay",
    ] {
        assert!(shown.get(key).is_some(), "{key}");
    }
}

#[test]
fn nulls_mean_absent() {
    let config = parse(
        r#"{"device":{"backend":{"type":"localfs","config":{"dir":"/b","alt_dirs":null}},"cache":{"type":"","config":null}},"mode":"cached","fs_prefetch":null}"#,
    )
    .config;
    assert_eq!(config.cache.unwrap().kind, "");
}

#[test]
fn v1_blobcache_needs_its_config_and_empty_is_enough() {
    assert!(refusal(&set_v1("device.cache.config", serde_json::Value::Null)).contains("device.cache.config"));
    let config = parse(&set_v1("device.cache.config", serde_json::json!({}))).config;
    assert_eq!(config.cache.unwrap().file_cache().unwrap().work_dir, ".");
}

#[test]
fn v1_fs_prefetch_prefetches_all_unless_it_says_otherwise() {
    let config = parse(&set_v1("fs_prefetch", serde_json::json!({"enable": true}))).config;
    assert!(config.rafs.unwrap().prefetch.prefetch_all);
}

#[test]
fn first_generation_that_fits_wins() {
    // `version` 2 beside `device`: generation 2, and `device` is unknown.
    let text = set_v2("device", serde_json::json!({}));
    assert_eq!(parse(&text).unknown, ["device"]);
    // No fall-through once it parsed.
    assert!(refusal(r#"{"version":3}"#).contains("version"));
    assert!(refusal("version = 3").contains("version is 3, allowed is 2 to 2"));
}

#[test]
fn unknown_keys_are_reported_at_every_level() {
    let text = v2(|document| {
        document["backend"]["registry"]["mirrors"] =
            serde_json::json!([{"host": "http://mirror.example", "x": 1}]);
        document["backend"]["registry"]["proxy"]["x"] = 1.into();
        document["cache"]["filecache"]["y"] = 1.into();
        document["rafs"]["colour"] = true.into();
        document["id_mapping"] = serde_json::json!({});
    });
    let mut unknown = parse(&text).unknown;
    unknown.sort();
    assert_eq!(
        unknown,
        [
            "backend.registry.mirrors[0].x",
            "backend.registry.proxy.x",
            "cache.filecache.y",
            "id_mapping",
            "rafs.colour"
        ]
    );
}

#[test]
fn hints_that_the_snapshotter_always_sends_are_not_reported() {
    let mut parsed = parse(&v1(|document| {
        document["device"]["backend"]["config"]["readahead"] = false.into();
        document["device"]["backend"]["config"]["readahead_sec"] = 10.into();
    }));
    assert_eq!(parsed.unknown, Vec::<String>::new());
    parsed = parse(&v2(|document| {
        document["backend"]["registry"]["readahead"] = true.into()
    }));
    assert_eq!(parsed.unknown, Vec::<String>::new());
}

#[test]
fn a_bad_value_is_named_with_its_field_and_what_is_allowed() {
    use serde_json::json;
    let cases: &[(&str, serde_json::Value, &str)] = &[
        ("version", json!(3), "2 to 2"),
        ("version", json!("2"), "a whole number"),
        ("id", json!(5), "a text"),
        (
            "backend.type",
            json!("ftp"),
            "localfs, localdisk, oss, s3, registry, http-proxy",
        ),
        ("backend.type", json!("oss"), "backend.oss"),
        ("backend.registry.host", json!(""), "not empty"),
        ("backend.registry.repo", json!(""), "not empty"),
        ("backend.registry.host", json!(null), "missing field `host`"),
        ("backend.registry.scheme", json!("ftp"), "http, https"),
        ("backend.registry.blob_url_scheme", json!("ftp"), "http, https"),
        ("backend.registry.timeout", json!("5"), "a whole number"),
        ("backend.registry.timeout", json!(-1), "a whole number"),
        ("backend.registry.connect_timeout", json!(1.5), "a whole number"),
        ("backend.registry.retry_limit", json!(256), "a whole number"),
        ("backend.registry.skip_verify", json!("no"), "true or false"),
        ("backend.registry.ca_cert_files", json!("/x"), "a list"),
        ("backend.registry.auth", json!(7), "a text"),
        ("backend.registry.registry_token", json!({}), "a text"),
        (
            "backend.registry.proxy.url",
            json!("proxy:3128"),
            "http:// or https://",
        ),
        (
            "backend.registry.proxy.ping_url",
            json!("nowhere"),
            "http:// or https://",
        ),
        ("backend.registry.proxy.fallback", json!(1), "true or false"),
        (
            "backend.registry.proxy.check_interval",
            json!("5s"),
            "a whole number",
        ),
        (
            "cache.type",
            json!("ramcache"),
            "blobcache, filecache, fscache, dummycache",
        ),
        ("cache.type", json!("fscache"), "cache.fscache"),
        ("cache.validate", json!(1), "true or false"),
        ("cache.filecache.work_dir", json!(""), "not empty"),
        (
            "cache.filecache.encryption_key",
            json!("abc"),
            "32 bytes in hexadecimal",
        ),
        ("cache.prefetch", json!({}), "missing field `enable`"),
        (
            "cache.prefetch",
            json!({"enable": true, "threads": 0}),
            "1 to 1024",
        ),
        ("rafs.mode", json!("fast"), "direct, cached"),
        ("rafs.batch_size", json!((256u64 << 20) + 1), "0 to 268435456"),
        (
            "rafs.prefetch",
            json!({"enable": true, "threads": 1025}),
            "1 to 1024",
        ),
        (
            "rafs.prefetch",
            json!({"enable": true, "batch_size": (256u64 << 20) + 1}),
            "0 to 268435456",
        ),
        ("rafs.enable_xattr", json!("yes"), "true or false"),
        ("overlay", json!({"upper_dir": "", "work_dir": "/w"}), "not empty"),
    ];
    for (path, value, allowed) in cases {
        let message = refusal(&set_v2(path, value.clone()));
        let field = if allowed.contains('.') { allowed } else { path };
        assert!(message.contains(field), "{path}: {message}");
        assert!(message.contains(allowed), "{path}: {message}");
        assert!(
            message.contains(" is ") || message.contains("missing"),
            "{path}: {message}"
        );
    }
    let cases: &[(&str, serde_json::Value, &str)] = &[
        ("mode", json!(null), "missing field `mode`"),
        ("mode", json!("fast"), "direct, cached"),
        ("device.backend.type", json!("http-proxy"), "generation 1"),
        ("device.backend.type", json!("ftp"), "localfs, localdisk"),
        ("device.backend.config.host", json!(""), "not empty"),
        ("device.backend.config.timeout", json!("x"), "a whole number"),
        ("device.cache.type", json!("ramcache"), "blobcache"),
        ("amplify_io", json!((256u64 << 20) + 1), "0 to 268435456"),
        ("fs_prefetch.threads_count", json!(0), "1 to 1024"),
        (
            "fs_prefetch.merging_size",
            json!((256u64 << 20) + 1),
            "0 to 268435456",
        ),
    ];
    for (path, value, allowed) in cases {
        let message = refusal(&set_v1(path, value.clone()));
        assert!(
            message.contains(path) && message.contains(allowed),
            "{path}: {message}"
        );
    }
}

#[test]
fn sources_of_other_types_are_checked_too() {
    let backend = |object: &str| refusal(&format!(r#"{{"version":2,"backend":{object}}}"#));
    assert!(backend(r#"{"type":"localfs","localfs":{}}"#).contains("backend.localfs.dir"));
    assert!(backend(r#"{"type":"localdisk","localdisk":{"device_path":""}}"#).contains("device_path"));
    assert!(
        backend(r#"{"type":"oss","oss":{"endpoint":"e","bucket_name":""}}"#)
            .contains("backend.oss.bucket_name")
    );
    assert!(backend(r#"{"type":"s3","s3":{"endpoint":"e","bucket_name":"b"}}"#).contains("region"));
    let addr = |addr: &str| {
        backend(&format!(
            r#"{{"type":"http-proxy","http-proxy":{{"addr":"{addr}"}}}}"#
        ))
    };
    assert!(addr("ftp://x").contains("backend.http-proxy.addr"));
    assert!(addr("/no/such/socket").contains("existing Unix socket"));
    assert!(!addr("ftp://user:hunter2@x").contains("hunter2"));
}

#[test]
fn syntax_errors_say_where_and_quote_nothing() {
    let json = refusal("{\"version\":2,\n \"auth\": \"hunter2\" oops}");
    assert!(json.contains("JSON") && json.contains("line 2"), "{json}");
    assert!(!json.contains("hunter2"));
    let toml = refusal("version = 2\naccess_key_secret = \"hunter2\" oops\n");
    assert!(toml.contains("TOML") && toml.contains("line 2"), "{toml}");
    assert!(!toml.contains("hunter2"));
    assert!(refusal("").contains("version"));
    assert!(refusal("[1,2]").contains("failed to parse configuration information"));
    assert!(refusal("5").contains("failed to parse configuration information"));
    assert_eq!(
        Config::parse(&" ".repeat(MAX_TEXT + 1)).unwrap_err(),
        ConfigError::TooLong(MAX_TEXT as u64 + 1)
    );
}

#[test]
fn nothing_secret_is_shown() {
    let texts = [
        V2_TOML_S3.replace("KEY", "hunter2").replace("SECRET", "hunter2"),
        V2_OSS.replace("KEY", "hunter2").replace("SECRET", "hunter2"),
        V1_REGISTRY.replace("dXNlcjpwYXNz", "hunter2"),
        v2(|document| {
            let registry = &mut document["backend"]["registry"];
            registry["registry_token"] = "hunter2".into();
            registry["proxy"]["url"] = "http://user:hunter2@proxy:1".into();
            registry["proxy"]["dragonfly_scheduler_endpoint"] = "http://user:hunter2@proxy:1".into();
            document["external_backends"] =
                serde_json::json!([{"patch": {"auth": "hunter2"}, "type": "x", "config": {"k": "hunter2"}}]);
        }),
        v2(|document| {
            document["cache"]["filecache"]["encryption_key"] = "c0de".repeat(16).into();
        }),
    ];
    for text in texts {
        let config = parse(&text).config;
        let shown = serde_json::to_string(&config).unwrap() + &format!("{config:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("c0de"), "{shown}");
    }
}

#[test]
fn what_is_shown_is_a_complete_document_that_parses_again() {
    for text in [
        V1_REGISTRY,
        V1_LOCALFS,
        V2_LOCALFS,
        V2_TOML_S3,
        V2_OSS,
        V2_HTTP_PROXY,
        V2_REGISTRY_PROXY,
    ] {
        let shown = serde_json::to_value(parse(text).config).unwrap();
        let again = parse(&shown.to_string());
        assert!(again.unknown.is_empty(), "{:?}", again.unknown);
        assert_eq!(serde_json::to_value(again.config).unwrap(), shown);
        assert!(
            shown["backend"].as_object().unwrap().len() == 7,
            "every type is listed"
        );
        assert!(shown["rafs"]["prefetch"]["bandwidth_limit"].is_u64());
    }
}

#[test]
fn files_are_limited_and_errors_name_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    assert!(
        Config::from_file(&path)
            .unwrap_err()
            .to_string()
            .contains("config.json")
    );
    std::fs::write(&path, V1_LOCALFS).unwrap();
    assert_eq!(Config::from_file(&path).unwrap(), parse(V1_LOCALFS));
    std::fs::write(&path, vec![b' '; MAX_TEXT + 1]).unwrap();
    assert!(matches!(Config::from_file(&path), Err(ConfigError::TooLong(_))));
}

#[test]
fn what_the_packaging_ships_is_understood() {
    let template = include_str!("../packaging/snapshotter/nydusd-config.json");
    // The snapshotter adds the registry and the repository.
    let mut template: serde_json::Value = serde_json::from_str(template).unwrap();
    put(&mut template, "device.backend.config.host", "h".into());
    put(&mut template, "device.backend.config.repo", "r".into());
    assert_eq!(parse(&template.to_string()).unknown, Vec::<String>::new());
    for (text, hypervisor) in [
        (include_str!("../packaging/kata/50-rafsd-go-qemu.toml"), "qemu"),
        (include_str!("../packaging/kata/50-rafsd-go-clh.toml"), "clh"),
        (
            include_str!("../packaging/kata/50-rafsd-runtime-rs-qemu.toml"),
            "qemu",
        ),
        (
            include_str!("../packaging/kata/50-rafsd-runtime-rs-cloud-hypervisor.toml"),
            "cloud-hypervisor",
        ),
    ] {
        let drop_in: toml::Value = toml::from_str(text).unwrap();
        let section = &drop_in["hypervisor"][hypervisor];
        assert_eq!(section["shared_fs"].as_str(), Some("virtio-fs-nydus"));
        assert_eq!(section["virtio_fs_daemon"].as_str(), Some("/usr/local/bin/rafsd"));
        assert_eq!(
            section["valid_virtio_fs_daemon_paths"][0],
            section["virtio_fs_daemon"]
        );
    }
    toml::from_str::<toml::Value>(include_str!("../packaging/snapshotter/config.toml")).unwrap();
}

#[test]
fn a_trace_is_put_where_its_generation_has_it() {
    let one = r#"{"device": {"backend": {"type": "localfs", "config": {"dir": "/b"}}}, "mode": "direct", "trace": "old"}"#;
    let two = r#"{"version": 2, "backend": {"type": "localfs", "localfs": {"dir": "/b"}}}"#;
    let toml = "version = 2\n[rafs]\nmode = \"cached\"\n";
    for text in [one, two, toml] {
        let changed = parse(&Config::with_trace(text, "/new").unwrap());
        assert_eq!(changed.unknown, Vec::<String>::new());
        assert_eq!(changed.config.rafs.unwrap().trace, "/new", "{text}");
    }
    assert_eq!(parse(one).config.rafs.unwrap().trace, "old");
    assert!(Config::with_trace("{", "/new").is_err());
}
