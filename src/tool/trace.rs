//! `rafs trace`: records what is read of a mounted image while a container starts, for later mounts to replay.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use kata::client::{Client, encoded};
use serde_json::Value;

use super::{BoxError, interrupted};

/// Records which chunks of a mounted image are read first.
///
/// Begins at once, and ends with Ctrl-C, SIGTERM or --seconds. What was recorded is also kept in the image's cache directory,
/// and the next mount of the image there replays it.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Where the image is mounted.
    mountpoint: String,
    /// API socket of the daemon.
    #[arg(short = 'A', long, env = "RAFSD_APISOCK", value_name = "PATH")]
    apisock: PathBuf,
    /// File for the trace; standard output without it. It is replaced when the recording has ended.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Record for so long.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: Option<u64>,
}

/// Runs the subcommand.
///
/// # Errors
///
/// The daemon cannot be asked, or there is no image; the file cannot be written; nothing was read.
pub fn run(arguments: &Arguments) -> Result<ExitCode, BoxError> {
    let mountpoint = &arguments.mountpoint;
    let output = arguments.output.as_deref().map(Output::new).transpose()?;
    let client = Client::new(&arguments.apisock);
    let target = format!("/api/rafsd/v1/trace?mountpoint={}", encoded(mountpoint));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let end = interrupted()?;
        client.ask("PUT", &target, None)?;
        eprintln!("recording what is read of {mountpoint}, until Ctrl-C");
        match arguments.seconds.map(Duration::from_secs) {
            None => end.await,
            // What comes first.
            Some(limit) => tokio::time::timeout(limit, end).await.unwrap_or_default(),
        }
        Ok::<(), BoxError>(())
    })?;
    client.ask("DELETE", &target, None)?;
    let answer = client.ask("GET", &target, None)?;
    let chunks = answer.get("chunks").and_then(Value::as_u64).unwrap_or(0);
    let trace = answer.get("trace").and_then(Value::as_str);
    let Some(trace) = trace.filter(|_| chunks > 0) else {
        return Err(format!("nothing was read of {mountpoint}: there is no trace").into());
    };
    match output {
        Some(output) => output.keep(trace)?,
        None => io::stdout().write_all(trace.as_bytes())?,
    }
    eprintln!("chunks recorded: {chunks}");
    Ok(ExitCode::SUCCESS)
}

/// A file that takes its place when it is whole. Made before the recording, so that nobody records for nothing.
struct Output<'a> {
    path: &'a Path,
    temporary: PathBuf,
    file: File,
}

impl<'a> Output<'a> {
    fn new(path: &'a Path) -> Result<Self, String> {
        // A rename would put a file in the place of a terminal, a pipe or /dev/null.
        if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(format!(
                "cannot write {}: it is not a regular file",
                path.display()
            ));
        }
        let temporary = path.with_added_extension(format!("new.{}", std::process::id()));
        let file = File::create_new(&temporary)
            .map_err(|error| format!("cannot write {}: {error}", temporary.display()))?;
        Ok(Self {
            path,
            temporary,
            file,
        })
    }

    fn keep(mut self, text: &str) -> Result<(), String> {
        self.file
            .write_all(text.as_bytes())
            .and_then(|()| std::fs::rename(&self.temporary, self.path))
            .map_err(|error| format!("cannot write {}: {error}", self.path.display()))
    }
}

impl Drop for Output<'_> {
    fn drop(&mut self) {
        // Nothing is there if it has taken its place.
        let _ = std::fs::remove_file(&self.temporary);
    }
}
