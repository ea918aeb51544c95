//! An immutable table: mounts by id, and the pseudo tree that leads to them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{Instance, Mount, MountError, MountId};

/// The root's local id, in the pseudo tree and in every instance.
pub(crate) const ROOT: u64 = 1;
/// Bits of a local id.
const LOCAL_BITS: u32 = 40;
/// The local part of a nodeid.
const LOCAL_MASK: u64 = (1 << LOCAL_BITS) - 1;
/// Never a mount id: stands above the inode numbers of pseudo directories.
pub(super) const PSEUDO_INO: u32 = (1 << 24) - 1;

/// The mount id in a nodeid; 0 is the pseudo tree.
fn mount_of(nodeid: u64) -> u32 {
    (nodeid >> LOCAL_BITS) as u32
}

/// The local id in a nodeid.
pub(crate) fn local_of(nodeid: u64) -> u64 {
    nodeid & LOCAL_MASK
}

/// The nodeid of a local id in a mount, or none if the local id is too large.
pub(crate) fn nodeid(mount: MountId, local: u64) -> Option<u64> {
    (local <= LOCAL_MASK).then_some((u64::from(mount.0) << LOCAL_BITS) | local)
}

/// What a nodeid stands for.
pub(crate) enum Target<'a> {
    /// A directory of the pseudo tree.
    Pseudo(&'a Node),
    /// A local id in a mount.
    Mount(&'a Arc<Mount>, u64),
}

/// What a name in a pseudo directory stands for.
pub(crate) enum Child<'a> {
    Directory(&'a Node),
    Mountpoint(&'a Arc<Mount>),
}

/// A directory of the pseudo tree.
#[derive(Clone)]
pub(crate) struct Node {
    pub id: u64,
    pub parent: u64,
    name: Box<[u8]>,
    pub mount: Option<MountId>,
    /// When an entry was added or removed last, or the directory made: seconds and nanoseconds since 1970.
    pub changed: (u64, u32),
    children: BTreeMap<Box<[u8]>, u64>,
}

impl Node {
    /// The inode number that the guest sees.
    pub fn ino(&self) -> u64 {
        pseudo_ino(self.id)
    }

    /// Its link count: itself, its name, and the `..` of each entry.
    pub fn links(&self) -> u32 {
        2 + self.children.len() as u32
    }
}

fn now() -> (u64, u32) {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    (since.as_secs(), since.subsec_nanos())
}

fn pseudo_ino(id: u64) -> u64 {
    if id == ROOT {
        ROOT
    } else {
        (u64::from(PSEUDO_INO) << LOCAL_BITS) | id
    }
}

#[derive(Clone)]
pub(crate) struct Table {
    /// By id, ascending.
    mounts: Vec<Arc<Mount>>,
    nodes: HashMap<u64, Arc<Node>>,
    root: Arc<Node>,
}

impl Table {
    pub fn new() -> Self {
        let root = Arc::new(Node {
            id: ROOT,
            parent: ROOT,
            name: Box::default(),
            mount: None,
            changed: now(),
            children: BTreeMap::new(),
        });
        Table {
            mounts: Vec::new(),
            nodes: HashMap::from([(ROOT, Arc::clone(&root))]),
            root,
        }
    }

    pub fn mounts(&self) -> &[Arc<Mount>] {
        &self.mounts
    }

    /// What `nodeid` stands for, or none if it is stale or was never given out.
    pub fn resolve(&self, nodeid: u64) -> Option<Target<'_>> {
        match mount_of(nodeid) {
            0 if nodeid == ROOT => match self.root.mount.and_then(|id| self.mount(id.0)) {
                Some(mount) => Some(Target::Mount(mount, mount.root)),
                None => Some(Target::Pseudo(&self.root)),
            },
            0 => self.nodes.get(&nodeid).map(|node| Target::Pseudo(node)),
            id => self.mount(id).map(|mount| Target::Mount(mount, local_of(nodeid))),
        }
    }

    /// The mount that `nodeid` belongs to, if any.
    pub fn mount_of(&self, nodeid: u64) -> Option<&Arc<Mount>> {
        match self.resolve(nodeid)? {
            Target::Mount(mount, _) => Some(mount),
            Target::Pseudo(_) => None,
        }
    }

    pub fn mount(&self, id: u32) -> Option<&Arc<Mount>> {
        // Ids are ascending and mostly dense: look where it would be if none had been taken away.
        let guess = (id as usize).checked_sub(1)?;
        if let Some(mount) = self.mounts.get(guess)
            && mount.id.0 == id
        {
            return Some(mount);
        }
        let index = self.mounts.binary_search_by_key(&id, |mount| mount.id.0).ok()?;
        self.mounts.get(index)
    }

    /// The entry `name` of the pseudo directory `node`.
    pub fn child(&self, node: &Node, name: &[u8]) -> Option<Child<'_>> {
        let child = self.nodes.get(node.children.get(name)?)?;
        match child.mount.and_then(|id| self.mount(id.0)) {
            Some(mount) => Some(Child::Mountpoint(mount)),
            None => Some(Child::Directory(child)),
        }
    }

    /// The entries of a pseudo directory: stable position, name, inode number. Positions start at 3, after `.` and `..`.
    pub fn entries<'a>(&'a self, node: &'a Node, after: u64) -> impl Iterator<Item = (u64, &'a [u8], u64)> {
        let mut entries: Vec<(u64, &[u8], u64)> = node
            .children
            .iter()
            .filter_map(|(name, id)| {
                let child = self.nodes.get(id)?;
                let ino = match child.mount.and_then(|id| self.mount(id.0)) {
                    Some(mount) => mount.root ^ mount.ino_mask,
                    None => child.ino(),
                };
                // A node id is never used twice, so it is a position that survives changes of the directory.
                Some((id + 1, name.as_ref(), ino))
            })
            .filter(|(position, ..)| *position > after)
            .collect();
        entries.sort_unstable_by_key(|(position, ..)| *position);
        entries.into_iter()
    }

    /// The inode number of a pseudo directory's parent.
    pub fn parent_ino(&self, node: &Node) -> u64 {
        pseudo_ino(node.parent)
    }

    /// Images have inode numbers of their own, made unique by the mount id. The first host tree keeps the
    /// numbers of the host; further ones have the mount id folded in.
    pub fn ino_mask(&self, id: MountId, instance: &Instance) -> u64 {
        let kept = || {
            self.mounts
                .iter()
                .any(|mount| mount.ino_mask == 0 && matches!(mount.instance, Instance::Passthrough(_)))
        };
        match instance {
            Instance::Passthrough(_) if !kept() => 0,
            _ => u64::from(id.0) << LOCAL_BITS,
        }
    }

    pub fn find(&self, names: &[&[u8]]) -> Option<&Arc<Node>> {
        let mut node = &self.root;
        for name in names {
            node = self.nodes.get(node.children.get(*name)?)?;
        }
        Some(node)
    }

    /// This table with `mount` at the path `names`, where nothing is mounted.
    pub fn with_mount(
        &self,
        names: &[&[u8]],
        mount: Arc<Mount>,
        next_node: &mut u64,
    ) -> Result<Table, MountError> {
        let mut next = self.clone();
        let mut id = ROOT;
        for name in names {
            let known = next
                .nodes
                .get(&id)
                .and_then(|node| node.children.get(*name))
                .copied();
            id = match known {
                Some(child) => child,
                None => {
                    let child = *next_node;
                    if child >= LOCAL_MASK {
                        return Err(MountError::Exhausted);
                    }
                    *next_node += 1;
                    let node = Node {
                        id: child,
                        parent: id,
                        name: (*name).into(),
                        mount: None,
                        changed: now(),
                        children: BTreeMap::new(),
                    };
                    next.nodes.insert(child, Arc::new(node));
                    next.change(id, |parent| {
                        parent.children.insert((*name).into(), child);
                        parent.changed = now();
                    });
                    child
                }
            };
        }
        next.change(id, |node| node.mount = Some(mount.id));
        next.mounts.push(mount);
        next.mounts.sort_unstable_by_key(|mount| mount.id);
        Ok(next)
    }

    /// This table without what is mounted at `names` and without the directories that only led there.
    pub fn without_mount(&self, names: &[&[u8]]) -> Option<(Table, Arc<Mount>)> {
        let node = self.find(names)?;
        let mount = Arc::clone(self.mount(node.mount?.0)?);
        let mut next = self.clone();
        next.mounts.retain(|other| other.id != mount.id);
        let mut id = node.id;
        next.change(id, |node| node.mount = None);
        while id != ROOT
            && let Some(node) = next.nodes.get(&id)
            && node.mount.is_none()
            && node.children.is_empty()
        {
            let (parent, name) = (node.parent, node.name.clone());
            next.nodes.remove(&id);
            next.change(parent, |parent| {
                parent.children.remove(&name);
                parent.changed = now();
            });
            id = parent;
        }
        Some((next, mount))
    }

    fn change(&mut self, id: u64, change: impl FnOnce(&mut Node)) {
        if let Some(node) = self.nodes.get_mut(&id) {
            change(Arc::make_mut(node));
            if id == ROOT {
                self.root = Arc::clone(node);
            }
        }
    }
}

/// The components of an absolute path.
pub(super) fn split(path: &str) -> Result<Vec<&[u8]>, MountError> {
    let bad = |reason| MountError::BadPath {
        path: path.to_owned(),
        reason,
    };
    if !path.starts_with('/') {
        return Err(bad("is not absolute"));
    }
    if path.len() > 4096 {
        return Err(bad("is longer than 4096 bytes"));
    }
    let names: Vec<&[u8]> = path
        .split('/')
        .filter(|name| !name.is_empty())
        .map(str::as_bytes)
        .collect();
    for name in &names {
        if matches!(*name, b"." | b"..") {
            return Err(bad("has a component `.` or `..`"));
        }
        if name.len() > 255 {
            return Err(bad("has a component longer than 255 bytes"));
        }
        if name.contains(&0) {
            return Err(bad("contains a NUL byte"));
        }
    }
    Ok(names)
}

/// The path that [`split`] would take apart.
pub(super) fn join(names: &[&[u8]]) -> String {
    let mut path = String::from("/");
    for (index, name) in names.iter().enumerate() {
        if index > 0 {
            path.push('/');
        }
        path.push_str(&String::from_utf8_lossy(name));
    }
    path
}
