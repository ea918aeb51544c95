//! `rafs build`.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use backend::chunk::{Compression, Digester};
use clap::ValueEnum;
use rafs::build::{FsVersion, Input, Options, Progress, Whiteouts};

use super::progress::Bar;
use super::{BoxError, human, parse_size};

/// Arguments of `rafs build`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directory to make an image of, or a tar (plain, gzip or zstd; - for standard input).
    source: PathBuf,
    /// Where to write `bootstrap` and `blobs/<id>`; created if need be.
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// How to compress chunks.
    #[arg(long, value_enum, default_value_t = CompressorName::Zstd)]
    compressor: CompressorName,
    /// Level of zstd, 1 to 22.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: i32,
    /// Digest algorithm of chunks.
    #[arg(long, value_enum, default_value_t = DigesterName::Blake3)]
    digester: DigesterName,
    /// Bytes of a chunk: a power of two from 4KiB to 16MiB.
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = parse_chunk_size)]
    chunk_size: u32,
    /// RAFS version.
    #[arg(long, value_enum, default_value_t = VersionName::V6)]
    fs_version: VersionName,
    /// Build a layer on top of this image (bootstrap); its blobs stay in use.
    #[arg(long, value_name = "BOOTSTRAP")]
    parent: Option<PathBuf>,
    /// Refer to equal chunks of this image (bootstrap) instead of storing them.
    #[arg(long, value_name = "BOOTSTRAP")]
    chunk_dict: Option<PathBuf>,
    /// Markers that remove what is in the parent; by default oci with --parent, else none.
    #[arg(long, value_enum)]
    whiteouts: Option<WhiteoutsName>,
    /// Store the files at or below this path first, and name them in the prefetch table. May be given several times.
    #[arg(long, value_name = "PATH")]
    prefetch: Vec<PathBuf>,
    /// Read paths to prefetch from a file, one per line.
    #[arg(long, value_name = "FILE")]
    prefetch_file: Option<PathBuf>,
    /// Threads that digest and compress; 0 for one per core. The image does not depend on it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CompressorName {
    Zstd,
    #[value(name = "lz4_block", alias = "lz4")]
    Lz4Block,
    None,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DigesterName {
    Blake3,
    Sha256,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum VersionName {
    #[value(name = "6")]
    V6,
    #[value(name = "5")]
    V5,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum WhiteoutsName {
    None,
    Oci,
    Overlayfs,
}

fn parse_chunk_size(text: &str) -> Result<u32, String> {
    let size = parse_size(text)?;
    u32::try_from(size)
        .ok()
        .filter(|size| size.is_power_of_two() && (1 << 12..=1 << 24).contains(size))
        .ok_or_else(|| format!("{text} is not a power of two from 4KiB to 16MiB"))
}

/// Shows two phases: what was found, then how much of it was read.
#[derive(Default)]
struct Shown {
    scanning: OnceLock<Bar>,
    reading: OnceLock<Bar>,
    inodes: AtomicU64,
    bytes: AtomicU64,
}

impl Progress for Shown {
    fn scanned(&self, bytes: u64) {
        let inodes = self.inodes.fetch_add(1, Ordering::Relaxed) + 1;
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let bar = self.scanning.get_or_init(|| Bar::counting("scanning"));
        bar.show(|| format!("{inodes} inodes, {}", human(bytes)));
    }

    fn read(&self, bytes: u64) {
        let bar = self.reading.get_or_init(|| {
            let bar = Bar::bytes("building");
            bar.expect(self.bytes.load(Ordering::Relaxed));
            bar
        });
        // Of an archive, more is found while it is read.
        bar.expect(self.bytes.load(Ordering::Relaxed));
        bar.add(bytes);
    }
}

fn prefetch_list(arguments: &Arguments) -> Result<Vec<PathBuf>, BoxError> {
    let mut paths = arguments.prefetch.clone();
    if let Some(list) = &arguments.prefetch_file {
        let text = std::fs::read(list).map_err(|e| format!("cannot read {}: {e}", list.display()))?;
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        paths.extend(lines.map(|line| PathBuf::from(OsStr::from_bytes(line))));
    }
    Ok(paths)
}

/// Builds the image and prints a line about it.
pub fn run(arguments: &Arguments) -> Result<ExitCode, BoxError> {
    let options = Options {
        version: match arguments.fs_version {
            VersionName::V6 => FsVersion::V6,
            VersionName::V5 => FsVersion::V5,
        },
        compression: match arguments.compressor {
            CompressorName::Zstd => Compression::Zstd,
            CompressorName::Lz4Block => Compression::Lz4Block,
            CompressorName::None => Compression::None,
        },
        level: arguments.level,
        digester: match arguments.digester {
            DigesterName::Blake3 => Digester::Blake3,
            DigesterName::Sha256 => Digester::Sha256,
        },
        chunk_size: arguments.chunk_size,
        parent: arguments.parent.clone(),
        chunk_dictionary: arguments.chunk_dict.clone(),
        whiteouts: arguments.whiteouts.map(|name| match name {
            WhiteoutsName::None => Whiteouts::None,
            WhiteoutsName::Oci => Whiteouts::Oci,
            WhiteoutsName::Overlayfs => Whiteouts::Overlayfs,
        }),
        prefetch: prefetch_list(arguments)?,
        threads: arguments.threads,
    };
    let start = Instant::now();
    let shown = Shown::default();
    let source = arguments.source.as_path();
    let name = source.display().to_string();
    let report = if source == Path::new("-") {
        let input = Input::Archive {
            name: "standard input",
            stream: &mut io::stdin(),
        };
        rafs::build::build(input, &arguments.output, &options, &shown)?
    } else if source.is_file() {
        let input = Input::Archive {
            name: &name,
            stream: &mut File::open(source)?,
        };
        rafs::build::build(input, &arguments.output, &options, &shown)?
    } else {
        rafs::build::build(Input::Directory(source), &arguments.output, &options, &shown)?
    };
    drop(shown);
    println!(
        "bootstrap {} ({}, {} names)",
        report.bootstrap.display(),
        human(report.bootstrap_size),
        report.names
    );
    match report.blob {
        Some(blob) => println!(
            "blob {} ({} of {}, {} chunks for {} references, {:.1} s)",
            blob.id,
            human(blob.size),
            human(report.data_size),
            blob.chunk_count,
            report.chunk_references,
            start.elapsed().as_secs_f32()
        ),
        None => println!("no blob: there are no new file data"),
    }
    Ok(ExitCode::SUCCESS)
}
