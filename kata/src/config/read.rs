//! From text to typed values, with errors that say where.

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::{Path, Segment};

use super::ConfigError;
use super::shown::{shown, shown_in_place_of_object};

/// Reads a `T` from `value`, which stands at `at` (empty for the top).
///
/// # Errors
///
/// A field is missing, or has a value that it cannot have. The field is named, secrets are not shown.
pub fn read<T: DeserializeOwned>(value: Value, at: &str) -> Result<T, ConfigError> {
    serde_path_to_error::deserialize(&value).map_err(|error| {
        let inner = error.path();
        let reason = error.inner().to_string();
        let field = join(at, inner);
        // Of a missing field serde knows the name, and its path ends at the object that lacks it.
        if let Some(name) = reason.strip_prefix("missing field `") {
            let name = name.split('`').next().unwrap_or_default();
            let dot = if field.is_empty() { "" } else { "." };
            return ConfigError::Field {
                field: format!("{field}{dot}{name}"),
                reason,
            };
        }
        let wrong = inner.iter().try_fold(&value, |value, segment| match segment {
            Segment::Map { key } => value.get(key),
            Segment::Seq { index } => value.get(index),
            Segment::Enum { .. } | Segment::Unknown => Some(value),
        });
        let (allowed, wrong) = (allowed(&reason), wrong.unwrap_or(&Value::Null));
        ConfigError::Type {
            value: match allowed.as_str() {
                "an object" | "a list" => shown_in_place_of_object(&field, wrong),
                _ => shown(&field, wrong),
            },
            allowed,
            field: if field.is_empty() {
                "the configuration".to_owned()
            } else {
                field
            },
        }
    })
}

/// The path of a field: `device.external_backends[0].type`.
fn join(at: &str, inner: &Path) -> String {
    let mut path = at.to_owned();
    for segment in inner.iter() {
        match segment {
            Segment::Map { key } if path.is_empty() => path.push_str(key),
            Segment::Map { key } => path.extend([".", key]),
            Segment::Seq { index } => path.extend(["[", &index.to_string(), "]"]),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    path
}

/// What would have been right, by what serde says: `invalid type: string "x", expected u32`.
fn allowed(reason: &str) -> String {
    let expected = reason
        .rsplit_once("expected ")
        .map_or(reason, |(_, expected)| expected);
    let range = |largest: u64| format!("a whole number from 0 to {largest}");
    match expected {
        "u8" => range(u8::MAX.into()),
        "u32" => range(u32::MAX.into()),
        "u64" => range(u64::MAX),
        "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" => "a text".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a map" => "an object".to_owned(),
        structure if structure.starts_with("struct ") => "an object".to_owned(),
        other => other.replace('`', ""),
    }
}

/// What a text holds, whichever syntax it is in.
pub(super) enum Syntax {
    /// A JSON value.
    Json(Value),
    /// A TOML document.
    Toml(Value),
}

/// Parses `text` as JSON, or else as TOML. Error texts give the place and the reason, and never the text
/// itself, which is full of secrets.
pub(super) fn parse(text: &str) -> Result<Syntax, ConfigError> {
    let json = match serde_json::from_str::<Value>(text) {
        Ok(value) => return Ok(Syntax::Json(without_nulls(value))),
        Err(error) => error,
    };
    let looks_like_json = text.trim_start().starts_with('{');
    match toml::from_str::<Value>(text) {
        Ok(value) => Ok(Syntax::Toml(value)),
        Err(error) if !looks_like_json => Err(ConfigError::Syntax {
            format: "TOML",
            reason: format!("{} {}", error.message(), place(text, error.span())),
        }),
        Err(_) => Err(ConfigError::Syntax {
            format: "JSON",
            reason: json.to_string(),
        }),
    }
}

/// `at line 3 column 7`.
fn place(text: &str, span: Option<std::ops::Range<usize>>) -> String {
    let before = span.and_then(|span| text.get(..span.start)).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.len() - before.rfind('\n').map_or(0, |at| at + 1) + 1;
    format!("at line {line} column {column}")
}

/// Go clients write `null` for what they leave out; it means the same here.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(members) => Value::Object(
            members
                .into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key, without_nulls(value)))
                .collect(),
        ),
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

/// Hints that clients always send and that mean nothing to any source: not worth a warning for every mount.
const HINTS: [&str; 3] = ["readahead", "readahead_sec", "warmup"];

/// Adds the paths of those keys of `given` that `known` does not have. `known` is the same configuration
/// written out again with every key there is, so what is not in it was not understood.
pub(super) fn unknown_keys(given: &Value, known: &Value, at: &str, unknown: &mut Vec<String>) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (key, value) in given {
                let path = if at.is_empty() {
                    key.clone()
                } else {
                    format!("{at}.{key}")
                };
                match known.get(key) {
                    Some(known) => unknown_keys(value, known, &path, unknown),
                    None if HINTS.contains(&key.as_str()) => {}
                    None => unknown.push(path),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (index, (given, known)) in given.iter().zip(known).enumerate() {
                unknown_keys(given, known, &format!("{at}[{index}]"), unknown);
            }
        }
        _ => {}
    }
}
