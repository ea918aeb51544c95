//! `rafs unpack`: an image becomes a directory or a tar again.
//!
//! * `directory`: files of the host.
//! * `archive`: members of a tar.

mod archive;
mod directory;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rafs::error::Damaged;
use rafs::inode::{Inode, Kind};
use rafs::reader::{Reader as Image, Step};

use super::BoxError;
use super::blobs::{Blobs, ChunkError, Reader};
use super::inspect::printable;

/// Arguments of `rafs unpack`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Bootstrap, or a blob with a bootstrap inside.
    image: PathBuf,
    /// Directory with the image's blobs.
    #[arg(long, value_name = "DIR")]
    blobs: PathBuf,
    /// Directory to unpack into, new or empty; or a tar to write, if the name ends in .tar or is - (standard output).
    #[arg(long, short, value_name = "DIR|TAR")]
    output: PathBuf,
    /// Leave all files to the user who unpacks them.
    #[arg(long)]
    no_same_owner: bool,
}

/// Something cannot be unpacked.
#[derive(Debug, thiserror::Error)]
enum UnpackError {
    #[error("cannot {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{}", printable(path))]
    Damaged { path: Vec<u8>, source: Damaged },
    #[error("{}", printable(path))]
    Chunk { path: Vec<u8>, source: ChunkError },
    #[error("{} is not empty", path.display())]
    NotEmpty { path: PathBuf },
    #[error("the unpacking was given up")]
    GivenUp,
}

impl UnpackError {
    /// Damage of the image, as opposed to trouble with the output: the rest can be unpacked.
    fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Chunk { .. })
    }
}

/// Takes data of a file: offset in the file, bytes.
type Take<'t> = dyn FnMut(u64, &[u8]) -> Result<(), UnpackError> + 't;

/// What is being unpacked.
struct Source<'a> {
    image: &'a Image,
    blobs: &'a std::sync::Arc<Blobs>,
    directory: &'a Path,
}

impl Source<'_> {
    fn reader(&self) -> Reader {
        Reader::new(self.blobs.clone(), self.directory)
    }

    /// Hands the data of a file over, piece by piece.
    fn data(
        &self,
        path: &[u8],
        inode: &Inode,
        reader: &mut Reader,
        take: &mut Take<'_>,
    ) -> Result<(), UnpackError> {
        let damaged = |source| UnpackError::Damaged {
            path: path.to_vec(),
            source,
        };
        for piece in self.image.chunks(inode).map_err(damaged)? {
            let data = reader
                .read_at(piece.blob, piece.index, piece.uncompressed_offset, piece.size)
                .map_err(|source| UnpackError::Chunk {
                    path: path.to_vec(),
                    source,
                })?;
            take(piece.file_offset, &data)?;
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        let mut bytes = 0;
        let counted: Result<(), std::convert::Infallible> = self.image.walk(&mut |step: Step<'_>| {
            bytes += step
                .inode
                .map_or(0, |inode| if inode.kind == Kind::File { inode.size } else { 0 });
            Ok(())
        });
        match counted {
            Ok(()) => bytes,
        }
    }
}

/// Prints faults of the image as they are met.
#[derive(Default)]
struct Faults {
    count: u64,
}

impl Faults {
    fn add(&mut self, error: &UnpackError) {
        eprintln!("rafs: {}", super::chain(error));
        self.count += 1;
    }
}

/// Unpacks. Exit status 1 if anything of the image could not be.
pub fn run(arguments: &Arguments) -> Result<ExitCode, BoxError> {
    let image = Image::open(&arguments.image)?;
    let blobs = Blobs::open(&image, &arguments.blobs)?;
    let source = Source {
        image: &image,
        blobs: &blobs,
        directory: &arguments.blobs,
    };
    let output = arguments.output.as_path();
    if output == Path::new("-") || output.extension().is_some_and(|extension| extension == "tar") {
        archive::unpack(&source, output)?;
        return Ok(ExitCode::SUCCESS);
    }
    let faults = directory::unpack(&source, output, !arguments.no_same_owner)?;
    if faults > 0 {
        eprintln!("rafs: {faults} faults; the rest was unpacked");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
