//! Which page may follow which: the same rules for whoever writes a file and whoever reads one.
//!
//! Pages ascend, none is past the size of the database, the lock page is never there. A snapshot
//! holds every other page from 1 to the last.

use crate::error::Error;
use crate::header::Header;
use crate::types::Pgno;

/// The rules of one file, and the page that came last.
#[derive(Debug)]
pub(crate) struct PageOrder {
    commit: u32,
    lock: u32,
    kind: Kind,
    /// The last page; zero before the first.
    last: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Snapshot,
    Changes,
}

impl PageOrder {
    /// The rules for the file with this header.
    pub(crate) fn new(header: &Header) -> PageOrder {
        let kind = match header.is_snapshot() {
            true => Kind::Snapshot,
            false => Kind::Changes,
        };
        PageOrder { commit: header.commit, lock: header.page_size.lock_pgno().0, kind, last: 0 }
    }

    /// Checks that `pgno` may come next, and takes it as the last.
    pub(crate) fn next(&mut self, pgno: Pgno) -> Result<(), Error> {
        let previous = Pgno(self.last);
        match () {
            () if pgno.0 == 0 => return Err(Error::PageNumber),
            () if pgno.0 > self.commit => {
                return Err(Error::PageBounds { pgno, commit: self.commit });
            }
            () if pgno.0 == self.lock => return Err(Error::LockPage(pgno)),
            () if self.kind == Kind::Changes && pgno <= previous => {
                return Err(Error::PageOrder { previous, pgno });
            }
            () if self.kind == Kind::Snapshot && u64::from(pgno.0) != self.following() => {
                return Err(match self.last {
                    0 => Error::SnapshotStart(pgno),
                    _ => Error::SnapshotOrder { previous, pgno },
                });
            }
            () => {}
        }
        self.last = pgno.0;
        Ok(())
    }

    /// Checks that the file may end here.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        match self.kind == Kind::Snapshot && self.following() <= u64::from(self.commit) {
            true => Err(Error::SnapshotIncomplete { last: self.last, commit: self.commit }),
            false => Ok(()),
        }
    }

    /// The page after the last one, the lock page left out; it may be past all page numbers.
    fn following(&self) -> u64 {
        let next = u64::from(self.last) + 1;
        next + u64::from(next == u64::from(self.lock))
    }
}
