//! Who may do what to a file, in a real guest: set-id bits and capabilities below an overlay and without one, and access
//! control lists where one mount has them and another has none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::image::python_tree;
use rafsd_guest::kernel::Kernel;
use rafsd_guest::{Boot, Cache, Container, Image, Registry, Sandbox, config};
use rustix::fs::{XattrFlags, setxattr};
use serde_json::json;

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const RAFS: &str = env!("CARGO_BIN_EXE_rafs");

const SET_IDS: &str = include_str!("guest_rights/set_ids.py");
const ACLS: &str = include_str!("guest_rights/acls.py");

const LIMIT: Duration = Duration::from_secs(300);

/// An access list in the kernel's form: the owner may read and write, user 1000 may read, nobody else may anything.
fn readable_for_1000() -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (1, 6, NOBODY),
        (2, 4, 1000),
        (4, 0, NOBODY),
        (16, 4, NOBODY),
        (32, 0, NOBODY),
    ];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(rights.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

/// Of the directory whose mount has lists: they count, are inherited, and take the place of the umask.
const WITH_ACLS: &str = "with set: None
with list: system.posix_acl_access
with get: True
with read: True False
with mode: 640
with default: None
with new: 660 760 660
with inherited: system.posix_acl_access True
with of the host: True system.posix_acl_access
with read: True False
";

/// Of the other: there are none, also where the host has some, and the umask counts. Rights are those of the mode, whose
/// rights of the group are the mask of the host's list.
const WITHOUT_ACLS: &str = "without set: ENOTSUP
without list:
without get: ENODATA
without read: False False
without mode: 600
without default: ENOTSUP
without new: 600 700 600
without inherited: ENODATA
without of the host: ENODATA
without read: False True
";

fn rights_are_those_of_a_disk(kernel: impl FnOnce(&Cache) -> Kernel) {
    let cache = Cache::open().unwrap();
    let directory = scratch(&cache).unwrap();
    let store = directory.path().join("store");
    let image = Image::build(Path::new(RAFS), &python_tree(&cache).unwrap(), &store).unwrap();
    let registry = Registry::start(Path::new(RAFS), &store, Duration::ZERO).unwrap();
    let mut sandbox = Sandbox::prepare(Path::new(RAFSD), directory.path()).unwrap();
    let container = Container::named("rights");
    let image_config = config::of_registry(registry.address(), &directory.path().join("cache"));
    sandbox.mount_image(&container, &image, &image_config).unwrap();
    for (name, options) in [("with", json!({"posix_acl": true})), ("without", json!({}))] {
        let source = directory.path().join(name);
        fs::create_dir(&source).unwrap();
        let file = source.join("of-the-host");
        fs::write(&file, "content").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        chown(&file, Some(0), Some(1001)).unwrap();
        setxattr(
            &file,
            "system.posix_acl_access",
            &readable_for_1000(),
            XattrFlags::empty(),
        )
        .unwrap();
        sandbox
            .daemon()
            .mount_passthrough_with(&format!("/{name}"), &source, &options)
            .unwrap();
    }
    let volume = directory.path().join("containers/volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("set_ids.py"), SET_IDS).unwrap();
    fs::write(volume.join("acls.py"), ACLS).unwrap();
    let kernel = kernel(&cache);
    println!("guest: {}", kernel.release());
    sandbox.boot(&Boot::with_kernel(&cache, kernel).unwrap()).unwrap();
    sandbox.assemble(&container, "index=off").unwrap();
    let root = container.root();
    let volumes = format!(
        "mkdir {root}/mnt/known; mount -t tmpfs known {root}/mnt/known
         for name in containers/volume with without; do
             mkdir -p {root}/mnt/$name; mount -o bind {SHARED}/$name {root}/mnt/$name
         done"
    );
    sandbox.guest().unwrap().check(&volumes).unwrap();

    let mut set_ids = |place: &str| {
        let command = format!("mkdir -p {place}; python3 -B /mnt/containers/volume/set_ids.py {place}");
        sandbox.inside(&container, LIMIT, &command).unwrap()
    };
    let known = set_ids("/mnt/known");
    assert!(known.contains("another 6777 append: 0, 777\n"), "{known}");
    assert!(known.contains("root 6777 append: 0, 6777\n"), "{known}");
    assert_same(
        "a directory of the host",
        &set_ids("/mnt/containers/volume"),
        &known,
    );
    assert_same("an overlay", &set_ids("/root/work"), &known);
    // One of the image's own files.
    let text = sandbox
        .inside(
            &container,
            LIMIT,
            "chmod 6777 /usr/bin/shuf; setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'echo >>/usr/bin/shuf'
             stat -c %a /usr/bin/shuf",
        )
        .unwrap();
    assert_eq!(text, "777\n");

    let text = sandbox
        .inside(
            &container,
            LIMIT,
            "python3 -B /mnt/containers/volume/acls.py /mnt/with /mnt/without",
        )
        .unwrap();
    assert_eq!(text, format!("{WITH_ACLS}{WITHOUT_ACLS}"));
    let complaints = sandbox.guest().unwrap().complaints();
    assert!(complaints.is_empty(), "{complaints:#?}");
    sandbox.end().unwrap();
}

/// Compares line by line, and tells the lines that differ.
fn assert_same(place: &str, text: &str, known: &str) {
    let differ: Vec<_> = text
        .lines()
        .zip(known.lines())
        .filter(|(here, there)| here != there)
        .collect();
    assert!(differ.is_empty(), "{place}, a known file system: {differ:#?}");
    assert_eq!(text.len(), known.len());
}

#[test]
fn rights_of_files_are_those_of_a_disk() {
    rights_are_those_of_a_disk(|cache| Kernel::of_this_release(cache).unwrap());
}

#[test]
#[ignore = "needs a kernel of its own: make test-guest-full"]
fn rights_of_files_are_those_of_a_disk_with_a_newer_kernel() {
    rights_are_those_of_a_disk(|cache| Kernel::of_backports(cache).unwrap());
}
