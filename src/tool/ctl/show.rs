//! Answers of the daemon for people.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::tool::human;

/// Rows with a heading; columns are as wide as they need to be.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this heading.
    pub fn new(heading: &[&str]) -> Self {
        Self {
            rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    /// One more row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// Lines, the last column as it is.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // Writing to a String cannot fail.
                let _ = write!(line, "{cell:<width$}  ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// A member as people write it; what could move the cursor of a terminal is escaped.
pub fn text(value: &Value, member: &str) -> String {
    match value.get(member) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text
            .chars()
            .flat_map(|character| match character.is_control() {
                true => character.escape_default().collect::<Vec<_>>(),
                false => vec![character],
            })
            .collect(),
        Some(value) => value.to_string(),
    }
}

/// A member that is a number; 0 if it is not there.
pub fn number(value: &Value, member: &str) -> u64 {
    value.get(member).and_then(Value::as_u64).unwrap_or_default()
}

/// A member that is a list.
pub fn list<'a>(value: &'a Value, member: &str) -> &'a [Value] {
    value
        .get(member)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// All of an answer that is a list.
pub fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// `90 us`, `1.5 ms`, `12.0 s`.
pub fn micros(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..1_000_000 => format!("{:.1} ms", micros as f64 / 1e3),
        _ => format!("{:.1} s", micros as f64 / 1e6),
    }
}

pub fn nothing(_: &Value) -> String {
    String::new()
}

pub fn info(info: &Value) -> String {
    let (version, device) = (
        info.get("version").unwrap_or(info),
        info.get("device").unwrap_or(info),
    );
    let mut table = Table::new(&["rafsd", &text(version, "package_ver")]);
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    row("commit", text(version, "git_commit"));
    row("process", text(info, "pid"));
    row("uptime", micros(number(info, "uptime_ms") * 1000));
    let draining = info.get("draining") == Some(&Value::Bool(true));
    row(
        "state",
        text(info, "state") + if draining { ", draining" } else { "" },
    );
    row("log level", text(info, "log_level"));
    row("mounts", text(info, "mounts"));
    row("waiting", text(info, "waiting"));
    row("read", human(number(device, "bytes_read")));
    row("written", human(number(device, "bytes_written")));
    for counter in ["parked", "expired", "malformed", "bugs"] {
        row(counter, text(device, counter));
    }
    let requests = device.get("requests").and_then(Value::as_object);
    let mut requests: Vec<(&String, u64)> = requests
        .into_iter()
        .flatten()
        .map(|(name, count)| (name, count.as_u64().unwrap_or_default()))
        .collect();
    requests.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let requests: Vec<String> = requests
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    row("requests", requests.join(", "));
    table.text()
}

pub fn mounts(mounts: &Value) -> String {
    let mut table = Table::new(&[
        "MOUNTPOINT",
        "KIND",
        "STATE",
        "CACHE",
        "REQUESTS",
        "WAITING",
        "LOCAL",
        "SOURCE",
    ]);
    for mount in items(mounts) {
        let policy = mount
            .get("cache")
            .map(|cache| text(cache, "policy"))
            .unwrap_or_default();
        table.row([
            text(mount, "mountpoint"),
            text(mount, "kind"),
            text(mount, "state"),
            policy,
            text(mount, "requests"),
            text(mount, "waiting"),
            local(mount),
            source(mount),
        ]);
    }
    table.text()
}

/// Chunks of an image that are local.
pub fn local(mount: &Value) -> String {
    let blobs = mount.get("image").map_or(&[][..], |image| list(image, "blobs"));
    let sum = |member| blobs.iter().map(|blob| number(blob, member)).sum::<u64>();
    match (sum("resident"), sum("chunks")) {
        (_, 0) => "-".to_owned(),
        (resident, chunks) => format!("{} % of {chunks}", resident * 100 / chunks),
    }
}

/// Where the data comes from, and whether that fails.
fn source(mount: &Value) -> String {
    let Some(image) = mount.get("image").filter(|image| !image.is_null()) else {
        return text(mount, "source");
    };
    let failures = match number(image, "source_failures") {
        0 => String::new(),
        failures => format!(" (FAILING, {failures} in a row)"),
    };
    format!(
        "{} from {} {}{failures}",
        text(mount, "source"),
        text(image, "source_type"),
        text(image, "source_host")
    )
}

pub fn requests(requests: &Value) -> String {
    if items(requests).is_empty() {
        return "no request waits\n".to_owned();
    }
    let mut table = Table::new(&["AGE", "OPERATION", "FILE", "WAITS FOR"]);
    for request in items(requests) {
        table.row([
            micros(number(request, "age_ms") * 1000),
            text(request, "operation"),
            file(request),
            reason(request),
        ]);
    }
    table.text()
}

/// Mount and path of a request, as one path.
fn file(request: &Value) -> String {
    let mountpoint = text(request, "mountpoint");
    let mountpoint = mountpoint.trim_end_matches('/');
    match text(request, "path").as_str() {
        "-" => format!("{mountpoint} inode {}", number(request, "inode")),
        path => format!("{mountpoint}{path}"),
    }
}

fn reason(request: &Value) -> String {
    let waits_for = text(request, "waits_for");
    let Some(data) = request.get("data").filter(|data| !data.is_null()) else {
        return waits_for;
    };
    // The host comes first: a narrow terminal cuts the rest.
    let mut reason = format!("{} {}", text(data, "source_type"), text(data, "source_host"));
    if data.get("last_error").is_some_and(|error| !error.is_null()) {
        let _ = write!(reason, ": {}", text(data, "last_error"));
    }
    if request.get("deadline_ms").is_some_and(Value::is_u64) {
        let deadline = micros(number(request, "deadline_ms") * 1000);
        let _ = write!(reason, " (gives up in {deadline})");
    }
    let blob: String = text(data, "blob").chars().take(12).collect();
    let chunks = list(data, "chunks").len();
    let _ = write!(
        reason,
        " for {chunks} chunk{} of blob {blob} of image {}",
        if chunks == 1 { "" } else { "s" },
        text(data, "image"),
    );
    reason
}

pub fn latencies(latencies: &Value) -> String {
    let mut table = Table::new(&["MOUNTPOINT", "WORK", "REQUESTS", "MEAN", "P50", "P99"]);
    for mount in items(latencies) {
        let by_work = mount.get("by_work").and_then(Value::as_object);
        for (work, times) in by_work.into_iter().flatten() {
            let count = number(times, "count");
            table.row([
                text(mount, "mountpoint"),
                work.clone(),
                count.to_string(),
                micros(number(times, "total_us").checked_div(count).unwrap_or_default()),
                format!("<= {}", micros(number(times, "p50_us"))),
                format!("<= {}", micros(number(times, "p99_us"))),
            ]);
        }
    }
    table.text()
}

pub fn residency(file: &Value) -> String {
    let ranges = list(file, "ranges").iter().map(|range| match items(range) {
        [first, last] if first == last => first.to_string(),
        [first, last] => format!("{first}-{last}"),
        _ => String::new(),
    });
    let ranges: Vec<String> = ranges.collect();
    format!(
        "{}{}: {}, {} of {} chunks are local{}{}\n",
        text(file, "mountpoint").trim_end_matches('/'),
        text(file, "path"),
        human(number(file, "size")),
        number(file, "resident"),
        number(file, "chunks"),
        if ranges.is_empty() { "" } else { ": " },
        ranges.join(", ")
    )
}

/// The trace itself, to be kept in a file.
pub fn trace(answer: &Value) -> String {
    let trace = answer.get("trace").and_then(Value::as_str);
    trace.unwrap_or_default().to_owned()
}

pub fn drained(answer: &Value) -> String {
    match number(answer, "waiting") {
        0 => "drained: no request waits, new mounts are refused\n".to_owned(),
        waiting => format!("{waiting} requests still wait; new mounts are refused\n"),
    }
}

/// Samples of the text format as JSON: `{"name{labels}": value}`.
pub fn samples(exposition: &str) -> Value {
    let samples = exposition
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), json!(value.parse::<f64>().ok()?)))
        });
    Value::Object(samples.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_request_is_told_in_one_line() {
        let request = json!([{"age_ms": 900, "operation": "Read", "mountpoint": "/m", "path": "/bin/sh", "inode": 3,
            "waits_for": "data", "deadline_ms": 29100,
            "data": {"image": "/b", "source_type": "registry", "source_host": "r.example", "blob": "abcdef0123456789", "chunks": [4],
                "last_error": "status 503"}},
            {"age_ms": 1500, "operation": "Fsync", "mountpoint": "/c\u{1b}[31m", "path": null, "inode": 9, "waits_for": "worker", "data": null}]);
        let text = requests(&request);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[1],
            "900.0 ms  Read       /m/bin/sh             registry r.example: status 503 (gives up in 29.1 s) for 1 chunk of blob abcdef012345 of image /b"
        );
        assert!(
            lines[2].contains("Fsync      /c\\u{1b}[31m inode 9") && lines[2].ends_with("worker"),
            "{text}"
        );
        assert_eq!(requests(&json!([])), "no request waits\n");
    }

    #[test]
    fn answers_that_lack_something_are_shown_all_the_same() {
        for show in [info, mounts, requests, latencies, residency, trace, drained] {
            for answer in [json!({}), json!([{}]), Value::Null] {
                let _ = show(&answer);
            }
        }
    }

    #[test]
    fn samples_of_the_text_format() {
        let text = "# HELP a b\na_total 3\nb{x=\"y z\"} 0.5\n# EOF\n";
        assert_eq!(samples(text), json!({"a_total": 3.0, "b{x=\"y z\"}": 0.5}));
    }

    #[test]
    fn times_for_people() {
        assert_eq!([90, 1500, 12_000_000].map(micros), ["90 us", "1.5 ms", "12.0 s"]);
    }
}
