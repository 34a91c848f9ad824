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

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ltx::{Checksum, Compression, NodeId, PageSize, Pgno, Pos, Txid};

use self::chain::{End, Files, LtxFile, Reach};
use self::image::Image;
use self::log::{Latest, Log};
use self::repair::{NewFile, Source, Sources, Stamp};
use super::checksum::{self, PageSums, Saved};
use super::layout::DbDir;
use crate::sqlite::header::{DatabaseHeader, HEADER_SIZE, HeaderError, JournalMode};
use crate::sqlite::journal::{JournalReader, super_journal};

mod chain;
mod fence;
mod image;
mod log;
mod repair;
mod rolled_back;
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

/// What a rollback journal is at start-up.
enum Journal {
    /// Missing, or not to be played back.
    Cold,
    /// To be played back.
    Hot(JournalReader<File>),
    /// Of a transaction over several databases, which has committed.
    Stale,
}

/// What is to be done so that database and chain end at one position.
struct Plan {
    /// The database afterwards.
    image: Image,
    /// The position afterwards.
    pos: Pos,
    timestamp_ms: i64,
    /// LTX files to write.
    write: Vec<NewFile>,
    wal: WalUse,
    /// LTX files to apply, oldest first.
    apply: Vec<LtxFile>,
    /// What is done with the database file that is there.
    database: DatabaseUse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WalUse {
    /// Its frames go into the database file.
    Checkpoint,
    /// It has no part in the result.
    SetAside,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DatabaseUse {
    Keep,
    /// It is damaged, and nothing of it is needed.
    SetAside,
}

/// What the files hold, read and not changed yet.
struct Found {
    /// The database file alone; its size is that of the file.
    base: Image,
    /// The file's header, if it is a database.
    header: Result<DatabaseHeader, HeaderError>,
    database: Option<File>,
    /// When the database file was written last.
    database_time: Option<SystemTime>,
    log: Option<Log>,
    /// When the WAL was written last.
    wal_time: Option<SystemTime>,
    /// There is a WAL of another page size, which has no part in anything.
    foreign_wal: bool,
    journal: Journal,
    /// A hot journal was rolled back. It stays until nothing depends on it any more: a start that
    /// breaks off must come to the same end.
    rolled_back: bool,
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

    /// Reads what there is. A hot journal is rolled back first.
    fn look(&self, end: Option<&End>, super_journals: &Path) -> Result<Found, Error> {
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

    /// How the database comes to the end of the chain, or the chain to the end of the WAL; none if
    /// neither.
    fn plan(&self, end: &End, found: &Found) -> Result<Option<Plan>, Error> {
        if found.base.page_size() != end.header.page_size {
            return Ok(None);
        }
        let states = States::walk(end, found)?;
        let (is_older, known) =
            (states.wal_is_older(end, found), states.commits_in_chain(end, found));
        let at_end = match is_older {
            true => Some(&states.bare),
            false => (known == Some(states.commits())).then_some(&states.last),
        };
        if let Some(image) = at_end
            && !self.files.agree(end, image, &HashSet::new(), Reach::Recent)?
        {
            return self.follow_chain(end, found, states);
        }
        if is_older {
            let plan = Plan::keep(end, states.bare);
            return Ok(Some(Plan { wal: WalUse::SetAside, ..plan }));
        }
        if let Some(known) = known {
            return Ok(Some(self.continue_from_wal(end, found, known)?));
        }
        let hint = states.commits_by_place(end, found).filter(|&known| known < states.commits());
        if let Some(known) = hint {
            return Ok(Some(self.continue_in_one(end, found, known)?));
        }
        if let Journal::Stale = found.journal {
            return match self.continue_from_journal(end, found)? {
                Some(plan) => Ok(Some(plan)),
                None => self.continue_with_all(end, end.pos().txid.next(), found),
            };
        }
        if let Some(plan) = self.adopt(end, found, &states)? {
            return Ok(Some(plan));
        }
        self.follow_chain(end, found, states)
    }

    /// The first `known` transactions of the WAL are in the chain; each one after them becomes an LTX
    /// file of its own.
    fn continue_from_wal(&self, end: &End, found: &Found, known: usize) -> Result<Plan, Error> {
        let mut plan = Plan::keep(end, found.base.clone());
        plan.image.resize(end.header.commit)?;
        let Some(log) = &found.log else {
            return Ok(plan);
        };
        let mut latest = log.latest(0..known);
        plan.image.advance(end.header.commit, log.sums(&latest))?;
        for commit in known..log.commits() {
            self.add_transaction(&mut plan, log, &mut latest, commit..commit + 1)?;
        }
        Ok(plan)
    }

    /// As [`Recovery::continue_from_wal`], but in one LTX file: a checkpoint has put later pages into
    /// the database file, so that the states between are not known any more.
    fn continue_in_one(&self, end: &End, found: &Found, known: usize) -> Result<Plan, Error> {
        let mut plan = Plan::keep(end, found.base.clone());
        plan.image.resize(end.header.commit)?;
        if let Some(log) = &found.log {
            let mut latest = log.latest(0..known);
            plan.image.advance(end.header.commit, log.sums(&latest))?;
            self.add_transaction(&mut plan, log, &mut latest, known..log.commits())?;
        }
        Ok(plan)
    }

    /// Adds the LTX file of some transactions of the WAL to a plan that goes up to them; `latest` are
    /// the pages before and, after, also theirs.
    fn add_transaction(
        &self,
        plan: &mut Plan,
        log: &Log,
        latest: &mut Latest,
        commits: std::ops::Range<usize>,
    ) -> Result<(), Error> {
        let changes = log.latest(commits.clone());
        let (old_pages, pages) = (plan.image.pages(), log.pages(commits.end - 1));
        latest.extend(&changes);
        plan.image.advance(pages, log.sums(&changes))?;
        // Also the pages by which the database grew without writing them: allocated and freed at once.
        let lock = plan.image.page_size().lock_pgno();
        let grown = (old_pages + 1..=pages).map(Pgno);
        let changed: BTreeSet<Pgno> = changes.into_keys().chain(grown).collect();
        let changed = changed.into_iter().filter(|pgno| pgno.0 <= pages && *pgno != lock);
        let start = log.end(commits.start);
        let max = Txid(plan.pos.txid.0 + commits.len() as u64);
        plan.write.push(NewFile {
            min: plan.pos.txid.next(),
            max,
            pre: plan.pos.checksum,
            post: plan.image.rolling(),
            commit: pages,
            pages: page_sources(&plan.image, latest, changed),
            wal: Some((start, log.end(commits.end) - start)),
        });
        plan.pos = Pos { txid: max, checksum: plan.image.rolling() };
        plan.timestamp_ms = self.options.now_ms;
        Ok(())
    }

    /// A transaction over several databases had committed before the LTX file of this one was
    /// written; the journal still holds what was before.
    fn continue_from_journal(&self, end: &End, found: &Found) -> Result<Option<Plan>, Error> {
        let Ok(header) = &found.header else {
            return Ok(None);
        };
        let path = self.dir.journal();
        let Some(mut journal) = self.open_journal(Some(header.page_size))? else {
            return Ok(None);
        };
        let old_pages = journal.header().database_pages;
        let sums = repair::journal_sums(&mut journal).map_err(io_error("read journal", &path))?;
        let mut old = found.base.clone();
        old.advance(old_pages, sums)?;
        if (old.pages(), old.rolling()) != (end.header.commit, end.trailer.post_apply) {
            return Ok(None);
        }
        let mut image = found.base.clone();
        image.resize(database_pages(found, header))?;
        let changed = |pgno: &Pgno| pgno.0 > old_pages || old.get(*pgno) != image.get(*pgno);
        let pages: Vec<_> = image.page_numbers().filter(changed).collect();
        let txid = end.pos().txid.next();
        Ok(Some(self.one_more(end, txid, image, &Latest::new(), pages)))
    }

    /// The file after the end of the chain is damaged, but its trailer says that it led to the very
    /// state that the database and its WAL are in: all pages take its place. It may have been set aside
    /// already, by a start that crashed before its replacement was written.
    fn adopt(&self, end: &End, found: &Found, states: &States) -> Result<Option<Plan>, Error> {
        let aside = Files::list(&self.dir.lost_found())?;
        let txid = end.pos().txid;
        for file in self.files.after(txid).chain(aside.after(txid)) {
            let Some(lost) = chain::peek(file)? else { continue };
            let image = states.last(lost.header.commit)?;
            if lost.trailer.post_apply == image.rolling()
                && lost.header.page_size == image.page_size()
            {
                return self.continue_with_all(end, lost.pos().txid, found);
            }
        }
        Ok(None)
    }

    /// All pages that the database and its WAL hold, as the LTX file that ends with `max`.
    fn continue_with_all(
        &self,
        end: &End,
        max: Txid,
        found: &Found,
    ) -> Result<Option<Plan>, Error> {
        let Some((image, latest)) = self.whole(found)? else {
            return Ok(None);
        };
        let pages = image.page_numbers();
        Ok(Some(self.one_more(end, max, image, &latest, pages)))
    }

    /// The plan that adds one LTX file up to `max` behind the end, with some pages of `image`.
    fn one_more(
        &self,
        end: &End,
        max: Txid,
        image: Image,
        latest: &Latest,
        pages: impl IntoIterator<Item = Pgno>,
    ) -> Plan {
        let file = NewFile {
            min: end.pos().txid.next(),
            max,
            pre: end.pos().checksum,
            post: image.rolling(),
            commit: image.pages(),
            pages: page_sources(&image, latest, pages),
            wal: None,
        };
        Plan {
            pos: Pos { txid: max, checksum: image.rolling() },
            timestamp_ms: self.options.now_ms,
            write: vec![file],
            ..Plan::keep(end, image)
        }
    }

    /// The database and its WAL as SQLite would see them; none if there is no database.
    fn whole(&self, found: &Found) -> Result<Option<(Image, Latest)>, Error> {
        let page_size = found.base.page_size();
        let Some(header) = found.header.as_ref().ok().filter(|it| it.page_size == page_size) else {
            return Ok(None);
        };
        let mut image = found.base.clone();
        let Some(log) = &found.log else {
            image.resize(database_pages(found, header))?;
            return Ok(Some((image, Latest::new())));
        };
        let latest = log.latest(0..log.commits());
        image.advance(log.pages(log.commits() - 1), log.sums(&latest))?;
        Ok(Some((image, latest)))
    }

    /// The chain is ahead of the database: LTX files are applied to the database with its WAL, or to
    /// the database alone.
    ///
    /// Unless the WAL is newer than the chain, and a checkpoint put some of it into the database file.
    /// Then no file explains what the WAL holds, and each page of the database file is that of the end
    /// of the chain or one of the WAL. If not, the WAL is older than the chain, such as one from before
    /// a snapshot that was received and not applied yet.
    fn follow_chain(
        &self,
        end: &End,
        found: &Found,
        states: States,
    ) -> Result<Option<Plan>, Error> {
        let mut unexplained: HashSet<_> = match &found.log {
            Some(log) => log.sums(&log.latest(log.commits() - 1..log.commits())).collect(),
            None => HashSet::new(),
        };
        let commits = states.commits();
        let suffix = self.files.search(end, states.into_bases(), &mut unexplained)?;
        let explained = unexplained.is_empty();
        let Some(suffix) = suffix else {
            let max = Txid(end.pos().txid.0 + commits as u64);
            return if explained { Ok(None) } else { self.continue_with_all(end, max, found) };
        };
        if let (false, Some(log)) = (explained, &found.log)
            && is_backfilled(found, &suffix.image, log)
        {
            return Ok(Some(self.continue_in_one(end, found, 0)?));
        }
        let set_aside = suffix.base != 0 || (suffix.bare_fits && !explained);
        let (database, apply) = match suffix.whole && found.header.is_err() {
            true => (DatabaseUse::SetAside, suffix.files),
            false => (DatabaseUse::Keep, suffix.files[suffix.unneeded..].to_vec()),
        };
        Ok(Some(Plan {
            wal: if set_aside { WalUse::SetAside } else { WalUse::Checkpoint },
            database,
            apply,
            ..Plan::keep(end, suffix.image)
        }))
    }

    /// Changes the files as planned.
    fn execute(mut self, end: &End, plan: Plan, found: Found) -> Result<Recovered, Error> {
        let unusable: Vec<_> = self.files.after(end.pos().txid).cloned().collect();
        let broken: Vec<_> = self.files.broken(end)?.into_iter().cloned().collect();
        for file in unusable.iter().chain(&broken) {
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
        self.set_aside.push(repair::set_aside(self.dir, path)?);
        Ok(())
    }

    fn stamp(&self) -> Stamp {
        let Options { compression, node_id, now_ms } = *self.options;
        Stamp { compression, node_id, timestamp_ms: now_ms }
    }

    /// The database file, if there is one.
    fn open_database(&self) -> Result<Option<File>, Error> {
        open_if_present(&self.dir.database()).map_err(io_error("open", &self.dir.database()))
    }

    fn read_header(&self, file: &File) -> Result<Result<DatabaseHeader, HeaderError>, Error> {
        let path = self.dir.database();
        let len = file.metadata().map_err(io_error("stat database", &path))?.len();
        let mut bytes = vec![0; len.min(HEADER_SIZE as u64) as usize];
        checksum::read_zero_extended(file, &mut bytes, 0)
            .map_err(io_error("read database", &path))?;
        Ok(DatabaseHeader::parse(&bytes))
    }

    fn load_saved(&self, database: &File) -> Result<Option<Saved>, Error> {
        let path = self.dir.checksums();
        checksum::load(&path, database).map_err(io_error("read saved checksums", &path))
    }

    fn read_log(&self) -> Result<Option<Log>, Error> {
        Log::read(&self.dir.wal()).map_err(io_error("read wal", &self.dir.wal()))
    }

    fn open_journal(&self, known: Option<PageSize>) -> Result<Option<JournalReader<File>>, Error> {
        let path = self.dir.journal();
        let error = || io_error("read journal", &path);
        match open_if_present(&path).map_err(error())? {
            Some(file) => JournalReader::open(file, known).map_err(error()),
            None => Ok(None),
        }
    }

    /// What the journal is, by SQLite's rules for a journal that nobody holds.
    fn journal(&self, super_journals: &Path, known: Option<PageSize>) -> Result<Journal, Error> {
        let path = self.dir.journal();
        let error = || io_error("read journal", &path);
        let Some(journal) = self.open_journal(known)? else {
            return Ok(Journal::Cold);
        };
        let file = File::open(&path).map_err(error())?;
        let Some(name) = super_journal(&file).map_err(error())? else {
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

impl Plan {
    /// The database becomes `image` at the end of the chain; nothing more.
    fn keep(end: &End, image: Image) -> Plan {
        Plan {
            image,
            pos: end.pos(),
            timestamp_ms: end.header.timestamp_ms,
            write: Vec::new(),
            wal: WalUse::Checkpoint,
            apply: Vec::new(),
            database: DatabaseUse::Keep,
        }
    }
}

/// The states that the database file goes through with ever more transactions of the WAL.
struct States {
    /// The file alone, at the size that the chain ends with.
    bare: Image,
    /// With the whole WAL.
    last: Image,
    /// After each number of transactions, from 0: size and checksum.
    after: Vec<(u32, Checksum)>,
}

impl States {
    fn walk(end: &End, found: &Found) -> Result<States, Error> {
        let mut bare = found.base.clone();
        bare.resize(end.header.commit)?;
        let mut last = bare.clone();
        let mut after = vec![(last.pages(), last.rolling())];
        if let Some(log) = &found.log {
            for commit in 0..log.commits() {
                let changes = log.latest(commit..commit + 1);
                last.advance(log.pages(commit), log.sums(&changes))?;
                after.push((last.pages(), last.rolling()));
            }
        }
        Ok(States { bare, last, after })
    }

    /// The number of transactions in the WAL.
    fn commits(&self) -> usize {
        self.after.len() - 1
    }

    /// How many transactions of the WAL the chain has, by the checksum it ends with. Where several
    /// numbers fit, the states are the same, and the place in the WAL decides, else the largest: a
    /// database that was checkpointed whole fits without the WAL as well as with it.
    fn commits_in_chain(&self, end: &End, found: &Found) -> Option<usize> {
        let wanted = (end.header.commit, end.trailer.post_apply);
        let by_place = self.commits_by_place(end, found);
        by_place
            .filter(|&commits| self.after[commits] == wanted)
            .or_else(|| self.after.iter().rposition(|state| *state == wanted))
    }

    /// Whether the database file is at the end of the chain, and the WAL is older than that: a power
    /// loss took its end, in which the chain's last transaction stood; or an LTX file was applied to
    /// the database file under all locks, and a crash came before the WAL was emptied.
    fn wal_is_older(&self, end: &End, found: &Found) -> bool {
        let wanted = (end.header.commit, end.trailer.post_apply);
        let only_bare = self.after.iter().rposition(|state| *state == wanted) == Some(0);
        let Some(log) = found.log.as_ref().filter(|log| only_bare && log.commits() > 0) else {
            return false;
        };
        if same_run(end, log) {
            let cut = end.header.wal_offset.saturating_add(end.header.wal_size);
            return u64::try_from(cut).is_ok_and(|cut| cut > log.end(log.commits()));
        }
        !next_run(end, log) && found.database_time > found.wal_time
    }

    /// How many transactions of the WAL the chain has, by the place in the WAL that its last file
    /// names.
    fn commits_by_place(&self, end: &End, found: &Found) -> Option<usize> {
        let log = found.log.as_ref().filter(|log| same_run(end, log))?;
        let offset = end.header.wal_offset.checked_add(end.header.wal_size)?;
        log.commits_up_to(u64::try_from(offset).ok()?)
    }

    /// The database with the whole WAL; `pages` pages if there is no WAL to say its size.
    fn last(&self, pages: u32) -> Result<Image, Error> {
        let mut image = self.last.clone();
        if self.commits() == 0 {
            image.resize(pages)?;
        }
        Ok(image)
    }

    /// What LTX files may be applied to: the database with the WAL, and without.
    fn into_bases(self) -> Vec<Image> {
        match self.commits() {
            0 => vec![self.bare],
            _ => vec![self.last, self.bare],
        }
    }
}

/// Whether the last transaction of the chain stood in this run of the WAL.
fn same_run(end: &End, log: &Log) -> bool {
    let salts = log.header().salts;
    (end.header.wal_salt1, end.header.wal_salt2) == (salts.0, salts.1)
}

/// Whether the WAL was restarted right after the last transaction of the chain.
fn next_run(end: &End, log: &Log) -> bool {
    let was_in_wal = end.header.wal_size > 0;
    was_in_wal && end.header.wal_salt1.wrapping_add(1) == log.header().salts.0
}

/// Whether the database file can be that of `image`, the end of the chain, with frames of the WAL in
/// it that a checkpoint moved.
fn is_backfilled(found: &Found, image: &Image, log: &Log) -> bool {
    let frames = log.frames();
    let fits = |pgno: Pgno| {
        let sum = found.base.get(pgno);
        sum == image.get(pgno) || frames.contains(&(pgno, sum))
    };
    image.page_numbers().all(fits)
}

/// Pages of a database, ascending and without the lock page, with where they stand.
fn page_sources(
    image: &Image,
    latest: &Latest,
    pages: impl IntoIterator<Item = Pgno>,
) -> Vec<(Pgno, Checksum, Source)> {
    let source = |pgno| latest.get(&pgno).map_or(Source::Database, |frame| Source::Frame(*frame));
    pages.into_iter().map(|pgno| (pgno, image.get(pgno), source(pgno))).collect()
}

/// The size of a database without a WAL, in pages: what its header says, but no more than the file.
fn database_pages(found: &Found, header: &DatabaseHeader) -> u32 {
    header.page_count().map_or(found.base.pages(), |pages| pages.min(found.base.pages()))
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
    said: std::sync::atomic::AtomicU64,
}

/// A database of this many bytes is scanned in the time in which nobody asks.
const SILENT_SIZE: u64 = 1 << 30;

impl Progress<'_> {
    fn new(path: &Path, len: u64) -> Progress<'_> {
        Progress { path, len, said: Default::default() }
    }

    fn at(&self, done: u64) {
        let tenths = done.saturating_mul(10) / self.len.max(1);
        let news = tenths > self.said.fetch_max(tenths, std::sync::atomic::Ordering::Relaxed);
        if news && self.len >= SILENT_SIZE {
            tracing::info!(path = %self.path.display(), percent = tenths * 10, "checksum database");
        }
    }
}
