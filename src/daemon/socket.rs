//! Listening sockets: bound without stealing from the living, removed without taking what is not ours.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::Error;

/// Longest path that fits a socket address.
const MAX_SUN_PATH: usize = 107;

/// A socket in the file system that listens. Dropping it removes the file, if it is still the same.
#[derive(Debug)]
pub struct Socket {
    directory: OwnedFd,
    name: PathBuf,
    /// Device and inode of the file that was made.
    identity: (u64, u64),
}

impl Socket {
    /// Makes a socket at `path`, which is resolved now and never again. A socket file that nobody listens on is replaced; one
    /// that is in use, or a file of another kind, is left alone. The members of `group`, by name or number, may connect, as
    /// virtiofsd's option of that name lets them.
    ///
    /// Whoever sees the file can connect: it gets its name last, when it listens and belongs to whom it should.
    ///
    /// # Errors
    ///
    /// The directory or the group is missing, something is in the way, or the system refuses.
    pub fn listen(path: &Path, group: Option<&str>) -> Result<(Self, UnixListener), Error> {
        Self::make(path, group).map_err(|reason| Error::Socket {
            path: path.display().to_string(),
            reason,
        })
    }

    fn make(path: &Path, group: Option<&str>) -> Result<(Self, UnixListener), String> {
        let name = PathBuf::from(path.file_name().ok_or("not the path of a file")?);
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(parent, flags, Mode::empty())
            .map_err(|reason| format!("directory {}: {reason}", parent.display()))?;
        // Two daemons that find the same stale socket must not both replace it: the second would take the place of
        // the first.
        let lock = Lock::take(&directory);
        let hidden = hidden_name(&name);
        let hidden_address = address(parent, &directory, &hidden);
        // Of one that was killed before it had its name.
        remove_stale(&directory, &hidden, &hidden_address)
            .map_err(|reason| format!("{}: {reason}", hidden.display()))?;
        let listener = UnixListener::bind(&hidden_address).map_err(|reason| reason.to_string())?;
        let hidden = Hidden {
            directory: &directory,
            name: hidden,
        };
        hidden.give_to_owner_of_directory();
        if let Some(group) = group {
            hidden
                .give_to_group(group)
                .map_err(|reason| format!("group {group:?}: {reason}"))?;
        }
        match hidden.publish(&name) {
            Err(Errno::EXIST) => {
                remove_stale(&directory, &name, &address(parent, &directory, &name))?;
                hidden.publish(&name)
            }
            outcome => outcome,
        }
        .map_err(|reason| reason.to_string())?;
        let file = rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|reason| reason.to_string())?;
        drop((hidden, lock));
        let socket = Self {
            directory,
            name,
            identity: (file.st_dev, file.st_ino),
        };
        Ok((socket, listener))
    }
}

fn hidden_name(name: &Path) -> PathBuf {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".new");
    hidden.into()
}

/// A socket's file before it has its name. Dropping it removes the file.
struct Hidden<'a> {
    directory: &'a OwnedFd,
    name: PathBuf,
}

impl Hidden<'_> {
    fn publish(&self, name: &Path) -> rustix::io::Result<()> {
        rustix::fs::linkat(self.directory, &self.name, self.directory, name, AtFlags::empty())
    }

    fn give_to(&self, user: Option<Uid>, group: Option<Gid>) -> rustix::io::Result<()> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(self.directory, &self.name, user, group, flags)
    }

    /// A runtime that starts the machine monitor as another user gives that user the directory. Best effort: without
    /// the right to do it there is no other user.
    fn give_to_owner_of_directory(&self) {
        let Ok(owner) = rustix::fs::fstat(self.directory) else {
            return;
        };
        let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
        if owner.st_uid == user.as_raw() && owner.st_gid == group.as_raw() {
            return;
        }
        let (uid, gid) = (Uid::from_raw(owner.st_uid), Gid::from_raw(owner.st_gid));
        if let Err(error) = self.give_to(Some(uid), Some(gid)) {
            tracing::debug!(
                "socket {}: cannot give it to {uid:?}: {error}",
                self.name.display()
            );
        }
    }

    fn give_to_group(&self, group: &str) -> Result<(), String> {
        let gid = match group.parse() {
            Ok(number) => Gid::from_raw(number),
            Err(_) => nix::unistd::Group::from_name(group)
                .map_err(|reason| reason.to_string())?
                .map(|group| Gid::from_raw(group.gid.as_raw()))
                .ok_or("there is none of this name")?,
        };
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP;
        self.give_to(None, Some(gid))
            .and_then(|()| rustix::fs::chmodat(self.directory, &self.name, mode, AtFlags::empty()))
            .map_err(|reason| reason.to_string())
    }
}

impl Drop for Hidden<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::unlinkat(self.directory, &self.name, AtFlags::empty());
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let Ok(file) = rustix::fs::statat(&self.directory, &self.name, flags) else {
            return;
        };
        if (file.st_dev, file.st_ino) == self.identity {
            let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }
}

/// Where to bind or to connect for `name` in `directory`, which is at `parent`. An address has room for a short path only; below the
/// descriptor of its directory every path is short.
fn address(parent: &Path, directory: &OwnedFd, name: &Path) -> PathBuf {
    let path = parent.join(name);
    match path.as_os_str().len() <= MAX_SUN_PATH {
        true => path,
        false => Path::new("/proc/self/fd")
            .join(directory.as_raw_fd().to_string())
            .join(name),
    }
}

/// Removes the socket file `name` if nobody listens on it.
fn remove_stale(directory: &OwnedFd, name: &Path, address: &Path) -> Result<(), String> {
    let file = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    if FileType::from_raw_mode(file.st_mode) != FileType::Socket {
        return Err("there is a file that is no socket; remove it or choose another path".into());
    }
    match connect(address) {
        Err(Errno::CONNREFUSED) => {
            rustix::fs::unlinkat(directory, name, AtFlags::empty()).map_err(|error| error.to_string())
        }
        Err(Errno::NOENT) => Ok(()),
        // Full queues and refused types are signs of life as well.
        Ok(()) | Err(_) => Err("another process listens on it".into()),
    }
}

/// Connects for a moment, without waiting.
fn connect(address: &Path) -> rustix::io::Result<()> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(address.as_os_str().as_bytes())?)
}

/// A lock on a directory, held by those who replace a socket in it.
struct Lock<'a>(&'a OwnedFd);

impl<'a> Lock<'a> {
    /// Without the lock (held for too long, or not to be had on this file system) one goes on all the same.
    fn take(directory: &'a OwnedFd) -> Option<Self> {
        for _ in 0..50 {
            match rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Some(Self(directory)),
                Err(Errno::WOULDBLOCK) => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                Err(_) => return None,
            }
        }
        None
    }
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::flock(self.0, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileTypeExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn listens_and_removes_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (socket, listener) = Socket::listen(&path, None).unwrap();
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn replaces_a_stale_socket_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (first, _listener) = Socket::listen(&path, None).unwrap();
        let refused = Socket::listen(&path, None).unwrap_err().to_string();
        assert!(refused.contains("another process listens"), "{refused}");
        assert!(path.exists());
        drop(first);
    }

    #[test]
    fn a_group_may_connect() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let own = rustix::process::getegid().as_raw();
        let name = nix::unistd::Group::from_gid(own.into()).unwrap();
        for group in name.map(|group| group.name).into_iter().chain([own.to_string()]) {
            let (_socket, _listener) = Socket::listen(&path, Some(&group)).unwrap();
            let file = path.metadata().unwrap();
            assert_eq!((file.gid(), file.mode() & 0o777), (own, 0o660));
        }
        let refused = Socket::listen(&path, Some("no-such-group"))
            .unwrap_err()
            .to_string();
        assert!(
            refused.ends_with("/s: group \"no-such-group\": there is none of this name"),
            "{refused}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn whoever_sees_the_file_can_connect() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for _ in 0..50 {
            std::thread::scope(|scope| {
                let listening = scope.spawn(|| Socket::listen(&path, None).unwrap());
                while !path.exists() {}
                UnixStream::connect(&path).unwrap();
                drop(listening.join().unwrap());
            });
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn what_a_killed_daemon_left_half_made_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = dir.path().join(".s.new");
        drop(UnixListener::bind(&hidden).unwrap());
        let (_socket, _listener) = Socket::listen(&dir.path().join("s"), None).unwrap();
        assert!(!hidden.exists());
        std::fs::write(&hidden, "somebody's").unwrap();
        let refused = Socket::listen(&dir.path().join("s"), None)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains(".s.new: there is a file that is no socket"),
            "{refused}"
        );
        assert!(hidden.exists());
    }

    #[test]
    fn leaves_other_files_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "precious").unwrap();
        assert!(
            Socket::listen(&path, None)
                .unwrap_err()
                .to_string()
                .contains("no socket")
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        // Nor what has taken the place of its own.
        std::fs::remove_file(&path).unwrap();
        let (socket, _listener) = Socket::listen(&path, None).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn long_paths_work() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("s");
        let (socket, _listener) = Socket::listen(&path, None).unwrap();
        assert!(std::fs::symlink_metadata(&path).unwrap().file_type().is_socket());
        assert!(Socket::listen(&path, None).is_err());
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn of_many_that_find_a_stale_socket_one_gets_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let won: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| Socket::listen(&path, None).ok()))
                .collect();
            threads
                .into_iter()
                .filter_map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(won.len(), 1);
        UnixStream::connect(&path).unwrap();
    }
}
