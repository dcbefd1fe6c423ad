//! Parse, run the verb, turn an error into an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    byokfs::cli::main()
}
