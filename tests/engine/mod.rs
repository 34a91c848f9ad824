//! An engine driven by the calls that a mount would make, in a directory of its own: no kernel, no
//! network. Without a mount the wal-index is out of sight, as with `fuse.passthrough: off`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use litefs::engine::db::{Answer, Patience, Refusal};
use litefs::engine::files::{Backing, FileKind};
use litefs::engine::locks::{Handle, LockKind, Owner, Request};
use litefs::engine::{self, Db, DbName, Engine, Role};
use litefs::sqlite::lock_byte::{Lock, LockSet};
use ltx::{Compression, NodeId};

use crate::support::wait;

// What a primary knows of a backup that was made before it.
mod backup;
// What a primary refuses whose lease is not confirmed.
mod fence;
// What must not get lost when a step fails or the process ends there.
mod faults;
// What a primary does with what comes from the holder of a HALT lock.
mod lent;
// A log that an application writes past the engine.
mod mapped;
// Who asks without waiting while the engine itself is in the way.
mod patience;
// What a node does with what comes from its primary.
mod replica;
// Applications that die, and programs that remove files.
mod strangers;
// What follows on something that did not get to its end.
mod unfinished;
// What SQLite's calls tell where the wal-index is out of sight.
mod unseen;

/// Bytes of a page in these tests.
const PAGE: usize = 4096;

/// The one client of these tests.
const CLIENT: u64 = 7;

/// The open file through which it does everything.
const VIA: Handle = Handle(CLIENT);

/// An engine on `dir`.
fn open(dir: &Path) -> engine::Result<Arc<Engine>> {
    Engine::open(engine::Options {
        dir: dir.to_owned(),
        compression: Compression::Lz4,
        retention: Duration::ZERO,
        retention_interval: Duration::ZERO,
        retain: engine::Retain::Free,
        strict_verify: true,
        node_id: NodeId(1),
        clock: Box::new(|| 1),
    })
}

/// An engine on `dir` that may write.
fn primary(dir: &Path) -> Arc<Engine> {
    let engine = open(dir).unwrap();
    engine.set_role(Role::Primary);
    engine
}

/// The database `name`, made if it is missing.
fn database(engine: &Engine, name: &str) -> Arc<Db> {
    engine.database_or_new(&DbName::new(name).unwrap()).unwrap()
}

/// The bytes of a healthy database with `rows` rows, made by SQLite.
fn image(rows: u32) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db");
    let sqlite = rusqlite::Connection::open(&path).unwrap();
    sqlite.execute_batch("PRAGMA page_size = 4096; CREATE TABLE t (x)").unwrap();
    for row in 0..rows {
        sqlite.execute("INSERT INTO t VALUES (printf('%01000d', ?1))", [row]).unwrap();
    }
    drop(sqlite);
    fs::read(path).unwrap()
}

/// Asks for locks without waiting.
fn lock(db: &Db, set: LockSet, kind: LockKind) -> Result<(), Refusal> {
    let (sender, answer) = mpsc::channel();
    let request = Request { owner: Owner::client(CLIENT), via: VIA, set, kind };
    db.lock(request, Patience::None, Box::new(move |result| sender.send(result).unwrap()));
    answer.recv_timeout(Duration::from_secs(20)).expect("an answer")
}

fn write_locks() -> LockSet {
    LockSet::one(Lock::Reserved).with(Lock::Shared)
}

/// The answer to a call that is answered at once.
fn asked(call: impl FnOnce(Answer)) -> Result<(), Refusal> {
    let (sender, answers) = std::sync::mpsc::channel();
    call(Box::new(move |result| sender.send(result).unwrap()));
    answers.try_recv().expect("answered at once")
}

fn unlock_all(db: &Db) {
    db.unlock(Owner::client(CLIENT), LockSet::ALL, || ());
}

fn file(db: &Db, kind: FileKind) -> Arc<Backing> {
    match db.files().get(kind) {
        Some(backing) => backing,
        None => db.create_file(kind).unwrap(),
    }
}

/// Writes `content` as the database under a journal, as SQLite does, and does not end the journal.
fn begin(db: &Db, content: &[u8]) {
    lock(db, write_locks(), LockKind::Exclusive).unwrap();
    let journal = file(db, FileKind::Journal);
    asked(|answer| db.write_journal(&journal, 0, &[1; 512], answer)).unwrap();
    db.sync_file(&journal, VIA).unwrap();
    let database = file(db, FileKind::Database);
    for (index, page) in content.chunks(PAGE).enumerate() {
        db.write_database(&database, (index * PAGE) as u64, page).unwrap();
    }
}

/// One transaction that makes `content` the database.
fn commit(db: &Db, content: &[u8]) {
    begin(db, content);
    asked(|answer| db.remove_journal(answer)).unwrap();
    unlock_all(db);
}

/// Every file below `dir` with its content.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(contents(&path)),
            false => _ = found.insert(path.display().to_string(), fs::read(&path).unwrap()),
        }
    }
    found
}
