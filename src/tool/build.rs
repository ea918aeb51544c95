//! `rafs build`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use backend::chunk::{Compression, Digester};
use clap::ValueEnum;
use rafs::build::{FsVersion, Options, Progress};

use super::progress::Bar;
use super::{BoxError, human, parse_size};

/// Arguments of `rafs build`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Directory to make an image of.
    directory: PathBuf,
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
        bar.add(bytes);
    }
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
        threads: arguments.threads,
    };
    let start = Instant::now();
    let shown = Shown::default();
    let report = rafs::build::build_directory(&arguments.directory, &arguments.output, &options, &shown)?;
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
        None => println!("no blob: the tree has no file data"),
    }
    Ok(ExitCode::SUCCESS)
}
