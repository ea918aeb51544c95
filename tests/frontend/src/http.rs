//! A client for the daemon's API socket: one request, one connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::{Error, Result};

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header lines, as sent.
    pub headers: Vec<String>,
    /// Body.
    pub body: String,
}

/// Sends one request and reads the whole answer.
pub fn request(socket: &Path, method: &str, target: &str, body: Option<&str>) -> Result<Answer> {
    let io = |what: &str| {
        let what = format!("{method} {target}: {what}");
        move |e: std::io::Error| Error::io(what, e)
    };
    let mut stream = UnixStream::connect(socket).map_err(io("connect"))?;
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .map_err(io("time limit"))?;
    let mut text = format!("{method} {target} HTTP/1.1\r\nHost: unix\r\nConnection: close\r\n");
    if let Some(body) = body {
        text += &format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        );
    }
    text += "\r\n";
    text += body.unwrap_or("");
    stream.write_all(text.as_bytes()).map_err(io("send"))?;
    // Upstream's daemon keeps the connection open: read as far as the length says.
    let mut bytes = Vec::new();
    loop {
        if let Some(answer) = parse(&bytes, false) {
            return Ok(answer);
        }
        let mut part = [0; 4096];
        match stream.read(&mut part).map_err(io("receive"))? {
            0 => break,
            len => bytes.extend_from_slice(&part[..len]),
        }
    }
    parse(&bytes, true).ok_or_else(|| Error::Device(format!("{method} {target}: answer cut short")))
}

fn parse(bytes: &[u8], ended: bool) -> Option<Answer> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status: u16 = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<String> = lines.map(str::to_owned).collect();
    let length = headers.iter().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse::<usize>().ok())?
    });
    let body = &bytes[end + 4..];
    let len = match length {
        Some(len) => len,
        None if status == 204 => 0,
        None if ended => body.len(),
        None => return None,
    };
    let body = String::from_utf8_lossy(body.get(..len)?).into_owned();
    Some(Answer {
        status,
        headers,
        body,
    })
}
