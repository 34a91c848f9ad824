//! Whole databases: snapshots and exports out, imports in.
//!
//! Out: a blocking thread makes the bytes under the engine's locks and puts them into a
//! [`spool`], from which they go to the peer at the peer's speed. In: an upload becomes a file first,
//! SQLite itself judges it, and only a healthy database reaches the engine.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use hyper::body::Body;
use ltx::Pos;
use rusqlite::{Connection, OpenFlags};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use super::server::Api;
use super::{body, spool};
use crate::engine::{self, Db};
use crate::sqlite::header::{DatabaseHeader, HEADER_SIZE};
use crate::{limits, os};

/// Why a database could not be sent or taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The engine could not make it.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The spool failed: most likely no space, or the time limit.
    #[error("spool data")]
    Spool(#[source] io::Error),
    /// The thread that makes it died.
    #[error("snapshot thread failed")]
    Thread(#[from] tokio::task::JoinError),
    /// The upload was cut off, or stood still.
    #[error("read upload: {0}")]
    Upload(String),
    /// The upload could not be stored.
    #[error("store upload")]
    Store(#[source] io::Error),
    /// The upload is no healthy database.
    #[error("{0}")]
    Unhealthy(String),
}

/// What is made of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One LTX file of the whole database.
    Snapshot,
    /// The database file itself.
    Export,
}

/// A database on its way out.
pub(super) struct Transfer {
    reader: spool::Reader,
    /// Makes the data; there until its result was taken.
    maker: JoinHandle<Result<Pos, Error>>,
}

/// Begins to make `kind` of `db`, as soon as fewer than [`limits::SPOOLS_MAX`] are being made, and an export as soon as
/// fewer exports wait on the disk for slow peers. No snapshot waits for slow peers: all of its stream would.
pub(super) fn start(api: &Arc<Api>, db: Arc<Db>, kind: Kind) -> Transfer {
    let limit = api.options.snapshot_timeout;
    let (mut writer, reader, emptied) = spool::pipe(&api.spool_dir);
    let (slots, export_slots) = (api.spool_slots.clone(), api.export_slots.clone());
    let maker = tokio::spawn(async move {
        let drained = match kind {
            Kind::Export => Some(export_slots.acquire_owned().await),
            Kind::Snapshot => None,
        };
        let slot = slots.acquire_owned().await;
        let made = spawn_blocking(move || {
            writer.set_deadline(limit.map(|limit| Instant::now() + limit));
            let pos = match kind {
                Kind::Snapshot => db.snapshot(&mut writer),
                Kind::Export => db.export(&mut writer),
            }?;
            writer.finish().map_err(Error::Spool)?;
            Ok(pos)
        });
        let made = made.await?;
        drop(slot);
        if drained.is_some() {
            tokio::spawn(async move {
                let _ = timeout(limits::SPOOL_DRAIN_WAIT, emptied.wait()).await;
                drop(drained);
            });
        }
        made
    });
    Transfer { reader, maker }
}

impl Transfer {
    /// Waits until there is data, or the end.
    pub(super) async fn ready(&self) {
        self.reader.ready().await;
    }

    /// The next data; `None` once all of it was given out.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        match self.reader.next().await {
            Ok(data) => Ok(data),
            // The maker knows why.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                (&mut self.maker).await??;
                Err(Error::Spool(error))
            }
            Err(error) => Err(Error::Spool(error)),
        }
    }

    /// The position of what was given out; call it once [`Transfer::next`] has given `None`.
    pub(super) async fn finish(self) -> Result<Pos, Error> {
        self.maker.await?
    }
}

/// An upload that was stored; its file goes with it.
pub(super) struct Upload {
    path: PathBuf,
}

impl Upload {
    /// Stores `body` in the spool directory, as long as that leaves room to writers.
    pub(super) async fn store<B>(spool_dir: &Path, mut body: B) -> Result<Upload, Error>
    where
        B: Body<Data = Bytes, Error: std::error::Error> + Unpin,
    {
        let upload = Upload { path: spool::unique_path(spool_dir) };
        let path = upload.path.clone();
        let create = move || os::create_new("import:create", &path);
        let mut file = Arc::new(spawn_blocking(create).await?.map_err(Error::Store)?);
        let mut end = 0;
        let mut block = Vec::with_capacity(limits::BODY_PIECE_BYTES);
        loop {
            let data = body::next_data(&mut body).await.map_err(Error::Upload)?;
            block.extend_from_slice(data.as_deref().unwrap_or_default());
            if block.len() >= limits::BODY_PIECE_BYTES || data.is_none() {
                spool::check_room(spool_dir, block.len()).map_err(Error::Store)?;
                (file, block, end) = write_block(file, block, end).await?;
            }
            if data.is_none() {
                return Ok(upload);
            }
        }
    }

    /// The stored file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Has SQLite judge the file; blocking.
    pub(super) fn check(&self) -> Result<(), Error> {
        check_header(&self.path)?;
        check_content(&self.path)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Err(error) = os::remove_if_present("import:remove", &self.path) {
            tracing::warn!(path = %self.path.display(), %error, "remove upload");
        }
    }
}

async fn write_block(
    file: Arc<File>,
    mut block: Vec<u8>,
    end: u64,
) -> Result<(Arc<File>, Vec<u8>, u64), Error> {
    let write = spawn_blocking(move || {
        os::write_at("import:write", &file, &block, end)?;
        let end = end + block.len() as u64;
        block.clear();
        Ok((file, block, end))
    });
    write.await?.map_err(Error::Store)
}

/// Checks what SQLite would not mention: a length that is not whole pages, or fewer pages than the
/// header counts, as of a file that was copied without its WAL or cut off.
fn check_header(path: &Path) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::Store)?;
    let len = file.metadata().map_err(Error::Store)?.len();
    let mut page = [0; HEADER_SIZE];
    let start = &mut page[..HEADER_SIZE.min(len as usize)];
    os::read_exact_at("read:upload", &file, start, 0).map_err(Error::Store)?;
    let header = DatabaseHeader::parse(start)
        .map_err(|error| unhealthy(&format!("read database header: {error}")))?;
    let page_size = u64::from(header.page_size.get());
    let pages = u64::from(header.page_count().unwrap_or_default());
    if len % page_size != 0 || len < pages * page_size {
        return Err(unhealthy(&format!(
            "database file of {len} bytes is cut off: its header counts {pages} pages of \
             {page_size} bytes"
        )));
    }
    Ok(())
}

fn check_content(path: &Path) -> Result<(), Error> {
    // Immutable: SQLite neither looks for a journal or WAL nor makes one.
    let uri = format!("file:{}?immutable=1", path.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let judge = || -> rusqlite::Result<String> {
        let connection = Connection::open_with_flags(uri, flags)?;
        connection.pragma_query_value(None, "quick_check", |row| row.get(0))
    };
    match judge() {
        Ok(verdict) if verdict == "ok" => Ok(()),
        Ok(verdict) => {
            let mut lines = verdict.lines().skip_while(|line| line.starts_with("***"));
            let fault = lines.next().unwrap_or_default();
            Err(unhealthy(&format!("database is damaged: {fault}")))
        }
        Err(error) => Err(unhealthy(&format!("database is damaged: {error}"))),
    }
}

fn unhealthy(text: &str) -> Error {
    Error::Unhealthy(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(dir: &Path, mode: &str) -> Vec<u8> {
        let path = dir.join("made.db");
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "journal_mode", mode).unwrap();
        connection
            .execute_batch(
                "CREATE TABLE t (x); CREATE INDEX i ON t (x);
                 WITH RECURSIVE n (v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM n WHERE v < 2000)
                 INSERT INTO t SELECT printf('row %d', v) FROM n;",
            )
            .unwrap();
        connection.close().unwrap();
        std::fs::read(&path).unwrap()
    }

    fn verdict(dir: &Path, content: &[u8]) -> Result<(), String> {
        let upload = Upload { path: spool::unique_path(dir) };
        let file = os::create_new("test", upload.path()).unwrap();
        os::write_at("test", &file, content, 0).unwrap();
        let result = upload.check().map_err(|error| error.to_string());
        let path = upload.path().to_owned();
        drop(upload);
        assert!(!path.exists(), "the file goes with its upload");
        result
    }

    #[test]
    fn healthy_databases_are_taken() {
        for mode in ["delete", "wal"] {
            let dir = tempfile::tempdir().unwrap();
            assert_eq!(verdict(dir.path(), &database(dir.path(), mode)), Ok(()), "{mode}");
        }
    }

    /// As a program older than SQLite 3.7.0 leaves it: the size that page 1 counts is that of before.
    #[test]
    fn a_database_with_a_stale_size_is_taken_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut old = database(dir.path(), "delete");
        let pages = (old.len() / 4096) as u32;
        old[27] ^= 1;
        old[28..32].copy_from_slice(&(pages - 1).to_be_bytes());
        assert_eq!(verdict(dir.path(), &old), Ok(()));
        crate::http::properties::import(&[&[1], &old[..]].concat());
    }

    #[test]
    fn what_is_no_healthy_database_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let good = database(dir.path(), "delete");
        let check = |content: &[u8], expected: &str| {
            let text = verdict(dir.path(), content).unwrap_err();
            assert!(text.starts_with(expected) && !text.contains('\n'), "{text}");
        };
        check(b"", "read database header: database header too short");
        check(&good[..99], "read database header: database header too short");
        check(&[b'x'; 8192], "read database header: not a sqlite database");
        check(&good[..good.len() - 4096], "database file of");
        check(&good[..good.len() - 1], "database file of");
        let mut size = good.clone();
        size[16..18].copy_from_slice(&[0x12, 0x34]);
        check(&size, "read database header: invalid page size");
        let mut damaged = good.clone();
        damaged[5 * 4096..6 * 4096].fill(0xff);
        check(&damaged, "database is damaged:");
    }
}
