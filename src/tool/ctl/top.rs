//! `rafs ctl top`: mounts, throughput, latencies and waiting requests, renewed until somebody has seen enough.
//!
//! Each look is compared with the one before. The screen is written from the top left corner on. Lines that are too long are
//! cut by the terminal, which is asked for that for the length of a frame alone, so that whatever ends the program leaves it as
//! it was.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use kata::client::{Client, ClientError};
use serde_json::{Value, json};

use super::show::{self, Table, items, micros, number, text};
use crate::tool::{BoxError, human};

/// Waiting requests that are shown.
const SHOWN: usize = 10;

/// What was seen at one moment.
struct Look {
    at: Instant,
    daemon: Value,
    mounts: Value,
    latencies: Value,
    requests: Value,
}

impl Look {
    fn take(client: &Client) -> Result<Self, ClientError> {
        let get = |what: &str| client.ask("GET", &format!("/api/rafsd/v1/{what}"), None);
        Ok(Self {
            at: Instant::now(),
            daemon: get("daemon")?,
            mounts: get("mounts")?,
            latencies: get("latencies")?,
            requests: get("requests")?,
        })
    }

    fn device(&self, member: &str) -> u64 {
        self.daemon
            .get("device")
            .map_or(0, |device| number(device, member))
    }

    /// Requests and their time in microseconds, of all kinds of work, by mount.
    fn work(&self) -> BTreeMap<String, (u64, u64)> {
        let sum = |mount: &Value| {
            let by_work = mount.get("by_work").and_then(Value::as_object);
            let all = by_work.into_iter().flatten();
            all.fold((0, 0), |(count, total), (_, times)| {
                (count + number(times, "count"), total + number(times, "total_us"))
            })
        };
        let mounts = items(&self.latencies).iter();
        mounts
            .map(|mount| (text(mount, "mountpoint"), sum(mount)))
            .collect()
    }
}

/// Looks every `interval` seconds, `count` times or for ever.
pub fn run(client: &Client, interval: f64, count: u64, json: bool) -> Result<ExitCode, BoxError> {
    let pause = Duration::try_from_secs_f64(interval)
        .ok()
        .filter(|pause| *pause >= Duration::from_millis(50))
        .ok_or("--interval: at least 0.05 seconds")?;
    let clears = std::io::stdout().is_terminal();
    let mut before = Look::take(client)?;
    for number in 1.. {
        std::thread::sleep(pause);
        let now = Look::take(client)?;
        let frame = match json {
            true => format!("{}\n", as_json(&now)),
            false => frame(&before, &now),
        };
        let screen = if clears && !json {
            // Home, clear, no wrapping; and wrapping again.
            format!("\x1b[H\x1b[2J\x1b[?7l{frame}\x1b[?7h")
        } else {
            frame
        };
        if std::io::stdout().write_all(screen.as_bytes()).is_err() || number == count {
            break;
        }
        before = now;
    }
    Ok(ExitCode::SUCCESS)
}

fn as_json(look: &Look) -> Value {
    json!({"daemon": look.daemon, "mounts": look.mounts, "latencies": look.latencies, "requests": look.requests})
}

fn frame(before: &Look, now: &Look) -> String {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(1e-3);
    let rate = |member| (now.device(member).saturating_sub(before.device(member))) as f64 / seconds;
    let mut screen = format!(
        "rafsd {}   up {}   {}   {} mounts   {} waiting\nread {}/s   written {}/s   reads that waited {:.1}/s   expired {}   bugs {}\n\n",
        number(&now.daemon, "pid"),
        micros(number(&now.daemon, "uptime_ms") * 1000),
        text(&now.daemon, "state"),
        number(&now.daemon, "mounts"),
        number(&now.daemon, "waiting"),
        human(rate("bytes_read") as u64),
        human(rate("bytes_written") as u64),
        rate("parked"),
        now.device("expired"),
        now.device("bugs"),
    );
    let (earlier, work) = (before.work(), now.work());
    let mut table = Table::new(&[
        "MOUNTPOINT",
        "KIND",
        "REQUESTS/S",
        "MEAN",
        "WAITING",
        "LOCAL",
        "SOURCE",
    ]);
    for mount in items(&now.mounts) {
        let path = text(mount, "mountpoint");
        let (count, total) = work.get(&path).copied().unwrap_or_default();
        let (count_before, total_before) = earlier.get(&path).copied().unwrap_or_default();
        let (count, total) = (
            count.saturating_sub(count_before),
            total.saturating_sub(total_before),
        );
        let image = mount.get("image").filter(|image| !image.is_null());
        table.row([
            path,
            text(mount, "kind"),
            format!("{:.0}", count as f64 / seconds),
            total.checked_div(count).map_or("-".to_owned(), micros),
            text(mount, "waiting"),
            show::local(mount),
            image.map_or_else(|| text(mount, "source"), |image| text(image, "source_host")),
        ]);
    }
    screen.push_str(&table.text());
    let mut waiting = now.requests.clone();
    if let Value::Array(waiting) = &mut waiting {
        waiting.truncate(SHOWN);
    }
    screen.push('\n');
    screen.push_str(&show::requests(&waiting));
    screen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(at: Instant, reads: u64) -> Look {
        Look {
            at,
            daemon: json!({"pid": 7, "uptime_ms": 2000, "state": "RUNNING", "mounts": 1, "waiting": 0,
                "device": {"bytes_read": reads * 1024, "parked": 0, "expired": 0, "bugs": 0}}),
            mounts: json!([{"mountpoint": "/m", "kind": "image", "waiting": 0, "source": "/b",
                "image": {"source_host": "r.example", "blobs": [{"chunks": 4, "resident": 1}]}}]),
            latencies: json!([{"mountpoint": "/m", "by_work": {"read": {"count": reads, "total_us": reads * 50}}}]),
            requests: json!([]),
        }
    }

    #[test]
    fn a_frame_shows_what_happened_between_two_looks() {
        let begin = Instant::now();
        let text = frame(&look(begin, 100), &look(begin + Duration::from_secs(2), 300));
        assert!(
            text.starts_with("rafsd 7   up 2.0 s   RUNNING   1 mounts   0 waiting\nread 100.00 KiB/s"),
            "{text}"
        );
        let mount = text.lines().find(|line| line.starts_with("/m")).unwrap();
        let cells: Vec<&str> = mount.split_whitespace().collect();
        assert_eq!(
            cells,
            [
                "/m",
                "image",
                "100",
                "50",
                "us",
                "0",
                "25",
                "%",
                "of",
                "4",
                "r.example"
            ]
        );
        assert!(text.ends_with("\nno request waits\n"));
    }
}
