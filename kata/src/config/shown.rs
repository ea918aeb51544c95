//! Values as errors show them: JSON on one line, cut when long, and without secrets.

use std::fmt::Write as _;

use serde_json::Value;

use super::secret::without_credentials;

/// Longest value that is shown whole, characters.
const LONGEST: usize = 120;

/// What stands for a secret.
const HIDDEN: &str = "<hidden>";

/// Fields that hold a secret, or nothing but secrets. Of a source elsewhere (`external_backends`) it is not known which of
/// its settings are secret, so that all are.
pub(super) const SECRET: [&str; 9] = [
    "access_key_id",
    "access_key_secret",
    "auth",
    "encryption_key",
    "external_backends",
    "headers",
    "password",
    "registry_auth",
    "registry_token",
];

/// Objects with secrets somewhere in them. One that was written as a text is not shown; of an object the rest is.
pub(super) const HOLDERS: [&str; 13] = [
    "backend",
    "cache",
    "config",
    "device",
    "filecache",
    "http-proxy",
    "localdisk",
    "localfs",
    "mirrors",
    "oss",
    "proxy",
    "registry",
    "s3",
];

/// Shows `value` of the field at `path`, whose names decide whether it is secret.
pub(super) fn shown(path: &str, value: &Value) -> String {
    if names(path).any(|name| SECRET.contains(&name)) && !is_type(path) {
        return HIDDEN.to_owned();
    }
    let mut redacted = value.clone();
    redact(&mut redacted);
    line(&redacted)
}

/// The same of what should be an object or a list; without a path it is the document.
pub(super) fn shown_in_place_of_object(path: &str, value: &Value) -> String {
    let last = names(path).last();
    if last.is_none_or(|name| HOLDERS.contains(&name)) && is_scalar(value) {
        return HIDDEN.to_owned();
    }
    shown(path, value)
}

/// The names in a path, without the positions in lists.
fn names(path: &str) -> impl Iterator<Item = &str> {
    path.split(['.', '[', ']'])
        .filter(|name| !name.is_empty() && !name.bytes().all(|byte| byte.is_ascii_digit()))
}

/// `external_backends[0].type`, which alone of its object is none.
fn is_type(path: &str) -> bool {
    path.starts_with("external_backends[") && path.ends_with("].type")
        || path.starts_with("device.external_backends[") && path.ends_with("].type")
}

/// Whether nobody can tell what of it is secret.
fn is_scalar(value: &Value) -> bool {
    !matches!(value, Value::Object(_) | Value::Array(_))
}

fn redact(value: &mut Value) {
    match value {
        Value::String(text) if text.contains("://") => *text = without_credentials(text),
        Value::Array(items) => items.iter_mut().for_each(redact),
        Value::Object(members) => {
            for (name, value) in members {
                let secret = SECRET.contains(&name.as_str());
                if secret || HOLDERS.contains(&name.as_str()) && is_scalar(value) {
                    *value = Value::String(HIDDEN.to_owned());
                } else {
                    redact(value);
                }
            }
        }
        _ => {}
    }
}

/// JSON that is safe to print: JSON escapes the first 32 characters only.
fn line(value: &Value) -> String {
    let text = value.to_string();
    let mut line = String::new();
    for (number, character) in text.chars().enumerate() {
        if number == LONGEST {
            // Writing to a String cannot fail.
            let _ = write!(line, "... ({} bytes)", text.len());
            break;
        }
        match character {
            '"' | '\'' | '\\' => line.push(character),
            other => line.extend(other.escape_debug()),
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_shown_as_they_were_written() {
        for (value, text) in [
            (json!("fast"), "\"fast\""),
            (json!(-1), "-1"),
            (json!(true), "true"),
            (json!(null), "null"),
            (json!(["a", 1]), "[\"a\",1]"),
            (json!({"a": {}}), "{\"a\":{}}"),
            (json!("it's \"so\""), "\"it's \\\"so\\\"\""),
            (
                json!("a\nb\u{7f}\u{9b}31m\u{202e}"),
                "\"a\\nb\\u{7f}\\u{9b}31m\\u{202e}\"",
            ),
        ] {
            assert_eq!(shown("rafs.mode", &value), text);
        }
    }

    #[test]
    fn long_values_are_cut() {
        let text = shown("id", &json!("x".repeat(100_000)));
        assert!(text.len() < 200 && text.ends_with("... (100002 bytes)"), "{text}");
    }

    #[test]
    fn secrets_are_hidden_wherever_they_stand() {
        for (path, value) in [
            ("backend.registry.auth", json!(["hunter2"])),
            ("backend.registry.mirrors[3].headers.X-Token", json!("hunter2")),
            ("device.backend.config.access_key_id", json!("hunter2")),
            ("device.external_backends[0].config", json!({"k": "hunter2"})),
            ("external_backends[0]", json!("hunter2")),
        ] {
            assert_eq!(shown(path, &value), "<hidden>", "{path}");
        }
        for path in ["backend", "device.backend.config", "backend.s3.mirrors[2]", ""] {
            let text = json!("{\"registry\":{\"auth\":\"hunter2\"}}");
            assert_eq!(shown_in_place_of_object(path, &text), "<hidden>", "{path}");
        }
        assert_eq!(shown_in_place_of_object("rafs", &json!("x")), "\"x\"");
        let nested = json!({"registry": {"auth": "hunter2", "proxy": "hunter2", "host": "h"},
            "addr": "http://u:hunter2@h/?sig=hunter2", "external_backends": ["hunter2"]});
        assert_eq!(
            shown("rafs.mode", &nested),
            "{\"addr\":\"http://h/\",\"external_backends\":\"<hidden>\",\"registry\":{\"auth\":\"<hidden>\",\"host\":\"h\",\"proxy\":\"<hidden>\"}}"
        );
        assert_eq!(shown("external_backends[0].type", &json!(7)), "7");
        assert_eq!(shown("external_backends", &json!("hunter2")), "<hidden>");
    }
}
