//! `bench`: rafsd against virtiofsd and nydusd.
//!
//! All daemons run at once and are driven one after the other, A B C A B C, by the same in-process front-end:
//! no guest, no emulator, memory in memfds, real virtqueues. A ratio is taken within each round; the table has
//! the medians over the rounds. Absolute figures are of this machine and this minute alone.
//!
//! * `peer`: the daemons; `load`: the load generator; `work`: what guests do
//! * `rows`: the table of operations; `stall`: the table of head-of-line blocking

#![allow(clippy::indexing_slicing, clippy::panic)] // A benchmark that goes wrong must stop.

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
use rows::{Measured, Operation, Row};
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
                _ => {
                    return Err(Error::Usage(format!(
                        "{name}: expected --rafsd, --rafs, --peers, --rounds, --time (ms) or --filter"
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
    let setting = prepare(&arguments, directory.path())?;
    let kinds: Vec<Kind> = [Kind::Rafsd, Kind::Virtiofsd, Kind::Nydusd]
        .into_iter()
        .filter(|kind| {
            let there = *kind == Kind::Rafsd || setting.peers.join(kind.name()).exists();
            if !there {
                eprintln!("SKIPPED: {} is not in {}", kind.name(), setting.peers.display());
            }
            there
        })
        .collect();
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

fn operations(arguments: &Arguments, setting: &Setting, kinds: &[Kind]) -> Result<()> {
    let peers = kinds
        .iter()
        .map(|kind| kind.start(setting, 1, |cache| setting.image.local(cache)))
        .collect::<Result<Vec<Peer>>>()?;
    for peer in &peers {
        // Warm: all of the image is resident, all of the tree in the page cache.
        for path in [Some(peer.shared), peer.image].into_iter().flatten() {
            peer.guest.read_file(format!("{path}/big"))?;
        }
    }
    println!(
        "| tree | operation | depth | rafsd op/s | cpu µs/request | signals/request | peer | throughput × | cpu × | p50 × |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for image in [false, true] {
        for operation in Operation::ALL {
            for depth in [1, 16, 32] {
                let row = Row {
                    image,
                    operation,
                    depth,
                };
                let label = format!(
                    "{} {}",
                    if image { "image" } else { "passthrough" },
                    operation.label()
                );
                if (image && operation.writes()) || !label.contains(&arguments.filter) {
                    continue;
                }
                compare(&row, &peers, arguments)?;
            }
        }
    }
    println!("\n| daemon | peak memory KiB |\n|---|---|");
    for peer in &peers {
        println!("| {} | {} |", peer.kind.name(), peer.daemon.memory_kib("VmHWM")?);
    }
    Ok(())
}

/// Runs one row on all peers in turn, round after round, and prints ratios.
fn compare(row: &Row, peers: &[Peer], arguments: &Arguments) -> Result<()> {
    let taking: Vec<&Peer> = peers
        .iter()
        .filter(|peer| !row.image || peer.image.is_some())
        .collect();
    let mut rounds: Vec<Vec<Measured>> = Vec::new();
    for round in 0..arguments.rounds {
        let mut measured: Vec<(usize, Measured)> = Vec::new();
        for turn in 0..taking.len() {
            let which = (turn + round) % taking.len();
            measured.push((which, row.run(taking[which], arguments.time)?));
        }
        measured.sort_by_key(|(which, _)| *which);
        rounds.push(measured.into_iter().map(|(_, measured)| measured).collect());
    }
    let ours = |f: fn(&Measured) -> f64| median_of(rounds.iter().map(|round| f(&round[0])));
    let signals = |m: &Measured| m.outcome.calls as f64 / m.outcome.requests.max(1) as f64;
    let p50 = |m: &Measured| median_of(m.outcome.latencies.iter().map(|time| *time as f64));
    for (which, peer) in taking.iter().enumerate().skip(1) {
        let ratio = |f: &dyn Fn(&Measured) -> f64| {
            median_of(rounds.iter().map(|round| f(&round[0]) / f(&round[which])))
        };
        let latency = if row.depth == 1 {
            format!("{:.2}", ratio(&p50))
        } else {
            "".into()
        };
        println!(
            "| {} | {} | {} | {:.0} | {:.2} | {:.2} | {} | {:.2} | {:.2} | {latency} |",
            if row.image { "image" } else { "passthrough" },
            row.operation.label(),
            row.depth,
            ours(|m| m.outcome.rate()),
            ours(|m| m.cpu),
            ours(signals),
            peer.kind.name(),
            ratio(&|m| m.outcome.rate()),
            ratio(&|m| m.cpu),
        );
    }
    if taking.len() == 1 {
        println!(
            "| {} | {} | {} | {:.0} | {:.2} | {:.2} | none | | | |",
            if row.image { "image" } else { "passthrough" },
            row.operation.label(),
            row.depth,
            ours(|m| m.outcome.rate()),
            ours(|m| m.cpu),
            ours(signals)
        );
    }
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
