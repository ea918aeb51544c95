//! What guests ask most often is answered without an allocation.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::CString;

use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use rafsd_rafs::fs::{HeldChunks, ReadOutcome};
use support::{Buffer, Mount, fixtures, image_of};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts what each thread allocates.
struct Counting;

// SAFETY: Everything is passed on to the system's allocator; counting neither allocates nor fails.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: The caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: The caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations<R>(work: impl FnOnce() -> R) -> (R, usize) {
    let before = ALLOCATIONS.get();
    let result = work();
    (result, ALLOCATIONS.get() - before)
}

#[test]
fn nothing_is_allocated_for_what_is_resident() {
    let (_, counted) = allocations(|| std::hint::black_box(vec![1u8; 100]));
    assert_eq!(counted, 1, "the counter counts");
    let Some(fixtures) = fixtures() else { return };
    let mut merged = false;
    for name in ["v5-big-zstd", "v5-lz4-blake3", "v6-big-lz4", "v6-none-sha256"] {
        let fixture = fixtures.join(name);
        let mount = Mount::open(&image_of(&fixture), &fixture.join("blobs")).unwrap();
        let context = Context::default();
        let reader = mount.fs.reader();
        let largest = mount
            .walk()
            .unwrap()
            .into_iter()
            .filter(|(_, entry)| entry.attr.st_mode & libc::S_IFMT == libc::S_IFREG)
            .max_by_key(|(_, entry)| entry.attr.st_size)
            .unwrap();
        let (path, entry) = largest;
        let size = entry.attr.st_size as usize;
        let expected = mount.read(entry.inode, 0, size).unwrap();
        let slash = path.iter().rposition(|byte| *byte == b'/').unwrap();
        let parent = reader.at_path(&path[..slash]).unwrap().unwrap().id;
        let file = CString::new(&path[slash + 1..]).unwrap();
        let absent = CString::new("no-such-name").unwrap();
        let xattr = CString::new("security.capability").unwrap();
        let held = HeldChunks::default();
        let mut buffer = Buffer::new(size);

        let (found, count) = allocations(|| mount.fs.lookup(&context, parent, &file).unwrap());
        assert_eq!((found.inode, count), (entry.inode, 0), "{name}: lookup");
        let (found, count) = allocations(|| mount.fs.lookup(&context, parent, &absent).unwrap());
        assert_eq!((found.inode, count), (0, 0), "{name}: lookup of an absent name");
        let (_, count) = allocations(|| mount.fs.getattr(&context, entry.inode, None).unwrap());
        assert_eq!(count, 0, "{name}: getattr");
        let (absent, count) = allocations(|| mount.fs.getxattr(&context, entry.inode, &xattr, 100).is_err());
        assert_eq!((absent, count), (true, 0), "{name}: getxattr of an absent name");
        let (listed, count) = allocations(|| {
            let mut listed = 0;
            mount
                .fs
                .readdirplus(&context, parent, 0, 0, 0, &mut |_, _| {
                    listed += 1;
                    Ok(1)
                })
                .unwrap();
            listed
        });
        assert!(listed > 3 && count == 0, "{name}: readdirplus");
        let (outcome, count) = allocations(|| {
            mount
                .fs
                .read(entry.inode, 0, size as u32, &held, &mut buffer)
                .unwrap()
        });
        assert!(matches!(outcome, ReadOutcome::Done(done) if done == size));
        assert_eq!(count, 0, "{name}: read");
        assert!(buffer.bytes == expected);
        // Chunks that are neighbours in the cache file are read at once.
        let chunks = reader.chunks(&reader.inode(entry.inode).unwrap()).unwrap();
        let runs = 1 + chunks
            .windows(2)
            .filter(|pair| {
                pair[0].uncompressed_offset + u64::from(pair[0].size) != pair[1].uncompressed_offset
            })
            .count();
        merged |= runs < chunks.len();
        assert_eq!(
            buffer.transfers,
            runs,
            "{name}: transfers of {} chunks",
            chunks.len()
        );
    }
    assert!(merged, "no fixture has neighbours to merge");
}
