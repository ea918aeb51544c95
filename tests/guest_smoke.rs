//! A real guest, end to end: a container on a lazily loaded image, its writes on the host, a second container beside it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use rafsd_guest::cache::scratch;
use rafsd_guest::guest::SHARED;
use rafsd_guest::image::{busybox_tree, python_tree};
use rafsd_guest::{Boot, Cache, Container, Image, Registry, Sandbox, config};

const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
const RAFS: &str = env!("CARGO_BIN_EXE_rafs");

#[test]
fn a_container_runs_python_from_an_image_and_its_writes_are_on_the_host() {
    let cache = Cache::open().unwrap();
    let directory = scratch(&cache).unwrap();
    let store = directory.path().join("store");
    let image = Image::build(Path::new(RAFS), &python_tree(&cache).unwrap(), &store).unwrap();
    let registry = Registry::start(Path::new(RAFS), &store, Duration::ZERO).unwrap();
    let mut sandbox = Sandbox::prepare(Path::new(RAFSD), directory.path()).unwrap();
    let container = Container::named("python");
    sandbox
        .mount_image(
            &container,
            &image,
            &config::of_registry(registry.address(), &directory.path().join("cache")),
        )
        .unwrap();
    sandbox.boot(&Boot::new(&cache).unwrap()).unwrap();

    let (text, _) = sandbox
        .run(
            &container,
            "python3 -c 'import json, ssl; print(json.dumps([1, ssl.HAS_TLSv1_3]))'",
        )
        .unwrap();
    assert_eq!(text, "[1, true]\n");
    let traffic = registry.traffic().unwrap();
    assert!(
        traffic.bytes < image.size().unwrap() / 2,
        "{traffic:?}: python needs a part of the image only"
    );

    sandbox.write_and_look(&container).unwrap();

    let layer = sandbox.layer(&container);
    let root = container.root();
    let guest = sandbox.guest().unwrap();
    // A directory of the image, removed and made again, hides what the image has in it.
    guest
        .check(&format!(
            "cd {root}; ls etc/default/*; rm -r etc/default; mkdir etc/default; touch etc/default/new"
        ))
        .unwrap();
    assert_eq!(guest.check(&format!("ls {root}/etc/default")).unwrap(), "new\n");
    let mut value = [0; 8];
    let length =
        rustix::fs::getxattr(layer.join("etc/default"), "trusted.overlay.opaque", &mut value).unwrap();
    assert_eq!(&value[..length], b"y");
    let impure = rustix::fs::getxattr(layer.join("etc"), "trusted.overlay.impure", &mut value).unwrap();
    assert_eq!(&value[..impure], b"y");

    guest
        .check(&format!(
            "cd {root}/root; echo x >one; ln one two; mkfifo pipe; ln -s one three; mv one four; sync"
        ))
        .unwrap();
    let four = fs::metadata(layer.join("root/four")).unwrap();
    assert_eq!(
        (four.nlink(), four.ino()),
        (2, fs::metadata(layer.join("root/two")).unwrap().ino())
    );
    assert!(
        fs::symlink_metadata(layer.join("root/pipe"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    assert_eq!(fs::read_link(layer.join("root/three")).unwrap(), Path::new("one"));
    assert!(!layer.join("root/one").exists());

    // A changed file of the image is there when the guest has to ask for it again, and can be replaced.
    let changed = guest
        .check(&format!(
            "cd {root}/etc; echo new >>profile; chmod 600 bash.bashrc; sleep 1.2
             tail -n 1 profile; stat -c %a bash.bashrc; ! (set -C; : >profile) 2>/dev/null
             sleep 1.2; cp profile other; mv other profile; tail -n 1 profile"
        ))
        .unwrap();
    assert_eq!(changed, "new\n600\nnew\n");

    // What the host puts into a container's directory later is there at once.
    fs::write(
        layer.parent().unwrap().join("resolv.conf"),
        "nameserver 192.0.2.1\n",
    )
    .unwrap();
    let seen = guest
        .check(&format!("cat {SHARED}/containers/python/snapshotdir/resolv.conf"))
        .unwrap();
    assert_eq!(seen, "nameserver 192.0.2.1\n");

    let complaints = guest.complaints();
    assert!(complaints.is_empty(), "{complaints:#?}");
    sandbox.end().unwrap();
}

#[test]
fn a_second_container_comes_and_the_first_goes_while_the_guest_runs() {
    let cache = Cache::open().unwrap();
    let directory = scratch(&cache).unwrap();
    let store = directory.path().join("store");
    let tree = busybox_tree(&cache).unwrap();
    let image = Image::build(Path::new(RAFS), &tree, &store).unwrap();
    let registry = Registry::start(Path::new(RAFS), &store, Duration::ZERO).unwrap();
    let config = config::of_registry(registry.address(), &directory.path().join("cache"));

    let mut sandbox = Sandbox::prepare(Path::new(RAFSD), directory.path()).unwrap();
    sandbox.boot(&Boot::new(&cache).unwrap()).unwrap();
    // The guest looked before there was anything; a mount made now must show all the same.
    let guest = sandbox.guest().unwrap();
    assert_ne!(guest.run(&format!("ls {SHARED}/rafs/first")).unwrap().status, 0);

    let (first, second) = (Container::named("first"), Container::named("second"));
    for container in [&first, &second] {
        sandbox.mount_image(container, &image, &config).unwrap();
        let (text, _) = sandbox.run(container, "cat /etc/os-release").unwrap();
        assert_eq!(text, "NAME=busybox\n");
    }
    sandbox.remove_during_use(&first, &second).unwrap();

    // The same name may come back, with fresh content.
    sandbox.mount_image(&first, &image, &config).unwrap();
    let listed = sandbox
        .guest()
        .unwrap()
        .check(&format!("ls {SHARED}{}", first.mountpoint()))
        .unwrap();
    assert!(
        listed.contains("os-release") || listed.contains("bin"),
        "{listed}"
    );
    sandbox.end().unwrap();
}
