//! What a hostile guest, and a host that changes under the daemon's feet, must not achieve.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::ffi::CString;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::FileSystem;
use rafsd_passthrough::CreateExtras;

/// Everything below a directory, with contents, as text.
fn snapshot(path: &std::path::Path) -> String {
    let mut entries: Vec<_> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    entries
        .into_iter()
        .map(|path| {
            let meta = std::fs::symlink_metadata(&path).unwrap();
            let content = if meta.is_dir() {
                snapshot(&path)
            } else if meta.is_file() {
                String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned()
            } else {
                String::new()
            };
            format!("{}:{:?}:{content}\n", path.display(), meta.permissions())
        })
        .collect()
}

#[test]
fn no_name_leads_out_of_its_directory() {
    let share = Share::new();
    std::fs::create_dir(share.outside("secret")).unwrap();
    std::fs::write(share.outside("secret/file"), b"secret").unwrap();
    let dir = share.mkdir(ROOT, c"dir");
    let (file, _) = share.create(dir, c"file");
    let before = snapshot(&share.outside("secret"));
    let absolute = CString::new(share.outside("secret/file").to_str().unwrap()).unwrap();
    let hostile = [
        c"".to_owned(),
        c"/".to_owned(),
        c".".to_owned(),
        c"..".to_owned(),
        c"../..".to_owned(),
        c"../../secret".to_owned(),
        c"../../secret/file".to_owned(),
        c"../secret/file".to_owned(),
        c"./file".to_owned(),
        c"file/".to_owned(),
        c"dir/../../secret".to_owned(),
        c"/etc/passwd".to_owned(),
        c"//etc".to_owned(),
        CString::new(vec![b'a'; 256]).unwrap(),
        CString::new(vec![b'a'; 70_000]).unwrap(),
        absolute,
    ];
    let (fs, ctx) = (&share.fs, &root());
    let args = CreateIn {
        flags: libc::O_RDWR as u32,
        mode: 0o600,
        umask: 0,
        fuse_flags: 0,
    };
    for name in &hostile {
        let dots = name.as_c_str() == c"." || name.as_c_str() == c"..";
        if !dots {
            assert!(fs.lookup(ctx, dir, name).is_err(), "lookup {name:?}");
            assert!(fs.lookup(ctx, ROOT, name).is_err(), "lookup {name:?} in the root");
        }
        assert!(fs.mkdir(ctx, dir, name, 0o755, 0).is_err(), "mkdir {name:?}");
        assert!(
            fs.mknod(ctx, dir, name, libc::S_IFREG, 0, 0).is_err(),
            "mknod {name:?}"
        );
        assert!(fs.create(ctx, dir, name, args).is_err(), "create {name:?}");
        assert!(fs.symlink(ctx, c"x", dir, name).is_err(), "symlink {name:?}");
        assert!(fs.link(ctx, file, dir, name).is_err(), "link {name:?}");
        assert!(fs.unlink(ctx, dir, name).is_err(), "unlink {name:?}");
        assert!(fs.rmdir(ctx, dir, name).is_err(), "rmdir {name:?}");
        assert!(
            fs.rename(ctx, dir, name, dir, c"new", 0).is_err(),
            "rename {name:?}"
        );
        for flags in [
            0,
            libc::RENAME_EXCHANGE,
            libc::RENAME_NOREPLACE,
            libc::RENAME_WHITEOUT,
        ] {
            assert!(
                fs.rename(ctx, dir, c"file", dir, name, flags).is_err(),
                "rename to {name:?}"
            );
        }
    }
    assert_eq!(snapshot(&share.outside("secret")), before);
    assert_eq!(share.names(ROOT), [".", "..", "dir"]);
    assert_eq!(share.names(dir), [".", "..", "file"]);
}

#[test]
fn symbolic_links_are_handed_over_and_never_followed() {
    let share = Share::new();
    std::fs::create_dir(share.outside("secret")).unwrap();
    std::fs::write(share.outside("secret/file"), b"secret").unwrap();
    symlink(share.outside("secret"), share.path("to_dir")).unwrap();
    symlink(share.outside("secret/file"), share.path("to_file")).unwrap();
    symlink("/proc/self/root", share.path("magic")).unwrap();
    let before = snapshot(&share.outside("secret"));
    let (fs, ctx) = (&share.fs, &root());
    for name in [c"to_dir", c"to_file", c"magic"] {
        let entry = share.lookup(ROOT, name).unwrap();
        assert_eq!(entry.attr.st_mode & libc::S_IFMT, libc::S_IFLNK);
        let node = entry.inode;
        assert_eq!(code(share.lookup(node, c"file")), libc::ENOTDIR);
        assert_eq!(code(fs.mkdir(ctx, node, c"new", 0o755, 0)), libc::ENOTDIR);
        assert_eq!(code(fs.unlink(ctx, node, c"file")), libc::ENOTDIR);
        assert_eq!(
            code(fs.rename(ctx, node, c"file", ROOT, c"file", 0)),
            libc::ENOTDIR
        );
        assert_eq!(code(fs.opendir(ctx, node, 0)), libc::ENOTDIR);
        for flags in [
            libc::O_RDONLY,
            libc::O_RDWR,
            libc::O_WRONLY | libc::O_TRUNC,
            libc::O_PATH,
        ] {
            assert_eq!(code(share.open(node, flags)), libc::ELOOP);
        }
    }
    assert_eq!(snapshot(&share.outside("secret")), before);
}

#[test]
fn special_files_are_never_opened() {
    if !privileged("special_files_are_never_opened") {
        return;
    }
    let share = Share::new();
    let make = |name, mode, rdev| {
        share
            .fs
            .mknod(&root(), ROOT, name, mode | 0o666, rdev, 0)
            .unwrap()
            .inode
    };
    let nodes = [
        make(c"fifo", libc::S_IFIFO, 0),
        make(c"socket", libc::S_IFSOCK, 0),
        make(c"tty", libc::S_IFCHR, libc::makedev(5, 0) as u32),
        make(c"null", libc::S_IFCHR, libc::makedev(1, 3) as u32),
        make(c"disk", libc::S_IFBLK, libc::makedev(254, 0) as u32),
    ];
    let started = Instant::now();
    for node in nodes {
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR,
            libc::O_RDWR | libc::O_TRUNC | libc::O_NONBLOCK,
        ] {
            assert_eq!(code(share.open(node, flags)), libc::ENXIO);
        }
        let mut attr = share.stat(node).unwrap();
        attr.st_size = 0;
        let truncate = fuse_backend_rs::abi::fuse_abi::SetattrValid::SIZE;
        assert_eq!(
            code(share.fs.setattr(&root(), node, attr, None, truncate)),
            libc::EINVAL
        );
    }
    for name in [c"fifo", c"tty", c"null", c"disk"] {
        let args = CreateIn {
            flags: libc::O_RDWR as u32,
            mode: 0o600,
            umask: 0,
            fuse_flags: 0,
        };
        assert_eq!(code(share.fs.create(&root(), ROOT, name, args)), libc::ENXIO);
    }
    assert!(
        started.elapsed() < Duration::from_secs(60),
        "an open waited for a peer"
    );
}

#[test]
fn made_up_nodes_and_handles_are_stale() {
    let share = Share::new();
    let (file, handle) = share.create(ROOT, c"file");
    let (fs, ctx) = (&share.fs, &root());
    for node in [0, 2_000, 1 << 39, 1 << 40, u64::MAX] {
        assert_eq!(code(share.lookup(node, c"x")), libc::ESTALE);
        assert_eq!(code(share.stat(node)), libc::ESTALE);
        assert_eq!(code(share.open(node, libc::O_RDONLY)), libc::ESTALE);
        assert_eq!(code(fs.opendir(ctx, node, 0)), libc::ESTALE);
        assert_eq!(code(fs.readlink(ctx, node)), libc::ESTALE);
        assert_eq!(code(fs.statfs(ctx, node)), libc::ESTALE);
        assert_eq!(code(fs.link(ctx, node, ROOT, c"x")), libc::ESTALE);
        assert_eq!(code(fs.getxattr(ctx, node, c"user.x", 0)), libc::ESTALE);
        assert_eq!(code(share.read(node, handle, 1, 0)), libc::EBADF);
        fs.forget(ctx, node, u64::MAX);
    }
    for made_up in [0, handle + 1, u64::MAX] {
        assert_eq!(code(share.read(file, made_up, 1, 0)), libc::EBADF);
        assert_eq!(code(fs.getattr(ctx, file, Some(made_up))), libc::EBADF);
        assert_eq!(
            code(fs.release(ctx, file, 0, made_up, false, false, None)),
            libc::EBADF
        );
    }
    share.read(file, handle, 1, 0).unwrap();
}

#[test]
fn a_handle_works_on_its_own_node_alone() {
    let share = Share::new();
    let (_, handle) = share.create(ROOT, c"one");
    let (two, _) = share.create(ROOT, c"two");
    assert_eq!(code(share.read(two, handle, 1, 0)), libc::EBADF);
    assert_eq!(code(share.write(two, handle, b"x", 0)), libc::EBADF);
}

/// While a thread of the host swaps a directory of the share with a symbolic link out of it, every operation works on
/// the directory, on the link itself, or fails.
#[test]
fn a_swapped_symbolic_link_leads_nobody_out() {
    let share = Share::new();
    std::fs::create_dir(share.outside("secret")).unwrap();
    std::fs::write(share.outside("secret/file"), b"secret").unwrap();
    std::fs::create_dir(share.path("dir")).unwrap();
    std::fs::write(share.path("dir/file"), b"inside").unwrap();
    symlink(share.outside("secret"), share.path("link")).unwrap();
    symlink(share.outside("secret/file"), share.path("filelink")).unwrap();
    std::fs::write(share.path("plain"), b"inside").unwrap();
    let before = snapshot(&share.outside("secret"));
    let stop = AtomicBool::new(false);
    let exchange = |one: &str, other: &str| {
        let (one, other) = (share.path(one), share.path(other));
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        rustix::fs::renameat_with(rustix::fs::CWD, &one, rustix::fs::CWD, &other, flags).unwrap();
    };
    let (fs, ctx) = (&share.fs, &root());
    let mut inside = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                exchange("dir", "link");
                exchange("plain", "filelink");
            }
        });
        // For three seconds, and on a busy machine until the directory was met often enough.
        let begin = Instant::now();
        let over = |seconds| begin.elapsed() > Duration::from_secs(seconds);
        for round in 0u64.. {
            if round % 64 == 0 && over(if inside > 100 { 3 } else { 120 }) {
                break;
            }
            let dir = fs.lookup(ctx, ROOT, c"dir").unwrap().inode;
            if let Ok(file) = fs.lookup(ctx, dir, c"file") {
                let handle = share.open(file.inode, libc::O_RDWR).unwrap();
                assert_eq!(share.read(file.inode, handle, 99, 0).unwrap(), b"inside");
                share.write(file.inode, handle, b"inside", 0).unwrap();
                share.release(file.inode, handle);
                fs.forget(ctx, file.inode, 1);
                inside += 1;
            }
            let args = CreateIn {
                flags: libc::O_RDWR as u32,
                mode: 0o600,
                umask: 0,
                fuse_flags: 0,
            };
            if let Ok((entry, handle, ..)) = fs.create(ctx, dir, c"made", args) {
                share.release(entry.inode, handle.unwrap());
                fs.forget(ctx, entry.inode, 1);
                fs.rename(ctx, dir, c"made", dir, c"moved", 0).unwrap();
                fs.unlink(ctx, dir, c"moved").unwrap();
            }
            if let Ok(entry) = fs.mkdir(ctx, dir, c"sub", 0o755, 0) {
                fs.forget(ctx, entry.inode, 1);
                fs.rmdir(ctx, dir, c"sub").unwrap();
            }
            let truncating = CreateIn {
                flags: (libc::O_RDWR | libc::O_TRUNC) as u32,
                ..args
            };
            if let Ok((entry, handle, ..)) = fs.create(ctx, ROOT, c"plain", truncating) {
                share.write(entry.inode, handle.unwrap(), b"inside", 0).unwrap();
                share.release(entry.inode, handle.unwrap());
                fs.forget(ctx, entry.inode, 1);
            }
            let plain = fs.lookup(ctx, ROOT, c"plain").unwrap();
            if let Ok(handle) = share.open(plain.inode, libc::O_WRONLY | libc::O_TRUNC) {
                share.write(plain.inode, handle, b"inside", 0).unwrap();
                share.release(plain.inode, handle);
            }
            fs.setxattr(ctx, plain.inode, c"user.x", b"y", 0).ok();
            fs.forget(ctx, plain.inode, 1);
            fs.forget(ctx, dir, 1);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(inside > 100, "the directory was met {inside} times");
    assert_eq!(snapshot(&share.outside("secret")), before);
    assert_eq!(fs.inode_count(), 1);
}

#[test]
fn flags_of_an_open_do_not_reach_the_host_unasked() {
    let share = Share::new();
    let (inode, handle) = share.create(ROOT, c"file");
    share.write(inode, handle, b"content", 0).unwrap();
    let creating =
        libc::O_CREAT | libc::O_EXCL | libc::O_TMPFILE | libc::O_DIRECTORY | libc::O_PATH | libc::O_ASYNC;
    let handle = share.open(inode, libc::O_RDONLY | creating).unwrap();
    assert_eq!(share.read(inode, handle, 99, 0).unwrap(), b"content");
    let extras = CreateExtras::default();
    let (entry, handle, _) = share
        .fs
        .tmpfile(
            &root(),
            ROOT,
            (libc::O_RDWR | libc::O_PATH | libc::O_APPEND) as u32,
            0o600,
            0,
            &extras,
        )
        .unwrap();
    share.write(entry.inode, handle, b"x", 0).unwrap();
}
