//! The image tool: what `rafs` does, one room per subcommand.
//!
//! * [`build`]: a directory becomes an image.
//! * [`cache`]: what is in a cache directory, room in it, and whether it is right.
//! * [`ctl`]: what a running daemon says of itself.
//! * [`check`]: whether all of an image is there and right.
//! * [`inspect`]: what an image says of itself.
//! * `manual`: shell completions and man pages of both programs.
//! * `overlay`: the mount helper of containerd.
//! * [`serve`]: image directories as a read-only OCI registry, with faults on demand.
//! * [`trace`]: what a container reads when it starts, recorded.
//! * [`unpack`]: an image becomes a directory or a tar again.
//! * `blobs`: chunks from a directory of blobs, verified.
//! * `progress`: a bar on a terminal, nothing elsewhere.
//!
//! Exit status: 0 when all is well, 1 when the work failed or a check found faults, 2 for a wrong command line.

mod blobs;
pub mod build;
pub mod cache;
pub mod check;
pub mod ctl;
pub mod inspect;
mod manual;
mod overlay;
mod progress;
pub mod serve;
pub mod trace;
pub mod unpack;

use std::io;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// Builds, shows and serves RAFS images.
#[derive(Debug, Parser)]
#[command(name = "rafs", version, max_term_width = 110)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // there is one, once
enum Command {
    /// Make an image of a directory.
    Build(build::Arguments),
    /// Verify an image: metadata, and with --blobs every chunk.
    Check(check::Arguments),
    /// Show superblock and blobs of an image, or what is at a path.
    Inspect(inspect::Arguments),
    /// Make a directory or a tar of an image.
    Unpack(unpack::Arguments),
    /// Serve images as a read-only OCI registry.
    Serve(serve::Arguments),
    /// Look after a cache directory: list, make room, verify.
    Cache(cache::Arguments),
    /// Record which chunks of a mounted image are read first, for later mounts to fetch them beforehand.
    Trace(trace::Arguments),
    /// Ask a running daemon: mounts, requests that wait, latencies, counters.
    Ctl(ctl::Arguments),
    /// Mount an overlay as containerd asks a mount helper to (installed as nydus-overlayfs).
    MountOverlay(overlay::Arguments),
    /// Print completions for a shell.
    Completions(manual::Completions),
    /// Write man pages into a directory.
    Man(manual::Pages),
}

/// Runs the tool with the process's arguments.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse_from(overlay::by_name(std::env::args_os().collect()));
    let outcome = match arguments.command {
        Command::Build(arguments) => build::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Unpack(arguments) => unpack::run(&arguments),
        Command::Serve(arguments) => serve::run(arguments),
        Command::Cache(arguments) => cache::run(&arguments),
        Command::Trace(arguments) => trace::run(&arguments),
        Command::Ctl(arguments) => ctl::run(&arguments),
        Command::MountOverlay(arguments) => overlay::run(&arguments),
        Command::Completions(arguments) => manual::completions(&arguments),
        Command::Man(arguments) => manual::pages(&arguments),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("rafs: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Any error of a subcommand, ready to be shown.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Ends when SIGTERM or SIGINT comes, which from now on do not end the process. To be called in a runtime.
fn interrupted() -> io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Bytes for people: three digits and a binary unit.
fn human(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Parses a size such as `4096`, `0x1000`, `64k`, `1MiB`.
fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let invalid = || format!("{text:?} is not a size (examples: 4096, 0x1000, 64KiB, 1MiB)");
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(digits, 16).map_err(|_| invalid());
    }
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        _ => return Err(invalid()),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("0x1000"), Ok(4096));
        assert_eq!(parse_size("64k"), Ok(65536));
        assert_eq!(parse_size("1 MiB"), Ok(1 << 20));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        for wrong in ["", "MiB", "1MB", "-1", "99999999999999G"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
