//! Operations on the pseudo tree and on host trees.

use crate::setup::Setup;
use rafsd_frontend::Options;

#[test]
fn a_file_written_by_the_guest_is_on_the_host() {
    let setup = Setup::new();
    let root = setup.host("/containers", "host");
    let guest = setup.guest();
    let top = guest.resolve("/containers").unwrap();
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    guest.write_file(top.nodeid, "data", &data).unwrap();
    assert_eq!(std::fs::read(root.join("data")).unwrap(), data);
    assert_eq!(guest.read_file("/containers/data").unwrap(), data);
}

#[test]
fn the_pseudo_tree_lists_what_is_mounted() {
    let setup = Setup::new();
    setup.host("/containers", "one");
    setup.host("/rafs/a/lowerdir", "two");
    let guest = setup.guest();
    for plus in [false, true] {
        let names: Vec<Vec<u8>> = guest
            .list(1, plus, 4096)
            .unwrap()
            .into_iter()
            .map(|entry| entry.name)
            .filter(|name| name != b"." && name != b"..")
            .collect();
        assert_eq!(names, [b"containers".to_vec(), b"rafs".to_vec()]);
    }
    guest.resolve("/rafs/a/lowerdir").unwrap();
    setup.mounts.umount("/rafs/a/lowerdir").unwrap();
    assert!(guest.resolve("/rafs").is_err());
}

#[test]
fn every_queue_and_ring_layout_serves() {
    let setup = Setup::new();
    let root = setup.host("/", "host");
    std::fs::write(root.join("file"), vec![7; 300_000]).unwrap();
    for (event_idx, indirect, queue_size) in [
        (true, true, 128),
        (false, true, 64),
        (true, false, 1024),
        (false, false, 512),
    ] {
        let options = Options {
            request_queues: 3,
            event_idx,
            indirect,
            queue_size,
            ..Options::default()
        };
        let guest = setup.guest_with(options);
        assert_eq!(guest.read_file("/file").unwrap(), vec![7; 300_000]);
        guest.stop().unwrap();
    }
}
