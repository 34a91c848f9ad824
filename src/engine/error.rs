//! What can go wrong in the engine.

use std::io;
use std::path::{Path, PathBuf};

use ltx::Pos;

use super::lost_found;
use super::name::{DbName, InvalidName};

/// An error of the engine. The text says what was being done and to what; the cause is its source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file call failed.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An LTX file does not verify.
    #[error("{what} of {db}")]
    Ltx {
        /// What was being done.
        what: &'static str,
        /// The database.
        db: DbName,
        /// Why.
        source: ltx::Error,
    },
    /// A database directory could not be brought to one state.
    #[error("recover database {db}")]
    Recover {
        /// The database.
        db: DbName,
        /// Why.
        source: super::recover::Error,
    },
    /// A transaction does not follow on the position of the database.
    #[error("position mismatch on db {db}: have {have}, need {need}")]
    PositionMismatch {
        /// The database.
        db: DbName,
        /// Where it stands.
        have: Pos,
        /// Where it would have to stand.
        need: Pos,
    },
    /// Another process uses the data directory.
    #[error(
        "data directory {} is in use by another process: stop that one, or set another data.dir",
        dir.display()
    )]
    InUse {
        /// The data directory.
        dir: PathBuf,
    },
    /// Only the primary can do this.
    #[error("this node is not the primary")]
    NotPrimary,
    /// There is no such database.
    #[error("database not found: {0:?}")]
    UnknownDatabase(String),
    /// Not a name for a database.
    #[error(transparent)]
    InvalidName(#[from] InvalidName),
    /// The database is in the failed state.
    #[error("database {db} has failed: {reason}")]
    Failed {
        /// The database.
        db: DbName,
        /// Why it failed.
        reason: String,
    },
    /// A replica has a transaction that its primary has not taken.
    #[error("transaction to {pos} of {db} was not taken by the primary")]
    NotTaken {
        /// The database.
        db: DbName,
        /// Where the transaction leads to.
        pos: Pos,
    },
    /// A HALT lock is not what it would have to be.
    #[error("halt lock on {db}: {what}")]
    HaltLock {
        /// The database.
        db: DbName,
        /// What is wrong.
        what: &'static str,
    },
    /// The database could not be locked in time.
    #[error("database {db} is busy: {what}")]
    Busy {
        /// The database.
        db: DbName,
        /// What was waited for.
        what: &'static str,
    },
    /// What the primary sent does not fit the state here; only a snapshot helps.
    #[error("database {db} at {pos}: {what}")]
    Diverged {
        /// The database.
        db: DbName,
        /// Where it stands.
        pos: Pos,
        /// What does not fit.
        what: &'static str,
    },
    /// The WAL of a followed database could not be written.
    #[error("{what} of {db}")]
    Wal {
        /// What was being done.
        what: &'static str,
        /// The database.
        db: DbName,
        /// Why.
        source: super::apply::wal::Error,
    },
    /// The content is not what it has to be.
    #[error("{what} in database {db}: {detail}")]
    Corrupt {
        /// What was being done.
        what: &'static str,
        /// The database.
        db: DbName,
        /// What is wrong.
        detail: String,
    },
    /// A received transaction would leave what is no database.
    #[error("received transaction of {db} would leave no database: {detail}")]
    NoDatabase {
        /// The database.
        db: DbName,
        /// What is wrong with page 1.
        detail: String,
    },
    /// The cluster id on disk and the one of the cluster differ.
    #[error(
        "cluster id is {have}, cannot become {want}: this data directory belongs to another cluster"
    )]
    ClusterId {
        /// The id on disk.
        have: String,
        /// The id offered.
        want: String,
    },
}

/// A result of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// For `map_err` on a file call: what was being done, to which file.
    pub fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
        move |source| Error::Io { what, path: path.to_owned(), source }
    }

    /// The errno of the system call behind the error, if there was one.
    pub fn os_error(&self) -> Option<i32> {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if let Some(io) = error.downcast_ref::<io::Error>()
                && let Some(code) = io.raw_os_error()
            {
                return Some(code);
            }
            cause = error.source();
        }
        None
    }
}

impl From<lost_found::Error> for Error {
    fn from(lost_found::Error { what, path, source }: lost_found::Error) -> Error {
        Error::Io { what, path, source }
    }
}

/// The text of an error with its causes, for one log line.
pub fn chain_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
