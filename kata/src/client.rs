//! A client of the API: one request per connection, blocking, with a limit of time. For tools, not for daemons.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

/// How long an answer may take: a mount has all that a runtime gives it.
const PATIENCE: Duration = Duration::from_secs(90);

/// Longest answer that is read, bytes.
const MAX_ANSWER: u64 = 64 << 20;

/// Longest line of a head, bytes.
const MAX_LINE: u64 = 16 << 10;

/// Why a request was not answered well.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody can be asked.
    #[error("cannot ask the daemon at {path}")]
    Unreachable {
        /// The API socket.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// The daemon refused.
    #[error("{message} (status {status})")]
    Refused {
        /// HTTP status.
        status: u16,
        /// For people.
        message: String,
    },
    /// What answered is no daemon.
    #[error("the answer makes no sense: {0}")]
    Nonsense(String),
}

/// A daemon's API socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// The daemon that listens on `socket`.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Asks for JSON; an answer without data is null.
    ///
    /// # Errors
    ///
    /// The daemon cannot be asked, or refuses.
    pub fn ask(&self, method: &str, target: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let text = self.text(method, target, body)?;
        if text.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).map_err(|error| ClientError::Nonsense(error.to_string()))
    }

    /// Asks for text.
    ///
    /// # Errors
    ///
    /// As of [`Client::ask`].
    pub fn text(&self, method: &str, target: &str, body: Option<&Value>) -> Result<String, ClientError> {
        let unreachable = |source| ClientError::Unreachable {
            path: self.socket.display().to_string(),
            source,
        };
        let (status, text) = self.exchange(method, target, body).map_err(unreachable)?;
        if (200..300).contains(&status) {
            return Ok(text);
        }
        let refusal: Value = serde_json::from_str(&text).unwrap_or_default();
        let message = refusal.get("message").and_then(Value::as_str).unwrap_or(&text);
        Err(ClientError::Refused {
            status,
            message: message.to_owned(),
        })
    }

    fn exchange(&self, method: &str, target: &str, body: Option<&Value>) -> io::Result<(u16, String)> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = match body.is_empty() {
            true => String::new(),
            false => format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            ),
        };
        let head = format!("{method} {target} HTTP/1.1\r\nHost: rafsd\r\nConnection: close\r\n{length}\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        let mut answer = BufReader::new(stream);
        let status = line(&mut answer)?;
        let status = status.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| nonsense("no status"))?;
        let mut length = 0;
        loop {
            let header = line(&mut answer)?;
            if header.is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().map_err(|_| nonsense("a bad length"))?;
            }
        }
        if length > MAX_ANSWER {
            return Err(nonsense("too long an answer"));
        }
        let mut text = String::new();
        answer.take(length).read_to_string(&mut text)?;
        if text.len() as u64 != length {
            return Err(nonsense("it ends too early"));
        }
        Ok((status, text))
    }
}

fn line(answer: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    answer.take(MAX_LINE).read_line(&mut line)?;
    if !line.ends_with('\n') {
        return Err(nonsense("it ends too early"));
    }
    Ok(line.trim_end().to_owned())
}

fn nonsense(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("what listens there speaks no HTTP: {what}"),
    )
}

/// `value` as part of a query.
pub fn encoded(value: &str) -> String {
    url::form_urlencoded::byte_serialize(value.as_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// Asks somebody who answers `answer`.
    fn asked(answer: &'static [u8]) -> Result<Value, ClientError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).unwrap();
            let _ = stream.write_all(answer);
        });
        let outcome = Client::new(&path).ask("GET", "/x", None);
        server.join().unwrap();
        outcome
    }

    #[test]
    fn answers_are_understood() {
        assert_eq!(
            asked(b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}").unwrap(),
            serde_json::json!({})
        );
        assert_eq!(asked(b"HTTP/1.1 204 \r\n\r\n").unwrap(), Value::Null);
        let refused = asked(b"HTTP/1.1 404 \r\ncontent-length: 15\r\n\r\n{\"message\":\"x\"}").unwrap_err();
        assert_eq!(refused.to_string(), "x (status 404)");
    }

    #[test]
    fn what_is_no_daemon_is_told_apart() {
        for answer in [
            &b""[..],
            b"hello\n",
            b"HTTP/1.1 200 \r\nContent-Length: 9999999999\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\n{}",
            b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{\"",
        ] {
            assert!(asked(answer).is_err());
        }
        let error = Client::new(Path::new("/no/such/socket"))
            .ask("GET", "/", None)
            .unwrap_err();
        assert!(error.to_string().contains("/no/such/socket"));
    }

    #[test]
    fn values_are_encoded() {
        assert_eq!(encoded("/a b&c"), "%2Fa+b%26c");
    }
}
