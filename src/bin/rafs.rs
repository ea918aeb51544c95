//! The image tool: builds, shows and serves RAFS images.

use std::process::ExitCode;

fn main() -> ExitCode {
    rafsd::tool::main()
}
