//! What was asked for, by mountpoint. Places are taken first and filled later.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use backend::config::SourceConfig;
use kata::config::{Config, FileCache};
use kata::control::{ControlError, Settings};
use kata::timestamp::Utc;
use parking_lot::Mutex;
use passthrough::PassthroughFs;
use rafs::fs::RafsFs;

use super::counters::Counters;
use super::instance::Kind;
use super::paths::Paths;
use super::prefetch::Prefetching;

/// A mount as it was asked for.
#[derive(Clone)]
pub(super) struct Mounted {
    pub kind: Kind,
    /// Bootstrap of an image, or a directory of the host.
    pub source: String,
    pub since: Utc,
    /// Only of images.
    pub image: Option<MountedImage>,
    /// Only of directories; the device's table owns it.
    pub directory: Weak<PassthroughFs>,
}

/// What is particular to images.
#[derive(Clone)]
pub(super) struct MountedImage {
    /// With its secrets.
    pub config: Config,
    /// Its bootstrap.
    pub bootstrap: String,
    /// Where its files are, as far as somebody asked.
    pub paths: Arc<Paths>,
    /// What was changed since.
    pub settings: Settings,
    /// Where its blobs come from at present.
    pub source: SourceConfig,
    /// The instance; the device's table owns it.
    pub instance: Weak<RafsFs>,
    /// What was counted of it.
    pub counters: Arc<Counters>,
    /// Ends with the mount.
    pub prefetching: Arc<Prefetching>,
}

impl MountedImage {
    /// `registry`, `localfs`, ...
    pub fn source_type(&self) -> &'static str {
        self.config
            .backend
            .as_ref()
            .map_or("", |backend| backend.type_name())
    }

    /// Directory of its cache.
    pub fn cache_dir(&self) -> &str {
        self.file_cache().map_or("", |cache| &cache.work_dir)
    }

    /// Bytes that its cache directory may take; 0: no limit.
    pub fn cache_quota(&self) -> u64 {
        self.file_cache().map_or(0, |cache| cache.quota)
    }

    fn file_cache(&self) -> Option<&FileCache> {
        self.config.cache.as_ref()?.file_cache()
    }
}

enum Slot {
    /// Something is about to be mounted here.
    Taken,
    Mounted(Box<Mounted>),
    /// Mounted, and about to be changed or unmounted.
    Changing(Box<Mounted>),
}

/// The table.
#[derive(Default)]
pub(super) struct Table {
    slots: Mutex<BTreeMap<String, Slot>>,
}

impl Table {
    /// Takes a free mountpoint. Dropping the place gives it back.
    pub fn take(&self, path: &str) -> Result<Place<'_>, ControlError> {
        let mut slots = self.slots.lock();
        if slots.contains_key(path) {
            return Err(ControlError::failed(format!(
                "mountpoint {path}: object or filesystem already exists"
            )));
        }
        slots.insert(path.to_owned(), Slot::Taken);
        Ok(Place {
            table: self,
            path: path.to_owned(),
        })
    }

    /// Takes a mount, to change it or to unmount it. Dropping it leaves it as it was.
    pub fn take_mounted(&self, path: &str) -> Result<TakenMount<'_>, ControlError> {
        let mut slots = self.slots.lock();
        match slots.get_mut(path) {
            Some(slot @ Slot::Mounted(_)) => {
                let Slot::Mounted(mounted) = std::mem::replace(slot, Slot::Taken) else {
                    return Err(missing(path));
                };
                *slot = Slot::Changing(mounted.clone());
                Ok(TakenMount {
                    table: self,
                    path: path.to_owned(),
                    mounted,
                })
            }
            Some(Slot::Changing(_)) => Err(busy(path)),
            Some(Slot::Taken) | None => Err(missing(path)),
        }
    }

    /// Looks at one mount. Keep it short.
    pub fn with<T>(&self, path: &str, look: impl FnOnce(&Mounted) -> T) -> Result<T, ControlError> {
        match self.slots.lock().get(path) {
            Some(Slot::Mounted(mounted) | Slot::Changing(mounted)) => Ok(look(mounted)),
            Some(Slot::Taken) | None => Err(missing(path)),
        }
    }

    /// Finds an image by its mountpoint, else by the id of its configuration; without an id, the only image there is.
    pub fn image(&self, id: Option<&str>) -> Result<(String, MountedImage), ControlError> {
        let slots = self.slots.lock();
        let mut images = slots.iter().filter_map(|(path, slot)| match slot {
            Slot::Mounted(mounted) | Slot::Changing(mounted) => Some((path, mounted.image.as_ref()?)),
            Slot::Taken => None,
        });
        let found = match id {
            Some(id) => {
                let all: Vec<_> = images.collect();
                let at = all.iter().find(|(path, _)| *path == id);
                at.or_else(|| all.iter().find(|(_, image)| image.config.id == id))
                    .copied()
            }
            None => match (images.next(), images.next()) {
                (Some(only), None) => Some(only),
                (None, _) => return Err(ControlError::no_counter("no image is mounted")),
                (Some(_), Some(_)) => {
                    return Err(ControlError::no_counter(
                        "several images are mounted; say which with ?id=",
                    ));
                }
            },
        };
        match (found, id) {
            (Some((path, image)), _) => Ok((path.clone(), image.clone())),
            (None, id) => Err(ControlError::no_counter(format!(
                "no image is mounted as {}",
                id.unwrap_or("")
            ))),
        }
    }

    /// Changes what is known of one mount. Keep it short.
    pub fn change<T>(&self, path: &str, change: impl FnOnce(&mut Mounted) -> T) -> Result<T, ControlError> {
        match self.slots.lock().get_mut(path) {
            Some(Slot::Mounted(mounted)) => Ok(change(mounted)),
            Some(Slot::Changing(_)) => Err(busy(path)),
            Some(Slot::Taken) | None => Err(missing(path)),
        }
    }

    /// Looks at all mounts. Keep it short.
    pub fn all<T>(&self, look: impl Fn(&str, &Mounted) -> T) -> BTreeMap<String, T> {
        let slots = self.slots.lock();
        slots
            .iter()
            .filter_map(|(path, slot)| match slot {
                Slot::Mounted(mounted) | Slot::Changing(mounted) => Some((path.clone(), look(path, mounted))),
                Slot::Taken => None,
            })
            .collect()
    }
}

impl Table {
    /// Looks at all mounts, and whether a request is changing each. Keep it short.
    pub fn status<T>(&self, look: impl Fn(&str, &Mounted, bool) -> T) -> Vec<T> {
        let slots = self.slots.lock();
        slots
            .iter()
            .filter_map(|(path, slot)| match slot {
                Slot::Mounted(mounted) => Some(look(path, mounted, false)),
                Slot::Changing(mounted) => Some(look(path, mounted, true)),
                Slot::Taken => None,
            })
            .collect()
    }
}

fn busy(path: &str) -> ControlError {
    ControlError::failed(format!("mountpoint {path}: another request is changing it"))
}

fn missing(path: &str) -> ControlError {
    ControlError::failed(format!("mountpoint {path}: object or filesystem doesn't exist"))
}

/// A mountpoint that is kept free for one request.
pub(super) struct Place<'a> {
    table: &'a Table,
    path: String,
}

impl Place<'_> {
    /// It is mounted now.
    pub fn fill(self, mounted: Mounted) {
        self.table
            .slots
            .lock()
            .insert(self.path.clone(), Slot::Mounted(Box::new(mounted)));
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut slots = self.table.slots.lock();
        if matches!(slots.get(&self.path), Some(Slot::Taken)) {
            slots.remove(&self.path);
        }
    }
}

/// A mount that one request is changing.
pub(super) struct TakenMount<'a> {
    table: &'a Table,
    path: String,
    mounted: Box<Mounted>,
}

impl TakenMount<'_> {
    /// What is mounted.
    pub fn mounted(&self) -> &Mounted {
        &self.mounted
    }

    /// Something else is mounted now.
    pub fn replace(self, mounted: Mounted) {
        self.table
            .slots
            .lock()
            .insert(self.path.clone(), Slot::Mounted(Box::new(mounted)));
    }

    /// Nothing is mounted any more.
    pub fn clear(self) {
        self.table.slots.lock().remove(&self.path);
    }
}

impl Drop for TakenMount<'_> {
    fn drop(&mut self) {
        let mut slots = self.table.slots.lock();
        if let Some(slot @ Slot::Changing(_)) = slots.get_mut(&self.path) {
            *slot = Slot::Mounted(self.mounted.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> Mounted {
        Mounted {
            kind: Kind::Directory,
            source: "/s".into(),
            since: Utc::now(),
            image: None,
            directory: Weak::new(),
        }
    }

    #[test]
    fn a_place_is_given_once_and_given_back() {
        let table = Table::default();
        let place = table.take("/a").unwrap();
        assert!(table.take("/a").is_err());
        assert!(table.take_mounted("/a").is_err(), "not mounted yet");
        assert!(table.all(|_, _| ()).is_empty());
        drop(place);
        table.take("/a").unwrap().fill(directory());
        assert!(table.take("/a").is_err());
        assert_eq!(table.all(|_, _| ()).len(), 1);
    }

    #[test]
    fn a_mount_is_changed_by_one_request_at_a_time() {
        let table = Table::default();
        table.take("/a").unwrap().fill(directory());
        let taken = table.take_mounted("/a").unwrap();
        assert!(table.take_mounted("/a").is_err());
        assert!(table.with("/a", |_| ()).is_ok(), "still shown");
        drop(taken);
        table.take_mounted("/a").unwrap().clear();
        assert!(
            table
                .take_mounted("/a")
                .err()
                .unwrap()
                .message
                .contains("doesn't exist")
        );
    }
}
