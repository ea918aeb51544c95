//! `rafs check`: is all of an image there, and is it right?
//!
//! First the metadata: every directory, inode, attribute and chunk address. Then, with `--blobs`, every chunk that
//! any file refers to is read once, decoded and compared with its digest, on all cores.

use std::collections::HashMap;
use std::convert::Infallible;
use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;
use rafs::inode::Kind;
use rafs::reader::Reader as Image;

use super::blobs::{Blobs, Reader};
use super::inspect::printable;
use super::progress::Bar;
use super::{BoxError, human};

/// Arguments of `rafs check`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Bootstrap, or a blob with a bootstrap inside.
    image: PathBuf,
    /// Directory with the image's blobs: verify their chunks too.
    #[arg(long, value_name = "DIR")]
    blobs: Option<PathBuf>,
    /// Faults that are shown; the others are only counted.
    #[arg(long, value_name = "N", default_value_t = 20)]
    max_faults: usize,
}

/// Chunks that a worker takes at a time. Neighbours in a blob share units, so they stay together.
const BATCH: usize = 32;

/// Checks the image. Exit status 1 if there are faults.
pub fn run(arguments: &Arguments) -> Result<ExitCode, BoxError> {
    let image = Image::open(&arguments.image)?;
    let mut faults = Faults {
        shown: arguments.max_faults,
        count: 0,
    };
    let found = check_metadata(&image, &mut faults);
    let mut verified = String::new();
    if let Some(directory) = &arguments.blobs {
        let bytes = check_chunks(&image, directory, &found, &mut faults)?;
        verified = format!(", {} chunks ({}) verified", found.chunks.len(), human(bytes));
    }
    println!(
        "{} names, {} of file data{verified}, {} faults",
        found.names,
        human(found.bytes),
        faults.count
    );
    Ok(if faults.count == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Prints the first faults and counts all.
struct Faults {
    shown: usize,
    count: usize,
}

impl Faults {
    fn add(&mut self, path: &[u8], what: &dyn std::fmt::Display) {
        if self.count < self.shown {
            println!("{}: {what}", printable(path));
        } else if self.count == self.shown {
            println!("(more faults are only counted)");
        }
        self.count += 1;
    }
}

/// What the metadata lead to.
#[derive(Default)]
struct Found {
    names: u64,
    bytes: u64,
    /// (blob, chunk), and the file that refers to it first.
    chunks: HashMap<(usize, u32), usize>,
    files: Vec<Vec<u8>>,
}

/// Checks all metadata, then collects the chunks that files refer to.
fn check_metadata(image: &Image, faults: &mut Faults) -> Found {
    let bar = Bar::counting("checking metadata");
    let checked = image.check(&mut |path, damaged| faults.add(path, &damaged));
    let mut found = Found {
        names: checked.names,
        bytes: checked.bytes,
        ..Found::default()
    };
    let walked: Result<(), Infallible> = image.walk(&mut |step| {
        // Whatever is damaged was told.
        let Ok(inode) = step.inode else { return Ok(()) };
        if inode.kind == Kind::File
            && let Ok(chunks) = image.chunks(inode)
        {
            let file = found.files.len();
            found.files.push(step.path.to_vec());
            for chunk in chunks {
                found.chunks.entry((chunk.blob, chunk.index)).or_insert(file);
            }
            bar.show(|| format!("{file} files"));
        }
        Ok(())
    });
    match walked {
        Ok(()) => found,
    }
}

/// Reads and verifies all chunks that were found; bytes that were verified.
fn check_chunks(
    image: &Image,
    directory: &std::path::Path,
    found: &Found,
    faults: &mut Faults,
) -> Result<u64, BoxError> {
    let blobs = Blobs::open(image, directory)?;
    let mut chunks: Vec<((usize, u32), usize)> =
        found.chunks.iter().map(|(chunk, file)| (*chunk, *file)).collect();
    chunks.sort_unstable();
    let bar = Bar::items("verifying chunks", chunks.len() as u64);
    let (next, bytes) = (AtomicUsize::new(0), Mutex::new(0_u64));
    let bad: Mutex<Vec<(usize, String)>> = Mutex::default();
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(|| {
                let mut reader = Reader::new(blobs.clone(), directory);
                loop {
                    let start = next.fetch_add(BATCH, Ordering::Relaxed);
                    let Some(rest) = chunks.get(start..).filter(|rest| !rest.is_empty()) else {
                        break;
                    };
                    for ((blob, chunk), file) in rest.iter().take(BATCH) {
                        match reader.read(*blob, *chunk) {
                            Ok(data) => *bytes.lock() += data.len() as u64,
                            Err(e) => bad.lock().push((*file, e.to_string())),
                        }
                        bar.add(1);
                    }
                }
            });
        }
    });
    drop(bar);
    let mut bad = bad.into_inner();
    bad.sort();
    for (file, reason) in bad {
        let path = found.files.get(file).map_or(b"?".as_slice(), Vec::as_slice);
        faults.add(path, &reason);
    }
    Ok(bytes.into_inner())
}
