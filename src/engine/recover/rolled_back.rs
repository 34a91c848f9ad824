//! A database whose hot journal was rolled back, and which is not what the chain ends with.
//!
//! SQLite journals no leaf of the freelist. A transaction that spilled pages into such leaves before it
//! was broken off leaves them changed, and where no LTX file that is left has them, nothing brings
//! their content back. It means nothing; but the checksum of the database is another one.

use std::collections::HashSet;
use std::fs::File;
use std::io;

use ltx::{PageSize, Pgno};

use super::chain::{End, Reach};
use super::{Error, Found, Recovered, Recovery, io_error, repair};
use crate::os;
use crate::sqlite::freelist;

impl Recovery<'_> {
    /// Nothing explains the database, unless it differs from the end of the chain in what a rollback
    /// left in free pages. Then all pages go on from the chain.
    pub(super) fn run_unexplained(self, newest: &End, found: Found) -> Result<Recovered, Error> {
        let plan = match self.differs_in_free_pages(newest, &found)? {
            true => self.continue_with_all(newest, newest.pos().txid.next(), &found)?,
            false => None,
        };
        match plan {
            Some(plan) => self.execute(newest, plan, found),
            None => {
                self.forget_journal(&found)?;
                Err(self.diverged(newest, &found)?)
            }
        }
    }

    /// Removes a journal that was rolled back, of a database that stays as it is.
    pub(super) fn forget_journal(&self, found: &Found) -> Result<(), Error> {
        if found.rolled_back {
            repair::remove(&[&self.dir.journal()], self.dir.path())?;
        }
        Ok(())
    }

    /// Whether a transaction was rolled back, the size is that of the end of the chain, and so is each
    /// page that an LTX file has, but for free ones.
    fn differs_in_free_pages(&self, newest: &End, found: &Found) -> Result<bool, Error> {
        let (Some(database), Ok(header), true, None) =
            (&found.database, &found.header, found.rolled_back, &found.log)
        else {
            return Ok(false);
        };
        let size = (header.page_size, found.base.pages());
        if size != (newest.header.page_size, newest.header.commit) {
            return Ok(false);
        }
        let free = free_leaves(database, header.page_size, found.base.pages())
            .map_err(io_error("read database", &self.dir.database()))?;
        Ok(!free.is_empty() && self.files.agree(newest, &found.base, &free, Reach::All)?)
    }
}

/// The leaves of the freelist.
fn free_leaves(database: &File, page_size: PageSize, pages: u32) -> io::Result<HashSet<Pgno>> {
    let mut page = vec![0; page_size.bytes()];
    os::read_zero_extended("read:rolled-back", database, &mut page, 0)?;
    let (mut trunks, mut leaves) = (HashSet::new(), HashSet::new());
    let mut next = freelist::first_trunk(&page);
    // A list that leaves the database, or comes to a page again, is damaged from there on.
    while let Some(trunk) = next.filter(|trunk| trunk.0 <= pages && trunks.insert(*trunk)) {
        os::read_zero_extended("read:rolled-back", database, &mut page, page_size.offset(trunk))?;
        let (following, of_trunk) = freelist::trunk(&page);
        leaves.extend(of_trunk);
        next = following;
    }
    Ok(leaves)
}
