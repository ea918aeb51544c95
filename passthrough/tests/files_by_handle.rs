//! Nodes kept by file handle, within a budget of descriptors.
//!
//! Descriptors are counted for the whole process, so tests here take turns.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashMap;
use std::ffi::CString;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard};

use common::*;
use fuse_backend_rs::api::filesystem::FileSystem;
use rafsd_passthrough::{CreateExtras, FdBudget, InodeFiles};

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn share(limit: usize) -> Share {
    Share::with(|options| options.budget = Some(FdBudget::new(limit)))
}

fn name(i: usize) -> CString {
    CString::new(format!("f{i}")).unwrap()
}

/// Whether the temporary directory lies on a file system whose files can be opened by handle, by this process.
fn handles_work(test: &str) -> bool {
    let share = share(16);
    for i in 0..64 {
        std::fs::write(share.path(name(i).to_str().unwrap()), b"").unwrap();
    }
    let works = (0..64).all(|i| share.lookup(ROOT, &name(i)).is_ok());
    if !works {
        println!("SKIPPED {test}: no file handles here");
    }
    works
}

#[test]
fn many_files_take_few_descriptors() {
    let _turn = turn();
    if !handles_work("many_files_take_few_descriptors") {
        return;
    }
    const FILES: usize = 3_000;
    const LIMIT: usize = 100;
    let share = share(LIMIT);
    for i in 0..FILES {
        std::fs::write(share.path(name(i).to_str().unwrap()), i.to_string()).unwrap();
    }
    let start = open_descriptors();
    let nodes: Vec<u64> = (0..FILES)
        .map(|i| share.lookup(ROOT, &name(i)).unwrap().inode)
        .collect();
    assert_eq!(share.fs.inode_count(), FILES + 1);
    for _ in 0..2 {
        for (i, node) in nodes.iter().enumerate() {
            assert_eq!(share.stat(*node).unwrap().st_size, i.to_string().len() as i64);
            let handle = share.open(*node, libc::O_RDONLY).unwrap();
            assert_eq!(share.read(*node, handle, 9, 0).unwrap(), i.to_string().as_bytes());
            share.release(*node, handle);
            assert_eq!(
                share.lookup(ROOT, &name(i)).unwrap().inode,
                *node,
                "a node keeps its id without a descriptor"
            );
            assert!(
                open_descriptors() <= start + LIMIT + 1,
                "{} descriptors",
                open_descriptors() - start
            );
            assert!(share.fs.budget().used() <= LIMIT);
        }
    }
    for node in nodes {
        share.fs.forget(&root(), node, 3);
    }
    assert_eq!((share.fs.inode_count(), share.fs.budget().used()), (1, 0));
    assert_eq!(open_descriptors(), start);
}

#[test]
fn an_inode_number_that_is_used_again_is_a_new_node() {
    let _turn = turn();
    if !handles_work("an_inode_number_that_is_used_again_is_a_new_node") {
        return;
    }
    let share = share(16);
    let fill = |share: &Share| {
        // Pushes everything else out of the budget.
        for i in 0..64 {
            std::fs::write(share.path(name(i).to_str().unwrap()), b"").unwrap();
            share.lookup(ROOT, &name(i)).unwrap();
        }
    };
    let mut reused = 0;
    for round in 0..20 {
        std::fs::write(share.path("old"), b"old").unwrap();
        let old = share.lookup(ROOT, c"old").unwrap();
        fill(&share);
        // By the host, behind the guest's back.
        std::fs::remove_file(share.path("old")).unwrap();
        std::fs::write(share.path("new"), b"newer").unwrap();
        if std::fs::metadata(share.path("new")).unwrap().ino() == old.attr.st_ino {
            reused += 1;
            let new = share.lookup(ROOT, c"new").unwrap();
            assert_ne!(new.inode, old.inode);
            assert_eq!(share.stat(new.inode).unwrap().st_size, 5);
            assert_eq!(code(share.stat(old.inode)), libc::ESTALE, "round {round}");
            assert_eq!(code(share.open(old.inode, libc::O_RDONLY)), libc::ESTALE);
            share.fs.forget(&root(), old.inode, 1);
            assert_eq!(share.lookup(ROOT, c"new").unwrap().inode, new.inode);
        }
        std::fs::remove_file(share.path("new")).unwrap();
    }
    if reused == 0 {
        println!("SKIPPED: the file system did not use an inode number again");
    }
}

#[test]
fn a_file_without_a_name_lives_while_it_is_known() {
    let _turn = turn();
    if !handles_work("a_file_without_a_name_lives_while_it_is_known") {
        return;
    }
    let share = share(32);
    let (file, handle) = share.create(ROOT, c"file");
    share.write(file, handle, b"file", 0).unwrap();
    share.release(file, handle);
    let (replaced, handle) = share.create(ROOT, c"replaced");
    share.release(replaced, handle);
    let dir = share.mkdir(ROOT, c"dir");
    let extras = CreateExtras::default();
    let (tmp, handle, _) = share
        .fs
        .tmpfile(&root(), ROOT, libc::O_RDWR as u32, 0o600, 0, &extras)
        .unwrap();
    share.release(tmp.inode, handle);
    let (kept, handle) = share.create(ROOT, c"kept");
    share.release(kept, handle);
    share.fs.link(&root(), kept, ROOT, c"kept2").unwrap();

    let push = |share: &Share| {
        for i in 0..200 {
            std::fs::write(share.path(name(i).to_str().unwrap()), b"").unwrap();
            share.lookup(ROOT, &name(i)).unwrap();
        }
    };
    push(&share);
    share.fs.unlink(&root(), ROOT, c"file").unwrap();
    share
        .fs
        .rename(&root(), ROOT, c"kept2", ROOT, c"replaced", 0)
        .unwrap();
    share.fs.rmdir(&root(), ROOT, c"dir").unwrap();
    share.fs.unlink(&root(), ROOT, c"kept").unwrap();
    push(&share);
    for node in [file, replaced, dir, tmp.inode] {
        assert_eq!(share.stat(node).unwrap().st_nlink, 0);
    }
    assert_eq!(share.stat(kept).unwrap().st_nlink, 1);
    let handle = share.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(share.read(file, handle, 9, 0).unwrap(), b"file");
    // Only as many as the budget allows are held that way; the rest goes with its name, and nothing else fails.
    let many: Vec<u64> = (0..100)
        .map(|i| share.lookup(ROOT, &name(i)).unwrap().inode)
        .collect();
    (0..100).for_each(|i| share.fs.unlink(&root(), ROOT, &name(i)).unwrap());
    let held = many.iter().filter(|node| share.stat(**node).is_ok()).count();
    assert!(held > 10 && held <= 32, "{held} nameless files are held");
    assert!(share.lookup(ROOT, &name(150)).is_ok());
    assert!(share.fs.budget().used() <= 32);
}

#[test]
fn open_files_have_precedence_and_an_end() {
    let _turn = turn();
    let share = share(40);
    let (node, first) = share.create(ROOT, c"file");
    let mut open = vec![first];
    let refused = loop {
        match share.open(node, libc::O_RDONLY) {
            Ok(handle) => open.push(handle),
            Err(error) => break error,
        }
        assert!(open.len() <= 40);
    };
    assert_eq!(refused.raw_os_error(), Some(libc::ENFILE));
    assert!(open.len() >= 39);
    assert_eq!(code(share.fs.opendir(&root(), ROOT, 0)), libc::ENFILE);
    assert_eq!(
        code(share.create_as(&root(), ROOT, c"new", 0o600, 0)),
        libc::ENFILE
    );
    assert!(!exists(&share.path("new")));
    // What needs no descriptor for long still works.
    std::fs::write(share.path("other"), b"1234").unwrap();
    if let Ok(other) = share.lookup(ROOT, c"other") {
        assert_eq!(share.stat(other.inode).unwrap().st_size, 4);
    }
    for handle in open.drain(..) {
        share.release(node, handle);
    }
    share.fs.opendir(&root(), ROOT, 0).unwrap();
}

#[test]
fn mounts_share_one_budget() {
    let _turn = turn();
    let budget = FdBudget::new(32);
    let one = Share::with(|options| options.budget = Some(budget.clone()));
    let two = Share::with(|options| options.budget = Some(budget.clone()));
    for share in [&one, &two] {
        for i in 0..100 {
            std::fs::write(share.path(name(i).to_str().unwrap()), b"").unwrap();
            share.lookup(ROOT, &name(i)).ok();
            assert!(budget.used() <= budget.limit());
        }
    }
    drop(one);
    two.fs.destroy();
    assert_eq!(budget.used(), 0);
}

#[test]
fn both_ways_of_keeping_files_answer_alike() {
    let _turn = turn();
    let mut answers = Vec::new();
    for files in [InodeFiles::Handles, InodeFiles::Descriptors] {
        let share = Share::with(|options| options.inode_files = files);
        let dir = share.mkdir(ROOT, c"dir");
        let mut seen = HashMap::new();
        for i in 0..50 {
            let (node, handle) = share.create(dir, &name(i));
            share.write(node, handle, &vec![1; i], 0).unwrap();
            share.release(node, handle);
            if i % 3 == 0 {
                share.fs.unlink(&root(), dir, &name(i)).unwrap();
            }
            let stat = share.stat(node).unwrap();
            seen.insert(i, (stat.st_nlink, stat.st_size, stat.st_mode));
        }
        answers.push((share.names(dir), seen, share.fs.inode_count()));
    }
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn threads_that_compete_for_descriptors_get_their_own_files() {
    let _turn = turn();
    let share = share(16);
    for i in 0..64 {
        std::fs::write(share.path(name(i).to_str().unwrap()), i.to_string()).unwrap();
    }
    let nodes: Vec<Option<u64>> = (0..64)
        .map(|i| share.lookup(ROOT, &name(i)).ok().map(|entry| entry.inode))
        .collect();
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (share, nodes) = (&share, &nodes);
            scope.spawn(move || {
                for round in 0..4_000usize {
                    let i = (round * (thread * 2 + 1)) % 64;
                    let Some(node) = nodes[i] else { continue };
                    assert_eq!(share.stat(node).unwrap().st_size, i.to_string().len() as i64);
                    match share.open(node, libc::O_RDONLY) {
                        Ok(handle) => {
                            assert_eq!(share.read(node, handle, 9, 0).unwrap(), i.to_string().as_bytes());
                            share.release(node, handle);
                        }
                        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENFILE)),
                    }
                    let again = share.lookup(ROOT, &name(i)).unwrap().inode;
                    assert_eq!(again, node);
                    share.fs.forget(&root(), node, 1);
                    // A rename within one directory takes its descriptor twice.
                    let own = CString::new(format!("own{thread}")).unwrap();
                    let (made, handle) = match share.create_as(&root(), ROOT, &own, 0o600, 0) {
                        Ok(made) => made,
                        Err(error) => {
                            assert_eq!(error.raw_os_error(), Some(libc::ENFILE));
                            continue;
                        }
                    };
                    share.release(made, handle);
                    let moved = CString::new(format!("moved{thread}")).unwrap();
                    share.fs.rename(&root(), ROOT, &own, ROOT, &moved, 0).unwrap();
                    share.fs.unlink(&root(), ROOT, &moved).unwrap();
                    share.fs.forget(&root(), made, 1);
                }
            });
        }
    });
    assert!(share.fs.budget().used() <= 16);
}

/// Memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim()
        .trim_end_matches(" kB")
        .trim()
        .parse::<usize>()
        .unwrap()
        * 1024
}

#[test]
#[ignore = "makes a million files: takes minutes"]
fn a_million_files_take_bounded_memory_and_give_it_back() {
    let _turn = turn();
    const DIRECTORIES: usize = 1_000;
    const FILES: usize = 1_000;
    const LIMIT: usize = 512;
    let share = share(LIMIT);
    for directory in 0..DIRECTORIES {
        std::fs::create_dir(share.path(&format!("f{directory}"))).unwrap();
        for file in 0..FILES {
            std::fs::File::create(share.path(&format!("f{directory}/f{file}"))).unwrap();
        }
    }
    let (descriptors, before) = (open_descriptors(), resident());
    let mut nodes = Vec::with_capacity(DIRECTORIES * (FILES + 1));
    let empty = resident();
    for directory in 0..DIRECTORIES {
        let parent = share.lookup(ROOT, &name(directory)).unwrap().inode;
        nodes.push(parent);
        for file in 0..FILES {
            nodes.push(share.lookup(parent, &name(file)).unwrap().inode);
        }
        assert!(open_descriptors() <= descriptors + LIMIT + 1);
    }
    let full = resident();
    println!(
        "{} nodes, {} bytes each",
        nodes.len(),
        (full - empty) / nodes.len()
    );
    for node in nodes.iter().step_by(997) {
        share.stat(*node).unwrap();
    }
    for node in &nodes {
        share.fs.forget(&root(), *node, 1);
    }
    drop(nodes);
    // SAFETY: has the allocator return what is free to the system, nothing more.
    unsafe { libc::malloc_trim(0) };
    println!(
        "{} KiB more than before",
        resident().saturating_sub(before) / 1024
    );
    assert_eq!((share.fs.inode_count(), share.fs.budget().used()), (1, 0));
    assert_eq!(open_descriptors(), descriptors);
    assert!(
        (full - empty) / (DIRECTORIES * FILES) < 250,
        "{} bytes in all",
        full - empty
    );
    assert!(resident().saturating_sub(before) < 16 << 20);
}
