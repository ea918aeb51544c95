//! `rafs cache`: what is in a cache directory, making room in it, and whether it still is what it was. Daemons may go on to use it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use backend::upkeep::{self, CachedBlob};
use serde_json::{Value, json};

use super::{BoxError, human, parse_size};

/// Looks after a cache directory.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the blobs: how much of them is there, and when it was last used.
    Ls {
        /// The directory (cache.filecache.work_dir).
        directory: PathBuf,
    },
    /// Make room: evict what was not used for longest, and remove what is left of blobs without any chunk.
    Gc {
        /// The directory (cache.filecache.work_dir).
        directory: PathBuf,
        /// Evict until the directory takes so many bytes of the disk at most, such as 10GiB; without it nothing is evicted.
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        keep: Option<u64>,
    },
    /// Read every chunk, and compare it with the checksum taken when it was verified. Exit status 1 if one is damaged.
    Verify {
        /// The directory (cache.filecache.work_dir).
        directory: PathBuf,
        /// Remove damaged chunks, so that they are fetched again.
        #[arg(long)]
        drop: bool,
    },
}

/// Runs the subcommand.
///
/// # Errors
///
/// The directory is no chunk cache, or cannot be used.
pub fn run(arguments: &Arguments) -> Result<ExitCode, BoxError> {
    let of = |directory: &Path| {
        let directory = directory.display().to_string();
        move |error: std::io::Error| format!("{directory}: {error}")
    };
    let mut good = true;
    let (answer, text) = match &arguments.command {
        Command::Ls { directory } => {
            let blobs = upkeep::list(directory).map_err(of(directory))?;
            (Value::Array(blobs.iter().map(blob).collect()), table(&blobs))
        }
        Command::Gc { directory, keep } => {
            let collected = upkeep::collect(directory, *keep).map_err(of(directory))?;
            let text = format!(
                "{} chunks ({}) evicted, {} blobs removed, {} used\n",
                collected.chunks,
                human(collected.bytes),
                collected.removed.len(),
                human(collected.used)
            );
            let answer = json!({
                "evicted_chunks": collected.chunks, "evicted_bytes": collected.bytes,
                "removed": collected.removed, "used": collected.used,
            });
            (answer, text)
        }
        Command::Verify { directory, drop } => {
            let found = upkeep::verify(directory, *drop).map_err(of(directory))?;
            good = found.damaged.is_empty();
            let mut text: String = found
                .damaged
                .iter()
                .map(|(blob, chunk)| format!("{blob}: chunk {chunk} is damaged\n"))
                .collect();
            text += &format!(
                "{} chunks ({}) good, {} not known, {} damaged, {} of them removed\n",
                found.good,
                human(found.bytes),
                found.unknown,
                found.damaged.len(),
                found.dropped
            );
            let damaged: Vec<Value> = found
                .damaged
                .iter()
                .map(|(blob, chunk)| json!({"blob": blob, "chunk": chunk}))
                .collect();
            let answer = json!({
                "good": found.good, "bytes": found.bytes, "unknown": found.unknown, "damaged": damaged,
                "dropped": found.dropped,
            });
            (answer, text)
        }
    };
    match arguments.json {
        true => println!("{answer:#}"),
        false => print!("{text}"),
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn blob(blob: &CachedBlob) -> Value {
    json!({
        "blob": blob.name,
        "size": blob.size,
        "used": blob.used,
        "pinned": blob.pinned,
        "chunks": blob.chunks.map(|chunks| chunks.total),
        "present": blob.chunks.map(|chunks| chunks.present),
        "doubtful": blob.chunks.map(|chunks| chunks.doubtful),
        "idle_seconds": blob.chunks.and_then(|chunks| chunks.idle).map(|idle| idle.as_secs()),
    })
}

fn table(blobs: &[CachedBlob]) -> String {
    let mut text = format!("{:>10} {:>15} {:>10}  BLOB\n", "USED", "CHUNKS", "IDLE");
    for blob in blobs {
        let (chunks, idle) = match blob.chunks {
            Some(chunks) => (
                format!("{}/{}", chunks.present + chunks.doubtful, chunks.total),
                chunks.idle.map_or_else(|| "-".to_owned(), age),
            ),
            None => ("not known".to_owned(), "-".to_owned()),
        };
        let pinned = if blob.pinned { " (pinned)" } else { "" };
        text += &format!(
            "{:>10} {chunks:>15} {idle:>10}  {}{pinned}\n",
            human(blob.used),
            blob.name
        );
    }
    text
}

fn age(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}
