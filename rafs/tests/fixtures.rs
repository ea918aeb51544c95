//! Every fixture, read through the file system interface and a real store, against the truth about it.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use rafsd_rafs::reader::Reader;
use sha2::{Digest, Sha256};
use support::{Expected, ExpectedEntry, Mount, fixture_names, fixtures, image_of};

/// Fixtures that cannot be read yet, and a part of the message that says why.
const UNREADABLE: &[(&str, &str)] = &[];

/// Bytes per read: no divisor of any chunk size, so that reads cross chunks.
const READ: usize = 300_000;

fn kind_of(mode: u32) -> &'static str {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => "dir",
        libc::S_IFREG => "file",
        libc::S_IFLNK => "symlink",
        libc::S_IFIFO => "fifo",
        libc::S_IFSOCK => "socket",
        libc::S_IFCHR => "char",
        libc::S_IFBLK => "block",
        _ => "unknown",
    }
}

fn check_entry(mount: &Mount, expected: &ExpectedEntry, inode: u64) -> Result<(), String> {
    let context = Context::default();
    let fail = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let (stat, timeout) = mount
        .fs
        .getattr(&context, inode, None)
        .map_err(|e| fail("getattr", &e))?;
    assert!(timeout.as_secs() > u32::MAX.into());
    assert_eq!(kind_of(stat.st_mode), expected.kind);
    assert_eq!(format!("{:04o}", stat.st_mode & 0o7777), expected.mode);
    assert_eq!((stat.st_uid, stat.st_gid), (expected.uid, expected.gid));
    assert_eq!((stat.st_mtime, stat.st_mtime_nsec), expected.mtime);
    assert_eq!((stat.st_atime, stat.st_ctime), (stat.st_mtime, stat.st_mtime));
    assert_eq!(stat.st_nlink, expected.nlink);
    assert_eq!(stat.st_ino, inode);
    assert_eq!(
        mount.xattrs(inode).map_err(|e| fail("xattrs", &e))?,
        expected.xattrs()
    );
    if let Some(size) = expected.size {
        assert_eq!(stat.st_size as u64, size);
        assert_eq!(stat.st_blocks as u64, size.div_ceil(512));
    }
    if let Some((major, minor)) = expected.rdev {
        assert_eq!(
            (libc::major(stat.st_rdev), libc::minor(stat.st_rdev)),
            (major, minor)
        );
    }
    if expected.kind == "symlink" {
        let target = mount
            .fs
            .readlink(&context, inode)
            .map_err(|e| fail("readlink", &e))?;
        assert_eq!(target, expected.target());
    }
    if let Some(digest) = &expected.sha256 {
        let size = expected.size.unwrap();
        if size > 1 << 30 {
            return check_huge(mount, inode, size);
        }
        let mut hasher = Sha256::new();
        let mut offset = 0;
        while offset < size {
            let bytes = mount.read(inode, offset, READ)?;
            assert_eq!(bytes.len() as u64, (size - offset).min(READ as u64));
            hasher.update(&bytes);
            offset += bytes.len() as u64;
        }
        assert_eq!(&hex::encode(hasher.finalize()), digest);
        assert!(mount.read(inode, size, 10)?.is_empty(), "end of file");
    }
    Ok(())
}

/// The file beyond 4 GiB: `start`, zeros, `end`, 1000 zeros. Hashing it takes most of a minute in a debug build, so
/// it is read around each chunk's ends, and all chunks of zeros must be the same one.
fn check_huge(mount: &Mount, inode: u64, size: u64) -> Result<(), String> {
    let end = 5 + (4 << 30) + 12345;
    assert_eq!(size, end + 3 + 1000);
    let expected = |offset: u64| match offset {
        0..5 => b"start"[offset as usize],
        _ if (end..end + 3).contains(&offset) => b"end"[(offset - end) as usize],
        _ => 0,
    };
    let reader = mount.fs.reader();
    let chunks = reader.chunks(&reader.inode(inode).unwrap()).unwrap();
    assert!(
        chunks[1..chunks.len() - 1]
            .windows(2)
            .all(|pair| pair[0].record == pair[1].record)
    );
    for offset in chunks.iter().map(|chunk| chunk.file_offset).chain([size]) {
        let from = offset.saturating_sub(20_000);
        let bytes = mount.read(inode, from, 40_000)?;
        assert_eq!(bytes.len() as u64, (size - from).min(40_000));
        assert!(
            bytes
                .iter()
                .zip(from..)
                .all(|(byte, offset)| *byte == expected(offset)),
            "around {offset}"
        );
    }
    Ok(())
}

fn check_fixture(fixture: &Path) -> Result<(), String> {
    let expected = Expected::of(fixture);
    let mount = Mount::open(&image_of(fixture), &fixture.join("blobs"))?;
    let tree = mount.walk().map_err(|error| format!("walk: {error}"))?;
    let paths: Vec<Vec<u8>> = expected.entries.iter().map(ExpectedEntry::path).collect();
    let mut sorted = paths.clone();
    sorted.sort();
    assert_eq!(tree.keys().cloned().collect::<Vec<_>>(), sorted, "paths");

    for (path, expected) in paths.iter().zip(&expected.entries) {
        let inode = tree[path].inode;
        let said = tree[path].attr;
        let (stat, _) = mount.fs.getattr(&Context::default(), inode, None).unwrap();
        assert_eq!(
            (said.st_ino, said.st_mode, said.st_size),
            (stat.st_ino, stat.st_mode, stat.st_size)
        );
        check_entry(&mount, expected, inode)
            .map_err(|error| format!("{}: {error}", String::from_utf8_lossy(path)))?;
    }

    // Names lead to the same inodes as listings; absent names are cached for ever.
    for (path, entry) in &tree {
        let Some(slash) = path
            .iter()
            .rposition(|byte| *byte == b'/')
            .filter(|_| path.len() > 1)
        else {
            continue;
        };
        let parent = tree[if slash == 0 { &b"/"[..] } else { &path[..slash] }].inode;
        let found = mount.lookup(parent, &path[slash + 1..]).unwrap();
        assert_eq!(found.inode, entry.inode, "{}", String::from_utf8_lossy(path));
        assert!(found.entry_timeout.as_secs() > u32::MAX.into() && found.attr_timeout == found.entry_timeout);
        let absent = [&path[slash + 1..], b"~"].concat();
        if absent.len() <= 255 && !tree.contains_key(&[&path[..slash + 1], &absent].concat()) {
            let absent = mount.lookup(parent, &absent).unwrap();
            assert_eq!(absent.inode, 0);
            assert!(absent.entry_timeout.as_secs() > u32::MAX.into());
        }
    }

    let mut groups: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for (path, entry) in &tree {
        if entry.attr.st_mode & libc::S_IFMT == libc::S_IFREG {
            groups
                .entry(entry.inode)
                .or_default()
                .push(String::from_utf8_lossy(path).into_owned());
        }
    }
    let mut groups: Vec<_> = groups.into_values().filter(|paths| paths.len() > 1).collect();
    groups.sort();
    let mut expected = expected.hardlink_groups;
    expected.iter_mut().for_each(|group| group.sort());
    expected.sort();
    assert_eq!(groups, expected, "hardlinks");
    Ok(())
}

#[test]
fn every_fixture_reads_as_expected() {
    let Some(fixtures) = fixtures() else { return };
    let names = fixture_names(&fixtures);
    assert!(names.len() >= 48, "{} fixtures", names.len());
    let only = std::env::var("RAFS_FIXTURE").ok();
    let mut failures = Vec::new();
    for name in names
        .iter()
        .filter(|name| only.as_ref().is_none_or(|only| *name == only))
    {
        let result =
            std::panic::catch_unwind(|| check_fixture(&fixtures.join(name))).unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                Err(text
                    .or(panic.downcast_ref::<&str>().map(|s| s.to_string()))
                    .unwrap_or_default())
            });
        match (
            UNREADABLE.iter().find(|(unreadable, _)| unreadable == name),
            result,
        ) {
            (None, Ok(())) => {}
            (None, Err(error)) => failures.push(format!("{name}: {error}")),
            (Some((_, why)), Err(error)) if error.contains(why) => {}
            (Some((_, why)), Err(error)) => {
                failures.push(format!("{name}: expected to fail with {why:?}, but: {error}"));
            }
            (Some(_), Ok(())) => failures.push(format!("{name}: reads well now, take it off the list")),
        }
    }
    assert!(
        failures.is_empty(),
        "{} fixtures fail:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn a_listing_may_start_at_any_cookie() {
    let Some(fixtures) = fixtures() else { return };
    for name in ["v6-none-sha256", "v6-many", "v5-many"] {
        let fixture = fixtures.join(name);
        let mount = Mount::open(&image_of(&fixture), &fixture.join("blobs")).unwrap();
        let largest = mount
            .walk()
            .unwrap()
            .values()
            .filter(|entry| entry.attr.st_mode & libc::S_IFMT == libc::S_IFDIR)
            .map(|entry| entry.inode)
            .max_by_key(|dir| mount.list(*dir, usize::MAX).unwrap().len())
            .unwrap();
        let all = mount.list(largest, usize::MAX).unwrap();
        assert!(all.iter().any(|entry| entry.name == b".") && all.iter().any(|entry| entry.name == b".."));
        for (position, entry) in all.iter().enumerate().step_by(37) {
            let mut rest = Vec::new();
            mount
                .fs
                .readdir(&Context::default(), largest, 0, 0, entry.next, &mut |dirent| {
                    rest.push((dirent.name.to_vec(), dirent.ino, dirent.type_, dirent.offset));
                    Ok(1)
                })
                .unwrap();
            let expected: Vec<_> = all[position + 1..]
                .iter()
                .map(|e| (e.name.clone(), e.ino, e.kind, e.next))
                .collect();
            assert_eq!(rest, expected, "{name}");
        }
    }
}

#[test]
fn tools_see_the_same_metadata_and_data() {
    let Some(fixtures) = fixtures() else { return };
    for name in ["v5-zstd-1m", "v6-big-lz4", "v6-tarfs"] {
        let fixture = fixtures.join(name);
        let mount = Mount::open(&image_of(&fixture), &fixture.join("blobs")).unwrap();
        let reader = mount.fs.reader();
        let expected = Expected::of(&fixture);
        let mut files = std::collections::BTreeSet::new();
        for entry in &expected.entries {
            let inode = reader.at_path(&entry.path()).unwrap().expect("listed");
            assert_eq!(kind_of(inode.mode), entry.kind);
            assert_eq!(reader.xattrs(&inode).unwrap(), entry.xattrs());
            let Some(size) = entry.size.filter(|_| entry.kind == "file") else {
                continue;
            };
            files.insert(inode.id);
            let chunks = reader.chunks(&inode).unwrap();
            assert_eq!(
                chunks.iter().map(|chunk| u64::from(chunk.size)).sum::<u64>(),
                size
            );
            assert_eq!(
                chunks.iter().all(|chunk| chunk.record.is_some()),
                name != "v6-tarfs" || size == 0
            );
            let mut data = vec![0; size as usize + 10];
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            assert_eq!(
                mount.fs.read_waiting(inode.id, 0, &mut data, deadline).unwrap() as u64,
                size
            );
            assert_eq!(
                Some(hex::encode(Sha256::digest(&data[..size as usize]))),
                entry.sha256
            );
        }
        assert_eq!(
            reader
                .files_below(reader.root())
                .into_iter()
                .collect::<std::collections::BTreeSet<_>>(),
            files
        );
        assert!(reader.at_path(b"/no/such/path").unwrap().is_none());
    }
}

#[test]
fn the_prefetch_table_names_inodes_in_order() {
    let Some(fixtures) = fixtures() else { return };
    for name in ["v5-prefetch-fs", "v6-prefetch-fs"] {
        let fixture = fixtures.join(name);
        let mount = Mount::open(&image_of(&fixture), &fixture.join("blobs")).unwrap();
        let reader = mount.fs.reader();
        let paths = ["/var", "/lib/rand", "/bin/tool"];
        let expected: Vec<u64> = paths
            .iter()
            .map(|path| reader.at_path(path.as_bytes()).unwrap().unwrap().id)
            .collect();
        assert_eq!(reader.prefetch_table().unwrap(), expected, "{name}");
        let chunks: usize = reader
            .files_below(expected[0])
            .into_iter()
            .flat_map(|file| mount.fs.chunks_of(file).unwrap().chunks)
            .map(|(_, chunks)| chunks.len())
            .sum();
        assert!(chunks > 0);
    }
}

#[test]
fn every_fixture_passes_a_complete_check_of_its_metadata() {
    let Some(fixtures) = fixtures() else { return };
    for name in fixture_names(&fixtures) {
        let fixture = fixtures.join(&name);
        let reader = Reader::open(&image_of(&fixture)).unwrap();
        let mut faults = Vec::new();
        let checked = reader.check(&mut |path, damaged| {
            faults.push(format!("{}: {damaged}", String::from_utf8_lossy(path)));
        });
        assert_eq!(faults, [""; 0], "{name}");
        let expected = Expected::of(&fixture);
        assert_eq!(checked.names, expected.entries.len() as u64, "{name}");
        let links: usize = expected.hardlink_groups.iter().map(|group| group.len() - 1).sum();
        assert_eq!(checked.inodes, checked.names - links as u64, "{name}");
    }
}
