//! The device under every kind of machine: queue sizes, layouts, orders; and what a guest does all day.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::time::Duration;

use crate::support::{
    CONTAINERS, LOWER, RAFS, RAFSD, Served, containers, noise, open, passthrough, passthrough_with,
};
use rafsd_frontend::abi::{init, open_flags};
use rafsd_frontend::daemon::Builder;
use rafsd_frontend::guest::Layout;
use rafsd_frontend::image::Image;
use rafsd_frontend::memory::Place;
use rafsd_frontend::ops::{self, Change, Init};
use rafsd_frontend::random::Random;
use rafsd_frontend::{Guest, Options, Order};

const BORDER: u64 = 32 << 20;

/// Random reads and writes of one file, several in flight, compared with the same done to a vector.
fn exercise(guest: &Guest, top: u64, rounds: usize, seed: u64) {
    const SIZE: usize = 1 << 20;
    let mut random = Random::new(seed);
    let mut model = random.bytes(SIZE);
    let name = format!("file-{seed}");
    let entry = guest.write_file(top, &name, &model).unwrap();
    let fh = guest.open(entry.nodeid, open_flags::RDWR).unwrap();
    for _ in 0..rounds {
        let mut reads = Vec::new();
        for _ in 0..random.below(6) {
            let offset = random.below(SIZE + 5000);
            let len = 1 + [10, 5000, 200_000][random.below(3)].min(random.below(300_000));
            let ticket = guest
                .submit(&ops::read(entry.nodeid, fh, offset as u64, len as u32))
                .unwrap();
            reads.push((offset, len, ticket));
        }
        for (offset, len, ticket) in reads {
            let bytes = guest.wait(ticket).unwrap().ok().unwrap();
            let wanted = &model[offset.min(SIZE)..(offset + len).min(SIZE)];
            assert!(
                bytes == wanted,
                "{len} bytes at {offset}: {} bytes came",
                bytes.len()
            );
        }
        let offset = random.below(SIZE - 70_000);
        let len = 1 + random.below(70_000);
        let data = random.bytes(len);
        assert_eq!(
            guest.write(entry.nodeid, fh, offset as u64, &data).unwrap() as usize,
            len
        );
        model[offset..offset + len].copy_from_slice(&data);
    }
    guest.release(entry.nodeid, fh).unwrap();
    assert!(guest.read_all(entry.nodeid, 1 << 20).unwrap() == model);
    guest.unlink(top, &name).unwrap();
}

#[test]
fn every_machine_reads_and_writes_the_same_bytes() {
    let (daemon, guest, _) = passthrough();
    drop(guest);
    let mut seed = 0;
    for order in [Order::Qemu, Order::CloudHypervisor] {
        for event_idx in [true, false] {
            for (queue_size, indirect) in [
                (2, true),
                (16, true),
                (128, true),
                (1024, true),
                (512, false),
                (1024, false),
            ] {
                let options = Options {
                    order,
                    event_idx,
                    indirect,
                    queue_size,
                    ..Options::default()
                };
                let guest = crate::support::boot(&daemon, &options);
                let top = containers(&guest);
                for layout in [
                    Layout::Linux,
                    Layout::Compact,
                    Layout::Ragged(seed),
                    Layout::Crossing(BORDER),
                ] {
                    // Without tables a request of many pages takes many descriptors.
                    if layout == Layout::Linux && !indirect && queue_size < 1024 {
                        continue;
                    }
                    seed += 1;
                    guest.set_layout(layout);
                    exercise(&guest, top, 12, seed);
                }
                for queue in 0..guest.queues() {
                    guest.wait_idle(queue).unwrap();
                }
                let counts = guest.counts();
                assert_eq!(counts.added, counts.used);
            }
        }
    }
}

#[test]
fn requests_in_more_pieces_than_a_system_call_takes_are_served_whole() {
    let served = Served::new(&[]);
    let (_daemon, guest) = served.start();
    let top = containers(&guest);
    let data = noise(3, 100_000);
    let (entry, fh) = guest.create(top, "crumbs", 0o644, open_flags::RDWR).unwrap();
    let image = open(&guest, &format!("{LOWER}/z-cold"));
    // 3,125 to 33,334 buffers; a system call takes 1,024.
    for size in [32, 8, 3] {
        guest.set_layout(Layout::Crumbs(size));
        let written = guest.write(entry.nodeid, fh, 5, &data).unwrap();
        assert_eq!(written as usize, data.len(), "pieces of {size}");
        let read = guest.read(entry.nodeid, fh, 5, 100_000).unwrap();
        assert!(read == data, "pieces of {size}: {} bytes came", read.len());
        // The file ends in the middle of a system call's worth.
        let read = guest.read(entry.nodeid, fh, 50_005, 100_000).unwrap();
        assert!(
            read == data[50_000..],
            "pieces of {size}: {} bytes came",
            read.len()
        );
        // The first of these waits for its data.
        let read = guest.read(image.node, image.fh, 77, 100_000).unwrap();
        assert!(
            read == served.cold[77..100_077],
            "pieces of {size}: {} bytes came",
            read.len()
        );
        guest.set_layout(Layout::Linux);
        assert!(guest.read(entry.nodeid, fh, 5, 200_000).unwrap() == data);
    }
}

#[test]
fn queues_run_side_by_side() {
    let (_daemon, guest, _) = passthrough_with(Options {
        request_queues: 4,
        queue_size: 64,
        ..Options::default()
    });
    let guest = Arc::new(guest);
    let top = containers(&guest);
    let threads: Vec<_> = (1..=4usize)
        .map(|queue| {
            let guest = guest.clone();
            std::thread::spawn(move || {
                let (file, fh) = guest
                    .create(top, format!("{queue}"), 0o644, open_flags::RDWR)
                    .unwrap();
                for round in 0..300u64 {
                    let data = noise(round * 7 + queue as u64, 5000);
                    let offset = round * 5000;
                    let on = |request: &ops::Request| {
                        guest
                            .wait(guest.submit_on(queue, request).unwrap())
                            .unwrap()
                            .ok()
                            .unwrap()
                    };
                    on(&ops::write(file.nodeid, fh, offset, &data));
                    assert_eq!(on(&ops::read(file.nodeid, fh, offset, 5000)), data);
                    on(&ops::getattr(top, None));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_device_has_as_many_queues_as_it_was_told() {
    let daemon = Builder::new(RAFSD)
        .unwrap()
        .arg("--request-queues")
        .arg("3")
        .start()
        .unwrap();
    let guest = daemon
        .guest(Options {
            request_queues: 3,
            ..Options::default()
        })
        .unwrap();
    assert_eq!(guest.vmm().queue_limit, 4);
    for queue in 1..=3 {
        let ticket = guest.submit_on(queue, &ops::getattr(ops::ROOT, None)).unwrap();
        guest.wait(ticket).unwrap().ok().unwrap();
    }
}

#[test]
fn init_is_negotiated() {
    let (_daemon, guest, _) = passthrough();
    let all = guest.init(&Init::default()).unwrap();
    assert_eq!(all.major, 7);
    assert!(all.minor >= 38, "{all:?}");
    assert!(all.max_write >= 1 << 20 && all.max_pages >= 256, "{all:?}");
    assert_eq!(all.time_gran, 1);
    for (flag, name) in [
        (init::ASYNC_READ, "ASYNC_READ"),
        (init::PARALLEL_DIROPS, "PARALLEL_DIROPS"),
        (init::BIG_WRITES, "BIG_WRITES"),
        (init::MAX_PAGES, "MAX_PAGES"),
        (init::CACHE_SYMLINKS, "CACHE_SYMLINKS"),
        (init::DO_READDIRPLUS, "DO_READDIRPLUS"),
        (init::READDIRPLUS_AUTO, "READDIRPLUS_AUTO"),
        (init::SETXATTR_EXT, "SETXATTR_EXT"),
        (init::SUBMOUNTS, "SUBMOUNTS"),
        (init::CREATE_SUPP_GROUP, "CREATE_SUPP_GROUP"),
        (init::INIT_EXT, "INIT_EXT"),
    ] {
        assert!(all.flags & flag != 0, "{name} is not taken: {:#x}", all.flags);
    }
    for (flag, name) in [
        (init::HANDLE_KILLPRIV_V2, "HANDLE_KILLPRIV_V2"),
        (init::NO_OPEN_SUPPORT, "NO_OPEN_SUPPORT"),
        (init::NO_OPENDIR_SUPPORT, "NO_OPENDIR_SUPPORT"),
        (init::HAS_INODE_DAX, "HAS_INODE_DAX"),
        (init::PASSTHROUGH, "PASSTHROUGH"),
    ] {
        assert!(
            all.flags & flag == 0,
            "{name} must not be taken: {:#x}",
            all.flags
        );
    }
    if all.flags >> 32 != 0 {
        assert!(all.flags & init::INIT_EXT != 0, "flags2 without INIT_EXT");
    }
    // What is not offered is not taken, and a driver that sends 16 bytes is served.
    let old = Init {
        version: (7, 31),
        flags: init::ASYNC_READ | init::DO_READDIRPLUS,
        short: true,
    };
    let answer = guest.init(&old).unwrap();
    assert_eq!(answer.flags & !old.flags, 0);
    guest.getattr(ops::ROOT).unwrap();
}

// --- a day's work on the passthrough tree ---

#[test]
fn a_guest_works_on_the_passthrough_tree() {
    let (_daemon, guest, shared) = passthrough();
    let top = containers(&guest);
    let host = |name: &str| std::fs::symlink_metadata(shared.join(name)).unwrap();

    // Nodes of all kinds; a whiteout of an overlay is the device 0:0.
    let dir = guest.mkdir(top, "dir", 0o750).unwrap();
    assert_eq!(host("dir").mode() & 0o7777, 0o750);
    let file = guest.write_file(top, "file", b"hello").unwrap();
    guest.mknod(top, "whiteout", 0o020000, 0).unwrap();
    assert!(host("whiteout").file_type().is_char_device() && host("whiteout").rdev() == 0);
    guest.mknod(top, "fifo", 0o010644, 0).unwrap();
    assert!(host("fifo").file_type().is_fifo());
    let link = guest.symlink(top, "link", "some/where").unwrap();
    assert_eq!(guest.readlink(link.nodeid).unwrap(), b"some/where");
    let hard = guest.link(file.nodeid, dir.nodeid, "hard").unwrap();
    assert_eq!((hard.nodeid, hard.attr.nlink), (file.nodeid, 2));
    assert_eq!(
        guest
            .create(top, "file", 0o644, open_flags::EXCL)
            .unwrap_err()
            .errno(),
        Some(libc::EEXIST)
    );

    // Attributes.
    let change = Change {
        mode: Some(0o600),
        uid: Some(5),
        gid: Some(6),
        mtime: Some((1_500_000_000, 7)),
        ..Change::default()
    };
    let attr = guest.setattr(file.nodeid, &change).unwrap();
    assert_eq!(
        (attr.mode & 0o7777, attr.uid, attr.gid, attr.mtime),
        (0o600, 5, 6, (1_500_000_000, 7))
    );
    assert_eq!((host("file").uid(), host("file").mtime()), (5, 1_500_000_000));
    guest
        .setattr(
            file.nodeid,
            &Change {
                size: Some(3),
                ..Change::default()
            },
        )
        .unwrap();
    assert_eq!(guest.read_file(format!("{CONTAINERS}/file")).unwrap(), b"hel");

    // Extended attributes, those of overlays among them.
    for name in ["user.one", "trusted.overlay.opaque", "security.capability"] {
        let value: &[u8] = if name == "security.capability" {
            b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
        } else {
            b"y"
        };
        guest.setxattr(file.nodeid, name, value, 0).unwrap();
        assert_eq!(guest.getxattr(file.nodeid, name).unwrap(), value, "{name}");
    }
    assert_eq!(guest.listxattr(file.nodeid).unwrap().len(), 3);
    assert_eq!(
        guest.call(&ops::getxattr(file.nodeid, "user.one", 0)).unwrap()[..4],
        1u32.to_le_bytes()
    );
    let small = guest
        .call(&ops::getxattr(file.nodeid, "security.capability", 3))
        .unwrap_err();
    assert_eq!(small.errno(), Some(libc::ERANGE));
    guest.removexattr(file.nodeid, "user.one").unwrap();
    assert_eq!(
        guest.getxattr(file.nodeid, "user.one").unwrap_err().errno(),
        Some(libc::ENODATA)
    );

    // Renames with all flags.
    guest.write_file(top, "other", b"other").unwrap();
    assert_eq!(
        guest.rename2(top, "file", top, "other", 1).unwrap_err().errno(),
        Some(libc::EEXIST)
    );
    guest.rename2(top, "file", top, "other", 2).unwrap();
    assert_eq!(guest.read_file(format!("{CONTAINERS}/file")).unwrap(), b"other");
    guest.rename2(top, "file", dir.nodeid, "moved", 4).unwrap();
    assert!(
        host("file").file_type().is_char_device(),
        "RENAME_WHITEOUT leaves a whiteout"
    );
    guest
        .call(&ops::rename(dir.nodeid, "moved", top, "back"))
        .unwrap();

    // Open files.
    let (node, fh) = guest
        .create(top, "data", 0o644, open_flags::RDWR)
        .map(|(e, fh)| (e.nodeid, fh))
        .unwrap();
    guest.write(node, fh, 0, &noise(4, 100_000)).unwrap();
    guest.fallocate(node, fh, 3, 8192, 65_536).unwrap();
    assert_eq!(guest.lseek(node, fh, 0, 4).unwrap(), 8192, "SEEK_HOLE");
    assert_eq!(
        guest.lseek(node, fh, 8192, 3).unwrap(),
        8192 + 65_536,
        "SEEK_DATA"
    );
    let (copy, to) = guest
        .create(top, "copy", 0o644, open_flags::RDWR)
        .map(|(e, fh)| (e.nodeid, fh))
        .unwrap();
    assert_eq!(
        guest.copy_file_range((node, fh, 0), (copy, to, 0), 5000).unwrap(),
        5000
    );
    assert_eq!(guest.read(copy, to, 0, 10_000).unwrap(), noise(4, 5000));
    guest.fsync(node, fh).unwrap();
    guest.flush(node, fh).unwrap();
    guest.unlink(top, "data").unwrap();
    assert_eq!(
        guest.read(node, fh, 0, 16).unwrap(),
        noise(4, 16),
        "an open file outlives its name"
    );
    assert_eq!(guest.getattr(node).unwrap().nlink, 0);
    guest.release(node, fh).unwrap();
    let appended = guest.open(copy, open_flags::WRONLY | open_flags::TRUNC).unwrap();
    assert_eq!(guest.getattr(copy).unwrap().size, 0);
    guest.release(copy, appended).unwrap();

    // Directories.
    let names: BTreeSet<_> = guest
        .list(top, true, 300)
        .unwrap()
        .into_iter()
        .map(|entry| entry.name)
        .collect();
    let on_host: BTreeSet<_> = std::fs::read_dir(&shared)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_encoded_bytes())
        .chain([b".".to_vec(), b"..".to_vec()])
        .collect();
    assert_eq!(names, on_host);
    assert_eq!(
        guest.rmdir(top, "dir").unwrap_err().errno(),
        Some(libc::ENOTEMPTY)
    );
    guest.unlink(dir.nodeid, "hard").unwrap();
    guest.rmdir(top, "dir").unwrap();
    assert!(guest.statfs(top).unwrap().bsize > 0);
    guest.call(&ops::syncfs(top)).unwrap();
    let fh = guest.opendir(top).unwrap();
    guest.call(&ops::fsyncdir(top, fh)).unwrap();
}

#[test]
fn new_operations_are_there() {
    let (_daemon, guest, shared) = passthrough();
    let top = containers(&guest);
    let file = guest.write_file(top, "file", b"x").unwrap();
    let statx = guest.statx(file.nodeid, 0xfff).unwrap();
    assert_eq!(
        (statx.size, statx.ino, u32::from(statx.mode)),
        (1, file.attr.ino, file.attr.mode)
    );
    if statx.mask & 0x800 != 0 {
        let created = std::fs::metadata(shared.join("file")).unwrap().created().unwrap();
        let seconds = created.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(statx.btime.0, seconds);
    }
    match guest.tmpfile(top, 0o600, open_flags::RDWR) {
        Ok((entry, fh)) => {
            guest.write(entry.nodeid, fh, 0, b"unnamed").unwrap();
            guest.link(entry.nodeid, top, "named").unwrap();
            guest.release(entry.nodeid, fh).unwrap();
            assert_eq!(std::fs::read(shared.join("named")).unwrap(), b"unnamed");
        }
        // The host's file system may not have it.
        Err(e) => assert_eq!(e.errno(), Some(libc::EOPNOTSUPP)),
    }
    // A guest's overlay that asks whether it may use such files is told no.
    let refused = guest.tmpfile(top, 0, open_flags::RDWR).unwrap_err();
    assert_eq!(refused.errno(), Some(libc::EOPNOTSUPP));
    // FS_IOC_GETFLAGS, as overlayfs asks.
    let fh = guest.open(file.nodeid, 0).unwrap();
    let errno = guest.errno(&ops::ioctl(file.nodeid, fh, 0x8008_6601, 8)).unwrap();
    assert!(errno == 0 || errno == libc::ENOTTY, "{errno}");
}

// --- several mounts under one tag ---

#[test]
fn mounts_appear_and_go_under_a_running_guest() {
    let (daemon, guest, shared) = passthrough();
    let directory = daemon.directory().to_owned();
    let tree = directory.join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("hello"), "hello").unwrap();
    let image = Image::build(RAFS, &tree, &directory.join("image"), &[]).unwrap();
    assert_eq!(
        guest
            .resolve(LOWER)
            .err()
            .and_then(|e| e.errno())
            .unwrap_or(libc::ENOENT),
        libc::ENOENT
    );
    daemon
        .mount_rafs(LOWER, &image.bootstrap, &image.local(&directory.join("cache")))
        .unwrap();
    assert_eq!(guest.read_file(format!("{LOWER}/hello")).unwrap(), b"hello");

    let names = |node| -> BTreeSet<Vec<u8>> {
        guest
            .list(node, false, 4096)
            .unwrap()
            .into_iter()
            .map(|entry| entry.name)
            .collect()
    };
    assert!(names(ops::ROOT).is_superset(&[b"containers".to_vec(), b"rafs".to_vec()].into()));

    // The image is read-only, and the pseudo tree cannot be changed either. ENOSYS would be remembered.
    let lower = guest.resolve(LOWER).unwrap().nodeid;
    let hello = guest.lookup(lower, "hello").unwrap().nodeid;
    let upper = containers(&guest);
    for (node, file) in [(lower, hello), (ops::ROOT, ops::ROOT)] {
        for request in [
            ops::create(node, "new", 0o644, open_flags::RDWR),
            ops::mkdir(node, "new", 0o755),
            ops::mknod(node, "new", 0o100644, 0),
            ops::symlink(node, "new", "x"),
            ops::unlink(node, "hello"),
            ops::rmdir(node, "hello"),
            ops::rename2(node, "hello", node, "new", 0),
            ops::setattr(
                file,
                &Change {
                    mode: Some(0),
                    ..Change::default()
                },
            ),
            ops::setxattr(file, "user.x", b"x", 0, true),
            ops::removexattr(file, "user.x"),
            ops::tmpfile(node, 0o600, open_flags::RDWR),
            ops::fallocate(file, 0, 0, 0, 10),
        ] {
            let errno = guest.errno(&request).unwrap();
            assert_eq!(errno, libc::EROFS, "opcode {} on {node:#x}", request.opcode);
        }
    }
    let wanting = guest.errno(&ops::open(hello, open_flags::RDWR)).unwrap();
    assert_eq!(wanting, libc::EROFS);
    let errno = |request: &ops::Request| guest.errno(request).unwrap();
    assert_eq!(
        errno(&ops::rename2(lower, "hello", upper, "hello", 0)),
        libc::EROFS
    );
    assert_eq!(errno(&ops::link(hello, upper, "hello")), libc::EXDEV);
    let second = directory.join("second");
    std::fs::create_dir(&second).unwrap();
    daemon.mount_passthrough("/volumes/two", &second).unwrap();
    let two = guest.resolve("/volumes/two").unwrap().nodeid;
    let file = guest.write_file(upper, "file", b"x").unwrap().nodeid;
    assert_eq!(errno(&ops::rename2(upper, "file", two, "file", 0)), libc::EXDEV);
    assert_eq!(errno(&ops::link(file, two, "file")), libc::EXDEV);
    guest.unlink(upper, "file").unwrap();

    // Gone is gone: stale nodes and handles, even when another image takes the place.
    let fh = guest.open(hello, 0).unwrap();
    daemon.umount(LOWER).unwrap();
    assert_eq!(guest.errno(&ops::getattr(hello, None)).unwrap(), libc::ESTALE);
    assert_eq!(guest.errno(&ops::read(hello, fh, 0, 10)).unwrap(), libc::ESTALE);
    std::fs::write(tree.join("hello"), "other").unwrap();
    let other = Image::build(RAFS, &tree, &directory.join("other"), &[]).unwrap();
    daemon
        .mount_rafs(LOWER, &other.bootstrap, &other.local(&directory.join("cache")))
        .unwrap();
    assert_eq!(guest.errno(&ops::read(hello, fh, 0, 10)).unwrap(), libc::ESTALE);
    assert_eq!(guest.read_file(format!("{LOWER}/hello")).unwrap(), b"other");
    assert!(shared.read_dir().unwrap().next().is_none());
}

#[test]
fn an_unmount_waits_for_nobody_for_ever() {
    let served = Served::new(&[]);
    let (daemon, guest) = served.start();
    let cold = open(&guest, &format!("{LOWER}/z-cold"));
    served.registry.set(|fault| fault.stalled = true);
    let ticket = guest
        .submit(&ops::read(cold.node, cold.fh, 5 << 20, 4096))
        .unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let start = std::time::Instant::now();
    daemon.umount(LOWER).unwrap();
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_ne!(guest.wait(ticket).unwrap().errno, 0);
    guest.getattr(containers(&guest)).unwrap();
}

// --- signals ---

#[test]
fn signals_are_batched_under_load() {
    let (_daemon, guest, _) = passthrough_with(Options {
        regions: vec![Place {
            address: 0,
            size: 64 << 20,
        }],
        ..Options::default()
    });
    let top = containers(&guest);
    let before = guest.counts();
    for _ in 0..200 {
        let tickets = guest.submit_all(1, &vec![ops::getattr(top, None); 32]).unwrap();
        for ticket in tickets {
            guest.wait(ticket).unwrap().ok().unwrap();
        }
    }
    let (calls, used) = (
        guest.counts().calls - before.calls,
        guest.counts().used - before.used,
    );
    assert!(calls * 4 < used, "{calls} signals for {used} requests");
}
