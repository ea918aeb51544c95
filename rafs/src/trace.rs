//! Access traces: which chunks of an image were touched first, in which order. Recorded while a guest starts, replayed before the
//! next one does.
//!
//! The format is text, so that it can be looked at, cut and joined:
//!
//! ```text
//! rafsd-trace 1
//! blob 2b64…
//! 0-3 17 5
//! blob 90ac…
//! 8
//! blob 2b64…
//! 4
//! ```
//!
//! Numbers are chunks of the blob named before, in the order of their first use; `a-b` are all from a to b. Empty lines and those that
//! begin with `#` mean nothing.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use backend::store::{Blob, Wanted, Wish};
use parking_lot::Mutex;

use crate::fs::RafsFs;

const MAGIC: &str = "rafsd-trace 1";
/// Bytes at the source within which a replay may change the order of chunks.
const WINDOW: u64 = 16 << 20;
/// Chunks that a trace may name.
const MAX_CHUNKS: usize = 1 << 24;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Blob ids with chunks, in the order of use; a blob may come several times.
    pub parts: Vec<(String, Vec<u32>)>,
}

/// A text is no trace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("access trace, line {line}: {reason}")]
pub struct TraceError {
    /// Number of the line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

impl Trace {
    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.parts.iter().map(|(_, chunks)| chunks.len()).sum()
    }

    /// What to prefetch of `image` to have it all, in the order of first use. What the image does not have is left out: a trace may be of
    /// another build.
    ///
    /// Within a window of a few MiB, chunks of one blob come together, since each change of the blob costs a request.
    pub fn wishes(&self, image: &RafsFs) -> Vec<Wish> {
        let mut wishes: Vec<Wish> = Vec::new();
        let mut window: Vec<(&Arc<Blob>, Vec<u32>)> = Vec::new();
        let mut size = 0;
        let mut close = |window: &mut Vec<(&Arc<Blob>, Vec<u32>)>| {
            wishes.extend(window.drain(..).map(|(blob, chunks)| Wish {
                blob: Arc::clone(blob),
                wanted: Wanted::Replay(chunks),
            }));
        };
        for (id, chunks) in &self.parts {
            let Some(blob) = image.blobs().iter().find(|blob| blob.description().id == *id) else {
                continue;
            };
            for chunk in chunks
                .iter()
                .filter(|chunk| **chunk < blob.description().chunk_count)
            {
                match window.iter_mut().find(|(other, _)| Arc::ptr_eq(other, blob)) {
                    Some((_, chunks)) => chunks.push(*chunk),
                    None => window.push((blob, vec![*chunk])),
                }
                size += stored_size(blob, *chunk);
                if size >= WINDOW {
                    close(&mut window);
                    size = 0;
                }
            }
        }
        close(&mut window);
        wishes
    }
}

/// Bytes of a chunk at the source; those of an average one if it can not be described yet.
fn stored_size(blob: &Blob, chunk: u32) -> u64 {
    let description = blob.description();
    let average = description.compressed_size / u64::from(description.chunk_count.max(1));
    let described = description.index.chunk(chunk);
    described.map_or(average, |chunk| chunk.compressed_size.into())
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{MAGIC}")?;
        for (id, chunks) in &self.parts {
            writeln!(f, "blob {id}")?;
            let mut separator = "";
            for run in chunks.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
                match run {
                    [first, .., last] => write!(f, "{separator}{first}-{last}")?,
                    _ => run.iter().try_for_each(|chunk| write!(f, "{separator}{chunk}"))?,
                }
                separator = " ";
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl FromStr for Trace {
    type Err = TraceError;

    fn from_str(text: &str) -> Result<Self, TraceError> {
        let mut trace = Self::default();
        let mut count = 0;
        for (number, line) in (1..).zip(text.lines()) {
            let refuse = |reason: String| TraceError { line: number, reason };
            if number == 1 {
                if line != MAGIC {
                    return Err(refuse(format!("a trace begins with {MAGIC:?}")));
                }
                continue;
            }
            if line.starts_with('#') {
                continue;
            }
            if let Some(id) = line.strip_prefix("blob ") {
                trace.parts.push((id.to_owned(), Vec::new()));
                continue;
            }
            for word in line.split_ascii_whitespace() {
                let run =
                    run(word).ok_or_else(|| refuse(format!("{word:?} is neither a chunk nor a range")))?;
                let Some((_, chunks)) = trace.parts.last_mut() else {
                    return Err(refuse("chunks before the first blob".to_owned()));
                };
                count += run.size_hint().0;
                if count > MAX_CHUNKS {
                    return Err(refuse(format!("more than {MAX_CHUNKS} chunks")));
                }
                chunks.extend(run);
            }
        }
        if text.is_empty() {
            return Err(TraceError {
                line: 1,
                reason: "nothing".to_owned(),
            });
        }
        Ok(trace)
    }
}

/// `7` or `7-9`.
fn run(word: &str) -> Option<std::ops::RangeInclusive<u32>> {
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some(first..=last)
}

/// Records the first touches of an image's chunks. Costs reads one load while it does not record.
#[derive(Default)]
pub(crate) struct Recorder {
    active: AtomicBool,
    recording: Mutex<Recording>,
}

#[derive(Default)]
struct Recording {
    seen: HashSet<(usize, u32)>,
    /// Position of the blob, chunk.
    order: Vec<(usize, u32)>,
}

impl Recorder {
    pub(crate) fn active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    pub(crate) fn touch(&self, chunks: impl Iterator<Item = (usize, u32)>) {
        let mut recording = self.recording.lock();
        for chunk in chunks {
            if recording.order.len() < MAX_CHUNKS && recording.seen.insert(chunk) {
                recording.order.push(chunk);
            }
        }
    }
}

impl RafsFs {
    /// Begins to record which chunks are read, from nothing.
    pub fn start_trace(&self) {
        *self.recorder.recording.lock() = Recording::default();
        self.recorder.active.store(true, Ordering::Relaxed);
    }

    /// Ends the recording; what was recorded can still be had.
    pub fn stop_trace(&self) {
        self.recorder.active.store(false, Ordering::Relaxed);
    }

    /// Whether accesses are recorded.
    pub fn tracing(&self) -> bool {
        self.recorder.active()
    }

    /// What was recorded so far.
    pub fn trace(&self) -> Trace {
        let order = self.recorder.recording.lock().order.clone();
        let parts = order.chunk_by(|(a, _), (b, _)| a == b).filter_map(|run| {
            let blob = self.blobs().get(run.first()?.0)?;
            let chunks = run.iter().map(|(_, chunk)| *chunk).collect();
            Some((blob.description().id.clone(), chunks))
        });
        Trace {
            parts: parts.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_trace_reads_as_it_was_meant() {
        let text = "rafsd-trace 1\nblob a\n0-3 17 5\nblob b\n8\nblob a\n4\n";
        let commented = text.replace("blob b", "\n# the second layer\nblob b");
        let trace: Trace = commented.parse().unwrap();
        assert_eq!(trace.parts[0], ("a".into(), vec![0, 1, 2, 3, 17, 5]));
        assert_eq!((trace.parts.len(), trace.chunks()), (3, 8));
        assert_eq!(trace.to_string(), text);
    }

    #[test]
    fn what_is_no_trace_is_refused_with_its_line() {
        for (text, line) in [
            ("", 1),
            ("{}", 1),
            ("rafsd-trace 1\n1 2", 2),
            ("rafsd-trace 1\nblob a\n1\n2 x", 4),
            ("rafsd-trace 1\nblob a\n5-4", 3),
            ("rafsd-trace 1\nblob a\n0-4294967295", 3),
        ] {
            assert_eq!(text.parse::<Trace>().unwrap_err().line, line, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(parts in prop::collection::vec(("[0-9a-f]{1,64}", prop::collection::vec(any::<u32>(), 0..40)), 0..9)) {
            let trace = Trace { parts };
            prop_assert_eq!(trace.to_string().parse::<Trace>().unwrap(), trace);
        }

        #[test]
        fn no_text_hangs_or_panics(text in "(rafsd-trace 1\n)?([ -~]{0,30}\n){0,5}") {
            let _ = text.parse::<Trace>();
        }
    }
}
