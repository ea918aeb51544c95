//! `rafs inspect`: what an image says of itself.

use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

use backend::chunk::{Compression, Digester};
use rafs::bootstrap::Version;
use rafs::inode::{Inode, Kind};
use rafs::reader::Reader;
use serde_json::{Map, Value, json};

use super::{BoxError, human};

/// Arguments of `rafs inspect`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Bootstrap, or a blob with a bootstrap inside.
    image: PathBuf,
    /// Show what is at this path of the image: attributes, entries of a directory, chunks of a file.
    path: Option<PathBuf>,
    /// With a directory: all that is below it.
    #[arg(long, short, requires = "path")]
    recursive: bool,
    /// Print JSON: one object, with --recursive one per line.
    #[arg(long)]
    json: bool,
}

/// Prints what was asked for.
pub fn run(arguments: &Arguments) -> Result<ExitCode, BoxError> {
    let image = Reader::open(&arguments.image)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let shown = match &arguments.path {
        None => show_image(&image, arguments.json, &mut out),
        Some(path) => show_path(&image, path.as_os_str().as_bytes(), arguments, &mut out),
    };
    match shown.and_then(|()| Ok(out.flush()?)) {
        // The reader of a pipe has seen enough.
        Err(e)
            if e.downcast_ref::<io::Error>()
                .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) =>
        {
            Ok(ExitCode::SUCCESS)
        }
        shown => shown.map(|()| ExitCode::SUCCESS),
    }
}

fn compression(compression: Compression) -> &'static str {
    match compression {
        Compression::None => "none",
        Compression::Lz4Block => "lz4_block",
        Compression::Gzip => "gzip",
        Compression::Zstd => "zstd",
    }
}

fn digester(digester: Digester) -> &'static str {
    match digester {
        Digester::Blake3 => "blake3",
        Digester::Sha256 => "sha256",
    }
}

fn show_image(image: &Reader, as_json: bool, out: &mut dyn Write) -> Result<(), BoxError> {
    let superblock = image.superblock();
    let version = match superblock.version {
        Version::V5 => 5,
        Version::V6 => 6,
    };
    let prefetch = image.prefetch_table()?;
    if as_json {
        let blobs: Vec<Value> = superblock
            .blobs
            .iter()
            .map(|blob| {
                json!({
                    "id": blob.id,
                    "compression": compression(blob.compression),
                    "digester": digester(blob.digester),
                    "features": blob.features.names(),
                    "chunk_count": blob.chunk_count,
                    "compressed_size": blob.compressed_size,
                    "data_end": blob.data_end,
                    "uncompressed_size": blob.uncompressed_size,
                    "encrypted": blob.cipher.is_some(),
                    "chunk_info": blob.chunk_info.as_ref().map(|info| json!({
                        "blob_id": info.blob_id,
                        "compression": compression(info.compression),
                        "offset": info.offset,
                        "compressed_size": info.compressed_size,
                        "uncompressed_size": info.uncompressed_size,
                    })),
                    "prefetch": blob.prefetch,
                })
            })
            .collect();
        let value = json!({
            "version": version,
            "bootstrap_size": image.bootstrap().size(),
            "inlined": image.bootstrap().inlined(),
            "chunk_size": superblock.chunk_size,
            "flags": superblock.flags.names(),
            "inodes": superblock.inodes,
            "root": superblock.root,
            "prefetch": prefetch,
            "blobs": blobs,
        });
        serde_json::to_writer_pretty(&mut *out, &value)?;
        return Ok(writeln!(out)?);
    }
    let inlined = if image.bootstrap().inlined() {
        ", inside a blob"
    } else {
        ""
    };
    writeln!(
        out,
        "RAFS v{version}    {} bootstrap{inlined}",
        human(image.bootstrap().size())
    )?;
    writeln!(out, "chunk size {}", human(superblock.chunk_size.into()))?;
    writeln!(out, "flags      {}", superblock.flags.names().join(" "))?;
    writeln!(out, "inodes     {}", superblock.inodes)?;
    if !prefetch.is_empty() {
        writeln!(out, "prefetch   {} entries", prefetch.len())?;
    }
    for (number, blob) in superblock.blobs.iter().enumerate() {
        let encrypted = if blob.cipher.is_some() { ", encrypted" } else { "" };
        writeln!(out, "blob {number}     {}", blob.id)?;
        writeln!(
            out,
            "           {} chunks, {} of {}, {}, {}{encrypted}",
            blob.chunk_count,
            human(blob.compressed_size),
            human(blob.uncompressed_size),
            compression(blob.compression),
            digester(blob.digester),
        )?;
        writeln!(out, "           {}", blob.features.names().join(" "))?;
    }
    Ok(())
}

fn show_path(
    image: &Reader,
    path: &[u8],
    arguments: &Arguments,
    out: &mut dyn Write,
) -> Result<(), BoxError> {
    let inode = image
        .at_path(path)?
        .ok_or_else(|| format!("{}: nothing there", printable(path)))?;
    if arguments.recursive {
        let prefix: Vec<u8> = path
            .split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty() && *name != b".")
            .flat_map(|name| [b"/".as_slice(), name].concat())
            .collect();
        return image.walk(&mut |step| -> Result<(), BoxError> {
            let path = step.path;
            let below = path.strip_prefix(prefix.as_slice());
            if !below.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/")) {
                return Ok(());
            }
            match (step.inode, arguments.json) {
                (Ok(inode), true) => {
                    serde_json::to_writer(&mut *out, &describe(image, path, inode)?)?;
                    writeln!(out)?;
                }
                (Ok(inode), false) => writeln!(out, "{}", line(image, path, inode))?,
                (Err(damaged), true) => {
                    serde_json::to_writer(
                        &mut *out,
                        &json!({"path": text(path), "error": damaged.to_string()}),
                    )?;
                    writeln!(out)?;
                }
                (Err(damaged), false) => writeln!(out, "{}: {damaged}", printable(path))?,
            }
            Ok(())
        });
    }
    if arguments.json {
        let mut value = describe(image, path, &inode)?;
        if inode.kind == Kind::Directory
            && let Value::Object(map) = &mut value
        {
            let entries = image.children(&inode)?;
            map.insert(
                "entries".into(),
                entries.iter().map(|entry| text(&entry.name)).collect(),
            );
        }
        serde_json::to_writer_pretty(&mut *out, &value)?;
        return Ok(writeln!(out)?);
    }
    writeln!(out, "{}", line(image, path, &inode))?;
    writeln!(
        out,
        "inode {}, {} links, mtime {}.{:09}",
        inode.id, inode.nlink, inode.mtime, inode.mtime_nsec
    )?;
    for (name, value) in image.xattrs(&inode)? {
        writeln!(out, "xattr {} = {}", printable(&name), printable(&value))?;
    }
    match inode.kind {
        Kind::Directory => {
            for entry in image.children(&inode)? {
                match image.lookup(&inode, &entry.name) {
                    Ok(Some(child)) => writeln!(out, "{}", line(image, &entry.name, &child))?,
                    Ok(None) => writeln!(out, "{}: not found by its name", printable(&entry.name))?,
                    Err(damaged) => writeln!(out, "{}: {damaged}", printable(&entry.name))?,
                }
            }
        }
        Kind::File => {
            writeln!(
                out,
                "{:>14} {:>10}  blob {:>8} {:>14} {:>10}",
                "offset", "size", "chunk", "stored at", "stored"
            )?;
            for chunk in image.chunks(&inode)? {
                let (at, size) = match &chunk.record {
                    Some(record) => (record.compressed_offset, record.compressed_size),
                    None => (chunk.uncompressed_offset, chunk.size),
                };
                writeln!(
                    out,
                    "{:>14} {:>10}  {:>4} {:>8} {at:>14} {size:>10}",
                    chunk.file_offset, chunk.size, chunk.blob, chunk.index
                )?;
            }
        }
        _ => {}
    }
    Ok(())
}

/// Like `ls -l`.
fn line(image: &Reader, path: &[u8], inode: &Inode) -> String {
    let size = match inode.kind {
        Kind::Char | Kind::Block => {
            format!("{},{}", major(inode.rdev), minor(inode.rdev))
        }
        _ => inode.size.to_string(),
    };
    let target = match inode.kind {
        Kind::Symlink => match image.symlink_target(inode) {
            Ok(target) => format!(" -> {}", printable(&target)),
            Err(damaged) => format!(" -> ({damaged})"),
        },
        _ => String::new(),
    };
    format!(
        "{} {:>6} {:>6} {size:>12} {}{target}",
        mode(inode),
        inode.uid,
        inode.gid,
        printable(path)
    )
}

/// The ten letters of `ls`.
fn mode(inode: &Inode) -> String {
    let kind = match inode.kind {
        Kind::File => '-',
        Kind::Directory => 'd',
        Kind::Symlink => 'l',
        Kind::Char => 'c',
        Kind::Block => 'b',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
    };
    let mut letters = String::from(kind);
    for (shift, special, with, without) in [
        (6, 0o4000, 's', 'S'),
        (3, 0o2000, 's', 'S'),
        (0, 0o1000, 't', 'T'),
    ] {
        let bits = inode.mode >> shift & 7;
        letters.push(if bits & 4 != 0 { 'r' } else { '-' });
        letters.push(if bits & 2 != 0 { 'w' } else { '-' });
        letters.push(match (inode.mode & special != 0, bits & 1 != 0) {
            (true, true) => with,
            (true, false) => without,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    letters
}

/// Parts of a device number in 32 bits (v5 section 9).
pub(super) fn major(rdev: u32) -> u32 {
    rdev >> 8 & 0xfff
}

/// See [`major`].
pub(super) fn minor(rdev: u32) -> u32 {
    rdev & 0xff | rdev >> 12 & 0xf_ff00
}

/// Bytes as JSON: text if they are, else an object with their hexadecimal form.
fn text(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => Value::from(text),
        Err(_) => json!({"hex": hex::encode(bytes)}),
    }
}

/// Text for a terminal: what could disturb it is escaped.
pub(super) fn printable(bytes: &[u8]) -> String {
    let mut shown = String::new();
    for piece in bytes.utf8_chunks() {
        for c in piece.valid().chars() {
            if c.is_control() {
                shown.extend(c.escape_default())
            } else {
                shown.push(c)
            }
        }
        for byte in piece.invalid() {
            shown.push_str(&format!("\\x{byte:02x}"));
        }
    }
    shown
}

fn describe(image: &Reader, path: &[u8], inode: &Inode) -> Result<Value, BoxError> {
    let kind = match inode.kind {
        Kind::File => "file",
        Kind::Directory => "dir",
        Kind::Symlink => "symlink",
        Kind::Char => "char",
        Kind::Block => "block",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
    };
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("path", text(path));
    put("inode", inode.id.into());
    put("type", kind.into());
    put("mode", format!("{:04o}", inode.mode & 0o7777).into());
    put("uid", inode.uid.into());
    put("gid", inode.gid.into());
    put("nlink", inode.nlink.into());
    put("size", inode.size.into());
    put("mtime", json!([inode.mtime, inode.mtime_nsec]));
    let xattrs = image.xattrs(inode)?;
    if !xattrs.is_empty() {
        put(
            "xattrs",
            xattrs
                .iter()
                .map(|(name, value)| json!([text(name), text(value)]))
                .collect(),
        );
    }
    match inode.kind {
        Kind::Symlink => {
            put("target", text(&image.symlink_target(inode)?));
        }
        Kind::Char | Kind::Block => {
            put("rdev", json!([major(inode.rdev), minor(inode.rdev)]));
        }
        Kind::File => {
            let mut chunks = Vec::new();
            for chunk in image.chunks(inode)? {
                let record = chunk.record.as_ref();
                chunks.push(json!({
                    "offset": chunk.file_offset,
                    "size": chunk.size,
                    "blob": chunk.blob,
                    "chunk": chunk.index,
                    "uncompressed_offset": chunk.uncompressed_offset,
                    "digest": record.map(|r| hex::encode(r.digest)),
                    "compressed_offset": record.map(|r| r.compressed_offset),
                    "compressed_size": record.map(|r| r.compressed_size),
                }));
            }
            put("chunks", chunks.into());
        }
        _ => {}
    }
    Ok(Value::Object(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_printed_disturbs_a_terminal() {
        assert_eq!(printable("é\u{1b}[2J\n".as_bytes()), "é\\u{1b}[2J\\n");
        assert_eq!(printable(b"a\xff\xfeb"), "a\\xff\\xfeb");
    }

    #[test]
    fn device_numbers_are_taken_apart() {
        let rdev = 0x34 | 0x123 << 8 | 0xabc00 << 12;
        assert_eq!((major(rdev), minor(rdev)), (0x123, 0xabc34));
    }
}
