//! The fault matrix of docs/reliability.md: what a registry can do wrong, against first mounts, warm mounts and many mounts at once.
//!
//! In every cell: no wrong byte; every read answered, with data or with a reason; token requests within the bound; and when the registry
//! heals, so do the mounts.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr
)]

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rafsd_backend::config::*;
use rafsd_backend::store::*;
use support::http::{Reply, Request, Server};
use support::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Latency,
    UnauthorizedStorm,
    ShortTokens,
    Forbidden,
    TooMany,
    ServerError,
    Reset,
    Truncate,
    Corrupt,
    WholeToRange,
    ExpiringRedirect,
    NoAddress,
    NeverAnswers,
}

use Fault::*;

/// From healing until somebody finds out, at most: the longest pause between attempts and the time-out of one that was under way.
const PROBE: Duration = Duration::from_secs(2 + 2);
/// How the matrix is run.
#[derive(Clone, Copy)]
struct Manner {
    /// Of each read, while the registry does wrong.
    patience: Duration,
    /// Reads of some chunks each meanwhile.
    rounds: u32,
    /// What the machine may take on top of [`PROBE`].
    slack: Duration,
}

const FAULTS: [Fault; 13] = [
    Latency,
    UnauthorizedStorm,
    ShortTokens,
    Forbidden,
    TooMany,
    ServerError,
    Reset,
    Truncate,
    Corrupt,
    WholeToRange,
    ExpiringRedirect,
    NoAddress,
    NeverAnswers,
];

/// A registry with tokens and a blob store behind redirects, which does one thing wrong while `wrong` is set.
struct Registry {
    fault: Fault,
    wrong: AtomicBool,
    blobs: Vec<(String, Vec<u8>)>,
    address: Mutex<String>,
    tokens: AtomicUsize,
    /// Name and end of each token given.
    given: Mutex<Vec<(String, Instant)>>,
    replies: AtomicUsize,
    began: Instant,
}

impl Registry {
    fn answer(&self, request: &Request) -> Reply {
        let wrong = self.wrong.load(Ordering::SeqCst);
        if request.target.starts_with("/token") {
            let number = self.tokens.fetch_add(1, Ordering::SeqCst);
            let life = if wrong && self.fault == ShortTokens {
                3
            } else {
                300
            };
            let name = format!("t{number}");
            let end = Instant::now() + Duration::from_secs(life);
            self.given.lock().unwrap().push((name.clone(), end));
            return Reply::json(format!(r#"{{"token":"{name}","expires_in":{life}}}"#));
        }
        let number = self.replies.fetch_add(1, Ordering::SeqCst);
        let Some((_, data)) = self
            .blobs
            .iter()
            .find(|(id, _)| request.target.contains(id.as_str()))
        else {
            return Reply::status(404);
        };
        let good = || Reply::blob(request, data);
        let address = self.address.lock().unwrap().clone();
        if let Some((_, time)) = request.target.split_once("expires=") {
            // The blob store: no credentials, but its URLs end.
            let end = Duration::from_millis(time.parse().unwrap());
            return if self.began.elapsed() < end {
                good()
            } else {
                Reply::status(403)
            };
        }
        let challenge = || {
            Reply::status(401).with(
                "WWW-Authenticate",
                format!(r#"Bearer realm="http://{address}/token",service="s""#),
            )
        };
        let known = request
            .header("authorization")
            .and_then(|header| header.strip_prefix("Bearer "))
            .is_some_and(|token| {
                let given = self.given.lock().unwrap();
                given
                    .iter()
                    .any(|(name, end)| name == token && Instant::now() < *end)
            });
        if !known || (wrong && self.fault == UnauthorizedStorm) {
            return challenge();
        }
        if !wrong {
            return good();
        }
        match self.fault {
            Latency => Reply {
                delay: Duration::from_millis(200),
                ..good()
            },
            UnauthorizedStorm | ShortTokens => good(),
            Forbidden => Reply::status(403),
            TooMany => Reply::status(429).with("Retry-After", "1"),
            ServerError => Reply::status(503),
            Reset => Reply {
                reset: true,
                ..Reply::default()
            },
            Truncate => {
                let reply = good();
                Reply {
                    cut: Some(reply.body.len() / 2),
                    ..reply
                }
            }
            Corrupt => {
                let mut reply = good();
                // One page of a hundred.
                let pages = reply.body.len().div_ceil(4096);
                if number * pages / 100 != (number + 1) * pages / 100 {
                    let middle = reply.body.len() / 2;
                    reply.body[middle] ^= 0x10;
                }
                reply
            }
            WholeToRange => Reply {
                body: data.clone(),
                ..Reply::status(200)
            },
            ExpiringRedirect => {
                let end = self.began.elapsed().as_millis() + LIFE.as_millis();
                Reply::status(307).with("Location", format!("{}?expires={end}", request.target))
            }
            NoAddress => Reply::status(307).with("Location", "http://blobs.invalid/x"),
            NeverAnswers => Reply {
                delay: Duration::from_secs(600),
                ..Reply::default()
            },
        }
    }
}

/// Life of a redirect's target.
const LIFE: Duration = Duration::from_secs(5);

struct Cell {
    registry: Arc<Registry>,
    server: Server,
    images: Vec<TestBlob>,
    dir: tempfile::TempDir,
    config: SourceConfig,
}

#[derive(Debug, Default)]
struct Outcome {
    read: usize,
    refused: usize,
    /// From healing until everything is there.
    recovery: Duration,
    tokens: usize,
}

fn cell(fault: Fault, images: usize) -> Cell {
    let images: Vec<_> = (0..images)
        .map(|number| TestBlob::new(24, 9000 + 64 * number))
        .collect();
    let registry = Arc::new(Registry {
        fault,
        wrong: AtomicBool::new(true),
        blobs: images
            .iter()
            .map(|image| (image.id.clone(), image.stored.clone()))
            .collect(),
        address: Mutex::default(),
        tokens: AtomicUsize::new(0),
        given: Mutex::default(),
        replies: AtomicUsize::new(0),
        began: Instant::now(),
    });
    let answers = Arc::clone(&registry);
    let server = Server::start(move |request| answers.answer(request));
    *registry.address.lock().unwrap() = server.host();
    let config = SourceConfig::Registry(RegistryConfig {
        host: server.host(),
        repo: "team/app".into(),
        scheme: Scheme::Http,
        http: HttpConfig {
            timeout: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(1),
            ..HttpConfig::default()
        },
        ..RegistryConfig::default()
    });
    Cell {
        registry,
        server,
        images,
        dir: tempfile::tempdir().unwrap(),
        config,
    }
}

impl Cell {
    fn mount(&self, store: &Store) -> Vec<Arc<Blob>> {
        let cache = CacheConfig {
            amplify: 0,
            ..CacheConfig::new(self.dir.path())
        };
        let open = |image: &TestBlob| {
            store
                .open_blob(image.description(), &self.config, &cache)
                .unwrap()
        };
        self.images.iter().map(open).collect()
    }

    /// Reads `chunks` of every image at once; counts what came and what was refused with a reason.
    fn read(&self, blobs: &[Arc<Blob>], chunks: std::ops::Range<u32>, time: Duration, outcome: &mut Outcome) {
        let reads: Vec<_> = blobs
            .iter()
            .zip(&self.images)
            .flat_map(|(blob, image)| chunks.clone().map(move |index| (blob, image, index)))
            .map(|(blob, image, index)| (blob, image, index, start(blob, &[index], time)))
            .collect();
        for (blob, image, index, answer) in reads {
            let answer = answer
                .recv_timeout(time + Duration::from_secs(60))
                .unwrap_or_else(|_| panic!("{:?}: a read was never answered", self.registry.fault));
            match answer {
                Ok(held) => {
                    assert!(held.chunks.is_empty());
                    let wrong = format!("{:?}: wrong bytes in chunk {index}", self.registry.fault);
                    assert!(
                        read(blob, &image.chunks[index as usize]) == image.plain[index as usize],
                        "{wrong}"
                    );
                    outcome.read += 1;
                }
                Err(error) => {
                    assert!(error.timed_out || !error.reason.is_empty());
                    outcome.refused += 1;
                }
            }
        }
    }

    /// Mounts with nothing cached, in the middle of the fault; then the registry heals.
    fn first(&self, manner: Manner) -> Outcome {
        let Manner {
            patience,
            rounds,
            slack,
        } = manner;
        let store = Store::new(StoreOptions::default()).unwrap();
        let blobs = self.mount(&store);
        let mut outcome = Outcome::default();
        let begin = Instant::now();
        for round in 0..rounds {
            let some = 12 / rounds.min(12);
            let first = (round * some) % 12;
            self.read(&blobs, first..first + some, patience, &mut outcome);
        }
        self.registry.wrong.store(false, Ordering::SeqCst);
        let healed = Instant::now();
        // Nobody starts anything again: the same mounts, the same store.
        let again = |blob| start(blob, &(0..24).collect::<Vec<_>>(), Duration::from_secs(60));
        let mut waiting: Vec<_> = blobs.iter().map(|blob| (blob, again(blob))).collect();
        while let Some((blob, answer)) = waiting.pop() {
            if answer.recv().unwrap().is_err() {
                let fault = self.registry.fault;
                assert!(
                    healed.elapsed() < Duration::from_secs(120),
                    "{fault:?}: never heals"
                );
                std::thread::sleep(Duration::from_millis(20));
                waiting.push((blob, again(blob)));
            }
        }
        outcome.recovery = healed.elapsed();
        let requests = self.server.requests();
        let probe = requests
            .iter()
            .find(|request| request.at >= healed)
            .map(|request| request.at.duration_since(healed));
        assert!(
            probe.is_none_or(|probe| probe < PROBE + slack),
            "{:?}: asked again {probe:?} after it healed",
            self.registry.fault
        );
        assert!(
            outcome.recovery < PROBE + slack,
            "{:?}: healed after {:?}",
            self.registry.fault,
            outcome.recovery
        );
        self.read(&blobs, 0..24, Duration::from_secs(60), &mut outcome);
        outcome.tokens = self.registry.tokens.load(Ordering::SeqCst);
        // One a second at most, whatever the registry says, and one to begin with.
        let bound = 2 + begin.elapsed().as_secs() as usize;
        assert!(
            outcome.tokens <= bound,
            "{:?}: {} token requests",
            self.registry.fault,
            outcome.tokens
        );
        outcome
    }

    /// Mounts what is cached, in the middle of the fault.
    fn warm(&self) -> Outcome {
        let read_all = || {
            let store = Store::new(StoreOptions::default()).unwrap();
            let mut outcome = Outcome::default();
            self.read(&self.mount(&store), 0..24, Duration::from_secs(60), &mut outcome);
            outcome
        };
        self.registry.wrong.store(false, Ordering::SeqCst);
        read_all();
        // A second question to a slow answer may still be on its way.
        let mut asked = 0;
        while self.server.requests().len() > asked {
            asked = self.server.requests().len();
            std::thread::sleep(Duration::from_millis(500));
        }
        self.registry.wrong.store(true, Ordering::SeqCst);
        let outcome = read_all();
        assert_eq!(outcome.refused, 0);
        assert_eq!(
            self.server.requests().len(),
            asked,
            "no request for what is cached"
        );
        outcome
    }
}

fn run(faults: &[Fault], manner: Manner) {
    let report = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for fault in faults {
            let report = &report;
            scope.spawn(move || {
                let first = cell(*fault, 1).first(manner);
                let warm = cell(*fault, 1).warm();
                let many = cell(*fault, 16).first(manner);
                report.lock().unwrap().push((*fault, first, warm, many));
            });
        }
    });
    let mut report = report.into_inner().unwrap();
    report.sort_by_key(|(fault, ..)| FAULTS.iter().position(|other| other == fault));
    eprintln!(
        "fault | first: read/refused, recovery s, tokens | warm: read | 16 at once: read/refused, recovery s, tokens"
    );
    for (fault, first, warm, many) in report {
        let show = |outcome: &Outcome| {
            format!(
                "{}/{}, {:.1}, {}",
                outcome.read,
                outcome.refused,
                outcome.recovery.as_secs_f64(),
                outcome.tokens
            )
        };
        eprintln!("{fault:?} | {} | {} | {}", show(&first), warm.read, show(&many));
    }
}

#[test]
fn a_slice_of_the_matrix() {
    run(
        &FAULTS,
        Manner {
            patience: Duration::from_secs(1),
            rounds: 1,
            // Among other tests, on a machine that may have much else to do.
            slack: Duration::from_secs(60),
        },
    );
}

#[test]
#[ignore = "takes minutes: make test-faults"]
fn the_whole_matrix() {
    run(
        &FAULTS,
        Manner {
            patience: Duration::from_secs(4),
            rounds: 12,
            slack: Duration::from_secs(6),
        },
    );
}
