//! What the tests of the reader share: fixtures with their expected content, and images mounted on a real store.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use backend::config::DirConfig;
use backend::error::SourceError;
use backend::source::dir::Dir;
use backend::source::{Sink, Source};
use backend::store::{CacheConfig, Store, StoreOptions};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use fuse_backend_rs::api::filesystem::{
    Context, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyWriter,
};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use rafsd_rafs::fs::{HeldChunks, Options, RafsFs, ReadOutcome};
use serde::Deserialize;

/// The directory of fixtures; `None`, with a message, where it does not exist.
pub fn fixtures() -> Option<PathBuf> {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/fixtures/rafs"));
    if dir.is_dir() {
        return Some(dir.to_owned());
    }
    eprintln!("SKIPPED: no fixtures at {}", dir.display());
    None
}

/// Names of all fixtures, sorted.
pub fn fixture_names(fixtures: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(fixtures)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What to open in a fixture: its bootstrap, or its smallest blob, which then has one inside.
pub fn image_of(fixture: &Path) -> PathBuf {
    let bootstrap = fixture.join("bootstrap");
    if bootstrap.exists() {
        return bootstrap;
    }
    fs::read_dir(fixture.join("blobs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .min_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap()
}

#[derive(Deserialize)]
pub struct Expected {
    pub entries: Vec<ExpectedEntry>,
    pub hardlink_groups: Vec<Vec<String>>,
}

#[derive(Deserialize)]
pub struct ExpectedEntry {
    path: String,
    path_b64: Option<String>,
    #[serde(rename = "type")]
    pub kind: String,
    pub mode: String,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, i64),
    pub nlink: u64,
    pub size: Option<u64>,
    pub sha256: Option<String>,
    target: Option<String>,
    target_b64: Option<String>,
    pub rdev: Option<(u32, u32)>,
    xattrs_b64: Option<BTreeMap<String, String>>,
}

fn text_or_base64(text: &str, encoded: &Option<String>) -> Vec<u8> {
    encoded.as_ref().map_or_else(
        || text.as_bytes().to_vec(),
        |encoded| BASE64.decode(encoded).unwrap(),
    )
}

impl ExpectedEntry {
    pub fn path(&self) -> Vec<u8> {
        text_or_base64(&self.path, &self.path_b64)
    }

    pub fn target(&self) -> Vec<u8> {
        text_or_base64(self.target.as_deref().unwrap_or_default(), &self.target_b64)
    }

    pub fn xattrs(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        self.xattrs_b64
            .iter()
            .flatten()
            .map(|(name, value)| (name.as_bytes().to_vec(), BASE64.decode(value).unwrap()))
            .collect()
    }
}

impl Expected {
    pub fn of(fixture: &Path) -> Self {
        serde_json::from_slice(&fs::read(fixture.join("expected.json")).unwrap()).unwrap()
    }
}

/// Takes a reply in memory.
pub struct Buffer {
    pub bytes: Vec<u8>,
    space: usize,
    /// Number of transfers from a file.
    pub transfers: usize,
}

impl Buffer {
    pub fn new(space: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(space),
            space,
            transfers: 0,
        }
    }
}

impl Write for Buffer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let taken = buf.len().min(self.available_bytes());
        self.bytes.extend_from_slice(&buf[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ZeroCopyWriter for Buffer {
    fn write_from(&mut self, f: &mut dyn FileReadWriteVolatile, count: usize, off: u64) -> io::Result<usize> {
        let count = count.min(self.available_bytes());
        let start = self.bytes.len();
        self.bytes.resize(start + count, 0);
        // Two buffers, as a guest would give several.
        let (first, second) = self.bytes[start..].split_at_mut(count / 3);
        // SAFETY: Both slices outlive the call, and nothing else uses them meanwhile.
        let slices = unsafe {
            [
                FileVolatileSlice::from_mut_slice(first),
                FileVolatileSlice::from_mut_slice(second),
            ]
        };
        let read = f.read_vectored_at_volatile(&slices, off)?;
        self.bytes.truncate(start + read);
        self.transfers += 1;
        Ok(read)
    }

    fn available_bytes(&self) -> usize {
        self.space - self.bytes.len()
    }
}

/// An image on a store of its own, with a directory of blobs as the source.
pub struct Mount {
    pub fs: RafsFs,
    pub place: Arc<Place>,
}

/// A directory of blobs that is asked once: what it does not have now it will not have after a pause.
struct Once(Dir);

impl Source for Once {
    fn host(&self) -> &str {
        self.0.host()
    }

    fn read<'a>(
        &'a self,
        blob_id: &'a str,
        range: Range<u64>,
        sink: Sink<'a>,
    ) -> Pin<Box<dyn Future<Output = Result<(), SourceError>> + Send + 'a>> {
        self.0.read(blob_id, range, sink)
    }

    fn retry_limit(&self) -> u32 {
        0
    }
}

/// A store, its cache directory, and the directory of blobs that it reads from.
pub struct Place {
    pub store: Store,
    source: Arc<dyn Source>,
    pub cache: tempfile::TempDir,
}

impl Place {
    pub fn new(blobs: &Path) -> Arc<Self> {
        let store = Store::new(StoreOptions {
            decode_threads: 1,
            ..StoreOptions::default()
        })
        .unwrap();
        let dir = Dir::new(DirConfig {
            dir: Some(blobs.to_owned()),
            ..DirConfig::default()
        });
        Arc::new(Self {
            store,
            source: Arc::new(Once(dir.unwrap())),
            cache: tempfile::tempdir().unwrap(),
        })
    }

    pub fn mount(self: &Arc<Self>, image: &Path) -> Result<Mount, String> {
        self.mount_with_cache(image, self.cache.path())
    }

    /// With a cache in another directory than the place's own.
    pub fn mount_with_cache(self: &Arc<Self>, image: &Path, cache: &Path) -> Result<Mount, String> {
        let config = CacheConfig::new(cache);
        let options = Options {
            xattr: true,
            validate: false,
        };
        let fs = RafsFs::open(image, options, &mut |blob| {
            self.store.open_blob_from(blob, Arc::clone(&self.source), &config)
        })
        .map_err(|error| chain(&error))?;
        Ok(Mount {
            fs,
            place: self.clone(),
        })
    }
}

impl Mount {
    pub fn open(image: &Path, blobs: &Path) -> Result<Self, String> {
        Place::new(blobs).mount(image)
    }

    /// Reads, and fetches what is absent, as a device does.
    pub fn read(&self, inode: u64, offset: u64, size: usize) -> Result<Vec<u8>, String> {
        let mut held = HeldChunks::default();
        for _ in 0..4 {
            let mut buffer = Buffer::new(size);
            let outcome = self
                .fs
                .read(inode, offset, size as u32, &held, &mut buffer)
                .map_err(|error| format!("read: {error}"))?;
            match outcome {
                ReadOutcome::Done(count) => {
                    assert_eq!(count, buffer.bytes.len(), "bytes said and bytes written");
                    return Ok(buffer.bytes);
                }
                ReadOutcome::Absent(absent) => {
                    let (sender, receiver) = mpsc::channel();
                    let deadline = Instant::now() + Duration::from_secs(20);
                    self.fs.fetch(
                        absent,
                        deadline,
                        Box::new(move |result| sender.send(result).unwrap()),
                    );
                    held = receiver
                        .recv_timeout(Duration::from_secs(30))
                        .map_err(|error| format!("no answer: {error}"))?
                        .map_err(|error| error.to_string())?;
                }
            }
        }
        Err("absent again and again".to_owned())
    }

    pub fn lookup(&self, parent: u64, name: &[u8]) -> io::Result<Entry> {
        self.fs
            .lookup(&Context::default(), parent, &CString::new(name).unwrap())
    }

    /// Entries by `readdirplus`, `per_call` at a time.
    pub fn list(&self, dir: u64, per_call: usize) -> io::Result<Vec<Listed>> {
        let mut found: Vec<Listed> = Vec::new();
        loop {
            let mut taken = 0;
            let offset = found.last().map_or(0, |entry| entry.next);
            self.fs
                .readdirplus(&Context::default(), dir, 0, 0, offset, &mut |dirent, entry| {
                    if taken == per_call {
                        return Ok(0);
                    }
                    taken += 1;
                    found.push(Listed {
                        name: dirent.name.to_vec(),
                        ino: dirent.ino,
                        kind: dirent.type_,
                        next: dirent.offset,
                        entry,
                    });
                    Ok(1)
                })?;
            if taken < per_call {
                return Ok(found);
            }
        }
    }

    pub fn xattrs(&self, inode: u64) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        let context = Context::default();
        let ListxattrReply::Names(names) = self.fs.listxattr(&context, inode, 1 << 20)? else {
            panic!("asked for names")
        };
        let ListxattrReply::Count(size) = self.fs.listxattr(&context, inode, 0)? else {
            panic!("asked for the size")
        };
        assert_eq!(size as usize, names.len());
        let mut found = BTreeMap::new();
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let c_name = CString::new(name).unwrap();
            let GetxattrReply::Value(value) = self.fs.getxattr(&context, inode, &c_name, 1 << 17)? else {
                panic!("asked for the value")
            };
            let GetxattrReply::Count(size) = self.fs.getxattr(&context, inode, &c_name, 0)? else {
                panic!("asked for the size")
            };
            assert_eq!(size as usize, value.len());
            assert!(
                found.insert(name.to_vec(), value).is_none(),
                "attribute listed twice"
            );
        }
        Ok(found)
    }

    /// Every path with what `readdirplus` said of it, parents first.
    pub fn walk(&self) -> io::Result<BTreeMap<Vec<u8>, Entry>> {
        let root = self.fs.root();
        let (attr, attr_timeout) = self.fs.getattr(&Context::default(), root, None)?;
        let entry = Entry {
            inode: root,
            attr,
            attr_timeout,
            ..Entry::default()
        };
        let mut found = BTreeMap::from([(b"/".to_vec(), entry)]);
        let mut open = vec![(Vec::new(), root)];
        while let Some((path, dir)) = open.pop() {
            for listed in self.list(dir, 50)? {
                if matches!(listed.name.as_slice(), b"." | b"..") {
                    continue;
                }
                let child = [path.as_slice(), b"/", &listed.name].concat();
                if listed.entry.inode != 0 && listed.entry.attr.st_mode & libc::S_IFMT == libc::S_IFDIR {
                    open.push((child.clone(), listed.entry.inode));
                }
                let text = String::from_utf8_lossy(&child).into_owned();
                if found.insert(child, listed.entry).is_some() {
                    return Err(io::Error::other(format!("{text} is listed twice")));
                }
                if found.len() >= 20_000 {
                    return Err(io::Error::other(format!("an endless tree: {text}")));
                }
            }
        }
        Ok(found)
    }
}

pub struct Listed {
    pub name: Vec<u8>,
    pub ino: u64,
    pub kind: u32,
    pub next: u64,
    pub entry: Entry,
}

/// An error with its sources.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
