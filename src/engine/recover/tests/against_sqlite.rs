//! Damaged logs and journals, by chance: what a start makes of a database with one of them is what SQLite
//! makes of copies of the same files.
//!
//! Where SQLite gives an error the start may do so too. If it does not, it has the pages that SQLite wrote
//! before it gave up, the last one filled up with zeros; or the database file alone, and a log of another
//! page size is in `lost+found/`. (With LTX files a database that does not match them is refused.)

use super::*;
use crate::properties::ram_dir;
use crate::sqlite::journal::{HEADER_SIZE, JOURNAL_MAGIC, JournalHeader};
use crate::sqlite::test_rng::Rng;
use crate::sqlite::wal::{self, ByteOrder, Frame, Salts, WalCursor, WalHeader};

/// Of each log and each journal so many are damaged.
const ROUNDS: u64 = 40;

/// Files as somebody left them.
#[derive(Clone)]
struct Left {
    database: Vec<u8>,
    /// `-wal` or `-journal`, and what is in it.
    beside: (&'static str, Vec<u8>),
    /// The name of a super-journal that is there.
    super_journal: Option<&'static str>,
}

/// What SQLite makes of them.
struct Truth {
    file: Vec<u8>,
    /// The size in pages; none if it gave an error.
    pages: Option<u32>,
    /// It is done with the other file.
    is_settled: bool,
}

impl Left {
    fn lay_down(&self, database: &Path, beside: &Path) {
        fs::write(database, &self.database).unwrap();
        fs::write(beside, &self.beside.1).unwrap();
    }

    fn by_sqlite(&self) -> Truth {
        let dir = ram_dir();
        let path = dir.path().join("db");
        let beside = dir.path().join(format!("db{}", self.beside.0));
        self.lay_down(&path, &beside);
        if let Some(name) = self.super_journal {
            fs::write(dir.path().join(name), b"x").unwrap();
        }
        // SQLite looks for a super-journal by the path that the journal names.
        if let Some(at) = find(&self.beside.1, b"/super/") {
            let name = String::from_utf8_lossy(&self.beside.1[at + 7..at + 12]).into_owned();
            let there = dir.path().join(&name).exists();
            let named = super_tail(&if there { dir.path().join(&name) } else { name.into() });
            fs::write(&beside, [&self.beside.1[..at - 4], &named].concat()).unwrap();
        }
        let connection = Connection::open(&path).unwrap();
        let pragma =
            |name| connection.pragma_query_value(None, name, |row| row.get::<_, u32>(0)).ok();
        let pages = pragma("schema_version").and_then(|_| pragma("page_count"));
        drop(connection);
        let is_settled = fs::metadata(&beside).map_or(0, |meta| meta.len()) == 0;
        Truth { file: fs::read(&path).unwrap(), pages, is_settled }
    }

    /// Starts a node with them, and compares.
    #[track_caller]
    fn check(&self, what: &str) {
        let target = Target::in_dir(ram_dir());
        let beside = match self.beside.0 {
            "-wal" => target.dir.wal(),
            _ => target.dir.journal(),
        };
        self.lay_down(&target.dir.database(), &beside);
        if let Some(name) = self.super_journal {
            fs::write(target.root.path().join("super-journals").join(name), b"x").unwrap();
        }
        let recovered = target.recover();
        let ours = fs::read(target.dir.database()).unwrap();
        let theirs = self.by_sqlite();
        match (recovered, theirs.pages.filter(|_| theirs.is_settled)) {
            (Ok(recovered), Some(pages)) => {
                let page_size = recovered.page_size.unwrap_or(PageSize::MIN).bytes();
                let len = theirs.file.len();
                // The commit in a log says how long the file is, whatever page 1 says.
                let pages = if self.beside.0 == "-wal" { len / page_size } else { pages as usize };
                assert_eq!(
                    (recovered.pages as usize, ours.len()),
                    (pages, pages * page_size),
                    "{what}"
                );
                assert!(ours == theirs.file[..ours.len()], "{what}: other pages than SQLite's");
            }
            (Ok(recovered), None) => {
                let kept = target.lost() == ["wal"] && ours == self.database;
                let (common, rest) = ours.split_at(ours.len().min(theirs.file.len()));
                let same = theirs.file.starts_with(common) && rest.iter().all(|byte| *byte == 0);
                assert!(kept || same, "{what}: {:?} where SQLite gives an error", recovered.pos);
            }
            (Err(error), Some(_)) => panic!("{what}: {error}, and SQLite reads it"),
            (Err(error), None) => {
                // What a journal brings back may be no database.
                let same = ours == self.database || ours == theirs.file;
                assert!(same, "{what}: {error}, and other pages than SQLite's");
            }
        }
    }
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).rposition(|window| window == part)
}

/// What is done to a file in one place.
fn damage(rng: &mut Rng, bytes: &mut Vec<u8>, from: usize) -> String {
    let at = from + rng.below((bytes.len() - from).max(1) as u64) as usize;
    match rng.below(4) {
        0 if at < bytes.len() => {
            bytes[at] ^= 1 << rng.below(8);
            format!("bit flipped in byte {at}")
        }
        1 => {
            bytes.truncate(at);
            format!("cut to {at}")
        }
        2 => {
            let tail = (0..rng.below(2000)).map(|_| rng.below(256) as u8);
            bytes.extend(tail);
            "garbage behind".to_owned()
        }
        _ => {
            let end = (at + 600).min(bytes.len());
            bytes[at.min(end)..end].fill(0);
            format!("zeros from {at}")
        }
    }
}

/// A log as frames.
struct Frames {
    header: WalHeader,
    /// Page number, size after the commit or 0, page.
    frames: Vec<(u32, u32, Vec<u8>)>,
}

impl Frames {
    /// All frames that stand there, whatever their salts and checksums.
    fn of(bytes: &[u8]) -> Frames {
        let header = WalHeader::parse(bytes).unwrap();
        let word = |frame: &[u8], at| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
        let frames = bytes[wal::HEADER_SIZE..].chunks_exact(wal::frame_size(header.page_size));
        let frames = frames.map(|frame| {
            (word(frame, 0), word(frame, 4), frame[wal::FRAME_HEADER_SIZE..].to_vec())
        });
        Frames { header, frames: frames.collect() }
    }

    /// With checksums that are right.
    fn encode(&self) -> Vec<u8> {
        let (mut bytes, mut cursor) =
            (self.header.encode().to_vec(), WalCursor::start(&self.header));
        for (pgno, commit, page) in &self.frames {
            let commit = Some(*commit).filter(|pages| *pages > 0);
            cursor.encode(&Frame { pgno: Pgno(*pgno), commit, page }, &mut bytes);
        }
        bytes
    }

    /// Makes it another log that is whole. Page 1 stays that of a database.
    fn change(&mut self, rng: &mut Rng) -> String {
        let (count, max) = (self.frames.len() as u64, self.largest());
        let at = rng.below(count) as usize;
        let to = rng.below(count) as usize;
        match rng.below(8) {
            0 if self.frames[at].0 != 1 => {
                self.frames[at].0 = 2 + rng.below(u64::from(max) + 2) as u32;
                format!("frame {at} is page {}", self.frames[at].0)
            }
            1 => {
                self.frames[at].1 = 0;
                format!("frame {at} is no commit")
            }
            2 => {
                self.frames[at].1 = 1 + rng.below(u64::from(max) + 3) as u32;
                format!("frame {at} is a commit of {} pages", self.frames[at].1)
            }
            3 => {
                self.frames.swap(at, to);
                format!("frames {at} and {to} swapped")
            }
            4 => {
                self.frames.truncate(at + 1);
                format!("{} frames", at + 1)
            }
            5 => {
                let end = self.frames[at].2.len() as u64;
                let byte = 100 + rng.below(end - 100) as usize;
                self.frames[at].2[byte] ^= 1 << rng.below(8);
                format!("byte {byte} of frame {at} is another one")
            }
            6 => {
                let order = [ByteOrder::Little, ByteOrder::Big][rng.below(2) as usize];
                self.header = WalHeader { order, salts: Salts(1, 2), ..self.header };
                format!("{order:?}")
            }
            _ => {
                let again = self.frames[at].clone();
                self.frames.insert(to, again);
                format!("frame {at} again at {to}")
            }
        }
    }

    fn largest(&self) -> u32 {
        self.frames.iter().map(|(pgno, commit, _)| *pgno.max(commit)).max().unwrap()
    }
}

/// Databases with a log: plain, cut by VACUUM, begun anew over an older run.
fn logs() -> Vec<Left> {
    let log = |page_size, steps: &dyn Fn(&mut Source)| {
        let mut source = Source::new(page_size, "wal");
        steps(&mut source);
        let read = |name| fs::read(source.path(name)).unwrap();
        Left { database: read("db"), beside: ("-wal", read("db-wal")), super_journal: None }
    };
    let shrunk = |source: &mut Source| {
        source.insert(6);
        source.run("delete from t where id > 1");
        source.run("vacuum");
        source.insert(2);
    };
    let restarted = |source: &mut Source| {
        source.insert(6);
        source.connection.execute_batch("pragma wal_checkpoint(restart)").unwrap();
        source.insert(2);
    };
    vec![log(512, &|source| source.insert(4)), log(1024, &shrunk), log(512, &restarted)]
}

#[test]
fn a_damaged_log_means_what_it_means_to_sqlite() {
    let mut rng = Rng::from_env_or(1);
    for left in logs() {
        left.check("as it was");
        for _ in 0..ROUNDS {
            let (mut left, mut what) = (left.clone(), String::new());
            let bytes = &mut left.beside.1;
            if rng.below(3) > 0 {
                let mut frames = Frames::of(bytes);
                for _ in 0..=rng.below(3) {
                    what += &format!("{}; ", frames.change(&mut rng));
                }
                *bytes = frames.encode();
            }
            if what.is_empty() || rng.below(3) == 0 {
                what += &damage(&mut rng, bytes, 0);
            }
            left.check(&what);
        }
    }
}

/// A log that another version of SQLite would have to read is nobody's to remove.
#[test]
fn a_log_of_an_unknown_version_stays() {
    let mut left = logs().remove(0);
    let log = &mut left.beside.1;
    log[7] ^= 1;
    let sum = wal::WalChecksum::default().update(ByteOrder::NATIVE, &log[..24]);
    log[24..28].copy_from_slice(&sum.0.to_be_bytes());
    log[28..32].copy_from_slice(&sum.1.to_be_bytes());
    assert_eq!(WalHeader::parse(log), Err(wal::WalHeaderError::Version));
    let theirs = left.by_sqlite();
    assert_eq!((theirs.pages, theirs.is_settled), (None, false));
    let target = Target::in_dir(ram_dir());
    left.lay_down(&target.dir.database(), &target.dir.wal());
    let error = target.recover().unwrap_err();
    assert!(crate::engine::chain_text(&error).contains("unknown wal version"), "{error}");
    assert!(fs::read(target.dir.wal()).unwrap() == left.beside.1);
    assert!(fs::read(target.dir.database()).unwrap() == left.database);
}

/// A database in the middle of a transaction that has spilled, and its journal.
fn journals() -> Vec<Left> {
    let hot = |page_size: u32, synchronous| {
        let dir = ram_dir();
        let path = dir.path().join("db");
        let connection = Connection::open(&path).unwrap();
        let sql = format!(
            "pragma page_size = {page_size}; pragma cache_size = 5; pragma synchronous = {synchronous};
             create table t (a integer primary key, b);
             with recursive s (i) as (select 1 union all select i + 1 from s where i < 40)
             insert into t select i, randomblob({page_size}) from s;
             begin; update t set b = randomblob({page_size}) where a < 20;
             insert into t (b) select b from t; delete from t where a > 30;"
        );
        connection.execute_batch(&sql).unwrap();
        let journal = fs::read(dir.path().join("db-journal")).unwrap();
        assert!(journal.starts_with(&JOURNAL_MAGIC));
        let database = fs::read(&path).unwrap();
        Left { database, beside: ("-journal", journal), super_journal: None }
    };
    vec![hot(512, "full"), hot(1024, "off"), hot(1024, "full")]
}

/// Changes a field of a header or the number of a page, which no checksum covers.
fn change_journal(rng: &mut Rng, bytes: &mut [u8], before: JournalHeader) -> String {
    let JournalHeader { page_size, database_pages: pages, sector_size: sector } = before;
    let page_size = page_size.bytes();
    let records = (bytes.len() - sector as usize) / (page_size + 8);
    let (at, value, what) = match rng.below(6) {
        0 => (8, rng.below(records as u64 + 3) as u32, "count"),
        1 => (12, rng.below(1 << 32) as u32, "nonce"),
        2 => (16, rng.below(u64::from(pages) + 5) as u32, "pages"),
        3 => (20, [0, 16, 32, 512, 4096, 1 << 17][rng.below(6) as usize], "sector size"),
        4 => (24, [0, 256, 512, 1024, 4096][rng.below(5) as usize], "page size"),
        _ => {
            let record = rng.below(records as u64) as usize;
            let at = sector as usize + record * (page_size + 8);
            (at, rng.below(u64::from(pages) + 5) as u32, "page number")
        }
    };
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    format!("{what} {value} at {at}; ")
}

/// The end of a journal that names a super-journal.
fn super_tail(name: &Path) -> Vec<u8> {
    let name = name.as_os_str().as_encoded_bytes();
    let sum = name.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    let lock = PageSize::new(512).unwrap().lock_pgno().0.to_be_bytes();
    let (len, sum) = ((name.len() as u32).to_be_bytes(), sum.to_be_bytes());
    [&lock, name, &len, &sum, &JOURNAL_MAGIC[..]].concat()
}

#[test]
fn a_damaged_journal_means_what_it_means_to_sqlite() {
    let mut rng = Rng::from_env_or(1);
    for left in journals() {
        left.check("as it was");
        for _ in 0..ROUNDS {
            let (mut left, mut what) = (left.clone(), String::new());
            let bytes = &mut left.beside.1;
            let before = JournalHeader::parse(bytes, None).unwrap();
            if rng.below(3) > 0 {
                for _ in 0..=rng.below(2) {
                    what += &change_journal(&mut rng, bytes, before);
                }
            }
            match rng.below(4) {
                0 => what += &damage(&mut rng, bytes, HEADER_SIZE),
                1 => {
                    left.super_journal = Some("mj001").filter(|_| rng.below(2) == 0);
                    bytes.extend(super_tail(Path::new("/super/mj001")));
                    what += &format!("super-journal, there: {:?}", left.super_journal);
                }
                _ => {}
            }
            left.check(&what);
        }
    }
}
