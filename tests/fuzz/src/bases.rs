//! The valid images that inputs change: built once per process, by the project's own builder.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use backend::chunk::Compression;
use rafs::build::{FsVersion, Input, Options, build};
use rafs::layout::{v5, v6};
use rafs::reader::Reader;
use rafs::superblock::Format;
use rafs::tar::{Kind, Member, Writer};
use rustix::fs::{MemfdFlags, memfd_create};
use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use crate::mutate::{Region, Subject};

/// Chunk size of all base images; files of the tree have up to six chunks.
pub(crate) const CHUNK_SIZE: u32 = 0x1000;

/// An image and its blob, as files have them.
pub(crate) struct Base {
    pub(crate) bootstrap: Vec<u8>,
    pub(crate) blob: Vec<u8>,
}

fn member(path: &str, kind: Kind, mode: u32) -> Member {
    Member {
        path: path.into(),
        kind,
        link: Vec::new(),
        mode,
        uid: 1000,
        gid: 100,
        mtime: 1_700_000_000,
        mtime_nsec: 5,
        size: 0,
        device: (0, 0),
        xattrs: Vec::new(),
    }
}

/// Bytes that neither repeat nor compress.
fn noise(seed: u32, size: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..size).map(next).collect()
}

/// A tree with everything that a reader treats differently, as small as it can be. `names` entries are in one of its directories.
fn tree(names: usize) -> Vec<u8> {
    let mut tar = Writer::new(Vec::new());
    let mut add = |member: &Member, data: &[u8]| {
        tar.member(member).unwrap();
        tar.data(data).unwrap();
    };
    let file = |path: &str, size: u64| Member {
        size,
        ..member(path, Kind::Regular, 0o644)
    };
    for path in ["d", "d/e", "d/e/f", "many"] {
        add(&member(path, Kind::Directory, 0o755), b"");
    }
    add(&file("large", 5 * 4096 + 7), &noise(1, 5 * 4096 + 7));
    add(&file("d/text", 9000), &b"compressible ".repeat(700)[..9000]);
    add(&file("d/e/f/small", 10), b"0123456789");
    add(&file("empty", 0), b"");
    let link = Member {
        link: b"large".to_vec(),
        ..member("d/link", Kind::HardLink, 0o644)
    };
    add(&link, b"");
    for (path, size) in [("short", 5), ("long", 3000)] {
        let link = Member {
            link: vec![b't'; size],
            ..member(path, Kind::Symlink, 0o777)
        };
        add(&link, b"");
    }
    add(
        &Member {
            device: (7, 300),
            ..member("d/block", Kind::Block, 0o600)
        },
        b"",
    );
    add(
        &Member {
            device: (1, 3),
            ..member("d/char", Kind::Char, 0o666)
        },
        b"",
    );
    add(&member("d/fifo", Kind::Fifo, 0o600), b"");
    let mut attributes = file("attributes", 3);
    attributes.xattrs = vec![
        (b"user.a".to_vec(), b"value".to_vec()),
        (b"trusted.overlay.x".to_vec(), vec![0; 40]),
        (b"security.capability".to_vec(), noise(3, 20)),
    ];
    add(&attributes, b"abc");
    for number in 0..names {
        let path = format!("many/{number:03}-{}", "n".repeat(number % 90));
        add(&file(&path, 4), &(number as u32).to_le_bytes());
    }
    tar.finish().unwrap()
}

/// Builds an image of a tree with one directory of `names` entries.
pub(crate) fn image(version: FsVersion, compression: Compression, names: usize) -> Base {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let options = Options {
        version,
        compression,
        chunk_size: CHUNK_SIZE,
        prefetch: vec!["/d".into(), "/large".into()],
        threads: 1,
        ..Options::default()
    };
    let tar = tree(names);
    let input = Input::Archive {
        name: "tree",
        stream: &mut tar.as_slice(),
    };
    let report = build(input, dir.path(), &options, &()).expect("a valid image");
    let blob_id = report.blob.expect("files with data").id;
    Base {
        bootstrap: fs::read(report.bootstrap).unwrap(),
        blob: fs::read(dir.path().join("blobs").join(&blob_id)).unwrap(),
    }
}

/// A file for a reader to open. It is gone when the process is, however that ends.
pub(crate) struct Slot {
    _file: OwnedFd,
    pub(crate) path: PathBuf,
}

impl Slot {
    pub(crate) fn new() -> Self {
        let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        Self { _file: file, path }
    }

    /// Gives it another content.
    pub(crate) fn fill(&self, bytes: &[u8]) {
        fs::write(&self.path, bytes).expect("writing to memory");
    }
}

/// The image `bytes`.
pub(crate) fn open(bytes: &[u8]) -> Reader {
    let slot = Slot::new();
    slot.fill(bytes);
    Reader::open(&slot.path).expect("a valid image")
}

fn region(offset: u64, size: usize) -> Region {
    Region {
        offset: offset as usize,
        size,
    }
}

/// Where the fields of a v5 bootstrap are.
pub(crate) fn v5_subject(bytes: Vec<u8>) -> Subject {
    let reader = open(&bytes);
    let superblock = reader.superblock();
    let Format::V5 {
        inode_table,
        extended_blob_table,
    } = superblock.format
    else {
        panic!("not v5");
    };
    let heads = vec![
        region(0, size_of::<v5::SuperBlock>()),
        region(inode_table.offset, inode_table.entries as usize * 4),
        region(
            superblock.prefetch_table.offset,
            superblock.prefetch_table.entries as usize * 4,
        ),
        region(
            superblock.blob_table.offset,
            superblock.blob_table.entries as usize,
        ),
        region(
            extended_blob_table.offset,
            extended_blob_table.entries as usize * size_of::<v5::ExtendedBlobEntry>(),
        ),
    ];
    let table = &bytes[inode_table.offset as usize..];
    let mut offsets: Vec<u64> = <[U32]>::ref_from_prefix_with_elems(table, inode_table.entries as usize)
        .unwrap()
        .0
        .iter()
        .map(|offset| u64::from(offset.get()) * v5::UNIT)
        .collect();
    offsets.push(bytes.len() as u64);
    offsets.sort_unstable();
    let mut bodies = Vec::new();
    for pair in offsets.windows(2) {
        // The record, and what follows it: name, target, attributes, chunk records.
        bodies.push(region(pair[0], size_of::<v5::Inode>()));
        bodies.push(region(pair[0], (pair[1] - pair[0]) as usize));
    }
    Subject { bytes, heads, bodies }
}

/// Where the fields of a v6 bootstrap are.
pub(crate) fn v6_subject(bytes: Vec<u8>) -> Subject {
    let reader = open(&bytes);
    let superblock = reader.superblock();
    let Format::V6 {
        meta, chunk_table, ..
    } = superblock.format
    else {
        panic!("not v6");
    };
    let heads = vec![
        region(v6::SUPERBLOCK_OFFSET, size_of::<v6::SuperBlock>()),
        region(
            v6::EXTENDED_SUPERBLOCK_OFFSET,
            size_of::<v6::ExtendedSuperBlock>(),
        ),
        region(
            v6::DEVICE_SLOTS_OFFSET,
            superblock.blobs.len() * size_of::<v6::DeviceSlot>(),
        ),
        region(
            superblock.blob_table.offset,
            superblock.blobs.len() * size_of::<v6::BlobEntry>(),
        ),
        region(
            superblock.prefetch_table.offset,
            superblock.prefetch_table.entries as usize * 4,
        ),
    ];
    let mut bodies = Vec::new();
    for record in 0..chunk_table.entries {
        bodies.push(region(chunk_table.offset + record * 80, 80));
    }
    let mut walk = |step: rafs::reader::Step<'_>| {
        let inode = step.inode.expect("a valid image");
        let offset = meta + inode.id * v6::NID_UNIT;
        bodies.push(region(offset, size_of::<v6::ExtendedInode>()));
        // Attributes, chunk addresses, entries of a small directory.
        bodies.push(region(offset + size_of::<v6::ExtendedInode>() as u64, 128));
        Ok::<(), ()>(())
    };
    reader.walk(&mut walk).unwrap();
    // Large directories have blocks of their own, which begin with entries.
    for block in (meta as usize..chunk_table.offset as usize).step_by(4096) {
        bodies.push(Region {
            offset: block,
            size: 480,
        });
        bodies.push(Region {
            offset: block,
            size: 4096,
        });
    }
    Subject { bytes, heads, bodies }
}
