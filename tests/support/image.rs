//! A database as its pages, read past the mount, and as its chain of LTX files applied to nothing.
//!
//! The pages are those of the database file with the committed frames of the WAL laid over them.
//! Nobody may be writing meanwhile.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Cursor};
use std::path::{Path, PathBuf};

use litefs::engine::layout::{DataDir, DbDir};
use litefs::sqlite::wal::{self, Frame, FrameReader, WalCursor, WalHeader};
use ltx::{Checksum, PageSize, Pgno, Pos, Txid};

use super::wait;

/// Where a database file says how large its pages are, and where its size in pages.
const PAGE_SIZE_AT: usize = 16;

/// The pages of a database.
#[derive(PartialEq, Eq)]
pub struct Image {
    page_size: PageSize,
    bytes: Vec<u8>,
}

/// The directory of one database of a node.
pub fn directory(data: &Path, name: &str) -> DbDir {
    DataDir::new(data).database(name)
}

impl Image {
    /// What stands in the files; none if there is no database.
    pub fn of_files(dir: &DbDir) -> Option<Image> {
        let bytes = fs::read(dir.database()).ok().filter(|bytes| !bytes.is_empty())?;
        let page_size = page_size(&bytes);
        let mut image = Image { page_size, bytes };
        image.lay_over(&fs::read(dir.wal()).unwrap_or_default());
        Some(image)
    }

    /// Puts the committed frames of a WAL over the pages.
    fn lay_over(&mut self, log: &[u8]) {
        let Ok(header) = WalHeader::parse(log) else { return };
        assert_eq!(header.page_size, self.page_size, "page size of the wal");
        let mut reader = FrameReader::new(&log[wal::HEADER_SIZE..], WalCursor::start(&header));
        let mut pending = BTreeMap::new();
        while let Ok(Frame { pgno, commit, page }) = reader.next_frame().unwrap() {
            pending.insert(pgno, page.to_vec());
            let Some(pages) = commit else { continue };
            let size = self.page_size.bytes();
            self.bytes.resize(pages as usize * size, 0);
            for (pgno, page) in std::mem::take(&mut pending) {
                if pgno.0 <= pages {
                    let at = self.page_size.offset(pgno) as usize;
                    self.bytes[at..at + size].copy_from_slice(&page);
                }
            }
        }
    }

    /// Without what lies behind the database in its file, if the header says how large it is (Database File Format,
    /// section 1.3.7).
    pub fn cut(mut self) -> Image {
        let field = |at: usize| u32::from_be_bytes(self.bytes[at..at + 4].try_into().unwrap());
        let (change, pages, valid_for) = (field(24), field(28), field(92));
        let len = self.page_size.bytes() * pages as usize;
        if pages > 0 && change == valid_for && len < self.bytes.len() {
            self.bytes.truncate(len);
        }
        self
    }

    /// The rolling checksum of its pages.
    pub fn checksum(&self) -> Checksum {
        let pages = self.bytes.chunks(self.page_size.bytes()).zip(1..);
        pages.fold(Checksum::EMPTY, |sum, (page, pgno)| match Pgno(pgno) {
            pgno if pgno == self.page_size.lock_pgno() => sum,
            pgno => sum.toggle(ltx::page_checksum(pgno, page)),
        })
    }

    /// The bytes of the database file that it is.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Size of the database in pages.
    pub fn pages(&self) -> usize {
        self.bytes.len() / self.page_size.bytes()
    }

    /// The pages that differ from those of `other`, for a message.
    pub fn differences(&self, other: &Image) -> Vec<u32> {
        let size = self.page_size.bytes();
        let pages = self.bytes.chunks(size).zip(other.bytes.chunks(size)).zip(1..);
        pages.filter(|((ours, theirs), _)| ours != theirs).map(|(_, pgno)| pgno).collect()
    }
}

fn page_size(bytes: &[u8]) -> PageSize {
    let stored = u16::from_be_bytes([bytes[PAGE_SIZE_AT], bytes[PAGE_SIZE_AT + 1]]);
    let bytes = if stored == 1 { 65536 } else { u32::from(stored) };
    PageSize::new(bytes).expect("a page size")
}

/// The files of a chain, by their first transaction.
pub fn chain_files(dir: &DbDir) -> Vec<(Txid, Txid, PathBuf)> {
    let names = fs::read_dir(dir.ltx()).into_iter().flatten().map(|entry| entry.unwrap().path());
    let parse = |path: PathBuf| {
        let (min, max) = ltx::parse_file_name(path.file_name()?.to_str()?)?;
        Some((min, max, path))
    };
    let mut files: Vec<_> = names.filter_map(parse).collect();
    files.sort();
    files
}

/// Waits until the chain reaches `pos`, then applies it to nothing: every file must verify and
/// follow on the one before. The database it leads to; none if the chain does not begin with the
/// whole database, or ends with its deletion.
#[track_caller]
pub fn replay_chain(dir: &DbDir, pos: Pos) -> Option<Image> {
    wait::until_or(
        || format!("chain up to {pos}: {:?}", chain_files(dir)),
        || (chain_files(dir).last()?.1 == pos.txid).then_some(()),
    );
    let mut database = Cursor::new(Vec::new());
    let mut at: Option<Pos> = None;
    let mut whole = false;
    for (min, max, path) in chain_files(dir) {
        let open = || BufReader::new(File::open(&path).unwrap());
        let (header, trailer) =
            ltx::verify(open()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!((header.min_txid, header.max_txid), (min, max), "{}", path.display());
        if header.is_snapshot() {
            whole = true;
            database = Cursor::new(Vec::new());
        } else if let Some(at) = at {
            // A replica takes a file of several transactions also where it has some of them.
            let inside = header.min_txid <= at.txid && at.txid < header.max_txid;
            assert!(inside || header.pre_pos() == at, "{} does not follow on {at}", path.display());
        }
        if whole {
            ltx::apply(open(), &mut database).unwrap();
        }
        at = Some(Pos { txid: max, checksum: trailer.post_apply });
    }
    assert_eq!(at, Some(pos), "the chain ends elsewhere");
    let bytes = database.into_inner();
    let image = (whole && !bytes.is_empty()).then(|| Image { page_size: page_size(&bytes), bytes });
    if let Some(image) = &image {
        assert_eq!(image.checksum(), pos.checksum, "the chain leads to other pages");
    }
    image
}
