//! `litefs import`: a SQLite file into the cluster.
//!
//! What is plainly no database, or not all of one, is refused here, before anything is sent; the
//! node checks the content with SQLite itself. What is no regular file, such as a pipe, is sent as it comes.

use std::fs::File;
use std::io::{Cursor, Read as _};
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use tokio::io::AsyncReadExt;

use super::export::{Transfer, beside};
use super::flags::{Flag, Flags, Kind, Spec};
use super::progress::Progress;
use super::{Failure, block_on, call, say};
use crate::http::client::Error;
use crate::sqlite::header::{DatabaseHeader, HEADER_SIZE};

pub const SPEC: Spec = Spec {
    name: "import",
    arguments: "PATH",
    about: "Copies a SQLite file into the cluster. A database of that name is replaced.",
    flags: &[
        Flag { name: "name", kind: Kind::Value("DB"), about: "the database's name in the mount" },
        call::URL,
        call::CONFIG,
        call::NO_EXPAND_ENV,
    ],
};

pub fn run(flags: Flags) -> Result<u8, Failure> {
    let Transfer { name, path } = Transfer::of(&flags)?;
    let started = Instant::now();
    let client = call::client(&flags)?;
    let Source { start, rest, len } = open(&path)?;
    let sent = block_on(async {
        let rest = tokio::fs::File::from_std(rest);
        let file = AsyncReadExt::chain(Cursor::new(start), rest);
        let mut upload = Progress::new(file, len);
        let sent = client.import(&name, &mut upload, len).await;
        drop(upload.finish());
        sent
    })?;
    sent.map_err(|error| match error {
        Error::ReadUpload(source) => {
            anyhow::Error::new(source).context(format!("read {}", path.display()))
        }
        error => error.into(),
    })?;
    say(format_args!("Import of database {name:?} in {:.1?}", started.elapsed()));
    Ok(0)
}

/// A file that can be a whole database.
#[derive(Debug)]
struct Source {
    /// What was read of it.
    start: Vec<u8>,
    /// What was not.
    rest: File,
    /// Its length in bytes; `None` if only its end tells.
    len: Option<u64>,
}

/// Opens a file that can be a whole database.
fn open(path: &Path) -> anyhow::Result<Source> {
    let shown = path.display();
    let mut file = File::open(path).with_context(|| format!("open {shown}"))?;
    let metadata = file.metadata().with_context(|| format!("open {shown}"))?;
    let len = metadata.is_file().then_some(metadata.len());
    let mut start = Vec::with_capacity(HEADER_SIZE);
    let header_len = HEADER_SIZE as u64;
    std::io::Read::take(&mut file, header_len)
        .read_to_end(&mut start)
        .with_context(|| format!("read {shown}"))?;
    let header = DatabaseHeader::parse(&start)
        .with_context(|| format!("{shown} is not a SQLite database"))?;
    if let Some(len) = len {
        if !len.is_multiple_of(u64::from(header.page_size.get())) {
            anyhow::bail!("{shown} is cut off: {len} bytes are no whole number of pages");
        }
        check_side_files(path)?;
    }
    Ok(Source { start, rest: file, len })
}

/// Only the database file is sent, so nothing may wait beside it.
fn check_side_files(path: &Path) -> anyhow::Result<()> {
    for (suffix, remedy) in [("-wal", "pragma wal_checkpoint(truncate)"), ("-journal", "vacuum")] {
        let side = beside(path, suffix);
        if is_in_use(&side)? {
            anyhow::bail!(
                "{} holds what is not in the database file: close every program that uses it, \
                 then run: sqlite3 {} {remedy:?}",
                side.display(),
                path.display(),
            );
        }
    }
    Ok(())
}

/// Whether a WAL or journal has content. A persistent journal that is done with begins with zeros.
fn is_in_use(path: &Path) -> anyhow::Result<bool> {
    let mut first = [0];
    match File::open(path).and_then(|mut file| file.read(&mut first)) {
        Ok(len) => Ok(len > 0 && first[0] != 0),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("app.db");
        let connection = rusqlite::Connection::open(&path).unwrap();
        connection.execute_batch("pragma page_size = 1024; create table t(x)").unwrap();
        path
    }

    #[track_caller]
    fn refused(path: &Path, part: &str) {
        let error = format!("{:#}", open(path).unwrap_err());
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn a_database_is_read_from_its_start_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = database(dir.path());
        let Source { start: mut read, mut rest, len } = open(&path).unwrap();
        assert_eq!(len, Some(2048));
        rest.read_to_end(&mut read).unwrap();
        assert!(read == std::fs::read(path).unwrap());
    }

    #[test]
    fn what_is_no_whole_database_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = database(dir.path());
        let write = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            crate::os::write_atomic("test", &path, content).unwrap();
            path
        };
        refused(&dir.path().join("none"), "open ");
        refused(&write("empty", b""), "empty is not a SQLite database");
        refused(&write("text", &[b'x'; 4096]), "text is not a SQLite database");
        let content = std::fs::read(&path).unwrap();
        refused(&write("cut", &content[..1500]), "cut is cut off: 1500 bytes");
        write("app.db-wal", b"frames");
        refused(&path, "app.db-wal holds what is not in the database file");
    }
}
