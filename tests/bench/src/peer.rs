//! The daemons that are compared, each with a passthrough tree, and an image where it can have one.

use std::path::{Path, PathBuf};

use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::image::Image;
use rafsd_frontend::memory::Place;
use rafsd_frontend::{Error, Guest, Options, Order, Result};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Rafsd,
    /// `virtiofsd`: passthrough only.
    Virtiofsd,
    /// `nydusd virtiofs`.
    Nydusd,
}

/// A peer is started so many times more if it does not answer.
const STARTS: usize = 3;

/// Where the programs and their data are.
pub struct Setting {
    /// `rafsd`.
    pub rafsd: PathBuf,
    /// Directory with `virtiofsd` and `nydusd`.
    pub peers: PathBuf,
    /// The tree that is passed through.
    pub shared: PathBuf,
    /// The same tree as an image.
    pub image: Image,
}

/// A daemon with a guest on it.
pub struct Peer {
    /// Who it is.
    pub kind: Kind,
    /// The process.
    pub daemon: Daemon,
    /// Its guest.
    pub guest: Guest,
    /// Path of the passthrough tree inside the tag.
    pub shared: &'static str,
    /// Path of the image inside the tag.
    pub image: Option<&'static str>,
}

impl Kind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Rafsd => "rafsd",
            Kind::Virtiofsd => "virtiofsd",
            Kind::Nydusd => "nydusd",
        }
    }

    /// What `run` gives. On a busy machine nydusd may leave the first request of a guest unanswered (it was kicked, and asks to
    /// be kicked for that same chain): it is started again then, and that is said. Nobody starts us again.
    pub fn again<T>(self, run: impl Fn() -> Result<T>) -> Result<T> {
        let mut left = if self == Kind::Rafsd { 0 } else { STARTS };
        loop {
            match run() {
                Err(error) if left > 0 && error.is_timeout() => {
                    left -= 1;
                    eprintln!("{} is started again: {error}", self.name());
                }
                Err(error) => {
                    eprintln!("while {} was measured:", self.name());
                    return Err(error);
                }
                done => return done,
            }
        }
    }

    /// Starts it with its mounts; `config` is that of the image.
    pub fn start(self, place: &Setting, queues: usize, config: impl Fn(&Path) -> String) -> Result<Peer> {
        self.again(|| self.start_once(place, queues, &config))
    }

    fn start_once(self, place: &Setting, queues: usize, config: &impl Fn(&Path) -> String) -> Result<Peer> {
        let program = match self {
            Kind::Rafsd => place.rafsd.clone(),
            other => place.peers.join(other.name()),
        };
        let builder = Builder::new(program)?;
        let cache = builder.directory().join("cache");
        std::fs::create_dir(&cache).map_err(|e| Error::Io {
            what: "make a cache".into(),
            source: e,
        })?;
        let (daemon, shared, image) = match self {
            Kind::Virtiofsd => {
                let socket = builder.directory().join("vhost.sock").display().to_string();
                let shared = place.shared.display().to_string();
                let arguments = [
                    "--socket-path",
                    &socket,
                    "--shared-dir",
                    &shared,
                    "--sandbox",
                    "none",
                    "--log-level",
                    "error",
                ];
                let builder = arguments
                    .iter()
                    .fold(builder, |builder, argument| builder.arg(*argument));
                (builder.spawn_plain("vhost.sock")?, "/", None)
            }
            Kind::Rafsd | Kind::Nydusd => {
                // It ends where it may not raise this limit.
                let limit = if self == Kind::Nydusd {
                    &["--rlimit-nofile", "0"][..]
                } else {
                    &[]
                };
                let daemon = limit
                    .iter()
                    .fold(builder, |builder, part| builder.arg(*part))
                    .start()?;
                daemon.mount_passthrough("/shared", &place.shared)?;
                daemon.mount_rafs("/image", &place.image.bootstrap, &config(&cache))?;
                (daemon, "/shared", Some("/image"))
            }
        };
        let options = Options {
            order: Order::CloudHypervisor,
            request_queues: queues,
            queue_size: 256,
            regions: vec![Place {
                address: 0,
                size: 256 << 20,
            }],
            // The used length of nydusd is always 0.
            strict_length: self == Kind::Rafsd,
            ..Options::default()
        };
        let guest = Guest::boot(&daemon.socket, options)?;
        Ok(Peer {
            kind: self,
            daemon,
            guest,
            shared,
            image,
        })
    }
}
