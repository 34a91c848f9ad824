//! A database in checksums: the database file, and what lies over it.
//!
//! Over the file lie WAL frames, or pages of LTX files, as trials that cost no page image. A page
//! that is cut off keeps its slot: a reader of the WAL sees it again when the database grows, as the
//! file and the log still hold it.

use ltx::{Checksum, PageSize, Pgno};

use super::Error;
use crate::engine::checksum::PageSums;

/// The most pages that may be missing between the ends of files and a size that a commit names.
/// SQLite leaves holes only where it allocated and freed pages in one transaction; without a bound a
/// few broken bytes would cost gigabytes of memory.
const HOLE_PAGES_MAX: usize = 1 << 24;

/// The checksum of each page, a size, and the checksum of the pages within it.
#[derive(Debug, Clone)]
pub(super) struct Image {
    page_size: PageSize,
    /// By page number from 1; may go on past `pages`.
    sums: Vec<Checksum>,
    pages: u32,
    rolling: Checksum,
}

impl Image {
    /// A database of the pages that `sums` has.
    pub(super) fn new(page_size: PageSize, sums: PageSums) -> Image {
        let (pages, rolling) = (sums.len(), sums.rolling());
        Image { page_size, sums: sums.into_sums(), pages, rolling }
    }

    pub(super) fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The size in pages.
    pub(super) fn pages(&self) -> u32 {
        self.pages
    }

    /// The checksum of the database.
    pub(super) fn rolling(&self) -> Checksum {
        self.rolling
    }

    /// The checksum of a page; none for the lock page.
    pub(super) fn get(&self, pgno: Pgno) -> Checksum {
        self.sums.get(pgno.0 as usize - 1).copied().unwrap_or(Checksum::NONE)
    }

    /// Puts another page over what is there.
    pub(super) fn set(&mut self, pgno: Pgno, sum: Checksum) -> Result<(), Error> {
        if pgno == self.page_size.lock_pgno() {
            return Ok(());
        }
        self.extend(pgno.0)?;
        let old = std::mem::replace(&mut self.sums[pgno.0 as usize - 1], sum);
        if pgno.0 <= self.pages {
            self.rolling = self.rolling.toggle(old).toggle(sum);
        }
        Ok(())
    }

    /// Makes the database `pages` pages long.
    pub(super) fn resize(&mut self, pages: u32) -> Result<(), Error> {
        self.extend(pages)?;
        let changed = self.pages.min(pages) as usize..self.pages.max(pages) as usize;
        let sums = self.sums[changed].iter();
        self.rolling = sums.fold(self.rolling, |rolling, sum| rolling.toggle(*sum));
        self.pages = pages;
        Ok(())
    }

    /// What a transaction does: other pages, and another size.
    pub(super) fn advance(
        &mut self,
        pages: u32,
        changes: impl IntoIterator<Item = (Pgno, Checksum)>,
    ) -> Result<(), Error> {
        self.resize(self.pages.min(pages))?;
        changes.into_iter().try_for_each(|(pgno, sum)| self.set(pgno, sum))?;
        self.resize(pages)
    }

    /// The pages within the database that an LTX file may hold.
    pub(super) fn page_numbers(&self) -> impl Iterator<Item = Pgno> + use<> {
        let lock = self.page_size.lock_pgno();
        (1..=self.pages).map(Pgno).filter(move |pgno| *pgno != lock)
    }

    /// The checksums alone.
    pub(super) fn into_sums(mut self) -> PageSums {
        self.sums.truncate(self.pages as usize);
        PageSums::from_sums(self.sums)
    }

    /// Knows at least `pages` pages; one that stands nowhere is a page of zeros.
    fn extend(&mut self, pages: u32) -> Result<(), Error> {
        let known = self.sums.len();
        if pages as usize <= known {
            return Ok(());
        }
        if pages as usize - known > HOLE_PAGES_MAX {
            return Err(Error::Size { pages });
        }
        let zeros = vec![0; self.page_size.bytes()];
        let lock = self.page_size.lock_pgno();
        let sum = |pgno| match pgno == lock {
            true => Checksum::NONE,
            false => ltx::page_checksum(pgno, &zeros),
        };
        self.sums.extend((known as u32 + 1..=pages).map(Pgno).map(sum));
        Ok(())
    }
}
