//! Looks at all that an image gives, as a mount and as the tools do. It must end, soon, and take little memory.

use std::ffi::CString;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Instant;

use backend::config::{CacheConfig, DirConfig, SourceConfig};
use backend::store::{Store, StoreOptions};
use rafs::bootstrap::Version;
use rafs::fs::{Options, RafsFs};
use rafs::inode::{Inode, Kind};
use rafs::reader::{Reader, Step};

use crate::memory;
use crate::script::Script;

/// Bytes that a name takes at least: its place in the inode table of v5.
const SMALLEST_NAME: usize = 4;

/// Opens the image at `path` of `size` bytes, and looks at everything that it has. What else to ask for, `script` says.
pub(crate) fn explore(path: &Path, size: usize, script: &mut Script<'_>) {
    // A copy; one that is decompressed grows with what is there. Decompressing takes a buffer.
    let Ok(reader) = memory::bounded("opening", 4 * size + (1 << 19), || Reader::open(path)) else {
        return;
    };
    let limit = 64 * size + (1 << 16);
    memory::bounded("the check", limit, || check(&reader, size));
    memory::bounded("the walk", limit, || walk(&reader, size));
    memory::bounded("the tables", limit, || tables(&reader, size, script));
    if script.flag() {
        mount(path, script);
    }
}

fn check(reader: &Reader, size: usize) {
    let mut faults = 0;
    let checked = reader.check(&mut |_, _| faults += 1);
    assert_eq!(checked.faults, faults);
    let most = (size / SMALLEST_NAME + 2) as u64;
    assert!(checked.names <= most, "{} names in {size} bytes", checked.names);
    assert!(checked.inodes <= checked.names);
}

fn walk(reader: &Reader, size: usize) {
    let mut steps = 0;
    let mut visit = |step: Step<'_>| {
        steps += 1;
        if let Ok(inode) = step.inode {
            look_at(reader, inode);
        }
        Ok::<(), ()>(())
    };
    reader.walk(&mut visit).unwrap();
    assert!(
        steps <= 2 * (size / SMALLEST_NAME) + 2,
        "{steps} steps in {size} bytes"
    );
}

fn look_at(reader: &Reader, inode: &Inode) {
    let _ = inode.stat();
    let _ = reader.xattrs(inode);
    match inode.kind {
        Kind::Directory => {
            for child in reader.children(inode).unwrap_or_default().iter().take(64) {
                let _ = reader.lookup(inode, &child.name);
            }
            let _ = reader.lookup(inode, b"m");
            let _ = reader.lookup(inode, b"..");
        }
        Kind::Symlink => {
            if let Ok(target) = reader.symlink_target(inode) {
                assert!(target.len() as u64 == inode.size && target.len() <= 4096);
            }
        }
        Kind::File => {
            // A plan covers the file, in order; only v5 knows holes.
            if let Ok(chunks) = reader.chunks(inode) {
                let mut end = 0;
                let holes = reader.superblock().version == Version::V5;
                for chunk in chunks {
                    assert!(chunk.file_offset == end || holes && chunk.file_offset > end);
                    assert!(chunk.size != 0 && chunk.blob < reader.superblock().blobs.len());
                    end = chunk.file_offset + u64::from(chunk.size);
                }
                assert!(end == inode.size || holes && end < inode.size);
            }
        }
        _ => {}
    }
}

fn tables(reader: &Reader, size: usize, script: &mut Script<'_>) {
    let prefetch = reader.prefetch_table().unwrap_or_default();
    assert!(prefetch.len() <= size / 4);
    for id in prefetch.into_iter().take(4).chain([reader.root()]) {
        assert!(reader.files_below(id).len() <= size / SMALLEST_NAME + 1);
    }
    for position in 0..reader.superblock().blobs.len() {
        let Ok(blob) = reader.blob(position) else { continue };
        for index in (0..8).chain([script.u32() % (1 << 24), blob.chunk_count.wrapping_sub(1)]) {
            if let Ok(chunk) = blob.index.chunk(index) {
                assert_eq!(chunk.index, index);
                let _ = backend::codec::check(&blob, &chunk);
            }
        }
    }
    let path: Vec<u8> = (0..8).map(|_| b"d/e.l"[script.below(5)]).collect();
    let _ = reader.at_path(&path);
    let _ = reader.inode(script.u64());
}

/// What a guest asks for, on a store that has no source and no cache.
fn mount(path: &Path, script: &mut Script<'_>) {
    static STORE: OnceLock<Store> = OnceLock::new();
    let store = STORE.get_or_init(|| {
        let options = StoreOptions {
            decode_threads: 1,
            ..StoreOptions::default()
        };
        Store::new(options).expect("a store")
    });
    let source = SourceConfig::Dir(DirConfig::default());
    // No directory can be made there: blobs are served uncached.
    let cache = CacheConfig::new("/proc/nowhere");
    let options = Options {
        xattr: true,
        validate: script.flag(),
    };
    let opened = RafsFs::open(path, options, &mut |blob| store.open_blob(blob, &source, &cache));
    let Ok(fs) = opened else { return };
    guest::ask(&fs, script);
}

mod guest {
    use fuse_backend_rs::api::filesystem::{Context, FileSystem};

    use super::*;

    /// Entries that one question follows.
    const WIDTH: usize = 8;

    pub(super) fn ask(fs: &RafsFs, script: &mut Script<'_>) {
        let context = Context::default();
        let _ = fs.statfs(&context, fs.root());
        let mut directories = vec![fs.root()];
        for _ in 0..16 {
            let Some(dir) = directories.pop() else { break };
            let mut entries = Vec::new();
            let cookie = if script.flag() { script.u64() } else { 0 };
            let _ = fs.readdirplus(&context, dir, 0, 4096, cookie, &mut |listed, entry| {
                if entries.len() == WIDTH {
                    return Ok(0);
                }
                assert!(!listed.name.is_empty() && listed.name.len() <= 255);
                assert!(!listed.name.contains(&b'/') && !listed.name.contains(&0));
                entries.push((CString::new(listed.name).unwrap(), entry.inode));
                Ok(1)
            });
            for (name, inode) in entries {
                let _ = fs.lookup(&context, dir, &name);
                let _ = fs.getattr(&context, inode, None);
                let _ = fs.readlink(&context, inode);
                let _ = fs.listxattr(&context, inode, 1 << 16);
                let _ = fs.getxattr(&context, inode, c"user.a", 1 << 16);
                let offset = if script.flag() { script.u64() } else { 0 };
                // Nothing can be fetched by a deadline that has passed.
                let _ = fs.read_waiting(inode, offset, &mut [0; 8192], Instant::now());
                if fs.chunks_of(inode).is_ok() && fs.opendir(&context, inode, 0).is_ok() {
                    directories.push(inode);
                }
            }
        }
    }
}
