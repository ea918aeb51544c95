//! What several tests put together: a daemon with a passthrough tree and an image from a registry.

use std::path::PathBuf;

use rafsd_frontend::abi::InHeader;
use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::image::{Image, remote};
use rafsd_frontend::random::Random;
use rafsd_frontend::registry::Registry;
use rafsd_frontend::vring::{Descriptor, NEXT, WRITE};
use rafsd_frontend::{Guest, Options};

pub const RAFSD: &str = env!("CARGO_BIN_EXE_rafsd");
pub const RAFS: &str = env!("CARGO_BIN_EXE_rafs");

/// Where the image is mounted.
pub const LOWER: &str = "/rafs/one/lowerdir";
/// Where the passthrough tree is mounted.
pub const CONTAINERS: &str = "/containers";

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    Random::new(seed).bytes(len)
}

/// An image of a few files, and a registry that serves it.
pub struct Served {
    pub directory: tempfile::TempDir,
    pub image: Image,
    pub registry: Registry,
    /// Contents of `a-warm`, one chunk.
    pub warm: Vec<u8>,
    /// Contents of `z-cold`, many chunks.
    pub cold: Vec<u8>,
}

impl Served {
    /// Builds the image with these options of the image tool.
    pub fn new(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        let (warm, cold) = (noise(1, 64 << 10), noise(2, 16 << 20));
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("a-warm"), &warm).unwrap();
        std::fs::write(tree.join("z-cold"), &cold).unwrap();
        let image = Image::build(RAFS, &tree, &directory.path().join("image"), options).unwrap();
        let registry = Registry::start(&image.blobs).unwrap();
        Self {
            directory,
            image,
            registry,
            warm,
            cold,
        }
    }

    pub fn cache(&self) -> PathBuf {
        self.directory.path().join("cache")
    }

    /// The directory that is passed through.
    pub fn shared(&self) -> PathBuf {
        let shared = self.directory.path().join("shared");
        std::fs::create_dir_all(&shared).unwrap();
        shared
    }

    /// Mounts both; a failed fetch is tried again `retries` times.
    pub fn mount(&self, daemon: &Daemon, retries: u64) {
        daemon.mount_passthrough(CONTAINERS, &self.shared()).unwrap();
        let config = remote(&self.registry, &self.cache(), 60, retries);
        daemon.mount_rafs(LOWER, &self.image.bootstrap, &config).unwrap();
    }

    /// A daemon with both mounts, and a guest.
    pub fn start(&self) -> (Daemon, Guest) {
        let daemon = Builder::new(RAFSD).unwrap().start().unwrap();
        self.mount(&daemon, 0);
        let guest = daemon.guest(Options::default()).unwrap();
        (daemon, guest)
    }
}

/// A file of the guest, open.
pub struct Open {
    pub node: u64,
    pub fh: u64,
}

pub fn open(guest: &Guest, path: &str) -> Open {
    let node = guest.resolve(path).unwrap().nodeid;
    Open {
        node,
        fh: guest.open(node, 0).unwrap(),
    }
}

/// A daemon with a passthrough tree alone.
pub fn passthrough() -> (Daemon, Guest, PathBuf) {
    passthrough_with(Options::default())
}

pub fn passthrough_with(options: Options) -> (Daemon, Guest, PathBuf) {
    let builder = Builder::new(RAFSD).unwrap();
    let shared = builder.directory().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let daemon = builder.start().unwrap();
    daemon.mount_passthrough(CONTAINERS, &shared).unwrap();
    let guest = daemon.guest(options).unwrap();
    (daemon, guest, shared)
}

/// The node of the passthrough tree's top.
pub fn containers(guest: &Guest) -> u64 {
    guest.resolve(CONTAINERS).unwrap().nodeid
}

/// A descriptor that the device reads; the chain goes on at `next` if that is not 0.
pub fn readable(address: u64, len: u32, next: u16) -> Descriptor {
    let flags = if next == 0 { 0 } else { NEXT };
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

/// The last descriptor of a chain, which the device writes.
pub fn writable(address: u64, len: u32) -> Descriptor {
    Descriptor {
        address,
        len,
        flags: WRITE,
        next: 0,
    }
}

/// A request as one piece of bytes.
pub fn message(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let header = InHeader {
        len: (40 + body.len()) as u32,
        opcode,
        unique: 77,
        nodeid,
        ..InHeader::default()
    };
    [header.bytes(), body.to_vec()].concat()
}

/// Boots a guest as soon as the end of the connection before has been seen.
pub fn boot(daemon: &Daemon, options: &Options) -> Guest {
    let start = std::time::Instant::now();
    loop {
        match Guest::boot(&daemon.socket, options.clone()) {
            Ok(guest) => return guest,
            Err(e) => assert!(start.elapsed() < std::time::Duration::from_secs(60), "{e}"),
        }
    }
}
