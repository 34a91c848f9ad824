//! The `litefs` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    litefs::cli::run(std::env::args_os().skip(1))
}
