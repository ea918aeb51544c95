//! Images made by the incumbent's tool, read by a guest: every byte and every attribute.
//!
//! The images and their descriptions lie in `../shared/fixtures/rafs`, beside this project. Without them the
//! same comparison runs on an image of our own.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::guest::Layout;
use rafsd_frontend::image::{Image, fixtures};
use rafsd_frontend::tree::{Walk, differences};
use rafsd_frontend::{Guest, Options};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const RAFS: &str = env!("CARGO_BIN_EXE_rafs");

struct Fixture {
    name: String,
    image: Image,
    expected: Value,
}

/// The fixtures whose names begin with `prefix`.
fn load(prefix: &str) -> Vec<Fixture> {
    let Some(directory) = fixtures() else {
        return Vec::new();
    };
    let mut list: Vec<Fixture> = std::fs::read_dir(&directory)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| {
            let path = entry.path();
            let expected =
                serde_json::from_slice(&std::fs::read(path.join("expected.json")).unwrap()).unwrap();
            let blobs = path.join("blobs");
            let bootstrap = Some(path.join("bootstrap")).filter(|file| file.exists());
            let bootstrap = bootstrap.unwrap_or_else(|| smallest(&blobs));
            Fixture {
                name: entry.file_name().to_string_lossy().into_owned(),
                image: Image { bootstrap, blobs },
                expected,
            }
        })
        .collect();
    list.sort_by(|a, b| a.name.cmp(&b.name));
    list
}

/// Where the bootstrap is inside a blob, it is inside the smallest.
fn smallest(directory: &Path) -> PathBuf {
    let files = std::fs::read_dir(directory).unwrap().flatten();
    files
        .min_by_key(|file| file.metadata().unwrap().len())
        .unwrap()
        .path()
}

/// Mounts an image and compares all of it.
fn check(daemon: &Daemon, guest: &Guest, fixture: &Fixture, walk: &Walk) -> Vec<String> {
    let mountpoint = format!("/rafs/{}/lowerdir", fixture.name);
    let cache = daemon.directory().join("cache").join(&fixture.name);
    if let Err(e) = daemon.mount_rafs(
        &mountpoint,
        &fixture.image.bootstrap,
        &fixture.image.local(&cache),
    ) {
        return vec![e.to_string()];
    }
    let tree = guest
        .resolve(&mountpoint)
        .and_then(|top| walk.run(guest, top.nodeid));
    let mut lines = match tree {
        Ok(tree) => differences(&tree, &fixture.expected),
        Err(e) => vec![e.to_string()],
    };
    lines.extend(daemon.umount(&mountpoint).err().map(|e| e.to_string()));
    lines
}

/// Compares fixtures on one daemon with one guest, and reports all that differ.
fn check_all(fixtures: &[Fixture], layout: Layout, walk: &Walk) {
    let daemon = Builder::new(RAFSD).unwrap().start().unwrap();
    let guest = daemon.guest(Options::default()).unwrap();
    guest.set_layout(layout);
    let mut failed = Vec::new();
    for fixture in fixtures {
        let lines = check(&daemon, &guest, fixture, walk);
        if lines.is_empty() {
            println!("{}: equal", fixture.name);
            continue;
        }
        let shown = lines.iter().take(8).cloned().collect::<Vec<_>>().join("\n  ");
        failed.push(format!(
            "{}: {} differences:\n  {shown}",
            fixture.name,
            lines.len()
        ));
    }
    assert!(
        failed.is_empty(),
        "{}\n{} of {} fixtures",
        failed.join("\n"),
        failed.len(),
        fixtures.len()
    );
}

#[test]
fn v6_fixtures_reach_the_guest_unchanged() {
    check_all(&load("v6-"), Layout::Linux, &Walk::default());
}

#[test]
fn v5_fixtures_reach_the_guest_unchanged() {
    check_all(&load("v5-"), Layout::Linux, &Walk::default());
}

#[test]
fn odd_reads_and_odd_descriptors_give_the_same_bytes() {
    let fixtures: Vec<Fixture> = load("v6-")
        .into_iter()
        .filter(|fixture| ["v6-zstd-64k", "v6-lz4-blake3", "v6-big-lz4"].contains(&fixture.name.as_str()))
        .collect();
    check_all(
        &fixtures,
        Layout::Ragged(11),
        &Walk {
            read: 10_007,
            list: 700,
            depth: 16,
        },
    );
    check_all(
        &fixtures,
        Layout::Crossing(32 << 20),
        &Walk {
            read: 65_536,
            list: 1024,
            depth: 1,
        },
    );
}

#[test]
fn an_image_of_our_own_reaches_the_guest_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    make_tree(&tree);
    for version in ["6", "5"] {
        let output = directory.path().join(version);
        let image = Image::build(RAFS, &tree, &output, &["--fs-version", version]).unwrap();
        let expected = describe(&tree);
        let fixture = Fixture {
            name: format!("own-{version}"),
            image,
            expected,
        };
        check_all(&[fixture], Layout::Linux, &Walk::default());
    }
}

/// Files of all sizes around the borders of blocks and chunks, and one of every other kind.
fn make_tree(top: &Path) {
    std::fs::create_dir_all(top.join("sizes")).unwrap();
    std::fs::create_dir_all(top.join("empty")).unwrap();
    for size in [
        0,
        1,
        4095,
        4096,
        4097,
        (1 << 20) - 1,
        1 << 20,
        (1 << 20) + 1,
        3_500_000,
    ] {
        let data: Vec<u8> = (0..size as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        std::fs::write(top.join(format!("sizes/{size}")), data).unwrap();
    }
    std::fs::write(top.join("first"), "shared").unwrap();
    std::fs::hard_link(top.join("first"), top.join("second")).unwrap();
    symlink("sizes/../first", top.join("link")).unwrap();
    for number in 0..200 {
        std::fs::write(top.join(format!("empty-{number}")), "").unwrap();
    }
    std::fs::set_permissions(top.join("sizes"), std::fs::Permissions::from_mode(0o2750)).unwrap();
    drop(std::os::unix::net::UnixListener::bind(top.join("socket")).unwrap());
}

/// Describes a directory as a fixture's `expected.json` does.
fn describe(top: &Path) -> Value {
    let mut entries = Vec::new();
    let mut groups = std::collections::BTreeMap::<u64, Vec<String>>::new();
    let mut stack = vec![top.to_owned()];
    while let Some(path) = stack.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let name = format!("/{}", path.strip_prefix(top).unwrap().to_str().unwrap());
        let kind = meta.file_type();
        let mut entry = json!({
            "path": name, "mode": format!("{:04o}", meta.mode() & 0o7777), "uid": meta.uid(), "gid": meta.gid(),
            "mtime": [meta.mtime(), meta.mtime_nsec()], "nlink": meta.nlink(),
        });
        if kind.is_dir() {
            entry["type"] = "dir".into();
            stack.extend(
                std::fs::read_dir(&path)
                    .unwrap()
                    .flatten()
                    .map(|child| child.path()),
            );
            let below = std::fs::read_dir(&path).unwrap().flatten();
            entry["nlink"] = (2 + below.filter(|child| child.file_type().unwrap().is_dir()).count()).into();
            if path == top {
                entry["mtime"] = json!([0, 0]);
            }
        } else if kind.is_symlink() {
            let target = std::fs::read_link(&path).unwrap();
            entry["type"] = "symlink".into();
            entry["target"] = target.to_str().unwrap().into();
            entry["size"] = meta.len().into();
        } else if kind.is_socket() {
            entry["type"] = "socket".into();
        } else {
            entry["type"] = "file".into();
            entry["size"] = meta.len().into();
            entry["sha256"] = hex::encode(Sha256::digest(std::fs::read(&path).unwrap())).into();
        }
        if meta.nlink() > 1 && !kind.is_dir() {
            groups.entry(meta.ino()).or_default().push(name);
        }
        entries.push(entry);
    }
    json!({ "entries": entries, "hardlink_groups": groups.into_values().collect::<Vec<_>>() })
}

#[test]
fn an_image_is_cached_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    make_tree(&tree);
    let image = Image::build(RAFS, &tree, &directory.path().join("image"), &[]).unwrap();
    let daemon = Builder::new(RAFSD).unwrap().start().unwrap();
    daemon
        .mount_rafs(
            "/rafs/a/lowerdir",
            &image.bootstrap,
            &image.local(&directory.path().join("c")),
        )
        .unwrap();
    let guest = daemon.guest(Options::default()).unwrap();
    let top = guest.resolve("/rafs/a/lowerdir").unwrap();
    let year = 365 * 24 * 3600;
    let found = guest.lookup(top.nodeid, "first").unwrap();
    assert!(
        found.entry_valid.0 > year && found.attr_valid.0 > year,
        "{found:?}"
    );
    let missing = guest.lookup(top.nodeid, "nowhere").unwrap();
    assert_eq!(
        missing.nodeid, 0,
        "a missing name is an entry that can be cached, too"
    );
    assert!(missing.entry_valid.0 > year, "{missing:?}");
    assert_eq!(
        guest.lookup(found.nodeid, "x").unwrap_err().errno(),
        Some(libc::ENOTDIR)
    );
}
