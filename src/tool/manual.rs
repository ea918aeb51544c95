//! Completions and man pages, made from the definitions of the command lines.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Command, CommandFactory, ValueEnum};
use clap_complete::Shell;

use super::BoxError;

/// Which program.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Program {
    Rafs,
    Rafsd,
}

impl Program {
    fn command(self) -> (Command, &'static str) {
        match self {
            Self::Rafs => (super::Arguments::command(), "rafs"),
            Self::Rafsd => (crate::cli::Cli::command(), "rafsd"),
        }
    }
}

/// Prints completions for a shell.
#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
    /// For which program.
    #[arg(long, value_enum, default_value = "rafs")]
    of: Program,
}

/// Writes man pages into a directory.
#[derive(Debug, Args)]
pub(super) struct Pages {
    /// Where to; made if it is missing.
    directory: PathBuf,
}

pub(super) fn completions(arguments: &Completions) -> Result<ExitCode, BoxError> {
    let (mut command, name) = arguments.of.command();
    clap_complete::generate(arguments.shell, &mut command, name, &mut std::io::stdout());
    Ok(ExitCode::SUCCESS)
}

pub(super) fn pages(arguments: &Pages) -> Result<ExitCode, BoxError> {
    std::fs::create_dir_all(&arguments.directory)?;
    for program in [Program::Rafs, Program::Rafsd] {
        let (command, _) = program.command();
        clap_mangen::generate_to(command, &arguments.directory)?;
    }
    Ok(ExitCode::SUCCESS)
}
