//! The states that a database file goes through with the transactions of its WAL, and which of them
//! the chain ends with.

use ltx::Checksum;

use super::Error;
use super::chain::End;
use super::found::Found;
use super::image::Image;
use super::log::Log;

/// The states that the database file goes through with ever more transactions of the WAL.
pub(super) struct States {
    /// The file alone, at the size that the chain ends with.
    pub(super) bare: Image,
    /// With the whole WAL.
    pub(super) last: Image,
    /// After each number of transactions, from 0: size and checksum.
    after: Vec<(u32, Checksum)>,
}

impl States {
    /// Plays the WAL over the database file.
    pub(super) fn walk(end: &End, found: &Found) -> Result<States, Error> {
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
    pub(super) fn commits(&self) -> usize {
        self.after.len() - 1
    }

    /// How many transactions of the WAL the chain has, by the checksum it ends with. Where several
    /// numbers fit, the states are the same, and the place in the WAL decides, else the largest: a
    /// database that was checkpointed whole fits without the WAL as well as with it.
    pub(super) fn commits_in_chain(&self, end: &End, found: &Found) -> Option<usize> {
        let wanted = (end.header.commit, end.trailer.post_apply);
        let by_place = self.commits_by_place(end, found);
        by_place
            .filter(|&commits| self.after[commits] == wanted)
            .or_else(|| self.after.iter().rposition(|state| *state == wanted))
    }

    /// Whether the database file is at the end of the chain, and the WAL is older than that: a power
    /// loss took its end, in which the chain's last transaction stood; or an LTX file was applied to
    /// the database file under all locks, and a crash came before the WAL was emptied.
    pub(super) fn wal_is_older(&self, end: &End, found: &Found) -> bool {
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
    pub(super) fn commits_by_place(&self, end: &End, found: &Found) -> Option<usize> {
        let log = found.log.as_ref().filter(|log| same_run(end, log))?;
        let offset = end.header.wal_offset.checked_add(end.header.wal_size)?;
        log.commits_up_to(u64::try_from(offset).ok()?)
    }

    /// The database with the whole WAL; `pages` pages if there is no WAL to say its size.
    pub(super) fn last(&self, pages: u32) -> Result<Image, Error> {
        let mut image = self.last.clone();
        if self.commits() == 0 {
            image.resize(pages)?;
        }
        Ok(image)
    }

    /// What LTX files may be applied to: the database with the WAL, and without.
    pub(super) fn into_bases(self) -> Vec<Image> {
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
