//! From an event to its line.

use std::fmt::{Debug, Write as _};

use kata::timestamp::Utc;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level};

use crate::cli::LogFormat;

/// Longest text, bytes. Readers give up at lines of 64 KiB.
const MAX_TEXT: usize = 16 << 10;

/// An event, on its way to the log.
pub(super) struct Record {
    level: Level,
    /// Source file and line; of interest when something may be wrong.
    place: Option<String>,
    message: String,
    fields: Vec<(String, Value)>,
}

impl Record {
    /// A message without fields.
    pub fn new(level: Level, message: String) -> Self {
        Self {
            level,
            place: None,
            message,
            fields: Vec::new(),
        }
    }

    /// The same, said at `line` of `file`.
    pub fn at(mut self, file: Option<&str>, line: Option<u32>) -> Self {
        self.place = file
            .zip(line)
            .filter(|_| self.level != Level::INFO)
            .map(|(file, line)| format!("{file}:{line}"));
        self
    }

    /// What `event` says.
    pub fn of(event: &Event<'_>) -> Self {
        let metadata = event.metadata();
        let mut record = Self::new(*metadata.level(), String::new()).at(metadata.file(), metadata.line());
        event.record(&mut record);
        record
    }

    /// How grave it is.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Message and fields, on one line of limited length.
    pub fn text(&self) -> String {
        let mut text = clean(&self.message);
        for (name, value) in &self.fields {
            // Writing to a String cannot fail.
            let _ = match value {
                Value::String(value) => write!(text, " {name}={}", clean(value)),
                value => write!(text, " {name}={value}"),
            };
        }
        cut(&mut text);
        text
    }

    /// The line that stands in the log.
    pub fn line(&self, format: LogFormat, time: Utc) -> String {
        match format {
            LogFormat::Text => {
                let place = match &self.place {
                    Some(place) => format!("[{place}] "),
                    None => String::new(),
                };
                format!("[{}] {} {place}{}\n", time.for_log(), self.level, self.text())
            }
            LogFormat::Json => self.json(time) + "\n",
        }
    }

    fn json(&self, time: Utc) -> String {
        let mut message = self.message.clone();
        cut(&mut message);
        let mut members = Map::new();
        members.insert("time".into(), time.for_json().into());
        members.insert("level".into(), self.level.as_str().into());
        members.insert("message".into(), message.into());
        if let Some(place) = &self.place {
            members.insert("place".into(), place.as_str().into());
        }
        for (name, value) in &self.fields {
            let mut value = value.clone();
            if let Value::String(text) = &mut value {
                cut(text);
            }
            // A field must not hide what every line has.
            members.entry(name.as_str()).or_insert(value);
        }
        Value::Object(members).to_string()
    }

    fn add(&mut self, field: &Field, value: Value) {
        self.fields.push((field.name().to_owned(), value));
    }
}

impl Visit for Record {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
            _ => self.add(field, value.into()),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let value = format!("{value:?}");
        self.record_str(field, &value);
    }
}

/// What could start a new line, or move a terminal's cursor, is escaped.
fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if out.len() > MAX_TEXT {
            break;
        }
        if character.is_control() {
            out.extend(character.escape_default());
        } else {
            out.push(character);
        }
    }
    out
}

fn cut(text: &mut String) {
    if text.len() <= MAX_TEXT {
        return;
    }
    let mut end = MAX_TEXT;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text.push_str("... (cut)");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(message: &str) -> Record {
        let mut record = Record::new(Level::WARN, message.to_owned()).at(Some("src/x.rs"), Some(7));
        record.fields.push(("count".into(), 3.into()));
        record.fields.push(("level".into(), "a\nb".into()));
        record
    }

    #[test]
    fn an_event_is_one_line_of_text() {
        let text = record("a\nb\x1b[31m").text();
        assert_eq!(text, "a\\nb\\u{1b}[31m count=3 level=a\\nb");
        assert_eq!(Record::new(Level::INFO, "Grüße".into()).text(), "Grüße");
        let line = record("a").line(LogFormat::Text, Utc::now());
        assert!(
            line.ends_with("] WARN [src/x.rs:7] a count=3 level=a\\nb\n"),
            "{line}"
        );
    }

    #[test]
    fn an_event_is_one_object_of_json() {
        let line = record("a\nb").line(LogFormat::Json, Utc::now());
        assert_eq!(line.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["message"], "a\nb");
        assert_eq!(
            (&value["level"], &value["count"], &value["place"]),
            (&"WARN".into(), &3.into(), &"src/x.rs:7".into())
        );
        assert!(value["time"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn long_lines_are_cut() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let long = record(&"\n".repeat(1 << 20)).line(format, Utc::now());
            assert!(long.len() < 40 << 10 && long.contains("... (cut)"));
            let long = record(&"ü".repeat(1 << 20)).line(format, Utc::now());
            assert!(long.len() < 20 << 10 && long.contains("... (cut)"));
        }
    }
}
