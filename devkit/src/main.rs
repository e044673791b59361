//! The command line of devkit; see `devkit --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    devkit::cli::main()
}
