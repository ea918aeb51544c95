//! A large image: 200,000 files, half of them in one directory. What it takes to mount it, to hold it, and to look at all of it.

use std::path::Path;
use std::time::{Duration, Instant};

use rafsd_frontend::abi::Dirent;
use rafsd_frontend::daemon::{Builder, Daemon};
use rafsd_frontend::image::Image;
use rafsd_frontend::{Error, Guest, Options, Order, Result};

use crate::load::Load;
use crate::peer::{Kind, Setting};
use crate::work::Walk;

/// Files of the one directory, and of each of the others.
const MANY: usize = 100_000;
const DIRECTORIES: usize = 10;
const FILES: usize = 10_000;
/// Requests in flight in the two walks.
const DEPTHS: [usize; 2] = [1, 16];

/// Makes the trees and the images, and prints the table.
pub fn compare(
    rafs: &Path,
    directory: &Path,
    setting: &Setting,
    kinds: &[Kind],
    rounds: usize,
) -> Result<()> {
    let tree = directory.join("large");
    make(&tree).map_err(|e| failed("make the large tree", e))?;
    println!(
        "\n| format | daemon | mount ms | private KiB: started, mounted, all seen | file-backed KiB: started, mounted, all seen | find: names/s | stat, depth 1: requests/s | depth 16 |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for format in ["6", "5"] {
        let output = directory.join(format!("large-v{format}"));
        let options = ["--fs-version", format];
        let image = Image::build(&rafs.display().to_string(), &tree, &output, &options)?;
        let mut all: Vec<Vec<Figures>> = kinds.iter().map(|_| Vec::new()).collect();
        for _ in 0..rounds {
            for (figures, kind) in all.iter_mut().zip(kinds) {
                figures.push(kind.again(|| measure(*kind, setting, &image))?);
            }
        }
        for (figures, kind) in all.iter().zip(kinds) {
            let median = |f: fn(&Figures) -> f64| crate::median_of(figures.iter().map(f));
            println!(
                "| v{format} | {} | {:.1} | {:.0}, {:.0}, {:.0} | {:.0}, {:.0}, {:.0} | {:.0} | {:.0} | {:.0} |",
                kind.name(),
                median(|f| f.mount.as_secs_f64() * 1000.0),
                median(|f| f.private[0]),
                median(|f| f.private[1]),
                median(|f| f.private[2]),
                median(|f| f.file[0]),
                median(|f| f.file[1]),
                median(|f| f.file[2]),
                median(|f| f.find),
                median(|f| f.stat[0]),
                median(|f| f.stat[1]),
            );
        }
    }
    Ok(())
}

/// One run of one daemon. Memory is all that the process has, in KiB: before the mount, after it, and after everything.
struct Figures {
    mount: Duration,
    private: [f64; 3],
    file: [f64; 3],
    find: f64,
    stat: [f64; 2],
}

fn failed(what: &str, source: std::io::Error) -> Error {
    Error::Io {
        what: what.into(),
        source,
    }
}

fn make(tree: &Path) -> std::io::Result<()> {
    let fill = |directory: &Path, count: usize| -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        (0..count).try_for_each(|number| {
            let path = directory.join(format!("file-{number:06}"));
            // Chunks of their own, like most files of an image have.
            std::fs::write(&path, path.display().to_string())
        })
    };
    fill(&tree.join("many"), MANY)?;
    (0..DIRECTORIES).try_for_each(|number| fill(&tree.join(format!("some/{number}")), FILES))
}

/// Private memory, and that of mapped files, those in a tmpfs included.
fn memory(daemon: &Daemon) -> Result<[f64; 2]> {
    let file = daemon.memory_kib("RssFile")? + daemon.memory_kib("RssShmem")?;
    Ok([daemon.memory_kib("RssAnon")? as f64, file as f64])
}

fn measure(kind: Kind, setting: &Setting, image: &Image) -> Result<Figures> {
    let program = match kind {
        Kind::Rafsd => setting.rafsd.clone(),
        other => setting.peers.join(other.name()),
    };
    let mut builder = Builder::new(program)?;
    if kind == Kind::Nydusd {
        builder = builder.arg("--rlimit-nofile").arg("0");
    }
    let cache = builder.directory().join("cache");
    std::fs::create_dir(&cache).map_err(|e| failed("make a cache", e))?;
    let config = image.local(&cache);
    let daemon = builder.start()?;
    let guest = Guest::boot(
        &daemon.socket,
        Options {
            order: Order::CloudHypervisor,
            queue_size: 256,
            strict_length: kind == Kind::Rafsd,
            ..Options::default()
        },
    )?;
    let before = memory(&daemon)?;
    let begin = Instant::now();
    daemon.mount_rafs("/image", &image.bootstrap, &config)?;
    let mount = begin.elapsed();
    let mounted = memory(&daemon)?;

    let begin = Instant::now();
    let names = find(&guest)?;
    let find = names.len() as f64 / begin.elapsed().as_secs_f64();
    let count = names.len();
    if count != MANY + DIRECTORIES * FILES {
        return Err(Error::Usage(format!("{} shows {count} files", kind.name())));
    }
    let mut walk = Walk {
        names,
        stat: true,
        at: 0,
    };
    let mut stat = [0.0; 2];
    for (rate, depth) in stat.iter_mut().zip(DEPTHS) {
        let mut load = Load::new(&guest, 1, depth, 4096)?;
        let begin = walk.at;
        let (mut requests, mut time) = (0, Duration::ZERO);
        // All names, in order.
        while walk.at < begin + count {
            let outcome = load.run(&mut walk, Duration::from_millis(100))?;
            requests += outcome.requests;
            time += outcome.elapsed;
        }
        *rate = requests as f64 / time.as_secs_f64();
    }
    let seen = memory(&daemon)?;
    let of = |part: usize| [before[part], mounted[part], seen[part]];
    Ok(Figures {
        mount,
        private: of(0),
        file: of(1),
        find,
        stat,
    })
}

/// All files below the image, as (directory, name with NUL); listed with their attributes, as `find` and `ls -l` do.
fn find(guest: &Guest) -> Result<Vec<(u64, Vec<u8>)>> {
    let mut files = Vec::new();
    let mut open = vec![guest.resolve("/image")?.nodeid];
    while let Some(directory) = open.pop() {
        for mut entry in guest.list(directory, true, 32768)? {
            if entry.name.starts_with(b".") {
                continue;
            }
            let Dirent {
                entry: Some(found), ..
            } = &entry
            else {
                return Err(Error::Usage("an entry without attributes".into()));
            };
            if found.attr.mode & 0o170_000 == 0o040_000 {
                open.push(found.nodeid);
            } else {
                entry.name.push(0);
                files.push((directory, entry.name));
            }
        }
    }
    Ok(files)
}
