//! The rows of the table: a tree, an operation, a depth, a number of queues.

use std::fs::File;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use rafsd_frontend::memory::PAGE;
use rafsd_frontend::random::Random;
use rafsd_frontend::{Error, Guest, Result};

use crate::load::{Load, Outcome, Work};
use crate::peer::Peer;
use crate::work::{Data, Files, Same, Small, Walk};

/// An operation of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Their names say it; see `label`.
pub enum Operation {
    Getattr,
    Lookup,
    Readdirplus,
    StatTree,
    Small,
    Random { write: bool },
    Sequential { piece: u32, write: bool },
    Files,
}

impl Operation {
    /// All of them.
    pub const ALL: [Operation; 12] = [
        Operation::Getattr,
        Operation::Lookup,
        Operation::Readdirplus,
        Operation::StatTree,
        Operation::Small,
        Operation::Random { write: false },
        Operation::Sequential {
            piece: 128 << 10,
            write: false,
        },
        Operation::Sequential {
            piece: 1 << 20,
            write: false,
        },
        Operation::Random { write: true },
        Operation::Sequential {
            piece: 128 << 10,
            write: true,
        },
        Operation::Sequential {
            piece: 1 << 20,
            write: true,
        },
        Operation::Files,
    ];

    /// Whether it changes something, so that images cannot have it.
    pub fn writes(self) -> bool {
        matches!(
            self,
            Operation::Random { write: true } | Operation::Sequential { write: true, .. } | Operation::Files
        )
    }

    /// Its name in the table.
    pub fn label(self) -> &'static str {
        match self {
            Operation::Getattr => "getattr",
            Operation::Lookup => "lookup",
            Operation::Readdirplus => "readdirplus 32 KiB",
            Operation::StatTree => "stat tree",
            Operation::Small => "open-read-close",
            Operation::Random { write: false } => "read 4 KiB random",
            Operation::Random { write: true } => "write 4 KiB random",
            Operation::Sequential {
                piece: 131_072,
                write: false,
            } => "read 128 KiB",
            Operation::Sequential { write: false, .. } => "read 1 MiB",
            Operation::Sequential {
                piece: 131_072,
                write: true,
            } => "write 128 KiB",
            Operation::Sequential { .. } => "write 1 MiB",
            Operation::Files => "create-write-unlink",
        }
    }

    /// Whether it has rows with several queues: where requests are small, and each guest processor could have a queue
    /// of its own.
    pub fn spreads(self) -> bool {
        matches!(
            self,
            Operation::Getattr | Operation::Lookup | Operation::Small | Operation::Random { .. }
        )
    }

    fn data(self) -> usize {
        match self {
            Operation::Sequential { piece, .. } => piece as usize,
            _ => 32768,
        }
    }
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// On the image; otherwise on the passthrough tree.
    pub image: bool,
    /// What is done.
    pub operation: Operation,
    /// Request queues. A peer has one and gets on it what rafsd gets on all.
    pub queues: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
}

/// What one run cost.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Of the load generator.
    pub outcome: Outcome,
    /// CPU time of the daemon for each request, in microseconds.
    pub cpu: f64,
}

impl Row {
    /// All rows, in the table's order.
    pub fn all() -> Vec<Row> {
        let mut rows = Vec::new();
        for image in [false, true] {
            for operation in Operation::ALL {
                if image && operation.writes() {
                    continue;
                }
                let depths = [(1, 1), (1, 16), (1, 32), (crate::QUEUES, 1), (crate::QUEUES, 32)];
                let wanted = |(queues, _): &(usize, usize)| *queues == 1 || operation.spreads();
                rows.extend(depths.into_iter().filter(wanted).map(|(queues, depth)| Row {
                    image,
                    operation,
                    queues,
                    depth,
                }));
            }
        }
        rows
    }

    /// The name of its tree.
    pub fn tree(&self) -> &'static str {
        if self.image { "image" } else { "passthrough" }
    }

    /// Its name for the command line.
    pub fn label(&self) -> String {
        format!("{} {}", self.tree(), self.operation.label())
    }

    /// Runs the row on a peer, after a warm-up.
    pub fn run(&self, peer: &Peer, time: Duration) -> Result<Measured> {
        let top = if self.image {
            peer.image.unwrap_or("/")
        } else {
            peer.shared
        };
        let queues = peer.guest.queues() - 1;
        let depth = self.depth() * self.queues / queues;
        // The guest talks on the first queue to find its files: not while others use it.
        let works = (1..=queues)
            .map(|queue| self.work(&peer.guest, top, queue))
            .collect::<Result<Vec<_>>>()?;
        // All start together when all have warmed up.
        let (warm, start, end) = (
            Barrier::new(queues + 1),
            Barrier::new(queues + 1),
            Barrier::new(queues + 1),
        );
        std::thread::scope(|scope| {
            let running: Vec<_> = (1..)
                .zip(works)
                .map(|(queue, mut work)| {
                    let (warm, start, end) = (&warm, &start, &end);
                    scope.spawn(move || {
                        let prepared = Load::new(&peer.guest, queue, depth, self.operation.data())
                            .and_then(|mut load| load.run(work.as_mut(), time / 4).map(|_| load));
                        warm.wait();
                        start.wait();
                        let outcome = prepared.and_then(|mut load| load.run(work.as_mut(), time));
                        end.wait();
                        outcome
                    })
                })
                .collect();
            warm.wait();
            let before = peer.daemon.cpu_nanoseconds();
            start.wait();
            end.wait();
            let after = peer.daemon.cpu_nanoseconds();
            let outcomes = running.into_iter().map(|thread| match thread.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            let outcome = Outcome::sum(outcomes.collect::<Result<Vec<Outcome>>>()?);
            let used = after?.saturating_sub(before?);
            let cpu = used as f64 / 1000.0 / outcome.requests.max(1) as f64;
            Ok(Measured { outcome, cpu })
        })
    }

    /// Requests in flight on each queue; of a MiB no more than 16, which would only measure memory.
    fn depth(&self) -> usize {
        match self.operation {
            Operation::Sequential { piece, .. } if piece > 1 << 18 => self.depth.min(16),
            _ => self.depth,
        }
    }

    /// What the row would be without a device: reads per second of a thread that does nothing but `preadv` from the
    /// page cache into the same kind of memory. Only of sequential reads.
    pub fn plain(&self, guest: &Guest, file: &File, time: Duration) -> Result<Option<f64>> {
        let Operation::Sequential { piece, write: false } = self.operation else {
            return Ok(None);
        };
        let places = (0..self.depth())
            .map(|_| {
                let address = guest.memory.allocate(piece as usize, PAGE)?;
                let place = guest.memory.slice(address, piece as usize)?;
                place.fill(0x6b);
                Ok(place)
            })
            .collect::<Result<Vec<_>>>()?;
        let (mut reads, mut elapsed) = (0u64, Duration::ZERO);
        let start = Instant::now();
        while elapsed < time {
            for place in &places {
                place.read_file(file, reads * u64::from(piece) % crate::BIG)?;
                reads += 1;
            }
            elapsed = start.elapsed();
        }
        for place in places {
            guest.memory.release(place.address, place.len());
        }
        Ok(Some(reads as f64 / elapsed.as_secs_f64()))
    }

    fn work(&self, guest: &Guest, top: &str, queue: usize) -> Result<Box<dyn Work + Send>> {
        let path = |name: &str| format!("{top}/{name}");
        let names = |directory: &str| -> Result<Vec<(u64, Vec<u8>)>> {
            let node = guest.resolve(path(directory))?.nodeid;
            let listed = guest.list(node, false, 32768)?;
            let named = listed.into_iter().filter(|entry| !entry.name.starts_with(b"."));
            Ok(named
                .map(|mut entry| {
                    entry.name.push(0);
                    (node, entry.name)
                })
                .collect())
        };
        let tree = |guest: &Guest| -> Result<Vec<(u64, Vec<u8>)>> {
            let mut all = Vec::new();
            for number in 0..crate::DIRECTORIES {
                all.extend(names(&format!("tree/{number}"))?);
            }
            if all.is_empty() {
                return Err(Error::Usage(format!("{} sees no tree", guest.queues())));
            }
            Ok(all)
        };
        Ok(match self.operation {
            Operation::Getattr => Box::new(Same::getattr(guest.resolve(path("tree/0"))?.nodeid)),
            Operation::Lookup => Box::new(Walk {
                names: names("tree/0")?,
                stat: false,
                at: 0,
            }),
            Operation::Readdirplus => {
                let node = guest.resolve(path("tree/0"))?.nodeid;
                Box::new(Same::readdirplus(node, guest.opendir(node)?))
            }
            Operation::StatTree => Box::new(Walk {
                names: tree(guest)?,
                stat: true,
                at: 0,
            }),
            Operation::Small => {
                let nodes = names("tree/1")?
                    .iter()
                    .map(|(node, name)| Ok(guest.lookup(*node, &name[..name.len() - 1])?.nodeid))
                    .collect::<Result<Vec<u64>>>()?;
                Box::new(Small { nodes, at: 0 })
            }
            Operation::Random { write } => {
                let random = Some(Random::new(queue as u64));
                self.data(guest, &path("big"), 4096, write, random)?
            }
            Operation::Sequential { piece, write } => self.data(guest, &path("big"), piece, write, None)?,
            Operation::Files => Box::new(Files {
                directory: guest.resolve(path("files"))?.nodeid,
                open: Vec::new(),
            }),
        })
    }

    fn data(
        &self,
        guest: &Guest,
        path: &str,
        piece: u32,
        write: bool,
        random: Option<Random>,
    ) -> Result<Box<dyn Work + Send>> {
        let path = if write {
            path.replace("big", "big-rw")
        } else {
            path.to_owned()
        };
        let entry = guest.resolve(&path)?;
        let fh = guest.open(entry.nodeid, if write { 2 } else { 0 })?;
        Ok(Box::new(Data {
            nodeid: entry.nodeid,
            fh,
            len: crate::BIG,
            piece,
            write,
            random,
            at: 0,
        }))
    }
}
