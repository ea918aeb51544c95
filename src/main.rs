//! The daemon: parse, run, exit code.

use std::io::Write;
use std::process::ExitCode;

use rafsd::cli::{Cli, Task};

fn main() -> ExitCode {
    let outcome = match Cli::of_process() {
        Task::Print(text) => {
            // Whoever asked may have gone; then there is nobody to tell.
            let _ = writeln!(std::io::stdout(), "{text}");
            Ok(())
        }
        Task::Serve(cli) => rafsd::daemon::run(*cli),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "Error: {error}");
            error.exit_code()
        }
    }
}
