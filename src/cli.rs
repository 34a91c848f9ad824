//! The command line: arguments to a command, an error to an exit code.
//!
//! Exit codes: 0 success; 1 an error while running; 2 usage, help, bad flags and, for `mount`, a
//! bad configuration; else that of the supervised process. Usage goes to stdout. An error is one
//! line on stderr, `ERROR: what: cause`.

use std::process::ExitCode;

use crate::supervisor::descriptors;
use crate::telemetry::log::chain;
use crate::telemetry::{complain, say};

mod call;
mod config;
mod export;
mod flags;
mod import;
mod mount;
mod progress;
mod promote;
mod run;
mod status;
mod version;

use flags::{Flags, Spec};

const CODE_ERROR: u8 = 1;
const CODE_USAGE: u8 = 2;

const USAGE: &str = "\
litefs replicates SQLite databases between machines.

Usage:

  litefs COMMAND [flags] [args]

Commands:

  mount    mount the file system and run an application on it
  run      run a command as primary, or under the HALT lock of a database
  status   show what the local node knows and does
  promote  make the local node the primary
  export   copy a database out of the cluster into a file
  import   copy a SQLite file into the cluster
  config   check the configuration file
  version  print the version

litefs COMMAND -h shows the flags of a command.";

/// A command: how it is called and what it does.
struct Command {
    spec: &'static Spec,
    run: fn(Flags) -> Result<u8, Failure>,
}

const COMMANDS: &[Command] = &[
    Command { spec: &mount::SPEC, run: mount::run },
    Command { spec: &run::SPEC, run: run::run },
    Command { spec: &status::SPEC, run: status::run },
    Command { spec: &promote::SPEC, run: promote::run },
    Command { spec: &export::SPEC, run: export::run },
    Command { spec: &import::SPEC, run: import::run },
    Command { spec: &config::SPEC, run: config::run },
    Command { spec: &version::SPEC, run: version::run },
];

/// Why a command did not do its work.
enum Failure {
    /// The arguments ask for the usage text.
    Help,
    /// The arguments or the configuration are wrong.
    Usage(anyhow::Error),
    /// It went wrong on the way.
    Run(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Run(error.into())
    }
}

/// A mistake in the arguments.
fn usage(error: impl Into<anyhow::Error>) -> Failure {
    Failure::Usage(error.into())
}

/// Runs the program with its arguments, without its own name.
pub fn run(arguments: impl Iterator<Item = std::ffi::OsString>) -> ExitCode {
    let arguments: Result<Vec<_>, _> = arguments.map(|argument| argument.into_string()).collect();
    let code = match &arguments {
        Ok(arguments) => dispatch(arguments),
        Err(argument) => {
            fail(&anyhow::anyhow!("argument is not UTF-8: {}", argument.to_string_lossy()));
            CODE_USAGE
        }
    };
    ExitCode::from(code)
}

fn dispatch(arguments: &[String]) -> u8 {
    let Some((name, rest)) = arguments.split_first() else {
        say(USAGE);
        return CODE_USAGE;
    };
    if name == "help" || name.starts_with('-') {
        say(USAGE);
        return CODE_USAGE;
    }
    if name == descriptors::COMMAND {
        let told = descriptors::become_program(rest);
        told.unwrap_or_else(|error| fail(&error.into()));
        return CODE_ERROR;
    }
    let Some(command) = COMMANDS.iter().find(|command| command.spec.name == name) else {
        fail(&anyhow::anyhow!("litefs {name}: unknown command"));
        return CODE_ERROR;
    };
    finish(command, rest)
}

fn finish(command: &Command, arguments: &[String]) -> u8 {
    let result = match Flags::parse(command.spec, arguments) {
        Ok(flags) => (command.run)(flags),
        Err(flags::Error::Help) => Err(Failure::Help),
        Err(error) => {
            say(command.spec.usage());
            Err(usage(error))
        }
    };
    match result {
        Ok(code) => code,
        Err(Failure::Help) => {
            say(command.spec.usage());
            CODE_USAGE
        }
        Err(Failure::Usage(error)) => {
            fail(&error);
            CODE_USAGE
        }
        Err(Failure::Run(error)) => {
            fail(&error);
            CODE_ERROR
        }
    }
}

fn fail(error: &anyhow::Error) {
    complain(format_args!("ERROR: {}", chain(error.as_ref())));
}

/// Runs one call to a node.
fn block_on<T>(call: impl Future<Output = T>) -> std::io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(call);
    // A thread may still read a pipe that nobody writes to.
    runtime.shutdown_background();
    Ok(result)
}
