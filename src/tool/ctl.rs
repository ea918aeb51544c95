//! `rafs ctl`: asks a running daemon, and tells people or programs (`--json`) what it says.
//!
//! * [`Arguments`]: the subcommands. * `show`: answers as tables. * `top`: a view that renews itself.

mod show;
mod top;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use kata::client::{Client, encoded};
use kata::config::Config;
use serde_json::{Value, json};

use super::BoxError;

/// Asks a running daemon.
#[derive(Debug, Args)]
pub struct Arguments {
    /// API socket of the daemon.
    #[arg(short = 'A', long, env = "RAFSD_APISOCK", value_name = "PATH", global = true)]
    apisock: Option<PathBuf>,
    /// Print what the daemon answers, as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What runs, since when, and what it has counted.
    Info,
    /// Mounts with their source, its health, and how much of them is local.
    Mounts {
        /// Only this one.
        mountpoint: Option<String>,
    },
    /// Mount an image or a directory.
    Mount {
        /// Bootstrap of an image, or a directory of the host.
        source: String,
        /// Where it goes, an absolute path inside the tag.
        mountpoint: String,
        /// Configuration of the image (JSON or TOML); without it the source is a directory.
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Access trace to replay (rafs ctl trace show), in place of the one that the configuration names.
        #[arg(long, value_name = "FILE", requires = "config")]
        trace: Option<PathBuf>,
    },
    /// Unmount.
    Umount {
        /// What to unmount.
        mountpoint: String,
    },
    /// All counters, in the text format of Prometheus.
    Metrics,
    /// Requests that are not answered yet, and what each waits for.
    Requests,
    /// How long requests took, by mount and kind of work.
    Latencies {
        /// Only of this mount.
        mountpoint: Option<String>,
    },
    /// Which chunks of a file of an image are local.
    Residency {
        /// Where the image is mounted.
        mountpoint: String,
        /// The file, inside the image.
        path: String,
    },
    /// Record which chunks of an image are read first.
    Trace {
        /// What to do.
        action: TraceAction,
        /// Where the image is mounted.
        mountpoint: String,
    },
    /// New credentials for the source of an image, read from stdin: user:password.
    Credentials {
        /// Where the image is mounted.
        mountpoint: String,
    },
    /// Change the level of the log.
    LogLevel {
        /// trace, debug, info, warn, error or off.
        level: String,
    },
    /// Refuse new mounts, and wait for requests that wait.
    Drain {
        /// How long to wait, seconds.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=60))]
        timeout: u64,
        /// Take mounts again instead.
        #[arg(long)]
        end: bool,
    },
    /// A view of mounts, throughput, latencies and waiting requests that renews itself. Ends with Ctrl-C.
    Top {
        /// Seconds between two looks.
        #[arg(short, long, default_value_t = 1.0)]
        interval: f64,
        /// Look so often, then end; 0: for ever.
        #[arg(short = 'n', long, default_value_t = 0)]
        count: u64,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TraceAction {
    /// Begin, and forget what was recorded before.
    Start,
    /// End, and keep what was recorded in the image's cache directory: the next mount of the image replays it.
    Stop,
    /// Print what was recorded so far.
    Show,
}

/// Runs the subcommand.
///
/// # Errors
///
/// The daemon cannot be asked, or refuses.
pub fn run(arguments: &Arguments) -> Result<ExitCode, BoxError> {
    let socket = arguments
        .apisock
        .as_deref()
        .ok_or("which daemon? say --apisock PATH, or set RAFSD_APISOCK")?;
    let client = Client::new(socket);
    let of = |mountpoint: &Option<String>| match mountpoint {
        Some(mountpoint) => format!("?mountpoint={}", encoded(mountpoint)),
        None => String::new(),
    };
    let own = |what: &str| format!("/api/rafsd/v1/{what}");
    let get = |target: String| client.ask("GET", &target, None);
    let (answer, show): (Value, fn(&Value) -> String) = match &arguments.command {
        Command::Info => (get(own("daemon"))?, show::info),
        Command::Mounts { mountpoint } => (get(own("mounts") + &of(mountpoint))?, show::mounts),
        Command::Requests => (get(own("requests"))?, show::requests),
        Command::Latencies { mountpoint } => (get(own("latencies") + &of(mountpoint))?, show::latencies),
        Command::Residency { mountpoint, path } => {
            let query = format!("?mountpoint={}&path={}", encoded(mountpoint), encoded(path));
            (get(own("residency") + &query)?, show::residency)
        }
        Command::Mount {
            source,
            mountpoint,
            config,
            trace,
        } => {
            let target = format!("/api/v1/mount?mountpoint={}", encoded(mountpoint));
            (
                client.ask(
                    "POST",
                    &target,
                    Some(&mount_request(source, config.as_deref(), trace.as_deref())?),
                )?,
                show::nothing,
            )
        }
        Command::Umount { mountpoint } => {
            let target = format!("/api/v1/mount?mountpoint={}", encoded(mountpoint));
            (client.ask("DELETE", &target, None)?, show::nothing)
        }
        Command::Metrics => {
            let text = client.text("GET", "/metrics", None)?;
            (
                show::samples(&text),
                if arguments.json {
                    show::nothing
                } else {
                    return print(&text);
                },
            )
        }
        Command::Trace { action, mountpoint } => {
            let target = own("trace") + &of(&Some(mountpoint.clone()));
            match action {
                TraceAction::Start => (client.ask("PUT", &target, None)?, show::nothing),
                TraceAction::Stop => (client.ask("DELETE", &target, None)?, show::nothing),
                TraceAction::Show => (get(target)?, show::trace),
            }
        }
        Command::Credentials { mountpoint } => {
            let target = own("credentials") + &of(&Some(mountpoint.clone()));
            (client.ask("PUT", &target, Some(&credentials()?))?, show::nothing)
        }
        Command::LogLevel { level } => {
            let body = json!({"log_level": level});
            (client.ask("PUT", &own("daemon"), Some(&body))?, show::nothing)
        }
        Command::Drain { end: true, .. } => (client.ask("DELETE", &own("drain"), None)?, show::nothing),
        Command::Drain { timeout, .. } => {
            let body = json!({"timeout_ms": timeout * 1000});
            (client.ask("PUT", &own("drain"), Some(&body))?, show::drained)
        }
        Command::Top { interval, count } => return top::run(&client, *interval, *count, arguments.json),
    };
    if arguments.json {
        return print(&format!("{answer:#}\n"));
    }
    print(&show(&answer))
}

fn print(text: &str) -> Result<ExitCode, BoxError> {
    // Whoever reads may have had enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(ExitCode::SUCCESS)
}

/// The daemon has a working directory of its own: paths are made absolute here.
fn mount_request(source: &str, config: Option<&Path>, trace: Option<&Path>) -> Result<Value, BoxError> {
    let source = std::path::absolute(source)?;
    Ok(match config {
        Some(path) => {
            let mut config =
                std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
            if let Some(trace) = trace {
                let trace = std::path::absolute(trace)?;
                // The daemon would mount without; somebody who names one wants to know.
                std::fs::metadata(&trace).map_err(|error| format!("{}: {error}", trace.display()))?;
                config = Config::with_trace(&config, &trace.to_string_lossy())?;
            }
            json!({"fs_type": "rafs", "source": source, "config": config})
        }
        None => json!({"fs_type": "passthrough_fs", "source": source, "config": ""}),
    })
}

/// Not taken from the command line, which everybody on the host can see.
fn credentials() -> Result<Value, BoxError> {
    use base64::Engine as _;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let line = line.trim_end_matches(['\r', '\n']);
    if !line.contains(':') {
        return Err("expected on stdin: user:password".into());
    }
    let auth = base64::engine::general_purpose::STANDARD.encode(line);
    Ok(json!({"registry_auth": auth}))
}
