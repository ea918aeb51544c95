//! The table's behaviour, with an instance that does nothing.

use super::*;
use fuse_backend_rs::api::filesystem::FileSystem;

struct Nothing;
impl FileSystem for Nothing {
    type Inode = u64;
    type Handle = u64;
}
impl HostFs for Nothing {}

fn nothing() -> Instance {
    Instance::Passthrough(Arc::new(Nothing))
}

fn mount(mounts: &Mounts, path: &str) -> MountId {
    mounts.mount(path, nothing(), MountOptions::default()).unwrap()
}

fn pseudo_names(mounts: &Mounts, nodeid: u64) -> Vec<String> {
    let table = mounts.snapshot();
    match table.resolve(nodeid) {
        Some(Target::Pseudo(node)) => table
            .entries(node, 0)
            .map(|(_, name, _)| String::from_utf8(name.to_vec()).unwrap())
            .collect(),
        _ => panic!("nodeid {nodeid} is not a pseudo directory"),
    }
}

fn child_id(mounts: &Mounts, nodeid: u64, name: &str) -> u64 {
    let table = mounts.snapshot();
    let Some(Target::Pseudo(node)) = table.resolve(nodeid) else {
        panic!("not a pseudo directory")
    };
    match table.child(node, name.as_bytes()) {
        Some(Child::Directory(node)) => node.id,
        Some(Child::Mountpoint(mount)) => super::nodeid(mount.id, 1).unwrap(),
        None => panic!("no entry {name}"),
    }
}

#[test]
fn deep_mountpoints_make_and_remove_their_directories() {
    let mounts = Mounts::new();
    mount(&mounts, "/rafs/a/lowerdir");
    mount(&mounts, "/rafs/b/lowerdir/");
    mount(&mounts, "/containers");
    assert_eq!(pseudo_names(&mounts, 1), ["rafs", "containers"]);
    let rafs = child_id(&mounts, 1, "rafs");
    assert_eq!(pseudo_names(&mounts, rafs), ["a", "b"]);

    mounts.umount("/rafs/a/lowerdir").unwrap();
    assert_eq!(pseudo_names(&mounts, rafs), ["b"]);
    mounts.umount("/rafs/b/lowerdir").unwrap();
    assert_eq!(pseudo_names(&mounts, 1), ["containers"]);
    assert!(
        mounts.snapshot().resolve(rafs).is_none(),
        "a removed directory is stale"
    );
}

#[test]
fn a_mount_id_is_never_used_twice() {
    let mounts = Mounts::new();
    let first = mount(&mounts, "/a");
    let nodeid = child_id(&mounts, 1, "a");
    mounts.umount("/a").unwrap();
    assert!(mounts.snapshot().resolve(nodeid).is_none());
    let second = mount(&mounts, "/a");
    assert_ne!(first, second);
    assert!(
        mounts.snapshot().resolve(nodeid).is_none(),
        "the old nodeid stays stale"
    );
}

#[test]
fn a_mount_at_the_root_hides_the_pseudo_tree_while_it_lasts() {
    let mounts = Mounts::new();
    mount(&mounts, "/a");
    let root = mount(&mounts, "/");
    match mounts.snapshot().resolve(1) {
        Some(Target::Mount(mount, 1)) => assert_eq!(mount.id, root),
        _ => panic!("the root is not the mount's"),
    }
    mounts.umount("/").unwrap();
    assert_eq!(pseudo_names(&mounts, 1), ["a"]);
}

#[test]
fn mounting_twice_and_unmounting_nothing_are_refused() {
    let mounts = Mounts::new();
    mount(&mounts, "/a/b");
    let again = mounts.mount("//a/b", nothing(), MountOptions::default());
    assert_eq!(again, Err(MountError::Busy("//a/b".to_owned())));
    assert_eq!(mounts.umount("/a"), Err(MountError::NotMounted("/a".to_owned())));
    assert_eq!(mounts.umount("/x"), Err(MountError::NotMounted("/x".to_owned())));
    for bad in ["", "a", "/a/../b", "/./a", "/a\0b"] {
        assert!(matches!(
            mounts.mount(bad, nothing(), MountOptions::default()),
            Err(MountError::BadPath { .. })
        ));
    }
    assert_eq!(mounts.list().len(), 1);
}

#[test]
fn umount_drops_the_instance_and_waits_for_its_users() {
    let mounts = Arc::new(Mounts::new());
    let instance: Arc<dyn HostFs> = Arc::new(Nothing);
    let weak = Arc::downgrade(&instance);
    mounts
        .mount("/a", Instance::Passthrough(instance), MountOptions::default())
        .unwrap();

    let table = mounts.snapshot();
    let user = Arc::clone(table.mounts().first().unwrap());
    drop(table);
    let waiter = std::thread::spawn({
        let mounts = Arc::clone(&mounts);
        move || mounts.umount("/a").unwrap()
    });
    while !user.is_closed() {
        std::thread::yield_now();
    }
    assert!(!waiter.is_finished());
    assert!(weak.upgrade().is_some());
    drop(user);
    waiter.join().unwrap();
    assert!(weak.upgrade().is_none());
}

#[test]
fn replacing_gives_a_new_id_at_the_same_place() {
    let mounts = Mounts::new();
    let old = mount(&mounts, "/a");
    let new = mounts.replace("/a", nothing(), MountOptions::default()).unwrap();
    assert_ne!(old, new);
    assert_eq!(mounts.list().len(), 1);
    assert!(mounts.snapshot().mount(old.get()).is_none());
    assert_eq!(
        mounts.replace("/b", nothing(), MountOptions::default()),
        Err(MountError::NotMounted("/b".to_owned()))
    );
}

#[test]
fn directory_positions_survive_changes() {
    let mounts = Mounts::new();
    for name in ["/a", "/b", "/c"] {
        mount(&mounts, name);
    }
    let table = mounts.snapshot();
    let Some(Target::Pseudo(root)) = table.resolve(1) else {
        panic!()
    };
    let position_of_b = table
        .entries(root, 0)
        .find(|(_, name, _)| *name == b"b")
        .unwrap()
        .0;
    drop(table);
    mounts.umount("/a").unwrap();
    let table = mounts.snapshot();
    let Some(Target::Pseudo(root)) = table.resolve(1) else {
        panic!()
    };
    let rest: Vec<_> = table
        .entries(root, position_of_b)
        .map(|(_, name, _)| name)
        .collect();
    assert_eq!(rest, [b"c"]);
}

#[test]
fn only_the_first_host_tree_keeps_the_host_inode_numbers() {
    let mounts = Mounts::new();
    mount(&mounts, "/a");
    mount(&mounts, "/b");
    let masks: Vec<u64> = mounts
        .snapshot()
        .mounts()
        .iter()
        .map(|mount| mount.ino_mask)
        .collect();
    assert_eq!(masks, [0, 2 << 40]);
}
