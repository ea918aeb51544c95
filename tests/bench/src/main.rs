//! `bench`: rafsd against virtiofsd and nydusd.
//!
//! All daemons run at once and are driven one after the other, A B C A B C, by the same in-process front-end:
//! no guest, no emulator, memory in memfds, real virtqueues. A ratio is taken within each round; the table has
//! the medians over the rounds. Absolute figures are of this machine and this minute alone.
//!
//! * `peer`: the daemons; `load`: the load generator; `work`: what guests do
//! * `rows`: the table of operations; `stall`: the table of head-of-line blocking; `large`: that of a large image
//! * `cold_start`: images of which nothing is local

#![allow(clippy::indexing_slicing, clippy::panic)] // A benchmark that goes wrong must stop.

mod cold_start;
mod large;
mod load;
mod peer;
mod rows;
mod stall;
mod work;

use std::path::{Path, PathBuf};
use std::time::Duration;

use peer::{Kind, Peer, Setting};
use rafsd_frontend::image::Image;
use rafsd_frontend::random::Random;
use rafsd_frontend::{Error, Result};
use rows::{Measured, Row};
use stall::Source;

/// Directories of the tree, each with `FILES` small files.
const DIRECTORIES: usize = 10;
const FILES: usize = 300;
/// Bytes of the big file.
const BIG: u64 = 128 << 20;

struct Arguments {
    rafsd: PathBuf,
    rafs: PathBuf,
    peers: PathBuf,
    rounds: usize,
    time: Duration,
    filter: String,
    depth: Option<usize>,
    queues: Option<usize>,
}

impl Arguments {
    fn of_process() -> Result<Self> {
        let mut arguments = Self {
            rafsd: "target/release/rafsd".into(),
            rafs: "target/release/rafs".into(),
            peers: "target/peers/bin".into(),
            rounds: 5,
            time: Duration::from_millis(400),
            filter: String::new(),
            depth: None,
            queues: None,
        };
        let mut given = std::env::args().skip(1);
        while let Some(name) = given.next() {
            let value = given
                .next()
                .ok_or_else(|| Error::Usage(format!("{name} needs a value")))?;
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|e| Error::Usage(format!("{name} {value}: {e}")))
            };
            match name.as_str() {
                "--rafsd" => arguments.rafsd = value.into(),
                "--rafs" => arguments.rafs = value.into(),
                "--peers" => arguments.peers = value.into(),
                "--rounds" => arguments.rounds = number()? as usize,
                "--time" => arguments.time = Duration::from_millis(number()?),
                "--filter" => arguments.filter = value,
                "--depth" => arguments.depth = Some(number()? as usize),
                "--queues" => arguments.queues = Some(number()? as usize),
                _ => {
                    return Err(Error::Usage(format!(
                        "{name}: expected --rafsd, --rafs, --peers, --rounds, --time (ms), --filter, --depth or --queues"
                    )));
                }
            }
        }
        Ok(arguments)
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::of_process()?;
    let directory = tempfile::tempdir().map_err(|e| Error::Io {
        what: "temporary directory".into(),
        source: e,
    })?;
    let kinds: Vec<Kind> = [Kind::Rafsd, Kind::Virtiofsd, Kind::Nydusd]
        .into_iter()
        .filter(|kind| {
            let there = *kind == Kind::Rafsd || arguments.peers.join(kind.name()).exists();
            if !there {
                eprintln!("SKIPPED: {} is not in {}", kind.name(), arguments.peers.display());
            }
            there
        })
        .collect();
    if arguments.filter.contains("cold") {
        let programs = cold_start::Programs {
            rafsd: arguments.rafsd,
            rafs: arguments.rafs,
            nydusd: kinds
                .contains(&Kind::Nydusd)
                .then(|| arguments.peers.join("nydusd")),
        };
        let words = arguments.filter.split_whitespace();
        let words: Vec<&str> = words.filter(|word| *word != "cold").collect();
        return cold_start::compare(
            &programs,
            directory.path(),
            arguments.rounds,
            arguments.depth,
            &words,
        );
    }
    let setting = prepare(&arguments, directory.path())?;
    if arguments.filter.contains("large") {
        let kinds: Vec<Kind> = kinds
            .into_iter()
            .filter(|kind| *kind != Kind::Virtiofsd)
            .collect();
        return large::compare(
            &arguments.rafs,
            directory.path(),
            &setting,
            &kinds,
            arguments.rounds,
        );
    }
    if !arguments.filter.contains("stall") {
        operations(&arguments, &setting, &kinds)?;
    }
    if arguments.filter.is_empty() || arguments.filter.contains("stall") {
        stalls(&arguments, &setting, &kinds)?;
    }
    Ok(())
}

/// The tree, and its image.
fn prepare(arguments: &Arguments, directory: &Path) -> Result<Setting> {
    let io = |e| Error::Io {
        what: "make the tree".into(),
        source: e,
    };
    let shared = directory.join("shared");
    let mut random = Random::new(1);
    for number in 0..DIRECTORIES {
        let below = shared.join(format!("tree/{number}"));
        std::fs::create_dir_all(&below).map_err(io)?;
        for file in 0..FILES {
            std::fs::write(below.join(file.to_string()), random.bytes(4096)).map_err(io)?;
        }
    }
    std::fs::create_dir(shared.join("files")).map_err(io)?;
    std::fs::write(shared.join("big"), random.bytes(BIG as usize)).map_err(io)?;
    let image = Image::build(
        &arguments.rafs.display().to_string(),
        &shared,
        &directory.join("image"),
        &[],
    )?;
    std::fs::write(shared.join("big-rw"), vec![7; BIG as usize]).map_err(io)?;
    Ok(Setting {
        rafsd: arguments.rafsd.clone(),
        peers: arguments.peers.clone(),
        shared,
        image,
    })
}

/// The middle of sorted values.
fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn median_of(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    median(&values)
}

/// An error with the name of the daemon.
fn of(kind: Kind, what: &str, error: Error) -> Error {
    Error::Device(format!("{}, {what}: {error}", kind.name()))
}

/// Queues of the second rafsd.
const QUEUES: usize = 4;

fn operations(arguments: &Arguments, setting: &Setting, kinds: &[Kind]) -> Result<()> {
    let start = |kind: Kind, queues| {
        let started = kind.start(setting, queues, |cache| setting.image.local(cache));
        started.map_err(|error| of(kind, "start", error))
    };
    let one = start(Kind::Rafsd, 1)?;
    let several = start(Kind::Rafsd, QUEUES)?;
    let others = kinds
        .iter()
        .filter(|kind| **kind != Kind::Rafsd)
        .map(|kind| start(*kind, 1))
        .collect::<Result<Vec<Peer>>>()?;
    for peer in others.iter().chain([&one, &several]) {
        // Warm: all of the image is resident, all of the tree in the page cache.
        for path in [Some(peer.shared), peer.image].into_iter().flatten() {
            let read = peer.guest.read_file(format!("{path}/big"));
            read.map_err(|error| of(peer.kind, "the first read", error))?;
        }
    }
    let big = std::fs::File::open(setting.shared.join("big")).map_err(|e| Error::Io {
        what: "open a file".into(),
        source: e,
    })?;
    println!(
        "| tree | operation | queues | depth | op/s | cpu µs | signals | throughput × | cpu × | p50 × | preadv × |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for row in Row::all() {
        let wanted = row.label().contains(&arguments.filter)
            && arguments.depth.is_none_or(|depth| depth == row.depth)
            && arguments.queues.is_none_or(|queues| queues == row.queues);
        if !wanted {
            continue;
        }
        let ours = if row.queues == 1 { &one } else { &several };
        let mut taking = vec![ours];
        taking.extend(others.iter().filter(|peer| !row.image || peer.image.is_some()));
        compare(&row, &taking, &big, arguments)?;
    }
    println!("\n| daemon | peak memory KiB |\n|---|---|");
    for peer in others.iter().chain([&one, &several]) {
        let queues = match peer.guest.queues() - 1 {
            1 => String::new(),
            queues => format!(", {queues} queues"),
        };
        let peak = peer.daemon.memory_kib("VmHWM")?;
        println!("| {}{queues} | {peak} |", peer.kind.name());
    }
    Ok(())
}

/// Runs one row on all peers in turn, round after round, and prints how the first does against the better of the
/// others.
fn compare(row: &Row, taking: &[&Peer], big: &std::fs::File, arguments: &Arguments) -> Result<()> {
    let mut rounds: Vec<Vec<Measured>> = Vec::new();
    let mut plain = Vec::new();
    for round in 0..arguments.rounds {
        let mut measured: Vec<(usize, Measured)> = Vec::new();
        for turn in 0..taking.len() {
            let which = (turn + round) % taking.len();
            let run = row.run(taking[which], arguments.time);
            let run = run.map_err(|error| of(taking[which].kind, &row.label(), error))?;
            measured.push((which, run));
        }
        measured.sort_by_key(|(which, _)| *which);
        plain.extend(row.plain(&taking[0].guest, big, arguments.time)?);
        rounds.push(measured.into_iter().map(|(_, measured)| measured).collect());
    }
    let ours = |f: fn(&Measured) -> f64| median_of(rounds.iter().map(|round| f(&round[0])));
    let rate = |m: &Measured| m.outcome.rate();
    let p50 = |m: &Measured| median_of(m.outcome.latencies.iter().map(|time| *time as f64));
    // Of all ratios to a peer, each the median of the rounds, the worst for us.
    let worst = |f: &dyn Fn(&Measured) -> f64, worse: fn(f64, f64) -> f64| {
        (1..taking.len())
            .map(|which| median_of(rounds.iter().map(|round| f(&round[0]) / f(&round[which]))))
            .reduce(worse)
            .map_or_else(String::new, |ratio| format!("{ratio:.2}"))
    };
    let latency = match row.depth * row.queues {
        1 => worst(&p50, f64::max),
        _ => String::new(),
    };
    let preadv = match plain.is_empty() {
        true => String::new(),
        false => {
            let ratio = rounds
                .iter()
                .zip(&plain)
                .map(|(round, plain)| rate(&round[0]) / plain);
            format!("{:.2}", median_of(ratio))
        }
    };
    println!(
        "| {} | {} | {} | {} | {:.0} | {:.2} | {:.2} | {} | {} | {latency} | {preadv} |",
        row.tree(),
        row.operation.label(),
        row.queues,
        row.depth,
        ours(|m| m.outcome.rate()),
        ours(|m| m.cpu),
        ours(|m| m.outcome.calls as f64 / m.outcome.requests.max(1) as f64),
        worst(&rate, f64::min),
        worst(&|m| m.cpu, f64::max),
    );
    Ok(())
}

fn stalls(arguments: &Arguments, setting: &Setting, kinds: &[Kind]) -> Result<()> {
    println!(
        "\n| daemon | source of absent data | readers | getattr p50 / p99 µs | cached read p50 / p99 µs |"
    );
    println!("|---|---|---|---|---|");
    let time = arguments.time * 5;
    for kind in kinds.iter().filter(|kind| **kind != Kind::Virtiofsd) {
        let slow = Source::Slow(Duration::from_millis(20));
        for (source, readers, name) in [
            (Source::Idle, 0, "idle"),
            (slow, 1, "20 ms"),
            (slow, 16, "20 ms"),
            (slow, 64, "20 ms"),
            (Source::Dead, 1, "never answers"),
            (Source::Dead, 64, "never answers"),
        ] {
            let [getattr, read] = stall::measure(*kind, setting, source, readers, time)?;
            println!(
                "| {} | {name} | {readers} | {:.0} / {:.0} | {:.0} / {:.0} |",
                kind.name(),
                getattr.p50,
                getattr.p99,
                read.p50,
                read.p99
            );
        }
    }
    Ok(())
}
