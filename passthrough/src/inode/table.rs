//! All nodes of one mount, found by id and by key.
//!
//! Two sharded sets hold the same nodes: every request searches one, every lookup the other. Counts change without a
//! lock; only a node's first lookup and its last forget write to the sets. The rule that makes this safe: a count that
//! has reached zero never rises again. A lookup that meets such a node makes a new one under a new id, so a FORGET that
//! is still on its way out cannot take a fresh reference with it.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use super::budget::FdBudget;
use super::file::{FileHandle, HandleFile, InodeFile};
use super::mount::{Mount, Mounts};
use super::{Inode, Key, ROOT};
use crate::config::InodeFiles;
use crate::proc::ProcFd;

/// Node ids have this many bits.
const ID_BITS: u32 = 40;
/// Room that a shard keeps once it has had it.
const SHARD_MIN: usize = 128;
/// Parts of each set.
const SHARDS: usize = 64;

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

/// Gives memory back when most of a shard is empty; moving the rest costs less than the removals before it did.
fn shrink<T: Eq + Hash, S: BuildHasher>(shard: &mut HashSet<T, S>) {
    if shard.capacity() > SHARD_MIN && shard.len() < shard.capacity() / 8 {
        shard.shrink_to(shard.len() * 2);
    }
}

type IdShard = RwLock<HashSet<ById, BuildHasherDefault<IdHasher>>>;
type KeyShard = RwLock<HashSet<ByKey, RandomState>>;

/// All nodes of one mount.
#[derive(Debug)]
pub(crate) struct InodeTable {
    root: Arc<Inode>,
    next: AtomicU64,
    mounts: Mounts,
    _root_mount: Option<Arc<Mount>>,
    budget: Arc<FdBudget>,
    by_handle: bool,
    ids: [IdShard; SHARDS],
    keys: [KeyShard; SHARDS],
    /// Chooses the shard of a key; the shards' own hashing is seeded the same way, so that a guest which can choose
    /// inode numbers cannot choose collisions.
    seed: RandomState,
}

impl InodeTable {
    /// A table that holds the root, which is never forgotten.
    pub(crate) fn new(
        root: OwnedFd,
        key: Key,
        proc: Arc<ProcFd>,
        budget: Arc<FdBudget>,
        files: InodeFiles,
    ) -> Self {
        let seed = RandomState::new();
        let root = Arc::new(Inode {
            id: ROOT,
            generation: 0,
            key,
            file_type: libc::S_IFDIR,
            file: InodeFile::Fd {
                fd: root,
                _permit: None,
            },
            lookups: AtomicU64::new(1),
        });
        let mounts = Mounts::new(proc, budget.clone());
        // The mount of the root is known before any file on it, so it never has to be opened by way of one of those.
        let by_handle = files == InodeFiles::Handles;
        let root_mount = by_handle.then(|| mounts.meet(&root)).flatten();
        let table = InodeTable {
            root: root.clone(),
            mounts,
            _root_mount: root_mount,
            budget,
            by_handle,
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

    /// The node of a known file that `key` was just seen to name, with one more lookup.
    ///
    /// None if there is none, or if the key alone does not tell: see [`Self::adopt`].
    pub(crate) fn find(&self, key: &Key) -> Option<Arc<Inode>> {
        let shard = self.key_shard(key).read();
        let inode = &shard.get(key)?.0;
        // The file has existed since the node was made and exists now, so it is what the key named in between.
        (inode.holds_file() && self.count(inode)).then(|| inode.clone())
    }

    /// The node of a known file, without counting a lookup; for callers that can bear another file in rare cases.
    pub(crate) fn peek(&self, key: &Key) -> Option<Arc<Inode>> {
        self.key_shard(key).read().get(key).map(|found| found.0.clone())
    }

    /// One more lookup of `inode`; false if it is on its way out.
    fn count(&self, inode: &Inode) -> bool {
        inode.id == ROOT || inode.look_up()
    }

    /// The node of the file behind the O_PATH descriptor `fd`, with one more lookup: the known one if there is one,
    /// else a new one. `links` is the file's number of names.
    ///
    /// ENFILE: the node would need a descriptor and the budget has none left.
    pub(crate) fn adopt(&self, fd: OwnedFd, key: Key, file_type: u32, links: u32) -> io::Result<Arc<Inode>> {
        let handle = if self.by_handle {
            FileHandle::of(fd.as_fd()).ok()
        } else {
            None
        };
        if let Some(known) = self.find_same(&key, handle.as_ref().map(|(handle, _)| handle)) {
            known.offer(fd);
            return Ok(known);
        }
        let by_handle = handle.and_then(|(handle, listed_id)| {
            let mount = self.mounts.of(&key, fd.as_fd(), &handle, listed_id)?;
            Some((handle, mount))
        });
        let file = match by_handle {
            Some((handle, mount)) => InodeFile::Handle(HandleFile::new(handle, mount, fd)),
            None => InodeFile::Fd {
                _permit: Some(self.budget.take()?),
                fd,
            },
        };
        let inode = self.insert(key, file_type, file);
        if links == 0 {
            inode.pin();
        }
        Ok(inode)
    }

    fn find_same(&self, key: &Key, handle: Option<&FileHandle>) -> Option<Arc<Inode>> {
        let shard = self.key_shard(key).read();
        let inode = &shard.get(key)?.0;
        (inode.is_file_of(handle) && self.count(inode)).then(|| inode.clone())
    }

    /// Publishes a new node, unless somebody was quicker to make one of the same file.
    fn insert(&self, key: Key, file_type: u32, file: InodeFile) -> Arc<Inode> {
        let mut shard = self.key_shard(&key).write();
        if let Some(known) = shard.get(&key)
            && known.0.is_same_file(&file)
            && self.count(&known.0)
        {
            return known.0.clone();
        }
        // A node with this key that is on its way out, or whose file is gone from the host, leaves the set here. Its
        // last forget sees that.
        let inode = self.number(key, file_type, file);
        shard.replace(ByKey(inode.clone()));
        drop(shard);
        inode.join_clock();
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
    /// requests that run on it are done. The root stays. Returns whether this ended the node.
    pub(crate) fn forget(&self, id: u64, count: u64) -> bool {
        if id == ROOT {
            return false;
        }
        let Some(inode) = self.get(id) else { return false };
        if !inode.forget(count) {
            return false;
        }
        let mut keys = self.key_shard(&inode.key).write();
        if keys.get(&inode.key).is_some_and(|current| current.0.id == id) {
            keys.remove(&inode.key);
            shrink(&mut keys);
        }
        drop(keys);
        let mut ids = self.id_shard(id).write();
        ids.remove(&id);
        shrink(&mut ids);
        true
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

    /// Lets go of files on mounts that the host has unmounted; returns how many such mounts there were.
    pub(crate) fn release_unmounted(&self) -> io::Result<usize> {
        let gone = self.mounts.detach_unlisted()?;
        if !gone.is_empty() {
            for shard in &self.ids {
                for node in shard
                    .read()
                    .iter()
                    .filter(|node| gone.contains(&node.0.key.mount))
                {
                    node.0.abandon_descriptor();
                }
            }
        }
        Ok(gone.len())
    }

    /// Number of nodes, the root included.
    pub(crate) fn len(&self) -> usize {
        self.ids.iter().map(|shard| shard.read().len()).sum()
    }
}
