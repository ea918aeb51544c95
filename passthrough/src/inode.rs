//! Node ids, the host files behind them, and how often the guest has looked each of them up.
//!
//! A host file is identified by (mount, device, inode number): the same file seen through two mounts is two nodes, since
//! the mounts may differ in what they allow. A node lives while its lookup count is above zero, and whatever keeps the
//! host file alive (a descriptor) lives as long as the node, so a key cannot come to mean another file meanwhile.
//!
//! Two sharded sets hold the same nodes, one by id (every request looks here) and one by key (every lookup looks
//! here). Counts change without a lock; only a node's first lookup and its last forget write to the sets. The rule
//! that makes this safe: a count that has reached zero never rises again. A lookup that meets such a node makes a new
//! one under a new id, so a FORGET that is still on its way out cannot take a fresh reference with it.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

/// Node id of the root.
pub(crate) const ROOT: u64 = 1;
/// Node ids have this many bits.
const ID_BITS: u32 = 40;
/// Parts of each set.
const SHARDS: usize = 64;

/// What makes two lookups find the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Mount id, the never-reused kind where the host kernel has it.
    pub(crate) mount: u64,
    /// Device number.
    pub(crate) device: u64,
    /// Inode number on that device.
    pub(crate) ino: u64,
}

/// How the daemon keeps hold of a host file.
#[derive(Debug)]
pub(crate) enum InodeFile {
    /// An O_PATH descriptor.
    Fd(OwnedFd),
}

/// A host file that the guest knows.
#[derive(Debug)]
pub(crate) struct Inode {
    id: u64,
    generation: u64,
    key: Key,
    /// The S_IFMT bits; a file never changes its type.
    file_type: u32,
    file: InodeFile,
    lookups: AtomicU64,
}

impl Inode {
    /// The node id within the mount, below 2^40.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Tells two uses of one id apart.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn key(&self) -> &Key {
        &self.key
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.file_type == libc::S_IFDIR
    }

    pub(crate) fn is_regular(&self) -> bool {
        self.file_type == libc::S_IFREG
    }

    pub(crate) fn is_symlink(&self) -> bool {
        self.file_type == libc::S_IFLNK
    }

    /// Counts one more lookup unless the node is on its way out.
    fn look_up(&self) -> bool {
        self.lookups
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                if count == 0 {
                    None
                } else {
                    Some(count.saturating_add(1))
                }
            })
            .is_ok()
    }

    /// Takes `count` lookups away; true if that took the last one.
    fn forget(&self, count: u64) -> bool {
        self.lookups
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |lookups| {
                if lookups == 0 || count == 0 {
                    None
                } else {
                    Some(lookups.saturating_sub(count))
                }
            })
            .is_ok_and(|before| before <= count)
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.file {
            InodeFile::Fd(fd) => fd.as_fd(),
        }
    }
}

/// A node as a member of the set that is searched by id.
#[derive(Debug)]
struct ById(Arc<Inode>);

impl Borrow<u64> for ById {
    fn borrow(&self) -> &u64 {
        &self.0.id
    }
}

impl Hash for ById {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.id.hash(state);
    }
}

impl PartialEq for ById {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for ById {}

/// A node as a member of the set that is searched by key.
#[derive(Debug)]
struct ByKey(Arc<Inode>);

impl Borrow<Key> for ByKey {
    fn borrow(&self) -> &Key {
        &self.0.key
    }
}

impl Hash for ByKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.key.hash(state);
    }
}

impl PartialEq for ByKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.key == other.0.key
    }
}

impl Eq for ByKey {}

/// Hashes ids, which are ours and sequential, so spreading them is all that is needed.
#[derive(Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }
}

type IdShard = RwLock<HashSet<ById, BuildHasherDefault<IdHasher>>>;
type KeyShard = RwLock<HashSet<ByKey, RandomState>>;

/// All nodes of one mount.
#[derive(Debug)]
pub(crate) struct InodeTable {
    root: Arc<Inode>,
    next: AtomicU64,
    ids: [IdShard; SHARDS],
    keys: [KeyShard; SHARDS],
    /// Chooses the shard of a key; the shards' own hashing is seeded the same way, so that a guest which can choose
    /// inode numbers cannot choose collisions.
    seed: RandomState,
}

impl InodeTable {
    /// A table that holds the root, which is never forgotten.
    pub(crate) fn new(key: Key, file: InodeFile) -> Self {
        let seed = RandomState::new();
        let root = Arc::new(Inode {
            id: ROOT,
            generation: 0,
            key,
            file_type: libc::S_IFDIR,
            file,
            lookups: AtomicU64::new(1),
        });
        let table = InodeTable {
            root: root.clone(),
            next: AtomicU64::new(ROOT + 1),
            ids: std::array::from_fn(|_| RwLock::default()),
            keys: std::array::from_fn(|_| RwLock::new(HashSet::with_hasher(seed.clone()))),
            seed,
        };
        table.publish_root();
        table
    }

    fn publish_root(&self) {
        self.id_shard(ROOT).write().insert(ById(self.root.clone()));
        self.key_shard(&self.root.key)
            .write()
            .insert(ByKey(self.root.clone()));
    }

    // Both indexes are remainders by the number of shards.
    #[allow(clippy::indexing_slicing)]
    fn id_shard(&self, id: u64) -> &IdShard {
        &self.ids[(id % SHARDS as u64) as usize]
    }

    #[allow(clippy::indexing_slicing)]
    fn key_shard(&self, key: &Key) -> &KeyShard {
        // The set inside takes its bucket from the low bits and its tag from the top seven.
        &self.keys[(self.seed.hash_one(key) >> 32) as usize % SHARDS]
    }

    /// The node `id`, without counting a lookup.
    pub(crate) fn get(&self, id: u64) -> Option<Arc<Inode>> {
        if id == ROOT {
            return Some(self.root.clone());
        }
        self.id_shard(id).read().get(&id).map(|found| found.0.clone())
    }

    /// The node of a known file, with one more lookup.
    pub(crate) fn find(&self, key: &Key) -> Option<Arc<Inode>> {
        let shard = self.key_shard(key).read();
        let inode = &shard.get(key)?.0;
        self.count(inode).then(|| inode.clone())
    }

    /// One more lookup of `inode`; false if it is on its way out.
    fn count(&self, inode: &Inode) -> bool {
        inode.id == ROOT || inode.look_up()
    }

    /// The node of a file that was just opened, with one more lookup: the known one if somebody was quicker, else a
    /// new one that keeps `file`.
    pub(crate) fn insert(&self, key: Key, file_type: u32, file: InodeFile) -> Arc<Inode> {
        let mut shard = self.key_shard(&key).write();
        if let Some(known) = shard.get(&key)
            && self.count(&known.0)
        {
            return known.0.clone();
        }
        // A node with this key whose count is zero is dropped from the set here; its last forget sees that.
        let inode = self.number(key, file_type, file);
        shard.replace(ByKey(inode.clone()));
        inode
    }

    /// Gives the file a free id and publishes it under that.
    fn number(&self, key: Key, file_type: u32, file: InodeFile) -> Arc<Inode> {
        loop {
            let sequence = self.next.fetch_add(1, Ordering::Relaxed);
            let id = sequence & ((1 << ID_BITS) - 1);
            let mut shard = self.id_shard(id).write();
            if id <= ROOT || shard.contains(&id) {
                continue;
            }
            let inode = Arc::new(Inode {
                id,
                generation: sequence >> ID_BITS,
                key,
                file_type,
                file,
                lookups: AtomicU64::new(1),
            });
            shard.insert(ById(inode.clone()));
            return inode;
        }
    }

    /// Takes `count` lookups from the node `id`. The last one ends the node and closes its file, as soon as the
    /// requests that run on it are done. The root stays.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        if id == ROOT {
            return;
        }
        let Some(inode) = self.get(id) else { return };
        if !inode.forget(count) {
            return;
        }
        let mut shard = self.key_shard(&inode.key).write();
        if shard.get(&inode.key).is_some_and(|current| current.0.id == id) {
            shard.remove(&inode.key);
        }
        drop(shard);
        self.id_shard(id).write().remove(&id);
    }

    /// Forgets everything but the root, whatever the counts say.
    pub(crate) fn clear(&self) {
        for shard in &self.keys {
            shard.write().clear();
        }
        for shard in &self.ids {
            shard.write().clear();
        }
        self.publish_root();
    }

    /// Number of nodes, the root included.
    pub(crate) fn len(&self) -> usize {
        self.ids.iter().map(|shard| shard.read().len()).sum()
    }
}
