//! The start of a container from an image of which nothing is local, and of twenty at once: some three hundred files that lie all over
//! an image of the size of Debian with Python, read eight at a time from a registry that takes its time.
//!
//! Each run has a daemon of its own and an empty cache; time is from the mount request to the last answer. The registry is
//! `rafs serve`, which counts requests and bytes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::guest::Ticket;
use rafsd_frontend::image::Image;
use rafsd_frontend::random::Random;
use rafsd_frontend::{Error, Guest, Options, Order, Result, ops};
use serde_json::{Value, json};

use crate::median_of;

/// Directories of the image, and files of each.
const DIRECTORIES: usize = 120;
const FILES: usize = 40;
/// Files that a start reads.
const START: usize = 320;
/// Most bytes of a READ, as Linux sends them.
const PIECE: u32 = 128 << 10;
/// Time that a start may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Daemons that start at once.
const CROWD: usize = 20;

/// Files of the image that a start reads, in its order.
struct Start {
    files: Vec<(usize, usize)>,
}

/// What is compared.
pub struct Programs {
    /// `rafsd`.
    pub rafsd: PathBuf,
    /// `rafs`, which makes and serves the image.
    pub rafs: PathBuf,
    /// `nydusd`, if it is there.
    pub nydusd: Option<PathBuf>,
}

/// Who is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rafsd,
    Nydusd,
}

/// Compares rafsd and nydusd, and prints the tables; only of starts that read so many files at a time, if a number is given, and only of rows
/// that have one of `words` in their names, if there are any.
pub fn compare(
    programs: &Programs,
    directory: &Path,
    rounds: usize,
    only: Option<usize>,
    words: &[&str],
) -> Result<()> {
    let (image, start) = make(&programs.rafs, directory)?;
    let server = Server::start(&programs.rafs, &directory.join("cold-image"))?;
    let traces = record(&image, &start, programs, &server, directory)?;
    println!("\n| latency | depth | daemon | seconds | × nydusd's best | × warm | cpu ms | requests | KiB |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for (latency, depth) in [(5, 8), (20, 8), (5, 1), (20, 1)] {
        if only.is_some_and(|only| only != depth) {
            continue;
        }
        server.delay(latency)?;
        let mut rows = Row::all(programs, &traces);
        rows.retain(|row| words.is_empty() || words.iter().any(|word| row.name.contains(word)));
        for round in 0..rounds {
            // The machine's mood is that of a round, and nobody is always first.
            for turn in 0..rows.len() {
                let which = (turn + round) % rows.len();
                let row = &mut rows[which];
                let run = match row.run(programs, &image, &start, &server, depth) {
                    Ok(run) => Some(run),
                    // One of the peers stops answering now and then.
                    Err(error) if row.kind == Kind::Nydusd && error.is_timeout() => {
                        eprintln!("{}: {error}", row.name);
                        None
                    }
                    Err(error) => return Err(Error::Usage(format!("{}: {error}", row.name))),
                };
                row.runs.push(run);
            }
        }
        show(&rows, latency, depth);
    }
    if only.is_some() || !words.is_empty() {
        return Ok(());
    }
    server.delay(5)?;
    println!(
        "\n| {CROWD} daemons, one cache directory | finished | seconds | requests | KiB |\n|---|---|---|---|---|"
    );
    for kind in [Kind::Rafsd, Kind::Nydusd] {
        if kind == Kind::Nydusd && programs.nydusd.is_none() {
            continue;
        }
        let (finished, run) = crowd(kind, programs, &image, &start, &server)?;
        println!(
            "| {} | {finished} | {:.2} | {} | {} |",
            kind.name(),
            run.time.as_secs_f64(),
            run.requests,
            run.bytes >> 10
        );
    }
    Ok(())
}

/// Prints the medians. Times are compared within each round: with the fastest of nydusd's configurations in it, and with a warm start.
fn show(rows: &[Row], latency: u64, depth: usize) {
    let rounds = rows.first().map_or(0, |row| row.runs.len());
    let seconds = |row: &Row, round: usize| row.runs[round].map(|run| run.time.as_secs_f64());
    let least = |of: &dyn Fn(&Row) -> bool, round| {
        let times = rows
            .iter()
            .filter(|row| of(row))
            .filter_map(|row| seconds(row, round));
        times.reduce(f64::min)
    };
    for row in rows {
        let ratio = |of: &dyn Fn(&Row) -> bool| {
            let ratios = (0..rounds).filter_map(|round| Some(seconds(row, round)? / least(of, round)?));
            let ratios: Vec<f64> = ratios.collect();
            let most = ratios.iter().copied().fold(f64::NAN, f64::max);
            match ratios.is_empty() {
                true => String::new(),
                false => format!("{:.2} (most {most:.2})", median_of(ratios.into_iter())),
            }
        };
        let median = |f: fn(&Run) -> f64| median_of(row.runs.iter().flatten().map(f));
        let most = |f: fn(&Run) -> u64| row.runs.iter().flatten().map(f).max().unwrap_or(0);
        println!(
            "| {latency} ms | {depth} | {} | {:.3} | {} | {} | {:.0} | {:.0} (most {}) | {:.0} (most {}) |",
            row.name,
            median(|run| run.time.as_secs_f64()),
            ratio(&|row| row.kind == Kind::Nydusd),
            ratio(&|row| row.warm),
            median(|run| run.cpu.as_secs_f64() * 1e3),
            median(|run| run.requests as f64),
            most(|run| run.requests),
            median(|run| run.bytes as f64 / 1024.0),
            most(|run| run.bytes >> 10),
        );
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Rafsd => "rafsd",
            Kind::Nydusd => "nydusd",
        }
    }

    fn program(self, programs: &Programs) -> PathBuf {
        match (self, &programs.nydusd) {
            (Kind::Nydusd, Some(nydusd)) => nydusd.clone(),
            _ => programs.rafsd.clone(),
        }
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// The image: programs and modules of 1 to 70 KiB and a few libraries, which compress to a third; and the start set.
fn make(rafs: &Path, directory: &Path) -> Result<(Image, Start)> {
    let tree = directory.join("cold-tree");
    let mut random = Random::new(7);
    for package in 0..DIRECTORIES {
        let below = tree.join(format!("lib/package-{package:03}"));
        std::fs::create_dir_all(&below).map_err(failed("make the tree"))?;
        for file in 0..FILES {
            let size = match (package * FILES + file) % 97 {
                // A library.
                0 => 600 << 10,
                _ => 1024 + random.below(69 << 10),
            };
            std::fs::write(below.join(format!("module-{file:02}")), text(&mut random, size))
                .map_err(failed("make the tree"))?;
        }
    }
    let image = Image::build(
        &rafs.display().to_string(),
        &tree,
        &directory.join("cold-image"),
        &[],
    )?;
    // Every fifteenth file, in no order.
    let mut files: Vec<(usize, usize)> = (0..START)
        .map(|number| number * (DIRECTORIES * FILES / START))
        .map(|number| (number / FILES, number % FILES))
        .collect();
    for at in (1..files.len()).rev() {
        files.swap(at, random.below(at + 1));
    }
    Ok((image, Start { files }))
}

/// Bytes that compress to about a third.
fn text(random: &mut Random, size: usize) -> Vec<u8> {
    let mut data = Vec::with_capacity(size + 32);
    while data.len() < size {
        data.extend_from_slice(&random.bytes(6));
        data.extend_from_slice(b"    return self.");
    }
    data.truncate(size);
    data
}

/// One kind of daemon and configuration.
struct Row {
    name: String,
    kind: Kind,
    /// Members of the configuration that are not as usual.
    with: Value,
    /// Traces that lie in the cache directory.
    traces: Option<PathBuf>,
    /// Start once before, so that everything is local.
    warm: bool,
    /// By round; nothing where it did not answer.
    runs: Vec<Option<Run>>,
}

/// What a start cost.
#[derive(Clone, Copy, Debug)]
struct Run {
    time: Duration,
    /// Of all threads of the daemon. 0 for many daemons.
    cpu: Duration,
    requests: u64,
    bytes: u64,
}

impl Row {
    fn all(programs: &Programs, traces: &Path) -> Vec<Self> {
        let row = |name: &str, kind, with| Self {
            name: name.to_owned(),
            kind,
            with,
            traces: None,
            warm: false,
            runs: Vec::new(),
        };
        let everything = |threads: u64, size: u64| json!({"enable": true, "prefetch_all": true, "threads_count": threads, "merging_size": size});
        let mut rows = Vec::new();
        if programs.nydusd.is_some() {
            let nydusd = |name: &str, with| row(&format!("nydusd, {name}"), Kind::Nydusd, with);
            rows.extend([
                nydusd("default", json!({})),
                nydusd("exact", json!({"amplify_io": 0})),
                nydusd("batches of 4 MiB", json!({"amplify_io": 4 << 20})),
                nydusd("prefetch of all", json!({"fs_prefetch": everything(8, 1 << 20)})),
                nydusd(
                    "prefetch of all, 4 MiB",
                    json!({"amplify_io": 4 << 20, "fs_prefetch": everything(8, 4 << 20)}),
                ),
            ]);
        }
        let rafsd = |name: &str, with| row(&format!("rafsd, {name}"), Kind::Rafsd, with);
        rows.extend([
            rafsd("default", json!({})),
            rafsd("prefetch of all", json!({"fs_prefetch": everything(8, 4 << 20)})),
            Self {
                traces: Some(traces.to_owned()),
                ..rafsd("trace", json!({}))
            },
            Self {
                warm: true,
                ..rafsd("warm", json!({}))
            },
        ]);
        rows
    }

    fn run(
        &self,
        programs: &Programs,
        image: &Image,
        start: &Start,
        server: &Server,
        depth: usize,
    ) -> Result<Run> {
        let cache = tempfile::tempdir().map_err(failed("make a cache"))?;
        if let Some(traces) = &self.traces {
            let to = cache.path().join("traces");
            std::fs::create_dir(&to).map_err(failed("make a cache"))?;
            for file in std::fs::read_dir(traces)
                .map_err(failed("read traces"))?
                .flatten()
            {
                std::fs::copy(file.path(), to.join(file.file_name())).map_err(failed("copy a trace"))?;
            }
        }
        let config = server.config(cache.path(), &self.with);
        if self.warm {
            let served = Served::start(self.kind, programs)?;
            served.mount(image, &config)?;
            start.run(&served.guest, depth)?;
        }
        let served = Served::start(self.kind, programs)?;
        server.clear()?;
        let before = served.daemon.cpu_nanoseconds()?;
        let begin = Instant::now();
        served.mount(image, &config)?;
        start.run(&served.guest, depth)?;
        let time = begin.elapsed();
        let cpu = Duration::from_nanos(served.daemon.cpu_nanoseconds()?.saturating_sub(before));
        let (requests, bytes) = server.traffic()?;
        Ok(Run {
            time,
            cpu,
            requests,
            bytes,
        })
    }
}

/// Records a start; tells where the trace lies.
fn record(
    image: &Image,
    start: &Start,
    programs: &Programs,
    server: &Server,
    directory: &Path,
) -> Result<PathBuf> {
    let cache = directory.join("recording");
    let served = Served::start(Kind::Rafsd, programs)?;
    served.mount(image, &server.config(&cache, &json!({})))?;
    let trace = |method| {
        let target = "/api/rafsd/v1/trace?mountpoint=/image";
        let answer = served.daemon.request(method, target, None)?;
        match answer.status {
            200..300 => Ok(()),
            status => Err(Error::Usage(format!(
                "{method} {target}: {status} {}",
                answer.body
            ))),
        }
    };
    trace("PUT")?;
    start.run(&served.guest, 8)?;
    trace("DELETE")?;
    Ok(cache.join("traces"))
}

/// Many daemons that share a cache directory, all at once. Tells how many finished, and what it cost.
fn crowd(
    kind: Kind,
    programs: &Programs,
    image: &Image,
    start: &Start,
    server: &Server,
) -> Result<(usize, Run)> {
    let cache = tempfile::tempdir().map_err(failed("make a cache"))?;
    let config = server.config(cache.path(), &json!({}));
    let all = (0..CROWD)
        .map(|_| Served::start(kind, programs))
        .collect::<Result<Vec<Served>>>()?;
    server.clear()?;
    let begin = Instant::now();
    let finished = std::thread::scope(|scope| {
        let starts: Vec<_> = all
            .iter()
            .map(|served| {
                let config = &config;
                scope.spawn(move || {
                    let outcome = served
                        .mount(image, config)
                        .and_then(|()| start.run(&served.guest, 8));
                    if let Err(error) = &outcome {
                        eprintln!("{}: {error}", kind.name());
                    }
                    outcome.is_ok()
                })
            })
            .collect();
        let outcomes = starts.into_iter().map(std::thread::ScopedJoinHandle::join);
        outcomes.filter(|outcome| matches!(outcome, Ok(true))).count()
    });
    let time = begin.elapsed();
    let (requests, bytes) = server.traffic()?;
    Ok((
        finished,
        Run {
            time,
            cpu: Duration::ZERO,
            requests,
            bytes,
        },
    ))
}

/// A daemon with a guest on it.
struct Served {
    daemon: Daemon,
    guest: Guest,
}

impl Served {
    fn start(kind: Kind, programs: &Programs) -> Result<Self> {
        let mut builder = Builder::new(kind.program(programs))?;
        if kind == Kind::Nydusd {
            builder = builder.arg("--rlimit-nofile").arg("0");
        }
        let daemon = builder.start()?;
        let options = Options {
            order: Order::CloudHypervisor,
            queue_size: 256,
            strict_length: kind == Kind::Rafsd,
            timeout: PATIENCE,
            ..Options::default()
        };
        let guest = Guest::boot(&daemon.socket, options)?;
        Ok(Self { daemon, guest })
    }

    fn mount(&self, image: &Image, config: &str) -> Result<()> {
        self.daemon.mount_rafs("/image", &image.bootstrap, config)
    }
}

/// What becomes of one of the files that are read at a time.
enum Step {
    Lookup,
    Open { node: u64 },
    Read { node: u64, fh: u64, at: u64 },
    Release,
}

impl Start {
    /// LOOKUP, OPEN, READ of everything, RELEASE of each file, so many at a time.
    fn run(&self, guest: &Guest, depth: usize) -> Result<()> {
        let mut directories = Vec::new();
        for package in 0..DIRECTORIES {
            let path = format!("/image/lib/package-{package:03}");
            directories.push(guest.resolve(path)?.nodeid);
        }
        let mut files = self.files.iter();
        let mut begin = || -> Result<Option<(Ticket, Step)>> {
            let Some((package, file)) = files.next() else {
                return Ok(None);
            };
            let directory = directories.get(*package).copied().unwrap_or_default();
            let ticket = guest.submit(&ops::lookup(directory, format!("module-{file:02}")))?;
            Ok(Some((ticket, Step::Lookup)))
        };
        let mut slots = Vec::new();
        for _ in 0..depth {
            slots.push(begin()?);
        }
        let deadline = Instant::now() + PATIENCE;
        while slots.iter().any(Option::is_some) {
            let mut found = false;
            for slot in &mut slots {
                let Some((ticket, step)) = slot else { continue };
                let Some(reply) = guest.poll(*ticket)? else {
                    continue;
                };
                found = true;
                *slot = match step.next(guest, reply.ok()?)? {
                    Some(next) => Some(next),
                    None => begin()?,
                };
            }
            if !found {
                if Instant::now() > deadline {
                    return Err(Error::Timeout {
                        what: "a start".into(),
                        waited: PATIENCE,
                    });
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Ok(())
    }
}

impl Step {
    fn next(&self, guest: &Guest, reply: Vec<u8>) -> Result<Option<(Ticket, Step)>> {
        let read = |node, fh, at| -> Result<_> {
            let ticket = guest.submit(&ops::read(node, fh, at, PIECE))?;
            Ok(Some((ticket, Step::Read { node, fh, at })))
        };
        let number = |at: usize| {
            let bytes = reply.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes
                .map(u64::from_le_bytes)
                .ok_or_else(|| Error::Device("a reply that is too short".into()))
        };
        match *self {
            Step::Lookup => {
                let node = number(0)?;
                Ok(Some((guest.submit(&ops::open(node, 0))?, Step::Open { node })))
            }
            Step::Open { node } => read(node, number(0)?, 0),
            Step::Read { node, fh, at } => {
                let got = reply.len() as u64;
                if got < u64::from(PIECE) {
                    let ticket = guest.submit(&ops::release(node, fh))?;
                    return Ok(Some((ticket, Step::Release)));
                }
                read(node, fh, at + got)
            }
            Step::Release => Ok(None),
        }
    }
}

/// `rafs serve`.
struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(rafs: &Path, image: &Path) -> Result<Self> {
        let mut child = Command::new(rafs)
            .arg("serve")
            .arg(image)
            .args(["--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed("start rafs serve"))?;
        let mut address = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out)
                .read_line(&mut address)
                .map_err(failed("read the address of rafs serve"))?;
        }
        Ok(Self {
            child,
            address: address.trim().to_owned(),
        })
    }

    /// As a snapshotter writes it.
    fn config(&self, cache: &Path, with: &Value) -> String {
        let mut config = json!({
            "device": {
                "id": cache,
                "backend": {"type": "registry", "config": {
                    "scheme": "http", "host": self.address, "repo": "debian/python", "timeout": 60, "connect_timeout": 60,
                    "retry_limit": 2, "proxy": {"fallback": false}}},
                "cache": {"type": "blobcache", "config": {"work_dir": cache}},
            },
            "mode": "direct",
            "digest_validate": false,
            "enable_xattr": true,
        });
        if let (Some(config), Some(with)) = (config.as_object_mut(), with.as_object()) {
            config.extend(with.clone());
        }
        config.to_string()
    }

    /// Milliseconds until the head of each answer.
    fn delay(&self, latency: u64) -> Result<()> {
        self.ask("PUT", "/_fault", &format!("latency={latency}"))
            .map(drop)
    }

    fn clear(&self) -> Result<()> {
        self.ask("DELETE", "/_requests", "").map(drop)
    }

    /// Requests and bytes since `clear`.
    fn traffic(&self) -> Result<(u64, u64)> {
        let answer: Value = serde_json::from_str(&self.ask("GET", "/_requests", "")?)
            .map_err(|error| Error::Usage(format!("rafs serve: {error}")))?;
        let number = |name: &str| answer.get(name).and_then(Value::as_u64).unwrap_or_default();
        Ok((number("requests"), number("bytes")))
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Result<String> {
        let what = || format!("{method} {path} of rafs serve");
        let mut stream = TcpStream::connect(&self.address).map_err(failed(what()))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .map_err(failed(what()))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(failed(what()))?;
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 20") => Ok(body.to_owned()),
            _ => Err(Error::Usage(format!("{}: {answer}", what()))),
        }
    }
}
