//! Lookup counts, node ids and descriptors: exact, never reused while known, and all given back.
//!
//! A test program of its own with one test at a time, because descriptors are counted for the whole process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Mutex;

use common::*;
use fuse_backend_rs::api::filesystem::FileSystem;
use proptest::prelude::*;

/// Tests here take turns.
static TURN: Mutex<()> = Mutex::new(());

#[test]
fn everything_is_given_back_after_the_last_forget() {
    let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let share = Share::new();
    let start = open_descriptors();
    let mut counts: HashMap<u64, u64> = HashMap::new();
    for i in 0..200 {
        let name = CString::new(format!("f{i}")).unwrap();
        let (inode, handle) = share.create(ROOT, &name);
        share.write(inode, handle, b"x", 0).unwrap();
        *counts.entry(inode).or_default() += 1;
        *counts
            .entry(share.lookup(ROOT, &name).unwrap().inode)
            .or_default() += 1;
        share.release(inode, handle);
    }
    let handle = share.fs.opendir(&root(), ROOT, 0).unwrap().0.unwrap();
    let add = &mut |_: fuse_backend_rs::api::filesystem::DirEntry,
                    entry: fuse_backend_rs::api::filesystem::Entry| {
        if entry.inode != 0 {
            *counts.entry(entry.inode).or_default() += 1;
        }
        Ok(1)
    };
    share
        .fs
        .readdirplus(&root(), ROOT, handle, 1 << 20, 0, add)
        .unwrap();
    share.fs.releasedir(&root(), ROOT, 0, handle).unwrap();
    // Failures leave nothing behind either.
    for _ in 0..100 {
        assert!(share.lookup(ROOT, c"missing").is_err());
        assert!(share.fs.mkdir(&root(), ROOT, c"f0", 0o755, 0).is_err());
        assert!(share.open(ROOT, libc::O_RDWR).is_err());
    }
    assert_eq!(share.fs.inode_count(), 201);
    assert!(counts.values().all(|count| *count == 3), "{counts:?}");
    for inode in counts.keys() {
        share.fs.forget(&root(), *inode, 2);
    }
    assert_eq!(share.fs.inode_count(), 201);
    share
        .fs
        .batch_forget(&root(), counts.keys().map(|inode| (*inode, 1)).collect());
    assert_eq!((share.fs.inode_count(), share.fs.handle_count()), (1, 0));
    assert_eq!(open_descriptors(), start);
}

#[test]
fn a_new_guest_starts_from_nothing() {
    let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let share = Share::new();
    let start = open_descriptors();
    let dir = share.mkdir(ROOT, c"dir");
    let (inode, handle) = share.create(dir, c"file");
    share.fs.opendir(&root(), dir, 0).unwrap();
    share.fs.destroy();
    assert_eq!((share.fs.inode_count(), share.fs.handle_count()), (1, 0));
    assert_eq!(open_descriptors(), start);
    assert_eq!(code(share.stat(inode)), libc::ESTALE);
    assert_eq!(code(share.read(inode, handle, 1, 0)), libc::EBADF);
    let again = share.lookup(ROOT, c"dir").unwrap();
    assert_ne!(again.inode, dir, "ids of the old guest must not come back");
    assert!(share.lookup(again.inode, c"file").is_ok());
}

#[test]
fn racing_lookups_and_forgets_keep_the_count() {
    let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let share = Share::new();
    std::fs::write(share.path("file"), b"x").unwrap();
    let start = open_descriptors();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5_000 {
                    let inode = share.lookup(ROOT, c"file").unwrap().inode;
                    // While this thread has a count, the node must stay.
                    assert_eq!(share.stat(inode).unwrap().st_size, 1);
                    share.fs.forget(&root(), inode, 1);
                }
            });
        }
    });
    assert_eq!(share.fs.inode_count(), 1);
    assert_eq!(open_descriptors(), start);
}

#[derive(Clone, Debug)]
enum Step {
    Lookup(u8),
    Forget(u8, u8),
    ForgetTooMany(u8),
    Replace(u8),
    Remove(u8),
    Readdirplus(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..6u8).prop_map(Step::Lookup),
        4 => (0..6u8, 1..4u8).prop_map(|(name, count)| Step::Forget(name, count)),
        1 => (0..6u8).prop_map(Step::ForgetTooMany),
        1 => (0..6u8).prop_map(Step::Replace),
        1 => (0..6u8).prop_map(Step::Remove),
        1 => (0..9u8).prop_map(Step::Readdirplus),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// The table against a map from node to count. Nodes are told apart by the content of their file, which is unique.
    #[test]
    fn counts_match_a_model(steps in prop::collection::vec(step(), 1..120)) {
        let _turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let share = Share::new();
        let start = open_descriptors();
        let mut content = 0u32;
        let mut write = |name: u8| {
            content += 1;
            std::fs::remove_file(share.path(&name.to_string())).ok();
            std::fs::write(share.path(&name.to_string()), content.to_string()).unwrap();
        };
        (0..6).for_each(&mut write);
        // node -> (count, content)
        let mut model: HashMap<u64, (u64, String)> = HashMap::new();
        // The node last seen under a name.
        let mut last: HashMap<u8, u64> = HashMap::new();
        let forget = |model: &mut HashMap<u64, (u64, String)>, inode: u64, count: u64| {
            share.fs.forget(&root(), inode, count);
            if let Some((left, _)) = model.get_mut(&inode) {
                *left = left.saturating_sub(count);
            }
            model.retain(|_, (left, _)| *left > 0);
        };
        for step in steps {
            match step {
                Step::Lookup(name) => {
                    let host = std::fs::read_to_string(share.path(&name.to_string()));
                    match share.lookup(ROOT, &CString::new(name.to_string()).unwrap()) {
                        Ok(entry) => {
                            let known = model.entry(entry.inode).or_insert((0, host.unwrap()));
                            known.0 += 1;
                            last.insert(name, entry.inode);
                        }
                        Err(_) => prop_assert!(host.is_err()),
                    }
                }
                Step::Forget(name, count) => {
                    if let Some(inode) = last.get(&name) {
                        forget(&mut model, *inode, u64::from(count));
                    }
                }
                Step::ForgetTooMany(name) => {
                    if let Some(inode) = last.get(&name) {
                        forget(&mut model, *inode, u64::MAX);
                    }
                }
                Step::Replace(name) => write(name),
                Step::Remove(name) => drop(std::fs::remove_file(share.path(&name.to_string()))),
                Step::Readdirplus(room) => {
                    let handle = share.fs.opendir(&root(), ROOT, 0).unwrap().0.unwrap();
                    let mut left = room;
                    share.fs.readdirplus(&root(), ROOT, handle, 1 << 20, 0, &mut |dirent, entry| {
                        if left == 0 {
                            return Ok(0);
                        }
                        left -= 1;
                        if entry.inode != 0 {
                            let path = share.path(std::str::from_utf8(dirent.name).unwrap());
                            let host = std::fs::read_to_string(path).unwrap();
                            model.entry(entry.inode).or_insert((0, host)).0 += 1;
                        }
                        Ok(1)
                    }).unwrap();
                    share.fs.releasedir(&root(), ROOT, 0, handle).unwrap();
                }
            }
            prop_assert_eq!(share.fs.inode_count(), model.len() + 1);
            for (inode, (_, content)) in &model {
                let handle = share.open(*inode, libc::O_RDONLY).unwrap();
                prop_assert_eq!(&share.read(*inode, handle, 99, 0).unwrap(), content.as_bytes());
                share.release(*inode, handle);
            }
        }
        let all: Vec<_> = model.iter().map(|(inode, (count, _))| (*inode, *count)).collect();
        share.fs.batch_forget(&root(), all);
        prop_assert_eq!(share.fs.inode_count(), 1);
        prop_assert_eq!(open_descriptors(), start);
    }
}
