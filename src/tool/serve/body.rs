//! Bodies: where their bytes come from, and how they are sent, with their faults.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};

use super::record::Recording;

/// Bytes that are read and sent at a time.
const PIECE: u64 = 64 << 10;
/// Between the parts of an answer to a list of ranges.
const BOUNDARY: &str = "rafs-serve-part";
/// Media type of such an answer.
pub(super) const LIST: &str = "multipart/byteranges; boundary=rafs-serve-part";

/// Where the bytes of a body are taken from.
#[derive(Clone)]
pub(super) enum Content {
    /// A blob.
    File(Arc<File>),
    /// A manifest.
    Bytes(Bytes),
    /// Ranges of a blob.
    Parts(Arc<Parts>),
}

/// Ranges of a file with heads between them (RFC 9110, section 14.6).
pub(super) struct Parts {
    file: Arc<File>,
    /// By where they begin in the body.
    sections: Vec<(u64, Section)>,
    length: u64,
}

/// A stretch of such a body.
enum Section {
    Head(Bytes),
    /// From this offset of the file on.
    File(u64),
}

impl Parts {
    /// The answer to a request for `ranges` of a file of `size` bytes.
    pub(super) fn new(file: Arc<File>, ranges: &[Range<u64>], size: u64) -> Self {
        let (mut sections, mut length) = (Vec::new(), 0);
        let mut add = |section, bytes: u64| {
            sections.push((length, section));
            length += bytes;
        };
        for range in ranges {
            let head = format!(
                "\r\n--{BOUNDARY}\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes {}-{}/{size}\r\n\r\n",
                range.start,
                range.end - 1
            );
            add(Section::Head(head.clone().into()), head.len() as u64);
            add(Section::File(range.start), range.end - range.start);
        }
        let end = format!("\r\n--{BOUNDARY}--\r\n");
        add(Section::Head(end.clone().into()), end.len() as u64);
        Self {
            file,
            sections,
            length,
        }
    }

    /// Bytes of the body.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    fn read(&self, mut at: u64, mut into: &mut [u8]) -> io::Result<()> {
        let mut number = self
            .sections
            .partition_point(|(begin, _)| *begin <= at)
            .saturating_sub(1);
        while !into.is_empty() {
            let (begin, section) = self.sections.get(number).ok_or(io::ErrorKind::UnexpectedEof)?;
            let end = self
                .sections
                .get(number + 1)
                .map_or(self.length, |(begin, _)| *begin);
            let size = (end - at).min(into.len() as u64) as usize;
            let (now, rest) = into.split_at_mut(size);
            match section {
                Section::Head(head) => copy(head, at - begin, now)?,
                Section::File(offset) => self.file.read_exact_at(now, offset + (at - begin))?,
            }
            (at, into, number) = (at + size as u64, rest, number + 1);
        }
        Ok(())
    }
}

impl Content {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(into, at),
            Self::Bytes(bytes) => copy(bytes, at, into),
            Self::Parts(parts) => parts.read(at, into),
        }
    }
}

fn copy(from: &[u8], at: u64, into: &mut [u8]) -> io::Result<()> {
    let from = from
        .get(at as usize..)
        .and_then(|from| from.get(..into.len()))
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    into.copy_from_slice(from);
    Ok(())
}

/// The body that an answer is to have.
#[derive(Clone)]
pub(super) struct Plan {
    pub(super) content: Content,
    /// What of the content.
    pub(super) range: Range<u64>,
    /// Time before the first byte.
    pub(super) stall: Duration,
    /// Bytes per second.
    pub(super) rate: Option<u64>,
    /// Offset in the content and bit that is turned over.
    pub(super) flip: Option<(u64, u8)>,
    /// Offset in the content where the body breaks off.
    pub(super) end: u64,
}

impl Plan {
    /// Bytes that are sent at a time: with a rate about ten times per second.
    fn piece(&self) -> u64 {
        self.rate.map_or(PIECE, |rate| (rate / 10).clamp(1, PIECE))
    }

    fn read(&self, at: u64, size: u64) -> io::Result<Bytes> {
        let mut bytes = vec![0; size as usize];
        self.content.read(at, &mut bytes)?;
        if let Some((offset, bit)) = self.flip
            && let Some(byte) = offset
                .checked_sub(at)
                .and_then(|index| bytes.get_mut(index as usize))
        {
            *byte ^= 1 << bit;
        }
        Ok(bytes.into())
    }
}

/// Sends what is planned, piece by piece.
pub(super) fn stream(plan: Plan, recording: Recording) -> Body {
    let at = plan.range.start;
    let pieces = futures_util::stream::unfold(Some((plan, recording, at)), |state| async {
        let (plan, recording, at) = state?;
        if at == plan.range.start {
            tokio::time::sleep(plan.stall).await;
        }
        if at >= plan.end {
            if plan.end == plan.range.end {
                return None;
            }
            // An error makes the connection drop what it has not written yet.
            tokio::time::sleep(Duration::from_millis(20)).await;
            return Some((Err(io::Error::other("broken off on demand")), None));
        }
        let size = plan.piece().min(plan.end - at);
        let read = {
            let plan = plan.clone();
            tokio::task::spawn_blocking(move || plan.read(at, size)).await
        };
        let bytes = match read.map_err(io::Error::other).flatten() {
            Ok(bytes) => bytes,
            Err(error) => return Some((Err(error), None)),
        };
        if let Some(rate) = plan.rate {
            tokio::time::sleep(Duration::from_secs_f64(size as f64 / rate as f64)).await;
        }
        recording.sent(size);
        Some((Ok(bytes), Some((plan, recording, at + size))))
    });
    Body::from_stream(pieces)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn parts_read_the_same_from_anywhere() {
        let mut file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..=255).collect();
        file.write_all(&data).unwrap();
        let parts = Parts::new(Arc::new(file), &[0..7, 100..130, 255..256], 256);
        let mut whole = vec![0; parts.length() as usize];
        parts.read(0, &mut whole).unwrap();
        let text = String::from_utf8_lossy(&whole);
        assert!(text.starts_with("\r\n--rafs-serve-part\r\n"), "{text}");
        assert!(
            text.contains("\r\nContent-Range: bytes 100-129/256\r\n\r\n"),
            "{text}"
        );
        assert!(text.ends_with("\r\n--rafs-serve-part--\r\n"), "{text}");
        assert!(whole.windows(30).any(|window| window == &data[100..130]));
        for at in 0..whole.len() {
            let mut piece = vec![0; 50.min(whole.len() - at)];
            parts.read(at as u64, &mut piece).unwrap();
            assert_eq!(piece, whole[at..at + piece.len()], "at {at}");
        }
        assert!(parts.read(parts.length(), &mut [0]).is_err());
    }
}
