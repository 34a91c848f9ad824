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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::PageSize;

    fn order(kind: Kind, page_size: PageSize, commit: u32) -> PageOrder {
        PageOrder { commit, lock: page_size.lock_pgno().0, kind, last: 0 }
    }

    #[test]
    fn a_snapshot_steps_over_the_lock_page() {
        for page_size in (9..=16).filter_map(|bits| PageSize::new(1 << bits)) {
            let lock = page_size.lock_pgno().0;
            // The lock page just past the end, as the last page, and in the middle.
            for commit in [lock - 1, lock, lock + 1, lock + 2] {
                let mut order = order(Kind::Snapshot, page_size, commit);
                for pgno in (1..lock).chain(lock + 1..=commit) {
                    assert!(order.finish().is_err(), "page {pgno} of {commit} is missing");
                    order.next(Pgno(pgno)).unwrap();
                }
                order.finish().unwrap();
            }
        }
    }

    #[test]
    fn the_lock_page_is_nowhere() {
        let lock = PageSize::MAX.lock_pgno();
        for kind in [Kind::Snapshot, Kind::Changes] {
            let mut order = order(kind, PageSize::MAX, lock.0 + 1);
            order.last = lock.0 - 1;
            assert!(matches!(order.next(lock), Err(Error::LockPage(_))));
            order.next(Pgno(lock.0 + 1)).unwrap();
        }
    }

    #[test]
    fn the_last_page_number_of_all_is_fine() {
        let mut order = order(Kind::Snapshot, PageSize::MAX, u32::MAX);
        order.last = u32::MAX - 1;
        order.next(Pgno(u32::MAX)).unwrap();
        order.finish().unwrap();
        assert!(matches!(order.next(Pgno(1)), Err(Error::SnapshotOrder { .. })));
    }
}
