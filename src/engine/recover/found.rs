//! What the files of a database hold, read and not changed yet (but for a hot journal, which is rolled
//! back first, as SQLite does).

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use ltx::PageSize;

use super::chain::End;
use super::image::Image;
use super::log::Log;
use super::{Error, Recovery, io_error, repair};
use crate::engine::checksum::{self, PageSums, Saved};
use crate::os;
use crate::sqlite::header::{DatabaseHeader, HEADER_SIZE, HeaderError};
use crate::sqlite::journal::{JournalReader, super_journal};

/// What a rollback journal is at start-up.
pub(super) enum Journal {
    /// Missing, or not to be played back.
    Cold,
    /// To be played back.
    Hot(JournalReader<os::FileCursor<File>>),
    /// Of a transaction over several databases, which has committed.
    Stale,
}

/// What the files hold, read and not changed yet.
pub(super) struct Found {
    /// The database file alone; its size is that of the file.
    pub(super) base: Image,
    /// The file's header, if it is a database.
    pub(super) header: Result<DatabaseHeader, HeaderError>,
    pub(super) database: Option<File>,
    /// When the database file was written last.
    pub(super) database_time: Option<SystemTime>,
    pub(super) log: Option<Log>,
    /// When the WAL was written last.
    pub(super) wal_time: Option<SystemTime>,
    /// There is a WAL of another page size, which has no part in anything.
    pub(super) foreign_wal: bool,
    pub(super) journal: Journal,
    /// A hot journal was rolled back. It stays until nothing depends on it any more: a start that
    /// breaks off must come to the same end.
    pub(super) rolled_back: bool,
}

impl Recovery<'_> {
    /// Reads what there is. A hot journal is rolled back first.
    pub(super) fn look(&self, end: Option<&End>, super_journals: &Path) -> Result<Found, Error> {
        let known = end.map(|end| end.header.page_size);
        let in_file = self.open_database()?.map(|file| self.read_header(&file)).transpose()?;
        let in_file = in_file.and_then(|header| header.ok()).map(|header| header.page_size);
        let (journal, rolled_back) = match self.journal(super_journals, in_file.or(known))? {
            Journal::Hot(journal) => {
                self.forget_checksums()?;
                repair::roll_back(self.dir, journal)?;
                (Journal::Cold, true)
            }
            journal => (journal, false),
        };
        let database = self.open_database()?;
        let header = match &database {
            Some(file) => self.read_header(file)?,
            None => Err(HeaderError::Short),
        };
        let log = self.read_log()?;
        let in_log = log.as_ref().map(|log| log.header().page_size);
        let in_file = header.as_ref().ok().map(|header| header.page_size);
        let page_size = known.or(in_file).or(in_log).unwrap_or(PageSize::MIN);
        let base = self.base(database.as_ref(), page_size)?;
        let foreign_wal = in_log.is_some_and(|in_log| in_log != page_size);
        let log = log.filter(|_| !foreign_wal);
        let database_time = modified(&self.dir.database())?;
        let wal_time = modified(&self.dir.wal())?;
        Ok(Found {
            base,
            header,
            database,
            database_time,
            log,
            wal_time,
            foreign_wal,
            journal,
            rolled_back,
        })
    }

    /// The checksums of the whole database file, saved or computed.
    fn base(&self, database: Option<&File>, page_size: PageSize) -> Result<Image, Error> {
        let Some(file) = database else {
            return Ok(Image::new(page_size, PageSums::default()));
        };
        let path = self.dir.database();
        let len = file.metadata().map_err(io_error("stat database", &path))?.len();
        let pages = len.div_ceil(u64::from(page_size.get()));
        let pages = u32::try_from(pages).map_err(|_| Error::Size { pages: u32::MAX })?;
        let saved = self.load_saved(file)?;
        let fits = |saved: &Saved| (saved.page_size, saved.sums.len()) == (page_size, pages);
        if let Some(saved) = saved.filter(fits) {
            return Ok(Image::new(page_size, saved.sums));
        }
        let progress = Progress::new(&path, len);
        let sums = checksum::scan(file, page_size, pages, &|done| progress.at(done))
            .map_err(io_error("read database", &path))?;
        Ok(Image::new(page_size, sums))
    }

    /// The database file, if there is one.
    pub(super) fn open_database(&self) -> Result<Option<File>, Error> {
        open_if_present(&self.dir.database()).map_err(io_error("open", &self.dir.database()))
    }

    pub(super) fn read_header(
        &self,
        file: &File,
    ) -> Result<Result<DatabaseHeader, HeaderError>, Error> {
        let path = self.dir.database();
        let len = file.metadata().map_err(io_error("stat database", &path))?.len();
        let mut bytes = vec![0; len.min(HEADER_SIZE as u64) as usize];
        os::read_zero_extended("read:found", file, &mut bytes, 0)
            .map_err(io_error("read database", &path))?;
        Ok(DatabaseHeader::parse(&bytes))
    }

    pub(super) fn load_saved(&self, database: &File) -> Result<Option<Saved>, Error> {
        let path = self.dir.checksums();
        checksum::load(&path, database).map_err(io_error("read saved checksums", &path))
    }

    pub(super) fn read_log(&self) -> Result<Option<Log>, Error> {
        Log::read(&self.dir.wal()).map_err(io_error("read wal", &self.dir.wal()))
    }

    pub(super) fn open_journal(
        &self,
        known: Option<PageSize>,
    ) -> Result<Option<JournalReader<os::FileCursor<File>>>, Error> {
        let path = self.dir.journal();
        let error = || io_error("read journal", &path);
        match open_if_present(&path).map_err(error())? {
            Some(file) => JournalReader::open(os::FileCursor::new("read:journal", file), known)
                .map_err(error()),
            None => Ok(None),
        }
    }

    /// What the journal is, by SQLite's rules for a journal that nobody holds.
    pub(super) fn journal(
        &self,
        super_journals: &Path,
        known: Option<PageSize>,
    ) -> Result<Journal, Error> {
        let path = self.dir.journal();
        let error = || io_error("read journal", &path);
        let Some(journal) = self.open_journal(known)? else {
            return Ok(Journal::Cold);
        };
        let file = File::open(&path).map_err(error())?;
        let Some(name) =
            super_journal(os::FileCursor::new("read:journal", &file)).map_err(error())?
        else {
            return Ok(Journal::Hot(journal));
        };
        let name = String::from_utf8_lossy(&name);
        let name = Path::new(name.as_ref()).file_name().unwrap_or_default();
        match super_journals.join(name).exists() {
            true => Ok(Journal::Hot(journal)),
            false => Ok(Journal::Stale),
        }
    }
}

/// When a file was written last; none if it is missing.
fn modified(path: &Path) -> Result<Option<SystemTime>, Error> {
    match std::fs::metadata(path).and_then(|meta| meta.modified()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        modified => modified.map(Some).map_err(io_error("stat", path)),
    }
}

fn open_if_present(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        file => file.map(Some),
    }
}

/// Says in the log how far the scan of a large database is.
struct Progress<'a> {
    path: &'a Path,
    len: u64,
    /// The tenths that were said.
    said: AtomicU64,
}

/// A database of this many bytes is scanned in the time in which nobody asks.
const SILENT_SIZE: u64 = 1 << 30;

impl Progress<'_> {
    fn new(path: &Path, len: u64) -> Progress<'_> {
        Progress { path, len, said: Default::default() }
    }

    fn at(&self, done: u64) {
        let tenths = done.saturating_mul(10) / self.len.max(1);
        let news = tenths > self.said.fetch_max(tenths, Ordering::Relaxed);
        if news && self.len >= SILENT_SIZE {
            tracing::info!(path = %self.path.display(), percent = tenths * 10, "checksum database");
        }
    }
}
