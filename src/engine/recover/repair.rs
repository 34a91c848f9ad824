//! The steps that change files. Each can be made again after a crash in it or behind it, and leaves
//! what a new start needs to come to the same end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use ltx::{Checksum, Compression, Decoder, Encoder, Header, NodeId, PageSize, Pgno, Txid};

use super::chain::LtxFile;
use super::log::{Latest, Log};
use super::{Error, io_error};
use crate::engine::layout::DbDir;
use crate::engine::unsynced;
use crate::os;
use crate::sqlite::journal::JournalReader;

/// How much of a file is read or written at once, in bytes.
const IO_SIZE: usize = 256 << 10;

/// From this many new LTX files on, one sync of the whole file system is cheaper than one of each.
const SYNC_FILES_MAX: usize = 8;

/// Where the image of a page stands.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// In a frame of the WAL, counted from 0.
    Frame(usize),
    /// In the database file; zeros past its end.
    Database,
}

/// An LTX file to be written.
#[derive(Debug)]
pub(super) struct NewFile {
    pub(super) min: Txid,
    pub(super) max: Txid,
    pub(super) pre: Checksum,
    pub(super) post: Checksum,
    /// The size of the database after it, in pages.
    pub(super) commit: u32,
    /// Ascending.
    pub(super) pages: Vec<(Pgno, Checksum, Source)>,
    /// Where it stands in the WAL, if it does: offset and size in bytes.
    pub(super) wal: Option<(u64, u64)>,
}

/// What the files of pages are.
pub(super) struct Sources<'a> {
    pub(super) page_size: PageSize,
    pub(super) log: Option<&'a Log>,
    /// None if there is no database file.
    pub(super) database: Option<&'a File>,
    pub(super) database_path: &'a Path,
    pub(super) wal_path: &'a Path,
}

impl Sources<'_> {
    fn read(&self, pgno: Pgno, source: Source, page: &mut [u8]) -> Result<(), Error> {
        match (source, self.log, self.database) {
            (Source::Frame(frame), Some(log), _) => {
                log.read_frame(frame, page).map_err(io_error("read wal", self.wal_path))
            }
            (Source::Database, _, Some(file)) => {
                os::read_zero_extended("read:repair", file, page, self.page_size.offset(pgno))
                    .map_err(io_error("read database", self.database_path))
            }
            _ => {
                page.fill(0);
                Ok(())
            }
        }
    }
}

/// What is the same in all new LTX files.
pub(super) struct Stamp {
    pub(super) compression: Compression,
    pub(super) node_id: NodeId,
    pub(super) timestamp_ms: i64,
}

/// Writes LTX files and makes them durable, all together; a crash leaves only whole ones.
pub(super) fn write_files(
    dir: &DbDir,
    files: &[NewFile],
    sources: &Sources<'_>,
    stamp: &Stamp,
) -> Result<(), Error> {
    if files.is_empty() {
        return Ok(());
    }
    let ltx = dir.ltx();
    os::create_dirs("recover:ltx", &ltx).map_err(io_error("create ltx directory", &ltx))?;
    let together = files.len() > SYNC_FILES_MAX;
    for file in files {
        let path = temporary(dir, file);
        let out = write_file(&path, file, sources, stamp)?;
        if !together {
            os::sync("recover:ltx", &out).map_err(io_error("sync ltx file", &path))?;
        }
    }
    if together {
        os::sync_fs("recover:ltx", &ltx).map_err(io_error("sync ltx files", &ltx))?;
    }
    for file in files {
        let path = dir.ltx_file(file.min, file.max);
        os::rename("recover:ltx", &temporary(dir, file), &path)
            .map_err(io_error("rename ltx file", &path))?;
    }
    os::sync_dir("recover:ltx", &ltx).map_err(io_error("sync ltx directory", &ltx))
}

fn temporary(dir: &DbDir, file: &NewFile) -> PathBuf {
    dir.ltx_file(file.min, file.max).with_extension("ltx.tmp")
}

fn write_file(
    path: &Path,
    file: &NewFile,
    sources: &Sources<'_>,
    stamp: &Stamp,
) -> Result<File, Error> {
    let ltx_error = |source| Error::Ltx { what: "write ltx file", path: path.to_owned(), source };
    os::remove_if_present("recover:ltx", path).map_err(io_error("remove ltx file", path))?;
    let out = os::create_new("recover:ltx", path).map_err(io_error("create ltx file", path))?;
    let writer = BufWriter::with_capacity(IO_SIZE, os::Labelled::new("recover:ltx", &out));
    let mut encoder = Encoder::new(writer, header(file, sources, stamp)).map_err(ltx_error)?;
    let mut page = vec![0; sources.page_size.bytes()];
    for (pgno, sum, source) in &file.pages {
        sources.read(*pgno, *source, &mut page)?;
        if encoder.page(*pgno, &page).map_err(ltx_error)? != *sum {
            return Err(Error::Changed { pgno: *pgno, path: path.to_owned() });
        }
    }
    let (mut writer, _) = encoder.finish(file.post).map_err(ltx_error)?;
    writer.flush().map_err(io_error("write ltx file", path))?;
    drop(writer);
    Ok(out)
}

fn header(file: &NewFile, sources: &Sources<'_>, stamp: &Stamp) -> Header {
    let salts = sources.log.filter(|_| file.wal.is_some()).map(|log| log.header().salts);
    let (wal_offset, wal_size) = file.wal.unwrap_or_default();
    Header {
        compression: stamp.compression,
        page_size: sources.page_size,
        commit: file.commit,
        min_txid: file.min,
        max_txid: file.max,
        timestamp_ms: stamp.timestamp_ms,
        pre_apply: file.pre,
        wal_offset: wal_offset as i64,
        wal_size: wal_size as i64,
        wal_salt1: salts.map_or(0, |salts| salts.0),
        wal_salt2: salts.map_or(0, |salts| salts.1),
        node_id: stamp.node_id,
    }
}

/// Writes the last image of each page in the log into the database file.
pub(super) fn checkpoint(
    database: &File,
    latest: &Latest,
    pages: u32,
    sources: &Sources<'_>,
) -> Result<(), Error> {
    let mut page = vec![0; sources.page_size.bytes()];
    for (pgno, frame) in latest.range(..=Pgno(pages)) {
        sources.read(*pgno, Source::Frame(*frame), &mut page)?;
        write_page(database, sources, *pgno, &page)?;
    }
    Ok(())
}

/// Writes the pages of an LTX file, which was verified, into the database file.
pub(super) fn apply(
    database: &File,
    file: &LtxFile,
    pages: u32,
    sources: &Sources<'_>,
) -> Result<(), Error> {
    let error = |source| Error::Ltx { what: "apply ltx file", path: file.path.clone(), source };
    let source = File::open(&file.path).map_err(io_error("open ltx file", &file.path))?;
    let mut decoder = Decoder::new(io::BufReader::with_capacity(
        IO_SIZE,
        os::FileCursor::new("read:repair-ltx", source),
    ))
    .map_err(error)?;
    let mut page = vec![0; sources.page_size.bytes()];
    while let Some(pgno) = decoder.next_page(&mut page).map_err(error)? {
        if pgno.0 <= pages {
            write_page(database, sources, pgno, &page)?;
        }
    }
    decoder.finish().map_err(error)?;
    Ok(())
}

fn write_page(
    database: &File,
    sources: &Sources<'_>,
    pgno: Pgno,
    page: &[u8],
) -> Result<(), Error> {
    os::write_at("recover:database", database, page, sources.page_size.offset(pgno))
        .map_err(io_error("write database", sources.database_path))
}

/// Gives the database file its length and makes it durable.
pub(super) fn finish_database(
    database: &File,
    pages: u32,
    sources: &Sources<'_>,
) -> Result<(), Error> {
    let len = u64::from(pages) * u64::from(sources.page_size.get());
    let path = sources.database_path;
    if database.metadata().map_err(io_error("stat database", path))?.len() != len {
        os::truncate("recover:database", database, len)
            .map_err(io_error("set length of database", path))?;
    }
    sync_database(database, sources)
}

/// Makes the database file durable.
pub(super) fn sync_database(database: &File, sources: &Sources<'_>) -> Result<(), Error> {
    unsynced::sync("recover:database", database)
        .map_err(io_error("sync database", sources.database_path))
}

/// Makes the name of the database file durable, which was made here.
pub(super) fn sync_names(dir: &DbDir) -> Result<(), Error> {
    os::sync_dir("recover:database", dir.path()).map_err(io_error("sync directory", dir.path()))
}

/// Rolls a hot journal back. It stays.
pub(super) fn roll_back(
    dir: &DbDir,
    mut journal: JournalReader<os::FileCursor<File>>,
) -> Result<(), Error> {
    let (path, journal_path) = (dir.database(), dir.journal());
    let header = *journal.header();
    let database =
        os::open_or_create("recover:journal", &path).map_err(io_error("open database", &path))?;
    while let Some(record) =
        journal.next_record().map_err(io_error("read journal", &journal_path))?
    {
        let offset = header.page_size.offset(record.pgno);
        os::write_at("recover:journal", &database, record.page, offset)
            .map_err(io_error("write database", &path))?;
    }
    let len = u64::from(header.database_pages) * u64::from(header.page_size.get());
    os::truncate("recover:journal", &database, len)
        .and_then(|()| unsynced::sync("recover:journal", &database))
        .map_err(io_error("set length of database", &path))
}

/// The former content of the pages in a journal, as checksums.
pub(super) fn journal_sums(
    journal: &mut JournalReader<os::FileCursor<File>>,
) -> io::Result<BTreeMap<Pgno, Checksum>> {
    let mut sums = BTreeMap::new();
    while let Some(record) = journal.next_record()? {
        sums.insert(record.pgno, ltx::page_checksum(record.pgno, record.page));
    }
    Ok(sums)
}

/// Removes files of the directory `dir` that may be there, for good.
pub(super) fn remove(paths: &[&Path], dir: &Path) -> Result<(), Error> {
    let mut removed = false;
    for path in paths {
        match os::remove("recover:remove", path) {
            Ok(()) => removed = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("remove file", path)(error)),
        }
    }
    match removed {
        true => os::sync_dir("recover:remove", dir).map_err(io_error("sync directory", dir)),
        false => Ok(()),
    }
}
