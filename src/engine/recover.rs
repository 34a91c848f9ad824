//! One database directory at start-up: whatever a crash left becomes one chain that ends at one
//! position, and a database file that holds exactly the pages of that position.
//!
//! What can be there, and what it means:
//!
//! * The LTX writer runs behind the commit. Its newest files may be missing or torn; then the WAL
//!   holds those transactions, and they are written again.
//! * A checkpoint may have moved frames into the database file, also such whose LTX file is not
//!   written yet. No frame is overwritten before its LTX file is durable, so the WAL still has them.
//! * The LTX file of a rollback-journal commit is durable before the journal goes. A hot journal is
//!   rolled back, as SQLite would, and the LTX file applied on top: other nodes may have it already.
//! * A power loss may have taken WAL frames and pages that nobody had synced. Then the chain is ahead
//!   and is applied.
//!
//! Which of these it is, checksums decide. That of a database is the XOR of CRCs, which are linear: two
//! equal pages that are both lost alike, such as those of two empty tables, leave it as it was. So what
//! recent LTX files say of single pages must be true too. First all is read and decided, then files change. Changed
//! in this order: what is unusable moves to `lost+found/`, LTX files are written, the database file
//! is written (from the WAL, then from LTX files), the WAL goes as soon as it is not needed. A crash after any step leaves what the next start needs to come to the
//! same end. (Only a hot journal is rolled back before anything is decided, as SQLite does; it stays
//! until all is done.)

use std::io;
use std::path::{Path, PathBuf};

use ltx::{Checksum, Compression, NodeId, PageSize, Pgno, Pos, Txid};

use self::chain::{End, Files, LtxFile};
use self::found::{Found, Journal};
use self::plan::{DatabaseUse, Plan, WalUse, page_sources};
use self::repair::{NewFile, Sources, Stamp};
use self::states::States;
use super::checksum::PageSums;
use super::layout::DbDir;
use super::lost_found;
use super::unsynced;
use crate::sqlite::header::{HeaderError, JournalMode};

mod chain;
mod fence;
mod found;
mod image;
mod log;
mod plan;
mod repair;
mod rolled_back;
mod states;
#[cfg(test)]
mod tests;

/// Why a database could not be made right. Nothing was deleted.
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
    /// An LTX file could not be written or read.
    #[error("{what} {}", path.display())]
    Ltx {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: ltx::Error,
    },
    /// The database file is none, and there is no chain to make it from.
    #[error("damaged database file {}: restore it, or remove the directory", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// The database and its WAL hold neither what the chain ends with nor anything that the chain
    /// leads to or continues.
    #[error(
        "database {} does not match its ltx files: has checksum {have}, ltx files end at {want}; \
         take a snapshot from another node, or move its ltx files away to begin a new chain",
        dir.display()
    )]
    Diverged {
        /// The directory of the database.
        dir: PathBuf,
        /// Where the chain ends.
        want: Pos,
        /// The checksum of the database with its WAL.
        have: Checksum,
    },
    /// A page was another one when it was read again.
    #[error("page {pgno} changed while {} was written", path.display())]
    Changed {
        /// The page.
        pgno: Pgno,
        /// The LTX file.
        path: PathBuf,
    },
    /// A size that no file comes near to.
    #[error("database size of {pages} pages is not believable")]
    Size {
        /// The size.
        pages: u32,
    },
}

impl From<lost_found::Error> for Error {
    fn from(lost_found::Error { what, path, source }: lost_found::Error) -> Error {
        Error::Io { what, path, source }
    }
}

/// For `map_err` on a file call: what was being done, to which file.
fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { what, path: path.to_owned(), source }
}

/// What new LTX files get.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whether they are compressed.
    pub compression: Compression,
    /// Who makes them.
    pub node_id: NodeId,
    /// The time, in milliseconds since the Unix epoch.
    pub now_ms: i64,
}

/// A database that was made right.
#[derive(Debug)]
pub struct Recovered {
    /// Bytes of a page; none if the database was never written.
    pub page_size: Option<PageSize>,
    /// Where the chain ends, and what the database file holds.
    pub pos: Pos,
    /// Size of the database in pages.
    pub pages: u32,
    /// How it is journalled.
    pub mode: JournalMode,
    /// The checksum of each page.
    pub sums: PageSums,
    /// When the last transaction was made, in milliseconds since the Unix epoch.
    pub timestamp_ms: i64,
    /// The transactions whose LTX files were written again, by the last one of each file.
    pub rebuilt: Vec<Txid>,
    /// The transactions that were applied to the database file, by the last one of each file.
    pub applied: Vec<Txid>,
    /// What was moved to `lost+found/`: where it is now.
    pub set_aside: Vec<PathBuf>,
}

impl Recovered {
    /// The state of a database that could not be recovered: nothing is known of it.
    pub fn nothing() -> Recovered {
        Recovered {
            page_size: None,
            pos: Pos::ZERO,
            pages: 0,
            mode: JournalMode::Rollback,
            sums: PageSums::default(),
            timestamp_ms: 0,
            rebuilt: Vec::new(),
            applied: Vec::new(),
            set_aside: Vec::new(),
        }
    }
}

/// Makes the database in `dir` right. `super_journals` is the directory of super-journals.
///
/// Afterwards `database` holds the pages of the position, durably; there is no journal, no WAL and no
/// wal-index; `ltx/` ends at the position. Nobody else may have the files open for writing.
pub fn recover(dir: &DbDir, super_journals: &Path, options: &Options) -> Result<Recovered, Error> {
    remove_temporaries(dir)?;
    fence::fence_wal(dir)?;
    let database = dir.database();
    unsynced::mend(&database).map_err(io_error("write database again", &database))?;
    let files = Files::list(&dir.ltx())?;
    let mut recovery = Recovery { dir, options, files, set_aside: Vec::new() };
    if let Some(recovered) = recovery.unchanged(super_journals)? {
        return Ok(recovered);
    }
    recovery.run(super_journals)
}

/// Files that a crash left half-written.
fn remove_temporaries(dir: &DbDir) -> Result<(), Error> {
    for path in [dir.path().to_owned(), dir.ltx()] {
        for name in chain::names(&path)?.iter().filter(|name| name.ends_with(".tmp")) {
            repair::remove(&[&path.join(name)], &path)?;
        }
    }
    Ok(())
}

struct Recovery<'a> {
    dir: &'a DbDir,
    options: &'a Options,
    files: Files,
    set_aside: Vec<PathBuf>,
}

impl Recovery<'_> {
    /// The way after a clean shutdown: the saved checksums are those of the end of the chain, and
    /// nothing stands in a WAL or a journal. Nothing is read but them.
    fn unchanged(&mut self, super_journals: &Path) -> Result<Option<Recovered>, Error> {
        let Some(newest) = self.files.newest_first().next() else {
            return Ok(None);
        };
        let (Some(end), Some(database)) = (chain::peek(newest)?, self.open_database()?) else {
            return Ok(None);
        };
        let (page_size, pages) = (end.header.page_size, end.header.commit);
        let Some(saved) = self.load_saved(&database)? else {
            return Ok(None);
        };
        if (saved.pos, saved.page_size, saved.sums.len()) != (end.pos(), page_size, pages) {
            return Ok(None);
        }
        // SQLite may have failed to cut it after a commit that made the database smaller.
        let len =
            database.metadata().map_err(io_error("stat database", &self.dir.database()))?.len();
        if len > u64::from(pages) * u64::from(page_size.get()) {
            return Ok(None);
        }
        let cold = matches!(self.journal(super_journals, Some(page_size))?, Journal::Cold);
        if !cold || self.read_log()?.is_some() {
            return Ok(None);
        }
        let header = self.read_header(&database)?;
        self.clean_up()?;
        Ok(Some(Recovered {
            page_size: Some(page_size),
            pos: saved.pos,
            pages,
            mode: header.map_or(JournalMode::Rollback, |header| header.journal_mode),
            sums: saved.sums,
            timestamp_ms: end.header.timestamp_ms,
            rebuilt: Vec::new(),
            applied: Vec::new(),
            set_aside: Vec::new(),
        }))
    }

    fn run(self, super_journals: &Path) -> Result<Recovered, Error> {
        let end = self.newest_valid(None)?;
        let found = self.look(end.as_ref(), super_journals)?;
        let Some(newest) = end else {
            return self.run_without_chain(found);
        };
        let mut end = newest.clone();
        loop {
            if end.header.commit == 0 {
                return self.run_deleted(&end, found);
            }
            if let Some(plan) = self.plan(&end, &found)? {
                return self.execute(&end, plan, found);
            }
            // Behind a gap there may be an older end that fits; what came after it is unusable.
            let start = self.files.run_start(&end)?;
            match self.newest_valid(Some(start))? {
                Some(older) => end = older,
                None => return self.run_unexplained(&newest, found),
            }
        }
    }

    /// The newest file that is valid, of those that end before transaction `before`.
    fn newest_valid(&self, before: Option<Txid>) -> Result<Option<End>, Error> {
        let older = |file: &&LtxFile| before.is_none_or(|before| file.max < before);
        for file in self.files.newest_first().filter(older) {
            if let Some((end, _)) = chain::load(file)? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    /// Changes the files as planned.
    fn execute(mut self, end: &End, plan: Plan, found: Found) -> Result<Recovered, Error> {
        let unusable: Vec<_> = self.files.after(end.pos().txid).cloned().collect();
        let broken = self.files.broken(end)?;
        let strangers = self.files.strangers(end)?;
        let strangers = strangers.into_iter().filter(|file| !broken.contains(file));
        let others: Vec<_> = strangers.chain(broken.iter().copied()).cloned().collect();
        for file in unusable.iter().chain(&others) {
            self.move_aside(&file.path)?;
        }
        if found.foreign_wal || (plan.wal == WalUse::SetAside && found.log.is_some()) {
            self.move_aside(&self.dir.wal())?;
        }
        let log = found.log.as_ref().filter(|_| plan.wal == WalUse::Checkpoint);
        let (database_path, wal_path) = (self.dir.database(), self.dir.wal());
        let mut sources = Sources {
            page_size: plan.image.page_size(),
            log,
            database: found.database.as_ref(),
            database_path: &database_path,
            wal_path: &wal_path,
        };
        repair::write_files(self.dir, &plan.write, &sources, &self.stamp())?;
        if plan.database == DatabaseUse::SetAside && found.database.is_some() {
            self.move_aside(&database_path)?;
            sources.database = None;
        }
        self.forget_checksums()?;
        let database = crate::os::open_or_create("recover:database", &database_path)
            .map_err(io_error("open database", &database_path))?;
        let pages = plan.image.pages();
        if let Some(log) = log {
            repair::checkpoint(&database, &log.latest(0..log.commits()), pages, &sources)?;
        }
        if log.is_some() && !plan.apply.is_empty() {
            // Once newer pages stand in the file, what the WAL has would look like the newest.
            repair::sync_database(&database, &sources)?;
            repair::remove(&[&wal_path], self.dir.path())?;
        }
        for file in &plan.apply {
            repair::apply(&database, file, pages, &sources)?;
        }
        repair::finish_database(&database, pages, &sources)?;
        if sources.database.is_none() {
            repair::sync_names(self.dir)?;
        }
        let header = self.read_header(&database)?;
        self.clean_up()?;
        Ok(Recovered {
            page_size: Some(plan.image.page_size()),
            pos: plan.pos,
            pages,
            mode: header.map_or(JournalMode::Rollback, |header| header.journal_mode),
            sums: plan.image.into_sums(),
            timestamp_ms: plan.timestamp_ms,
            rebuilt: plan.write.iter().map(|file| file.max).collect(),
            applied: plan.apply.iter().map(|file| file.max).collect(),
            set_aside: self.set_aside,
        })
    }

    /// No LTX file can be used: a database begins a chain, with a snapshot of itself. Its number is
    /// that of the newest file that was lost, so that no number comes twice.
    fn run_without_chain(mut self, found: Found) -> Result<Recovered, Error> {
        let lost: Vec<_> = self.files.newest_first().cloned().collect();
        let Some((image, latest)) = self.whole(&found)? else {
            return self.run_without_database(found, &lost);
        };
        let max = lost.first().map_or(Txid(1), |file| file.max);
        let file = NewFile {
            min: Txid(1),
            max,
            pre: Checksum::NONE,
            post: image.rolling(),
            commit: image.pages(),
            pages: page_sources(&image, &latest, image.page_numbers()),
            wal: None,
        };
        for file in &lost {
            self.move_aside(&file.path)?;
        }
        let end = End {
            file: LtxFile { min: Txid(1), max, path: self.dir.ltx_file(Txid(1), max) },
            header: ltx::Header {
                compression: self.options.compression,
                page_size: image.page_size(),
                commit: image.pages(),
                min_txid: Txid(1),
                max_txid: max,
                timestamp_ms: self.options.now_ms,
                pre_apply: Checksum::NONE,
                wal_offset: 0,
                wal_size: 0,
                wal_salt1: 0,
                wal_salt2: 0,
                node_id: self.options.node_id,
            },
            trailer: ltx::Trailer { post_apply: image.rolling(), file_checksum: Checksum::NONE },
        };
        self.files = Files::default();
        let plan = Plan { write: vec![file], ..Plan::keep(&end, image) };
        self.execute(&end, plan, found)
    }

    /// Neither a chain nor a database: an empty file is as good as none.
    fn run_without_database(mut self, found: Found, lost: &[LtxFile]) -> Result<Recovered, Error> {
        if let (Err(source), true) = (found.header, found.base.pages() > 0) {
            self.forget_journal(&found)?;
            return Err(Error::Damaged { path: self.dir.database(), source });
        }
        for file in lost {
            self.move_aside(&file.path)?;
        }
        if found.log.is_some() {
            self.move_aside(&self.dir.wal())?;
        }
        self.clean_up()?;
        Ok(self.empty(None, Pos::ZERO, 0))
    }

    /// The chain ends with a deletion. A database that is not the deleted one is set aside.
    fn run_deleted(mut self, end: &End, found: Found) -> Result<Recovered, Error> {
        if let Some(plan) = self.adopt(end, &found, &States::walk(end, &found)?)? {
            return self.execute(end, plan, found);
        }
        let unusable: Vec<_> = self.files.after(end.pos().txid).cloned().collect();
        for file in &unusable {
            self.move_aside(&file.path)?;
        }
        let (database, wal) = (self.dir.database(), self.dir.wal());
        if found.base.pages() > 0 {
            let deleted = self
                .whole(&found)?
                .is_some_and(|(image, _)| image.rolling() == end.header.pre_apply);
            if !deleted {
                self.move_aside(&database)?;
                if found.log.is_some() {
                    self.move_aside(&wal)?;
                }
            }
        }
        // A journal goes before what it would be played back to, a WAL without a database means nothing.
        repair::remove(&[&self.dir.journal(), &database], self.dir.path())?;
        self.clean_up()?;
        Ok(self.empty(Some(end.header.page_size), end.pos(), end.header.timestamp_ms))
    }

    fn empty(self, page_size: Option<PageSize>, pos: Pos, timestamp_ms: i64) -> Recovered {
        Recovered {
            page_size,
            pos,
            pages: 0,
            mode: JournalMode::Rollback,
            sums: PageSums::default(),
            timestamp_ms,
            rebuilt: Vec::new(),
            applied: Vec::new(),
            set_aside: self.set_aside,
        }
    }

    fn diverged(&self, end: &End, found: &Found) -> Result<Error, Error> {
        let have = match self.whole(found)? {
            Some((image, _)) => image.rolling(),
            None => found.base.rolling(),
        };
        Ok(Error::Diverged { dir: self.dir.path().to_owned(), want: end.pos(), have })
    }

    /// Removes what the database file now holds, and the saved checksums, which the next write would
    /// make untrue.
    fn clean_up(&self) -> Result<(), Error> {
        let paths = [self.dir.journal(), self.dir.wal(), self.dir.shm(), self.dir.checksums()];
        repair::remove(&paths.each_ref().map(PathBuf::as_path), self.dir.path())
    }

    /// Removes the saved checksums before the database file is written: after a power loss the file may
    /// have new pages under its old time.
    fn forget_checksums(&self) -> Result<(), Error> {
        repair::remove(&[&self.dir.checksums()], self.dir.path())
    }

    fn move_aside(&mut self, path: &Path) -> Result<(), Error> {
        self.set_aside.push(lost_found::take(self.dir, path)?);
        Ok(())
    }

    fn stamp(&self) -> Stamp {
        let Options { compression, node_id, now_ms } = *self.options;
        Stamp { compression, node_id, timestamp_ms: now_ms }
    }
}
