//! What has been counted for a file that is being changed, or that has no name left.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::fs::Stat;

use super::{Account, Change, QuotaUsage};
use crate::inode::Key;

/// Parts of the table.
const SHARDS: usize = 16;
/// Bytes of the unit of `st_blocks`.
const SECTOR: u64 = 512;

/// The charge of a file. Exists once for each file, for as long as the guest has it open, changes it, or, if it has no
/// name left, can reach it.
#[derive(Debug)]
pub(crate) struct Charge {
    account: Arc<Account>,
    key: Key,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that the ledger holds for the file.
    bytes: u64,
    /// The file has no name, and the ledger holds it as such.
    nameless: bool,
}

impl State {
    fn usage(&self) -> QuotaUsage {
        QuotaUsage {
            bytes: self.bytes,
            inodes: 1,
        }
    }
}

fn bytes_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(SECTOR)
}

/// Whose the bytes of a file without a charge are.
enum Known {
    /// They were counted when the tree was.
    Counted,
    /// The file is new: its inode has been counted, its bytes have not. If it is to have a name and has none, somebody took
    /// that already and gave the inode back.
    Inode {
        /// It was made with a name.
        named: bool,
    },
}

impl Account {
    /// The charge of the file behind `file`, whose key is `key`; `None` if it is on another mount.
    ///
    /// # Errors
    ///
    /// What `fstat` says.
    pub(crate) fn charge(
        self: &Arc<Self>,
        key: &Key,
        file: BorrowedFd<'_>,
    ) -> io::Result<Option<Arc<Charge>>> {
        self.find_charge(key, file, Known::Counted)
    }

    /// As [`Self::charge`], of a file that this change has made, with a name or without.
    pub(crate) fn charge_new(
        self: &Arc<Self>,
        change: &Change<'_>,
        key: &Key,
        file: BorrowedFd<'_>,
        named: bool,
    ) -> io::Result<Option<Arc<Charge>>> {
        let charge = self.find_charge(key, file, Known::Inode { named })?;
        if let Some(charge) = &charge {
            charge.settle(change, file);
        }
        Ok(charge)
    }

    fn find_charge(
        self: &Arc<Self>,
        key: &Key,
        file: BorrowedFd<'_>,
        known: Known,
    ) -> io::Result<Option<Arc<Charge>>> {
        if !self.counts(key) {
            return Ok(None);
        }
        let mut shard = self.charges.shard(key).lock();
        if let Some(charge) = shard.get(key).and_then(Weak::upgrade) {
            return Ok(Some(charge));
        }
        // Looked at under the lock: whoever changes the file has a charge of it, and would have been found.
        let stat = rustix::fs::fstat(file)?;
        let mut state = State::default();
        let nameless = stat.st_nlink == 0;
        if matches!(known, Known::Counted) || nameless && matches!(known, Known::Inode { named: true }) {
            state.bytes = bytes_of(&stat);
            if nameless {
                // Whoever took its last name gave it back, or the host did and nobody has noticed.
                state.nameless = true;
                let mut ledger = self.ledger.lock();
                ledger.used.add(state.usage());
                ledger.nameless.add(state.usage());
            }
        }
        let charge = Arc::new(Charge {
            account: self.clone(),
            key: *key,
            state: Mutex::new(state),
        });
        shard.insert(*key, Arc::downgrade(&charge));
        Ok(Some(charge))
    }
}

impl Charge {
    /// The account.
    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    /// Counts what the file behind `file` takes now, and whether it has a name.
    pub(crate) fn settle(&self, _: &Change<'_>, file: BorrowedFd<'_>) {
        let mut state = self.state.lock();
        let stat = match rustix::fs::fstat(file) {
            Ok(stat) if stat.st_ino == self.key.ino => stat,
            Ok(_) => return,
            Err(error) => {
                tracing::debug!(%error, "a file could not be counted");
                return;
            }
        };
        let now = State {
            bytes: bytes_of(&stat),
            nameless: stat.st_nlink == 0,
        };
        if now.bytes == state.bytes && now.nameless == state.nameless {
            return;
        }
        let mut ledger = self.account.ledger.lock();
        ledger.used.add(now.usage());
        ledger.used.subtract(state.usage());
        if state.nameless {
            ledger.nameless.subtract(state.usage());
        }
        if now.nameless {
            ledger.nameless.add(now.usage());
        }
        ledger.changes += 1;
        *state = now;
    }

    /// Whether the file had no name when it was last counted.
    pub(crate) fn is_nameless(&self) -> bool {
        self.state.lock().nameless
    }

    /// A count of the whole tree has found `bytes`.
    fn rebase(&self, bytes: u64) {
        let mut state = self.state.lock();
        if !state.nameless {
            state.bytes = bytes;
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut shard = self.account.charges.shard(&self.key).lock();
        // Another may have taken the place by now.
        if shard.get(&self.key).is_some_and(|held| held.strong_count() == 0) {
            shard.remove(&self.key);
        }
        drop(shard);
        let state = self.state.get_mut();
        if state.nameless {
            let mut ledger = self.account.ledger.lock();
            ledger.used.subtract(state.usage());
            ledger.nameless.subtract(state.usage());
            ledger.changes += 1;
        }
    }
}

type Shard = Mutex<HashMap<Key, Weak<Charge>>>;

/// The charges that there are.
#[derive(Debug, Default)]
pub(super) struct Charges {
    shards: [Shard; SHARDS],
    seed: std::hash::RandomState,
}

impl Charges {
    // The index is a remainder by the number of shards.
    #[allow(clippy::indexing_slicing)]
    fn shard(&self, key: &Key) -> &Shard {
        &self.shards[self.seed.hash_one(key) as usize % SHARDS]
    }

    /// Whether the file `key` has a charge.
    pub(super) fn holds(&self, key: &Key) -> bool {
        self.shard(key).lock().contains_key(key)
    }

    /// A count of the whole tree has found that these files take so many bytes.
    pub(super) fn rebase(&self, found: &HashMap<Key, u64>) {
        for (key, bytes) in found {
            // The last reference may be this one, which must not be dropped under the lock.
            let charge = self.shard(key).lock().get(key).and_then(Weak::upgrade);
            if let Some(charge) = charge {
                charge.rebase(*bytes);
            }
        }
    }
}

/// Files without a name that the guest still knows, by node.
#[derive(Debug, Default)]
pub(crate) struct Nameless(Mutex<HashMap<u64, Arc<Charge>>>);

impl Nameless {
    /// Keeps `charge` for as long as the guest knows the node, which `is_known` tells.
    pub(crate) fn keep(&self, node: u64, charge: Arc<Charge>, is_known: impl FnOnce() -> bool) {
        let replaced = self.0.lock().insert(node, charge);
        drop(replaced);
        // A node that was forgotten before it was kept here would never be let go of.
        if !is_known() {
            self.let_go(node);
        }
    }

    /// The guest has forgotten the node.
    pub(crate) fn let_go(&self, node: u64) {
        let charge = self.0.lock().remove(&node);
        drop(charge);
    }

    /// The guest has forgotten all.
    pub(crate) fn clear(&self) {
        let all = std::mem::take(&mut *self.0.lock());
        drop(all);
    }
}
