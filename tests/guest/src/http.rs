//! As much of an HTTP client as the API and the registry need: one request per connection, bodies of known length.

use std::io::{BufRead, BufReader, Read, Take, Write};

use anyhow::{Context, Result};

/// The answer to a request.
pub(crate) struct Answer<S> {
    pub status: u16,
    /// Ends with the body, whether the server closes the connection or not.
    pub body: Take<BufReader<S>>,
}

impl<S: Read> Answer<S> {
    /// The whole body.
    pub fn text(mut self) -> Result<String> {
        let mut text = String::new();
        self.body.read_to_string(&mut text)?;
        Ok(text)
    }
}

/// Sends a request over a fresh connection and reads the head of its answer.
pub(crate) fn request<S: Read + Write>(
    mut stream: S,
    method: &str,
    target: &str,
    body: Option<&str>,
) -> Result<Answer<S>> {
    let length = body
        .map(|body| format!("Content-Length: {}\r\n", body.len()))
        .unwrap_or_default();
    let head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{length}\r\n");
    stream.write_all(format!("{head}{}", body.unwrap_or_default()).as_bytes())?;
    read_head(stream).with_context(|| format!("{method} {target}"))
}

fn read_head<S: Read>(stream: S) -> Result<Answer<S>> {
    let mut answer = BufReader::new(stream);
    let mut line = String::new();
    answer.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("not the head of an HTTP answer: {line:?}"))?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        answer.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse()?;
        }
    }
    Ok(Answer {
        status,
        body: answer.take(length),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_with_its_body_not_with_the_connection() {
        let stream: &[u8] = b"HTTP/1.1 200 \r\nServer: x\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 500";
        let answer = read_head(stream).unwrap();
        assert_eq!((answer.status, answer.text().unwrap().as_str()), (200, "{}"));
        let answer = read_head(&b"HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n"[..]).unwrap();
        assert_eq!((answer.status, answer.text().unwrap().as_str()), (204, ""));
        assert!(read_head(&b""[..]).is_err());
    }
}
