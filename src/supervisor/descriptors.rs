//! How many descriptors litefs may have open, and how many a child may.
//!
//! A service has a soft limit of 1024 in most places, for programs that use select(2), and a hard one far
//! above it. litefs raises the soft limit for itself, as Go does, and a child gets back the former one. Only
//! the child can set it without a race: it begins as litefs itself, which sets its own limit and then becomes
//! the program.
//!
//! ```text
//! litefs set-descriptors SOFT PROGRAM ARG...      stdin: a pipe to who started it
//! ```
//!
//! The pipe closes when the program has begun. If it cannot begin, its errno comes out before, in the
//! machine's own order of bytes.

use std::io::{self, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The subcommand that sets the limit and becomes another program. Not for people.
pub const COMMAND: &str = "set-descriptors";

/// The program of this process.
const OURSELVES: &str = "/proc/self/exe";

/// A soft limit of descriptors that this process had before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Former(u64);

/// Raises the soft limit of this process to the hard one; the former limit if that is another one. Without
/// `/proc` no child could have that, and the limit stays.
pub fn raise() -> Option<Former> {
    let raise = || {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        if soft == hard || !Path::new(OURSELVES).exists() {
            return Ok(None);
        }
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        tracing::debug!(soft, hard, "limit of descriptors raised");
        Ok(Some(Former(soft)))
    };
    raise().unwrap_or_else(|error: Errno| {
        tracing::warn!(%error, "raise limit of descriptors");
        None
    })
}

/// Starts a program with its arguments, without stdin; with the former limit, if there is one. `set`
/// adds what else the process gets.
pub(super) fn start(
    words: &[String],
    former: Option<Former>,
    set: impl FnOnce(&mut Command) -> &mut Command,
) -> io::Result<Child> {
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::NotFound)?;
    let Some(Former(soft)) = former else {
        let mut process = Command::new(program);
        return set(process.args(arguments).stdin(Stdio::null())).spawn();
    };
    let (mut failure, report) = io::pipe()?;
    let mut process = Command::new(OURSELVES);
    process.arg(COMMAND).arg(soft.to_string()).args(words).stdin(report);
    let mut child = set(&mut process).spawn()?;
    drop(process); // With our end of the pipe that only the child writes to.
    let mut errno = Vec::new();
    failure.read_to_end(&mut errno)?;
    match <[u8; 4]>::try_from(errno) {
        Ok(errno) => {
            child.wait()?;
            Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
        }
        Err(_) => Ok(child),
    }
}

/// The child's side: `arguments` are the limit and the words of the program. Returns only if that cannot
/// begin, and who started it was told so.
///
/// # Errors
/// He could not be told.
pub fn become_program(arguments: &[String]) -> io::Result<()> {
    let mut report = PipeWriter::from(io::stdin().as_fd().try_clone_to_owned()?);
    let error = set_and_exec(arguments);
    let errno = error.raw_os_error().unwrap_or(Errno::EINVAL as i32);
    report.write_all(&errno.to_ne_bytes())
}

fn set_and_exec(arguments: &[String]) -> io::Error {
    let [soft, program, arguments @ ..] = arguments else {
        return io::ErrorKind::InvalidInput.into();
    };
    let Ok(soft) = soft.parse() else { return io::ErrorKind::InvalidInput.into() };
    let set = || {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)
    };
    match set() {
        Ok(()) => Command::new(program).args(arguments).stdin(Stdio::null()).exec(),
        Err(errno) => errno.into(),
    }
}
