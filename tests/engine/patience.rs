//! Who asks for a lock without waiting, while the engine itself is in the way.

use std::io;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::Instant;

use litefs::engine::db::DbState;
use litefs::limits;
use litefs::os::fault::{self, Call, Verdict, Watch};
use ltx::{Checksum, Encoder, Header, Pos, Txid};

use super::mapped::Mapped;
use super::replica::{ltx_file, receive};
use super::*;
use crate::support::no_cache::NoCache;

/// An output that says when something is written to it, and takes it when it is told to.
struct Gate {
    reached: Sender<()>,
    open: Receiver<()>,
}

impl io::Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.reached.send(());
        // Open for good once its other side is gone.
        let _ = self.open.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A database with a rollback journal, on which a client has RESERVED and asks for the whole while a
/// snapshot is read; `play` gets the client's answers, and what lets the snapshot go on.
fn while_a_snapshot_is_read(
    patience: Patience,
    play: impl FnOnce(&Receiver<Result<(), Refusal>>, Sender<()>),
) {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "app.db");
    let source = dir.path().join("source");
    fs::write(&source, image(300)).unwrap();
    db.import(&source).unwrap();
    let (reached, is_reached) = mpsc::channel();
    let (opener, open) = mpsc::channel();
    thread::scope(|scope| {
        let snapshot = scope.spawn(|| db.snapshot(&mut Gate { reached, open }));
        is_reached.recv_timeout(Duration::from_secs(20)).expect("pages of the snapshot");
        lock(&db, LockSet::one(Lock::Reserved), LockKind::Exclusive).unwrap();
        let (sender, answers) = mpsc::channel();
        let set = LockSet::one(Lock::Shared);
        let request =
            Request { owner: Owner::client(CLIENT), via: VIA, set, kind: LockKind::Exclusive };
        db.lock(request, patience, Box::new(move |result| sender.send(result).unwrap()));
        play(&answers, opener);
        snapshot.join().unwrap().expect("a snapshot");
    });
    unlock_all(&db);
}

#[test]
fn who_writes_waits_for_a_snapshot_that_is_read() {
    while_a_snapshot_is_read(Patience::WithEngine, |answers, opener| {
        assert!(answers.try_recv().is_err(), "answered while the snapshot is read");
        drop(opener);
        let answer = answers.recv_timeout(Duration::from_secs(20));
        assert_eq!(answer.expect("an answer"), Ok(()));
    });
    while_a_snapshot_is_read(Patience::None, |answers, opener| {
        assert_eq!(answers.try_recv(), Ok(Err(Refusal::WouldBlock)));
        drop(opener);
    });
}

/// A disk that does not come to an end must not hold a client for as long.
#[test]
fn who_writes_does_not_wait_for_ever() {
    while_a_snapshot_is_read(Patience::WithEngine, |answers, opener| {
        let soon = answers.recv_timeout(limits::ENGINE_LOCK_WAIT / 2);
        assert_eq!(soon, Err(RecvTimeoutError::Timeout));
        let answer = answers.recv_timeout(Duration::from_secs(60));
        assert_eq!(answer, Ok(Err(Refusal::WouldBlock)));
        drop(opener);
    });
}

/// Asks for locks, waiting as long as `patience` says.
fn ask(db: &Db, set: LockSet, kind: LockKind, patience: Patience) -> Receiver<Result<(), Refusal>> {
    let (sender, answers) = mpsc::channel();
    let request = Request { owner: Owner::client(CLIENT), via: VIA, set, kind };
    db.lock(request, patience, Box::new(move |result| _ = sender.send(result)));
    answers
}

/// A lock of the whole file, as lockf(3) takes it: once it is granted what was committed is captured.
#[test]
fn who_waits_for_a_replica_gets_the_lock_when_it_lets_go() {
    for ends in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let engine = replica::replica(dir.path(), Arc::new(NoCache));
        let db = database(&engine, "db");
        let pos = receive(&engine, "db", &replica::snapshot(3).0).unwrap();
        wait::until_true("the snapshot", || db.pos() == pos);
        wait::until_true("hold of the wal", || {
            // Others may read, and nobody may have all of it.
            let may_read = lock(&db, LockSet::one(Lock::Shared), LockKind::Shared).is_ok();
            let may_write = lock(&db, LockSet::DATABASE, LockKind::Exclusive).is_ok();
            unlock_all(&db);
            may_read && !may_write
        });
        let answers = ask(&db, LockSet::DATABASE, LockKind::Exclusive, Patience::Any(1));
        assert!(answers.try_recv().is_err(), "answered at once");
        let (done, is_done) = mpsc::channel();
        let of_thread = engine.clone();
        thread::spawn(move || {
            match ends {
                true => of_thread.close().unwrap(),
                false => of_thread.set_role(Role::Primary),
            }
            done.send(()).unwrap();
        });
        assert_eq!(answers.recv_timeout(Duration::from_secs(20)), Ok(Ok(())), "ends: {ends}");
        is_done.recv_timeout(Duration::from_secs(20)).expect("an end");
    }
}

/// Has somebody do something when a call with this label is made for the first time.
struct Once<F>(&'static str, Mutex<Option<F>>);

impl<F: FnOnce() + Send> Watch for Once<F> {
    fn before(&self, label: &str, _call: &Call<'_>) -> Verdict {
        if label == self.0
            && let Some(act) = self.1.lock().unwrap().take()
        {
            act();
        }
        Verdict::Go
    }
    fn after(&self, _label: &str, _call: &Call<'_>) {}
}

/// A reader that waits for the applier, which removes the file.
#[test]
fn nobody_gets_a_lock_of_a_file_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let engine = replica::replica(dir.path(), Arc::new(NoCache));
    let db = database(&engine, "db");
    let content = image(3);
    let pages: Vec<Vec<u8>> = content.chunks(PAGE).map(<[u8]>::to_vec).collect();
    let (first, post) = ltx_file(1, Checksum::NONE, 1, &pages);
    let pos = receive(&engine, "db", &first).unwrap();
    wait::until_true("the snapshot", || db.pos() == pos);
    let header = *ltx::Decoder::new(&first[..]).unwrap().header();
    let header =
        Header { commit: 0, min_txid: Txid(2), max_txid: Txid(2), pre_apply: post, ..header };
    let (removal, _) = Encoder::new(Vec::new(), header).unwrap().finish(Checksum::EMPTY).unwrap();
    let (sender, asked) = mpsc::channel();
    let of_hook = db.clone();
    let act = move || {
        let set = LockSet::one(Lock::Pending);
        sender.send(ask(&of_hook, set, LockKind::Shared, Patience::WithEngine)).unwrap();
    };
    let once = Arc::new(Once("files:remove", Mutex::new(Some(act))));
    let watching = fault::watch(dir.path(), once);
    let pos = receive(&engine, "db", &removal).unwrap();
    wait::until_true("the removal", || db.pos() == pos);
    let answers = asked.recv_timeout(Duration::from_secs(20)).expect("a reader");
    assert_eq!(answers.recv_timeout(Duration::from_secs(20)), Ok(Err(Refusal::WouldBlock)));
    drop(watching);
    let (again, post) = ltx_file(3, Checksum::EMPTY, 1, &pages);
    receive(&engine, "db", &again).unwrap();
    let pos = Pos { txid: Txid(3), checksum: post };
    wait::until_true("the new database", || db.pos() == pos);
    engine.close().unwrap();
}

/// The applier compares every page after a failure, and a worker has other databases to serve.
#[test]
fn who_asks_for_a_failed_database_does_not_wait_for_a_comparison() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    engine.mounted(Arc::new(NoCache), true);
    let (db, page) = fence::wal_database(&engine);
    let mut log = Mapped::new(&db);
    log.write(1, &page, fence::FRAME);
    log.index(1);
    log.write_lock();
    log.write(2, &[&page[..PAGE - 1], &[1]].concat(), fence::FRAME);
    log.index(2);
    let failing = fault::watch(dir.path(), Arc::new(replica::Refusing("read:")));
    log.write_lock();
    assert!(matches!(db.state(), DbState::Failed(_)));
    let (opener, open) = mpsc::channel::<()>();
    let act = move || _ = open.recv();
    drop(failing);
    let once = Arc::new(Once("read:resync", Mutex::new(Some(act))));
    let watching = fault::watch(dir.path(), once);
    let begin = Instant::now();
    // So long that the database is tried again.
    wait::until_true("more than a second", || {
        let (of_thread, (sender, answers)) = (db.clone(), mpsc::channel());
        let write = LockSet::one(Lock::Write);
        thread::spawn(move || sender.send(lock(&of_thread, write, LockKind::Exclusive)));
        let answer = answers.recv_timeout(Duration::from_secs(15));
        assert_eq!(answer, Ok(Err(Refusal::WouldBlock)), "while all pages are compared");
        begin.elapsed() > Duration::from_millis(2500)
    });
    drop(opener);
    wait::until_true("the commit", || (db.pos().txid, db.state()) == (Txid(3), DbState::Ready));
    drop(watching);
    engine.close().unwrap();
}
