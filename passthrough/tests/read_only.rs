//! A read-only mount refuses every change before any system call: a process that may make none but `write` and `exit`
//! tries them all.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::cell::RefCell;
use std::io::{self, Read};
use std::os::fd::AsRawFd;

use common::*;
use fuse_backend_rs::abi::fuse_abi::{CreateIn, SetattrValid, stat64};
use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use rafsd_passthrough::{CreateExtras, Quota};

type Attempt<'a> = (String, Box<dyn Fn() -> io::Result<()> + 'a>);

const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;

fn attempts<'a>(share: &'a Share, file: u64, handle: u64, listing: u64) -> Vec<Attempt<'a>> {
    let fs = &share.fs;
    let mut all: Vec<Attempt> = Vec::new();
    let mut add = |what: String, attempt: Box<dyn Fn() -> io::Result<()> + 'a>| all.push((what, attempt));
    let ctx: &Context = Box::leak(Box::new(user(1000, 1000)));
    for kind in [
        0,
        libc::S_IFREG,
        libc::S_IFIFO,
        libc::S_IFSOCK,
        libc::S_IFCHR,
        libc::S_IFBLK,
    ] {
        add(
            format!("MKNOD {kind:o}"),
            Box::new(move || fs.mknod(ctx, ROOT, c"new", kind | 0o600, 0, 0o22).map(drop)),
        );
    }
    add(
        "MKDIR".into(),
        Box::new(|| fs.mkdir(ctx, ROOT, c"new", 0o755, 0o22).map(drop)),
    );
    add(
        "SYMLINK".into(),
        Box::new(|| fs.symlink(ctx, c"x", ROOT, c"new").map(drop)),
    );
    add(
        "LINK".into(),
        Box::new(move || fs.link(ctx, file, ROOT, c"new").map(drop)),
    );
    add("UNLINK".into(), Box::new(|| fs.unlink(ctx, ROOT, c"file")));
    add("RMDIR".into(), Box::new(|| fs.rmdir(ctx, ROOT, c"directory")));
    for flags in [
        0,
        libc::RENAME_NOREPLACE,
        libc::RENAME_EXCHANGE,
        libc::RENAME_WHITEOUT,
        1 << 30,
    ] {
        add(
            format!("RENAME {flags}"),
            Box::new(move || fs.rename(ctx, ROOT, c"file", ROOT, c"other", flags)),
        );
    }
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_EXCL] {
        for name in [c"file", c"new"] {
            let args = CreateIn {
                flags: flags as u32,
                mode: 0o600,
                umask: 0o22,
                fuse_flags: 0,
            };
            add(
                format!("CREATE {flags:#x} {name:?}"),
                Box::new(move || fs.create(ctx, ROOT, name, args).map(drop)),
            );
        }
    }
    add(
        "TMPFILE".into(),
        Box::new(|| {
            fs.tmpfile(
                ctx,
                ROOT,
                libc::O_RDWR as u32,
                0o600,
                0o22,
                &CreateExtras::default(),
            )
            .map(drop)
        }),
    );
    for flags in [
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_WRONLY | libc::O_APPEND,
        libc::O_RDONLY | libc::O_TRUNC,
        libc::O_ACCMODE,
    ] {
        for kill in [0, 1] {
            add(
                format!("OPEN {flags:#x} {kill}"),
                Box::new(move || fs.open(ctx, file, flags as u32, kill).map(drop)),
            );
        }
    }
    let kinds = [
        SetattrValid::MODE,
        SetattrValid::UID,
        SetattrValid::GID,
        SetattrValid::SIZE,
        SetattrValid::SIZE | SetattrValid::KILL_SUIDGID,
        SetattrValid::ATIME,
        SetattrValid::MTIME,
        SetattrValid::ATIME_NOW,
        SetattrValid::MTIME_NOW,
        SetattrValid::CTIME,
        SetattrValid::empty(),
        SetattrValid::all(),
    ];
    for valid in kinds {
        for through in [None, Some(handle)] {
            // SAFETY: the struct consists of integers only.
            let attr: stat64 = unsafe { std::mem::zeroed() };
            add(
                format!("SETATTR {valid:?} {through:?}"),
                Box::new(move || fs.setattr(ctx, file, attr, through, valid).map(drop)),
            );
        }
    }
    for kill in [0, 4] {
        for flags in [0, libc::O_APPEND, libc::O_SYNC] {
            let data = RefCell::new(Source::new(b"data"));
            add(
                format!("WRITE {flags:#x} {kill}"),
                Box::new(move || {
                    let from = &mut *data.borrow_mut();
                    fs.write(ctx, file, handle, from, 4, 0, None, false, flags as u32, kill)
                        .map(drop)
                }),
            );
        }
    }
    for mode in [0, 1, 2 | 1, 8, 0x10, 0x20, 0x40] {
        add(
            format!("FALLOCATE {mode:#x}"),
            Box::new(move || fs.fallocate(ctx, file, handle, mode, 0, 4096)),
        );
    }
    add(
        "COPY_FILE_RANGE".into(),
        Box::new(move || {
            fs.copy_file_range(ctx, (file, handle, 0), (file, handle, 4), 1, 0)
                .map(drop)
        }),
    );
    for name in [
        c"user.a",
        c"trusted.a",
        c"security.capability",
        c"system.posix_acl_access",
    ] {
        for kill in [false, true] {
            add(
                format!("SETXATTR {name:?} {kill}"),
                Box::new(move || fs.setxattr_with(file, name, b"value", 0, kill)),
            );
        }
        add(
            format!("REMOVEXATTR {name:?}"),
            Box::new(move || fs.removexattr(ctx, file, name)),
        );
    }
    for (node, opened) in [(file, handle), (ROOT, listing)] {
        for (command, size) in [(FS_IOC_SETFLAGS, 4), (FS_IOC_FSSETXATTR, 28)] {
            let argument = vec![0; size];
            add(
                format!("IOCTL {command:#x} on {node}"),
                Box::new(move || {
                    fs.ioctl_inline(ctx, node, opened, command, &argument, 0)
                        .map(drop)
                }),
            );
        }
    }
    add(
        "ACCESS for writing".into(),
        Box::new(move || fs.access(ctx, file, libc::W_OK as u32)),
    );
    all
}

#[test]
fn a_read_only_mount_refuses_every_change_without_a_system_call() {
    for limited in [false, true] {
        let share = Share::with(|options| {
            options.read_only = true;
            if limited {
                options.quota = Quota {
                    bytes: Some(1 << 20),
                    inodes: Some(10),
                };
            }
        });
        std::fs::write(share.path("file"), b"data").unwrap();
        std::fs::create_dir(share.path("directory")).unwrap();
        let file = share.lookup(ROOT, c"file").unwrap().inode;
        let handle = share.open(file, libc::O_RDONLY).unwrap();
        let listing = share.fs.opendir(&root(), ROOT, 0).unwrap().0.unwrap();
        let all = attempts(&share, file, handle, listing);
        let before = std::fs::metadata(share.path("file")).unwrap();

        let codes = in_a_strict_process(&all);
        for ((what, _), code) in all.iter().zip(&codes) {
            assert_eq!(*code, libc::EROFS, "{what}");
        }
        let ended = all.get(codes.len()).map(|(what, _)| what);
        assert_eq!(ended, None, "made a system call");
        let after = std::fs::metadata(share.path("file")).unwrap();
        assert_eq!(before.modified().unwrap(), after.modified().unwrap());
        assert_eq!(share.read(file, handle, 9, 0).unwrap(), b"data");
        assert_eq!(share.names(ROOT), [".", "..", "directory", "file"]);
    }
}

/// The errno of each attempt (0: it went well), made by a process that the kernel ends at the first system call which is
/// not `read`, `write` or `exit`.
fn in_a_strict_process(all: &[Attempt]) -> Vec<i32> {
    let (mut results, answers) = io::pipe().unwrap();
    // SAFETY: the child makes no use of locks that other threads of this process may have held, and ends by `exit`.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: as above; the calls take integers only, and `write` the bytes of a local.
            unsafe {
                libc::prctl(libc::PR_SET_SECCOMP, 1, 0, 0, 0);
                for (_, attempt) in all {
                    let code = match attempt() {
                        Ok(()) => 0,
                        Err(error) => error.raw_os_error().unwrap_or(-1),
                    };
                    let bytes = code.to_ne_bytes();
                    libc::write(answers.as_raw_fd(), bytes.as_ptr().cast(), bytes.len());
                }
                libc::syscall(libc::SYS_exit, 0);
            }
            unreachable!()
        }
        child => {
            assert!(child > 0, "{}", io::Error::last_os_error());
            drop(answers);
            let mut bytes = Vec::new();
            results.read_to_end(&mut bytes).unwrap();
            let mut status = 0;
            // SAFETY: the child is ours, and `status` is a local.
            unsafe { libc::waitpid(child, &mut status, 0) };
            bytes
                .chunks_exact(4)
                .map(|code| i32::from_ne_bytes(code.try_into().unwrap()))
                .collect()
        }
    }
}

#[test]
fn the_strict_process_ends_at_a_system_call() {
    let all: Vec<Attempt> = vec![
        ("nothing".into(), Box::new(|| Ok(()))),
        (
            "one call".into(),
            Box::new(|| {
                // SAFETY: -1 is no descriptor.
                let closed = unsafe { libc::close(-1) };
                if closed == 0 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            }),
        ),
        ("never".into(), Box::new(|| Ok(()))),
    ];
    assert_eq!(in_a_strict_process(&all), [0]);
}
