//! Names of databases: checked when made, since they become directory names and come from peers.

use std::fmt;
use std::sync::Arc;

/// The suffixes of names that belong to a database without being one, longest match first.
pub const SUFFIXES: [&str; 5] = ["-journal", "-wal", "-shm", "-pos", "-lock"];

/// Names that mean something else: directories, and the files of the mount that speak of the node.
pub const RESERVED: [&str; 4] = [".", "..", ".primary", ".lag"];

/// Room for the longest suffix and SQLite's super-journal ending in a 255-byte directory entry.
const NAME_LEN_MAX: usize = 200;

/// The name of a database in the mount: one path component, not one of the names with a meaning.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DbName(Arc<str>);

/// A text that cannot name a database.
#[derive(Debug, thiserror::Error)]
#[error("invalid database name {0:?}")]
pub struct InvalidName(String);

impl DbName {
    /// Checks `name`: 1 to 200 bytes, no `/`, NUL or newline, not reserved, none of the
    /// suffixes, not SQLite's pattern for super-journals.
    pub fn new(name: &str) -> Result<DbName, InvalidName> {
        let invalid = name.is_empty()
            || name.len() > NAME_LEN_MAX
            || RESERVED.contains(&name)
            || name.contains(['/', '\0', '\n'])
            || SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
            || is_super_journal(name);
        if invalid { Err(InvalidName(name.to_owned())) } else { Ok(DbName(name.into())) }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether `name` is what SQLite calls the super-journal of a transaction over several attached
/// databases: `NAME-mj`, six hex digits, `9`, two hex digits (SQLite's vdbeaux.c, vdbeCommit).
pub fn is_super_journal(name: &str) -> bool {
    let Some((base, tail)) = name.rsplit_once("-mj") else { return false };
    !base.is_empty()
        && tail.len() == 9
        && tail.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b))
        && tail.as_bytes()[6] == b'9'
}

impl std::borrow::Borrow<str> for DbName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DbName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for DbName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for name in
            ["", ".", "..", "../x", "a/b", "a\0b", ".primary", ".lag-wal", "a.db-wal", "x-lock"]
        {
            assert!(DbName::new(name).is_err(), "{name:?}");
        }
        for name in ["a.db", "wal", "a-walk", "ünïcode.db", "db with blanks", ".ht.sqlite", "..."]
        {
            assert_eq!(DbName::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn super_journals_are_recognised() {
        assert!(is_super_journal("a.db-mj0A1B2C9DE"));
        assert!(!is_super_journal("a.db-mj0A1B2C8DE"));
        assert!(!is_super_journal("a.db-mj0A1B2C9D"));
        assert!(DbName::new("a.db-mj0A1B2C9DE").is_err());
    }
}
