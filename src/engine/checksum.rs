//! The checksum of each page of a database, and of the whole: what makes a commit cost only the
//! pages that it changes.
//!
//! After a clean shutdown the array stands in a file, so that the next start need not read the
//! database. All numbers are little-endian.
//!
//! ```text
//!  0  8  "LTXSUMS1"              32  8  the database file: size in bytes
//!  8  4  page size               40  8    inode
//! 12  4  pages                   48  8    time of its last change of content, in nanoseconds
//! 16  8  TXID                    56  8    time of its last change of any kind, in nanoseconds
//! 24  8  database checksum       64 8n  the checksum of each page; 0 for the lock page
//! ..  8  CRC-64 of all before, with the flag bit
//! ```
//!
//! Invariant: a file that does not describe exactly the database file beside it is not used.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use ltx::{Checksum, PageSize, Pgno, Pos, Txid};

use crate::os;

/// How much of a database one read of a scan takes, in bytes: long enough for any disk's full speed.
const SCAN_READ_SIZE: usize = 1 << 20;

/// The checksum of each page of a database, 8 bytes a page, and their sum.
///
/// A slot of [`Checksum::NONE`] has no part in the sum: the lock page, and pages not set yet.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct PageSums {
    sums: Vec<Checksum>,
    /// The sum of `sums`; the flag bit comes and goes.
    rolling: u64,
}

impl PageSums {
    /// The sums of consecutive pages from page 1; [`Checksum::NONE`] for the lock page.
    pub fn from_sums(sums: Vec<Checksum>) -> PageSums {
        let rolling = sums.iter().fold(0, |rolling, sum| rolling ^ sum.get());
        PageSums { sums, rolling }
    }

    /// The sums of all pages from page 1.
    pub fn into_sums(self) -> Vec<Checksum> {
        self.sums
    }

    /// The size of the database in pages, the lock page counted.
    pub fn len(&self) -> u32 {
        u32::try_from(self.sums.len()).expect("page numbers have 32 bits")
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// The checksum of a page; none past the end, for the lock page and for a page not set yet.
    pub fn get(&self, pgno: Pgno) -> Checksum {
        self.sums.get(index(pgno)).copied().unwrap_or(Checksum::NONE)
    }

    /// Sets the checksum of a page and returns the former one. Past the end the database grows, by
    /// slots of [`Checksum::NONE`] between.
    pub fn set(&mut self, pgno: Pgno, sum: Checksum) -> Checksum {
        let index = index(pgno);
        if index >= self.sums.len() {
            self.sums.resize(index + 1, Checksum::NONE);
        }
        let old = std::mem::replace(&mut self.sums[index], sum);
        self.rolling ^= old.get() ^ sum.get();
        old
    }

    /// Makes the database `pages` pages long: cut off, or longer by slots of [`Checksum::NONE`].
    pub fn truncate(&mut self, pages: u32) {
        let kept = self.sums.len().min(pages as usize);
        for sum in self.sums.drain(kept..) {
            self.rolling ^= sum.get();
        }
        self.sums.resize(pages as usize, Checksum::NONE);
    }

    /// The checksum of the database; [`Checksum::EMPTY`] for no pages.
    pub fn rolling(&self) -> Checksum {
        Checksum::flagged(self.rolling)
    }

    /// What [`PageSums::rolling`] would be after these changes, each page once, and a size of `pages`
    /// pages; changes past that size do not count.
    pub fn rolling_after(
        &self,
        pages: u32,
        changes: impl IntoIterator<Item = (Pgno, Checksum)>,
    ) -> Checksum {
        let cut = self.sums.get(pages as usize..).unwrap_or_default();
        let kept = cut.iter().fold(self.rolling(), |rolling, sum| rolling.toggle(*sum));
        let changes = changes.into_iter().filter(|(pgno, _)| pgno.0 <= pages);
        changes.fold(kept, |rolling, (pgno, sum)| rolling.toggle(self.get(pgno)).toggle(sum))
    }
}

fn index(pgno: Pgno) -> usize {
    debug_assert!(pgno.0 > 0, "page numbers start at 1");
    pgno.0 as usize - 1
}

/// The checksums of the first `pages` pages of a database file, by all processors at once. A file
/// that is shorter counts as if it went on with zeros. `progress` is told the bytes done so far.
pub fn scan(
    file: &File,
    page_size: PageSize,
    pages: u32,
    progress: &(dyn Fn(u64) + Sync),
) -> io::Result<PageSums> {
    let mut sums = vec![Checksum::NONE; pages as usize];
    let pieces = sums.chunks_mut(SCAN_READ_SIZE / page_size.bytes()).enumerate();
    let workers = thread::available_parallelism().map_or(1, usize::from).min(pieces.len());
    let scan =
        Scan { file, page_size, pieces: Mutex::new(pieces), done: AtomicU64::new(0), progress };
    let failed = AtomicBool::new(false);
    thread::scope(|scope| {
        let work = || scan.work(&failed);
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let own = work();
        others.into_iter().fold(own, |result, other| match other.join() {
            Ok(other) => result.and(other),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(PageSums::from_sums(sums))
}

/// A scan that several threads work at.
struct Scan<'a, P> {
    file: &'a File,
    page_size: PageSize,
    /// The pieces that nobody has taken yet.
    pieces: Mutex<P>,
    /// Bytes.
    done: AtomicU64,
    progress: &'a (dyn Fn(u64) + Sync),
}

impl<'a, P: Iterator<Item = (usize, &'a mut [Checksum])>> Scan<'_, P> {
    fn work(&self, failed: &AtomicBool) -> io::Result<()> {
        let mut buffer = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let Some((index, sums)) = self.pieces.lock().unwrap().next() else { break };
            let len = sums.len() * self.page_size.bytes();
            buffer.resize(len, 0);
            let offset = (index * SCAN_READ_SIZE) as u64;
            if let Err(error) = os::read_zero_extended("read:scan", self.file, &mut buffer, offset)
            {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
            let first = index * (SCAN_READ_SIZE / self.page_size.bytes()) + 1;
            let first = Pgno(u32::try_from(first).expect("pages have numbers of 32 bits"));
            ltx::page_checksums(first, self.page_size, &buffer, sums);
            (self.progress)(self.done.fetch_add(len as u64, Ordering::Relaxed) + len as u64);
        }
        Ok(())
    }
}

/// The checksums of a database as they were saved.
#[derive(Debug, PartialEq, Eq)]
pub struct Saved {
    /// The page size of the database.
    pub page_size: PageSize,
    /// The position whose pages the database file holds.
    pub pos: Pos,
    /// The checksums.
    pub sums: PageSums,
}

const MAGIC: &[u8; 8] = b"LTXSUMS1";
const HEADER_SIZE: usize = 64;
const CRC_SIZE: usize = 8;

/// Saves `saved` to `path`, for the database file `database` as it is now, which nobody changes any
/// more.
pub fn save(path: &Path, database: &File, saved: &Saved) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(HEADER_SIZE + 8 * saved.sums.sums.len() + CRC_SIZE);
    bytes.write_all(&header(saved, &identity(database)?))?;
    for sum in &saved.sums.sums {
        bytes.extend_from_slice(&sum.get().to_le_bytes());
    }
    bytes.extend_from_slice(&crc(&bytes).to_le_bytes());
    os::write_atomic("checksums:save", path, &bytes)
}

/// The checksums in the file `path`; `None` if it is missing, damaged, or about another file than
/// `database`, or about that file before it was last changed.
pub fn load(path: &Path, database: &File) -> io::Result<Option<Saved>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let len = file.metadata()?.len();
    let mut bytes = [0; HEADER_SIZE];
    os::read_zero_extended("read:checksums", &file, &mut bytes, 0)?;
    let Some(start) = parse_header(&bytes, &identity(database)?) else {
        return Ok(None);
    };
    // Bounded by the file's own length, which is checked before anything is allocated.
    let sums_size = 8 * start.pages as usize;
    if len != (HEADER_SIZE + sums_size + CRC_SIZE) as u64 {
        return Ok(None);
    }
    let mut all = vec![0; len as usize];
    os::read_zero_extended("read:checksums", &file, &mut all, 0)?;
    Ok(parse_sums(&all).filter(|sums| sums.rolling() == start.pos.checksum).map(|sums| Saved {
        page_size: start.page_size,
        pos: start.pos,
        sums,
    }))
}

/// Gives bytes that are to be read as saved checksums what `database` and their checksum demand.
#[cfg(any(test, fuzzing))]
pub(super) fn make_whole(bytes: &mut Vec<u8>, database: &File) {
    bytes.resize(bytes.len().next_multiple_of(8).max(HEADER_SIZE + CRC_SIZE), 0);
    let end = bytes.len() - CRC_SIZE;
    let (content, own) = bytes.split_at_mut(end);
    let identity = identity(database).expect("it is open");
    for (word, value) in content[32..HEADER_SIZE].chunks_exact_mut(8).zip(identity) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    let pages = (content.len() - HEADER_SIZE) as u32 / 8;
    content[12..16].copy_from_slice(&pages.to_le_bytes());
    own.copy_from_slice(&crc(content).to_le_bytes());
}

/// Size, inode and times of a file: what changes when anybody writes to it or puts another in its
/// place.
fn identity(file: &File) -> io::Result<[u64; 4]> {
    let meta = file.metadata()?;
    let time = |seconds: i64, nanos: i64| seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos);
    let modified = time(meta.mtime(), meta.mtime_nsec());
    let changed = time(meta.ctime(), meta.ctime_nsec());
    Ok([meta.len(), meta.ino(), modified as u64, changed as u64])
}

/// What the header says, apart from the database file it is about.
struct Start {
    page_size: PageSize,
    pages: u32,
    pos: Pos,
}

fn header(saved: &Saved, identity: &[u64; 4]) -> [u8; HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&saved.page_size.get().to_le_bytes());
    bytes[12..16].copy_from_slice(&saved.sums.len().to_le_bytes());
    bytes[16..24].copy_from_slice(&saved.pos.txid.0.to_le_bytes());
    bytes[24..32].copy_from_slice(&saved.pos.checksum.get().to_le_bytes());
    for (word, value) in bytes[32..].chunks_exact_mut(8).zip(identity) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn parse_header(bytes: &[u8; HEADER_SIZE], identity: &[u64; 4]) -> Option<Start> {
    let words = bytes[32..].as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    if &bytes[..8] != MAGIC || !words.eq(identity.iter().copied()) {
        return None;
    }
    let checksum = Checksum::from_raw(le_u64(bytes, 24))?;
    Some(Start {
        page_size: PageSize::new(le_u32(bytes, 8))?,
        pages: le_u32(bytes, 12),
        pos: Pos { txid: Txid(le_u64(bytes, 16)), checksum },
    })
}

/// The checksums in the file `bytes`, whose length is right.
fn parse_sums(bytes: &[u8]) -> Option<PageSums> {
    let (content, own) = bytes.split_at(bytes.len() - CRC_SIZE);
    if crc(content).to_le_bytes() != own {
        return None;
    }
    let (words, _) = content[HEADER_SIZE..].as_chunks::<8>();
    let sums: Option<Vec<_>> =
        words.iter().map(|word| Checksum::from_raw(u64::from_le_bytes(*word))).collect();
    sums.map(PageSums::from_sums)
}

/// The checksum of bytes that are no page, by the function that checksums pages.
fn crc(bytes: &[u8]) -> u64 {
    ltx::page_checksum(Pgno(0), bytes).get()
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le_u32(bytes, at)) | u64::from(le_u32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn sum(value: u64) -> Checksum {
        Checksum::flagged(value)
    }

    #[test]
    fn the_rolling_checksum_follows_each_page() {
        let mut sums = PageSums::default();
        assert_eq!(sums.rolling(), Checksum::EMPTY);
        assert_eq!(sums.set(Pgno(1), sum(1)), Checksum::NONE);
        assert_eq!(sums.set(Pgno(3), sum(4)), Checksum::NONE);
        assert_eq!((sums.len(), sums.rolling()), (3, sum(5)));
        assert_eq!(sums.set(Pgno(1), sum(2)), sum(1));
        assert_eq!(sums.rolling(), sum(6));
        sums.truncate(2);
        assert_eq!((sums.len(), sums.rolling()), (2, sum(2)));
        sums.truncate(5);
        assert_eq!((sums.len(), sums.rolling(), sums.get(Pgno(3))), (5, sum(2), Checksum::NONE));
        sums.truncate(0);
        assert_eq!((sums.is_empty(), sums.rolling()), (true, Checksum::EMPTY));
    }

    #[test]
    fn a_trial_foretells_what_the_change_does() {
        let before = PageSums::from_sums((1..=9).map(sum).collect());
        let changes = [(Pgno(2), sum(70)), (Pgno(8), sum(80)), (Pgno(12), sum(90))];
        for pages in [0, 1, 5, 8, 9, 12] {
            let mut after = before.clone();
            changes.into_iter().for_each(|(pgno, sum)| _ = after.set(pgno, sum));
            after.truncate(pages);
            assert_eq!(before.rolling_after(pages, changes), after.rolling(), "{pages} pages");
        }
    }

    /// A database file of `pages` pages of 512 bytes that differ, and an unused one behind.
    fn database(dir: &Path, pages: u32) -> File {
        let path = dir.join("database");
        let mut file = os::open_or_create("test", &path).unwrap();
        let page = |pgno: u32| [pgno.to_le_bytes(), [1, 2, 3, 4]].concat().repeat(64);
        file.write_all(&(1..=pages + 1).flat_map(page).collect::<Vec<u8>>()).unwrap();
        file
    }

    #[test]
    fn a_scan_sees_every_page_once() {
        let dir = tempfile::tempdir().unwrap();
        let page_size = PageSize::MIN;
        for pages in [0, 1, 2047, 2048, 2049, 10_000] {
            let file = database(dir.path(), pages);
            let done = AtomicU64::new(0);
            let progress = |bytes| _ = done.fetch_max(bytes, Ordering::Relaxed);
            let sums = scan(&file, page_size, pages, &progress).unwrap();
            assert_eq!(sums.len(), pages);
            assert_eq!(done.into_inner(), u64::from(pages) * 512);
            let mut page = [0; 512];
            for pgno in (1..=pages).map(Pgno) {
                file.read_exact_at(&mut page, page_size.offset(pgno)).unwrap();
                assert_eq!(sums.get(pgno), ltx::page_checksum(pgno, &page), "page {pgno}");
            }
        }
    }

    #[test]
    fn missing_pages_are_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let file = database(dir.path(), 1);
        file.set_len(700).unwrap();
        let sums = scan(&file, PageSize::MIN, 3, &|_| ()).unwrap();
        assert_eq!(sums.get(Pgno(3)), ltx::page_checksum(Pgno(3), &[0; 512]));
        let mut cut = [0; 512];
        file.read_exact_at(&mut cut[..188], 512).unwrap();
        assert_eq!(sums.get(Pgno(2)), ltx::page_checksum(Pgno(2), &cut));
    }

    #[test]
    fn the_lock_page_has_no_sum() {
        let file = tempfile::tempfile().unwrap();
        let lock = PageSize::MAX.lock_pgno();
        file.set_len(u64::from(lock.0 + 1) << 16).unwrap();
        let sums = scan(&file, PageSize::MAX, lock.0 + 1, &|_| ()).unwrap();
        assert_eq!(sums.get(lock), Checksum::NONE);
        assert_eq!(sums.get(Pgno(lock.0 + 1)), ltx::page_checksum(Pgno(lock.0 + 1), &[0; 65536]));
    }

    fn saved(pages: u32) -> Saved {
        let sums = PageSums::from_sums((1..=u64::from(pages)).map(|n| sum(n * n)).collect());
        let pos = Pos { txid: Txid(7), checksum: sums.rolling() };
        Saved { page_size: PageSize::MIN, pos, sums }
    }

    #[test]
    fn saved_sums_come_back_for_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checksums");
        let file = database(dir.path(), 3);
        assert_eq!(load(&path, &file).unwrap(), None);
        for pages in [0, 1, 1000] {
            save(&path, &file, &saved(pages)).unwrap();
            assert_eq!(load(&path, &file).unwrap(), Some(saved(pages)));
        }
    }

    #[test]
    fn saved_sums_of_a_changed_file_are_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checksums");
        let file = database(dir.path(), 3);
        save(&path, &file, &saved(3)).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(load(&path, &file).unwrap(), None, "another time");
        save(&path, &file, &saved(3)).unwrap();
        file.set_len(512).unwrap();
        assert_eq!(load(&path, &file).unwrap(), None, "another size");
        save(&path, &file, &saved(3)).unwrap();
        os::remove("test", &dir.path().join("database")).unwrap();
        let other = database(dir.path(), 3);
        assert_eq!(load(&path, &other).unwrap(), None, "another file");
    }

    #[test]
    fn damaged_saved_sums_are_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checksums");
        let file = database(dir.path(), 3);
        save(&path, &file, &saved(3)).unwrap();
        let good = std::fs::read(&path).unwrap();
        let check = |bytes: &[u8]| {
            let saved = os::open("test", &path).unwrap();
            saved.set_len(bytes.len() as u64).unwrap();
            saved.write_all_at(bytes, 0).unwrap();
            assert_eq!(load(&path, &file).unwrap(), None);
        };
        for bit in 0..good.len() * 8 {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            check(&flipped);
        }
        (0..good.len()).step_by(5).for_each(|len| check(&good[..len]));
        check(&[&good[..], &[0; 8]].concat());
    }
}
