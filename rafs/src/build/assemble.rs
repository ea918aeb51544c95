//! Chunks out of the pipeline become a blob; tree, chunks and blobs become a bootstrap.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use zerocopy::little_endian::U32;

use crate::layout::trim_zeros;
use crate::layout::v5::ChunkRecord;
use crate::layout::v6::BlobEntry;

use super::base::Base;
use super::blob::BlobWriter;
use super::chunks::{ChunkNumber, ChunkTable};
use super::error::BuildError;
use super::output::TemporaryFile;
use super::overlay::{drop_markers, overlay};
use super::pipeline::{self, Chunk, Feeder};
use super::tree::{InodeId, Tree};
use super::{BlobReport, FsVersion, Options, Parts, Progress, Report, Whiteouts, base, v5, v6};

/// Builds from what `feed` feeds; the tree that it returns may lie on a parent.
pub(super) fn assemble(
    output: &Path,
    options: &Options,
    progress: &dyn Progress,
    feed: impl FnOnce(&mut Feeder<'_>) -> Result<Tree, BuildError> + Send,
) -> Result<Report, BuildError> {
    let blob_directory = output.join("blobs");
    let load = |path: &std::path::PathBuf| base::load(path, options);
    let parent = options.parent.as_ref().map(load).transpose()?;
    let dictionary = options.chunk_dictionary.as_ref().map(load).transpose()?;
    let (lower, chunks, blobs) = match parent {
        Some(Base { tree, chunks, blobs }) => (Some(tree), chunks, blobs),
        None => (None, ChunkTable::default(), Vec::new()),
    };
    let known: Vec<_> = chunks
        .keys()
        .chain(dictionary.iter().flat_map(|dictionary| dictionary.chunks.keys()))
        .collect();
    let mut image = Image {
        // Inodes of the new tree come after those of the parent.
        moved: lower.as_ref().map_or(0, Tree::inode_count),
        chunks,
        blobs,
        own: None,
        writer: BlobWriter::new(&blob_directory, options.settings(), options.version),
        dictionary,
        adopted: HashMap::new(),
        references: 0,
    };
    let mut tree = pipeline::run(options.settings(), known.into_iter(), progress, feed, |chunk| {
        image.take(chunk)
    })?;
    let tree = match lower {
        Some(lower) => overlay(lower, tree, options.whiteouts.unwrap_or(Whiteouts::Oci)),
        None => {
            drop_markers(&mut tree, options.whiteouts.unwrap_or(Whiteouts::None));
            tree
        }
    };
    let references = image.references;
    let (chunks, blobs, blob) = image.finish()?;
    let prefetch = prefetch_inodes(&tree, options);
    let parts = Parts {
        tree: &tree,
        chunks: &chunks,
        blobs: &blobs,
        flags: options.flags(&tree),
        chunk_size: options.chunk_size,
        prefetch: &prefetch,
    };
    let bootstrap = match options.version {
        FsVersion::V5 => v5::write(&parts, options.digester)?,
        FsVersion::V6 => v6::write(&parts)?,
    };
    let path = output.join("bootstrap");
    let file = TemporaryFile::create_in(output)?;
    file.file()
        .write_all(&bootstrap)
        .map_err(BuildError::io("write", &path))?;
    file.publish(&path)?;
    Ok(Report {
        bootstrap: path,
        bootstrap_size: bootstrap.len() as u64,
        blob,
        names: tree.name_count(),
        data_size: tree.data_size(),
        chunk_references: references,
    })
}

/// Existing paths of the prefetch list, in order; none that is below another one before it.
fn prefetch_inodes(tree: &Tree, options: &Options) -> Vec<InodeId> {
    let mut taken: Vec<Vec<&[u8]>> = Vec::new();
    let mut inodes = Vec::new();
    for path in &options.prefetch {
        let names = super::names(path);
        if taken.iter().any(|above| names.starts_with(above)) {
            continue;
        }
        if let Some(inode) = tree.find(&names) {
            inodes.push(inode);
            taken.push(names);
        }
    }
    inodes
}

/// The image as it grows.
struct Image<'d> {
    moved: usize,
    chunks: ChunkTable,
    blobs: Vec<BlobEntry>,
    /// Position of the blob that is being written in `blobs`, once it has a chunk.
    own: Option<usize>,
    writer: BlobWriter<'d>,
    dictionary: Option<Base>,
    /// Positions of blobs in the dictionary to positions in `blobs`.
    adopted: HashMap<u32, u32>,
    references: u64,
}

impl Image<'_> {
    /// The next chunk of a file: known, in the dictionary, or stored.
    fn take(&mut self, chunk: Chunk<'_>) -> Result<(), BuildError> {
        let number = match self.chunks.find(chunk.key) {
            Some(known) => known,
            None => match self.in_dictionary(&chunk)? {
                Some(record) => self.chunks.add(record)?,
                None => self.store(&chunk)?,
            },
        };
        self.chunks.append(chunk.owner.moved(self.moved), number);
        self.references += 1;
        Ok(())
    }

    fn in_dictionary(&mut self, chunk: &Chunk<'_>) -> Result<Option<ChunkRecord>, BuildError> {
        let Some(dictionary) = &self.dictionary else {
            return Ok(None);
        };
        let Some(mut record) = dictionary
            .chunks
            .find(chunk.key)
            .map(|number| *dictionary.chunks.record(number))
        else {
            return Ok(None);
        };
        let theirs = record.blob_index.get();
        let ours = match self.adopted.get(&theirs) {
            Some(ours) => *ours,
            None => {
                // The reader checked that a chunk's blob is in the table.
                let Some(entry) = dictionary.blobs.get(theirs as usize) else {
                    return Ok(None);
                };
                let position = self
                    .blobs
                    .iter()
                    .position(|blob| blob.id == entry.id)
                    .unwrap_or_else(|| {
                        self.blobs.push(*entry);
                        self.blobs.len() - 1
                    });
                *self.adopted.entry(theirs).or_insert(position as u32)
            }
        };
        record.blob_index = U32::new(ours);
        Ok(Some(record))
    }

    fn store(&mut self, chunk: &Chunk<'_>) -> Result<ChunkNumber, BuildError> {
        // The pipeline leaves bytes out only for a key that it handed on before, or that is known.
        let (bytes, compressed) = chunk.stored.ok_or(BuildError::GivenUp)?;
        let own = match self.own {
            Some(own) => own,
            None => {
                // Completed when all chunks are known.
                self.blobs.push(self.writer.entry());
                *self.own.insert(self.blobs.len() - 1)
            }
        };
        let mut record = self.writer.append(chunk.key, chunk.crc32c, bytes, compressed)?;
        record.blob_index = U32::new(own as u32);
        self.chunks.add(record)
    }

    fn finish(mut self) -> Result<(ChunkTable, Vec<BlobEntry>, Option<BlobReport>), BuildError> {
        let mut report = None;
        if let Some(own) = self.own.and_then(|own| self.blobs.get_mut(own))
            && let Some(entry) = self.writer.finish()?
        {
            *own = entry;
            report = Some(BlobReport {
                id: String::from_utf8_lossy(trim_zeros(&entry.id)).into_owned(),
                size: entry.compressed_size.get(),
                uncompressed_size: entry.uncompressed_size.get(),
                chunk_count: entry.chunk_count.get(),
            });
        }
        Ok((self.chunks, self.blobs, report))
    }
}
