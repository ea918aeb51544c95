//! Where the bootstrap is in a file: the file itself, or the `image.boot` section of a blob.
//!
//! Sections of a blob are found from its end: the last 512 bytes are a tar header, the section that it names
//! precedes it. A table of contents, if there is one, is the last section and names the offsets of the others.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{Bootstrap, Memory, Version};
use crate::error::Refused;
use crate::layout::blob::{Section, TAR_HEADER_SIZE, TarHeader, TocEntry};
use crate::layout::{trim_zeros, v5, v6};

/// Bytes from the start that tell the format.
const HEAD: u64 = 2048;
/// Most bytes of a table of contents with its tar header.
const MAX_TOC: u64 = 4096;
/// Largest bootstrap that is decompressed into memory.
const MAX_DECOMPRESSED: u64 = 1 << 30;

/// The format of the bootstrap that starts with `head`.
pub(super) fn detect(head: &[u8]) -> Option<Version> {
    let word = |offset: usize| {
        head.get(offset..offset + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u32::from_le_bytes)
    };
    if word(0) == Some(v5::MAGIC) && word(4) == Some(v5::VERSION) {
        Some(Version::V5)
    } else if word(v6::SUPERBLOCK_OFFSET as usize) == Some(v6::MAGIC) {
        Some(Version::V6)
    } else {
        None
    }
}

/// Loads the bootstrap of `file`, which has `size` bytes.
pub(super) fn locate(file: &File, size: u64) -> Result<Bootstrap, Refused> {
    if let Some(version) = detect_at(file, 0, size)? {
        return Ok(Bootstrap::load(file, 0, size, version, false)?);
    }
    let Some((name, start, length)) = section_before(file, size)? else {
        return Err(Refused::NotRafs(
            "neither a v5 nor a v6 superblock, nor a tar header at the end",
        ));
    };
    if name == Section::BOOTSTRAP {
        return plain(file, start, length);
    }
    if name == Section::TOC {
        return from_contents(file, size, start, length);
    }
    Err(Refused::NotRafs(
        "the last section of the blob is neither a bootstrap nor a table of contents",
    ))
}

fn detect_at(file: &File, offset: u64, size: u64) -> io::Result<Option<Version>> {
    let mut head = vec![0; usize::try_from(size.min(HEAD)).unwrap_or_default()];
    file.read_exact_at(&mut head, offset)?;
    Ok(detect(&head))
}

fn plain(file: &File, start: u64, length: u64) -> Result<Bootstrap, Refused> {
    let version = detect_at(file, start, length)?.ok_or(Refused::NotRafs(
        "its image.boot section has neither a v5 nor a v6 superblock",
    ))?;
    Ok(Bootstrap::load(file, start, length, version, true)?)
}

/// Name, start and size of the section whose tar header ends at `end`.
fn section_before(file: &File, end: u64) -> Result<Option<(Vec<u8>, u64, u64)>, Refused> {
    let Some(header_at) = end.checked_sub(TAR_HEADER_SIZE) else {
        return Ok(None);
    };
    let mut header = TarHeader::new_zeroed();
    file.read_exact_at(header.as_mut_bytes(), header_at)?;
    let Some(size) = header.section_size() else {
        return Ok(None);
    };
    let start = header_at.checked_sub(size).ok_or(Refused::NotRafs(
        "the tar header at its end names a section larger than the file",
    ))?;
    Ok(Some((header.section_name().to_vec(), start, size)))
}

fn from_contents(file: &File, file_size: u64, start: u64, length: u64) -> Result<Bootstrap, Refused> {
    if length > MAX_TOC - TAR_HEADER_SIZE || !length.is_multiple_of(size_of::<TocEntry>() as u64) {
        return Err(Refused::NotRafs(
            "its table of contents has a size that is not allowed",
        ));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    file.read_exact_at(&mut bytes, start)?;
    let entries = <[TocEntry]>::ref_from_bytes(&bytes)
        .map_err(|_| Refused::NotRafs("its table of contents has a size that is not allowed"))?;
    let entry = entries
        .iter()
        .find(|entry| trim_zeros(&entry.name) == Section::BOOTSTRAP)
        .ok_or(Refused::NotRafs("its table of contents names no bootstrap"))?;
    let (offset, stored) = (entry.compressed_offset.get(), entry.compressed_size.get());
    if offset.checked_add(stored).is_none_or(|end| end > file_size) {
        return Err(Refused::NotRafs(
            "its table of contents names a bootstrap beyond the end of the file",
        ));
    }
    let bootstrap = match entry.flags.get() & TocEntry::COMPRESSION_MASK {
        TocEntry::NONE => plain(file, offset, stored)?,
        TocEntry::ZSTD => compressed(file, offset, stored, entry.uncompressed_size.get())?,
        _ => {
            return Err(Refused::NotRafs(
                "its bootstrap is compressed by a method that is not supported",
            ));
        }
    };
    if Sha256::digest(bootstrap.bytes()).as_slice() != entry.digest {
        return Err(Refused::NotRafs(
            "its bootstrap does not match the digest in the table of contents",
        ));
    }
    Ok(bootstrap)
}

fn compressed(file: &File, offset: u64, stored: u64, size: u64) -> Result<Bootstrap, Refused> {
    if size > MAX_DECOMPRESSED || stored > size.saturating_add(HEAD) {
        return Err(Refused::NotRafs("its bootstrap has a size that is not allowed"));
    }
    let mut input = vec![0; usize::try_from(stored).unwrap_or_default()];
    file.read_exact_at(&mut input, offset)?;
    // Grows with what is really there, so that a lying size costs nothing.
    let mut bytes = Vec::new();
    zstd::stream::read::Decoder::new(input.as_slice())?
        .take(size.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 != size {
        return Err(Refused::NotRafs(
            "its bootstrap does not decompress to the size in the table of contents",
        ));
    }
    let version = detect(&bytes).ok_or(Refused::NotRafs(
        "its image.boot section has neither a v5 nor a v6 superblock",
    ))?;
    Ok(Bootstrap {
        memory: Memory::Copied(bytes.into_boxed_slice()),
        version,
        inlined: true,
    })
}
