//! A blob made by hand, and a source of it that misbehaves on demand.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

pub mod http;

use std::io::Write;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use rafsd_backend::chunk::*;
use rafsd_backend::error::{SourceError, SourceErrorKind};
use rafsd_backend::source::{Sink, Source};
use rafsd_backend::store::*;

/// Chunks of a blob, as an image would describe them.
pub struct Listed {
    pub chunks: Vec<Chunk>,
    /// To be read first, with the bytes expected there.
    pub wanted: Mutex<Option<(IndexRange, Vec<u8>)>>,
}

impl ChunkIndex for Listed {
    fn wanted(&self) -> Option<IndexRange> {
        self.wanted
            .lock()
            .unwrap()
            .as_ref()
            .map(|(range, _)| range.clone())
    }

    fn supply(&self, bytes: &[u8]) -> Result<(), IndexError> {
        let mut wanted = self.wanted.lock().unwrap();
        if wanted.as_ref().is_some_and(|(_, expected)| expected != bytes) {
            return Err(IndexError {
                blob_id: "test".into(),
                reason: "damaged index".into(),
            });
        }
        *wanted = None;
        Ok(())
    }

    fn chunk(&self, index: u32) -> Result<Chunk, IndexError> {
        self.chunks
            .get(index as usize)
            .cloned()
            .ok_or_else(|| IndexError {
                blob_id: "test".into(),
                reason: format!("no chunk {index}"),
            })
    }
}

/// A blob and what its chunks decode to.
pub struct TestBlob {
    pub id: String,
    pub stored: Vec<u8>,
    pub plain: Vec<Vec<u8>>,
    pub chunks: Vec<Chunk>,
    pub compression: Compression,
    pub digester: Digester,
}

/// Bytes that compress, and differ everywhere.
pub fn pattern(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(size);
    while data.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
        data.extend_from_slice(b"and some filler");
    }
    data.truncate(size);
    data
}

impl TestBlob {
    /// `count` chunks of about `size` bytes each.
    pub fn new(count: u32, size: usize) -> Self {
        Self::with(count, size, Compression::Zstd, Digester::Blake3)
    }

    pub fn with(count: u32, size: usize, compression: Compression, digester: Digester) -> Self {
        let (mut stored, mut plain, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        let mut position = 0u64;
        for index in 0..count {
            let data = pattern(u64::from(index) + 1, size - (index as usize * 7) % (size / 2));
            let packed = match compression {
                Compression::None => data.clone(),
                Compression::Zstd => zstd::bulk::compress(&data, 3).unwrap(),
                Compression::Lz4Block => lz4_flex::block::compress(&data),
                Compression::Gzip => {
                    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                    encoder.write_all(&data).unwrap();
                    encoder.finish().unwrap()
                }
            };
            chunks.push(Chunk {
                index,
                compressed_offset: stored.len() as u64,
                compressed_size: packed.len() as u32,
                uncompressed_offset: position,
                uncompressed_size: data.len() as u32,
                encoding: Encoding::Plain {
                    compressed: compression != Compression::None,
                },
                encrypted: false,
                digest: Some(digest(digester, &data)),
                crc32c: None,
            });
            position += (data.len() as u64).next_multiple_of(4096);
            stored.extend_from_slice(&packed);
            plain.push(data);
        }
        let id = hex(&digest(Digester::Sha256, &stored));
        Self {
            id,
            stored,
            plain,
            chunks,
            compression,
            digester,
        }
    }

    /// `count` chunks of `size` bytes, so many to a batch.
    pub fn batched(count: u32, size: usize, per_batch: u32, compressed: bool) -> Self {
        let compression = if compressed {
            Compression::Zstd
        } else {
            Compression::None
        };
        let mut blob = Self::with(count, size, Compression::None, Digester::Blake3);
        blob.compression = compression;
        blob.stored.clear();
        for (batch, plain) in blob
            .chunks
            .chunks_mut(per_batch as usize)
            .zip(blob.plain.chunks(per_batch as usize))
        {
            let decoded = plain.concat();
            let stored = if compressed {
                zstd::bulk::compress(&decoded, 3).unwrap()
            } else {
                decoded.clone()
            };
            let mut offset = 0;
            for chunk in batch {
                chunk.compressed_offset = blob.stored.len() as u64;
                chunk.compressed_size = stored.len() as u32;
                chunk.encoding = Encoding::Batch {
                    decoded_size: decoded.len() as u32,
                    offset,
                };
                offset += chunk.uncompressed_size;
            }
            blob.stored.extend(stored);
        }
        blob
    }

    /// `count` chunks of about `size` bytes in one slice of a gzip stream.
    pub fn sliced(count: u32, size: usize) -> Self {
        let mut blob = Self::with(count, size, Compression::None, Digester::Sha256);
        blob.compression = Compression::Gzip;
        let decoded = blob.plain.concat();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&decoded).unwrap();
        blob.stored = encoder.finish().unwrap();
        let context = Arc::new(ZranContext {
            number: 0,
            decoded_size: decoded.len() as u32,
            bits: 0,
            byte: 0,
            dictionary: Bytes::new(),
        });
        let mut offset = 0;
        for chunk in &mut blob.chunks {
            chunk.compressed_offset = 10;
            chunk.compressed_size = blob.stored.len() as u32 - 18;
            chunk.encoding = Encoding::Zran {
                context: Arc::clone(&context),
                offset,
            };
            offset += chunk.uncompressed_size;
        }
        blob
    }

    pub fn description(&self) -> BlobDescription {
        self.description_with(None)
    }

    pub fn description_with(&self, wanted: Option<(IndexRange, Vec<u8>)>) -> BlobDescription {
        let end = self
            .chunks
            .iter()
            .map(|c| c.uncompressed_offset + u64::from(c.uncompressed_size))
            .max();
        BlobDescription {
            id: self.id.clone(),
            compressed_size: self.stored.len() as u64,
            uncompressed_size: end.unwrap_or(0).next_multiple_of(4096),
            chunk_count: self.chunks.len() as u32,
            compression: self.compression,
            digester: self.digester,
            cipher: None,
            unverifiable: false,
            index: Arc::new(Listed {
                chunks: self.chunks.clone(),
                wanted: Mutex::new(wanted),
            }),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn digest(digester: Digester, data: &[u8]) -> [u8; 32] {
    use sha2::Digest as _;
    match digester {
        Digester::Blake3 => *blake3::hash(data).as_bytes(),
        Digester::Sha256 => sha2::Sha256::digest(data).into(),
    }
}

/// A source in memory, with faults.
#[derive(Default)]
pub struct FaultySource {
    pub blobs: Mutex<Vec<(String, Vec<u8>)>>,
    pub requests: Mutex<Vec<Range<u64>>>,
    /// While set, reads wait.
    pub stalled: AtomicBool,
    /// Reads of the byte at this position wait while it is set.
    pub held_at: Mutex<Option<u64>>,
    /// Milliseconds until a read is answered.
    pub delay_ms: AtomicU64,
    /// While set, reads fail at once.
    pub broken: AtomicBool,
    /// While set, reads are denied, which looks permanent.
    pub denied: AtomicBool,
    /// Flip a bit at this position of the blob, for so many reads.
    pub corrupt: Mutex<Option<(u64, usize)>>,
    /// Fail after so many bytes of each read.
    pub cut: Mutex<Option<usize>>,
    pub running: AtomicUsize,
}

impl FaultySource {
    pub fn new(blob: &TestBlob) -> Arc<Self> {
        let source = Self::default();
        source
            .blobs
            .lock()
            .unwrap()
            .push((blob.id.clone(), blob.stored.clone()));
        Arc::new(source)
    }

    pub fn requests(&self) -> Vec<Range<u64>> {
        self.requests.lock().unwrap().clone()
    }

    pub fn fetched(&self) -> u64 {
        self.requests().iter().map(|r| r.end - r.start).sum()
    }

    async fn serve(&self, id: &str, range: Range<u64>, sink: Sink<'_>) -> Result<(), SourceError> {
        let error = |kind, detail: &str| Err(SourceError::new(kind, "faulty", detail));
        self.requests.lock().unwrap().push(range.clone());
        let held = || self.held_at.lock().unwrap().is_some_and(|at| range.contains(&at));
        while self.stalled.load(Ordering::SeqCst) || held() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(self.delay_ms.load(Ordering::SeqCst))).await;
        if self.broken.load(Ordering::SeqCst) {
            return error(SourceErrorKind::Unreachable, "broken on purpose");
        }
        if self.denied.load(Ordering::SeqCst) {
            return error(SourceErrorKind::Denied, "denied on purpose");
        }
        let data = self
            .blobs
            .lock()
            .unwrap()
            .iter()
            .find(|(name, _)| name == id)
            .map(|(_, data)| {
                data.get(range.start as usize..range.end as usize)
                    .map(<[u8]>::to_vec)
            });
        let Some(data) = data else {
            return error(SourceErrorKind::NotFound, id);
        };
        let Some(mut data) = data else {
            return error(SourceErrorKind::RangeRefused, "outside");
        };
        if let Some((at, left)) = self.corrupt.lock().unwrap().as_mut()
            && *left > 0
            && range.contains(at)
        {
            data[(*at - range.start) as usize] ^= 1;
            *left -= 1;
        }
        let cut = *self.cut.lock().unwrap();
        let end = cut.unwrap_or(usize::MAX).min(data.len());
        for piece in data[..end].chunks(10_000) {
            sink(Bytes::copy_from_slice(piece));
            tokio::task::yield_now().await;
        }
        if end < data.len() {
            error(SourceErrorKind::Protocol, "cut on purpose")
        } else {
            Ok(())
        }
    }
}

impl Source for FaultySource {
    fn host(&self) -> &str {
        "faulty"
    }

    fn read<'a>(
        &'a self,
        blob_id: &'a str,
        range: Range<u64>,
        sink: Sink<'a>,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        async move {
            self.running.fetch_add(1, Ordering::SeqCst);
            let result = self.serve(blob_id, range, sink).await;
            self.running.fetch_sub(1, Ordering::SeqCst);
            result
        }
        .boxed()
    }
}

pub type Outcome = Result<Held, FetchError>;

/// Starts a fetch.
pub fn start(blob: &Arc<Blob>, chunks: &[u32], time: Duration) -> mpsc::Receiver<Outcome> {
    let (done, outcome) = mpsc::channel();
    let done = Box::new(move |result| done.send(result).unwrap());
    blob.fetch(chunks, Priority::Demand, Instant::now() + time, done);
    outcome
}

/// Fetches, and waits for the outcome.
pub fn fetch(blob: &Arc<Blob>, chunks: &[u32]) -> Outcome {
    start(blob, chunks, Duration::from_secs(20))
        .recv_timeout(Duration::from_secs(30))
        .expect("an answer")
}

/// Reads a chunk from the cache file.
pub fn read(blob: &Blob, chunk: &Chunk) -> Vec<u8> {
    let mut data = vec![0; chunk.uncompressed_size as usize];
    let n = rustix::io::pread(blob.file(), &mut data, chunk.uncompressed_offset).unwrap();
    assert_eq!(n, data.len());
    data
}
