//! Databases that real SQLite made, their files as a crash may leave them, and what a start makes of
//! them. The states that SQLite committed are known, and every result is compared with them.
#![allow(clippy::disallowed_methods, reason = "tests make files in directories of their own")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Cursor;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use ltx::{Encoder, Header};
use rusqlite::Connection;
use tempfile::TempDir;

use super::*;
use crate::engine::checksum::{self, Saved};
use crate::os::fault;

mod against_sqlite;

const PAGE_SIZE: usize = 512;

const OPTIONS: Options =
    Options { compression: Compression::Lz4, node_id: NodeId(7), now_ms: 1_700_000_000_000 };

/// A place in a WAL: offset and size in bytes, and the salts.
type Span = (u64, u64, (u32, u32));

/// A database that SQLite writes to, and every state that it committed.
struct Source {
    dir: TempDir,
    connection: Connection,
    page_size: usize,
    /// The database as one file after each transaction; the first is empty.
    states: Vec<Vec<u8>>,
    /// Where each transaction stands in the WAL, if it does.
    spans: Vec<Option<Span>>,
}

impl Source {
    fn new(page_size: usize, mode: &str) -> Source {
        let dir = tempfile::tempdir().unwrap();
        let connection = Connection::open(dir.path().join("db")).unwrap();
        let set_up = format!(
            "pragma page_size = {page_size}; pragma synchronous = off;
             pragma wal_autocheckpoint = 0; pragma journal_mode = {mode};"
        );
        let _ = connection.execute_batch(&set_up);
        let mut source =
            Source { dir, connection, page_size, states: vec![vec![]], spans: vec![None] };
        if mode == "wal" {
            // The switch to WAL mode is a transaction of the rollback journal.
            source.record(None);
        }
        source.run("create table t (id integer primary key, x blob)");
        source
    }

    fn wal() -> Source {
        Source::new(PAGE_SIZE, "wal")
    }

    fn delete() -> Source {
        Source::new(PAGE_SIZE, "delete")
    }

    /// Runs one transaction.
    fn run(&mut self, sql: &str) {
        let before = fs::metadata(self.path("db-wal")).map_or(0, |meta| meta.len()).max(32);
        self.connection.execute_batch(sql).unwrap();
        let span = fs::read(self.path("db-wal")).ok().filter(|wal| wal.len() > 32).map(|wal| {
            let word = |at: usize| u32::from_be_bytes(wal[at..at + 4].try_into().unwrap());
            (before, wal.len() as u64 - before, (word(16), word(20)))
        });
        self.record(span);
    }

    /// Runs transactions that each insert a row.
    fn insert(&mut self, count: usize) {
        (0..count).for_each(|_| self.run("insert into t (x) values (randomblob(700))"));
    }

    fn record(&mut self, span: Option<Span>) {
        let state = self.state();
        assert_ne!(self.states.last(), Some(&state), "each step is a transaction");
        self.states.push(state);
        self.spans.push(span);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The whole database as one file, by SQLite's own checkpoint of a copy.
    fn state(&self) -> Vec<u8> {
        let copy = tempfile::tempdir().unwrap();
        for name in ["db", "db-wal"] {
            let _ = fs::copy(self.path(name), copy.path().join(name));
        }
        let path = copy.path().join("db");
        if fs::metadata(copy.path().join("db-wal")).is_ok_and(|meta| meta.len() > 0) {
            let connection = Connection::open(&path).unwrap();
            let count = connection
                .query_row("select count(*) from sqlite_schema", [], |row| row.get::<_, i64>(0));
            count.unwrap();
            drop(connection);
        }
        fs::read(path).unwrap()
    }

    fn last(&self) -> u64 {
        self.states.len() as u64 - 1
    }

    fn pages(&self, txid: u64) -> BTreeMap<Pgno, &[u8]> {
        let pages = self.states[txid as usize].chunks(self.page_size);
        (1..).map(Pgno).zip(pages).collect()
    }

    fn checksum(&self, txid: u64) -> Checksum {
        let sum =
            |sum: Checksum, (pgno, page): (Pgno, &[u8])| sum.toggle(ltx::page_checksum(pgno, page));
        self.pages(txid).into_iter().fold(Checksum::EMPTY, sum)
    }

    fn pos(&self, txid: u64) -> Pos {
        Pos { txid: Txid(txid), checksum: self.checksum(txid) }
    }

    /// The LTX file of the transactions from `min` to `max`.
    fn ltx(&self, min: u64, max: u64) -> Vec<u8> {
        let (before, after) = (self.pages(min - 1), self.pages(max));
        let pre = if min == 1 { Checksum::NONE } else { self.checksum(min - 1) };
        let span = self.spans[min as usize].zip(self.spans[max as usize]);
        let span = span.map(|(first, last)| (first.0, last.0 + last.1 - first.0, last.2));
        let (wal_offset, wal_size, salts) = span.unwrap_or_default();
        let header = Header {
            compression: Compression::Lz4,
            page_size: PageSize::new(self.page_size as u32).unwrap(),
            commit: after.len() as u32,
            min_txid: Txid(min),
            max_txid: Txid(max),
            timestamp_ms: max as i64,
            pre_apply: pre,
            wal_offset: wal_offset as i64,
            wal_size: wal_size as i64,
            wal_salt1: salts.0,
            wal_salt2: salts.1,
            node_id: NodeId(1),
        };
        let mut encoder = Encoder::new(Vec::new(), header).unwrap();
        for (pgno, page) in after.iter().filter(|(pgno, page)| before.get(pgno) != Some(page)) {
            encoder.page(*pgno, page).unwrap();
        }
        encoder.finish(self.checksum(max)).unwrap().0
    }
}

/// A database directory.
struct Target {
    root: TempDir,
    dir: DbDir,
}

impl Target {
    fn new() -> Target {
        Target::in_dir(tempfile::tempdir().unwrap())
    }

    fn in_dir(root: TempDir) -> Target {
        let path = root.path().join("dbs/db");
        fs::create_dir_all(path.join("ltx")).unwrap();
        fs::create_dir_all(root.path().join("super-journals")).unwrap();
        Target { root, dir: DbDir::new(&path) }
    }

    /// With the database files as SQLite has them now.
    fn of(source: &Source) -> Target {
        let target = Target::new();
        for (from, to) in [
            ("db", target.dir.database()),
            ("db-wal", target.dir.wal()),
            ("db-shm", target.dir.shm()),
            ("db-journal", target.dir.journal()),
        ] {
            let _ = fs::copy(source.path(from), to);
        }
        target
    }

    /// With the LTX files of these transactions, each one of its own.
    fn with(self, source: &Source, txids: impl IntoIterator<Item = u64>) -> Target {
        for txid in txids {
            self.put(source, txid, txid);
        }
        self
    }

    fn put(&self, source: &Source, min: u64, max: u64) {
        fs::write(self.ltx(min, max), source.ltx(min, max)).unwrap();
    }

    fn ltx(&self, min: u64, max: u64) -> PathBuf {
        self.dir.ltx_file(Txid(min), Txid(max))
    }

    fn copy(&self) -> Target {
        let copy = Target::new();
        copy_dir(self.root.path(), copy.root.path());
        copy
    }

    fn recover(&self) -> Result<Recovered, Error> {
        recover(&self.dir, &self.root.path().join("super-journals"), &OPTIONS)
    }

    /// Recovers, and checks that the result is the state `txid` of `source` at position `pos`.
    #[track_caller]
    fn check(&self, source: &Source, txid: u64, pos: Pos) -> Recovered {
        let recovered = self.recover().unwrap();
        assert_eq!(recovered.pos, pos);
        assert!(fs::read(self.dir.database()).unwrap() == source.states[txid as usize]);
        assert_eq!(recovered.pages as usize * source.page_size, source.states[txid as usize].len());
        assert_eq!(recovered.sums.rolling(), pos.checksum);
        assert_eq!(recovered.sums.len(), recovered.pages);
        for path in [self.dir.wal(), self.dir.shm(), self.dir.journal(), self.dir.checksums()] {
            assert!(!path.exists(), "{} is gone", path.display());
        }
        self.check_chain(pos);
        recovered
    }

    /// Checks that the chain ends at `pos`, and that each file but the first follows on another.
    #[track_caller]
    fn check_chain(&self, pos: Pos) {
        let mut names = chain::names(&self.dir.ltx()).unwrap();
        names.sort();
        assert!(names.iter().all(|name| ltx::parse_file_name(name).is_some()), "{names:?}");
        let mut before: Option<Pos> = None;
        for name in &names {
            let (header, trailer) =
                ltx::verify(&fs::read(self.dir.ltx().join(name)).unwrap()[..]).unwrap();
            assert!(before.is_none_or(|before| before == header.pre_pos()), "{names:?}");
            before = Some(Pos { txid: header.max_txid, checksum: trailer.post_apply });
        }
        assert_eq!(before, Some(pos), "{names:?}");
    }

    /// Recovers with a fault at every call in turn; each time the next start must end as the one
    /// without a fault does.
    #[track_caller]
    fn check_crashes(&self, source: &Source, txid: u64, pos: Pos) {
        for label in ["recover", "fence"] {
            let calls = self.check_crashes_at(label, source, txid, pos);
            assert!(calls > 0, "no call of {label}");
        }
    }

    /// How many calls with that label there are.
    #[track_caller]
    fn check_crashes_at(&self, label: &str, source: &Source, txid: u64, pos: Pos) -> u32 {
        for after in 0.. {
            let target = self.copy();
            fault::arm_here(fault::Fault { label: label.into(), after, errno: libc::EIO });
            let result = target.recover();
            if fault::disarm_here() {
                assert_eq!(result.unwrap().pos, pos);
                return after;
            }
            // Where the WAL cannot be fenced, start goes on.
            assert!(result.is_err() || label == "fence", "call {after} failed");
            let recovered = result.or_else(|_| target.recover());
            let recovered = recovered.unwrap_or_else(|error| panic!("after call {after}: {error}"));
            assert_eq!(recovered.pos, pos, "after call {after}");
            let database = fs::read(target.dir.database()).unwrap_or_default();
            assert!(database == source.states[txid as usize], "after call {after}");
            assert!(!target.dir.wal().exists() && !target.dir.journal().exists());
            target.check_chain(pos);
        }
        unreachable!("the number of calls has an end")
    }

    fn lost(&self) -> Vec<String> {
        let mut names = chain::names(&self.dir.lost_found()).unwrap();
        names.sort();
        names
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_dir(&entry.path(), &target),
            false => {
                fs::copy(entry.path(), &target).unwrap();
                let time = entry.metadata().unwrap().modified().unwrap();
                File::open(target).unwrap().set_modified(time).unwrap();
            }
        }
    }
}

fn overwrite(path: &Path, bytes: &[u8], offset: usize) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset as u64).unwrap();
}

#[test]
fn nothing_is_the_zero_position() {
    let target = Target::new();
    let recovered = target.recover().unwrap();
    assert_eq!((recovered.pos, recovered.page_size, recovered.pages), (Pos::ZERO, None, 0));
    fs::write(target.dir.database(), b"").unwrap();
    assert_eq!(target.recover().unwrap().pos, Pos::ZERO);
}

#[test]
fn a_database_without_a_chain_begins_one() {
    for mut source in [Source::wal(), Source::delete()] {
        source.insert(5);
        let target = Target::of(&source);
        let pos = Pos { txid: Txid(1), checksum: source.checksum(source.last()) };
        target.check_crashes(&source, source.last(), pos);
        let recovered = target.check(&source, source.last(), pos);
        assert_eq!(recovered.rebuilt, [Txid(1)]);
        let mut image = Vec::new();
        ltx::materialize(&fs::read(target.ltx(1, 1)).unwrap()[..], &mut image).unwrap();
        assert!(image == source.states[source.last() as usize]);
    }
}

#[test]
fn a_damaged_database_without_a_chain_stays() {
    for content in [&b"short"[..], &[7; 100], &[7; 4096]] {
        let target = Target::new();
        fs::write(target.dir.database(), content).unwrap();
        assert!(matches!(target.recover(), Err(Error::Damaged { .. })));
        assert_eq!(fs::read(target.dir.database()).unwrap(), content);
    }
}

#[test]
fn a_chain_that_is_whole_is_kept() {
    for mut source in [Source::wal(), Source::delete()] {
        source.insert(6);
        let last = source.last();
        let target = Target::of(&source).with(&source, 1..=last);
        target.check_crashes(&source, last, source.pos(last));
        let recovered = target.check(&source, last, source.pos(last));
        assert!(recovered.rebuilt.is_empty() && recovered.set_aside.is_empty());
        assert_eq!(recovered.timestamp_ms, last as i64);
        // A second start finds nothing to do.
        target.check(&source, last, source.pos(last));
    }
}

#[test]
fn commits_without_a_file_are_rebuilt_from_the_wal() {
    let mut source = Source::wal();
    source.insert(4);
    source.run("update t set x = randomblob(2000)");
    source.run("delete from t where id > 1");
    source.run("vacuum");
    source.insert(3);
    let last = source.last();
    for known in 1..last {
        let target = Target::of(&source).with(&source, 1..=known);
        let recovered = target.check(&source, last, source.pos(last));
        assert_eq!(recovered.rebuilt, (known + 1..=last).map(Txid).collect::<Vec<_>>());
        let mut replica = Cursor::new(source.states[known as usize].clone());
        for txid in known + 1..=last {
            let file = fs::read(target.ltx(txid, txid)).unwrap();
            let (header, trailer) = ltx::apply(&file[..], &mut replica).unwrap();
            assert_eq!(trailer.post_apply, source.checksum(txid));
            assert!(*replica.get_ref() == source.states[txid as usize], "transaction {txid}");
            let (offset, size, salts) = source.spans[txid as usize].unwrap();
            assert_eq!((header.wal_offset, header.wal_size), (offset as i64, size as i64));
            assert_eq!((header.wal_salt1, header.wal_salt2), salts);
            assert_eq!((header.node_id, header.timestamp_ms), (NodeId(7), OPTIONS.now_ms));
        }
    }
    let target = Target::of(&source).with(&source, 1..=3);
    target.check_crashes(&source, last, source.pos(last));
}

#[test]
fn frames_that_were_not_committed_do_not_count() {
    let mut source = Source::wal();
    source.insert(3);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    let wal = fs::read(target.dir.wal()).unwrap();
    fs::write(target.dir.wal(), &wal[..wal.len() - 100]).unwrap();
    fs::remove_file(target.ltx(last, last)).unwrap();
    target.check(&source, last - 1, source.pos(last - 1));
}

#[test]
fn torn_files_are_set_aside_and_rebuilt() {
    let mut source = Source::wal();
    source.insert(5);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    fs::write(target.ltx(last, last), b"").unwrap();
    let file = fs::read(target.ltx(last - 1, last - 1)).unwrap();
    fs::write(target.ltx(last - 1, last - 1), &file[..file.len() - 7]).unwrap();
    fs::write(target.dir.ltx().join("0000000000000009-0000000000000009.ltx.tmp"), b"x").unwrap();
    target.check_crashes(&source, last, source.pos(last));
    let recovered = target.check(&source, last, source.pos(last));
    assert_eq!(recovered.rebuilt, [Txid(last - 1), Txid(last)]);
    assert_eq!(recovered.set_aside.len(), 2);
    assert_eq!(target.lost().len(), 2);
}

#[test]
fn a_torn_file_inside_the_chain_ends_its_history() {
    let mut source = Source::wal();
    source.insert(5);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    fs::write(target.ltx(last - 1, last - 1), [0; 200]).unwrap();
    let recovered = target.recover().unwrap();
    assert_eq!(recovered.pos, source.pos(last));
    assert!(fs::read(target.dir.database()).unwrap() == source.states[last as usize]);
    assert_eq!(target.lost(), [ltx::file_name(Txid(last - 1), Txid(last - 1))]);
}

/// A power loss takes any part of what was not synced: of several files, and out of the middle of one.
#[test]
fn all_torn_files_inside_the_chain_are_set_aside() {
    let mut source = Source::wal();
    source.insert(6);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    let mut file = fs::read(target.ltx(last - 1, last - 1)).unwrap();
    let middle = file.len() / 2;
    file[middle..middle + 100].fill(0);
    fs::write(target.ltx(last - 1, last - 1), file).unwrap();
    for torn in [last - 2, last - 4] {
        fs::write(target.ltx(torn, torn), [0; 200]).unwrap();
    }
    let recovered = target.recover().unwrap();
    assert_eq!(recovered.pos, source.pos(last));
    assert!(fs::read(target.dir.database()).unwrap() == source.states[last as usize]);
    let torn = [last - 4, last - 2, last - 1].map(|txid| ltx::file_name(Txid(txid), Txid(txid)));
    assert_eq!(target.lost(), torn);
}

/// The node died after it had received the snapshot of a node with another history, and before its own
/// files were gone.
#[test]
fn a_snapshot_of_another_history_is_set_aside() {
    let (mut own, mut other) = (Source::delete(), Source::delete());
    own.insert(7);
    other.insert(5);
    for first in 1..=other.last() + 1 {
        let target = Target::of(&own).with(&own, first..=own.last());
        target.put(&other, 1, other.last());
        let pos = own.pos(own.last());
        target.check_crashes(&own, own.last(), pos);
        target.check(&own, own.last(), pos);
        let lost = [ltx::file_name(Txid(1), Txid(other.last()))];
        assert_eq!(target.lost(), lost, "from {first}");
        // What is there already is not kept twice.
        target.put(&other, 1, other.last());
        target.check(&own, own.last(), pos);
        assert_eq!(target.lost(), lost, "from {first}");
    }
}

/// A snapshot of the same history, such as LiteFS may have left, stays.
#[test]
fn a_snapshot_beside_what_it_holds_stays() {
    let mut source = Source::delete();
    source.insert(5);
    let target = Target::of(&source).with(&source, 1..=source.last());
    target.put(&source, 1, 4);
    let recovered = target.recover().unwrap();
    assert_eq!((recovered.pos, recovered.set_aside.len()), (source.pos(source.last()), 0));
}

#[test]
fn what_is_set_aside_never_replaces_what_was() {
    let source = Source::wal();
    let last = source.last();
    let name = ltx::file_name(Txid(last + 1), Txid(last + 1));
    let target = Target::of(&source).with(&source, 1..=last);
    for n in 0..3_u8 {
        fs::write(target.ltx(last + 1, last + 1), [n]).unwrap();
        target.check(&source, last, source.pos(last));
    }
    assert_eq!(target.lost(), [name.clone(), format!("{name}.1"), format!("{name}.2")]);
    let content = |name: &String| fs::read(target.dir.lost_found().join(name)).unwrap();
    assert_eq!(target.lost().iter().flat_map(content).collect::<Vec<_>>(), [0, 1, 2]);
}

/// Puts pages of `source`'s state `txid` into the database file of `target`, as a checkpoint that did
/// not finish leaves them.
fn backfill(target: &Target, source: &Source, txid: u64, wanted: impl Fn(u32) -> bool) {
    for (pgno, page) in source.pages(txid).into_iter().filter(|(pgno, _)| wanted(pgno.0)) {
        overwrite(&target.dir.database(), page, (pgno.0 as usize - 1) * source.page_size);
    }
}

#[test]
fn a_checkpoint_of_known_commits_may_be_unfinished() {
    let mut source = Source::wal();
    source.insert(8);
    let last = source.last();
    for known in [last - 2, last] {
        let target = Target::of(&source).with(&source, 1..=known);
        backfill(&target, &source, known, |pgno| pgno % 2 == 0);
        target.check_crashes(&source, last, source.pos(last));
        target.check(&source, last, source.pos(last));
    }
}

#[test]
fn a_checkpoint_may_be_ahead_of_the_chain() {
    let mut source = Source::wal();
    source.insert(8);
    source.connection.execute_batch("pragma wal_checkpoint(truncate)").unwrap();
    source.insert(2);
    let known = source.last();
    source.run("update t set x = randomblob(1500)");
    source.insert(2);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=known);
    backfill(&target, &source, last, |pgno| pgno % 2 == 1);
    target.check_crashes(&source, last, source.pos(last));
    let recovered = target.check(&source, last, source.pos(last));
    assert_eq!(recovered.rebuilt, [Txid(last)]);
    let file = fs::read(target.ltx(known + 1, last)).unwrap();
    let mut replica = Cursor::new(source.states[known as usize].clone());
    ltx::apply(&file[..], &mut replica).unwrap();
    assert!(*replica.get_ref() == source.states[last as usize]);
}

#[test]
fn a_checkpoint_may_be_ahead_of_a_chain_that_is_in_no_wal() {
    let mut source = Source::wal();
    source.insert(8);
    let last = source.last();
    // Only the switch to WAL mode has a file, and no WAL stands in its header.
    let target = Target::of(&source).with(&source, [1]);
    backfill(&target, &source, last, |pgno| pgno == 1 || pgno == 3);
    target.check_crashes(&source, last, source.pos(last));
    let recovered = target.check(&source, last, source.pos(last));
    assert_eq!(recovered.rebuilt, [Txid(last)]);
    let file = fs::read(target.ltx(2, last)).unwrap();
    let mut replica = Cursor::new(source.states[1].clone());
    ltx::apply(&file[..], &mut replica).unwrap();
    assert!(*replica.get_ref() == source.states[last as usize]);
}

#[test]
fn a_whole_checkpoint_is_not_captured_again() {
    let mut source = Source::wal();
    source.insert(5);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    fs::write(target.dir.database(), &source.states[last as usize]).unwrap();
    let recovered = target.check(&source, last, source.pos(last));
    assert!(recovered.rebuilt.is_empty());
}

#[test]
fn a_chain_that_is_ahead_is_applied() {
    for mut source in [Source::wal(), Source::delete()] {
        source.insert(6);
        let last = source.last();
        for held in 1..last {
            let target = Target::new().with(&source, 1..=last);
            fs::write(target.dir.database(), &source.states[held as usize]).unwrap();
            let recovered = target.check(&source, last, source.pos(last));
            assert_eq!(recovered.applied.last(), Some(&Txid(last)));
        }
        let target = Target::new().with(&source, 1..=last);
        fs::write(target.dir.database(), &source.states[last as usize - 3]).unwrap();
        target.check_crashes(&source, last, source.pos(last));
    }
}

/// The checksum of a database is the same if two equal pages are both zeros.
#[test]
fn lost_pages_are_found_where_the_checksum_is_right() {
    let mut source = Source::delete();
    source.run("create table u (id integer primary key, x blob)");
    source.run("create table v (id integer primary key, x blob)");
    let last = source.last();
    for missing in [0, 1] {
        let target = Target::of(&source).with(&source, 1..=last);
        let mut database = source.states[(last - missing) as usize].clone();
        assert_eq!(database[PAGE_SIZE..2 * PAGE_SIZE], database[2 * PAGE_SIZE..3 * PAGE_SIZE]);
        database[PAGE_SIZE..3 * PAGE_SIZE].fill(0);
        fs::write(target.dir.database(), database).unwrap();
        target.check_crashes(&source, last, source.pos(last));
    }
}

#[test]
fn a_chain_that_is_ahead_of_a_cut_wal_is_applied() {
    let mut source = Source::wal();
    source.insert(6);
    let last = source.last();
    let wal = fs::read(source.path("db-wal")).unwrap();
    for txid in 2..=last {
        let target = Target::of(&source).with(&source, 1..=last);
        let (offset, ..) = source.spans[txid as usize].unwrap();
        fs::write(target.dir.wal(), &wal[..offset as usize + 30]).unwrap();
        if txid == 4 {
            target.check_crashes(&source, last, source.pos(last));
        }
        target.check(&source, last, source.pos(last));
    }
}

#[test]
fn a_received_snapshot_wins_over_an_older_wal() {
    let mut own = Source::wal();
    own.insert(3);
    let mut primary = Source::wal();
    primary.insert(9);
    let last = primary.last();
    // Not begun to apply, half applied, and applied but for the WAL.
    for applied in [0, 5, u32::MAX] {
        let target = Target::of(&own);
        target.put(&primary, 1, last);
        backfill(&target, &primary, last, |pgno| pgno <= applied);
        let wal = File::open(target.dir.wal()).unwrap();
        wal.set_modified(SystemTime::now() - std::time::Duration::from_secs(1)).unwrap();
        target.check_crashes(&primary, last, primary.pos(last));
        let recovered = target.recover().unwrap();
        assert_eq!((recovered.pos, recovered.rebuilt.len()), (primary.pos(last), 0));
        assert!(fs::read(target.dir.database()).unwrap() == primary.states[last as usize]);
        assert_eq!(target.lost(), ["wal"]);
    }
}

#[test]
fn a_size_that_no_file_can_have_is_refused() {
    use crate::sqlite::wal::{Frame, WalCursor, WalHeader};
    let mut source = Source::wal();
    source.insert(1);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    let bytes = fs::read(target.dir.wal()).unwrap();
    let header = WalHeader::parse(&bytes).unwrap();
    let mut cursor = WalCursor::start(&header);
    let mut wal = header.encode().to_vec();
    let page = [0; PAGE_SIZE];
    cursor.encode(&Frame { pgno: Pgno(1), commit: Some(u32::MAX - 1), page: &page }, &mut wal);
    fs::write(target.dir.wal(), &wal).unwrap();
    assert!(matches!(target.recover(), Err(Error::Size { .. })));
    assert_eq!(fs::read(target.dir.wal()).unwrap(), wal);
}

#[test]
fn a_cut_wal_of_a_newer_database_is_set_aside() {
    let mut source = Source::wal();
    source.insert(6);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    fs::write(target.dir.database(), &source.states[last as usize]).unwrap();
    let wal = fs::read(target.dir.wal()).unwrap();
    let (offset, ..) = source.spans[last as usize - 2].unwrap();
    fs::write(target.dir.wal(), &wal[..offset as usize]).unwrap();
    target.check_crashes(&source, last, source.pos(last));
    target.check(&source, last, source.pos(last));
    assert_eq!(target.lost(), ["wal"]);
}

#[test]
fn a_half_applied_transaction_is_applied_again() {
    let mut source = Source::delete();
    source.insert(8);
    let last = source.last();
    let target = Target::new().with(&source, 1..=last);
    fs::write(target.dir.database(), &source.states[last as usize - 1]).unwrap();
    backfill(&target, &source, last, |pgno| pgno == 1);
    target.check_crashes(&source, last, source.pos(last));
    let recovered = target.check(&source, last, source.pos(last));
    assert_eq!(recovered.applied, [Txid(last)]);
}

#[test]
fn a_missing_database_comes_back_from_its_chain() {
    let mut source = Source::wal();
    source.insert(4);
    let last = source.last();
    let target = Target::new().with(&source, 1..=last);
    target.check_crashes(&source, last, source.pos(last));
    target.check(&source, last, source.pos(last));
}

#[test]
fn a_damaged_database_comes_back_from_its_chain() {
    let mut source = Source::delete();
    source.insert(4);
    let last = source.last();
    let target = Target::new().with(&source, 1..=last);
    fs::write(target.dir.database(), b"rubbish").unwrap();
    target.check_crashes(&source, last, source.pos(last));
    target.check(&source, last, source.pos(last));
    assert_eq!(target.lost(), ["database"]);
    // Without a snapshot it cannot, and everything stays.
    let target = Target::new().with(&source, [last]);
    fs::write(target.dir.database(), b"rubbish").unwrap();
    assert!(matches!(target.recover(), Err(Error::Diverged { .. })));
    assert_eq!(fs::read(target.dir.database()).unwrap(), b"rubbish");
}

#[test]
fn another_database_is_left_alone() {
    let mut source = Source::delete();
    source.insert(4);
    let mut other = Source::delete();
    other.insert(2);
    let last = source.last();
    let target = Target::of(&other).with(&source, 3..=last);
    let Err(Error::Diverged { want, have, .. }) = target.recover() else {
        panic!("the database is another one");
    };
    assert_eq!((want, have), (source.pos(last), other.checksum(other.last())));
    assert!(fs::read(target.dir.database()).unwrap() == other.states[other.last() as usize]);
    assert_eq!(chain::names(&target.dir.ltx()).unwrap().len() as u64, last - 2);
    assert!(target.lost().is_empty());
}

#[test]
fn files_before_a_gap_are_no_part_of_the_chain() {
    let mut source = Source::wal();
    source.insert(6);
    let last = source.last();
    let target = Target::of(&source).with(&source, (1..=3).chain(5..=last));
    let recovered = target.recover().unwrap();
    assert_eq!((recovered.pos, recovered.set_aside.len()), (source.pos(last), 0));
    // If only what is before the gap fits, that is the chain, and the WAL has the rest.
    let target = Target::of(&source).with(&source, 1..=3);
    let foreign = Source::wal();
    fs::write(target.ltx(6, 6), foreign.ltx(2, 2)).unwrap();
    target.check(&source, last, source.pos(last));
}

#[test]
fn range_files_are_files_of_the_chain() {
    let mut source = Source::wal();
    source.insert(6);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=2);
    target.put(&source, 3, 5);
    target.check_crashes(&source, last, source.pos(last));
    let recovered = target.check(&source, last, source.pos(last));
    assert_eq!(recovered.rebuilt.len() as u64, last - 5);
    let target = Target::new().with(&source, 1..=2);
    target.put(&source, 3, 5);
    fs::write(target.dir.database(), &source.states[1]).unwrap();
    target.check(&source, 5, source.pos(5));
}

#[test]
fn a_deletion_leaves_no_database() {
    let mut source = Source::wal();
    source.insert(3);
    let last = source.last();
    let deletion = Header {
        commit: 0,
        min_txid: Txid(last + 1),
        max_txid: Txid(last + 1),
        pre_apply: source.checksum(last),
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        ..ltx::verify(&source.ltx(last, last)[..]).unwrap().0
    };
    let encoder = Encoder::new(Vec::new(), deletion).unwrap();
    let (deletion, _) = encoder.finish(Checksum::EMPTY).unwrap();
    let pos = Pos { txid: Txid(last + 1), checksum: Checksum::EMPTY };
    let with_deletion = |target: Target| {
        fs::write(target.ltx(last + 1, last + 1), &deletion).unwrap();
        target
    };
    for target in [Target::new(), Target::of(&source)] {
        let target = with_deletion(target.with(&source, 1..=last));
        target.check_crashes(&source, 0, pos);
        let recovered = target.recover().unwrap();
        assert_eq!((recovered.pos, recovered.pages), (pos, 0));
        assert!(!target.dir.database().exists());
        assert!(target.lost().is_empty());
    }
    let mut other = Source::delete();
    other.insert(1);
    let target = with_deletion(Target::of(&other).with(&source, 1..=last));
    assert_eq!(target.recover().unwrap().pos, pos);
    assert_eq!(target.lost(), ["database"]);
}

/// A transaction that crashed with its journal hot and pages in the database file, and the state
/// that it would have led to, as the last state of the source.
fn crash_with_hot_journal() -> (Source, Target) {
    let mut source = Source::delete();
    source.insert(20);
    // A small cache, so that pages and with them the journal reach the files before the commit.
    source.connection.execute_batch("pragma cache_size = 2; pragma synchronous = full").unwrap();
    source.connection.execute_batch("begin; update t set x = randomblob(900)").unwrap();
    let target = Target::of(&source);
    source.run("commit");
    assert_ne!(fs::read(target.dir.database()).unwrap(), source.states[source.last() as usize - 1]);
    (source, target)
}

#[test]
fn a_hot_journal_is_rolled_back() {
    let (source, target) = crash_with_hot_journal();
    let before = source.last() - 1;
    let target = target.with(&source, 1..=before);
    target.check_crashes(&source, before, source.pos(before));
    target.check(&source, before, source.pos(before));
}

#[test]
fn a_commit_whose_file_exists_wins_over_its_hot_journal() {
    let (source, target) = crash_with_hot_journal();
    let last = source.last();
    let target = target.with(&source, 1..=last);
    target.check_crashes(&source, last, source.pos(last));
    let recovered = target.check(&source, last, source.pos(last));
    assert_eq!(recovered.applied, [Txid(last)]);
}

#[test]
fn a_hot_journal_without_a_chain_is_rolled_back() {
    let (source, target) = crash_with_hot_journal();
    let before = source.last() - 1;
    let pos = Pos { txid: Txid(1), checksum: source.checksum(before) };
    target.check_crashes(&source, before, pos);
    target.check(&source, before, pos);
}

/// Broken off after it had spilled pages into free ones: those are other ones when it is rolled back.
fn crash_over_free_pages() -> (Source, Target) {
    let mut source = Source::delete();
    source.insert(60);
    source.run("delete from t where id > 3");
    source.run("update t set x = randomblob(700) where id = 1");
    source.connection.execute_batch("pragma cache_size = 2; pragma synchronous = full").unwrap();
    // More pages than are free, and than a cache keeps that other tests have made larger.
    let insert = "insert into t(x) select randomblob(700) from t;".repeat(7);
    source.connection.execute_batch(&format!("begin; {insert}")).unwrap();
    let target = Target::of(&source);
    let len = source.states[source.last() as usize].len();
    assert!(fs::metadata(target.dir.database()).unwrap().len() > len as u64, "pages were spilled");
    (source, target)
}

/// The only LTX file that is left does not say what they were.
#[test]
fn a_rollback_over_free_pages_goes_on_from_the_chain() {
    let (source, target) = crash_over_free_pages();
    let before = source.last();
    let target = target.with(&source, before..=before);
    let whole = target.copy();
    let recovered = whole.recover().unwrap();
    assert_eq!(recovered.pos.txid, Txid(before + 1));
    assert_eq!(recovered.rebuilt, [Txid(before + 1)]);
    assert!(recovered.set_aside.is_empty() && !whole.dir.journal().exists());
    let database = fs::read(whole.dir.database()).unwrap();
    assert_eq!(database.len(), source.states[before as usize].len());
    let sql = Connection::open(whole.dir.database()).unwrap();
    let rows: u32 = sql.query_row("select count(*) from t", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 3);
    assert_eq!(whole.recover().unwrap().pos, recovered.pos);
    let mut after = source;
    after.states.push(database);
    target.check_crashes(&after, before + 1, recovered.pos);
}

/// A page that is in use is another one than the chain says.
#[test]
fn a_rollback_over_free_pages_excuses_no_other_page() {
    let (source, target) = crash_over_free_pages();
    let before = source.last();
    let target = target.with(&source, before..=before);
    let read = "select x from t where id = 1";
    let row: Vec<u8> = source.connection.query_row(read, [], |row| row.get(0)).unwrap();
    let end = &row[row.len() - 50..];
    let at = source.states[before as usize].windows(end.len()).position(|bytes| bytes == end);
    overwrite(&target.dir.database(), b"damaged!", at.unwrap());
    let result = target.recover();
    assert!(matches!(result, Err(Error::Diverged { .. })), "{result:?}");
    assert!(!target.dir.journal().exists() && target.lost().is_empty());
    assert!(matches!(target.recover(), Err(Error::Diverged { .. })));
}

/// Writes the whole journal of transaction `txid`.
fn write_journal(target: &Target, source: &Source, txid: u64) {
    let before = source.pages(txid - 1);
    let after = source.pages(txid);
    let changed: Vec<_> =
        before.iter().filter(|(pgno, page)| after.get(pgno) != Some(page)).collect();
    let mut journal = crate::sqlite::journal::JOURNAL_MAGIC.to_vec();
    let nonce = 77;
    for word in [changed.len() as u32, nonce, before.len() as u32, 512, PAGE_SIZE as u32] {
        journal.extend(word.to_be_bytes());
    }
    journal.resize(512, 0);
    for (pgno, page) in changed {
        journal.extend(pgno.0.to_be_bytes());
        journal.extend(*page);
        journal.extend(crate::sqlite::journal::record_checksum(nonce, page).to_be_bytes());
    }
    fs::write(target.dir.journal(), journal).unwrap();
}

/// Makes the journal of `target` name a super-journal, as the last step before a commit over several
/// databases.
fn name_super_journal(target: &Target) {
    let name = b"/somewhere/app.db-mj1234ABCD9";
    let sum = name.iter().fold(0_u32, |sum, byte| sum + u32::from(*byte));
    let lock = u32::try_from(0x4000_0000 / PAGE_SIZE + 1).unwrap();
    let mut journal = fs::read(target.dir.journal()).unwrap();
    journal.extend(lock.to_be_bytes());
    journal.extend(name);
    journal.extend((name.len() as u32).to_be_bytes());
    journal.extend(sum.to_be_bytes());
    journal.extend(crate::sqlite::journal::JOURNAL_MAGIC);
    fs::write(target.dir.journal(), journal).unwrap();
}

#[test]
fn a_journal_with_its_super_journal_is_rolled_back() {
    let (source, target) = crash_with_hot_journal();
    name_super_journal(&target);
    fs::write(target.root.path().join("super-journals/app.db-mj1234ABCD9"), b"").unwrap();
    let before = source.last() - 1;
    let target = target.with(&source, 1..=before);
    target.check_crashes(&source, before, source.pos(before));
    target.check(&source, before, source.pos(before));
}

#[test]
fn a_journal_whose_super_journal_is_gone_has_committed() {
    let mut source = Source::delete();
    source.insert(20);
    source.run("update t set x = randomblob(1200) where id > 10");
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last - 1);
    write_journal(&target, &source, last);
    name_super_journal(&target);
    target.check_crashes(&source, last, source.pos(last));
    let recovered = target.check(&source, last, source.pos(last));
    assert_eq!(recovered.rebuilt, [Txid(last)]);
    let file = fs::read(target.ltx(last, last)).unwrap();
    let mut replica = Cursor::new(source.states[last as usize - 1].clone());
    ltx::apply(&file[..], &mut replica).unwrap();
    assert!(*replica.get_ref() == source.states[last as usize]);
    // The LTX file may exist already.
    let target = Target::of(&source).with(&source, 1..=last);
    write_journal(&target, &source, last);
    name_super_journal(&target);
    assert!(target.check(&source, last, source.pos(last)).rebuilt.is_empty());
}

#[test]
fn a_stale_journal_that_is_not_whole_has_committed() {
    let (source, target) = crash_with_hot_journal();
    name_super_journal(&target);
    let last = source.last();
    fs::write(target.dir.database(), &source.states[last as usize]).unwrap();
    let target = target.with(&source, 1..=last - 1);
    target.check_crashes(&source, last, source.pos(last));
    target.check(&source, last, source.pos(last));
}

#[test]
fn a_journal_that_was_not_synced_changes_nothing() {
    let mut source = Source::delete();
    source.insert(3);
    source.connection.execute_batch("pragma synchronous = full; begin; delete from t").unwrap();
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    assert!(target.dir.journal().exists());
    target.check(&source, last, source.pos(last));
}

#[test]
fn a_lost_newest_file_does_not_undo_its_transaction() {
    let mut source = Source::delete();
    source.insert(5);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    let len = fs::metadata(target.ltx(last, last)).unwrap().len() as usize;
    overwrite(&target.ltx(last, last), &[0x55; 8], len / 2);
    target.check_crashes(&source, last, source.pos(last));
    let recovered = target.check(&source, last, source.pos(last));
    assert_eq!(recovered.rebuilt, [Txid(last)]);
    assert_eq!(target.lost(), [ltx::file_name(Txid(last), Txid(last))]);
}

#[test]
fn a_wal_of_another_page_size_is_set_aside() {
    let mut source = Source::delete();
    source.insert(3);
    let mut other = Source::new(4096, "wal");
    other.insert(1);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    fs::copy(other.path("db-wal"), target.dir.wal()).unwrap();
    target.check(&source, last, source.pos(last));
    assert_eq!(target.lost(), ["wal"]);
}

#[test]
fn every_page_size_is_recovered() {
    for page_size in [512, 1024, 4096, 65536] {
        let mut source = Source::new(page_size, "wal");
        source.insert(4);
        let last = source.last();
        let target = Target::of(&source).with(&source, 1..=2);
        target.check(&source, last, source.pos(last));
    }
}

#[test]
fn a_clean_start_reads_neither_files_nor_database() {
    let mut source = Source::wal();
    source.insert(3);
    let last = source.last();
    let pos = Pos { txid: Txid(5000), checksum: source.checksum(last) };
    let target = Target::new();
    fs::write(target.dir.database(), &source.states[last as usize]).unwrap();
    // Thousands of files that are only names: reading one of them would set it aside.
    (1..5000).for_each(|txid| fs::write(target.ltx(txid, txid), b"").unwrap());
    let file = source.ltx(last, last);
    let mut header = ltx::verify(&file[..]).unwrap().0;
    (header.min_txid, header.max_txid) = (pos.txid, pos.txid);
    // The newest is wrong inside, which only reading it whole would show.
    let trailer = &file[file.len() - ltx::TRAILER_SIZE..];
    fs::write(target.ltx(5000, 5000), [&header.encode()[..], b"???????", trailer].concat())
        .unwrap();
    let database = File::open(target.dir.database()).unwrap();
    let page_size = PageSize::MIN;
    let pages = source.pages(last).len() as u32;
    let sums = checksum::scan(&database, page_size, pages, &|_| ()).unwrap();
    let saved = Saved { page_size, pos, sums };
    checksum::save(&target.dir.checksums(), &database, &saved).unwrap();
    let recovered = target.recover().unwrap();
    assert_eq!((recovered.pos, recovered.mode), (pos, JournalMode::Wal));
    assert_eq!(recovered.sums, saved.sums);
    assert!(recovered.set_aside.is_empty());
    assert!(!target.dir.checksums().exists(), "they are good for one start");
}

/// SQLite cuts the file after the commit that made the database smaller, and that may fail.
#[test]
fn a_file_that_was_not_cut_after_a_commit_is_cut() {
    let mut source = Source::delete();
    source.insert(5);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=last);
    let database = File::open(target.dir.database()).unwrap();
    let len = database.metadata().unwrap().len();
    let pages = len as u32 / PAGE_SIZE as u32;
    let sums = checksum::scan(&database, PageSize::MIN, pages, &|_| ()).unwrap();
    overwrite(&target.dir.database(), &[1; 3 * PAGE_SIZE], len as usize);
    let saved = Saved { page_size: PageSize::MIN, pos: source.pos(last), sums };
    checksum::save(&target.dir.checksums(), &database, &saved).unwrap();
    target.check(&source, last, source.pos(last));
    assert_eq!(database.metadata().unwrap().len(), len);
}

#[test]
fn saved_checksums_of_an_earlier_position_are_still_those_of_the_file() {
    let mut source = Source::wal();
    source.insert(5);
    let last = source.last();
    let target = Target::of(&source).with(&source, 1..=2);
    let database = File::open(target.dir.database()).unwrap();
    let pages = database.metadata().unwrap().len() as u32 / PAGE_SIZE as u32;
    let sums = checksum::scan(&database, PageSize::MIN, pages, &|_| ()).unwrap();
    let pos = Pos { txid: Txid(1), checksum: sums.rolling() };
    let saved = Saved { page_size: PageSize::MIN, pos, sums };
    checksum::save(&target.dir.checksums(), &database, &saved).unwrap();
    target.check(&source, last, source.pos(last));
}

#[test]
fn thousands_of_commits_are_rebuilt_quickly() {
    let mut source = Source::wal();
    source.insert(1);
    let known = source.last();
    let insert = "insert into t (x) values (randomblob(100))";
    (0..3000).for_each(|_| source.connection.execute_batch(insert).unwrap());
    source.record(None);
    let target = Target::of(&source).with(&source, 1..=known);
    let last = Txid(known + 3000);
    let start = std::time::Instant::now();
    let recovered = target.recover().unwrap();
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    let state = source.last();
    assert_eq!(recovered.pos, Pos { txid: last, checksum: source.checksum(state) });
    assert_eq!(recovered.rebuilt.len(), 3000);
    assert!(fs::read(target.dir.database()).unwrap() == source.states[state as usize]);
    target.check_chain(recovered.pos);
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A copy of a fixture's database directory.
fn fixture(path: &str) -> Target {
    let target = Target::new();
    copy_dir(&fixtures().join(path), target.dir.path());
    target
}

#[test]
fn databases_of_a_litefs_node_keep_their_positions() {
    for compression in ["lz4", "raw"] {
        for (name, pages) in [("wal.db", 4), ("delete.db", 4), ("gone.db", 0)] {
            let target = fixture(&format!("data-dir/{compression}/dbs/{name}"));
            let newest = chain::names(&target.dir.ltx()).unwrap().into_iter().max().unwrap();
            let file = fs::read(target.dir.ltx().join(&newest)).unwrap();
            let (header, trailer) = ltx::verify(&file[..]).unwrap();
            let recovered = target.recover().unwrap();
            let pos = Pos { txid: header.max_txid, checksum: trailer.post_apply };
            assert_eq!((recovered.pos, recovered.pages), (pos, pages), "{compression}/{name}");
            assert!(recovered.rebuilt.is_empty() && recovered.applied.is_empty());
            assert!(recovered.set_aside.is_empty());
            target.check_chain(pos);
            if pages > 0 {
                let connection = Connection::open(target.dir.database()).unwrap();
                let ok = connection
                    .query_row("pragma integrity_check", [], |row| row.get::<_, String>(0));
                assert_eq!(ok.unwrap(), "ok", "{name}");
            } else {
                assert!(!target.dir.database().exists());
            }
        }
    }
}

#[test]
fn stores_of_litefs_own_tests_are_opened() {
    let recovered = fixture("store/open-and-write-snapshot/dbs/sqlite.db").recover().unwrap();
    assert_eq!(recovered.pos.to_string(), "000000000000000d/fe3831a381c602b9");
    assert_eq!(fixture("store/open-name-only/dbs/test.db").recover().unwrap().pos, Pos::ZERO);
    for name in ["open-short-database", "open-invalid-database-header"] {
        let target = fixture(&format!("store/{name}/dbs/test.db"));
        assert!(matches!(target.recover(), Err(Error::Damaged { .. })), "{name}");
        assert!(target.dir.database().exists());
    }
}
