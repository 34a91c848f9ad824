//! How database and chain come to one position: by the WAL, by the chain, or by all pages that are
//! there.

use std::collections::{BTreeSet, HashSet};

use ltx::{Checksum, Pgno, Pos, Txid};

use super::chain::{self, End, Files, LtxFile, Reach};
use super::found::{Found, Journal};
use super::image::Image;
use super::log::{Latest, Log};
use super::repair::{self, NewFile, Source};
use super::states::States;
use super::{Error, Recovery, io_error};
use crate::sqlite::header::DatabaseHeader;

/// What is to be done so that database and chain end at one position.
pub(super) struct Plan {
    /// The database afterwards.
    pub(super) image: Image,
    /// The position afterwards.
    pub(super) pos: Pos,
    pub(super) timestamp_ms: i64,
    /// LTX files to write.
    pub(super) write: Vec<NewFile>,
    pub(super) wal: WalUse,
    /// LTX files to apply, oldest first.
    pub(super) apply: Vec<LtxFile>,
    /// What is done with the database file that is there.
    pub(super) database: DatabaseUse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WalUse {
    /// Its frames go into the database file.
    Checkpoint,
    /// It has no part in the result.
    SetAside,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DatabaseUse {
    Keep,
    /// It is damaged, and nothing of it is needed.
    SetAside,
}

impl Plan {
    /// The database becomes `image` at the end of the chain; nothing more.
    pub(super) fn keep(end: &End, image: Image) -> Plan {
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

impl Recovery<'_> {
    /// How the database comes to the end of the chain, or the chain to the end of the WAL; none if
    /// neither.
    pub(super) fn plan(&self, end: &End, found: &Found) -> Result<Option<Plan>, Error> {
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
    pub(super) fn adopt(
        &self,
        end: &End,
        found: &Found,
        states: &States,
    ) -> Result<Option<Plan>, Error> {
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
    pub(super) fn continue_with_all(
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
    pub(super) fn whole(&self, found: &Found) -> Result<Option<(Image, Latest)>, Error> {
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
pub(super) fn page_sources(
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
