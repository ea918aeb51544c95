//! The one table that the demo is for.

use std::time::Duration;

use rafsd_guest::registry::Traffic;

/// One way of starting the container.
pub struct Row {
    pub title: &'static str,
    /// From the request for the image to its being there, mounted or unpacked.
    pub ready: Duration,
    /// From there to the program's first output.
    pub running: Duration,
    pub traffic: Traffic,
    /// All there is to fetch, in bytes.
    pub size: u64,
}

/// The rows under a head, columns aligned.
pub fn render(rows: &[Row]) -> String {
    let mut lines = vec![[
        "".to_owned(),
        "image there".to_owned(),
        "first output".to_owned(),
        "fetched of the image".to_owned(),
        "requests".to_owned(),
    ]];
    for row in rows {
        let share = 100.0 * row.traffic.bytes as f64 / row.size.max(1) as f64;
        lines.push([
            row.title.to_owned(),
            format!("{:.2} s", row.ready.as_secs_f64()),
            format!("{:.2} s", (row.ready + row.running).as_secs_f64()),
            format!(
                "{:.1} of {:.1} MB ({share:.0} %)",
                megabytes(row.traffic.bytes),
                megabytes(row.size)
            ),
            row.traffic.requests.to_string(),
        ]);
    }
    lines
        .iter()
        .map(|[title, ready, time, fetched, requests]| {
            format!("  {title:<33}{ready:>12}{time:>14}{fetched:>28}{requests:>11}\n")
        })
        .collect()
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |bytes, requests| Row {
            title: "lazily",
            ready: Duration::from_millis(50),
            running: Duration::from_millis(900),
            traffic: Traffic { requests, bytes },
            size: 40_000_000,
        };
        let text = render(&[row(10_000_000, 12), row(0, 0)]);
        let lengths: Vec<usize> = text.lines().map(str::len).collect();
        assert!(lengths.iter().all(|length| *length == lengths[0]), "{text}");
        assert!(
            text.contains("0.95 s") && text.contains("10.0 of 40.0 MB (25 %)"),
            "{text}"
        );
    }
}
